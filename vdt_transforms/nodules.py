"""Nodules: a crop around a place in the world, and the rotations of a cube.

A jittered crop is MONAI's `RandSpatialCropd` to the crop, after `CropNoduled` to the crop and twice the jitter: shifted
by whole voxels up to the jitter, each as often as the others.
"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable, SpatialResample, Transform
from monai.utils import ensure_tuple_rep
from nibabel.affines import apply_affine
from torch.nn.functional import pad

from vdt_transforms.checks import name_of
from vdt_transforms.dictionary import RandArrayPerKey

logger = logging.getLogger(__name__)

AIR = -1024.0  # HU
NEAR = 1e-3  # voxels, or parts of a voxel size, that count as nothing
PLANES = ((0, 1), (0, 2), (1, 2))  # of the three quarter turns, in the order they are applied


class CropNodule(Transform):
    """Cut a cube around a place in the world, resampled to a voxel size. (C, X, Y, Z) -> (C, size, size, size).

    Only the cube is resampled, trilinear, along the volume's own axes; where it leaves the volume it is filled. Where
    the voxel size is that of the volume and the place is on its grid, voxels are taken as they are. Without a position
    the cube lies around the volume's centre, as `CenterSpatialCrop` cuts it.

    Args:
        size: voxels along each axis.
        spacing: voxel size in mm.
        mode: "bilinear" (trilinear), or "nearest" for masks.
        fill: value outside the volume; the default is air in HU.

    Raises:
        ValueError: naming the volume, the position and the volume's extent, if the position is outside.
    """

    def __init__(self, size: int, spacing: float = 1.0, mode: str = "bilinear", fill: float = AIR) -> None:
        if size < 1 or spacing <= 0:
            raise ValueError(f"size and spacing must be positive, got {size} and {spacing}")
        self.size = size
        self.spacing = spacing
        self.mode = mode
        self.fill = fill

    def __call__(self, img: torch.Tensor, position: Sequence[float] | None = None) -> MetaTensor:
        """Cut around `position`, in mm of the volume's world (RAS)."""
        volume = img if isinstance(img, MetaTensor) else MetaTensor(img)
        affine = volume.affine.double().numpy()
        shape = np.array(volume.shape[1:])
        pixdim = np.linalg.norm(affine[:3, :3], axis=0)
        step = self.spacing / pixdim  # of the cube, in the volume's voxels
        as_it_is = bool(np.all(np.abs(step - 1) < NEAR))
        if position is None:
            corner = shape // 2 - self.size // 2 if as_it_is else (shape - 1) / 2 - step * (self.size - 1) / 2
        else:
            centre = np.linalg.solve(affine, [*position, 1.0])[:3]
            self._check_inside(volume, position, centre)
            corner = centre - step * (self.size - 1) / 2
        low, high = np.floor(corner + NEAR).astype(int), np.ceil(corner + step * (self.size - 1) - NEAR).astype(int) + 1
        cube = volume.as_tensor()[(slice(None), *(slice(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True)))]
        outside = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(low, high, shape, strict=True)]
        cube = pad(cube.float(), [n for pair in reversed(outside) for n in pair], value=self.fill)
        if position is not None and any(n for pair in outside for n in pair):
            logger.warning(
                "%s: the crop at %s mm leaves the scan; outside is taken as air", name_of(img), _mm(position)
            )
        cube = _with_affine(cube, _moved(affine, low, 1.0), volume)
        new_affine = _moved(affine, corner, step)
        if not (as_it_is and np.all(np.abs(corner - low) < 2 * NEAR)):
            # voxel centres go to voxel centres either way, but MONAI 1.5 forgets one half of aligned corners
            resample = SpatialResample(mode=self.mode, padding_mode="border", align_corners=False, dtype=torch.float32)
            cube = resample(cube, dst_affine=torch.as_tensor(new_affine), spatial_size=[self.size] * 3)
        return _with_affine(cube.as_tensor(), new_affine, volume)

    def _check_inside(self, volume: MetaTensor, position: Sequence[float], centre: np.ndarray) -> None:
        shape = np.array(volume.shape[1:])
        if np.any(centre < -0.5) or np.any(centre > shape - 0.5):
            corners = apply_affine(volume.affine.numpy(), [[0, 0, 0], shape - 1])
            low, high = corners.min(0), corners.max(0)
            raise ValueError(
                f"{name_of(volume)}: the position {_mm(position)} mm is outside the volume, which reaches from"
                f" {_mm(low)} to {_mm(high)} mm (RAS)"
            )


