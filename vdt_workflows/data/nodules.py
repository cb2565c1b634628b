"""Lung nodules divided by patient into training, validation and test."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from vdt_workflows.data.nodule_tables import Nodule, read_nodules
from vdt_workflows.errors import check_choice
from vdt_workflows.files import few, read_json, read_lines, write_json

logger = logging.getLogger(__name__)

Parts = dict[str, list[Nodule]]

PARTS = ("training", "validation", "test")
CLASSES = ("benign", "malignant")
STRATA = 3  # benign, indeterminate, malignant
KEPT = ("nodule_id", "patient_id", "malignancy_mode", "diameter_mm")


def find_nodules(
    dataset_dir: str | os.PathLike,
    *,
    task: str = "classification",
    label_rule: str = "mode",
    split: str | os.PathLike = "patient",
    table: str | os.PathLike | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    folds: int = 0,
    fold: int = 0,
    seed: int = 0,
) -> Parts:
    """List the nodules of a data set as `training`, `validation` and `test`, with no patient in two of them.

    Reads a prepared folder (`nodules.csv` beside `images/` and `labels/`), and the published layout as it is: a folder
    of `lidc<scan>_<nodule>.npz` with the nodule table in it, in `info/`, or given as `table`.

    The patients are divided at random, stratified: each part has its share of the nodules rated benign, indeterminate
    and malignant. All nodules count, whatever `task` and `label_rule` leave out: with the same seed a patient is in the
    same part in both tasks.

    Args:
        dataset_dir: the folder.
        task: "classification" gives the class, 0 benign or 1 malignant, as `label`; "segmentation" gives the mask's
            path as `label`, and uses every nodule.
        label_rule: "mode" makes a most frequent malignancy rating of 1 or 2 benign, of 4 or 5 malignant, and leaves 3
            out, as published; "mean" makes a mean rating of 3 or more malignant, and leaves none out.
        split: "patient"; "all" (every nodule is in `test`: data that a finished network has never seen); a CSV in the
            published form, file names in the columns `train` and `test`; or the `split.json` of another run.
        table: the nodule table of the published layout, where it is elsewhere.
        val_fraction: share of the nodules for `validation`; with `folds` or a CSV, of those that are not `test`. 0
            leaves `validation` empty.
        test_fraction: share of the nodules for `test`, where neither `folds` nor a CSV says it.
        folds: number of folds of a cross-validation; `test` is the one numbered `fold`.
        fold: from 0 to `folds` - 1.
        seed: seed of the division.

    Returns:
        For each part a list of `image` (path), `label`, `nodule_id`, `patient_id`, `malignancy_mode`, `diameter_mm`.

    Raises:
        FileNotFoundError: if the folder, a table, a split or a nodule's file is missing.
        ValueError: if an argument is none of the above; if a table has unknown, missing or repeated columns, a nodule
            twice, or an impossible value; if a split names unknown nodules or has a patient in two parts; or if a part
            lacks patients or, in classification, one of the classes.
    """
    check_choice("task", task, ("classification", "segmentation"))
    check_choice("label_rule", label_rule, ("mode", "mean"))
    if folds and split != "patient":
        raise ValueError(f"folds={folds} needs split 'patient', got split {str(split)!r}")
    if "monailabel" in sys.modules and not os.path.isdir(dataset_dir):
        return {name: [] for name in PARTS}  # the server puts the cases that were labelled in their place
    nodules = read_nodules(Path(dataset_dir), None if table is None else Path(table))
    if split == "patient":
        part_of = divide_patients(nodules, val_fraction, test_fraction, folds=folds, fold=fold, seed=seed)
        parts = {name: [n for n in nodules if part_of[n["patient_id"]] == name] for name in PARTS}
    elif split == "all":
        parts = {"training": [], "validation": [], "test": nodules}
    elif Path(split).suffix == ".json":
        parts = _read_own_split(Path(split), nodules)
    elif Path(split).suffix == ".csv":
        parts = _read_published_split(Path(split), nodules, val_fraction, seed)
    else:
        raise ValueError(f"split must be 'patient', 'all', or the path of a .csv or .json file, got {str(split)!r}")
    _check_apart(parts, split)
    parts = {name: _label(name, part, task, label_rule) for name, part in parts.items()}
    used = sum(map(len, parts.values()))
    logger.info("%s: %d of %d nodules; %s", dataset_dir, used, len(nodules), "; ".join(describe_split(parts).values()))
    return parts


def describe_split(parts: Mapping[str, Sequence[Nodule]]) -> dict[str, str]:
    """Say of each part how many nodules, of which classes, and how many patients it has."""
    lines = {}
    for name, part in parts.items():
        labels = Counter(n["label"] for n in part if isinstance(n["label"], int))
        classes = f" ({', '.join(f'{labels[i]} {kind}' for i, kind in enumerate(CLASSES))})" if labels else ""
        lines[name] = f"{name} {len(part)} nodules{classes} of {len({n['patient_id'] for n in part})} patients"
    return lines


@dataclass(eq=False)
class SaveSplit:
    """Handler: write which nodules are in which part, as a file that `find_nodules` takes as its `split`.

    Args:
        path: the JSON file, beside the checkpoint.
        nodules: what `find_nodules` gave.
        notes: plain values that say how the nodules were divided.
    """

    path: str
    nodules: Parts
    notes: Mapping[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file; without nodules, as in MONAI Label, there is nothing to write."""
        if not any(self.nodules.values()):
            return
        parts = {name: [n["nodule_id"] for n in part] for name, part in self.nodules.items()}
        write_json(self.path, {**(self.notes or {}), "counts": describe_split(self.nodules), **parts})


