"""Lists of image and label volumes: data sets in their usual layouts, and volumes to segment or search."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydicom.misc import is_dicom

from vdt_transforms.dicom_series import list_series
from vdt_transforms.readers import list_slices
from vdt_transforms.slice_stacks import read_slice
from vdt_workflows.data.headers import check_geometry
from vdt_workflows.errors import check_choice
from vdt_workflows.parallel import run_parallel

logger = logging.getLogger(__name__)

T = TypeVar("T")
Case = dict[str, str]
SUFFIX = re.compile(r"\.nii(\.gz)?$")
FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"), ("img", "label"))
TEST_FOLDERS = (("imagesTs", "labelsTs"),)
ROLE = re.compile(r"^(images?|img|volume|labels?|segmentation|seg|mask)(?=[-_.\d])[-_.]?", re.IGNORECASE)


def find_volumes(
    dataset_dir: str | os.PathLike,
    *,
    datalist: str | os.PathLike | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    on_error: str = "raise",
) -> dict[str, list[Case]]:
    """List the cases of a data set: `training` and `validation` with labels, `test` with labels where there are some.

    Understands a datalist JSON in the style of the Medical Segmentation Decathlon (`training`, optional `validation`
    and `test`, paths relative to the file), `dataset.json` in `dataset_dir`, and folders of NIfTI pairs: `imagesTr` and
    `labelsTr`, `images` and `labels`, or all files in one folder. Image and label belong together if their names are
    equal up to a leading role (`img0001`, `label0001`; `volume-3`, `segmentation-3`) and nnU-Net's `_0000`.

    A training case that is listed for validation or test too is refused, unless the datalist gives the reason under
    `shared_cases`. All files' headers are read (see `check_geometry`), their voxels are not.

    Args:
        dataset_dir: the folder.
        datalist: a datalist JSON to use instead of what the folder says.
        val_fraction: share of the training cases that becomes `validation` where none is named.
        seed: seed of that split.
        on_error: "raise" stops at the first case that cannot be used; "skip" logs its sentence, leaves it out and goes
            on. The split is made before, so that no other case moves between training and validation.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if there are no pairs, a case has no label, is listed twice, or cannot be used (see
            `check_geometry`), or if all cases of a list are left out.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    cases, source = list_cases(dataset_dir, datalist)
    if not cases["validation"]:
        cases["training"], cases["validation"] = draw(cases["training"], val_fraction, seed)
    faults = _find_faults([(c, name != "test") for name, group in cases.items() for c in group], on_error)
    usable = {name: [c for c in group if c["image"] not in faults] for name, group in cases.items()}
    for name in [name for name, group in cases.items() if group and not usable[name]]:
        raise ValueError(f"{source}: none of the {len(cases[name])} {name} cases can be used, see above")
    counts = ", ".join(f"{len(v)} {k}" for k, v in usable.items())
    logger.info("%s: %s%s", source, counts, f"; {len(faults)} left out" if faults else "")
    return usable


def list_cases(
    dataset_dir: str | os.PathLike, datalist: str | os.PathLike | None = None
) -> tuple[dict[str, list[Case]], Path]:
    """List what a folder or a datalist names (see `find_volumes`), without opening any volume.

    Returns:
        `training`, `validation` and `test` (the last two may be empty, and cases without a label), and the file or
        folder that says so.
    """
    root = Path(dataset_dir)
    if datalist is None and (root / "dataset.json").is_file() and not _is_nnunet(root):
        datalist = root / "dataset.json"
    if datalist is not None:
        cases = _read_datalist(Path(datalist))
    else:
        if not root.is_dir():
            raise FileNotFoundError(f"dataset_dir {root}: no such folder")
        training, test = _find_pairs(root, FOLDERS, flat=True), _find_pairs(root, TEST_FOLDERS)
        cases = {"training": training, "validation": [], "test": test}
    if not cases["training"]:
        raise ValueError(
            f"{datalist or root}: no training cases; expected pairs of NIfTI files in images/ and labels/,"
            " imagesTr/ and labelsTr/, or a dataset.json that lists them under 'training'"
        )
    return cases, Path(datalist or root)


def draw(cases: Sequence[T], share: float, *seed: int) -> tuple[list[T], list[T]]:
    """Divide cases in two at random, keeping their order: the rest, and a share of them (at least one in each)."""
    count = min(max(round(share * len(cases)), 1), len(cases) - 1) if len(cases) > 1 else 0
    chosen = set(np.random.default_rng(seed).permutation(len(cases))[:count].tolist())
    rest = [case for i, case in enumerate(cases) if i not in chosen]
    return rest, [case for i, case in enumerate(cases) if i in chosen]


