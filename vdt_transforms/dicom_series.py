"""A DICOM series of CT or MR as a volume: its slices, its geometry, and what makes it no volume."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.uid
from pydicom.config import disable_value_validation

from vdt_transforms.dicom_headers import Header, open_dicom, syntax_of

logger = logging.getLogger(__name__)

AIR = -1024  # HU
LOWEST = -3072  # HU, that scanners write outside their field of view; a slice of less has nothing else in it
FRAMEWISE = hasattr(pydicom, "pixels")  # since pydicom 3; MONAI Label needs an older one
INT16 = np.iinfo(np.int16)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ROUNDING = 0.05  # mm, that a position written to a tenth of a mm may be off: slices of 0.625 mm are often written so


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series, its slices in the order of their place in the body (feet to head where they are axial).

    What was found wrong is said in sentences that name the folder or the file, in three degrees. `notes` were mended.
    A series with `irregularities` can be read, but is no regular grid. One with `errors` cannot be used.

    Attributes:
        uid: SeriesInstanceUID.
        number: SeriesNumber, with the number of the point of time or echo where it has several (`3-1`, `3-2`).
        path: what the readers here take for it: its folder, or `<folder>/series-<number>` where that holds others too.
        folder: the one that holds its files, in itself or in folders below.
        files: one a slice; the same for all where one file has many.
        frames: which slice of its file each is, or None where a file has one.
        rescale: slope and intercept of each slice, (slices, 2).
        positions: centre of the first pixel of each slice, (slices, 3), mm, in DICOM's world (LPS).
        orientation: directions along a row and along a column, (2, 3).
        pixel_spacing: mm between rows, and between columns.
        rows: pixels of a column.
        columns: pixels of a row.
        thickness: of a slice, mm, as the header has it; slices may overlap or be apart.
    """

    uid: str
    number: str
    description: str
    patient_id: str
    modality: str
    path: Path
    folder: Path
    files: tuple[Path, ...]
    frames: tuple[int | None, ...]
    rescale: np.ndarray
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

        In CT, padding (PixelPaddingValue) and all else below -1024 HU, where nothing was measured, is air: -1024 HU.

        Raises:
            ValueError: naming the file, if its pixels cannot be decoded, are not one grey value each, or are no HU.
        """
        file, frame, dataset = self.files[index], self.frames[index], pydicom.Dataset()
        try:
            with open_dicom(file) as opened, disable_value_validation():
                dataset = pydicom.dcmread(opened, stop_before_pixels=frame is not None and FRAMEWISE, force=True)
                dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax_of(dataset))
                if frame is None or not FRAMEWISE:
                    stored = dataset.pixel_array if frame is None else dataset.pixel_array[frame]
                else:
                    stored = pydicom.pixels.pixel_array(opened, index=frame)
        except Exception as error:  # broken bytes and missing decoders raise whatever they lead to
            reason = " ".join(str(error).split())
            hint = "install one of these decoders" if "missing dependencies" in reason else "copy or download it again"
            raise ValueError(f"{file}: its pixels cannot be decoded ({reason}); {hint}") from error
        if stored.shape != (self.rows, self.columns):
            raise ValueError(f"{file}: pixels of shape {stored.shape}; expected {(self.rows, self.columns)}")
        slope, intercept = self.rescale[index].astype(np.float32)
        values = stored * slope + intercept
        if self.modality != "CT":
            return values
        if (padding := dataset.get("PixelPaddingValue")) is not None:
            # Read as signed or unsigned, whichever the writer meant.
            ends = np.sort(np.array([padding, dataset.get("PixelPaddingRangeLimit", padding)]).astype(stored.dtype))
            values[(stored >= ends[0]) & (stored <= ends[1])] = AIR
        if not LOWEST <= values.max() <= INT16.max:
            raise ValueError(
                f"{file}: values up to {values.max():g}, which no CT has in HU; this is an integer overflow, or a wrong"
                " RescaleSlope or RescaleIntercept, so export the series again"
            )
        return values.round().clip(AIR).astype(np.int16)

    def read(self, *, irregular: bool = False) -> np.ndarray:
        """Read the volume, (columns, rows, slices), to go with `affine`.

        Args:
            irregular: read also what is no regular grid; `affine` is then wrong between the first and last slice.

        Raises:
            ValueError: see `check` and `read_slice`.
        """
        self.check(irregular=irregular)
        for sentence in self.irregularities:
            logger.warning("%s; read as if its slices were even", sentence)
        return np.stack([self.read_slice(i).T for i in range(len(self.files))], axis=2)


# What makes slices no volume, in sentences that name the folder or the file ------------------------------------------


def check_alike(headers: Sequence[Header], root: Path, where: str) -> list[str]:
    """Say where slices differ in what all of a volume have in common, and which is no grey value or has no HU."""
    first = headers[0]
    alike: list[tuple[str, Callable[[Header], Sequence[float]], float]] = [
        ("pixels", lambda header: (header.rows, header.columns), 0),
        ("mm between pixels", lambda header: header.pixel_spacing, 1e-3),
        ("as directions of rows and columns", lambda header: header.orientation, 1e-3),
    ]
    errors = []
    if len({header.patient_id for header in headers}) > 1:
        errors.append(f"{where} mixes slices of several patients; put each patient's into a folder of their own")
    for what, values, tolerance in alike:
        for header in headers:
            if not np.allclose(values(header), values(first), rtol=0, atol=tolerance):
                shown = " and ".join(" x ".join(f"{v:g}" for v in values(h)) for h in (first, header))
                errors.append(f"{where} mixes slices with {shown} {what}; expected the same in all")
                break
    for header in headers:
        path, (slope, intercept) = root / header.path, header.rescale or (1.0, 0.0)
        if header.modality == "CT" and header.rescale is None:
            lacks = "has no RescaleSlope or no RescaleIntercept, so its values are not HU; export it anew with both"
            return [*errors, f"{path}: {lacks}"]
        if not (np.isfinite([slope, intercept]).all() and slope):
            return [*errors, f"{path}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g} give no values"]
        if header.colours != "MONOCHROME2":
            inverted = header.colours == "MONOCHROME1"
            colours = "MONOCHROME1 pixels, the darker the greater" if inverted else "coloured pixels"
            return [*errors, f"{path}: {colours}; expected MONOCHROME2, so export the series as that"]
    return errors


def split_phases(headers: Sequence[Header]) -> list[list[Header]]:
    """Divide images of one series that lie at the same places, as of several points of time or echoes, to volumes.

    They stay together where no element of the header (see `PHASES`) divides them into volumes of the same places.
    """
    orientation = np.reshape(headers[0].orientation, (2, 3))
    places = np.round(along_normal([header.position for header in headers], orientation), 3)
    for values in zip(*(header.phases for header in headers), strict=True) if len({*places}) < len(places) else ():
        found = {value: [i for i, v in enumerate(values) if v == value] for value in sorted({*values}, key=_by_number)}
        sets = {tuple(sorted(places[group])) for group in found.values()}
        if len(sets) == 1 and len(found) > 1 and len({*next(iter(sets))}) == len(next(iter(sets))):
            return [[headers[i] for i in group] for group in found.values()]
    return [list(headers)]


def _by_number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def check_straight(positions: np.ndarray, orientation: np.ndarray, pixel: float, where: str) -> list[str]:
    """Say by how many degrees the line of the slices leaves their normal, if the last is shifted by half a pixel."""
    normal = np.cross(*orientation)
    steps = positions - positions[0]
    along = steps @ normal
    aside = np.linalg.norm(steps - np.outer(along, normal), axis=1)
    if aside.max() <= 0.5 * pixel:
        return []
    angle = np.degrees(np.arctan2(aside[-1], abs(along[-1])))
    return [
        f"{where}: its slices shift sideways by up to {aside.max():.1f} mm, as with a gantry tilted by {angle:.1f}"
        " degrees; expected slices straight above each other, so convert it with dcm2niix, which corrects the tilt, and"
        " give the NIfTI file whose name ends in _Tilt"
    ]


def along_normal(positions: Any, orientation: np.ndarray) -> np.ndarray:
    """Place of each slice along the common normal, which points to the head, or else to the back or the left."""
    normal = np.cross(*orientation)
    return np.asarray(positions) @ normal * np.sign(normal[np.abs(normal).argmax()])


def check_places(
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
        if off > max(spacing / 20, ROUNDING):
            found.append(
                f"{where} has uneven slices, {steps.min():g} to {steps.max():g} mm apart and up to {off:.2g} mm off a"
                f" regular grid; expected no more than a twentieth of {spacing:g} mm"
            )
    return kept, found
