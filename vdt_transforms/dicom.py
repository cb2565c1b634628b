"""CT scans from DICOM folders, with their slices in the order of their positions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import NibabelReader, PydicomReader
from monai.utils import ensure_tuple, optional_import

pydicom, has_pydicom = optional_import("pydicom")

GAP = 0.2  # share of the usual distance by which one may differ: 0.625 mm are often written as 0.6 and 0.7


class SeriesReader(PydicomReader):
    """MONAI's `PydicomReader` of a scan's folder, safe against what it passes over in silence.

    The original sorts slices by their instance number, takes whatever files the folder holds for one scan, and does not
    see that slices are missing or come twice. Here the files below the folder must be one series, and the slices lie in
    the order of their positions, at equal distances. Files that are no DICOM images are passed over. The result is (X,
    Y, Z) = (columns, rows, slices) in HU, with an affine to RAS mm; slices rise along the normal of their plane, which
    in an axial scan points to the head.

    Give it to `LoadImaged(reader="vdt_transforms.SeriesReader")`, or to `VolumeReader`, which calls it. It needs
    pydicom.

    Raises:
        ValueError: naming the folder, if it holds no image, several series, slices of different sizes, missing or
            repeated slices, or a damaged file.
    """

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[str]:
        """Keep the paths: `LoadImage` hides what goes wrong here behind the next reader's failure."""
        return [os.fspath(path) for path in ensure_tuple(data)]

    def get_data(self, data: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one folder (X, Y, Z), with its metadata."""
        (folder,) = data
        if not has_pydicom:
            raise ValueError(f"{folder}: DICOM needs pydicom; install it with: pip install pydicom")
        slices = _in_order(folder, _read_slices(folder))
        for number, dataset in enumerate(slices, 1):
            dataset.InstanceNumber = number  # what the original sorts by
        self.filenames = [[str(dataset.filename) for dataset in slices]]
        self.has_series = len(slices) > 1
        try:
            return super().get_data(slices)
        except Exception as error:  # decoders raise whatever they stumble over
            raise ValueError(f"{folder}: its slices cannot be read ({type(error).__name__}: {error})") from error


class VolumeReader(NibabelReader):
    """MONAI reader of volumes in NIfTI, and of DICOM folders by `SeriesReader`.

    Give it to `LoadImaged(reader="vdt_transforms.VolumeReader")`.
    """

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say whether all are NIfTI files or folders."""
        names = [os.fspath(name) for name in ensure_tuple(filename)]
        return all(name.endswith((".nii", ".nii.gz")) or os.path.isdir(name) for name in names)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Any:
        """Open NIfTI files; keep the path of a folder."""
        paths = [os.fspath(path) for path in ensure_tuple(data)]
        if len(paths) == 1 and os.path.isdir(paths[0]):
            self.filenames = paths
            return paths
        return super().read(data, **kwargs)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one folder, or files as channels, (X, Y, Z), with their metadata."""
        if isinstance(img, list) and len(img) == 1 and isinstance(img[0], str):
            return SeriesReader().get_data(img)
        return super().get_data(img)


def _read_slices(folder: str) -> list[Any]:
    """Read every DICOM image below the folder."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    slices = []
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            try:
                dataset = pydicom.dcmread(os.path.join(place, name))
            except pydicom.errors.InvalidDicomError:
                continue
            except Exception as error:
                raise ValueError(f"{os.path.join(place, name)}: damaged or cut short ({error})") from error
            if "ImagePositionPatient" in dataset and "PixelData" in dataset:
                slices.append(dataset)
    if not slices:
        raise ValueError(f"{folder}: no DICOM image with a position in it or below it")
    return slices


def _in_order(folder: str, slices: list[Any]) -> list[Any]:
    series = sorted({str(dataset.SeriesInstanceUID) for dataset in slices})
    if len(series) > 1:
        counts = [sum(dataset.SeriesInstanceUID == uid for dataset in slices) for uid in series]
        listed = ", ".join(f"{uid} with {count}" for uid, count in zip(series[:3], counts, strict=False))
        raise ValueError(f"{folder}: holds {len(series)} series ({listed} images); give the folder of one")
    for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
        values = {str(dataset.get(tag)) for dataset in slices}
        if len(values) > 1:
            raise ValueError(f"{folder}: its slices differ in {tag}: {', '.join(sorted(values)[:3])}")
    row, column = np.reshape(np.asarray(slices[0].ImageOrientationPatient, float), (2, 3))
    heights = np.array([np.dot(np.cross(row, column), dataset.ImagePositionPatient) for dataset in slices], float)
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    usual = float(np.median(steps)) if len(steps) else 1.0
    wrong = np.flatnonzero(np.abs(steps - usual) > GAP * usual)
    if len(wrong):
        first = int(wrong[0])
        a, b = heights[order[first]], heights[order[first + 1]]
        what = "twice" if b - a < GAP * usual else f"then {b:.2f}, {b - a:.2f} mm on"
        raise ValueError(
            f"{folder}: its {len(slices)} slices are not at equal distances ({usual:.2f} mm): {len(wrong)} are missing,"
            f" repeated or out of place, the first at {a:.2f} mm ({what}); copy or download the series again"
        )
    return [slices[i] for i in order]
