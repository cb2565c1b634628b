"""Augmentation of scans and their label maps: slabs of consecutive slices, and mirror images of the body."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import (
    Affine,
    BorderPad,
    Flip,
    MapTransform,
    RandCropByLabelClassesd,
    Randomizable,
    RandomizableTransform,
    SpatialCrop,
    Transform,
    create_rotate,
)
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple, ensure_tuple_rep, fall_back_tuple

from vdt_transforms.dictionary import RandArrayPerKey


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
        """Find the slices of the label maps under `keys`."""
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
        """(C, X, Y, Z) -> (C, X, Y, slices); `label` (by default the volume itself) is what the draw depends on."""
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


class RandSlabd(RandArrayPerKey):
    """Dictionary version of `RandSlab`: all volumes under `keys` give the same slices.

    Args:
        keys: volumes on one grid.
        label_key: the label map that the draw depends on; its `<label_key>_slices` (see `ForegroundSlicesd`), if there,
            is used and taken out.
        args, options: see `RandSlab`, and `allow_missing_keys`.
    """

    array = RandSlab

    def __init__(self, keys: KeysCollection, label_key: str, *args: Any, **options: Any) -> None:
        super().__init__(keys, *args, **options)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut the volumes under `keys`."""
        d = dict(data)
        self.transform.randomize(d[self.label_key], d.pop(f"{self.label_key}_slices", None))
        for key in self.key_iterator(d):
            d[key] = self.transform(d[key], randomize=False)
        return d


def left_right_axis(affine: Any) -> int:
    """Give the spatial axis of a volume that runs most nearly from left to right, also for oblique volumes.

    Args:
        affine: 4 x 4, voxel to world; the first world axis runs from left to right (or back).
    """
    return int(np.flatnonzero(nib.io_orientation(np.asarray(affine, dtype=np.float64))[:, 0] == 0)[0])


class RandFlipLeftRightd(RandomizableTransform, MapTransform):
    """Mirror all volumes under `keys` from left to right, or none; in label maps, exchange paired organs as well.

    A mirrored right kidney looks like a left one, so that a plain flip would teach wrong names. The axis is taken from
    the volume's affine, which is updated.

    Args:
        keys: images and label maps (C, X, Y, Z), `MetaTensor`s with an affine.
        label_keys: which of them are label maps, whose `pairs` change places.
        prob: how often.
        pairs: labels that change places, such as `[[2, 3], [12, 13]]` for kidneys and adrenal glands.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: if a pair does not hold two labels, or a label is in two pairs.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_keys: KeysCollection = (),
        prob: float = 0.5,
        pairs: Sequence[Sequence[int]] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        labels = [label for pair in pairs for label in pair]
        if any(len(pair) != 2 for pair in pairs) or len(labels) != len(set(labels)):
            raise ValueError(f"pairs must hold each label once, two a pair, got {[list(p) for p in pairs]}")
        self.label_keys = ensure_tuple(label_keys)
        self.pairs = [tuple(pair) for pair in pairs]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Mirror the volumes under `keys`, or leave them."""
        d = dict(data)
        self.randomize(None)
        for key in self.key_iterator(d):
            if self._do_transform:
                d[key] = self._mirror(d[key], self.pairs if key in self.label_keys else ())
        return d

    def _mirror(self, img: torch.Tensor, pairs: Sequence[tuple[int, ...]]) -> torch.Tensor:
        flip = Flip(left_right_axis(img.affine if isinstance(img, MetaTensor) else torch.eye(4)))
        with flip.trace_transform(False):  # no entry in `applied_operations`: nothing could invert it
            mirrored = flip(img)
        exchanged = mirrored.clone() if pairs else mirrored
        for a, b in pairs:
            exchanged[mirrored == a], exchanged[mirrored == b] = b, a
        return exchanged


