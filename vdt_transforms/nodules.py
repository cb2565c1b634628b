"""Nodule cubes: a reader for the published files, and the rotations of a cube.

What else a nodule's crop needs is MONAI's. A crop around the centre that is jittered by whole voxels from -5 to 5, and
padded with air where the cube is too small, is `ResizeWithPadOrCropd` to the crop and twice the jitter (`value=-1024`
for the image, 0 for a mask; it is deterministic, so it is cached), then `RandSpatialCropd` to the crop.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor, PathLike
from monai.data import MetaTensor, NibabelReader
from monai.transforms import InvertibleTransform, MapTransform, Randomizable
from monai.utils import TraceKeys, TransformBackends, ensure_tuple

WINDOW = (-1024.0, 400.0)  # HU, that the published files map linearly to 0..255
PLANES = ((0, 1), (0, 2), (1, 2))  # of the three quarter turns, in the order they are applied


class NoduleReader(NibabelReader):
    """MONAI reader of nodule cubes: the published `.npz` files as CT volumes, and NIfTI as MONAI reads it.

    A published file has arrays (z, y, x) of 1 mm: `voxel`, uint8 for the window of -1024 to 400 HU, and masks
    `answer1`, ... They come out as (X, Y, Z), `voxel` in HU. Columns run to the patient's left and rows to the back, so
    the affine is diag(-1, -1, 1, 1); the files do not tell where in the scan a cube was.

    Give it to `LoadImaged(reader="vdt_transforms.NoduleReader")`, with `array="answer1"` for the masks.

    Args:
        array: the array that is read from an npz file.
        kwargs: every further argument goes to `NibabelReader`.

    Raises:
        ValueError: naming the file, when it is damaged, has no such array, or holds no volume.
    """

    def __init__(self, array: str = "voxel", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.array = array

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say whether all files are npz or NIfTI."""
        return all(str(name).endswith((".npz", ".nii", ".nii.gz")) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[str]:
        """Keep the paths: `LoadImage` hides what goes wrong here behind the next reader's failure."""
        return [os.fspath(path) for path in ensure_tuple(data)]

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one file (X, Y, Z), or several as channels, with their metadata."""
        images = []
        for path in img:
            try:
                image = self._open(path) if path.endswith(".npz") else super().read(path, **self.kwargs)
                images.append(nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}: no such file") from error
            except Exception as error:  # a damaged archive raises whatever its decompressor stumbles over
                raise ValueError(f"{path}: not a readable nodule ({error})") from error
        self.filenames = list(img)  # which `read` of the last file left as that alone
        return super().get_data(images)

    def _open(self, path: str) -> nib.Nifti1Image:
        with np.load(path, allow_pickle=False) as archive:
            if self.array not in archive:
                raise ValueError(f"it has the arrays {', '.join(archive.files)}, not {self.array}")
            values = archive[self.array]
        if values.ndim != 3:
            raise ValueError(f"its {self.array} has the shape {values.shape}, not (z, y, x)")
        if self.array == "voxel":
            low, high = WINDOW
            values = values.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
        return nib.Nifti1Image(values.astype(np.float32).transpose(), np.diag([-1.0, -1.0, 1.0, 1.0]))


class RandRotateCube(Randomizable, InvertibleTransform):
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

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]  # noqa: RUF012  (MONAI declares it this way)

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
        out = _turn(img, self.axes, self.back)
        if not isinstance(img, MetaTensor):
            return out
        info = self.track_transform_meta(
            img,
            sp_size=out.shape[1:],
            affine=_voxel_map(img.shape[1:], self.axes, self.back),
            extra_info={"axes": self.axes, "back": self.back},
            transform_info=self.get_transform_info(),
        )
        return MetaTensor(out).copy_meta_from(info)

    def inverse(self, data: torch.Tensor) -> torch.Tensor:
        """Undo the turn that the volume went through."""
        info = self.pop_transform(data)[TraceKeys.EXTRA_INFO]
        undo = RandRotateCube()
        undo.axes = [info["axes"].index(axis) for axis in range(3)]
        undo.back = [info["back"][axis] for axis in undo.axes]
        with undo.trace_transform(False):
            return undo(data, randomize=False)


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


def _turn(img: NdarrayOrTensor, axes: Sequence[int], back: Sequence[bool]) -> NdarrayOrTensor:
    order = (0, *(axis + 1 for axis in axes))
    flipped = tuple(axis + 1 for axis in range(3) if back[axis])
    if isinstance(img, np.ndarray):
        return np.ascontiguousarray(np.flip(img.transpose(order), flipped))
    return img.as_subclass(torch.Tensor).permute(order).flip(flipped)


def _voxel_map(shape: Sequence[int], axes: Sequence[int], back: Sequence[bool]) -> torch.Tensor:
    """Matrix from a voxel of the output to the voxel of the input, of that shape, that it was."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[3, 3] = 1
    for to, axis in enumerate(axes):
        matrix[axis, to] = -1 if back[to] else 1
        matrix[axis, 3] = shape[axis] - 1 if back[to] else 0
    return matrix


class RandRotateCubed(Randomizable, MapTransform, InvertibleTransform):
    """Dictionary twin of `RandRotateCube`; all keys share one orientation."""

    backend = RandRotateCube.backend

    def __init__(self, keys: KeysCollection, reflect: bool = True, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = RandRotateCube(reflect)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandRotateCubed:
        """Seed the array transform, which makes all the draws."""
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn the volumes under `keys`."""
        d = dict(data)
        self.transform.randomize()
        for key in self.key_iterator(d):
            d[key] = self.transform(d[key], randomize=False)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Turn the volumes under `keys` back."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.transform.inverse(d[key])
        return d
