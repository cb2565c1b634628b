"""Voxel grids: resampling to a voxel size, how one grid lies in another, label maps back on their file's grid."""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai import transforms
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Spacing, Transform

__all__ = ["RestoreGrid", "RestoreGridd", "Spacing", "Spacingd", "align_grids"]


class Spacingd(transforms.Spacingd):
    """Resample volumes to a voxel size in mm, as `monai.transforms.Spacingd`, also beside `<key>_*` entries of text.

    From MONAI 1.6.0 on, the original takes every entry whose name starts with `<key>_` for metadata and calls
    `.update` on it. MONAI Label puts the file's path in `image_path`, so that every inference request fails. Here such
    entries are set aside during the call. `Invertd` undoes it as it undoes the original.

    Args:
        keys: the volumes.
        pixdim: as in the original, or "own": volumes keep the voxel size that they have.
        **options: those of the original.
    """

    def __init__(self, keys: KeysCollection, pixdim: Sequence[float] | float | str, **options: Any) -> None:
        if isinstance(pixdim, str) and pixdim != "own":
            raise ValueError(f"pixdim must be voxel sizes in mm, or 'own', got {pixdim!r}")
        self.keeps = pixdim == "own"
        super().__init__(keys, 1.0 if self.keeps else pixdim, **options)

    def __call__(self, data: Mapping[Hashable, Any], *args: Any, **kwargs: Any) -> dict[Hashable, Any]:
        """Resample the volumes under `keys`."""
        if self.keeps:
            return dict(data)
        prefixes = tuple(f"{key}_" for key in self.key_iterator(dict(data)))
        aside = {k: v for k, v in data.items() if str(k).startswith(prefixes) and not isinstance(v, Mapping)}
        aside = {k: v for k, v in aside.items() if k not in self.keys}
        out = super().__call__({k: v for k, v in data.items() if k not in aside}, *args, **kwargs)
        return {**out, **aside}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Undo what was resampled."""
        return dict(data) if self.keeps else super().inverse(data)


def align_grids(
    source: np.ndarray, target: np.ndarray, size: Sequence[int], tolerance: float = 0.5
) -> tuple[list[int], list[np.ndarray]]:
    """Find how a grid of voxels lies in another one whose axes are parallel to its own.

    Args:
        source: 4 x 4, voxel to world, of the grid that values are taken from.
        target: the same of the grid that values are wanted on.
        size: voxels along each axis of the target.
        tolerance: voxels of the source that an axis may depart sideways within `size`.

    Returns:
        For each axis of the target, which axis of the source runs along it, and where along that one each of its
        voxels lies, in voxels of the source, whole or not.

    Raises:
        ValueError: if one grid is turned by other than right angles from the other.
    """
    mapping = np.linalg.solve(np.asarray(source, np.float64), np.asarray(target, np.float64))
    axes = np.abs(mapping[:3, :3]).argmax(0)
    aside = mapping[:3, :3].copy()
    aside[axes, range(3)] = 0
    if sorted(axes) != [0, 1, 2] or np.abs(aside * size).max() > tolerance:
        raise ValueError("turned by other than right angles")
    positions = [
        mapping[axis, i] * np.arange(n) + mapping[axis, 3] for i, (axis, n) in enumerate(zip(axes, size, strict=True))
    ]
    return [int(axis) for axis in axes], positions


class RestoreGrid(Transform):
    """Bring a label map to the grid that its image had in the file, by nearest neighbours.

    It compares the map's own affine with the file's, which MONAI keeps in `original_affine` and `spatial_shape`. So
    reorientation, resampling along the axes, padding and cropping are all undone at once, whatever their order.
    `monai.transforms.Invertd` undoes one transform after the other and, for each resampling, computes the position of
    every voxel: 3.8 GB for a CT of 512 x 512 x 600. Here each axis is indexed by itself.

    Args:
        outside: value where the map shows nothing, the background by default.

    Raises:
        ValueError: if the image was turned by other than right angles.
    """

    def __init__(self, outside: float = 0) -> None:
        self.outside = outside

    def __call__(self, labels: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Labels (C, X, Y, Z) on any grid, and the image they are of -> labels (C, X', Y', Z') on the file's grid."""
        if not isinstance(labels, MetaTensor) or not isinstance(image, MetaTensor):
            raise ValueError("labels and image must be MetaTensors, which know their grids")
        wanted = torch.as_tensor(np.asarray(image.meta["original_affine"]), dtype=torch.float64)
        size = [int(n) for n in np.asarray(image.meta["spatial_shape"])[:3]]
        try:
            axes, positions = align_grids(np.asarray(labels.affine.cpu()), wanted.numpy(), size)
        except ValueError as error:
            name = image.meta.get("filename_or_obj", "the volume")
            raise ValueError(f"{name}: {error}; its labels cannot be put back by indexing") from error
        out = labels.as_tensor().permute(0, *(axis + 1 for axis in axes))
        gain = {dim: len(places) / out.shape[dim] for dim, places in enumerate(positions, 1)}
        for dim in sorted(gain, key=gain.__getitem__):  # what shrinks most comes first
            out = _take(out, dim, positions[dim - 1], self.outside)
        restored = MetaTensor(out.contiguous(), meta=deepcopy(image.meta))
        restored.affine = wanted
        return restored


def _take(values: torch.Tensor, dim: int, places: np.ndarray, outside: float) -> torch.Tensor:
    """Take the nearest value to each place of an axis, and `outside` a voxel or more beyond the ends."""
    length = values.shape[dim]
    if np.array_equal(places, np.arange(length)):
        return values
    nearest = torch.as_tensor(np.clip(np.rint(places), 0, length - 1).astype(np.int64), device=values.device)
    taken = values.index_select(dim, nearest)
    beyond = torch.as_tensor(np.flatnonzero((places < -0.999) | (places > length - 0.001)), device=values.device)
    return taken.index_fill_(dim, beyond, outside) if len(beyond) else taken


class RestoreGridd(MapTransform):
    """Dictionary version of `RestoreGrid`.

    Args:
        keys: label maps.
        image_key: the image they are of.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(self, keys: KeysCollection, image_key: str = "image", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring the label maps under `keys` back."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = RestoreGrid()(d[key], d[self.image_key])
        return d
