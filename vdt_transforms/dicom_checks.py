"""What makes a series of DICOM slices no volume, in sentences that name the folder or the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdt_transforms.dicom_headers import Header

ROUNDING = 0.05  # mm, that a position written to a tenth of a mm may be off: slices of 0.625 mm are often written so


def check_alike(headers: Sequence[Header], root: Path, where: str) -> list[str]:
    """Say where slices differ in what all of a volume have in common, and which is no grey value or has no HU."""
    first = headers[0]
    alike: list[tuple[str, Callable[[Header], Sequence[float]], float]] = [
        ("pixels", lambda header: (header.rows, header.columns), 0),
        ("mm between pixels", lambda header: header.pixel_spacing, 1e-3),
        ("as directions of rows and columns", lambda header: header.orientation, 1e-3),
    ]
    errors = []
    for what, values, tolerance in alike:
        for header in headers:
            if not np.allclose(values(header), values(first), rtol=0, atol=tolerance):
                shown = " and ".join(" x ".join(f"{v:g}" for v in values(h)) for h in (first, header))
                errors.append(f"{where} mixes slices with {shown} {what}; expected the same in all")
                break
    for header in headers:
        if header.modality == "CT" and not header.rescaled:
            path = root / header.path
            return [*errors, f"{path}: has no RescaleSlope or no RescaleIntercept, so its values are not HU"]
        if header.colours != "MONOCHROME2":
            return [*errors, f"{root / header.path}: {header.colours} pixels; expected MONOCHROME2"]
    return errors


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


def describe_damage(root: Path, headers: Sequence[Header]) -> str:
    """Say what is wrong with the first of some damaged files, and how many there are."""
    more = f" (and {len(headers) - 1} more damaged files)" if len(headers) > 1 else ""
    return f"{root / headers[0].path}: {headers[0].damaged}; copy or download it again{more}"


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
