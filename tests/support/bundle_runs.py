"""Run a bundle on tiny data, in this process or as the words of a command, and read what the run leaves."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import torch
from monai.bundle import ConfigParser

from tests.support.folders import BUNDLES as BUNDLES
from tests.support.folders import ROOT as ROOT
from vdt_workflows.errors import root_cause

BASE = ["train"]

# What makes each bundle small enough to train in seconds. The networks keep their depth.
SMALL = {"epochs": 2, "base_channels": 4, "num_workers": 0}
SEGMENTATION = {**SMALL, "steps_per_epoch": 2, "val_interval": 1, "batch_size": 2}
VOLUMES = {**SEGMENTATION, "spacing": "own", "warmup_steps": 1, "patch_size": [16, 24, 16], "overlap": 0.25}
TINY: dict[str, dict[str, Any]] = {
    "imagenet_vdt_pretraining": {**SMALL, "image_size": 32, "batch_size": 6},
    "bcv_multiorgan_segmentation": {
        **VOLUMES,
        "label_names": ["background", "a", "b"],
        "window": [-500.0, 500.0],
        "pairs": [],
    },
    "lits_liver_segmentation": VOLUMES,
    "lidc_nodule_segmentation": {**SEGMENTATION, "patch_size": [16, 16, 16], "jitter": 2},
    "lidc_nodule_classification": {**SMALL, "val_interval": 1, "batch_size": 4, "crop_size": 16, "jitter": 2},
    "deeplesion_lesion_detection": {
        **SMALL,
        "batch_size": 2,
        "micro_batch": 1,
        "depth": "18ba",
        "pyramid_channels": 16,
        "head_channels": 32,
        "sizes": [64, 80],
        "size": 80,
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


def infer(bundle: Path, models: Path, folder: Path, source: Path, *overlays: str, **more) -> None:
    """Run inference with the weights and settings in `models`; results go to `folder / "eval"`."""
    paths = {"ckpt_path": str(models / "model.pt"), "args_file": str(models / "run.json")}
    run(bundle, ["inference", *overlays], folder, source, **{**paths, **more})


def parse(bundle: Path, names: Sequence[str] = BASE, **settings) -> ConfigParser:
    """Read config files as MONAI does, with settings over them."""
    parser = ConfigParser(ConfigParser.load_config_files(config_files(bundle, list(names))))
    parser.update({"bundle_root": str(bundle), **settings})
    return parser


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def history(folder: Path) -> list[dict[str, str]]:
    """What a run noted of each epoch, but for the time."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder / "eval" / "history.csv")]


def remembered(folder: Path) -> dict[str, Any]:
    """The settings that evaluation and inference take over from a run."""
    return {k: v for k, v in read(folder / "models" / "run.json").items() if k != "_run_"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders `models` hold the same weights, bit for bit."""
    names = sorted(path.name for path in first.glob("*.pt"))
    pairs = [(weights(first / name), weights(second / name)) for name in names]
    return bool(pairs) and all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def sentence(error: BaseException) -> str:
    """What a user is shown of an error, which is one line."""
    message = str(root_cause(error))
    assert "\n" not in message
    return message
