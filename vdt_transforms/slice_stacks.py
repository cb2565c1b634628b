"""Stacks of CT slices around a key slice, at a wanted distance in mm, and what is done to them before a 2D detector.

A stack is (slices, X, Y): the slices are its channels, from the head to the feet, the key slice in the centre; X runs
along the columns of the picture and Y down its rows. So MONAI's transforms of 2D images and of 2D boxes
(x1, y1, x2, y2) act in the plane of the slices and fit each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Transform
from PIL import Image
from torch import Tensor

from vdt_transforms.geometry import open_volume, read_voxels

HU_OFFSET = 32768  # DeepLesion's 16-bit PNG files store HU + 32768
ORIENTATION = "LPI"  # as radiologists see slices: x to the patient's left, y to the back, z to the feet
SLICE_NAME = re.compile(r"^(\d+)\.png$", re.IGNORECASE)
Mix = tuple[tuple[int, float], ...]  # offsets in slices from the key slice, and their weights


@lru_cache(maxsize=4096)
def slice_mixes(slices: int, distance: float, interval: float, reference: bool = False) -> tuple[Mix, ...]:
    """Which neighbours make up each slice of a stack, by linear interpolation between slices `interval` mm apart.

    Args:
        slices: number of slices, odd.
        distance: wanted between them, in mm; 0 takes the key slice for all.
        interval: of the scan, in mm.
        reference: weigh as the published code does, which takes the fraction of the first step for all steps: at an
            interval of 2 mm its slices lie at 2.5, 4.5, 6.5 and 10 mm instead of 2.5, 5, 7.5 and 10.

    Returns:
        For each slice, from the lowest number up, one or two pairs of offset and weight.
    """
    step = distance / interval
    above: list[Mix] = []
    for k in range(1, slices // 2 + 1):
        offset = k * step
        low = math.floor(offset + 1e-6)  # 3 * (2.5 / 7.5) is meant to be 1
        fraction = offset - low
        if reference:
            fraction = step - math.floor(step + 1e-6) if fraction > 1e-6 else 0.0
        above.append(((low, 1.0),) if fraction <= 1e-6 else ((low, 1 - fraction), (low + 1, fraction)))
    below = [tuple((-offset, weight) for offset, weight in mix) for mix in reversed(above)]
    return (*below, ((0, 1.0),), *above)


class SliceStackReader(Transform):
    """Read the slices around a key slice as one stack in HU. file -> float32 (slices, X, Y).

    A slice between two stored ones is interpolated. Where a neighbour is missing, at the end of the scan or in a gap,
    the nearest stored slice towards the key slice takes its place. Each stored slice is read once for a stack, and kept
    for the next ones of the same series that reach it: a series that is read in order is read once.

    A `.png` file is the key slice itself, in the folder of its series: files named by slice number (`109.png`), 16 bits
    of one channel that hold HU + 32768, as DeepLesion has them. Everything else that MONAI reads is a volume; it is
    turned to LPI (x to the patient's left, y to the back, z to the feet), to which key slice and boxes refer.

    Source: arXiv 2012.08770, and 3DCE (arXiv 1806.09648) for the interpolation along z.

    Args:
        slices: number of slices, odd.
        distance: between them, in mm; published are 2.5 (MP3D) and 2 (3DCE, MULAN). 0 repeats the key slice: a stack
            without context, to compare with.
        reference: interpolate as the published code does (see `slice_mixes`).

    Raises:
        ValueError: if an argument is wrong, the interval is not a positive number, or a file is not such a slice.
        FileNotFoundError: if the key slice does not exist.
    """

    def __init__(self, slices: int = 9, distance: float = 2.5, *, reference: bool = False) -> None:
        if slices < 1 or slices % 2 == 0:
            raise ValueError(f"slices must be an odd number, so that the key slice is in the centre; got {slices}")
        if not 0 <= distance < math.inf:  # also NaN
            raise ValueError(f"distance must be a number of mm, 0 or more, got {distance}")
        self.slices, self.distance, self.reference = slices, distance, reference
        self._forget()

    def _forget(self) -> None:
        self._numbers: dict[str, dict[int, str]] = {}
        self._volume: tuple[str, np.ndarray, float] | None = None
        self._last: tuple[str, dict[int, np.ndarray]] = ("", {})  # what was read between the ends of the last stack

    def __getstate__(self) -> dict[str, Any]:
        """What makes the stacks, without what was read: for other processes, and for the name of a cache."""
        return {"slices": self.slices, "distance": self.distance, "reference": self.reference}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, file: str | Path, slice_interval: float | None = None, key_slice: int | None = None) -> Tensor:
        """Read the stack around `file`, or around slice `key_slice` of the volume `file`.

        Args:
            file: the key slice's PNG file, or a volume.
            slice_interval: mm between neighbouring slices; a volume knows its own.
            key_slice: for a volume, the index along z.
        """
        path = Path(file)
        if path.suffix.lower() == ".png":
            return self._read_pictures(path, slice_interval)
        return self._read_volume(path, slice_interval, key_slice)

    def _read_pictures(self, path: Path, interval: float | None) -> Tensor:
        named = SLICE_NAME.match(path.name)
        if named is None:
            raise ValueError(f"{path}: the key slice's file must be named by its number, such as 109.png")
        folder = str(path.parent)
        numbers = self._listed(folder)
        if int(named[1]) not in numbers:
            self._numbers.pop(folder, None)  # it may be there the next time
            raise FileNotFoundError(f"{path}: no such key slice; its folder has {len(numbers)} slices")
        last_folder, last = self._last
        known = last if last_folder == folder else {}
        used: dict[int, np.ndarray] = {}

        def read(number: int) -> np.ndarray:
            used[number] = known[number] if number in known else read_slice(path.parent / numbers[number])
            return used[number]

        pictures = self._stack(int(named[1]), self._mixes(path, interval), numbers, read)
        near = range(min(used), max(used) + 1)
        self._last = (folder, {number: pixels for number, pixels in (known | used).items() if number in near})
        return torch.from_numpy(pictures).transpose(1, 2)

    def _read_volume(self, path: Path, interval: float | None, key_slice: int | None) -> Tensor:
        kept = self._volume
        if kept is None or kept[0] != str(path):
            opened = open_volume(path)
            image = MetaTensor(read_voxels(opened)[None].astype(np.float32), affine=opened.affine)
            image = Orientation(ORIENTATION, labels=None)(image)
            kept = self._volume = (str(path), np.asarray(image[0]), float(image.pixdim[2]))
        _, volume, own_interval = kept
        if key_slice is None or not 0 <= key_slice < volume.shape[2]:
            raise ValueError(f"{path}: key_slice must be from 0 to {volume.shape[2] - 1}, got {key_slice}")
        mixes = self._mixes(path, own_interval if interval is None else interval)
        slices = range(volume.shape[2])
        return torch.from_numpy(self._stack(key_slice, mixes, slices, lambda n: volume[:, :, n].astype(np.float32)))

    def _mixes(self, path: Path, interval: float | None) -> tuple[Mix, ...]:
        if interval is None or not 0 < interval < math.inf:  # also NaN
            raise ValueError(f"{path}: slice_interval must be a positive number of mm, got {interval}")
        return slice_mixes(self.slices, self.distance, float(interval), self.reference)

    def _stack(
        self, key: int, mixes: tuple[Mix, ...], numbers: Container[int], read: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        """Mix what `read` gives for the numbers of slices; each number is read once."""
        seen: dict[int, np.ndarray] = {}
        stack: np.ndarray | None = None
        for i, mix in enumerate(mixes):
            for offset, weight in mix:
                number = nearest_stored(key, offset, numbers)
                if number not in seen:
                    seen[number] = read(number)
                    if seen[number].shape != seen[next(iter(seen))].shape:
                        raise ValueError(
                            f"slice {number} has {seen[number].shape[::-1]} pixels, slice {next(iter(seen))} of the"
                            f" same series {seen[next(iter(seen))].shape[::-1]}; expected slices of one size"
                        )
                if stack is None:
                    stack = np.zeros((self.slices, *seen[number].shape), np.float32)
                stack[i] += seen[number] if weight == 1 else seen[number] * np.float32(weight)
        assert stack is not None  # there is a key slice
        return stack

    def _listed(self, folder: str) -> dict[int, str]:
        """Names of the slices of a series by number; listed once, since a network drive answers slowly."""
        if folder not in self._numbers:
            names = [entry.name for entry in Path(folder).iterdir()] if Path(folder).is_dir() else []
            self._numbers[folder] = {int(m[1]): name for name in names if (m := SLICE_NAME.match(name))}
        return self._numbers[folder]


class SliceStackReaderd(MapTransform):
    """Dictionary version of `SliceStackReader`.

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


def nearest_stored(key: int, offset: int, numbers: Container[int]) -> int:
    """Choose the slice at `offset`, or where it is missing the nearest stored one towards the key slice."""
    step = 1 if offset > 0 else -1
    while offset and key + offset not in numbers:
        offset -= step
    return key + offset


def read_slice(path: Path) -> np.ndarray:
    """Read a 16-bit PNG file as HU, float32 (rows, columns).

    Raises:
        ValueError: if the file is damaged, or is no picture of one channel of 16 bits.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError) as error:  # Pillow raises both on damaged PNG files
        raise ValueError(f"{path}: cannot be read ({error}); copy or download it again") from error
    if not mode.startswith("I"):
        raise ValueError(f"{path}: is of Pillow's mode {mode}; expected one channel of 16 bits that holds HU + 32768")
    return pixels.astype(np.float32) - HU_OFFSET
