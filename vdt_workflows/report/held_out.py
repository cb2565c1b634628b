"""Which cases of a comparison are learned from and which are held out, the same for all rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.data.volumes import find_volumes


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


class VolumeSplit:
    """Volumes to learn from and volumes to score.

    Attributes:
        size: number of labelled cases to learn from.
        scored: the held-out cases.
        pool, held_out: how many cases there are to learn from and to score, with the hash of their names.
        example: a held-out case for a picture, or None.
    """

    def __init__(
        self, dataset_dir: str, datalist: str | None, held_out: int, curve_cases: int, training_cases: int | None
    ) -> None:
        self.source = (Path(dataset_dir), datalist)
        pool, scored = hold_out(find_volumes(dataset_dir, datalist=datalist), held_out)
        order = np.random.default_rng(0).permutation(len(pool))[:training_cases]
        self._pool, self.scored = [_absolute(pool[i]) for i in sorted(order.tolist())], [_absolute(c) for c in scored]
        self._curve = self.scored[:curve_cases]
        self.size = len(self._pool)
        self.pool, self.held_out = _describe_cases(self._pool), _describe_cases(self.scored)
        self.example: dict[str, str] | None = self.scored[0]

    def draw(self, count: int, seed: int) -> dict[str, Any]:
        """Give the datalist of a cell: the labelled cases, those of the curve, and the held-out ones."""
        order = np.random.default_rng(seed).permutation(self.size)[:count]
        return {
            "training": [self._pool[i] for i in order.tolist()],
            "validation": self._curve,
            "test": self.scored,
            "shared_cases": "the curve is drawn from some of the held-out cases, and nothing is selected on them",
        }

    def settings(self, path: str) -> dict[str, dict[str, Any]]:
        """Give the settings of training and scoring that take the datalist."""
        common = {"dataset_dir": str(self.source[0].resolve()), "datalist": path}
        return {"train": common, "score": common}

    def label_names(self) -> list[str]:
        """Take the names from dataset.json, or number the values that the labels hold."""
        folder, datalist = self.source
        listing = Path(datalist) if datalist else folder / "dataset.json"
        found = json.loads(listing.read_text()).get("labels", {}) if listing.is_file() else {}
        if found:
            named = {int(k): v for k, v in found.items()} if "0" in found else {int(v): k for k, v in found.items()}
            return [named[value] for value in sorted(named)]
        highest = max(int(np.asarray(nib.load(case["label"]).dataobj).max()) for case in self._pool)
        return ["background", *(f"label {value}" for value in range(1, highest + 1))]


class NoduleSplit:
    """Nodules to learn from and nodules to score; all nodules of a patient are learned from, or all scored.

    Attributes: as those of `VolumeSplit`.
    """

    def __init__(
        self,
        bundle: str,
        dataset_dir: str,
        settings: Mapping[str, Any],
        held_out: int,
        curve_cases: int,
        training_cases: int | None,
    ) -> None:
        self.dataset_dir, self.curve_cases = str(Path(dataset_dir).resolve()), curve_cases
        options = {name: settings[name] for name in ("table", "label_rule") if name in settings}
        options["task"] = bundle.rpartition("_")[2]
        every = find_nodules(dataset_dir, split="all", **options)["test"]
        test_fraction = min(0.5, held_out / len(every))
        parts = find_nodules(dataset_dir, val_fraction=0.0, test_fraction=test_fraction, **options)
        self.patients: dict[str, list[str]] = {}
        for nodule in parts["training"]:
            self.patients.setdefault(nodule["patient_id"], []).append(nodule["nodule_id"])
        self.scored = [nodule["nodule_id"] for nodule in parts["test"]]
        self.size = min(len(parts["training"]), training_cases or len(parts["training"]))
        self.pool, self.held_out = _describe_cases(parts["training"]), _describe_cases(parts["test"])
        self.example: dict[str, str] | None = None

    def draw(self, count: int, seed: int) -> dict[str, Any]:
        """Give the split of a cell: whole patients, until there are enough nodules."""
        chosen: list[str] = []
        for patient in np.random.default_rng(seed).permutation(sorted(self.patients)).tolist():
            if len(chosen) >= count:
                break
            chosen += self.patients[patient]
        return {"split": "comparison", "training": chosen, "validation": [], "test": self.scored}

    def settings(self, path: str) -> dict[str, dict[str, Any]]:
        """Give the settings of training and scoring that take the split."""
        common = {"dataset_dir": self.dataset_dir, "split": path}
        followed = f"$vdt_workflows.take_part(@nodules, 'test')[:{self.curve_cases}]"
        return {"train": {**common, "validate::dataset::data": followed}, "score": common}


def hold_out(cases: Mapping[str, list[dict[str, str]]], number: int) -> tuple[list[dict], list[dict]]:
    """Separate the cases to learn from and the cases to score; test cases with labels are the first to be scored."""
    tests = [case for case in cases["test"] if "label" in case]
    labelled = [*cases["training"], *cases["validation"]]
    if tests:
        return labelled, tests[:number]
    order = np.random.default_rng(0).permutation(len(labelled))
    number = min(number, max(1, len(labelled) // 2))
    return [labelled[i] for i in sorted(order[number:])], [labelled[i] for i in sorted(order[:number])]


def _absolute(case: Mapping[str, str]) -> dict[str, str]:
    return {key: str(Path(path).resolve()) for key, path in case.items()}


def _describe_cases(cases: Sequence[Mapping[str, Any]]) -> str:
    """Say how many cases there are, and give the hash of their names."""
    names = sorted(str(case.get("nodule_id", Path(str(case["image"])).name)) for case in cases)
    return f"{len(names)} cases, sha256 of names {hashlib.sha256(chr(10).join(names).encode()).hexdigest()}"
