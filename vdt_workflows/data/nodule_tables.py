"""Lists of lung nodules, checked before any volume is read.

Data sets have a table of their nodules, in this project's layout or in the published one; to classify, a user gives
crops, or a scan and the positions of its nodules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from vdt_transforms.dicom_folders import find_one_series
from vdt_transforms.geometry import SUFFIX, open_volume, read_voxels, voxel_size
from vdt_workflows.data.headers import check_checksum
from vdt_workflows.data.volume_files import conclude
from vdt_workflows.data.volumes import list_volumes
from vdt_workflows.files import few, kind_of_system, read_csv, read_number

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

MILLIMETRES, LUNA, VOXELS = ("x_mm", "y_mm", "z_mm"), ("coordX", "coordY", "coordZ"), ("column", "row", "slice")
SCANS = ("series_uid", "seriesuid", "SeriesInstanceUID", "scan")  # columns that say of which scan a row is
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
    _refuse_repeated(source, nodules)
    _check_files(nodules, source)
    return nodules


def _refuse_repeated(source: Path | str, nodules: Iterable[Mapping[str, Any]]) -> None:
    repeated = [name for name, times in Counter(n["nodule_id"] for n in nodules).items() if times > 1]
    if repeated:
        raise ValueError(f"{source}: {few(repeated)} listed more than once; expected one row a nodule")


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
    mode = read_number(row["malignancy_mode"], "malignancy_mode", place, 1, 5, whole=True)
    return {
        "image": image,
        "mask": mask,
        "nodule_id": nodule_id,
        "patient_id": patient_id,
        "malignancy_mode": int(mode),
        "malignancy_mean": average,
        "diameter_mm": read_number(row["diameter_mm"], "diameter_mm", place, 0, 1000),
    }


def _check_files(nodules: Sequence[Nodule], source: Path) -> None:
    """List each folder once, which on a network disk is much faster than asking for thousands of files."""
    files = dict.fromkeys(n[key] for n in nodules for key in ("image", "mask"))
    folders = {os.path.dirname(file) for file in files}
    there = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    if absent := [file for file in files if os.path.basename(file) not in there[os.path.dirname(file)]]:
        raise FileNotFoundError(f"{source}: {len(absent)} of the files it lists are missing: {few(absent)}")


# Nodules to classify -----------------------------------------------------------------------------------------------


def list_nodules(
    source: str | os.PathLike,
    positions: str | os.PathLike = "none",
    *,
    irregular: str = "refuse",
    series: str = "all",
    geometry: str = "refuse",
) -> list[dict[str, Any]]:
    """List the nodules to classify, as items for `vdt_transforms.CropNoduled`.

    Args:
        source: without `positions` a crop (a volume file or the published npz, the nodule in its centre), or a folder
            of crops or of their `images`; with them a scan: a volume file, or a DICOM folder of one series.
        positions: where the nodules of the scan are: a mask (volume file), of which each connected part is a nodule,
            or a CSV (with commas, semicolons or tabs) with the columns `x_mm`, `y_mm`, `z_mm` (world, RAS), `coordX`,
            `coordY`, `coordZ` (world, LPS, as in LUNA16) or `column`, `row`, `slice` (voxels from 0; slice 0 of a DICOM
            folder is the lowest), tried in this order. A `nodule_id` (or `id`, `name`) is optional. Where a column says
            of which scan a row is (`series_uid`, `seriesuid`, `SeriesInstanceUID` or `scan`: a series' uid, or the name
            of the file), rows of other scans are named, counted and left out. "none" for crops.
        irregular: of a scan in DICOM, see `list_volumes`.
        series: which DICOM series of a folder is the scan, see `list_volumes`.
        geometry: what says where the voxels of a NIfTI file lie, see `vdt_transforms.VolumeReader`.

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
        scans = list_volumes(path, irregular=irregular, series=series, geometry=geometry)
        if len(scans) > 1:
            raise ValueError(
                f"{path}: holds {len(scans)} scans, such as {few([scan['image'] for scan in scans], 3)}; give one of"
                " them, as positions are of one scan"
            )
        return [{**scans[0], "nodules": _read_positions(Path(positions), Path(scans[0]["image"]), geometry)}]
    folders = [folder for folder in (path, path / "images") if folder.is_dir()]
    left_out: dict[str, list[str]] = {"files of the system": [], "no crops": []}
    crops = [path] if path.is_file() else next((c for folder in folders if (c := _crops(folder, left_out))), [])
    if not crops:
        raise FileNotFoundError(
            f"{path}: no crop (.nii.gz, .nii, .nrrd, .mha, .npz) in it; if it is a scan's DICOM folder, give"
            " positions, the CSV or mask of its nodules"
        )
    for crop in crops:
        _refuse_scan(crop, geometry)
    conclude(path, len(crops), left_out)
    return [{"image": str(crop)} for crop in crops]


