"""Prepare labelled volumes case by case: check, keep or mend the files, measure, draw, record, and sum up."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import obliquity
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage

from vdt_transforms.geometry import farthest, open_volume, read_voxels, to_nifti, voxel_size
from vdt_workflows.data.headers import check_same_grid, grid_difference, refuse_folder
from vdt_workflows.drawing import cut_planes, find_centre
from vdt_workflows.files import UNFINISHED, read_record, remove_unfinished, to_csv, write_atomic, write_record
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.case_sheets import draw_case
from vdt_workflows.preparation.fingerprint import measure_case
from vdt_workflows.preparation.public_sets import StoredFile
from vdt_workflows.preparation.volume_checks import read_intensities, read_labels, scaled

logger = logging.getLogger(__name__)

RECORDS = ".prepared"  # folder of the records and pictures of finished cases
STAGE = f"{RECORDS}/stage"  # folder of what is unpacked
VERSION = 3  # of the records
WINDOW = (-160.0, 240.0)  # HU, of pictures: level 40, width 400
Record = Mapping[str, Any]


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
        geometry: what says where voxels lie, see `open_volume`; files that need a choice get it in both forms.
        copy: copy all files; False makes hard links where the disk allows.
    """

    values: Mapping[int, int] | None = None
    only_these: bool = True
    hounsfield: bool = False
    empty: bool = True
    affine: str = "strict"
    geometry: str = "refuse"
    copy: bool = False


# All cases -----------------------------------------------------------------------------------------------------------


def prepare_cases(
    cases: Sequence[SourceCase], folder: Path, rules: CaseRules, *, on_error: str = "raise", workers: int = 1
) -> list[Record]:
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
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    remove_unfinished(folder / RECORDS, folder / "images", folder / "labels")
    for kind in ("images", "labels", STAGE):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    records: dict[str, Record] = {}
    work = partial(_try_case, folder, rules, on_error)
    for record in run_parallel(work, cases, workers=workers, label="cases"):
        records[record["case"]] = record
        if "fault" in record:
            logger.warning("%s; the case is left out", record["fault"])
    shutil.rmtree(folder / STAGE)
    return [records[case.name] for case in cases]


def _try_case(folder: Path, rules: CaseRules, on_error: str, case: SourceCase) -> Record:
    try:
        return prepare_case(case, folder, rules)
    except (ValueError, FileNotFoundError, PermissionError) as error:  # but not what is wrong with the disk
        if on_error == "raise":
            raise
        return {"case": case.name, "fault": str(error)}


# One case ------------------------------------------------------------------------------------------------------------


