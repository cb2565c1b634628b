"""What the headers of all DICOM files below a folder say."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID_dictionary

CHUNK = 500  # files of one task
LARGEST = 4 << 30  # bytes of a file in a zip archive
SLICES = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}  # SOP classes of one slice a file
FRAMES = {  # SOP classes of many slices a file, which describe each slice on its own
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}
DIRECTORY = "1.2.840.10008.1.3.10"  # SOP class of DICOMDIR, which lists the files of a disc
UNCOMPRESSED = {  # transfer syntaxes, and the bytes between header and pixels
    "1.2.840.10008.1.2": 8,
    "1.2.840.10008.1.2.1": 12,
    "1.2.840.10008.1.2.2": 12,
}
NEEDED = {  # and how many values
    **{"SeriesInstanceUID": 1, "ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2},
    **{"Rows": 1, "Columns": 1},
}
PHASES = (  # by one of these, images at the same places are of several points of time, echoes, ...
    *("StackID", "TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber", "EchoNumbers"),
    *("EffectiveEchoTime", "EchoTime", "DiffusionBValue", "TriggerTime", "NominalPercentageOfCardiacPhase"),
)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TAGS = [
    *NEEDED,
    *("SOPClassUID", "SOPInstanceUID", "PatientID", "Modality", "ImageType", "InstanceNumber", "SliceThickness"),
    *("BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept"),
    *("SeriesNumber", "SeriesDescription", "NumberOfFrames", *GROUPS, *PHASES),
]
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class Header(NamedTuple):
    """What a file's header says of one slice. Only those that are neither skipped nor damaged have all of it.

    Attributes:
        path: relative to the folder that was searched.
        frame: number of the slice in a file of many, from 0, else None.
        skipped: why the file is no slice of a volume (its modality, "localizer", "not DICOM", ...), or empty.
        damaged: what is wrong with the file, or empty.
        number: of the series, as scanners count them.
        position: centre of the first pixel, mm, in DICOM's world, where x grows to the left and y to the back.
        orientation: directions along a row and along a column.
        pixel_spacing: mm between rows, and between columns.
        colours: how pixels are to be understood; MONOCHROME2 for grey values, the brighter the greater.
        rescale: slope and intercept that make stored numbers physical ones (HU in CT), if it has them.
        phases: what may tell images at one place apart, see `PHASES`.
    """

    path: str
    frame: int | None = None
    skipped: str = ""
    damaged: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    patient_id: str = ""
    modality: str = ""
    number: str = ""
    description: str = ""
    instance: int = 0
    rows: int = 0
    columns: int = 0
    position: Sequence[float] = ()
    orientation: Sequence[float] = ()
    pixel_spacing: Sequence[float] = ()
    thickness: float | None = None
    colours: str = ""
    rescale: tuple[float, float] | None = None
    phases: tuple[str, ...] = ()


def read_headers(root: str | os.PathLike, *, mapper: Map = map) -> list[Header]:
    """Read the headers of all files below a folder; names say nothing, hidden files are left out.

    Zip archives are searched as if they were folders, and never unpacked to the disk.

    Args:
        root: the folder or archive.
        mapper: applies a function to tasks, as `map` does, or in several processes and in any order.

    Returns:
        The headers in the order of their paths.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming a zip archive that cannot be opened.
    """
    root = Path(root)
    if not is_folder(root):
        raise FileNotFoundError(f"{root}: no such folder; expected one with DICOM files in it or below it")
    files = sorted(_list_files(root))
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    headers = (header for chunk in mapper(partial(_read_chunk, root), chunks) for header in chunk)
    return sorted(headers, key=lambda header: (header.path, header.frame or 0))


def is_folder(path: Path) -> bool:
    """Whether it is a folder, a zip archive, or a folder within one."""
    return path.is_dir() or (not path.is_file() and _archive_of(path) is not None) or _is_zip(path)


def open_dicom(path: Path) -> BinaryIO:
    """Open a file, also one in a zip archive, whose path is that of the archive and then its name in there."""
    if path.is_file() or (archive := _archive_of(path)) is None:
        return open(path, "rb")
    return io.BytesIO(_read_member(archive, archive.stat().st_mtime_ns, path.relative_to(archive).as_posix()))


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file() and zipfile.is_zipfile(path)


def _archive_of(path: Path) -> Path | None:
    return next((parent for parent in path.parents if _is_zip(parent)), None)


@lru_cache(maxsize=2)
def _read_member(archive: Path, changed: int, name: str) -> bytes:
    """Unpack one file into memory; `changed` says which archive of that name it is."""
    with _open_zip(archive, changed, os.getpid()).open(name) as member:
        return member.read()  # never more than the size that `_list_zip` has checked


@lru_cache(maxsize=4)
def _open_zip(archive: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Open an archive once for each process, as processes must not share a position in the file."""
    return zipfile.ZipFile(archive)


def _list_zip(archive: Path) -> Iterator[str]:
    for info in _open_zip(archive, archive.stat().st_mtime_ns, os.getpid()).infolist():
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in info.filename.split("/")):
            continue
        if info.flag_bits & 1 or info.file_size > LARGEST:
            what = "is encrypted" if info.flag_bits & 1 else f"would unpack to {info.file_size:,} bytes"
            raise ValueError(f"{archive}: a file in it {what}; expected DICOM files of 4 GB at most, or unpack it")
        yield info.filename


def _list_files(root: Path) -> Iterator[str]:
    """Paths relative to the root."""
    if archive := root if _is_zip(root) else _archive_of(root):
        inside = f"{root.relative_to(archive).as_posix()}/".removeprefix("./")
        yield from (name[len(inside) :] for name in _list_zip(archive) if name.startswith(inside))
        return
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
                elif _is_zip(root / path):
                    yield from (f"{path}/{name}" for name in _list_zip(root / path))
                elif entry.is_file():
                    yield path


