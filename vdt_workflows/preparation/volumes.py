"""Prepare labelled volumes case by case: check, keep or mend the files, measure, draw, and remember what is done."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import obliquity
from nibabel.spatialimages import SpatialImage

from vdt_workflows.data.headers import check_same_grid, check_voxel_size, grid_difference, read_header, voxel_size
from vdt_workflows.drawing import cut_planes, find_centre
from vdt_workflows.files import write_atomic
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.case_sheets import draw_case
from vdt_workflows.preparation.placing import label_bytes, place_file, with_affine
from vdt_workflows.preparation.stored_files import StoredFile
from vdt_workflows.preparation.voxels import count_labels, intensity_range, read_labels, read_voxels, scaled, translate

logger = logging.getLogger(__name__)

RECORDS = ".prepared"  # folder of what is known of each finished case
VERSION = 1  # of the records
WINDOW = (-160.0, 240.0)  # HU, of pictures: level 40, width 400


@dataclass(frozen=True)
class SourceCase:
    """A case as it was found.

    Attributes:
        name: for lists, tables and pictures, and of the files that are written.
        image: the volume.
        label: its label map; None if there is none.
    """

    name: str
    image: StoredFile
    label: StoredFile | None


@dataclass(frozen=True)
class CaseRules:
    """How cases are checked and written.

    Attributes:
        values: the value that is written for each stored label value; None keeps all values.
        only_these: refuse a label value that `values` does not name, rather than make it background.
        hounsfield: intensities are HU: refuse what does not fit 16-bit signed integers, and draw a fixed window.
        empty: accept a label without foreground.
        affine: whose affine both files get where they differ: "image", "label", or "strict" to refuse the case.
        copy: copy all files; False makes hard links where the disk allows.
    """

    values: Mapping[int, int] | None = None
    only_these: bool = True
    hounsfield: bool = False
    empty: bool = True
    affine: str = "strict"
    copy: bool = False


# All cases -----------------------------------------------------------------------------------------------------------


def prepare_cases(
    cases: Sequence[SourceCase], folder: Path, rules: CaseRules, *, on_error: str = "raise", workers: int = 1
) -> list[dict[str, Any]]:
    """Prepare the cases that are not finished yet, in several processes, with a progress bar.

    Args:
        cases: what was found.
        folder: gets `images`, `labels` and the records.
        rules: how.
        on_error: "raise" stops at the first bad case; "skip" gives a record with its `fault` and goes on.
        workers: number of processes.

    Returns:
        A record for each case, in their order: `case`, and either `fault` or what was found and written.

    Raises:
        ValueError: naming the file and what is wrong with it.
        OSError: if a process was killed, as happens when memory runs out.
    """
    for kind in ("images", "labels", RECORDS):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for unfinished in (folder / kind).glob(".*"):  # of a killed run
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    tasks = [(number, case, folder, rules, on_error) for number, case in enumerate(cases)]
    records: dict[int, dict[str, Any]] = {}
    for number, record in run_parallel(_prepare_or_tell, tasks, workers=workers, label="cases"):
        records[number] = record
        if "fault" in record:
            logger.warning("%s; the case is left out", record["fault"])
    return [records[number] for number in range(len(tasks))]


def _prepare_or_tell(task: tuple[int, SourceCase, Path, CaseRules, str]) -> tuple[int, dict[str, Any]]:
    number, case, folder, rules, on_error = task
    try:
        return number, prepare_case(case, folder, rules)
    except (ValueError, FileNotFoundError, PermissionError) as error:  # but not what is wrong with the disk
        if on_error == "raise":
            raise
        return number, {"case": case.name, "fault": str(error)}


# One case ------------------------------------------------------------------------------------------------------------


def prepare_case(case: SourceCase, folder: Path, rules: CaseRules) -> dict[str, Any]:
    """Check one case and put it into `folder`, or find that this was done before.

    A finished case has a record of its sources (size and time of change, or CRC) and of the rules. If either differs,
    or a file is not as large as it was written, the case is prepared again.

    Returns:
        The record: what was found in the headers and voxels, what was written, and notes for people.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if case.label is None:
        raise ValueError(f"{case.image}: has no label, which training and validation need")
    sources = {str(file): file.stamp() for file in (case.image, case.label)}
    made_from = json.loads(json.dumps({"version": VERSION, "sources": sources, "rules": asdict(rules)}))
    record_file = folder / RECORDS / f"{case.name}.json"
    if (record := _finished(record_file, folder, made_from)) is not None:
        return record
    for name in (case.name + suffix for suffix in (".nii", ".nii.gz")):
        (folder / "images" / name).unlink(missing_ok=True)
        (folder / "labels" / name).unlink(missing_ok=True)
    record_file.unlink(missing_ok=True)
    stage = folder / RECORDS / f".{case.name}"
    for kind in ("image", "label"):
        (stage / kind).mkdir(parents=True)
    try:
        record = _prepare(case, case.label, folder, rules, stage)
    except ValueError as error:
        sentence = str(error)
        for kind, file in (("image", case.image), ("label", case.label)):
            sentence = sentence.replace(str(stage / kind / file.name), str(file))
        raise ValueError(sentence) from error
    finally:
        shutil.rmtree(stage)
    record["sizes"] = {name: (folder / name).stat().st_size for name in _files(record)}
    write_atomic(record_file, json.dumps({**record, "made_from": made_from}, indent=1).encode())
    return record