def prepare_case(case: SourceCase, folder: Path, rules: CaseRules) -> Record:
    """Check one case and put it into `folder`, or find that this was done before.

    A finished case has a record of its sources (size and hash) and of the rules. If either differs,
    or a file is not as it was written, the case is prepared again.

    Returns:
        The record: what was found in the headers and voxels, what was written, and notes for people.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if case.label is None:
        raise ValueError(f"{case.image}: has no label, which training and validation need")
    sources = {"image": case.image, "label": case.label}
    for kept in sources.values():
        refuse_folder(kept.path)
    stamps = {str(file): file.stamp() for file in sources.values()}
    made_from = {"version": VERSION, "sources": stamps, "rules": asdict(rules)}
    record_file = folder / RECORDS / f"{case.name}.json"
    if (finished := read_record(record_file, folder, made_from)) is not None:
        return finished
    for old in (folder / kind / f"{case.name}.nii{end}" for kind in ("images", "labels") for end in ("", ".gz")):
        old.unlink(missing_ok=True)
    record_file.unlink(missing_ok=True)
    with TemporaryDirectory(dir=folder / STAGE) as stage:
        files: dict[str, Path] = {}
        try:
            for kind, source in sources.items():
                files[kind] = source.open_in(Path(stage, kind))
            record = _prepare(case.name, sources, files, folder, rules)
        except ValueError as error:
            sentence = str(error)
            for kind, file in files.items():  # what was unpacked is named by the archive's member
                sentence = sentence.replace(str(file), str(sources[kind]))
            raise ValueError(sentence) from error
    write_record(record_file, folder, [record["image"], record["label"], picture_of(record)], made_from, record)
    return record


def picture_of(record: Record) -> str:
    """Where the picture of a prepared case is, below its folder."""
    return f"{RECORDS}/{record['case']}.png"


def _prepare(
    name: str, sources: Mapping[str, StoredFile], files: Mapping[str, Path], folder: Path, rules: CaseRules
) -> Record:
    image, label = (
        open_volume(file, rules.geometry, placed=rules.affine in ("strict", kind)) for kind, file in files.items()
    )
    difference = _difference(image, label, rules.affine)
    affine = label.affine if difference and rules.affine == "label" else image.affine

    voxels, low, high = read_intensities(image, hounsfield=rules.hounsfield)
    labels, counts, renumbered = read_labels(label, rules.values, only_these=rules.only_these)
    is_scaled = (label.dataobj.slope, label.dataobj.inter) != (1, 0)
    if not (counts[1:].any() or rules.empty):
        raise ValueError(f"{files['label']}: no voxel is labelled; expected some foreground")

    centre = find_centre(labels)
    planes = [plane._replace(values=scaled(image, plane.values)) for plane in cut_planes(voxels, affine, centre)]
    labelled = cut_planes(labels, affine, centre)
    size = voxel_size(image if affine is image.affine else label)
    dtype = label.get_data_dtype()
    measured = measure_case(voxels, labels, affine, size)
    measured["quantiles"] = sorted(scaled(image, np.array(measured["quantiles"])).tolist())
    anew = renumbered or is_scaled or dtype.kind == "f"
    millilitres = np.prod(size) / 1000
    notes = {
        "label values renumbered": renumbered,
        f"label was {dtype}": dtype.kind == "f",
        "label was scaled": is_scaled,
        f"{rules.geometry} taken": rules.geometry != "refuse" and not (_is_plain(image) and _is_plain(label)),
        f"affine of the {rules.affine} taken, the other differed {difference}": difference,
        "no voxel labelled": not counts[1:].any(),
        "no intensity below 0, unlike HU": rules.hounsfield and low >= 0,
        **_axes_notes(affine),
    }
    record: dict[str, Any] = {
        "case": name,
        "image": f"images/{name}{_suffix(sources['image'])}",
        "label": f"labels/{name}{'.nii.gz' if anew else _suffix(sources['label'])}",
        "shape": list(image.shape[:3]),
        "spacing": [round(s, 5) for s in size],
        "orientation": "".join(nib.aff2axcodes(affine)),
        "dtype": str(image.get_data_dtype()),
        "range": [low, high],
        "ml": {str(v): round(float(n * millilitres), 3) for v, n in enumerate(counts.tolist()) if v and n},
        "notes": [note for note, holds in notes.items() if holds],
        "measured": measured,
    }
    for (kind, file), opened in zip(files.items(), (image, label), strict=True):
        target = folder / record[kind]
        if anew and kind == "label":
            write_atomic(target, to_nifti(labels, affine))
        elif not file.name.lower().endswith((".nii", ".nii.gz")):
            write_atomic(target, to_nifti(read_voxels(opened), affine))
        elif (difference and kind != rules.affine) or not _is_plain(opened):
            write_atomic(target, _with_affine(file, affine))
        else:
            _place(file, target, copy=rules.copy, moves=bool(sources[kind].member))
    details = "{} x {} x {}, {:.3g} x {:.3g} x {:.3g} mm, {}".format(*image.shape[:3], *size, record["orientation"])
    window = WINDOW if rules.hounsfield else None
    write_atomic(folder / picture_of(record), draw_case(name, details, planes, labelled, window))
    return record


def _suffix(file: StoredFile) -> str:
    return ".nii" if file.name.lower().endswith(".nii") else ".nii.gz"


def _difference(image: SpatialImage, label: SpatialImage, rule: str) -> str | None:
    """Say how the two affines differ, if they do and a rule mends it; raise if none does."""
    if rule != "strict" and image.shape[:3] == label.shape[:3]:
        return grid_difference(image, label)
    try:
        check_same_grid(image, label)
    except ValueError as error:
        hint = "; if the header alone is wrong, --affine image takes the image's"
        raise ValueError(f"{error}{hint if image.shape[:3] == label.shape[:3] else ''}") from error
    return None


def _axes_notes(affine: np.ndarray) -> dict[str, bool]:
    tilt = float(np.degrees(obliquity(affine)).max())
    return {f"oblique by {tilt:.0f} degrees": tilt > 1}


# Files ---------------------------------------------------------------------------------------------------------------


def _is_plain(image: SpatialImage) -> bool:
    """Whether a file is read with this affine also where none of its forms is chosen."""
    try:
        plain = open_volume(image.get_filename())
    except ValueError:
        return False
    return farthest(plain.affine, image.affine, image.shape[:3]) <= 0.1 * min(voxel_size(image))


def _with_affine(file: Path, affine: np.ndarray) -> bytes:
    """Give the content of a NIfTI file another affine; its voxels and all else stay."""
    kind = type(nib.load(file).header)
    with ImageOpener(file) as opened:
        content = bytearray(opened.read())
    header = kind(bytes(content[: kind.sizeof_hdr]), check=False)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    content[: kind.sizeof_hdr] = header.binaryblock
    return gzip.compress(content, 6, mtime=0) if file.name.lower().endswith(".gz") else bytes(content)


def _place(file: Path, target: Path, *, copy: bool, moves: bool) -> None:
    """Bring a whole file to its final name: move it, make a hard link where the disk allows, or copy it."""
    source = os.path.realpath(file)
    temporary = target.with_name(f".{os.getpid()}{UNFINISHED}")  # its own name with a dot may be too long
    linked = False
    if not (copy or moves):
        with suppress(OSError):  # another file system, or one without hard links
            os.link(source, temporary)
            linked = True
    if not linked:
        (os.replace if moves else shutil.copyfile)(source, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
    os.replace(temporary, target)


# Tables --------------------------------------------------------------------------------------------------------------


def write_table(records: Sequence[Record], names: Sequence[str]) -> bytes:
    """Make a CSV file with a row for each case.

    Args:
        records: from `prepare_cases`.
        names: label names by value, the background first.
    """
    volumes = {str(value): f"{name} (ml)" for value, name in enumerate(names) if value}
    rows = []
    for record in records:
        row = {**record, "notes": "; ".join(record.get("notes", ()))}
        if "fault" not in record:
            row |= {key: " ".join(map(str, record[key])) for key in ("shape", "spacing")}
            row |= {end: f"{value:g}" for end, value in zip(("least", "greatest"), record["range"], strict=True)}
            row |= {column: record["ml"].get(value, 0) for value, column in volumes.items()}
        rows.append(row)
    geometry = ("case", "shape", "spacing", "orientation", "dtype")
    return to_csv(rows, [*geometry, "least", "greatest", *volumes.values(), "notes", "fault"])


def describe(records: Sequence[Record], lists: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """Sum up all cases in a few lines: geometry, intensities, and the volume of each label."""
    good = [record for record in records if "fault" not in record]
    sizes = [_span([record["shape"][axis] for record in good], "{:d}") for axis in range(3)]
    spacings = [_span([record["spacing"][axis] for record in good], "{:.3g}") for axis in range(3)]
    ends = [[record["range"][i] for record in good] for i in range(2)]
    orientations = Counter(record["orientation"] for record in good).most_common()
    notes = Counter(note.split(", the other")[0] for record in good for note in record["notes"])
    lines = [
        f"cases        {len(good)} prepared, {len(records) - len(good)} left out",
        f"lists        {', '.join(f'{len(cases)} {name}' for name, cases in lists.items())}",
        f"shape        {' x '.join(sizes)}",
        f"spacing      {' x '.join(spacings)} mm",
        f"orientation  {', '.join(f'{count} {codes}' for codes, count in orientations)}",
        f"intensities  {_span(ends[0], '{:g}')} at the least, {_span(ends[1], '{:g}')} at the greatest",
        *(f"note         {count} {'case' if count == 1 else 'cases'}: {note}" for note, count in notes.items()),
        "",
        f"{'label':<28}{'cases':>6}{'median':>10}{'least':>10}{'greatest':>10}  ml",
    ]
    for value, name in enumerate(names[1:], 1):
        volumes = [record["ml"][str(value)] for record in good if str(value) in record["ml"]]
        ends_ml = "".join(f"{v:>10.3g}" for v in (np.median(volumes), min(volumes), max(volumes))) if volumes else ""
        lines.append(f"{value:>3} {name:<24}{len(volumes):>6}{ends_ml}")
    return "\n".join(lines) + "\n"


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
