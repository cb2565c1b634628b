"""Dictionary twins of the transforms of slice stacks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from vdt_transforms.slice_stacks import RandFlipSlices, RandResizeStack, SliceStackReader


class SliceStackReaderd(MapTransform):
    """Dictionary twin of `SliceStackReader`.

    Args:
        keys: of the files.
        slices, distance, reference: as `SliceStackReader` takes them.
        interval_key: of the mm between slices; an item without it leaves them to the volume.
        slice_key: of a volume's key slice.
        allow_missing_keys: whether a missing key is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        slices: int = 9,
        distance: float = 2.5,
        *,
        reference: bool = False,
        interval_key: str = "slice_interval",
        slice_key: str = "key_slice",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.read = SliceStackReader(slices, distance, reference=reference)
        self.interval_key, self.slice_key = interval_key, slice_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each file by its stack."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.read(d[key], d.get(self.interval_key), d.get(self.slice_key))
        return d


class RandFlipSlicesd(RandomizableTransform, MapTransform):
    """Dictionary twin of `RandFlipSlices`: one draw serves all keys."""

    def __init__(self, keys: KeysCollection, prob: float = 0.5, allow_missing_keys: bool = False) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.flip = RandFlipSlices(prob)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandFlipSlicesd:
        """Seed the array transform, which makes the draw."""
        self.flip.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Flip the stack of each key."""
        d = dict(data)
        self.flip.randomize(None)
        for key in self.key_iterator(d):
            d[key] = self.flip(d[key], randomize=False)
        return d


class RandResizeStackd(RandomizableTransform, MapTransform):
    """Dictionary twin of `RandResizeStack`: one draw serves all stacks and their boxes.

    Args:
        keys: of the stacks, which have the same sides.
        sizes: as `RandResizeStack` takes them.
        box_keys: of the boxes that move with them; a missing one is passed over.
        scale_key: where the ratios new / old of both sides are put, as an array (2,), to bring detections back.
        allow_missing_keys: whether a missing stack is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        sizes: Sequence[int] | int,
        *,
        box_keys: KeysCollection = "box",
        scale_key: str = "scale",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.resize = RandResizeStack(sizes)
        self.box_keys = (box_keys,) if isinstance(box_keys, str) else tuple(box_keys)
        self.scale_key = scale_key

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandResizeStackd:
        """Seed the array transform, which makes the draw."""
        self.resize.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize the stack of each key, and the boxes."""
        d = dict(data)
        self.resize.randomize()
        for key in self.key_iterator(d):
            sides = tuple(d[key].shape[-2:])
            d[key] = self.resize(d[key], randomize=False)
        for key in self.box_keys:
            if key in d:
                d[key] = self.resize.resize_boxes(d[key], sides)
        d[self.scale_key] = np.array(self.resize.resized(sides)) / np.array(sides)
        return d
