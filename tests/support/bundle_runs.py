"""Run a bundle on tiny data, in this process or as the words of a command."""

from __future__ import annotations

from pathlib import Path

import monai.bundle

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
BASE = ["train"]

# What makes each bundle small enough to train in seconds. The networks keep their depth.
TINY = {
    "imagenet_vdt_pretraining": {
        "epochs": 2,
        "image_size": 32,
        "base_channels": 4,
        "batch_size": 6,
        "num_workers": 0,
    },
    "bcv_multiorgan_segmentation": {
        "epochs": 2,
        "steps_per_epoch": 2,
        "val_interval": 1,
        "batch_size": 2,
        "base_channels": 4,
        "num_workers": 0,
        "label_names": ["background", "a", "b"],
        "spacing": "own",
        "window": [-500.0, 500.0],
        "pairs": [],
        "warmup_steps": 1,
        "patch_size": [16, 24, 16],
        "overlap": 0.25,
    },
    "lits_liver_segmentation": {
        "epochs": 2,
        "steps_per_epoch": 2,
        "val_interval": 1,
        "batch_size": 2,
        "base_channels": 4,
        "num_workers": 0,
        "spacing": "own",
        "warmup_steps": 1,
        "patch_size": [16, 24, 16],
        "overlap": 0.25,
    },
    "lidc_nodule_segmentation": {
        "epochs": 2,
        "steps_per_epoch": 2,
        "val_interval": 1,
        "batch_size": 2,
        "base_channels": 4,
        "num_workers": 0,
        "patch_size": [16, 16, 16],
        "jitter": 2,
    },
    "lidc_nodule_classification": {
        "epochs": 2,
        "val_interval": 1,
        "batch_size": 4,
        "base_channels": 4,
        "num_workers": 0,
        "crop_size": 16,
        "jitter": 2,
    },
    "deeplesion_lesion_detection": {
        "epochs": 2,
        "batch_size": 2,
        "micro_batch": 1,
        "depth": "18ba",
        "base_channels": 4,
        "pyramid_channels": 16,
        "head_channels": 32,
        "sizes": [64, 80],
        "size": 80,
        "num_workers": 0,
    },
}


def config_files(bundle: Path, names: list[str]) -> list[str]:
    return [str(bundle / "configs" / f"{name}.yaml") for name in names]


def places(bundle: Path, folder: Path, names: list[str]) -> dict[str, str]:
    if "inference" in names:
        return {"output_dir": str(folder / "eval"), "ckpt_path": str(folder / "models" / "model.pt")}
    return {"output_dir": str(folder / "eval"), "ckpt_dir": str(folder / "models")}


def command(bundle: Path, names: list[str], folder: Path, dataset_dir: Path, **more) -> list[str]:
    """Give the words after `python -m` that do the same as `run` in a process of its own."""
    settings = {} if "inference" in names else TINY[bundle.name]
    words = ["monai.bundle", "run", "--config_file", str(config_files(bundle, names))]
    settings = {
        "bundle_root": str(bundle),
        "dataset_dir": str(dataset_dir),
        **settings,
        **places(bundle, folder, names),
    }
    for name, value in {**settings, **more}.items():
        words += [f"--{name}", value if isinstance(value, str) else repr(value)]
    return words


def run(bundle: Path, names: list[str], folder: Path, dataset_dir: Path, **more) -> None:
    settings = {} if "inference" in names else TINY[bundle.name]
    monai.bundle.run(
        config_file=config_files(bundle, names),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(dataset_dir),
        **{**settings, **places(bundle, folder, names), **more},
    )
