"""Refuse volumes that would spoil a training silently, with a sentence that names the file."""

from __future__ import annotations

import logging

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.transforms import Transform

from vdt_transforms.dictionary import ArrayPerKey

logger = logging.getLogger(__name__)
INT16 = np.iinfo(np.int16)
AIR = -500  # HU, above that of air and below all tissue but lung


def to_whole(values: np.ndarray) -> np.ndarray:
    """Round label values to whole numbers; those that are off by more than a thousandth are left as they are."""
    if values.dtype.kind != "f":
        return values
    whole = np.rint(values)
    return np.where(np.abs(values - whole) <= 1e-3, whole, values)


def name_of(volume: NdarrayOrTensor) -> str:
    """Name the file that a volume was read from, for a message."""
    return str(getattr(volume, "meta", {}).get("filename_or_obj", "volume"))


def check_range(name: str, low: float, high: float) -> None:
    """Raise ValueError, naming the file, if intensities from `low` to `high` cannot be HU: 16 bits do not hold them."""
    if low < INT16.min or high > INT16.max:
        raise ValueError(
            f"{name}: intensities from {low:g} to {high:g} do not fit 16-bit signed integers ({INT16.min} to"
            f" {INT16.max}), as HU do; this is an integer overflow or a wrong scl_slope, so convert the case again"
        )


class CheckFinite(Transform):
    """Pass a volume on unchanged if all its values are finite.

    Raises:
        ValueError: naming the file, the number of NaN or infinite voxels, and the first one.
    """

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Check one volume (C, X, Y, Z)."""
        values = np.asarray(img)
        bad = ~np.isfinite(values)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0][1:])
            raise ValueError(
                f"{name_of(img)}: {int(bad.sum())} voxels are NaN or infinite, the first at {first};"
                " expected finite values"
            )
        return img


class CheckLabels(Transform):
    """Pass a label volume on if its values are whole numbers from 0 to `num_classes` - 1, to which they are rounded.

    Labels that a slope scales, or that were once resampled, are off by a rounding error, see `to_whole`.

    Args:
        num_classes: number of classes, background included.

    Raises:
        ValueError: naming the file, the values out of range, and the range.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Check one label volume (C, X, Y, Z)."""
        values = torch.as_tensor(np.asarray(img)).unique()
        whole = to_whole(values.numpy())
        wrong = [v for v, w in zip(values.tolist(), whole.tolist(), strict=True) if w not in range(self.num_classes)]
        if wrong:
            few = ", ".join(f"{v:.6g}" for v in wrong[:5])
            raise ValueError(
                f"{name_of(img)}: label values {few} are out of range; expected whole numbers from 0 to"
                f" {self.num_classes - 1}, one for each of the {self.num_classes} label names; name all of them by"
                " --label_names, or let vdt prepare volumes choose some"
            )
        return img if np.array_equal(values, whole) else img.round()


class CheckOverflow(Transform):
    """Pass a volume on unchanged if it may be of the modality that the network is made for.

    Of a CT the intensities must fit 16-bit signed integers, as Hounsfield units do. What does not fit has usually been
    through an integer type that could not hold it (-1024 HU in unsigned 16 bits is 64512), and a window of HU would
    then show air as bone. A DICOM series says of itself whether it is a CT; of other files the air tells it, so that
    warnings name a CT in which no voxel is below 0 (an 8-bit picture, an MR, a CT that was stored with an offset, or a
    crop without fat and air) and a volume of another modality that reaches down to it.

    Args:
        modality: that the network is made for, such as CT or MR; nothing is checked if it is unknown.

    Raises:
        ValueError: naming the file, and the least and greatest intensity, or the modality.
    """

    def __init__(self, modality: str = "CT") -> None:
        self.modality = "CT" if modality.upper() == "CT" else modality

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Check one volume (C, X, Y, Z)."""
        if self.modality == "unknown":
            return img
        name, found = name_of(img), getattr(img, "meta", {}).get("modality", self.modality)
        if (found == "CT") != (self.modality == "CT"):
            raise ValueError(
                f"{name}: its modality is {found}, and the network is made for {self.modality}; take weights that were"
                f" trained on {found}"
            )
        low, high = float(img.min()), float(img.max())
        if self.modality == "CT":
            check_range(name, low, high)
            if low >= 0:
                logger.warning(
                    "%s: no voxel is below 0 (%g to %g), where HU have air at -1000 and fat at -100; if it is no CT in"
                    " HU, the result means nothing",
                    *(name, low, high),
                )
        elif low <= AIR:
            logger.warning(
                "%s: voxels down to %g, as the air of a CT in HU, and the network is made for %s; if it is a CT, the"
                " result means nothing",
                *(name, low, self.modality),
            )
        return img


class CheckFinited(ArrayPerKey):
    """Dictionary version of `CheckFinite`."""

    array = CheckFinite


class CheckLabelsd(ArrayPerKey):
    """Dictionary version of `CheckLabels`."""

    array = CheckLabels


class CheckOverflowd(ArrayPerKey):
    """Dictionary version of `CheckOverflow`."""

    array = CheckOverflow
