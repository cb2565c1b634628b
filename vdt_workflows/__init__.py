"""What the bundles' configs need around MONAI's engines: data, training and evaluation.

These are the names that configs use; everything else is imported from the module that it lives in. Names are imported
when first used, so that the command `vdt` answers at once.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NAMES = {
    "locks": ["hold", "leave_folders"],
    "naming": ["name_result"],
    "overrides": ["check_command_line"],
    "data.cache": ["SeededCacheDataset"],
    "data.images": ["collate_images", "find_images", "list_images"],
    "data.key_slices": ["add_losses", "collate_key_slices", "find_key_slices", "prepare_key_slices"],
    "data.nodule_tables": ["list_nodules"],
    "data.nodules": ["SaveSplit", "describe_origin", "describe_split", "find_nodules", "take_part", "weigh_classes"],
    "data.sampling": ["SeedEpochs", "SeededDataset", "SeededSampler"],
    "data.sides": ["find_pairs"],
    "data.volumes": ["find_volumes", "list_scans", "list_volumes"],
    "training.checkpoints": ["LoadWeights", "ResumeRun", "SaveWeights"],
    "training.held_out": ["take_cases"],
    "training.initialisation": ["describe_weights", "initialise", "pick_norm"],
    "training.losses": ["DeepSupervision", "SharedCrossEntropyLoss", "SharedDiceCELoss", "class_weights"],
    "training.optimisation": [
        "AverageWeights",
        "ClipGradients",
        "StepSchedule",
        "ValidateEpochs",
        "polynomial_rate",
        "rates_by_layer",
        "warm_up",
    ],
    "training.processes": ["join_processes", "leave_processes", "pick_device", "place", "share_batch", "share_out"],
    "training.shipped": ["find_weights", "first_weights", "list_weights"],
    "training.timing": ["KeepPace", "PacedRate", "fit_to_time"],
    "training.progress_bars": ["ShowProgress"],
    "training.runs": ["Attach", "RememberRun", "RunLog", "SaveScores", "SkippedImages"],
    "training.ownership": ["RunFolders"],
    "evaluation.classification": ["ReportNodules", "SaveMalignancy"],
    "evaluation.cubes": ["CubeInferer"],
    "evaluation.detection_report": ["DetectionReport", "DetectionScores"],
    "evaluation.dicom_seg": ["SaveDicomSegd", "writes_dicom"],
    "evaluation.features": ["PooledEncoder", "embed", "load_encoder"],
    "evaluation.inference": ["SlabInferer"],
    "evaluation.outputs": ["ReportVolumes", "SaveLesions", "SavePredictions", "VolumeWriter", "unbatch_lesions"],
    "evaluation.segmentation": ["CaseScores"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)  # `scripts.vdt_workflows` in a package


def _refuse_hidden(*names: str) -> None:
    """Say which file hides a package of these, as one called networks.py in the working folder would."""
    above = __name__.rpartition("vdt_workflows")[0]
    for name in names:
        found = find_spec(above + name)
        place = Path(__file__).resolve().parents[1] / name
        if found is not None and found.origin and Path(found.origin).resolve().parent != place:
            sentence = f"{found.origin}: hides the package {name} in {place}; rename it, or start in another folder"
            is_command = Path(sys.argv[0]).name in ("-m", "vdt", "__main__.py")
            raise SystemExit(sentence) if is_command else ImportError(sentence)


_refuse_hidden("networks", "vdt_transforms")