def list_volumes(source: str | os.PathLike, *, on_error: str = "raise", irregular: str = "refuse") -> list[Case]:
    """List the volumes to segment: a NIfTI file, a folder of them, or DICOM series, each in a folder of its own.

    A folder may also be a data set, whose `imagesTs`, `imagesTr` or `images` are taken. Where it holds no NIfTI file,
    everything below it is searched for CT and MR series.

    Args:
        source: the file or folder.
        on_error: "raise" stops at the first volume that cannot be used, as its headers show (see `check_geometry`
            and `DicomSeries`); "skip" logs its sentence, leaves it out and goes on.
        irregular: what to do with DICOM series that are no regular grid, "refuse" or "accept"; give the reader the same
            (see `vdt_transforms.SeriesReader`).

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if there is no volume, or none that can be used, or two would be written under one name.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a NIfTI volume or a folder of volumes")
    folders = [f for f in (path, path / "imagesTs", path / "imagesTr", path / "images") if f.is_dir() and _nifti(f)]
    if path.is_file() or folders:
        files = [path] if path.is_file() else _nifti(folders[0])
        cases = [{"image": str(file)} for file in files]
        faults = _find_faults([(case, False) for case in cases], on_error)
    else:
        cases, faults = _find_dicom(path, on_error, irregular)
    if not cases:
        raise ValueError(
            f"{path}: no .nii or .nii.gz file in it nor in its images folders, and no DICOM series below it"
        )
    usable = [case for case in cases if case["image"] not in faults]
    if not usable:
        raise ValueError(f"{path}: none of its {len(cases)} volumes can be used, see above")
    if faults:
        logger.info("%s: %d volumes; %d left out", path, len(usable), len(faults))
    names: dict[str, str] = {}
    for image in (case["image"] for case in usable):
        first = names.setdefault(SUFFIX.sub("", Path(image).name), image)
        if first != image:
            raise ValueError(
                f"{image}: has the name of {first}, so that one result would replace the other; rename one"
            )
    return usable


def list_scans(source: str | os.PathLike) -> list[Case]:
    """List the CT volumes to search: a file, a folder of NIfTI files, of one DICOM series, or of numbered PNG slices.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder holds nothing of the kind, or a number is missing among its PNG slices.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a CT volume or a folder of them")
    if path.is_file():
        return [{"image": str(path)}]
    if slices := list_slices(path):
        read_slice(slices[0])
        return [{"image": str(path)}]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    volumes = [file for file in files if file.name.endswith((".nii", ".nii.gz", ".nrrd", ".mha"))]
    if not volumes and not any(is_dicom(file) for file in files[:3]):
        raise ValueError(f"{path}: no volume in it; expected NIfTI files, one DICOM series, or slices such as 001.png")
    return [{"image": str(file)} for file in volumes or [path]]


def _find_dicom(path: Path, on_error: str, irregular: str) -> tuple[list[Case], set[str]]:
    """List the folders that hold one usable series, and which of them to leave out."""
    check_choice("irregular", irregular, ("refuse", "accept"))
    folders = list_series(path, mapper=run_parallel)
    faults: set[str] = set()
    for folder, series in folders.items():
        try:
            if isinstance(series, ValueError):
                raise series
            series.check(irregular=irregular == "accept")
        except ValueError as error:
            if on_error == "raise":
                raise
            logger.warning("%s; the volume is left out", error)
            faults.add(str(folder))
    return [{"image": str(folder)} for folder in folders], faults


def _find_faults(cases: Sequence[tuple[Case, bool]], on_error: str) -> set[str]:
    """Check cases, each beside whether it needs a label; raise what is wrong, or give the images to leave out."""

    def fault(case: Case, needs_label: bool) -> Exception | None:
        try:
            if needs_label and "label" not in case:
                raise ValueError(f"{case['image']}: has no label, which training and validation need")
            check_geometry(case)
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
        content = json.loads(path.read_text())
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
        cases[name] = [{k: str(path.parent / e[k]) for k in ("image", "label") if k in e} for e in entries]
    _check_shared(path, cases, content.get("shared_cases"))
    return cases


def _check_shared(path: Path, cases: dict[str, list[Case]], reason: str | None) -> None:
    """Refuse a training case that another list names too, unless there is a reason; warn of other shared cases."""
    training, validation, test = ({os.path.abspath(c["image"]) for c in group} for group in cases.values())
    if reason is None and (shared := sorted(training & (validation | test))):
        other = "validation" if shared[0] in validation else "test"
        raise ValueError(
            f"datalist {path}: {shared[0]} is listed for training and for {other}; list it once, or give the reason"
            ' as "shared_cases"'
        )
    if count := len((training & (validation | test)) | (validation & test)):
        logger.warning("%s: %d cases are in two lists (%s)", path, count, reason or "validation and test")


def _find_pairs(root: Path, folders: tuple[tuple[str, str], ...], flat: bool = False) -> list[Case]:
    for image_dir, label_dir in folders:
        if (root / image_dir).is_dir() and (root / label_dir).is_dir():
            images, labels = _nifti(root / image_dir), _nifti(root / label_dir)
            break
    else:
        files = _nifti(root) if flat else []
        labels = [f for f in files if re.match(r"(label|seg|mask)", f.name, re.IGNORECASE)]
        images = [f for f in files if f not in labels]
    by_name = {_case_name(f): f for f in labels}
    cases = [{"image": str(f), "label": str(by_name.get(_case_name(f), ""))} for f in images]
    return [{key: file for key, file in case.items() if file} for case in cases]


def _nifti(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if SUFFIX.search(f.name) and not f.name.startswith("."))


def _case_name(file: Path) -> str:
    return ROLE.sub("", SUFFIX.sub("", file.name)).removesuffix("_0000")
