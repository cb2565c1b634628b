"""Readers: volumes of files, DICOM folders, numbered slices and nodule cubes, and classes of images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.transforms import Transform
from monai.utils import ensure_tuple

from vdt_transforms.dicom_folders import find_one_series
from vdt_transforms.dictionary import ArrayPerKey
from vdt_transforms.geometry import GEOMETRIES, SUFFIX, make_meta, open_volume, read_voxels
from vdt_transforms.slice_stacks import SLICE_NAME, read_slice

IS_FILE = re.compile(r"\.(npz|png|nii(\.gz)?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)  # what is no DICOM
WINDOW = (-1024.0, 400.0)  # HU, that the published nodule files map linearly to 0..255


class SeriesReader(ImageReader):
    """MONAI reader of DICOM folders, each of one CT or MR series: (X, Y, Z) = (columns, rows, slices), CT in HU.

    Slices lie in the order of their positions; in an axial scan they rise to the head. What cannot be a volume is
    refused, and copies and localizers are left out with a warning, exactly as `vdt_workflows.list_volumes` does (see
    `find_one_series` and `DicomSeries`). MONAI's `PydicomReader` passes all this over in silence.

    Give it to `LoadImaged(reader="vdt_transforms.SeriesReader")`, or to `VolumeReader`, which calls it.

    Args:
        irregular: "refuse" a series that lacks slices, has several at one place, or uneven ones; or "accept" it as if
            its slices were at equal distances.

    Raises:
        ValueError: if `irregular` is something else; naming the folder or the file, if the series cannot be used.
    """

    def __init__(self, irregular: str = "refuse") -> None:
        super().__init__()
        if irregular not in ("refuse", "accept"):
            raise ValueError(f"irregular must be 'refuse' or 'accept', got {irregular!r}")
        self.irregular = irregular

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say whether it may stand for a series, as a folder, zip or file, or by its name in a folder of several."""
        return not IS_FILE.search(os.fspath(ensure_tuple(filename)[0]))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[str]:
        """Keep the paths: `LoadImage` hides what goes wrong here behind the next reader's failure."""
        return [os.fspath(path) for path in ensure_tuple(data)]

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one folder (X, Y, Z), with its metadata, `modality` among them."""
        (folder,) = img
        series = find_one_series(folder)
        volume = series.read(irregular=self.irregular == "accept")
        return volume, make_meta(series.affine, volume.shape, modality=series.modality)


class VolumeReader(SeriesReader):
    """MONAI reader of volumes: NIfTI, NRRD and MetaImage files (see `open_volume`), and DICOM folders.

    Give it to `LoadImaged(reader="vdt_transforms.VolumeReader")`. MONAI's `NibabelReader` changes the affine of a file
    whose header contradicts itself, in silence; here such a file is refused.

    Args:
        irregular: of DICOM series, see `SeriesReader`.
        geometry: what says where the voxels of a NIfTI file lie: "refuse", "sform" or "qform", see `open_volume`.

    Raises:
        ValueError: naming the file or folder, if it cannot be used.
    """

    def __init__(self, irregular: str = "refuse", geometry: str = "refuse") -> None:
        super().__init__(irregular)
        if geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be 'refuse', 'sform' or 'qform', got {geometry!r}")
        self.geometry = geometry

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say whether all are files of a known kind or folders."""
        names = [os.fspath(name) for name in ensure_tuple(filename)]
        return all(SUFFIX.search(name) or super(VolumeReader, self).verify_suffix(name) for name in names)

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one folder or file (X, Y, Z), or several files as channels (C, X, Y, Z), with the first's metadata."""
        if len(img) == 1 and SeriesReader.verify_suffix(self, img):
            return super().get_data(img)
        volumes, metas = zip(*(self._read_file(path) for path in img), strict=True)
        if len(img) == 1:
            return volumes[0], metas[0]
        return np.stack(volumes), {**metas[0], "original_channel_dim": 0}

    def _read_file(self, path: str) -> tuple[np.ndarray, dict[str, Any]]:
        image = open_volume(path, self.geometry)
        return read_voxels(image), make_meta(image.affine, image.shape[:3], **image.extra)


