"""What the voxels of a case tell that its headers do not: intensities, label values, and whether they can be read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from nibabel.spatialimages import SpatialImage

INT16 = np.iinfo(np.int16)
MOST_LABELS = 1 << 16


def read_voxels(image: SpatialImage) -> np.ndarray:
    """Read all voxels (X, Y, Z) as they are stored, before the header's slope and intercept.

    Raises:
        ValueError: naming the file, if it is damaged (a CRC or a length that does not fit).
    """
    try:
        return np.asanyarray(image.dataobj.get_unscaled()).reshape(image.shape[:3])
    except Exception as error:  # damaged bytes raise whatever they lead to
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{image.get_filename()}: its voxels cannot be read ({reason}); copy or download it again"
        ) from error


def scaled(image: SpatialImage, values: np.ndarray) -> np.ndarray:
    """Apply the header's slope and intercept to stored voxels."""
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    return values if (slope, intercept) == (1, 0) else values * slope + intercept


def intensity_range(image: SpatialImage, values: np.ndarray, *, hounsfield: bool) -> tuple[float, float]:
    """Least and greatest intensity of stored voxels.

    Args:
        image: whose slope and intercept are applied.
        values: from `read_voxels`.
        hounsfield: refuse what does not fit 16-bit signed integers, as HU do.

    Raises:
        ValueError: naming the file, if a voxel is NaN or infinite, or an intensity has overflowed.
    """
    ends = scaled(image, np.array([values.min(), values.max()], np.float64))  # NaN and infinity come through these
    low, high = float(ends.min()), float(ends.max())
    if not np.isfinite([low, high]).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{image.get_filename()}: {bad or 'all'} voxels are NaN or infinite; expected finite values")
    if hounsfield and (low < INT16.min or high > INT16.max):
        raise ValueError(
            f"{image.get_filename()}: intensities from {low:g} to {high:g} do not fit 16-bit signed integers"
            f" ({INT16.min} to {INT16.max}), as HU do; this is an integer overflow or a wrong scl_slope, so convert the"
            " case again"
        )
    return low, high


def read_labels(image: SpatialImage) -> np.ndarray:
    """Read a label map (X, Y, Z) as unsigned integers of 8 bits, or of 16 where they are needed.

    Raises:
        ValueError: naming the file, if it is damaged or a value is no whole number from 0 to 65535.
    """
    values = scaled(image, read_voxels(image))
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high < MOST_LABELS):  # not what NaN gives either
        raise ValueError(
            f"{image.get_filename()}: label values from {low:g} to {high:g}; expected whole numbers from 0 on"
        )
    labels = values.astype(np.uint8 if high < 256 else np.uint16)
    if values.dtype.kind == "f" and not np.array_equal(labels, values):
        first = values[labels != values][0]
        raise ValueError(f"{image.get_filename()}: label value {first:g}; expected whole numbers from 0 on")
    return labels


def count_labels(labels: np.ndarray) -> np.ndarray:
    """Number of voxels of each label value, from 0 to the greatest; slice by slice, which needs little memory."""
    most = int(labels.max()) + 1
    return np.sum([np.bincount(part.ravel(), minlength=most) for part in labels.T], axis=0)


def translate(
    image: SpatialImage, labels: np.ndarray, counts: np.ndarray, values: Mapping[int, int] | None, *, only_these: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Give label values their new numbers.

    Args:
        image: the file, for the sentence.
        labels: from `read_labels`.
        counts: from `count_labels`.
        values: new value of each stored one; None keeps all.
        only_these: refuse other values than these and 0, rather than make them background.

    Returns:
        The new labels and their counts, and whether anything changed.

    Raises:
        ValueError: naming the file and the values that are not expected.
    """
    if values is None:
        return labels, counts, False
    found = np.flatnonzero(counts).tolist()
    wrong = [value for value in found if value and value not in values]
    if wrong and only_these:
        few = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
        known = ", ".join(map(str, sorted({0, *values})))
        raise ValueError(f"{image.get_filename()}: unknown label values {few}; expected {known}")
    table = np.zeros(len(counts), np.uint8 if max(values.values(), default=0) < 256 else np.uint16)
    for value in found:
        table[value] = values.get(value, 0) if value else 0
    if all(table[value] == value for value in found):
        return labels, counts, False
    return table[labels], np.bincount(table, weights=counts).astype(np.int64), True
