"""DICOM series of CT and MR: found by their headers, checked as volumes, read with the right order and geometry."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from vdt_transforms.dicom_checks import along_normal, check_alike, check_places, check_straight, describe_damage
from vdt_transforms.dicom_headers import Header, Map, read_headers

logger = logging.getLogger(__name__)

AIR = -1024  # HU
INT16 = np.iinfo(np.int16)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series, its slices in the order of their place in the body (feet to head where they are axial).

    What was found wrong is said in sentences that name the folder or the file, in three degrees. `notes` were mended.
    A series with `irregularities` can be read, but is no regular grid. One with `errors` cannot be used.

    Attributes:
        uid: SeriesInstanceUID.
        folder: the one that holds its files, in itself or in folders below.
        files: one a slice.
        positions: centre of the first pixel of each slice, (slices, 3), mm, in DICOM's world (LPS).
        orientation: directions along a row and along a column, (2, 3).
        pixel_spacing: mm between rows, and between columns.
        rows: pixels of a column.
        columns: pixels of a row.
        thickness: of a slice, mm, as the header has it; slices may overlap or be apart.
    """

    uid: str
    patient_id: str
    modality: str
    folder: Path
    files: tuple[Path, ...]
    positions: np.ndarray
    orientation: np.ndarray
    pixel_spacing: tuple[float, float]
    rows: int
    columns: int
    thickness: float | None
    notes: tuple[str, ...] = ()
    irregularities: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def slice_spacing(self) -> float:
        """Median distance between neighbouring slices in mm; 0 of a single slice."""
        steps = np.diff(along_normal(self.positions, self.orientation))
        return float(np.median(steps)) if len(steps) else 0.0

    @property
    def affine(self) -> np.ndarray:
        """Voxel (column, row, slice) to world (RAS, mm), (4, 4), as NIfTI has it; of a regular grid."""
        affine = np.eye(4)
        affine[:3, 0] = self.orientation[0] * self.pixel_spacing[1]
        affine[:3, 1] = self.orientation[1] * self.pixel_spacing[0]
        affine[:3, 2] = (self.positions[-1] - self.positions[0]) / (len(self.files) - 1)
        affine[:3, 3] = self.positions[0]
        return LPS_TO_RAS @ affine

    @property
    def is_axial(self) -> bool:
        """Whether rows run along the body's left-right axis and columns along its front-back axis, to 0.1 degree."""
        return bool(np.all(np.abs(np.abs(self.orientation) - np.eye(3)[:2]) < 2e-3))

    def check(self, *, irregular: bool = False) -> None:
        """Raise ValueError with the first of its errors, and of its irregularities unless `irregular` allows them."""
        for sentence in (*self.errors, *(() if irregular else self.irregularities)):
            raise ValueError(sentence)

    def read_slice(self, index: int) -> np.ndarray:
        """Read one slice, (rows, columns): CT in HU as int16, other modalities as float32.

        In CT, padding (PixelPaddingValue) is read as air, -1024 HU.

        Raises:
            ValueError: naming the file, if its pixels cannot be decoded, are not one grey value each, or are no HU.
        """
        file = self.files[index]
        try:
            dataset = pydicom.dcmread(file)
            stored = dataset.pixel_array
        except Exception as error:  # broken bytes and missing decoders raise whatever they lead to
            reason = " ".join(str(error).split())
            hint = "install one of these decoders" if "missing dependencies" in reason else "copy or download it again"
            raise ValueError(f"{file}: its pixels cannot be decoded ({reason}); {hint}") from error
        if stored.shape != (self.rows, self.columns):
            raise ValueError(f"{file}: pixels of shape {stored.shape}; expected {(self.rows, self.columns)}")
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
            raise ValueError(f"{file}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g} give no values")
        values = stored * np.float32(slope) + np.float32(intercept)
        if self.modality != "CT":
            return values
        values[stored == dataset.get("PixelPaddingValue")] = AIR
        if values.max() > INT16.max:
            raise ValueError(
                f"{file}: values up to {values.max():g}, which no CT has in HU; this is an integer overflow or a wrong"
                " RescaleSlope, so export the series again"
            )
        return values.round().clip(INT16.min).astype(np.int16)

    def read(self, *, irregular: bool = False) -> np.ndarray:
        """Read the volume, (columns, rows, slices), to go with `affine`.

        Args:
            irregular: read also what is no regular grid; `affine` is then wrong between the first and last slice.

        Raises:
            ValueError: see `check` and `read_slice`.
        """
        self.check(irregular=irregular)
        return np.stack([self.read_slice(i).T for i in range(len(self.files))], axis=2)


@dataclass(frozen=True, eq=False)
class DicomFolder:
    """What a folder holds: its series, how many files of each other kind, and files that belong to no series."""

    series: tuple[DicomSeries, ...]
    skipped: dict[str, int]
    damaged: tuple[str, ...]


