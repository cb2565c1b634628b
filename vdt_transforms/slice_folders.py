"""A reader of MONAI's for CT volumes that are stored as folders of slices: numbered 16-bit PNG files, or DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import ensure_tuple

from vdt_transforms.dicom import SeriesReader
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
    """Read a folder of slices as a volume in HU (X, Y, Z): numbered PNG files, or a DICOM series.

    PNG slices hold HU + 32768 and are numbered from the head to the feet; X, Y, Z are columns, rows and slices, and the
    affine tells that they run to the left, the back and the feet. Other folders are read by `SeriesReader`.

    Give it to `LoadImage` as `reader`; files are left to MONAI's own readers.

    Args:
        spacing: mm between columns, rows and slices, which PNG files do not tell.

    Raises:
        ValueError: if `spacing` is not three positive numbers; if a PNG slice is missing, damaged or has another size;
            or as `SeriesReader` does.
    """

    def __init__(self, spacing: Sequence[float]) -> None:
        super().__init__()
        if len(spacing) != 3 or not min(spacing) > 0:
            raise ValueError(f"spacing must be three positive numbers of mm, got {spacing}")
        self.spacing = [float(value) for value in spacing]

    def verify_suffix(self, filename: Any) -> bool:
        """Whether it is a folder."""
        return Path(ensure_tuple(filename)[0]).is_dir()

    def read(self, data: Any, **kwargs: Any) -> str:
        """Keep the path: `LoadImage` hides what goes wrong here behind the next reader's failure.

        Raises:
            ValueError: if it is a file, so that the next reader is taken.
        """
        path = ensure_tuple(data)[0]
        if not Path(path).is_dir():
            raise ValueError(f"{path}: not a folder of slices")
        return str(path)

    def get_data(self, img: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Read the volume (X, Y, Z) of a folder, and its metadata."""
        files = list_slices(img)
        if not files:
            return SeriesReader().get_data([img])
        slices = [read_slice(file) for file in files]
        for file, pixels in zip(files, slices, strict=True):
            if pixels.shape != slices[0].shape:
                raise ValueError(f"{file}: has {pixels.shape[::-1]} pixels, the first slice {slices[0].shape[::-1]}")
        volume = np.stack(slices, axis=-1).transpose(1, 0, 2)
        affine = np.diag([-self.spacing[0], -self.spacing[1], -self.spacing[2], 1.0])
        meta = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.asarray(volume.shape),
            "original_channel_dim": float("nan"),
            "space": "RAS",
        }
        return volume, meta
