"""Lists of image and label volumes: data sets in their usual layouts, and volumes to segment or search."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vdt_transforms.dicom_folders import list_series
from vdt_transforms.geometry import SUFFIX
from vdt_transforms.readers import list_slices
from vdt_transforms.slice_stacks import read_slice
from vdt_workflows.data.headers import check_geometry
from vdt_workflows.data.volume_files import (
    LeftOut,
    choose_images,
    conclude,
    draw,
    list_files,
    pair,
    pair_in_folders,
    part_labels,
    patient_of,
)
from vdt_workflows.errors import check_choice
from vdt_workflows.files import kind_of_system, read_json
from vdt_workflows.naming import name_results
from vdt_workflows.parallel import run_parallel

logger = logging.getLogger(__name__)

Case = dict[str, str]
FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"), ("img", "label"))
IS_VOLUME = re.compile(rf"{SUFFIX.pattern}|\.z?raw$", re.IGNORECASE)  # or its voxels
TEST_FOLDERS = (("imagesTs", "labelsTs"),)


def find_volumes(
    dataset_dir: str | os.PathLike,
    *,
    datalist: str | os.PathLike | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    on_error: str = "raise",
    geometry: str = "refuse",
    label_names: Sequence[str] = (),
) -> dict[str, list[Case]]:
    """List the cases of a data set: `training` and `validation` with labels, `test` with labels where there are some.

    Understands a datalist JSON in the style of the Medical Segmentation Decathlon (`training`, optional `validation`
    and `test`, paths relative to the file), `dataset.json` in `dataset_dir`, and folders of pairs of volume files
    (NIfTI, NRRD, MetaImage): `imagesTr` and `labelsTr`, `images` and `labels`, all files in one folder, or a folder
    for each case. Image and label belong together if their names are equal up to a leading role (`img0001`,
    `label0001`; `volume-3`, `segmentation-3`) and nnU-Net's `_0000`, or if they are alone in a case's folder.

    A training case that is listed for validation or test too is refused, unless the datalist gives the reason under
    `shared_cases`, and so is a patient of two lists. Patients are told by `patient_id` of the datalist's cases, by
    names or folders that begin with `sub-01` or `patient001`, or by the cases' folders; else each image counts as one.
    All files' headers are read (see `check_geometry`), their voxels are not. What is left out is named and counted in
    the log.

    Args:
        dataset_dir: the folder.
        datalist: a datalist JSON to use instead of what the folder says.
        val_fraction: share of the training cases that becomes `validation` where none is named. With 0 all are trained
            on, and the labelled test cases, or else the training cases, are scored in their place: nothing may be
            selected by them.
        seed: seed of that split.
        on_error: "raise" stops at the first case that cannot be used; "skip" logs its sentence, leaves it out and goes
            on. The split is made before, so that no other case moves between training and validation.
        geometry: what says where the voxels of a NIfTI file lie, see `vdt_transforms.VolumeReader`.
        label_names: by label value, as they are wanted; where the datalist has another value for one, it is refused.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if there are no pairs, a case has no label, is listed twice, or cannot be used (see
            `check_geometry`), if all cases of a list are left out, or if a label's name has two values.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    cases, source, left_out = list_cases(dataset_dir, datalist)
    _check_names(source, label_names)
    if not cases["validation"]:
        if val_fraction:
            cases["training"], cases["validation"] = draw(cases["training"], val_fraction, seed)
        else:
            scored = "test" if any("label" in case for case in cases["test"]) else "training"
            cases["validation"] = [case for case in cases[scored] if "label" in case]
            logger.warning("%s: no case is kept for validation; %s cases take their place", source, scored)
    faults = _find_faults([(c, name != "test") for name, group in cases.items() for c in group], on_error, geometry)
    usable = {
        name: [{k: v for k, v in c.items() if k != "patient_id"} for c in group if c["image"] not in faults]
        for name, group in cases.items()
    }
    for name in [name for name, group in cases.items() if group and not usable[name]]:
        raise ValueError(f"{source}: none of the {len(cases[name])} {name} cases can be used, see above")
    counts = ", ".join(f"{len(v)} {k}" for k, v in usable.items())
    conclude(source, sum(map(len, usable.values())), {**left_out, "unusable, see above": sorted(faults)}, counts)
    return usable


def _check_names(source: Path, wanted: Sequence[str]) -> None:
    """Refuse labels that the Decathlon's or nnU-Net's record of them gives another value than is wanted."""
    listed = read_json(source) if wanted and source.is_file() else {}
    known = listed.get("labels") if isinstance(listed, Mapping) else {}
    for one, other in known.items() if isinstance(known, Mapping) else ():
        name, value = (other, one) if isinstance(other, str) else (one, other)
        values = [number for number, known_name in enumerate(wanted) if str(known_name).lower() == name.lower()]
        if values and not isinstance(value, list) and str(value) not in map(str, values):  # lists are regions
            raise ValueError(
                f"{source}: {name!r} has the label value {value}, and {values[0]} in label_names {list(wanted)};"
                " prepare the data with the names of the training"
            )


