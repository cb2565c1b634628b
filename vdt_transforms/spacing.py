"""MONAI's `Spacing`, and a `Spacingd` that works inside MONAI Label."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai import transforms
from monai.transforms import Spacing

__all__ = ["Spacing", "Spacingd"]


class Spacingd(transforms.Spacingd):
    """Resample volumes to a voxel size in mm, as `monai.transforms.Spacingd`, also beside `<key>_*` entries of text.

    From MONAI 1.6.0 on, the original takes every entry whose name starts with `<key>_` for metadata and calls
    `.update` on it. MONAI Label puts the file's path in `image_path`, so that every inference request fails. Here such
    entries are set aside during the call. `Invertd` undoes it as it undoes the original.
    """

    def __call__(self, data: Mapping[Hashable, Any], *args: Any, **kwargs: Any) -> dict[Hashable, Any]:
        """Resample the volumes under `keys`."""
        prefixes = tuple(f"{key}_" for key in self.key_iterator(dict(data)))
        aside = {k: v for k, v in data.items() if str(k).startswith(prefixes) and not isinstance(v, Mapping)}
        aside = {k: v for k, v in aside.items() if k not in self.keys}
        out = super().__call__({k: v for k, v in data.items() if k not in aside}, *args, **kwargs)
        return {**out, **aside}