def _read_chunk(root: Path, paths: Sequence[str]) -> list[Header]:
    return [header for path in paths for header in read_header(root, path)]


def read_header(root: Path, path: str) -> list[Header]:
    """Read one file's header, of each of its slices; what is wrong with the file is said in it, not raised.

    A file without DICOM's preamble is read if it begins as a data set does and says of which registered kind it is.
    """
    try:
        with open_dicom(root / path) as file, disable_value_validation():  # whose warnings would show names
            bare = file.read(132)[128:] != b"DICM" and file.seek(0) == 0 and file.read(2) in (b"\x08\0", b"\x02\0")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS), force=bare)
            if bare and dataset.get("SOPClassUID") not in UID_dictionary:
                raise InvalidDicomError
            return _understand(path, dataset, size - file.tell())
    except InvalidDicomError:
        if not path.lower().endswith((".dcm", ".dicom", ".ima")):
            return [Header(path, skipped="not DICOM")]
        return [Header(path, damaged="no DICOM, or cut short within its first bytes" if size else "empty (0 bytes)")]
    except Exception as error:  # broken bytes raise whatever they lead to, with text of the header in it
        return [Header(path, damaged=f"not a readable DICOM file ({type(error).__name__})")]


def _understand(path: str, dataset: Any, rest: int) -> list[Header]:
    """Take from a data set what a volume needs; `rest` is the number of bytes from the pixels' element on."""
    modality = str(dataset.get("Modality", ""))
    sop_class = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    skipped = "DICOMDIR" if sop_class == DIRECTORY else ""
    if not skipped and sop_class not in {**SLICES, **FRAMES} and (sop_class or modality not in SLICES.values()):
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
        return [header]
    if not modality:
        return [header._replace(damaged="has no Modality, as if cut short in its header")]
    frames = _split_frames(dataset) if sop_class in FRAMES else [dataset]
    count = int(dataset.get("NumberOfFrames") or 1)
    if len(frames) != count:
        return [header._replace(damaged=f"has {count} frames, of which its header describes {len(frames)}")]
    for frame in frames:
        missing = [name for name, number in NEEDED.items() if name not in frame or number != frame[name].VM]
        if missing:
            return [header._replace(damaged=f"has no {' and no '.join(missing)}")]
        if not header.series_uid.replace(".", "").isdecimal():  # it becomes part of paths
            return [header._replace(damaged="its SeriesInstanceUID is no number with dots", series_uid="")]
        if not 0 < min(frame.PixelSpacing) <= max(frame.PixelSpacing) < np.inf:
            return [header._replace(damaged=f"has pixels of {' x '.join(map(str, frame.PixelSpacing))} mm")]
        if not np.isfinite([*frame.ImagePositionPatient, *frame.ImageOrientationPatient]).all():
            return [header._replace(damaged="has a position or directions that are no numbers")]
    needed = dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1) * dataset.get("BitsAllocated", 16) // 8
    there = rest - UNCOMPRESSED.get(syntax := syntax_of(dataset), 0)
    if syntax in UNCOMPRESSED and there < count * needed:
        sentence = f"cut short, {max(there, 0):,} of {count * needed:,} bytes of pixels are there"
        return [header._replace(damaged=sentence)]
    header = header._replace(
        number=number if (number := str(dataset.get("SeriesNumber"))).isdecimal() else "",
        description=str(dataset.get("SeriesDescription") or "").strip(),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        colours=str(dataset.get("PhotometricInterpretation", "MONOCHROME2")),
    )
    return [_place(header, frame, i if sop_class in FRAMES else None) for i, frame in enumerate(frames)]


def syntax_of(dataset: Any) -> str:
    """Give the transfer syntax, by the encoding that was found where a file without preamble does not say it."""
    encoding = getattr(dataset, "original_encoding", None)  # since pydicom 3; MONAI Label needs an older one
    implicit, little = encoding or (dataset.is_implicit_VR, dataset.is_little_endian)
    plain = "1.2.840.10008.1.2" + ("" if implicit else ".1" if little else ".2")
    return str(dataset.file_meta.get("TransferSyntaxUID") or plain)


def _place(header: Header, frame: Any, number: int | None) -> Header:
    """Say of one slice where it is and how its numbers are to be read."""
    thickness, slope, intercept = (frame.get(n) for n in ("SliceThickness", "RescaleSlope", "RescaleIntercept"))
    return header._replace(
        frame=number,
        sop_uid=header.sop_uid if number is None else f"{header.sop_uid}#{number}",
        instance=int(frame.get("InstanceNumber") or 0) if number is None else number,
        position=[float(v) for v in frame.ImagePositionPatient],
        orientation=[float(v) for v in frame.ImageOrientationPatient],
        pixel_spacing=[float(v) for v in frame.PixelSpacing],
        thickness=float(thickness) if thickness else None,
        rescale=None if slope is None or intercept is None else (float(slope), float(intercept)),
        phases=tuple(str(frame.get(name, "")) for name in PHASES),
    )


def _split_frames(dataset: Any) -> list[Any]:
    """Make a data set for each frame of a file of many, as if it were a file of its own."""
    frames = []
    shared, own = (dataset.get(name) or [] for name in GROUPS)
    for frame in own:
        flat = pydicom.Dataset()
        flat.update(dataset)
        for group in (element for item in (*shared, frame) for element in item):
            if group.VR == "SQ" and group.value:
                flat.update(group.value[0])
        frames.append(flat)
    return frames
