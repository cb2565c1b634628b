"""Nodules that a user points at: crops, or a scan and where to look in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError

from vdt_workflows.data.nodule_tables import read_number
from vdt_workflows.files import few, read_lines

CROPS = (".npz", ".nii", ".nii.gz")
MILLIMETRES, LUNA, VOXELS = ("x_mm", "y_mm", "z_mm"), ("coordX", "coordY", "coordZ"), ("column", "row", "slice")
NAMES = ("nodule_id", "id", "name")
WHOLE = 200  # mm, from which on a volume is a scan rather than a crop


def list_nodules(source: str | os.PathLike, positions: str | os.PathLike = "none") -> list[dict[str, Any]]:
    """List the nodules to classify, as items for `vdt_transforms.CropNoduled`.

    Args:
        source: without `positions` a crop (NIfTI or the published npz, the nodule in its centre), or a folder of crops
            or of their `images`; with them a scan: a NIfTI file, or a folder of DICOM files of one series.
        positions: where the nodules of the scan are: a mask in NIfTI, of which each connected part is a nodule, or a
            CSV with the columns `x_mm`, `y_mm`, `z_mm` (world, RAS), `coordX`, `coordY`, `coordZ` (world, LPS, as in
            LUNA16) or `column`, `row`, `slice` (voxels from 0; slice 0 of a DICOM folder is the lowest), tried in this
            order. A `nodule_id` (or `id`, `name`) is optional, and further columns are passed over. "none" for crops.

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
    if path.is_file():
        _refuse_scan(path)
        return [{"image": str(path)}]
    folders = [folder for folder in (path, path / "images") if folder.is_dir()]
    crops = next((found for folder in folders if (found := _crops(folder))), [])
    if not crops:
        raise FileNotFoundError(
            f"{path}: no crop (.nii, .nii.gz, .npz) in it; if it is a scan's DICOM folder, give positions, the CSV or"
            " mask that says where its nodules are"
        )
    for crop in crops:
        _refuse_scan(crop)
    return [{"image": str(crop)} for crop in crops]


def _crops(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(CROPS) and not file.name.startswith("."))


def _refuse_scan(path: Path) -> None:
    """Raise if the file is a whole scan, whose centre says nothing (only the header is read)."""
    if path.name.endswith(".npz"):
        return
    try:
        image = nib.load(path)
    except ImageFileError as error:
        raise ValueError(f"{path}: not a readable NIfTI volume ({error})") from error
    extent = np.array(image.shape[:3]) * voxel_sizes(image.affine)
    if extent.max() > WHOLE:
        raise ValueError(
            f"{path}: a whole scan ({' x '.join(f'{mm:.0f}' for mm in extent)} mm); give positions, the CSV or mask"
            " that says where its nodules are, or a crop with the nodule in its centre"
        )


def _read_positions(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"positions {path}: no such file; expected a CSV or a mask in NIfTI")
    return _read_mask(path) if path.name.endswith((".nii", ".nii.gz")) else _read_table(path)


def _read_table(path: Path) -> list[dict[str, Any]]:
    heading, lines = read_lines(path)
    kind = next((columns for columns in (MILLIMETRES, LUNA, VOXELS) if set(columns) <= set(heading)), None)
    if kind is None:
        raise ValueError(
            f"positions {path}: its columns are {few(heading, 8)}; expected {', '.join(MILLIMETRES)} (RAS),"
            f" {', '.join(LUNA)} (LPS) or {', '.join(VOXELS)}"
        )
    if not lines:
        raise ValueError(f"positions {path}: lists no nodules")
    named = next((heading.index(name) for name in NAMES if name in heading), None)
    nodules = []
    for number, line in enumerate(lines, 1):
        if len(line) != len(heading):
            raise ValueError(f"positions {path}, line {number + 1}: {len(line)} values for {len(heading)} columns")
        place = f"positions {path}, line {number + 1}"
        values = [read_number(line[heading.index(name)], name, place, -1e5, 1e5) for name in kind]
        if kind == LUNA:
            values = [-values[0], -values[1], values[2]]
        where = {"voxel" if kind == VOXELS else "position": values}
        nodules.append({"nodule_id": str(number) if named is None else line[named], **where})
    return nodules


def _read_mask(path: Path) -> list[dict[str, Any]]:
    from scipy import ndimage  # only masks need it

    try:
        image = nib.load(path)
        mask = np.asarray(image.dataobj) > 0
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"positions {path}: not a readable NIfTI mask ({error})") from error
    if mask.ndim != 3 or not mask.any():
        raise ValueError(
            f"positions {path}: a mask of shape {mask.shape} with {mask.sum()} voxels; expected nodules in 3D"
        )
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    middles = apply_affine(image.affine, ndimage.center_of_mass(mask, parts, range(1, count + 1)))
    return [{"nodule_id": str(i), "position": middle.tolist()} for i, middle in enumerate(middles, 1)]
