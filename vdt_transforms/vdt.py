"""The variable dimension transform: a 2D image becomes a small 3D volume, and back.

An RGB image has three channels and no depth. Read its colours as slices and it is a volume of one channel and three
slices: a true 3D network can learn from the labels of a 2D data set. The same 3 x 3 x 3 kernels then serve volumes with
any number of slices. The order of the slices is shuffled for every sample, so that depth does not come to mean "red
before green before blue".

Source: arXiv 2201.01426; the pipeline of its published pre-training configs.
"""

from __future__ import annotations

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.transforms import RandomizableTransform, Transform

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
