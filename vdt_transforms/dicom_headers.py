"""What the headers of all DICOM files below a folder say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
from pydicom.errors import InvalidDicomError

CHUNK = 500  # files of one task
SLICES = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}  # SOP classes of one slice a file
OTHERS = {  # SOP classes that are called by another name than their modality
    "1.2.840.10008.5.1.4.1.1.2.1": "multi-frame CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "multi-frame MR",
    "1.2.840.10008.1.3.10": "DICOMDIR",
}
UNCOMPRESSED = {  # transfer syntaxes, and the bytes between header and pixels
    "1.2.840.10008.1.2": 8,
    "1.2.840.10008.1.2.1": 12,
    "1.2.840.10008.1.2.2": 12,
}
NEEDED = {  # and how many values
    **{"SeriesInstanceUID": 1, "ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2},
    **{"Rows": 1, "Columns": 1},
}
TAGS = [
    *NEEDED,
    *("SOPClassUID", "SOPInstanceUID", "PatientID", "Modality", "ImageType", "InstanceNumber", "SliceThickness"),
    *("BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept"),
]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class Header(NamedTuple):
    """What one file's header says. Only files that are neither skipped nor damaged have all of it.

    Attributes:
        path: relative to the folder that was searched.
        skipped: why the file is no slice of a volume (its modality, "localizer", "not DICOM", ...), or empty.
        damaged: what is wrong with the file, or empty.
        position: centre of the first pixel, mm, in DICOM's world, where x grows to the left and y to the back.
        orientation: directions along a row and along a column.
        pixel_spacing: mm between rows, and between columns.
        colours: how pixels are to be understood; MONOCHROME2 for grey values, the brighter the greater.
        rescaled: whether it says how stored numbers become physical ones (HU in CT).
    """

    path: str
    skipped: str = ""
    damaged: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    patient_id: str = ""
    modality: str = ""
    instance: int = 0
    rows: int = 0
    columns: int = 0
    position: Sequence[float] = ()
    orientation: Sequence[float] = ()
    pixel_spacing: Sequence[float] = ()
    thickness: float | None = None
    colours: str = ""
    rescaled: bool = False


def read_headers(root: str | os.PathLike, *, mapper: Map = map) -> list[Header]:
    """Read the headers of all files below a folder; names say nothing, hidden files are left out.

    Args:
        root: the folder.
        mapper: applies a function to tasks, as `map` does, or in several processes and in any order.

    Returns:
        The headers in the order of their paths.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected one with DICOM files in it or below it")
    files = sorted(_list_files(root))
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    return sorted(header for chunk in mapper(partial(_read_chunk, root), chunks) for header in chunk)


def _list_files(root: Path) -> Iterator[str]:
    """Paths relative to the root."""
    pending, seen = [""], set()
    while pending:
        folder = pending.pop()
        real = os.path.realpath(root / folder)
        if real in seen:  # a link to a folder that was, or is being, searched
            continue
        seen.add(real)
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(f"{path}/")
                elif entry.is_file():
                    yield path


def _read_chunk(root: Path, paths: Sequence[str]) -> list[Header]:
    return [read_header(root, path) for path in paths]


def read_header(root: Path, path: str) -> Header:
    """Read one file's header; what is wrong with the file is said in it, not raised."""
    try:
        with open(root / path, "rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            return _understand(path, dataset, os.path.getsize(root / path) - file.tell())
    except InvalidDicomError:
        if not path.lower().endswith((".dcm", ".dicom", ".ima")):
            return Header(path, skipped="not DICOM")
        empty = not os.path.getsize(root / path)
        return Header(path, damaged="empty (0 bytes)" if empty else "no DICOM, or cut short within its first bytes")
    except Exception as error:  # broken bytes raise whatever they lead to
        return Header(path, damaged=f"not a readable DICOM file ({type(error).__name__}: {error})")


def _understand(path: str, dataset: Any, rest: int) -> Header:
    """Take from a data set what a volume needs; `rest` is the number of bytes from the pixels' element on."""
    modality = str(dataset.get("Modality", ""))
    sop_class = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    skipped = OTHERS.get(sop_class, "")
    if not skipped and sop_class not in SLICES and (sop_class or modality not in SLICES.values()):
        skipped = modality
    elif not skipped and "LOCALIZER" in (dataset.get("ImageType") or ()):
        skipped = "localizer"
    header = Header(
        path,
        skipped=skipped,
        series_uid=str(dataset.get("SeriesInstanceUID", "")),
        sop_uid=str(dataset.get("SOPInstanceUID", "")),
        patient_id=str(dataset.get("PatientID", "")),
        modality=modality,
    )
    if skipped:
        return header
    if not modality:
        return header._replace(damaged="has no Modality, as if cut short in its header")
    missing = [name for name, count in NEEDED.items() if name not in dataset or count != dataset[name].VM]
    if missing:
        return header._replace(damaged=f"has no {' and no '.join(missing)}")
    if min(dataset.PixelSpacing) <= 0:
        return header._replace(damaged=f"has pixels of {' x '.join(map(str, dataset.PixelSpacing))} mm")
    needed = dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1) * dataset.get("BitsAllocated", 16) // 8
    there = rest - UNCOMPRESSED.get(syntax := str(dataset.file_meta.get("TransferSyntaxUID", "")), 0)
    if syntax in UNCOMPRESSED and there < needed:
        return header._replace(damaged=f"cut short, {max(there, 0):,} of {needed:,} bytes of pixels are there")
    thickness = dataset.get("SliceThickness")
    return header._replace(
        instance=int(dataset.get("InstanceNumber") or 0),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        position=[float(v) for v in dataset.ImagePositionPatient],
        orientation=[float(v) for v in dataset.ImageOrientationPatient],
        pixel_spacing=[float(v) for v in dataset.PixelSpacing],
        thickness=float(thickness) if thickness else None,
        colours=str(dataset.get("PhotometricInterpretation", "MONOCHROME2")),
        rescaled=dataset.get("RescaleSlope") is not None and dataset.get("RescaleIntercept") is not None,
    )
