"""Lists of lung nodules, checked before any volume is read.

Data sets have a table of their nodules, in this project's layout or in the published one; to classify, a user gives
crops, or a scan and the positions of its nodules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from vdt_workflows.data.headers import check_checksum, read_header, voxel_size
from vdt_workflows.files import few, read_csv

Nodule = dict[str, Any]

RATINGS = (
    *("malignancy", "subtlety", "internal_structure", "calcification", "sphericity"),
    *("margin", "lobulation", "spiculation", "texture"),
)
COLUMNS = (
    *("nodule_id", "patient_id", "series_uid", "readers"),
    *(f"{rating}_{statistic}" for rating in RATINGS for statistic in ("mode", "median", "mean", "votes")),
    *("diameter_mm", "volume_mm3", "x_mm", "y_mm", "z_mm", "column", "row", "slice"),
    *("slice_spacing_mm", "pixel_spacing_mm", "image", "label"),
)
PUBLISHED_TABLE = "lidc_nodule_info_new_with_subset.csv"
PUBLISHED_COLUMNS = ("index", "uid", "malignancy", "malignancy_mode", "diameter_mm")  # those that are read of its 28

CROPS = (".npz", ".nii", ".nii.gz")
MILLIMETRES, LUNA, VOXELS = ("x_mm", "y_mm", "z_mm"), ("coordX", "coordY", "coordZ"), ("column", "row", "slice")
LARGEST_CROP = 200  # mm along an axis; a larger volume is a scan


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
        image, mask = (str(path.parent / row[column]) for column in ("image", "label"))
        average = read_number(row["malignancy_mean"], "malignancy_mean", place, 1, 5)
        nodules.append(_nodule(row["nodule_id"], row["patient_id"], image, mask, average, row, place))
    return nodules


def _find_published_table(root: Path, table: Path | None) -> Path:
    places = [root / PUBLISHED_TABLE, root / "info" / PUBLISHED_TABLE] if table is None else [table]
    if found := next((place for place in places if place.is_file()), None):
        return found
    if table is not None:
        raise FileNotFoundError(f"table {table}: no such file")
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
        nodules.append(_nodule(row["index"], row["uid"], file, file, mean(votes), row, place))
    return nodules


def _nodule(
    nodule_id: str, patient_id: str, image: str, mask: str, average: float, row: dict[str, str], place: str
) -> Nodule:
    mode = read_number(row["malignancy_mode"], "malignancy_mode", place, 1, 5)
    if mode % 1:
        raise ValueError(f"{place}: malignancy_mode is {row['malignancy_mode']!r}; expected a whole number from 1 to 5")
    return {
        "image": image,
        "mask": mask,
        "nodule_id": nodule_id,
        "patient_id": patient_id,
        "malignancy_mode": int(mode),
        "malignancy_mean": average,
        "diameter_mm": read_number(row["diameter_mm"], "diameter_mm", place),
    }


def _check_files(nodules: Sequence[Nodule], source: Path) -> None:
    """List each folder once, which on a network disk is much faster than asking for thousands of files."""
    files = dict.fromkeys(n[key] for n in nodules for key in ("image", "mask"))
    folders = {os.path.dirname(file) for file in files}
    there = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    if absent := [file for file in files if os.path.basename(file) not in there[os.path.dirname(file)]]:
        raise FileNotFoundError(f"{source}: {len(absent)} of the files it lists are missing: {few(absent)}")


# Nodules to classify -----------------------------------------------------------------------------------------------


def list_nodules(source: str | os.PathLike, positions: str | os.PathLike = "none") -> list[dict[str, Any]]:
    """List the nodules to classify, as items for `vdt_transforms.CropNoduled`.

    Args:
        source: without `positions` a crop (NIfTI or the published npz, the nodule in its centre), or a folder of crops
            or of their `images`; with them a scan: a NIfTI file, or a folder of DICOM files of one series.
        positions: where the nodules of the scan are: a mask in NIfTI, of which each connected part is a nodule, or a
            CSV with the columns `x_mm`, `y_mm`, `z_mm` (world, RAS), `coordX`, `coordY`, `coordZ` (world, LPS, as in
            LUNA16) or `column`, `row`, `slice` (voxels from 0; slice 0 of a DICOM folder is the lowest), tried in this
            order. A `nodule_id` (or `id`, `name`) is optional, and further columns are ignored. "none" for crops.

    Returns:
        Items with `image` (path), and with `positions` also `nodules`: for each a `nodule_id` and its `position` (mm,
        RAS) or `voxel`.

    Raises:
        FileNotFoundError: if a file or folder is missing, or a folder holds no crop.
        ValueError: if `source` is a whole scan without `positions`, or the positions cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a scan, a crop or a folder of crops")
    if str(positions) != "none":
        return [{"image": str(path), "nodules": _read_positions(Path(positions))}]
    folders = [folder for folder in (path, path / "images") if folder.is_dir()]
    crops = [path] if path.is_file() else next((found for folder in folders if (found := _crops(folder))), [])
    if not crops:
        raise FileNotFoundError(
            f"{path}: no crop (.nii, .nii.gz, .npz) in it; if it is a scan's DICOM folder, give positions, the CSV or"
            " mask of its nodules"
        )
    for crop in crops:
        _refuse_scan(crop)
    return [{"image": str(crop)} for crop in crops]


def _crops(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(CROPS) and not file.name.startswith("."))


def _refuse_scan(path: Path) -> None:
    """Raise if the file is a whole scan, whose centre is no nodule (only the header is read)."""
    if path.name.endswith(".npz"):
        return
    image = read_header(path)
    extent = np.multiply(image.shape[:3], voxel_size(image))
    if extent.max() > LARGEST_CROP:
        raise ValueError(
            f"{path}: a whole scan ({' x '.join(f'{mm:.0f}' for mm in extent)} mm); give positions, the CSV or mask"
            " of its nodules, or a crop with the nodule in its centre"
        )


def _read_positions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"positions {path}: no such file; expected a CSV or a mask in NIfTI")
    if path.name.endswith((".nii", ".nii.gz")):
        return _read_mask(path)
    rows = read_csv(path, (), others=True)
    if not rows:
        raise ValueError(f"positions {path}: lists no nodules")
    columns = next((columns for columns in (MILLIMETRES, LUNA, VOXELS) if {*columns} <= {*rows[0]}), None)
    if columns is None:
        raise ValueError(
            f"positions {path}: its columns are {few([*rows[0]], 8)}; expected {', '.join(MILLIMETRES)} (RAS),"
            f" {', '.join(LUNA)} (LPS) or {', '.join(VOXELS)}"
        )
    named = next((name for name in ("nodule_id", "id", "name") if name in rows[0]), None)
    nodules = []
    for number, row in enumerate(rows, 1):
        values = [read_number(row[c], c, f"positions {path}, line {number + 1}", -1e5, 1e5) for c in columns]
        if columns == LUNA:
            values = [-values[0], -values[1], values[2]]
        kind = "voxel" if columns == VOXELS else "position"
        nodules.append({"nodule_id": row[named] if named else str(number), kind: values})
    return nodules


def _read_mask(path: Path) -> list[dict[str, Any]]:
    image = read_header(path)
    check_checksum(path)
    mask = np.asarray(image.dataobj).reshape(image.shape[:3]) > 0
    if not mask.any():
        raise ValueError(f"positions {path}: a mask without any voxel above 0; expected nodules in it")
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    middles = apply_affine(image.affine, ndimage.center_of_mass(mask, parts, range(1, count + 1)))
    return [{"nodule_id": str(i), "position": middle.tolist()} for i, middle in enumerate(middles, 1)]