class NoduleReader(VolumeReader):
    """MONAI reader of nodules: published `.npz` files, and scans or crops as `VolumeReader` reads them.

    A published file has arrays (z, y, x) of 1 mm: `voxel`, uint8 for the window of -1024 to 400 HU, and masks
    `answer1`, ... They come out as (X, Y, Z), `voxel` in HU. Columns run to the patient's left and rows to the back, so
    the affine is diag(-1, -1, 1, 1); the files do not say where in the scan a cube was.

    Give it to `LoadImaged(reader="vdt_transforms.NoduleReader")`, with `array="answer1"` for the masks.

    Args:
        array: the array that is read from an npz file.
        kwargs: every further argument goes to `VolumeReader`.

    Raises:
        ValueError: naming the file, when it is damaged, has no such array, or holds no volume.
    """

    def __init__(self, array: str = "voxel", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.array = array

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Say whether all are files of a known kind or folders."""
        return super().verify_suffix([name for name in ensure_tuple(filename) if not str(name).endswith(".npz")])

    def _read_file(self, path: str) -> tuple[np.ndarray, dict[str, Any]]:
        if not path.endswith(".npz"):
            return super()._read_file(path)
        try:
            values = self._open(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file") from error
        except Exception as error:  # a damaged archive raises errors of any kind
            raise ValueError(f"{path}: not a readable nodule or scan ({error})") from error
        return values, make_meta(np.diag([-1.0, -1.0, 1.0, 1.0]), values.shape)

    def _open(self, path: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as archive:
            if self.array not in archive:
                raise ValueError(f"it has the arrays {', '.join(archive.files)}, not {self.array}")
            values = archive[self.array]
        if values.ndim != 3:
            raise ValueError(f"its {self.array} has the shape {values.shape}, not (z, y, x)")
        if self.array == "voxel":
            low, high = WINDOW
            values = values.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
        return values.astype(np.float32).transpose()


class SliceFolderReader(VolumeReader):
    """Read a folder of slices as a volume in HU (X, Y, Z): numbered PNG files, or a DICOM series; or a volume file.

    PNG slices hold HU + 32768 and are numbered from the head to the feet; X, Y, Z are columns, rows and slices, and by
    the affine they run to the left, the back and the feet. All else is read by `VolumeReader`.

    Give it to `LoadImage` as `reader`.

    Args:
        spacing: mm between columns, rows and slices, which PNG files do not hold.
        kwargs: every further argument goes to `VolumeReader`.

    Raises:
        ValueError: if `spacing` is not three positive numbers; if a PNG slice is missing, damaged or has another size;
            or as `VolumeReader` does.
    """

    def __init__(self, spacing: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(spacing) != 3 or not min(spacing) > 0:
            raise ValueError(f"spacing must be three positive numbers of mm, got {spacing}")
        self.spacing = [float(value) for value in spacing]

    def get_data(self, img: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read the volume (X, Y, Z) of a folder, and its metadata."""
        files = list_slices(img[0])
        if not files:
            return super().get_data(img)
        slices = [read_slice(file) for file in files]
        for file, pixels in zip(files, slices, strict=True):
            if pixels.shape != slices[0].shape:
                raise ValueError(f"{file}: has {pixels.shape[::-1]} pixels, the first slice {slices[0].shape[::-1]}")
        volume = np.stack(slices, axis=-1).transpose(1, 0, 2)
        return volume, make_meta(np.diag([*(-step for step in self.spacing), 1.0]), volume.shape)


def list_slices(folder: PathLike) -> list[Path]:
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


class ReadClass(Transform):
    """Make a class's number of what names it.

    A number is passed on. A path is read as JSON: `{"label": NAME}`, or what MONAI Label answers in classification,
    `{"prediction": [{"label": NAME, "score": NUMBER}, ...]}`, of which the highest score counts.

    Args:
        names: names of the classes, in order; capitals do not matter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no such JSON or names no known class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name.lower() for name in names]

    def __call__(self, label: int | str | os.PathLike) -> int:
        """Number, or path of a JSON file -> number from 0."""
        if not isinstance(label, str | os.PathLike):
            return label
        path = Path(label)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such label file")
        try:
            content = json.loads(path.read_bytes())
            best = max(content["prediction"], key=lambda c: c["score"]) if "prediction" in content else content
            name = best["label"].lower()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}: not the class of an image; expected JSON such as {{"label": "{self.names[-1]}"}}'
            ) from error
        if name not in self.names:
            raise ValueError(f"{path}: no class is called {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)


class ReadClassd(ArrayPerKey):
    """Dictionary version of `ReadClass`."""

    array = ReadClass
