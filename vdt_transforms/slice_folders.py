"""A reader of MONAI's for CT volumes that are stored as folders of numbered 16-bit PNG slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader

from vdt_transforms.slice_stacks import SLICE_NAME, read_slice


def list_slices(folder: str | Path) -> list[Path]:
    """List the slices of a folder by number, `1.png` or `001.png` and so on; empty if it holds none.

    Raises:
        ValueError: if a number is missing in between, since a volume has no holes.
    """
    files = list(Path(folder).iterdir()) if Path(folder).is_dir() else []
    numbers = {int(m[1]): file for file in files if (m := SLICE_NAME.match(file.name))}
    for number in sorted(numbers)[1:]:
        if number - 1 not in numbers:
            raise ValueError(
                f"{folder}: slice {number - 1} is missing before {numbers[number].name}; put runs of neighbouring"
                " slices into folders of their own"
            )
    return [numbers[number] for number in sorted(numbers)]


class SliceFolderReader(ImageReader):
    """Read a folder of PNG slices that hold HU + 32768, numbered from the head to the feet, as a volume in HU.

    The volume is (X, Y, Z) = (columns, rows, slices), and its affine tells that they run to the left, the back and the
    feet. Give it to `LoadImage` as `reader`; what is no such folder is left to MONAI's own readers.

    Args:
        spacing: mm between columns, rows and slices, which the files do not tell.

    Raises:
        ValueError: if `spacing` is not three positive numbers.
    """

    def __init__(self, spacing: Sequence[float]) -> None:
        super().__init__()
        if len(spacing) != 3 or not min(spacing) > 0:
            raise ValueError(f"spacing must be three positive numbers of mm, got {spacing}")
        self.spacing = [float(value) for value in spacing]

    def verify_suffix(self, filename: Any) -> bool:
        """Whether it is a folder of slices."""
        name = filename if isinstance(filename, str | Path) else filename[0]
        return bool(list_slices(name))

    def read(self, data: Any, **kwargs: Any) -> list[np.ndarray]:
        """Read the slices (rows, columns).

        Raises:
            ValueError: if it is no folder of slices, or one of them is damaged or has another size.
        """
        name = data if isinstance(data, str | Path) else data[0]
        files = list_slices(name)
        if not files:
            raise ValueError(f"{name}: no folder of numbered PNG slices")
        slices = [read_slice(file) for file in files]
        for file, pixels in zip(files, slices, strict=True):
            if pixels.shape != slices[0].shape:
                raise ValueError(f"{file}: has {pixels.shape[::-1]} pixels, the first slice {slices[0].shape[::-1]}")
        return slices

    def get_data(self, img: list[np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        """Make the volume (X, Y, Z) and its metadata."""
        volume = np.stack(img, axis=-1).transpose(1, 0, 2)
        affine = np.diag([-self.spacing[0], -self.spacing[1], -self.spacing[2], 1.0])
        meta = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.asarray(volume.shape),
            "original_channel_dim": float("nan"),
            "space": "RAS",
        }
        return volume, meta
