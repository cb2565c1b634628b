"""What the bundles' configs need around MONAI's engines: data, training and evaluation.

These are the names that configs use; everything else is imported from the module that it lives in. Names are imported
when first used, so that the command `vdt` answers at once.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "overrides": ["check_command_line"],
    "data.cache": ["SeededCacheDataset"],
    "data.images": ["collate_images", "find_images", "list_images"],
    "data.key_slices": ["add_losses", "collate_key_slices", "find_key_slices", "prepare_key_slices"],
    "data.nodule_tables": ["list_nodules"],
    "data.nodules": ["SaveSplit", "describe_origin", "describe_split", "find_nodules", "take_part", "weigh_classes"],
    "data.sampling": ["SeedEpochs", "SeededDataset", "SeededSampler"],
    "data.volumes": ["find_volumes", "list_scans", "list_volumes"],
    "training.checkpoints": ["LoadWeights", "ResumeRun", "SaveWeights"],
    "training.initialisation": ["initialise"],
    "training.optimisation": ["ClipGradients", "StepSchedule", "ValidateEpochs", "polynomial_rate", "warm_up"],
    "training.processes": ["join_processes", "leave_processes", "pick_device", "place", "share_out"],
    "training.runs": ["Attach", "RememberRun", "RunLog", "SaveScores", "SkippedImages"],
    "evaluation.classification": ["ReportNodules", "SaveMalignancy"],
    "evaluation.detection_report": ["DetectionReport", "DetectionScores"],
    "evaluation.dicom_seg": ["SaveDicomSegd", "writes_dicom"],
    "evaluation.inference": ["SlabInferer"],
    "evaluation.outputs": ["SaveLesions", "SavePredictions", "unbatch_lesions"],
    "evaluation.segmentation": ["CaseScores"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)  # `scripts.vdt_workflows` in a package