def list_cases(
    dataset_dir: str | os.PathLike, datalist: str | os.PathLike | None = None
) -> tuple[dict[str, list[Case]], Path, LeftOut]:
    """List what a folder or a datalist names (see `find_volumes`), without opening any volume.

    Returns:
        `training`, `validation` and `test` (the last two may be empty, and cases without a label), the file or folder
        that says so, and what the folders hold beside them.
    """
    root, left_out = Path(dataset_dir), defaultdict[str, list[str]](list)
    if datalist is None and (root / "dataset.json").is_file() and not _is_nnunet(root):
        datalist = root / "dataset.json"
    if datalist is not None:
        cases = _read_datalist(Path(datalist))
    else:
        if not root.is_dir():
            raise FileNotFoundError(f"dataset_dir {root}: no such folder")
        training = _find_pairs(root, FOLDERS, left_out, flat=True) or pair_in_folders(root, left_out)
        cases = {"training": training, "validation": [], "test": _find_pairs(root, TEST_FOLDERS, left_out)}
        _check_shared(root, cases, None)
    if not cases["training"]:
        raise ValueError(
            f"{datalist or root}: no training cases; expected pairs of volume files in images/ and labels/,"
            " imagesTr/ and labelsTr/, or a folder for each case, or a dataset.json that lists them under 'training'"
        )
    return cases, Path(datalist or root), left_out


def list_volumes(
    source: str | os.PathLike,
    *,
    on_error: str = "raise",
    irregular: str = "refuse",
    series: str = "all",
    geometry: str = "refuse",
) -> list[Case]:
    """List the volumes to segment: a file (NIfTI, NRRD, MetaImage), and all files and DICOM series of a folder.

    Of a folder the volume files in it are taken; or where there are none those of its `imagesTs`, `imagesTr` or
    `images`, or else those anywhere below it but for labels. Everything below it is searched for CT and MR series; a
    zip or a file of a series stands for that. What is left out is named and counted in the log, and results are named
    apart (see `vdt_workflows.naming`).

    Args:
        source: the file or folder.
        on_error: "raise" stops at the first volume that cannot be used, as its headers show (see `check_geometry`
            and `DicomSeries`); "skip" logs its sentence, leaves it out and goes on.
        irregular: what to do with DICOM series that are no regular grid, "refuse" or "accept"; give the reader the same
            (see `vdt_transforms.SeriesReader`).
        series: which DICOM series to take, by number, UID or description, or "all" (see
            `vdt_transforms.dicom_folders.list_series`) of them and all volume files.
        geometry: what says where the voxels of a NIfTI file lie; give the reader the same.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if there is no volume, or none that can be used.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a volume or a folder of volumes")
    left_out: LeftOut = defaultdict(list)
    files = choose_images(path, left_out) if path.is_dir() else [path] if SUFFIX.search(path.name) else []
    if series != "all" and path.is_dir():
        left_out["volumes of no DICOM series"] += map(str, files)
        files = []
    cases = [{"image": str(file)} for file in files]
    faults = _find_faults([(case, False) for case in cases], on_error, geometry) if cases else set()
    if path.is_dir() or not cases:
        found, faulty = _find_dicom(path, on_error, irregular, series, left_out)
        cases, faults = cases + found, faults | faulty
    if not cases:
        raise ValueError(f"{path}: no volume file (.nii, .nii.gz, .nrrd, .mha, .mhd) nor DICOM series in or below it")
    usable = [case for case in cases if case["image"] not in faults]
    if not usable:
        raise ValueError(f"{path}: none of its {len(cases)} volumes can be used, see above")
    conclude(path, len(usable), {**left_out, "unusable, see above": sorted(faults)})
    name_results(case["image"] for case in usable)
    return usable


def list_scans(source: str | os.PathLike, **options: Any) -> list[Case]:
    """List the CT volumes to search: a folder of PNG slices with their numbers as names, or what `list_volumes` lists.

    Args:
        source: the file or folder.
        **options: those of `list_volumes`.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if a number is missing among the PNG slices; or as `list_volumes` does.
    """
    if slices := list_slices(source):
        read_slice(slices[0])
        return [{"image": str(source)}]
    return list_volumes(source, **options)


def _find_dicom(
    path: Path, on_error: str, irregular: str, series: str, left_out: LeftOut
) -> tuple[list[Case], set[str]]:
    """List the DICOM series of a folder, zip or file, and which of them to leave out."""
    check_choice("irregular", irregular, ("refuse", "accept"))
    others: LeftOut = {}
    found = list_series(path, series=series, mapper=run_parallel, left_out=others)
    named = {name for names in left_out.values() for name in names}
    for kind in sorted(others.keys() - {"DICOMDIR"}):
        left_out[kind] += [n for n in others[kind] if n not in named and not IS_VOLUME.search(n)]
    faults: set[str] = set()
    for place, one in found.items():
        try:
            one.check(irregular=irregular == "accept")
        except ValueError as error:
            if on_error == "raise":
                raise
            logger.warning("%s; the volume is left out", error)
            faults.add(str(place))
    return [{"image": str(place)} for place in found], faults


def _find_faults(cases: Sequence[tuple[Case, bool]], on_error: str, geometry: str) -> set[str]:
    """Check cases, each beside whether it needs a label; raise what is wrong, or give the images to leave out."""

    def fault(case: Case, needs_label: bool) -> Exception | None:
        try:
            if needs_label and "label" not in case:
                raise ValueError(f"{case['image']}: has no label, which training and validation need")
            check_geometry(case, geometry)
        except (ValueError, OSError) as error:
            return error
        return None

    faulty: set[str] = set()
    with ThreadPoolExecutor(8) as pool:  # a network file system answers many questions at once
        for (case, _), error in zip(cases, pool.map(fault, *zip(*cases, strict=True)), strict=True):
            if error is not None and on_error == "raise":
                raise error
            if error is not None and case["image"] not in faulty:
                logger.warning("%s; the case is left out", error)
                faulty.add(case["image"])
    return faulty


def _is_nnunet(root: Path) -> bool:
    """Whether dataset.json is nnU-Net's, which names labels and channels and leaves the cases to the folders."""
    return (root / "imagesTr").is_dir() and b'"training"' not in (root / "dataset.json").read_bytes()


