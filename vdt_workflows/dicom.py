"""DICOM series of CT and MR: found by their headers, checked as volumes, read with the right order and geometry."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.dicom_headers import Header, import_pydicom, read_headers

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series, its slices in the order of their place in the body (feet to head where they are axial).

    What was found wrong is said in sentences that name the folder or the file, in three degrees. `notes` were mended.
    A series with `irregularities` can be read, but is no regular grid. One with `errors` cannot be used.

    Attributes:
        uid: SeriesInstanceUID.
        folder: where its files are; the first folder if there are several.
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
        steps = np.diff(_along_normal(self.positions, self.orientation))
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

        Raises:
            ValueError: naming the file, if its pixels cannot be decoded or are not one grey value each.
        """
        file = self.files[index]
        try:
            dataset = import_pydicom().dcmread(file)
            values = dataset.pixel_array
        except Exception as error:  # broken bytes and missing decoders raise whatever they lead to
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{file}: its pixels cannot be decoded ({reason}); copy or download it again") from error
        kind = dataset.get("PhotometricInterpretation", "MONOCHROME2")
        if kind != "MONOCHROME2" or values.shape != (self.rows, self.columns):
            raise ValueError(
                f"{file}: {kind} pixels of shape {values.shape};"
                f" expected MONOCHROME2 of shape {(self.rows, self.columns)}"
            )
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        if not (np.isfinite(slope) and np.isfinite(intercept) and slope):
            raise ValueError(f"{file}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g} give no values")
        values = values * np.float32(slope) + np.float32(intercept)
        return values.round().clip(-32768, 32767).astype(np.int16) if self.modality == "CT" else values

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
    root: str | os.PathLike,
    *,
    modalities: Collection[str] = ("CT",),
    index_file: str | os.PathLike | None = None,
    workers: int | None = None,
) -> DicomFolder:
    """Find the series below a folder by what the headers say; names of files and folders mean nothing.

    MONAI's `PydicomReader` reads a folder as one series in the order of its instance numbers; several series in a
    folder, missing slices and copies go unnoticed. Here each series is apart, sorted by place, and checked.

    Args:
        root: the folder; headers of everything below it are read.
        modalities: which to take, of "CT" and "MR".
        index_file: where headers are kept for the next time.
        workers: processes that read headers, all cores by default.

    Returns:
        The series sorted by patient and uid. Those whose folder holds a damaged file have an error that names it.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImportError: if pydicom is missing.
    """
    root = Path(root)
    headers = read_headers(root, index_file=index_file, workers=workers)
    slices: dict[str, list[Header]] = defaultdict(list)
    damaged: dict[str, list[Header]] = defaultdict(list)  # by series, or by folder where the series is not known
    skipped: Counter[str] = Counter()
    for header in headers:
        if header.damaged:
            damaged[header.series_uid or os.path.dirname(header.path)].append(header)
        elif header.skipped or header.modality not in modalities:
            skipped[header.skipped or header.modality] += 1
        else:
            slices[header.series_uid].append(header)
    in_folder: dict[str, set[str]] = defaultdict(set)
    for uid, group in slices.items():
        for header in group:
            in_folder[os.path.dirname(header.path)].add(uid)
    series = [_build(root, group, damaged, in_folder) for group in slices.values()]
    claimed = slices.keys() | in_folder.keys()
    lost = [_damage(root, group) for key, group in sorted(damaged.items()) if key not in claimed]
    return DicomFolder(
        tuple(sorted(series, key=lambda s: (s.patient_id, s.uid))), dict(sorted(skipped.items())), (*lost,)
    )


