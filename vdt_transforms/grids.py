"""Label maps back on the grid of the file that was segmented."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform


class RestoreGrid(Transform):
    """Bring a label map to the grid that its image had in the file, by nearest neighbours.

    It compares the map's own affine with the file's, which MONAI keeps in `original_affine` and `spatial_shape`. So
    reorientation, resampling along the axes, padding and cropping are all undone at once, whatever their order.
    `monai.transforms.Invertd` undoes one transform after the other and, for each resampling, computes the position of
    every voxel: 3.8 GB for a CT of 512 x 512 x 600. Here each axis is indexed by itself.

    Raises:
        ValueError: if the image was turned by other than right angles.
    """

    def __call__(self, labels: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Labels (C, X, Y, Z) on any grid, and the image they are of -> labels (C, X', Y', Z') on the file's grid.

        Outside of what the map shows, it is background.
        """
        if not isinstance(labels, MetaTensor) or not isinstance(image, MetaTensor):
            raise ValueError("labels and image must be MetaTensors, which know their grids")
        wanted = torch.as_tensor(np.asarray(image.meta["original_affine"]), dtype=torch.float64)
        size = [int(n) for n in np.asarray(image.meta["spatial_shape"])[:3]]
        mapping = torch.linalg.solve(labels.affine.to(torch.float64).cpu(), wanted).numpy()
        axes = np.abs(mapping[:3, :3]).argmax(0)
        rest = mapping[:3, :3].copy()
        rest[axes, range(3)] = 0
        if sorted(axes) != [0, 1, 2] or np.abs(rest * size).max() > 0.5:
            name = image.meta.get("filename_or_obj", "the volume")
            raise ValueError(f"{name}: turned by other than right angles; its labels cannot be put back by indexing")
        out = labels.as_tensor().permute(0, *(int(axis) + 1 for axis in axes))
        for dim, (axis, length) in enumerate(zip(axes, size, strict=True), 1):
            places = mapping[axis, dim - 1] * np.arange(length) + mapping[axis, 3]
            out = _take(out, dim, places)
        restored = MetaTensor(out.contiguous(), meta=deepcopy(image.meta))
        restored.affine = wanted
        return restored


def _take(values: torch.Tensor, dim: int, places: np.ndarray) -> torch.Tensor:
    """Take the nearest value to each place of an axis; a voxel or more beyond the ends there are zeros."""
    length = values.shape[dim]
    if np.array_equal(places, np.arange(length)):
        return values
    nearest = torch.as_tensor(np.clip(np.rint(places), 0, length - 1).astype(np.int64), device=values.device)
    taken = values.index_select(dim, nearest)
    beyond = torch.as_tensor(np.flatnonzero((places < -0.999) | (places > length - 0.001)), device=values.device)
    return taken.index_fill_(dim, beyond, 0) if len(beyond) else taken


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