def take_part(nodules: Parts, name: str) -> list[Nodule]:
    """Give one part of a data set.

    Raises:
        ValueError: if there is no such part, or no nodule in it.
    """
    if name not in nodules:
        raise ValueError(f"part must be one of {few(PARTS)}, got {name!r}")
    if not nodules[name]:
        raise ValueError(f"{name} has no nodules; give val_fraction, test_fraction or a split that puts some there")
    return nodules[name]


def weigh_classes(nodules: Sequence[Nodule], imbalance: str = "none") -> list[float]:
    """Weight of benign and malignant in the loss: the same, or with "loss" so that both classes weigh the same in all.

    Raises:
        ValueError: if `imbalance` is none of "none", "loss" and "sampling".
    """
    check_choice("imbalance", imbalance, ("none", "loss", "sampling"))
    if imbalance != "loss":
        return [1.0] * len(CLASSES)
    counts = Counter(n["label"] for n in nodules)
    return [len(nodules) / (len(CLASSES) * counts[label]) for label in range(len(CLASSES))]


def describe_origin(split: str | os.PathLike, **settings: Any) -> dict[str, Any]:
    """Say how nodules were divided: by the notes in a run's `split.json`, or else by the settings."""
    if Path(split).suffix == ".json":
        settings = _read_split_file(Path(split))
    return {"split": str(split), **{k: v for k, v in settings.items() if k not in (*PARTS, "counts")}}


# By patient --------------------------------------------------------------------------------------------------------


def divide_patients(
    nodules: Iterable[Nodule],
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    *,
    folds: int = 0,
    fold: int = 0,
    seed: int = 0,
) -> dict[str, str]:
    """Assign each patient to a part; the arguments are those of `find_nodules`.

    Greedy, the patients with the most nodules first and otherwise in random order: each goes to the part that lacks
    most of its share of the patient's strata. (scikit-learn's `StratifiedGroupKFold` does so for folds of one size.)

    Raises:
        ValueError: if the fractions or folds are out of range, or there are too few patients for them.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be from 0 to below 1, got {fraction}")
    if folds and not (folds >= 2 and 0 <= fold < folds):
        raise ValueError(f"folds must be 0 or at least 2 and fold from 0 to folds - 1, got {folds=} and {fold=}")
    if not folds and val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
    counts: dict[str, np.ndarray] = {}
    for nodule in nodules:
        stratum = int(np.sign(nodule["malignancy_mode"] - 3)) + 1
        counts.setdefault(nodule["patient_id"], np.zeros(STRATA))[stratum] += 1
    if not folds:
        shares = {"training": 1 - val_fraction - test_fraction, "validation": val_fraction, "test": test_fraction}
        return _deal(counts, shares, seed)
    fold_of = _deal(counts, {f"fold {i}": 1 / folds for i in range(folds)}, seed)
    rest = {patient: count for patient, count in counts.items() if fold_of[patient] != f"fold {fold}"}
    part_of = _deal(rest, {"training": 1 - val_fraction, "validation": val_fraction}, seed)
    return {patient: part_of.get(patient, "test") for patient in counts}


def _deal(counts: Mapping[str, np.ndarray], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Give patients, with their nodules of each stratum, to the parts."""
    names = [name for name, share in shares.items() if share > 0]
    share = np.array([shares[name] for name in names])[:, None]
    total = np.maximum(sum(counts.values(), np.zeros(STRATA)), 1)
    patients = np.random.default_rng(seed).permutation(sorted(counts)).tolist()
    filled = np.zeros((len(names), STRATA))  # 1: the part has its share of the stratum
    part_of: dict[str, str] = {}
    for patient in sorted(patients, key=lambda p: -counts[p].sum()):
        added = counts[patient] / total
        chosen = int(np.argmin((added * (2 * filled + added / share)).sum(1)))  # growth of sum(share * filled²)
        filled[chosen] += added / share[chosen]
        part_of[patient] = names[chosen]
    if empty := [name for name in names if name not in part_of.values()]:
        raise ValueError(
            f"{len(counts)} patients are too few: none is left for {empty[0]}; use other fractions or folds"
        )
    return part_of


