"""Checks of voxels: whether they can be read, intensities, and label values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from nibabel.spatialimages import SpatialImage

from vdt_transforms.checks import check_range, to_whole
from vdt_transforms.geometry import read_voxels
from vdt_workflows.files import few

MOST_LABELS = 1 << 16


def read_intensities(image: SpatialImage, *, hounsfield: bool) -> tuple[np.ndarray, float, float]:
    """Read all voxels (X, Y, Z) as they are stored, and the least and greatest intensity that they stand for.

    Args:
        image: the file; its slope and intercept make intensities of stored voxels (see `scaled`).
        hounsfield: refuse what does not fit 16-bit signed integers, as HU do.

    Raises:
        ValueError: naming the file, if it is damaged (a CRC or a length that does not fit), a voxel is NaN or infinite,
            or an intensity has overflowed.
    """
    name, values = image.get_filename(), read_voxels(image, scaled=False)
    ends = scaled(image, np.array([values.min(), values.max()], np.float64))  # NaN and infinity come through these
    low, high = float(ends.min()), float(ends.max())
    if not np.isfinite([low, high]).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{name}: {bad or 'all'} voxels are NaN or infinite; expected finite values")
    if hounsfield:
        check_range(name, low, high)
    return values, low, high


def scaled(image: SpatialImage, values: np.ndarray) -> np.ndarray:
    """Apply the header's slope and intercept to stored voxels."""
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    return values if (slope, intercept) == (1, 0) else values * slope + intercept


def read_labels(
    image: SpatialImage, values: Mapping[int, int] | None, *, only_these: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Read a label map (X, Y, Z) as unsigned integers of 8 bits, or of 16 where they are needed.

    Args:
        image: the file.
        values: new value of each stored one; None keeps all.
        only_these: refuse other values than these and 0, rather than make them background.

    Returns:
        The labels with their new values, the number of voxels of each value, and whether any was changed.

    Raises:
        ValueError: naming the file, if it is damaged, or a value is no whole number from 0 to 65535 or not expected.
    """
    name, stored = image.get_filename(), scaled(image, read_voxels(image, scaled=False))
    stored = to_whole(stored)
    low, high = float(stored.min()), float(stored.max())
    if not (low >= 0 and high < MOST_LABELS):  # not what NaN gives either
        raise ValueError(f"{name}: label values from {low:g} to {high:g}; expected whole numbers from 0 on")
    labels = stored.astype(np.uint8 if high < 256 else np.uint16)
    if stored.dtype.kind == "f" and not np.array_equal(labels, stored):
        first = stored[labels != stored][0]
        raise ValueError(f"{name}: label value {first:.6g}; expected whole numbers from 0 on")
    # Slice by slice, which needs little memory.
    counts = np.sum([np.bincount(part.ravel(), minlength=int(high) + 1) for part in labels.T], axis=0)
    if values is None:
        return labels, counts, False
    found = np.flatnonzero(counts).tolist()
    wrong = [str(value) for value in found if value and value not in values]
    if wrong and only_these:
        known = ", ".join(map(str, sorted({0, *values})))
        raise ValueError(f"{name}: unknown label values {few(wrong)}; expected {known}; choose by --label_names")
    table = np.zeros(len(counts), np.uint8 if max(values.values(), default=0) < 256 else np.uint16)
    for value in found:
        table[value] = values.get(value, 0) if value else 0
    if all(table[value] == value for value in found):
        return labels, counts, False
    return table[labels], np.bincount(table, weights=counts).astype(np.int64), True
