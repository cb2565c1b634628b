"""Checks of volume files by their headers, before any voxel is read."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Mapping

import numpy as np
from nibabel.spatialimages import SpatialImage

from vdt_transforms.dicom_folders import describe_series, find_series
from vdt_transforms.geometry import farthest, open_volume, voxel_size


def check_geometry(case: Mapping[str, str], geometry: str = "refuse") -> None:
    """Check by their headers that a case's files can be used, and that its image and label are on the same grid.

    Grids are the same if no corner is off by more than a tenth of a voxel.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, as in `refuse_folder`, `open_volume` and `check_same_grid`.
    """
    paths = [case[key] for key in ("image", "label") if key in case]
    for path in paths:
        refuse_folder(path)
    headers = [open_volume(path, geometry) for path in paths]
    if len(headers) == 2:
        check_same_grid(*headers)


def refuse_folder(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the DICOM series in it, if a folder is given where a list needs a volume file."""
    if os.path.isdir(path):
        held = describe_series(find_series(path).series) or "no DICOM series of CT or MR"
        raise ValueError(
            f"{path}: a folder with {held}; a case with a label is a volume file (NIfTI, NRRD, MetaImage), so convert"
            " one series with dcm2niix, and label what it writes"
        )


def check_checksum(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, if one that ends in .gz does not unpack to its end, where its checksum is.

    nibabel stops after the last voxel, before the checksum, so that changed bytes would go unnoticed.
    """
    if not os.fspath(path).lower().endswith(".gz"):
        return
    try:
        with gzip.open(path) as unpacked:
            while unpacked.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cut short or damaged ({error}); copy or download it again") from error


def check_same_grid(image: SpatialImage, label: SpatialImage) -> None:
    """Raise ValueError, naming both files, if a label is not on its image's grid."""
    name, label_name = image.get_filename(), label.get_filename()
    shape, label_shape = image.shape[:3], label.shape[:3]
    if shape != label_shape:
        raise ValueError(f"{label_name}: shape {label_shape}, but its image {name} has shape {shape}")
    if (how := grid_difference(image, label)) is not None:
        raise ValueError(f"{label_name}: its affine differs from that of {name} {how}; both must lie on the same grid")


def grid_difference(image: SpatialImage, label: SpatialImage) -> str | None:
    """Say how the affine of a label of the same shape differs from the image's, if it does by a tenth of a voxel."""
    off = farthest(image.affine, label.affine, image.shape[:3])
    size, label_size = voxel_size(image), voxel_size(label)
    if off <= 0.1 * min(size) and np.allclose(size, label_size, rtol=0.1):
        return None
    if np.allclose(size, label_size, rtol=1e-3):
        return f"by up to {off:.3g} mm"
    return "in its spacing, {} instead of {} mm".format(*(tuple(round(v, 4) for v in s) for s in (label_size, size)))
