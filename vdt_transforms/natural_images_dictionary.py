"""Dictionary twins of the natural-image transforms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from vdt_transforms.natural_images import LoadNaturalImage, RandResizedCropImage, ResizeCenterCropImage


class LoadNaturalImaged(MapTransform):
    """Dictionary twin of `LoadNaturalImage`."""

    def __init__(self, keys: KeysCollection, grey: bool = False, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadNaturalImage(grey)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path by its image."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.load(d[key])
        return d


class RandResizedCropImaged(RandomizableTransform, MapTransform):
    """Dictionary twin of `RandResizedCropImage`: one draw, for the first key's size, serves all keys."""

    def __init__(
        self,
        keys: KeysCollection,
        size: int,
        *,
        area: tuple[float, float] = (0.08, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        self.crop = RandResizedCropImage(size, area=area, aspect=aspect, flip_prob=flip_prob)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandResizedCropImaged:
        """Seed the array transform, which makes all the draws."""
        self.crop.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the image of each key."""
        d = dict(data)
        randomize = True
        for key in self.key_iterator(d):
            d[key] = self.crop(d[key], randomize=randomize)
            randomize = False
        return d


class ResizeCenterCropImaged(MapTransform):
    """Dictionary twin of `ResizeCenterCropImage`."""

    def __init__(self, keys: KeysCollection, size: int, *, short_side: int, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.crop = ResizeCenterCropImage(size, short_side=short_side)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the image of each key."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.crop(d[key])
        return d
