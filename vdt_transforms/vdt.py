"""The variable dimension transform: a 2D image becomes a small 3D volume, and back.

An RGB image has three channels and no depth. Read its colours as slices and it is a volume of one channel and three
slices: a true 3D network can learn from the labels of a 2D data set. The same 3 x 3 x 3 kernels then serve volumes with
any number of slices. The order of the slices is shuffled for every sample, so that depth does not come to mean "red
before green before blue".

Slices made of colours show the same edges at the same place, while an organ moves from slice to slice, and three slices
never reach the outer planes of a 7 x 7 x 7 kernel. `RandSliceDrift` and `InterpolateSlices` give the depth something to
learn; they are not part of the published method.

Source: arXiv 2201.01426; the pipeline of its published pre-training configs.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from monai.config import NdarrayOrTensor
from monai.transforms import RandomizableTransform, Transform
from torch import Tensor

from vdt_transforms.dictionary import ArrayPerKey, RandArrayPerKey

MEAN = 114.495  # of ImageNet's three channel means, on the 0..255 scale
STD = 57.63  # of ImageNet's three channel standard deviations, on the same scale


class ImageToVolume(Transform):
    """Read the colour axis of a 2D image as depth (the variable dimension transform).

    (3, H, W) -> (1, 3, H, W), depth first: rows stay rows and columns stay columns. A grey image (1, H, W) is repeated
    to `slices` equal slices.

    Args:
        slices: slices of the volume; a colour image must have as many channels.
        mean: subtracted from every value; all slices share it, since any slice may hold any colour.
        std: divides every value. With a mean or a std the volume is float32, otherwise it keeps the image's type.

    Raises:
        ValueError: if the image is not 2D with channels first, or has neither one nor `slices` channels.
    """

    def __init__(self, slices: int = 3, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.slices = slices
        self.mean = mean
        self.std = std

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Lift one image to a volume."""
        if img.ndim != 3 or img.shape[0] not in (1, self.slices):
            raise ValueError(
                f"img must have shape ({self.slices}, H, W), or (1, H, W) to be repeated, got {tuple(img.shape)}"
            )
        if img.shape[0] != self.slices:
            img = img[[0] * self.slices]
        volume = img[None]
        if (self.mean, self.std) == (0.0, 1.0):
            return volume
        if isinstance(volume, np.ndarray):
            return (volume.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        return volume.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)


class ImageToVolumed(ArrayPerKey):
    """Dictionary version of `ImageToVolume`."""

    array = ImageToVolume


class VolumeToImage(Transform):
    """Read the slices of a one-channel volume as colours: the inverse of `ImageToVolume`.

    (1, D, H, W) -> (D, H, W).

    Args:
        mean: the one that `ImageToVolume` subtracted; it is added back.
        std: the one that it divided by.

    Raises:
        ValueError: if the volume does not have one channel and three spatial axes.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean = mean
        self.std = std

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Lay one volume out as an image."""
        if img.ndim != 4 or img.shape[0] != 1:
            raise ValueError(f"img must have shape (1, D, H, W), got {tuple(img.shape)}")
        image = img[0]
        return image if (self.mean, self.std) == (0.0, 1.0) else image * self.std + self.mean


