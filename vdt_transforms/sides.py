"""Left-right mirror images of the body, in which the names of paired organs change sides too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Flip, InvertibleTransform, MapTransform, RandomizableTransform
from monai.utils import TraceKeys, ensure_tuple

Pairs = Sequence[Sequence[int]]


def left_right_axis(affine: Any) -> int:
    """Give the spatial axis of a volume that runs most nearly from left to right, also for oblique volumes.

    Args:
        affine: 4 x 4, voxel to world; the first world axis runs from left to right (or back).
    """
    return int(np.flatnonzero(nib.io_orientation(np.asarray(affine, dtype=np.float64))[:, 0] == 0)[0])


class FlipLeftRight(InvertibleTransform):
    """Mirror a volume from left to right; in a label map, exchange the labels of paired organs as well.

    A mirrored right kidney looks like a left one, so that a plain flip would teach wrong names. The axis is taken from
    the volume's affine. Twice is the identity, and so the inverse is the transform itself.

    Args:
        pairs: labels that change places, such as `[[2, 3], [12, 13]]` for kidneys and adrenal glands; none for images.

    Raises:
        ValueError: if a pair does not hold two labels, or a label is in two pairs.
    """

    def __init__(self, pairs: Pairs = ()) -> None:
        labels = [label for pair in pairs for label in pair]
        if any(len(pair) != 2 for pair in pairs) or len(labels) != len(set(labels)):
            raise ValueError(f"pairs must hold each label once, two a pair, got {[list(p) for p in pairs]}")
        self.pairs = [tuple(pair) for pair in pairs]

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """(C, X, Y, Z) with an affine -> the same, mirrored."""
        axis = left_right_axis(img.affine if isinstance(img, MetaTensor) else torch.eye(4))
        mirrored = Flip(spatial_axis=axis)(img)
        if isinstance(mirrored, MetaTensor):
            self.pop_transform(mirrored, check=False)
            self.push_transform(mirrored)
        return self._exchange(mirrored)

    def inverse(self, data: torch.Tensor) -> torch.Tensor:
        """Mirror it back."""
        self.pop_transform(data)
        axis = left_right_axis(data.affine if isinstance(data, MetaTensor) else torch.eye(4))
        flip = Flip(spatial_axis=axis)
        with flip.trace_transform(False):
            return self._exchange(flip(data))

    def _exchange(self, labels: torch.Tensor) -> torch.Tensor:
        for a, b in self.pairs:
            first, second = labels == a, labels == b
            labels[first], labels[second] = b, a
        return labels


class RandFlipLeftRight(RandomizableTransform, InvertibleTransform):
    """`FlipLeftRight` with probability `prob`.

    Args:
        prob: how often.
        pairs: labels that change places (see `FlipLeftRight`).
    """

    def __init__(self, prob: float = 0.5, pairs: Pairs = ()) -> None:
        RandomizableTransform.__init__(self, prob)
        self.flip = FlipLeftRight(pairs)

    def __call__(self, img: torch.Tensor, randomize: bool = True) -> torch.Tensor:
        """(C, X, Y, Z) -> the same, mirrored or not."""
        if randomize:
            self.randomize(None)
        out = self.flip(img) if self._do_transform else img
        if isinstance(out, MetaTensor):
            out = out if self._do_transform else out.clone()
            self.push_transform(out, replace=self._do_transform)
        return out

    def inverse(self, data: torch.Tensor) -> torch.Tensor:
        """Mirror it back if it was mirrored."""
        done = self.pop_transform(data)
        if not done[TraceKeys.DO_TRANSFORM]:
            return data
        self.flip.push_transform(data)
        return self.flip.inverse(data)


class RandFlipLeftRightd(RandomizableTransform, MapTransform, InvertibleTransform):
    """Dictionary version of `RandFlipLeftRight`: all volumes under `keys` are mirrored, or none.

    Args:
        keys: images and label maps.
        label_keys: which of them are label maps, whose `pairs` change places.
        prob: how often.
        pairs: labels that change places (see `FlipLeftRight`).
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        prob: float = 0.5,
        pairs: Pairs = (),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.label_keys = ensure_tuple(label_keys)
        self.images = RandFlipLeftRight(1.0)
        self.labels = RandFlipLeftRight(1.0, pairs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror the volumes under `keys`, or leave them."""
        d = dict(data)
        self.randomize(None)
        for key in self.key_iterator(d):
            transform = self._of(key)
            transform._do_transform = self._do_transform
            d[key] = transform(d[key], randomize=False)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror back what was mirrored."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self._of(key).inverse(d[key])
        return d

    def _of(self, key: Hashable) -> RandFlipLeftRight:
        return self.labels if key in self.label_keys else self.images