class RandRotateScale(Randomizable, Transform):
    """Rotate and scale a volume about its centre, in mm: a rotation of voxel indices would shear thick slices.

    Slices that are `thick` times as thick as pixels, or thicker, are neither scaled along their thickness nor mixed:
    rotations are in their plane only. What comes from outside the volume is its border.

    Args:
        rotation: largest angle about each axis, in radians; each is drawn uniformly from -rotation to rotation.
        scaling: least and greatest factor, drawn uniformly; more than 1 enlarges.
        prob: how often it is rotated, and how often, drawn apart, it is scaled.
        thick: ratio of voxel sizes from which on an axis counts as that of thick slices.
        mode: "bilinear", or "nearest" for label maps.

    Raises:
        ValueError: if `scaling` does not hold two positive numbers.
    """

    def __init__(
        self,
        rotation: float = 0.35,
        scaling: Sequence[float] = (0.8, 1.25),
        prob: float = 0.2,
        thick: float = 3.0,
        mode: str = "bilinear",
    ) -> None:
        if len(scaling) != 2 or min(scaling) <= 0:
            raise ValueError(f"scaling must be two positive factors, got {scaling!r}")
        self.rotation = rotation
        self.scaling = scaling
        self.prob = prob
        self.thick = thick
        self.mode = mode
        self.angles = [0.0, 0.0, 0.0]
        self.factor = 1.0

    def randomize(self, data: Any = None) -> None:
        """Draw the angles and the factor."""
        rotates, scales = self.R.random(2) < self.prob
        angles, factor = self.R.uniform(-self.rotation, self.rotation, 3), self.R.uniform(*self.scaling)
        self.angles = list(angles) if rotates else [0.0, 0.0, 0.0]
        self.factor = float(factor) if scales else 1.0

    def matrix(self, spacing: Sequence[float]) -> np.ndarray:
        """Give the 4 x 4 matrix from a voxel of the result to one of the volume, both counted from the centre."""
        size = np.asarray(spacing, dtype=float)
        others = np.array([np.delete(size, axis) for axis in range(3)])
        flat = others.max(1) < self.thick * others.min(1)  # whether the plane across an axis has about square pixels
        turned = create_rotate(3, [a if f else 0.0 for a, f in zip(self.angles, flat, strict=True)])
        factors = np.where(size < self.thick * size.min(), self.factor, 1.0)
        matrix = np.eye(4)
        matrix[:3, :3] = np.asarray(turned)[:3, :3] / factors * size / size[:, None]
        return matrix

    def __call__(self, img: torch.Tensor, randomize: bool = True, mode: str | None = None) -> torch.Tensor:
        """(C, X, Y, Z) -> the same shape and type, on the grid of the volume; voxel sizes are a `MetaTensor`'s."""
        if randomize:
            self.randomize()
        return self.sample(img, [0, 0, 0], img.shape[1:], mode or self.mode)

    def sample(self, img: torch.Tensor, start: Sequence[int], size: Sequence[int], mode: str) -> torch.Tensor:
        """Give the part of `size` voxels from voxel `start` on, turned and scaled about its centre as was drawn."""
        first, shape = np.array([start, size])
        crop = SpatialCrop(roi_start=first, roi_end=first + shape)(img)
        part = crop if isinstance(img, MetaTensor) else convert_to_dst_type(crop, img)[0]
        if not any(self.angles) and self.factor == 1:
            return part
        matrix = self.matrix(img.pixdim.tolist() if isinstance(img, MetaTensor) else [1.0, 1.0, 1.0])
        centre, reach = first + (shape - 1) / 2, abs(matrix[:3, :3]) @ (shape - 1) / 2
        low = np.maximum(centre - reach, 0).astype(int)
        x, y, z = (slice(n, int(m) + 2) for n, m in zip(low, centre + reach, strict=True))
        box = convert_to_tensor(img, track_meta=False)[:, x, y, z]
        matrix[:3, 3] = centre - low - (np.array(box.shape[1:]) - 1) / 2
        turn = Affine(affine=matrix, spatial_size=shape.tolist(), mode=mode, padding_mode="border", image_only=True)
        return convert_to_dst_type(turn(box), part)[0]


class RandRotateScaled(RandArrayPerKey):
    """Dictionary version of `RandRotateScale`.

    Args:
        keys: volumes on one grid.
        mode: for all keys, or for each.
        args, options: see `RandRotateScale`, and `allow_missing_keys`.
    """

    array = RandRotateScale

    def __init__(
        self, keys: KeysCollection, *args: Any, mode: str | Sequence[str] = "bilinear", **options: Any
    ) -> None:
        super().__init__(keys, *args, **options)
        self.modes = ensure_tuple_rep(mode, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Rotate and scale the volumes under `keys`."""
        d = dict(data)
        self.transform.randomize()
        for key, mode in self.key_iterator(d, self.modes):
            d[key] = self.transform(d[key], randomize=False, mode=mode)
        return d


class RandTurnedCropd(RandCropByLabelClassesd):
    """Crop around labels, turned and scaled about the crop's centre, where what comes into it is the volume's own.

    Args:
        keys: volumes on one grid.
        turn: how the crops are turned and scaled.
        mode: for each key, "bilinear", or "nearest" for label maps.
        options: see `monai.transforms.RandCropByLabelClassesd`.
    """

    def __init__(self, keys: KeysCollection, turn: RandRotateScale, mode: Sequence[str], **options: Any) -> None:
        super().__init__(keys, **options)
        self.turn = turn
        self.modes = ensure_tuple_rep(mode, len(self.keys))

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandTurnedCropd:
        """Seed the draws of the places and of the turns."""
        super().set_random_state(seed, state)
        self.turn.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> list[dict[Hashable, Any]]:
        """Give `num_samples` crops; each has values of its own for the keys, and shares the others."""
        d = dict(data)
        self.randomize(d.get(self.label_key), d.pop(self.indices_key, None), d.get(self.image_key))
        crops = [dict(d) for _ in self.cropper.centers]
        for crop, centre in zip(crops, self.cropper.centers, strict=True):
            self.turn.randomize()
            for key, mode in self.key_iterator(d, self.modes):
                size = fall_back_tuple(self.cropper.spatial_size, d[key].shape[1:])
                start = [int(c) - n // 2 for c, n in zip(centre, size, strict=True)]
                crop[key] = self.turn.sample(d[key], start, size, mode)
        return crops
