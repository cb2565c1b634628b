"""What the bundles' configs need around MONAI's engines: finding data, seeding, checkpoints, resuming, run records.

Names are imported when first used, so that a script pays for what it needs alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdt_workflows.cached import SeededCacheDataset
    from vdt_workflows.checkpoints import (
        LoadWeights,
        ResumeRun,
        SaveWeights,
        claim,
        load_weights,
        read_provenance,
        save_atomic,
        save_weights,
        write_atomic,
    )
    from vdt_workflows.command_line import check_command_line
    from vdt_workflows.detection_handlers import DetectionReport, DetectionScores
    from vdt_workflows.detection_scores import KeySlice, draw_froc, froc, score_detections
    from vdt_workflows.dicom import DicomFolder, DicomSeries, find_series
    from vdt_workflows.dicom_seg import SaveDicomSegd, writes_dicom
    from vdt_workflows.headers import check_geometry
    from vdt_workflows.image_cache import CacheRules, cache_images
    from vdt_workflows.image_folders import ImageList, collate_images, find_images
    from vdt_workflows.inferers import SlabInferer
    from vdt_workflows.initialisation import INITIALISATIONS, describe_weights, initialise
    from vdt_workflows.key_slices import add_losses, collate_key_slices, find_key_slices, prepare_key_slices
    from vdt_workflows.lesions import SaveLesions, list_scans, unbatch_lesions
    from vdt_workflows.nodule_positions import list_nodules
    from vdt_workflows.nodule_reports import ReportNodules, SaveMalignancy
    from vdt_workflows.nodules import SaveSplit, describe_origin, describe_split, find_nodules, take_part, weigh_classes
    from vdt_workflows.optimisation import ClipGradients, StepSchedule, warm_up
    from vdt_workflows.parallel import run_parallel
    from vdt_workflows.predictions import SavePredictions, list_images
    from vdt_workflows.runs import Attach, RememberRun, RunLog, SaveScores, SkippedImages
    from vdt_workflows.schedules import polynomial_rate
    from vdt_workflows.scripts import run_script
    from vdt_workflows.seeded import SeededDataset, SeededSampler, SeedEpochs, mix_seed
    from vdt_workflows.segmentation_scores import CaseScores, OrganScore, score_organs, summarise
    from vdt_workflows.validation import ValidateEpochs
    from vdt_workflows.volumes import find_volumes, list_volumes

_MODULES = {
    "INITIALISATIONS": "initialisation",
    "Attach": "runs",
    "CacheRules": "image_cache",
    "CaseScores": "segmentation_scores",
    "ClipGradients": "optimisation",
    "DetectionReport": "detection_handlers",
    "DetectionScores": "detection_handlers",
    "DicomFolder": "dicom",
    "DicomSeries": "dicom",
    "ImageList": "image_folders",
    "KeySlice": "detection_scores",
    "LoadWeights": "checkpoints",
    "OrganScore": "segmentation_scores",
    "RememberRun": "runs",
    "ReportNodules": "nodule_reports",
    "ResumeRun": "checkpoints",
    "RunLog": "runs",
    "SaveDicomSegd": "dicom_seg",
    "SaveLesions": "lesions",
    "SaveMalignancy": "nodule_reports",
    "SavePredictions": "predictions",
    "SaveScores": "runs",
    "SaveSplit": "nodules",
    "SaveWeights": "checkpoints",
    "SeedEpochs": "seeded",
    "SeededCacheDataset": "cached",
    "SeededDataset": "seeded",
    "SeededSampler": "seeded",
    "SkippedImages": "runs",
    "SlabInferer": "inferers",
    "StepSchedule": "optimisation",
    "ValidateEpochs": "validation",
    "add_losses": "key_slices",
    "cache_images": "image_cache",
    "check_command_line": "command_line",
    "check_geometry": "headers",
    "claim": "checkpoints",
    "collate_images": "image_folders",
    "collate_key_slices": "key_slices",
    "describe_origin": "nodules",
    "describe_split": "nodules",
    "describe_weights": "initialisation",
    "draw_froc": "detection_scores",
    "find_images": "image_folders",
    "find_key_slices": "key_slices",
    "find_nodules": "nodules",
    "find_series": "dicom",
    "find_volumes": "volumes",
    "froc": "detection_scores",
    "initialise": "initialisation",
    "list_images": "predictions",
    "list_nodules": "nodule_positions",
    "list_scans": "lesions",
    "list_volumes": "volumes",
    "load_weights": "checkpoints",
    "mix_seed": "seeded",
    "polynomial_rate": "schedules",
    "prepare_key_slices": "key_slices",
    "read_provenance": "checkpoints",
    "run_parallel": "parallel",
    "run_script": "scripts",
    "save_atomic": "checkpoints",
    "save_weights": "checkpoints",
    "score_detections": "detection_scores",
    "score_organs": "segmentation_scores",
    "summarise": "segmentation_scores",
    "take_part": "nodules",
    "unbatch_lesions": "lesions",
    "warm_up": "optimisation",
    "weigh_classes": "nodules",
    "write_atomic": "checkpoints",
    "writes_dicom": "dicom_seg",
}
__all__ = [
    "INITIALISATIONS",
    "Attach",
    "CacheRules",
    "CaseScores",
    "ClipGradients",
    "DetectionReport",
    "DetectionScores",
    "DicomFolder",
    "DicomSeries",
    "ImageList",
    "KeySlice",
    "LoadWeights",
    "OrganScore",
    "RememberRun",
    "ReportNodules",
    "ResumeRun",
    "RunLog",
    "SaveDicomSegd",
    "SaveLesions",
    "SaveMalignancy",
    "SavePredictions",
    "SaveScores",
    "SaveSplit",
    "SaveWeights",
    "SeedEpochs",
    "SeededCacheDataset",
    "SeededDataset",
    "SeededSampler",
    "SkippedImages",
    "SlabInferer",
    "StepSchedule",
    "ValidateEpochs",
    "add_losses",
    "cache_images",
    "check_command_line",
    "check_geometry",
    "claim",
    "collate_images",
    "collate_key_slices",
    "describe_origin",
    "describe_split",
    "describe_weights",
    "draw_froc",
    "find_images",
    "find_key_slices",
    "find_nodules",
    "find_series",
    "find_volumes",
    "froc",
    "initialise",
    "list_images",
    "list_nodules",
    "list_scans",
    "list_volumes",
    "load_weights",
    "mix_seed",
    "polynomial_rate",
    "prepare_key_slices",
    "read_provenance",
    "run_parallel",
    "run_script",
    "save_atomic",
    "save_weights",
    "score_detections",
    "score_organs",
    "summarise",
    "take_part",
    "unbatch_lesions",
    "warm_up",
    "weigh_classes",
    "write_atomic",
    "writes_dicom",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)  # `scripts.vdt_workflows` in a package
