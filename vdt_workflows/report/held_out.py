"""Which cases of a comparison are learned from and which are held out, the same for all rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vdt_transforms.checks import to_whole
from vdt_transforms.geometry import open_volume, read_voxels
from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.files import read_json


@dataclass(frozen=True)
class Split:
    """Cases to learn from and cases to score.

    Attributes:
        pool, scored: the labelled cases to learn from, and the held-out ones.
        size: how many are learned from with all labels.
        draw: gives the list of a cell from its number of labelled cases and its seed.
        option: the bundle's setting that takes the list.
        train: more settings of the training.
        example: a held-out volume for a picture, or None.
    """

    pool: Sequence[Mapping[str, Any]]
    scored: Sequence[Mapping[str, Any]]
    size: int
    draw: Callable[[int, int], dict[str, Any]]
    option: str
    train: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, str] | None = None


def split_volumes(
    dataset_dir: str,
    datalist: str | None,
    held_out: int,
    curve_cases: int,
    training_cases: int | None,
    geometry: str = "refuse",
) -> Split:
    """Separate the volumes; test cases with labels are held out, or else a draw of the labelled ones."""
    cases = find_volumes(dataset_dir, datalist=datalist, geometry=geometry)
    tests = [case for case in cases["test"] if "label" in case]
    labelled = [*cases["training"], *cases["validation"]]
    if not tests:
        order = np.random.default_rng(0).permutation(len(labelled))
        number = min(held_out, max(1, len(labelled) // 2))
        tests, labelled = ([labelled[i] for i in sorted(part)] for part in (order[:number], order[number:]))
    order = np.random.default_rng(0).permutation(len(labelled))[:training_cases]
    pool = [_absolute(labelled[i]) for i in sorted(order)]
    scored = [_absolute(case) for case in tests[:held_out]]

    def draw(count: int, seed: int) -> dict[str, Any]:
        return {
            "training": [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[:count]],
            "validation": scored[:curve_cases],
            "test": scored,
            "shared_cases": "the curve is drawn from some of the held-out cases, and nothing is selected on them",
        }

    return Split(pool, scored, len(pool), draw, "datalist", example={**scored[0], "geometry": geometry})


def split_nodules(
    bundle: str,
    dataset_dir: str,
    settings: Mapping[str, Any],
    held_out: int,
    curve_cases: int,
    training_cases: int | None,
) -> Split:
    """Separate the nodules; all nodules of a patient are learned from, or all are scored.

    Raises:
        ValueError: if what is scored, while training or after it, is all benign or all malignant.
    """
    options = {name: settings[name] for name in ("table", "label_rule") if name in settings}
    options["task"] = bundle.rpartition("_")[2]
    every = find_nodules(dataset_dir, split="all", **options)["test"]
    test_fraction = min(0.5, held_out / len(every))
    parts = find_nodules(dataset_dir, val_fraction=0.0, test_fraction=test_fraction, **options)
    pool, scored = parts["training"], parts["test"]
    if options["task"] == "classification":  # whose area under the ROC curve needs both
        for name, some in (("held_out", scored), ("curve_cases", scored[:curve_cases])):
            if len({nodule["label"] for nodule in some}) < 2:
                raise ValueError(f"{name}: the {len(some)} nodules that it names are of one class, take more")
    patients: dict[str, list[str]] = {}
    for nodule in pool:
        patients.setdefault(nodule["patient_id"], []).append(nodule["nodule_id"])

    def draw(count: int, seed: int) -> dict[str, Any]:
        chosen: list[str] = []
        for patient in np.random.default_rng(seed).permutation(sorted(patients)).tolist():
            if len(chosen) < count:
                chosen += patients[patient]
        test = [nodule["nodule_id"] for nodule in scored]
        return {"split": "comparison", "training": chosen, "validation": [], "test": test}

    size = min(len(pool), training_cases or len(pool))
    followed = f"$vdt_workflows.take_part(@nodules, 'test')[:{curve_cases}]"
    return Split(pool, scored, size, draw, "split", {"validate::dataset::data": followed})


def count_cases(share: float, available: int) -> int:
    """Number of labelled cases of a share.

    Raises:
        ValueError: if the share is not in (0, 1], or is no case at all.
    """
    if not 0 < share <= 1:
        raise ValueError(f"fractions must be above 0 and at most 1, got {share:g}")
    count = int(share * available + 0.5)
    if count == 0:
        least = -(-5000 // available) / 10000
        raise ValueError(f"fraction {share:g} of {available} labelled cases is none; take at least {least:g}")
    return count


def find_label_names(
    dataset_dir: str, datalist: str | None, cases: Sequence[Mapping[str, Any]], geometry: str = "refuse"
) -> list[str]:
    """Take the names from dataset.json, or number the values that the labels of the cases hold."""
    listing = Path(datalist or Path(dataset_dir, "dataset.json"))
    found = read_json(listing, "a whole one").get("labels", {}) if listing.is_file() else {}
    if found:
        named = {int(k): v for k, v in found.items()} if "0" in found else {int(v): k for k, v in found.items()}
        return [named[value] for value in sorted(named)]
    highest = max(int(to_whole(read_voxels(open_volume(case["label"], geometry))).max()) for case in cases)
    return ["background", *(f"label {value}" for value in range(1, highest + 1))]


def describe_cases(cases: Sequence[Mapping[str, Any]]) -> str:
    """Say how many cases there are, and give the hash of their names."""
    names = sorted(str(case.get("nodule_id", Path(str(case["image"])).name)) for case in cases)
    return f"{len(names)} cases, sha256 of names {hashlib.sha256(chr(10).join(names).encode()).hexdigest()}"


def _absolute(case: Mapping[str, str]) -> dict[str, str]:
    return {key: str(Path(path).resolve()) for key, path in case.items()}