def _moved(affine: np.ndarray, corner: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    """Affine of a grid that begins at a voxel of another one and has so many of its voxels as a step."""
    moved = affine.copy()
    moved[:3, :3] = affine[:3, :3] * step
    moved[:3, 3] = affine[:3, :3] @ corner + affine[:3, 3]
    return moved


def _with_affine(values: torch.Tensor, affine: np.ndarray, volume: MetaTensor) -> MetaTensor:
    meta = {name: value for name, value in volume.meta.items() if name != "affine"}
    return MetaTensor(values, affine=torch.as_tensor(affine), meta=meta)


def _mm(position: Sequence[float] | np.ndarray) -> str:
    return "(" + ", ".join(f"{x:.1f}" for x in position) + ")"


class CropNoduled(MapTransform):
    """Dictionary version of `CropNodule`, which makes an item of each nodule of a scan.

    `nodules` of the dictionary lists places: dictionaries with a `position` in mm (RAS), or a `voxel` of the file (it
    may lie between voxels), and whatever else belongs to the nodule. The result is a list of dictionaries, each with
    what was listed for one nodule and its crop under the keys. Without `nodules` the result is one dictionary with the
    crop around the volume's centre. Each has its `position`.

    Args:
        keys: the volumes to crop.
        size: see `CropNodule`, and so for the others.
        spacing: voxel size in mm.
        mode: one for all keys, or one each.
        fill: one for all keys, or one each.
        allow_missing_keys: whether a key may be missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: int,
        spacing: float = 1.0,
        mode: str | Sequence[str] = "bilinear",
        fill: float | Sequence[float] = AIR,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        modes, fills = (ensure_tuple_rep(value, len(self.keys)) for value in (mode, fill))
        self.transforms = [CropNodule(size, spacing, m, f) for m, f in zip(modes, fills, strict=True)]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any] | list[dict[Hashable, Any]]:
        """Crop the volumes under `keys`."""
        d = dict(data)
        nodules = d.pop("nodules", None)
        if nodules is None:
            return self._crop(d, {})
        return [self._crop(d, nodule) for nodule in nodules]

    def _crop(self, d: Mapping[Hashable, Any], nodule: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item: dict[Hashable, Any] = {**d, **nodule}
        position = nodule.get("position")
        for key, transform in self.key_iterator(item, self.transforms):
            if position is None and "voxel" in nodule:
                position = apply_affine(np.asarray(item[key].meta["original_affine"]), nodule["voxel"])
            item[key] = transform(item[key], position)
            middle = [(transform.size - 1) / 2] * 3
            item["position"] = apply_affine(item[key].affine.numpy(), middle)
        return item


class RandRotateCube(Randomizable, Transform):
    """Turn a cube into one of its 24 rotations, or of 48 orientations with reflections. (C, X, Y, Z) -> (C, X, Y, Z).

    As published: three independent numbers of quarter turns, 0 to 3, about the planes of the axes (0, 1), (0, 2) and
    (1, 2), applied in that order; then one reflection, drawn from none and the three axes. All rotations occur, but the
    8 with an odd second number twice as often as the other 16.

    The turns are combined and voxels are moved once, in less than half the time of three `RandRotate90` and a
    `RandAxisFlip`, which draw the same. The affine of a `MetaTensor` follows; a volume that is no cube turns its shape.

    Source: arXiv 2201.01426; the augmentation of its published LIDC configs, after arXiv 1911.10477.

    Args:
        reflect: whether to draw a reflection.
    """

    def __init__(self, reflect: bool = True) -> None:
        self.reflect = reflect
        self.axes = [0, 1, 2]  # the axes of the input that those of the output are
        self.back = [False, False, False]  # whether they run the other way

    def randomize(self, data: Any = None) -> None:
        """Draw the orientation."""
        turns = self.R.randint(4, size=3).tolist()
        reflection = int(self.R.randint(4)) if self.reflect else 3
        self.axes, self.back = combine_turns(turns, None if reflection == 3 else reflection)

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """Turn one volume."""
        if randomize:
            self.randomize()
        order = (0, *(axis + 1 for axis in self.axes))
        flipped = tuple(axis + 1 for axis in range(3) if self.back[axis])
        if isinstance(img, np.ndarray):
            return np.ascontiguousarray(np.flip(img.transpose(order), flipped))
        out = img.as_subclass(torch.Tensor).permute(order).flip(flipped)
        if not isinstance(img, MetaTensor):
            return out
        turned = MetaTensor(out).copy_meta_from(img)
        turned.affine = img.affine.double() @ _voxel_map(img.shape[1:], self.axes, self.back)
        return turned


def combine_turns(turns: Sequence[int], reflection: int | None) -> tuple[list[int], list[bool]]:
    """Combine quarter turns about the planes (0, 1), (0, 2), (1, 2), in that order, and then a reflection of one axis.

    Returns:
        For each axis of the result the axis of the source it is, and whether it runs the other way.
    """
    axes, back = [0, 1, 2], [False, False, False]
    for (a, b), count in zip(PLANES, turns, strict=True):
        for _ in range(count):  # as numpy.rot90
            axes[a], axes[b] = axes[b], axes[a]
            back[a], back[b] = not back[b], back[a]
    if reflection is not None:
        back[reflection] = not back[reflection]
    return axes, back


def _voxel_map(shape: Sequence[int], axes: Sequence[int], back: Sequence[bool]) -> torch.Tensor:
    """Matrix from a voxel of the output to the voxel of the input, of that shape, that it was."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[3, 3] = 1
    for to, axis in enumerate(axes):
        matrix[axis, to] = -1 if back[to] else 1
        matrix[axis, 3] = shape[axis] - 1 if back[to] else 0
    return matrix


class RandRotateCubed(RandArrayPerKey):
    """Dictionary version of `RandRotateCube`; all keys share one orientation."""

    array = RandRotateCube