def find_series(
    root: str | os.PathLike, *, modalities: Collection[str] = ("CT", "MR"), mapper: Map = map
) -> DicomFolder:
    """Find the series below a folder by what the headers say; names of files and folders mean nothing.

    MONAI's `PydicomReader` reads a folder as one series in the order of its instance numbers; several series in a
    folder, missing slices and copies go unnoticed. Here each series is apart, sorted by position, and checked.

    Args:
        root: the folder; headers of everything below it are read.
        modalities: which to take, of "CT" and "MR".
        mapper: see `read_headers`.

    Returns:
        The series sorted by patient and uid. Those whose folder holds a damaged file have an error that names it.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    root = Path(root)
    slices: dict[str, list[Header]] = defaultdict(list)
    damaged: dict[str, list[Header]] = defaultdict(list)  # by series, or by folder where the series is not known
    localizers: list[Header] = []
    skipped: Counter[str] = Counter()
    for header in read_headers(root, mapper=mapper):
        if header.damaged:
            damaged[header.series_uid or os.path.dirname(header.path)].append(header)
        elif header.skipped or header.modality not in modalities:
            skipped[header.skipped or header.modality] += 1
            localizers += [header] if header.skipped == "localizer" else []
        else:
            slices[header.series_uid].append(header)
    in_folder: dict[str, set[str]] = defaultdict(set)
    for uid, group in slices.items():
        for header in group:
            in_folder[os.path.dirname(header.path)].add(uid)
    series = [_build(root, group, damaged, localizers, in_folder) for group in slices.values()]
    claimed = slices.keys() | in_folder.keys()
    lost = [describe_damage(root, group) for key, group in sorted(damaged.items()) if key not in claimed]
    return DicomFolder(
        tuple(sorted(series, key=lambda s: (s.patient_id, s.uid))), dict(sorted(skipped.items())), (*lost,)
    )


def list_series(root: str | os.PathLike, *, mapper: Map = map) -> dict[Path, DicomSeries | ValueError]:
    """List the folders below a folder, or that one, that hold a series of CT or MR to be read as a volume.

    A warning names each file that is left out: a localizer, or a copy.

    Args:
        root: the folder.
        mapper: see `read_headers`.

    Returns:
        By folder, its series, which may have errors of its own (see `DicomSeries.check`), or the error that it holds
        several, as one folder is one volume. Empty if there is none.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming a damaged file, if there are no others.
    """
    found = find_series(root, mapper=mapper)
    for sentence in () if found.series else found.damaged:
        raise ValueError(sentence)
    folders: dict[Path, DicomSeries | ValueError] = {}
    for series in found.series:
        folder = series.folder
        inside = [s for s in found.series if folder in (s.folder, *s.folder.parents)]
        folders[folder] = series
        for note in series.notes if len(inside) == 1 else ():
            logger.warning("%s", note)
        if len(inside) > 1:
            counts = ", ".join(f"{s.uid} with {len(s.files)}" for s in inside[:3])
            folders[folder] = ValueError(
                f"{folder}: holds {len(inside)} series; put each into a folder of its own ({counts} images)"
            )
    return folders


def find_one_series(folder: str | os.PathLike) -> DicomSeries:
    """Find the one series of CT or MR in a folder or below it (see `list_series`).

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: naming the folder, if it holds no series or several, or a damaged file.
    """
    by_folder = list_series(folder)
    if not by_folder:
        raise ValueError(f"{folder}: no DICOM series of CT or MR in it or below it")
    if len(by_folder) > 1:
        raise ValueError(f"{folder}: holds {len(by_folder)} folders with series; give the folder of one")
    (series,) = by_folder.values()
    if isinstance(series, ValueError):
        raise series
    return series


def _build(
    root: Path,
    group: Sequence[Header],
    damaged: dict[str, list[Header]],
    localizers: Sequence[Header],
    in_folder: dict[str, set[str]],
) -> DicomSeries:
    first = group[0]
    folders = list(dict.fromkeys(os.path.dirname(header.path) for header in group))
    folder = root / os.path.commonpath(folders) if all(folders) else root
    where = f"{folder}: series {first.series_uid}"
    notes = [
        f"{root / name}: holds {len(in_folder[name])} series, which are kept apart by their uid"
        for name in folders
        if len(in_folder[name]) > 1
    ]
    beside = [h for h in localizers if h.series_uid == first.series_uid or os.path.dirname(h.path) in folders]
    notes += [f"{root / header.path}: a localizer, left out" for header in beside]
    once: dict[str, Header] = {}
    for header in group:
        if (kept := once.setdefault(header.sop_uid or header.path, header)) is not header:
            notes.append(f"{root / header.path}: the same image as {root / kept.path}, left out")
    unique = list(once.values())
    orientation = np.reshape(first.orientation, (2, 3))
    places = along_normal([header.position for header in unique], orientation)
    order = sorted(range(len(unique)), key=lambda i: (places[i], unique[i].instance))
    in_order, irregularities = check_places([unique[i] for i in order], places[order], root, where)
    positions = np.array([header.position for header in in_order])
    errors = [describe_damage(root, damaged[key]) for key in (first.series_uid, *folders) if key in damaged]
    errors += check_alike(unique, root, where)
    if len(in_order) < 2:
        errors.append(f"{where} has one slice; a volume needs two or more")
    return DicomSeries(
        uid=first.series_uid,
        patient_id=first.patient_id,
        modality=first.modality,
        folder=folder,
        files=tuple(root / header.path for header in in_order),
        positions=positions,
        orientation=orientation,
        pixel_spacing=(first.pixel_spacing[0], first.pixel_spacing[1]),
        rows=first.rows,
        columns=first.columns,
        thickness=first.thickness,
        notes=tuple(notes),
        irregularities=tuple(irregularities),
        errors=tuple(errors or check_straight(positions, orientation, min(first.pixel_spacing), where)),
    )