def _read_datalist(path: Path) -> dict[str, list[Case]]:
    if not path.is_file():
        raise FileNotFoundError(f"datalist {path}: no such file")
    try:
        content = json.loads(path.read_bytes())  # in any encoding, also with the mark that Windows puts first
    except ValueError as error:
        raise ValueError(f"datalist {path}: not JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    cases: dict[str, list[Case]] = {}
    for name in ("training", "validation", "test"):
        entries: Any = content.get(name) or []
        if not isinstance(entries, list):
            raise ValueError(f"datalist {path}: {name} holds {entries!r}; expected a list of cases")
        entries = [{"image": e} if isinstance(e, str) else e for e in entries]
        for e in entries:
            if not isinstance(e, dict) or not all(isinstance(e.get(*k), str) for k in (("image",), ("label", ""))):
                raise ValueError(f'datalist {path}: {name} holds {e!r}; expected {{"image": path, "label": path}}')
        cases[name] = [{k: _locate(path.parent, e[k]) for k in ("image", "label") if k in e} for e in entries]
        for case, e in zip(cases[name], entries, strict=True):
            case |= {"patient_id": str(e["patient_id"])} if "patient_id" in e else {}
    _check_shared(path, cases, content.get("shared_cases"))
    return cases


def _locate(folder: Path, name: str) -> str:
    """Find a file of a datalist, in which Windows may have written backslashes."""
    return str(folder / (name if (folder / name).exists() else name.replace("\\", "/")))


def _check_shared(path: Path, cases: dict[str, list[Case]], reason: str | None) -> None:
    """Refuse a case or patient of training that another list names too, unless there is a reason; warn of others."""
    for kind, tell in (("", lambda case: os.path.abspath(case["image"])), ("patient ", patient_of)):
        training, validation, test = ({tell(case) for case in group} for group in cases.values())
        if reason is None and (shared := sorted(training & (validation | test))):
            other = "validation" if shared[0] in validation else "test"
            raise ValueError(
                f"{path}: {kind}{shared[0]} is listed for training and for {other}; list it once, or give the"
                ' reason as "shared_cases" in a datalist'
            )
        if not kind and (count := len((training & (validation | test)) | (validation & test))):
            logger.warning("%s: %d cases are in two lists (%s)", path, count, reason or "validation and test")


def _find_pairs(root: Path, folders: tuple[tuple[str, str], ...], left_out: LeftOut, flat: bool = False) -> list[Case]:
    for image_dir, label_dir in folders:
        if (root / image_dir).is_dir() and (root / label_dir).is_dir():
            images, labels = (list_files(root / name, left_out) for name in (image_dir, label_dir))
            inner = [*(root / image_dir).iterdir(), *(root / label_dir).iterdir()]
            left_out["folders"] += sorted(str(f) for f in inner if f.is_dir() and not kind_of_system(f.name))
            break
    else:
        images, labels = part_labels(list_files(root, left_out) if flat else [])
    return pair(images, labels, left_out)
