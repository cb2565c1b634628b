"""Tables of lung nodules, in this project's layout and in the published one, checked before any nodule is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from vdt_workflows.files import few, read_csv

Nodule = dict[str, Any]

RATINGS = (
    "malignancy",
    "subtlety",
    "internal_structure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
)
COLUMNS = (
    *("nodule_id", "patient_id", "series_uid", "readers"),
    *(f"{rating}_{statistic}" for rating in RATINGS for statistic in ("mode", "median", "mean", "votes")),
    *("diameter_mm", "volume_mm3", "x_mm", "y_mm", "z_mm", "column", "row", "slice"),
    *("slice_spacing_mm", "pixel_spacing_mm", "image", "label"),
)
PUBLISHED_TABLE = "lidc_nodule_info_new_with_subset.csv"
PUBLISHED_COLUMNS = ("index", "uid", "malignancy", "malignancy_mode", "diameter_mm")  # what is read of its 28


def read_nodules(root: Path, table: Path | None = None) -> list[Nodule]:
    """Read what nodules a folder has, in either layout (see `find_nodules`).

    Returns:
        For each nodule `image` and `mask` (paths), `nodule_id`, `patient_id`, `malignancy_mode`, `malignancy_mean` and
        `diameter_mm`.

    Raises:
        FileNotFoundError: if the folder, the table or a nodule's file is missing.
        ValueError: if the table has unknown, missing or repeated columns, a nodule twice, or a value that cannot be.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {root}: no such folder")
    own = root / "nodules.csv"
    if own.is_file():
        if table is not None:
            raise ValueError(f"table {table}: {own} already says what the nodules are; leave table out")
        source, nodules = own, _read_own_table(own)
    else:
        source = _find_published_table(root, table)
        nodules = _read_published_table(source, root)
    if not nodules:
        raise ValueError(f"{source}: lists no nodules")
    repeated = [name for name, times in Counter(n["nodule_id"] for n in nodules).items() if times > 1]
    if repeated:
        raise ValueError(f"{source}: {few(repeated)} listed more than once; expected one row a nodule")
    _check_files(nodules, source)
    return nodules


def read_number(text: str, column: str, place: str, low: float = 0, high: float = float("inf")) -> float:
    """Read a number within bounds.

    Raises:
        ValueError: naming the place, the column, the text and the bounds.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        wanted = f"from {low:g} to {high:g}" if high < float("inf") else f"of {low:g} or more"
        raise ValueError(f"{place}: {column} is {text!r}; expected a number {wanted}")
    return value


def _read_own_table(path: Path) -> list[Nodule]:
    nodules = []
    for number, row in enumerate(read_csv(path, COLUMNS), 2):
        place = f"{path}, line {number}"
        for column in ("nodule_id", "patient_id", "image", "label"):
            if not row[column]:
                raise ValueError(f"{place}: {column} is empty")
        nodules.append(
            {
                "image": str(path.parent / row["image"]),
                "mask": str(path.parent / row["label"]),
                "nodule_id": row["nodule_id"],
                "patient_id": row["patient_id"],
                "malignancy_mode": _rating(row["malignancy_mode"], place),
                "malignancy_mean": read_number(row["malignancy_mean"], "malignancy_mean", place, 1, 5),
                "diameter_mm": read_number(row["diameter_mm"], "diameter_mm", place),
            }
        )
    return nodules


def _find_published_table(root: Path, table: Path | None) -> Path:
    if table is not None:
        if not table.is_file():
            raise FileNotFoundError(f"table {table}: no such file")
        return table
    for place in (root / PUBLISHED_TABLE, root / "info" / PUBLISHED_TABLE):
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"{root}: no nodules.csv in it, and no {PUBLISHED_TABLE} in it or in its info folder; prepare the data with"
        " vdt prepare lidc, or give the published table as table"
    )


def _read_published_table(path: Path, root: Path) -> list[Nodule]:
    nodules = []
    for number, row in enumerate(read_csv(path, PUBLISHED_COLUMNS, others=True), 2):
        if row.get("remark") == "no annotation":  # two of 2,635, which the published split leaves out as well
            continue
        place = f"{path}, line {number}"
        votes = [int(vote) for vote in row["malignancy"] if vote in "12345"]  # "42xx": two of four readers
        if not votes:
            raise ValueError(f"{place}: malignancy is {row['malignancy']!r}; expected a digit from 1 to 5 a reader")
        file = str(root / f"{row['index']}.npz")
        nodules.append(
            {
                "image": file,
                "mask": file,
                "nodule_id": row["index"],
                "patient_id": row["uid"],
                "malignancy_mode": _rating(row["malignancy_mode"], place),
                "malignancy_mean": mean(votes),
                "diameter_mm": read_number(row["diameter_mm"], "diameter_mm", place),
            }
        )
    return nodules


def _rating(text: str, place: str) -> int:
    value = read_number(text, "malignancy_mode", place, 1, 5)
    if value % 1:
        raise ValueError(f"{place}: malignancy_mode is {text!r}; expected a whole number from 1 to 5")
    return int(value)


def _check_files(nodules: Sequence[Nodule], source: Path) -> None:
    """Look each folder through once, which on a network disk is much faster than asking for thousands of files."""
    there: dict[str, set[str]] = {}
    absent = []
    for file in dict.fromkeys(n[key] for n in nodules for key in ("image", "mask")):
        folder, name = os.path.split(file)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in there[folder]:
            absent.append(file)
    if absent:
        raise FileNotFoundError(f"{source}: {len(absent)} of the files it lists are missing: {few(absent)}")