def _crops(folder: Path, left_out: dict[str, list[str]]) -> list[Path]:
    crops = []
    for file in sorted(folder.iterdir()):
        if kind_of_system(file.name):
            left_out["files of the system"].append(str(file))
        elif SUFFIX.search(file.name) or file.name.endswith(".npz"):
            crops.append(file)
        elif file.is_file():
            left_out["no crops"].append(str(file))
    return crops


def _refuse_scan(path: Path, geometry: str) -> None:
    """Raise if the file is a whole scan, whose centre is no nodule (only the header is read)."""
    if path.name.endswith(".npz"):
        return
    image = open_volume(path, geometry)
    extent = np.multiply(image.shape[:3], voxel_size(image))
    if extent.max() > LARGEST_CROP:
        raise ValueError(
            f"{path}: a whole scan ({' x '.join(f'{mm:.0f}' for mm in extent)} mm); give positions, the CSV or mask"
            " of its nodules, or a crop with the nodule in its centre"
        )


def _read_positions(path: Path, scan: Path, geometry: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"positions {path}: no such file; expected a CSV or a mask in a volume file")
    if SUFFIX.search(path.name):
        return _read_mask(path, geometry)
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
    own = _rows_of_scan(path, rows, scan)
    nodules = []
    for number in own:
        row = rows[number - 1]
        values = [read_number(row[c], c, f"positions {path}, line {number + 1}", -1e5, 1e5) for c in columns]
        if columns == LUNA:
            values = [-values[0], -values[1], values[2]]
        kind = "voxel" if columns == VOXELS else "position"
        nodules.append({"nodule_id": row[named] if named else str(number), kind: values})
    _refuse_repeated(f"positions {path}", nodules)
    return nodules


def _rows_of_scan(path: Path, rows: Sequence[dict[str, str]], scan: Path) -> Sequence[int]:
    """Give the numbers, from 1, of the rows that are of this scan, where a column says so; name the others."""
    column = next((name for name in SCANS if name in rows[0]), None)
    if column is None:
        return range(1, len(rows) + 1)
    known = {scan.name, SUFFIX.sub("", scan.name), *([] if SUFFIX.search(scan.name) else [find_one_series(scan).uid])}
    own = [number for number, row in enumerate(rows, 1) if row[column].strip() in known]
    others = sorted({row[column] for row in rows} - known)
    if not own:
        raise ValueError(
            f"positions {path}: its {column} names {few(others)} and never this scan, {few(sorted(known))}; expected a"
            " row of this scan, or no such column"
        )
    apart = [row[column] for row in rows if row[column].strip() not in known]
    conclude(f"positions {path}", len(own), {"of other scans": apart})
    return own


def _read_mask(path: Path, geometry: str) -> list[dict[str, Any]]:
    image = open_volume(path, geometry)
    check_checksum(path)
    mask = read_voxels(image) > 0
    if not mask.any():
        raise ValueError(f"positions {path}: a mask without any voxel above 0; expected nodules in it")
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    middles = apply_affine(image.affine, ndimage.center_of_mass(mask, parts, range(1, count + 1)))
    return [{"nodule_id": str(i), "position": middle.tolist()} for i, middle in enumerate(middles, 1)]
