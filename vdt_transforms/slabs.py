"""Slabs of consecutive slices out of whole scans, as the published segmentation code takes its training samples."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import BorderPad, MapTransform, Randomizable, SpatialCrop, Transform
from monai.utils import convert_to_tensor


class ForegroundSlices(Transform):
    """Give the first and the last slice of a label map that hold any foreground, as a tensor of two numbers.

    A map without foreground gives its first and last slice.
    """

    def __call__(self, label: NdarrayOrTensor) -> torch.Tensor:
        """(1, X, Y, Z) -> (2,)."""
        found = (convert_to_tensor(label) > 0).flatten(0, 2).any(0).nonzero().flatten()
        return torch.stack([found[0], found[-1]]) if len(found) else torch.tensor([0, label.shape[-1] - 1])


class ForegroundSlicesd(MapTransform):
    """Dictionary version of `ForegroundSlices`; the result goes to `<key>_slices`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Look at the label maps under `keys`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[f"{key}_slices"] = ForegroundSlices()(d[key])
        return d


class RandSlab(Randomizable, Transform):
    """Take `slices` consecutive slices (along Z) of a scan; where they reach beyond it, its outermost slice goes on.

    Source: the slice loaders of the published BCV and LiTS code. The BCV one draws the first slice so that the slab
    lies inside the foreground's extent (`inside=True`), and draws again while one label covers more than `max_share` of
    it; here each draw is from the extent, its last slice included, where the published code falls back to the whole
    scan and leaves that slice out. The LiTS one draws the middle slice from the extent or from the whole scan
    (`foreground_prob=0.5`).

    Args:
        slices: thickness of the slab.
        foreground_prob: how often the slab is drawn from the foreground's extent; else from the whole scan.
        inside: whether the whole slab, or only its middle slice, is to lie within what it is drawn from.
        max_share: draw again while one label covers a greater share of the slab; 1 takes the first.
        tries: draws at most.

    Raises:
        ValueError: if `slices` or `tries` is below one.
    """

    def __init__(
        self,
        slices: int,
        foreground_prob: float = 1.0,
        inside: bool = True,
        max_share: float = 1.0,
        tries: int = 10,
    ) -> None:
        if slices < 1 or tries < 1:
            raise ValueError(f"slices and tries must be at least 1, got {slices} and {tries}")
        self.slices = slices
        self.foreground_prob = foreground_prob
        self.inside = inside
        self.max_share = max_share
        self.tries = tries
        self.start = 0

    def randomize(self, label: torch.Tensor, extent: torch.Tensor | None = None) -> None:
        """Draw the first slice for a label map (1, X, Y, Z), whose foreground slices are `extent` if that is known."""
        low, high = 0, label.shape[-1] - 1
        if self.R.random() < self.foreground_prob:
            low, high = (int(n) for n in (ForegroundSlices()(label) if extent is None else extent))
        room = max(label.shape[-1] - self.slices, 0)
        first, last = np.clip(sorted((low, high + 1 - self.slices)), 0, room)  # sorted: a shorter extent lies inside
        for _ in range(self.tries):
            if self.inside:
                self.start = int(self.R.randint(first, last + 1))
            else:
                self.start = int(self.R.randint(low, high + 1)) - (self.slices - 1) // 2
            if self.max_share >= 1 or self._largest_share(label) <= self.max_share:
                break

    def _largest_share(self, label: torch.Tensor) -> float:
        slab = label[..., max(self.start, 0) : self.start + self.slices]
        counts = torch.bincount(slab.reshape(-1).to(torch.int64))
        return float(counts.max() / counts.sum())

    def __call__(
        self,
        img: torch.Tensor,
        label: torch.Tensor | None = None,
        extent: torch.Tensor | None = None,
        randomize: bool = True,
    ) -> torch.Tensor:
        """(C, X, Y, Z) -> (C, X, Y, slices); `label` (by default the volume itself) is what the draw looks at."""
        if randomize:
            self.randomize(img if label is None else label, extent)
        depth = img.shape[-1]
        first, last = max(self.start, 0), min(self.start + self.slices, depth)
        everything = [int(n) for n in img.shape[1:3]]
        slab = SpatialCrop(roi_start=[0, 0, first], roi_end=[*everything, last])(img)
        missing = (first - self.start, self.start + self.slices - last)
        if not any(missing):
            return slab
        return BorderPad([0, 0, 0, 0, *missing], mode="edge")(slab)


class RandSlabd(Randomizable, MapTransform):
    """Dictionary version of `RandSlab`: all volumes under `keys` give the same slices.

    Args:
        keys: volumes on one grid.
        label_key: the label map that the draw looks at; its `<label_key>_slices` (see `ForegroundSlicesd`) is used and
            taken out if it is there.
        slices, foreground_prob, inside, max_share, tries: see `RandSlab`.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str,
        slices: int,
        foreground_prob: float = 1.0,
        inside: bool = True,
        max_share: float = 1.0,
        tries: int = 10,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_key = label_key
        self.slab = RandSlab(slices, foreground_prob, inside, max_share, tries)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandSlabd:
        """Share the random state with the array transform."""
        super().set_random_state(seed, state)
        self.slab.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut the volumes under `keys`."""
        d = dict(data)
        self.slab.randomize(d[self.label_key], d.pop(f"{self.label_key}_slices", None))
        for key in self.key_iterator(d):
            d[key] = self.slab(d[key], randomize=False)
        return d