def _build(
    root: Path, group: Sequence[Header], damaged: dict[str, list[Header]], in_folder: dict[str, set[str]]
) -> DicomSeries:
    first = group[0]
    folders = list(dict.fromkeys(os.path.dirname(header.path) for header in group))
    where = f"{root / folders[0]}: series {first.series_uid}"
    notes = [
        f"{root / folder}: holds {len(in_folder[folder])} series, which are kept apart by their uid"
        for folder in folders
        if len(in_folder[folder]) > 1
    ]
    unique = list({header.sop_uid or header.path: header for header in reversed(group)}.values())
    if len(unique) < len(group):
        notes.append(f"{where} has {len(group) - len(unique)} files twice; one copy of each is read")
    orientation = np.reshape(first.orientation, (2, 3))
    places = _along_normal([header.position for header in unique], orientation)
    order = sorted(range(len(unique)), key=lambda i: (places[i], unique[i].instance))
    kept, irregularities = _check_places([unique[i] for i in order], places[order], root, where)
    positions = np.array([header.position for header in kept])
    errors = [_damage(root, damaged[key]) for key in (first.series_uid, *folders) if key in damaged]
    errors += _check_alike(unique, root, where)
    if len(kept) < 2:
        errors.append(f"{where} has one slice; a volume needs two or more")
    return DicomSeries(
        uid=first.series_uid,
        patient_id=first.patient_id,
        modality=first.modality,
        folder=root / folders[0],
        files=tuple(root / header.path for header in kept),
        positions=positions,
        orientation=orientation,
        pixel_spacing=(first.pixel_spacing[0], first.pixel_spacing[1]),
        rows=first.rows,
        columns=first.columns,
        thickness=first.thickness,
        notes=tuple(notes),
        irregularities=tuple(irregularities),
        errors=tuple(errors or _check_straight(positions, orientation, min(first.pixel_spacing), where)),
    )


def _check_alike(headers: Sequence[Header], root: Path, where: str) -> list[str]:
    errors = []
    for what, values in {
        "pixels": {(header.rows, header.columns) for header in headers},
        "mm between pixels": {tuple(np.round(header.pixel_spacing, 4).tolist()) for header in headers},
        "as directions of rows and columns": {tuple(np.round(header.orientation, 3).tolist()) for header in headers},
    }.items():
        if len(values) > 1:
            shown = " and ".join(" x ".join(f"{v:g}" for v in value) for value in sorted(values)[:2])
            errors.append(f"{where} mixes slices with {shown} {what}; expected the same in all")
    for header in headers:
        if header.modality == "CT" and not header.rescaled:
            path = root / header.path
            return [*errors, f"{path}: has no RescaleSlope or no RescaleIntercept, so its values are not HU"]
    return errors


def _check_straight(positions: np.ndarray, orientation: np.ndarray, pixel: float, where: str) -> list[str]:
    normal = np.cross(*orientation)
    steps = positions - positions[0]
    shift = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max()
    if shift <= 0.5 * pixel:
        return []
    return [
        f"{where}: its slices shift sideways by up to {shift:.1f} mm, as with a tilted gantry;"
        " expected slices straight above each other"
    ]


def _damage(root: Path, headers: Sequence[Header]) -> str:
    more = f" (and {len(headers) - 1} more damaged files)" if len(headers) > 1 else ""
    return f"{root / headers[0].path}: {headers[0].damaged}; copy or download it again{more}"


def _along_normal(positions: Any, orientation: np.ndarray) -> np.ndarray:
    """Place of each slice along the common normal, which points to the head, or else to the back or the left."""
    normal = np.cross(*orientation)
    return np.asarray(positions) @ normal * np.sign(normal[np.abs(normal).argmax()])


def _check_places(
    headers: Sequence[Header], places: np.ndarray, root: Path, where: str
) -> tuple[list[Header], list[str]]:
    """Leave out slices at the place of another, and say what makes the others irregular."""
    found = []
    distinct = np.unique(np.round(places, 3))
    spacing = float(np.median(np.diff(distinct))) if len(distinct) > 1 else 0.0
    apart = np.diff(places, prepend=-np.inf) > max(0.05 * spacing, 1e-3)
    kept = [header for header, is_apart in zip(headers, apart, strict=True) if is_apart]
    if len(kept) < len(headers):
        number = int(np.argmin(apart))
        found.append(
            f"{where} has slices at the same place, {len(headers) - len(kept)} too many, the first"
            f" {root / headers[number].path} at {places[number]:g} mm; the one of lowest instance number is kept"
        )
    z = places[apart]
    steps = np.diff(z)
    if (gaps := np.flatnonzero(steps > 1.5 * spacing)).size:
        missing = int(np.round(steps[gaps] / spacing - 1).sum())
        found.append(
            f"{where} lacks {missing} slice{'s' * (missing > 1)}, the first between {z[gaps[0]]:g} and"
            f" {z[gaps[0] + 1]:g} mm where slices are {spacing:g} mm apart; copy or download the series again"
        )
    elif len(z) > 2:
        off = np.abs(z - np.linspace(z[0], z[-1], len(z))).max()
        if off > 0.1 * spacing:
            found.append(
                f"{where} has uneven slices, {steps.min():g} to {steps.max():g} mm apart and up to {off:.2g} mm off a"
                " regular grid"
            )
    return kept, found
