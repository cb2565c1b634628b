"""What the dictionary transforms of this package share: they hold an array transform and apply it to each key."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable


class ArrayPerKey(MapTransform):
    """Apply one array transform, of the class `array`, to the value of each key.

    Args:
        keys: the keys.
        args: arguments of the array transform.
        allow_missing_keys: do not raise if a key is missing.
        options: named arguments of the array transform.
    """

    array: type

    def __init__(self, keys: KeysCollection, *args: Any, allow_missing_keys: bool = False, **options: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform: Any = self.array(*args, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform the values under `keys`."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.transform(d[key])
        return d


class RandArrayPerKey(Randomizable, ArrayPerKey):
    """Apply one random array transform to the value of each key, with one draw (made for the first key) for all."""

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandArrayPerKey:
        """Seed the array transform, which makes all the draws."""
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Transform the values under `keys`."""
        d = dict(data)
        for number, key in enumerate(self.key_iterator(d)):
            d[key] = self.transform(d[key], randomize=number == 0)
        return d