def _check_apart(parts: Mapping[str, Sequence[Nodule]], split: str | os.PathLike) -> None:
    """Refuse a patient in two parts; the published lists, or a run that was trained on them, are only warned of."""
    patients = {name: {n["patient_id"] for n in part} for name, part in parts.items()}
    if str(describe_origin(split)["split"]).endswith(".csv"):
        if known := patients["test"] & (patients["training"] | patients["validation"]):
            logger.warning(
                "split %s is by nodule: %d patients are on both sides, and %d of the %d test nodules come from patients"
                " that are trained on; scores come out too high. split 'patient' has no patient on two sides",
                *(split, len(known), sum(n["patient_id"] in known for n in parts["test"]), len(parts["test"])),
            )
        return
    for a, b in combinations(PARTS, 2):
        if shared := sorted(patients[a] & patients[b]):
            raise ValueError(
                f"split {split}: {len(shared)} patients are in both {a} and {b}: {few(shared)};"
                " all nodules of a patient must be in one part"
            )


# By a list ---------------------------------------------------------------------------------------------------------


def _read_split_file(path: Path) -> dict[str, Any]:
    content = read_json(path, "the split.json of a run")
    try:
        return {**content, **{name: [str(n) for n in content[name]] for name in PARTS}}
    except (KeyError, TypeError) as error:
        raise ValueError(f"split {path}: not the split.json of a run, which lists nodules as {few(PARTS)}") from error


def _read_own_split(path: Path, nodules: Sequence[Nodule]) -> Parts:
    content = _read_split_file(path)
    times = Counter(nodule for name in PARTS for nodule in content[name])
    if repeated := [nodule for nodule in times if times[nodule] > 1]:
        raise ValueError(f"split {path}: {few(repeated)} listed more than once")
    return {name: _pick(content[name], nodules, path) for name in PARTS}


def _read_published_split(path: Path, nodules: Sequence[Nodule], val_fraction: float, seed: int) -> Parts:
    """Take the published lists of nodules, each entry once, and warn of repeated ones."""
    if not path.is_file():
        raise FileNotFoundError(f"split {path}: no such file")
    heading, lines = read_lines(path)
    if sorted(heading[1:]) != ["test", "train"]:
        raise ValueError(f"split {path}: its columns are {heading}; expected an unnamed index, train and test")
    entries = {}
    for name in ("train", "test"):
        column = heading.index(name)
        files = (line[column].strip() for line in lines if len(line) > column)  # one column is longer than the other
        entries[name] = Counter(file.removesuffix(".npz") for file in files if file)
    train, test = (_pick(entries[name], nodules, path) for name in ("train", "test"))
    part_of = divide_patients(train, val_fraction, test_fraction=0.0, seed=seed)
    for name, counted in entries.items():
        repeated = [f"{entry} ({times} times)" for entry, times in counted.items() if times > 1]
        if repeated:
            logger.warning(
                "split %s: %d of the %d %s entries repeat others, each nodule counts once: %s",
                *(path, counted.total() - len(counted), counted.total(), name, ", ".join(repeated)),
            )
    if both := [entry for entry in entries["train"] if entry in entries["test"]]:
        raise ValueError(f"split {path}: {few(both)} listed in both train and test")
    return {**{name: [n for n in train if part_of[n["patient_id"]] == name] for name in PARTS[:2]}, "test": test}


def _pick(names: Iterable[str], nodules: Sequence[Nodule], path: Path) -> list[Nodule]:
    by_id = {n["nodule_id"]: n for n in nodules}
    if unknown := [name for name in names if name not in by_id]:
        raise ValueError(
            f"split {path}: lists {len(unknown)} nodules that the data set does not have: {few(unknown)};"
            f" its nodules are named like {nodules[0]['nodule_id']}"
        )
    return [by_id[name] for name in names]


# Labels ------------------------------------------------------------------------------------------------------------


def _label(name: str, part: Sequence[Nodule], task: str, rule: str) -> list[Nodule]:
    """Give each nodule its mask or its class, of which a part needs both, without those that the rule leaves out."""
    items = []
    for nodule in part:
        mode, label = nodule["malignancy_mode"], nodule["mask"]
        if task == "classification":
            label = int(nodule["malignancy_mean"] >= 3 if rule == "mean" else mode > 3)
        if task == "segmentation" or rule == "mean" or mode != 3:
            items.append({"image": nodule["image"], "label": label, **{key: nodule[key] for key in KEPT}})
    for label, kind in enumerate(CLASSES if part and task == "classification" else ()):
        if not any(item["label"] == label for item in items):
            raise ValueError(
                f"{name}: none of its {len(items)} nodules with a label is {kind}, and both classes are needed; use"
                " more patients, another seed, or other fractions"
            )
    return items
