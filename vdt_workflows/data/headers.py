"""Checks of volume files by their headers, before any voxel is read."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Mapping

import numpy as np
from nibabel.spatialimages import SpatialImage

from vdt_transforms.geometry import farthest, open_volume, voxel_size


def check_geometry(case: Mapping[str, str], geometry: str = "refuse") -> None:
    """Check by their headers that a case's files can be used, and that its image and label are on the same grid.

    Grids are the same if no corner is off by more than a tenth of a voxel.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, as in `open_volume` and `check_same_grid`.
    """
    headers = [open_volume(case[key], geometry) for key in ("image", "label") if key in case]
    if len(headers) == 2:
        check_same_grid(*headers)


def check_checksum(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, if a gzip file does not unpack to its end, where its checksum is.

    nibabel stops after the last voxel, before the checksum, so that changed bytes would go unnoticed.
    """
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