class RandSliceShuffle(RandomizableTransform):
    """Put the slices of a volume in a random order, so that depth does not encode which colour came first.

    (C, D, H, W) -> (C, D, H, W); the input is left as it is.

    Args:
        prob: probability of shuffling; 1 in the published pre-training.
    """

    def __init__(self, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.order: list[int] = []

    def randomize(self, data: NdarrayOrTensor) -> None:
        """Draw the order of the slices of `data`."""
        super().randomize(None)
        if self._do_transform:
            self.order = self.R.permutation(data.shape[1]).tolist()

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """Shuffle one volume."""
        if randomize:
            self.randomize(img)
        if not self._do_transform:
            return img
        if isinstance(img, np.ndarray):
            return img[:, self.order]
        return img.index_select(1, torch.tensor(self.order, device=img.device))  # thrice as fast as indexing by a list


class RandSliceShuffled(RandArrayPerKey):
    """Dictionary version of `RandSliceShuffle`; all keys share one order."""

    array = RandSliceShuffle


def _as_batch(img: NdarrayOrTensor, function: Callable[[Tensor], Tensor]) -> NdarrayOrTensor:
    """Apply a function of float32 batches to one volume of any type; integers are rounded."""
    whole = torch.as_tensor(img).as_subclass(Tensor)
    values = function(whole.float()[None])[0]
    values = values.to(whole.dtype) if whole.is_floating_point() else values.round().to(whole.dtype)
    return values.numpy() if isinstance(img, np.ndarray) else values


class InterpolateSlices(Transform):
    """Make more slices, linearly between neighbours: the first and the last stay. (C, D, H, W) -> (C, slices, H, W).

    A float result is exact; of integers it is rounded.

    Args:
        slices: slices of the result, 2 or more.

    Raises:
        ValueError: if `slices` is below 2, or the volume does not have four axes.
    """

    def __init__(self, slices: int) -> None:
        if slices < 2:
            raise ValueError(f"slices must be 2 or more, got {slices}")
        self.slices = slices

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Interpolate one volume."""
        if img.ndim != 4:
            raise ValueError(f"img must have shape (C, D, H, W), got {tuple(img.shape)}")
        if img.shape[1] == self.slices:
            return img
        return _as_batch(img, lambda volumes: interpolate_slices(volumes, self.slices))


class InterpolateSlicesd(ArrayPerKey):
    """Dictionary version of `InterpolateSlices`."""

    array = InterpolateSlices


def interpolate_slices(volumes: Tensor, slices: int) -> Tensor:
    """What `InterpolateSlices` does, for a batch. (N, C, D, H, W) -> (N, C, slices, H, W)."""
    return F.interpolate(volumes, (slices, *volumes.shape[3:]), mode="trilinear", align_corners=True)


class RandSliceDrift(RandomizableTransform):
    """Let the picture move from slice to slice, as an organ does: each is a little shifted, turned and scaled.

    (C, D, H, W) -> (C, D, H, W). What is drawn is the change from one slice to the next, so that the middle of the
    volume stays and its ends move most, in opposite directions. Bilinear; beyond the border its values are repeated.

    Args:
        prob: probability of a drift.
        shift: greatest shift from one slice to the next, as a part of the side, along rows and along columns.
        angle: greatest turn from one slice to the next, in degrees.
        scale: greatest growth from one slice to the next; 0.1 is a tenth larger or smaller.

    Raises:
        ValueError: if one of the three is negative.
    """

    def __init__(self, prob: float = 1.0, *, shift: float = 0.06, angle: float = 8.0, scale: float = 0.08) -> None:
        super().__init__(prob)
        for name, value in (("shift", shift), ("angle", angle), ("scale", scale)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.limits = np.array([shift, shift, math.radians(angle), math.log1p(scale)])
        self.rates = np.zeros(4)

    def randomize(self, data: object = None) -> None:
        """Draw `rates`: shift along the rows and the columns, turn in radians, logarithm of the growth, per slice."""
        super().randomize(None)
        self.rates = self.R.uniform(-self.limits, self.limits)

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """Move the slices of one volume; `randomize=False` applies the last draw again."""
        if randomize:
            self.randomize()
        if not self._do_transform:
            return img
        rates = torch.as_tensor(self.rates, dtype=torch.float32)[None]
        return _as_batch(img, lambda volumes: drift_slices(volumes, rates.to(volumes.device)))


class RandSliceDriftd(RandArrayPerKey):
    """Dictionary version of `RandSliceDrift`; all keys share one draw."""

    array = RandSliceDrift


def drift_slices(volumes: Tensor, rates: Tensor) -> Tensor:
    """What `RandSliceDrift` does, for a batch: (N, C, D, H, W) and the rates (N, 4) of each -> (N, C, D, H, W)."""
    number, _, slices, rows, columns = volumes.shape
    steps = torch.arange(slices, device=rates.device) - (slices - 1) / 2
    down, across, turn, growth = (rates[:, None] * steps[:, None]).unbind(-1)  # (N, D) each
    cos, sin = torch.cos(turn) * torch.exp(-growth), torch.sin(turn) * torch.exp(-growth)
    x = torch.stack([cos, sin * rows / columns, -2 * across], -1)
    y = torch.stack([-sin * columns / rows, cos, -2 * down], -1)
    matrices = torch.stack([x, y], -2).flatten(0, 1)  # (N * D, 2, 3), from places of the result to places of the input
    stacked = volumes.transpose(1, 2).flatten(0, 1)
    grids = F.affine_grid(matrices, list(stacked.shape), align_corners=False).to(stacked.dtype)
    moved = F.grid_sample(stacked, grids, padding_mode="border", align_corners=False)
    return moved.unflatten(0, (number, slices)).transpose(1, 2)