def picture_of(record: Mapping[str, Any]) -> str:
    """Where the picture of a prepared case is, below its folder."""
    return f"{RECORDS}/{record['case']}.png"


def _files(record: Mapping[str, Any]) -> list[str]:
    return [record["image"], record["label"], picture_of(record)]


def _finished(record_file: Path, folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(record_file.read_text())
        sizes = {name: (folder / name).stat().st_size for name in _files(record)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record.pop("made_from", None) == made_from and sizes == record["sizes"] else None


def _prepare(case: SourceCase, label_source: StoredFile, folder: Path, rules: CaseRules, stage: Path) -> dict[str, Any]:
    files = {"image": case.image.open_in(stage / "image"), "label": label_source.open_in(stage / "label")}
    image, label = (read_header(file) for file in files.values())
    difference = _difference(image, label, rules.affine)
    affine = label.affine if difference and rules.affine == "label" else image.affine

    voxels = read_voxels(image)
    low, high = intensity_range(image, voxels, hounsfield=rules.hounsfield)
    stored = read_labels(label)
    labels, counts, renumbered = translate(
        label, stored, count_labels(stored), rules.values, only_these=rules.only_these
    )
    if not (counts[1:].any() or rules.empty):
        raise ValueError(f"{files['label']}: no voxel is labelled; expected some foreground")

    centre = find_centre(labels)
    planes = [plane._replace(values=scaled(image, plane.values)) for plane in cut_planes(voxels, affine, centre)]
    labelled = cut_planes(labels, affine, centre)
    size = voxel_size(image if affine is image.affine else label)
    dtype = label.get_data_dtype()
    anew = renumbered or dtype.kind == "f"
    millilitres = np.prod(size) / 1000
    notes = {
        "label values renumbered": renumbered,
        f"label was {dtype}": dtype.kind == "f",
        f"affine of the {rules.affine} taken, the other differed {difference}": difference,
        "no voxel labelled": not counts[1:].any(),
        **_axes_notes(affine),
    }
    record: dict[str, Any] = {
        "case": case.name,
        "image": f"images/{case.name}{_suffix(case.image)}",
        "label": f"labels/{case.name}{'.nii.gz' if anew else _suffix(label_source)}",
        "shape": list(image.shape[:3]),
        "spacing": [round(s, 5) for s in size],
        "orientation": "".join(nib.aff2axcodes(affine)),
        "dtype": str(image.get_data_dtype()),
        "range": [low, high],
        "ml": {str(v): round(float(n * millilitres), 3) for v, n in enumerate(counts.tolist()) if v and n},
        "notes": [note for note, holds in notes.items() if holds],
    }
    if anew:
        write_atomic(folder / record["label"], label_bytes(labels, affine))
        del files["label"]
    for key, file in files.items():
        target = folder / record[key]
        if difference and key != rules.affine:
            write_atomic(target, with_affine(file, affine))
        else:
            place_file(file, target, copy=rules.copy, moves=stage in file.parents)
    details = "{} x {} x {}, {:.3g} x {:.3g} x {:.3g} mm, {}".format(*image.shape[:3], *size, record["orientation"])
    window = WINDOW if rules.hounsfield else None
    write_atomic(folder / picture_of(record), draw_case(case.name, details, planes, labelled, window))
    return record


def _suffix(file: StoredFile) -> str:
    return ".nii.gz" if file.name.endswith(".gz") else ".nii"


def _difference(image: SpatialImage, label: SpatialImage, rule: str) -> str | None:
    """Say how the two affines differ, if they do and a rule mends it; raise if none does."""
    check_voxel_size(label if rule == "label" else image)
    if rule != "strict" and image.shape[:3] == label.shape[:3]:
        return grid_difference(image, label)
    try:
        check_voxel_size(label)
        check_same_grid(image, label)
    except ValueError as error:
        hint = "; if the header alone is wrong, --affine image takes the image's"
        raise ValueError(f"{error}{hint if image.shape[:3] == label.shape[:3] else ''}") from error
    return None


def _axes_notes(affine: np.ndarray) -> dict[str, bool]:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear = np.degrees(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(0, 1)))
    tilt = float(np.degrees(obliquity(affine)).max())
    return {f"axes sheared by {shear:.1f} degrees": bool(shear > 0.5), f"oblique by {tilt:.0f} degrees": tilt > 1}
