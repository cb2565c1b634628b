"""Volume files in folders: which are images, which labels, what belongs together, and what is left out."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydicom.misc import is_dicom

from vdt_transforms.geometry import SUFFIX
from vdt_workflows.files import few, kind_of_system

logger = logging.getLogger(__name__)

T = TypeVar("T")
LeftOut = dict[str, list[str]]  # names by the reason
ROLE = re.compile(r"^(images?|img|volume|labels?|segmentation|seg|mask)(?=[-_.\d])[-_.]?", re.IGNORECASE)
LABEL = re.compile(r"(label|seg|mask)", re.IGNORECASE)
PATIENT = re.compile(r"(sub-[a-z0-9]+|patient[-_]?\d+)", re.IGNORECASE)  # at the start of names: BIDS, ACDC
BESIDE = (".raw", ".zraw", ".dcm")
CHANNEL = re.compile(r"_000[1-9](?=\.)")  # nnU-Net's second channel and so on


def conclude(source: object, used: int, left_out: Mapping[str, Sequence[str]], more: str = "") -> None:
    """Log the end of a listing: how many are used, how many are left out, and why."""
    reasons = "; ".join(f"{len(n)} {why} ({few([Path(p).name for p in n], 3)})" for why, n in left_out.items() if n)
    total = sum(map(len, left_out.values()))
    words = [f"{source}: {used} used, {total} left out", *([more] if more else []), *([reasons] if reasons else [])]
    logger.log(logging.WARNING if total else logging.INFO, "%s", "; ".join(words))


def draw(cases: Sequence[T], share: float, *seed: int) -> tuple[list[T], list[T]]:
    """Divide cases in two at random by patient, keeping their order: the rest, and a share (at least one in each)."""
    patients = list(dict.fromkeys(map(patient_of, cases)))
    count = min(max(round(share * len(patients)), 1), len(patients) - 1) if len(patients) > 1 else 0
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count]}
    rest = [case for case in cases if patient_of(case) not in chosen]
    return rest, [case for case in cases if patient_of(case) in chosen]


def patient_of(case: Any) -> str:
    """Tell whose a case (or its name) is: by `patient_id`, by the start of its name, or else it is one of its own."""
    if isinstance(case, Mapping) and "patient_id" in case:
        return str(case["patient_id"])
    image = str(case["image"] if isinstance(case, Mapping) else case)
    return find_patient(os.path.basename(image)) or os.path.abspath(image)


def find_patient(*parts: str) -> str:
    """Give the first beginning of a part of a path that is a patient's name, in small letters; or nothing."""
    return next((match[0].lower() for part in parts if (match := PATIENT.match(part))), "")


def choose_images(root: Path, left_out: LeftOut) -> list[Path]:
    """Choose the volume files of a folder that are images to segment."""
    folders = [root, *(root / name for name in ("imagesTs", "imagesTr", "images"))]
    files = next((f for folder in folders if folder.is_dir() and (f := list_files(folder, left_out))), [])
    below = list_below(root)
    images, labels = part_labels(files or [file for file in below if not LABEL.match(file.parent.name)])
    if others := [file for file in images if not SUFFIX.sub("", file.name).endswith("_seg")]:  # as results are named
        images, labels = others, [*labels, *(file for file in images if file not in others)]
    check_channels(images)
    left_out["labels"] += map(str, labels)
    left_out["volumes of other folders"] += map(str, sorted({*below} - {*files, *images, *labels}))
    return images


def list_below(root: Path) -> list[Path]:
    """List the volume files of a folder and of all below it, each once, also where links lead round."""
    seen, below = {os.path.realpath(root)}, []
    for place, inner, names in os.walk(root, followlinks=True):
        kept = [n for n in sorted(inner) if not kind_of_system(n) and os.path.realpath(Path(place, n)) not in seen]
        seen |= {os.path.realpath(Path(place, name)) for name in kept}
        inner[:] = kept
        below += [Path(place, n) for n in sorted(names) if SUFFIX.search(n) and not kind_of_system(n)]
    return below


def part_labels(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Part images and labels by their names; files that are all called labels are taken for images."""
    images = [file for file in files if not LABEL.match(file.name)]
    return (images, [file for file in files if file not in images]) if images else (list(files), [])


def check_channels(images: Sequence[Path]) -> None:
    """Refuse cases of several channels, which nnU-Net keeps in a file each."""
    names = {*images}
    for file in images:
        first = file.with_name(CHANNEL.sub("_0000", file.name))
        if first != file and first in names:
            raise ValueError(
                f"{file}: a second channel of {first.name}; cases of several channels are not supported, so give a"
                " folder with the files of one channel alone"
            )


def list_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """List the volume files in a folder, and name the others in it, but for DICOM and the data of detached headers."""
    found, others = [], []
    for file in sorted(folder.iterdir()):
        if kind_of_system(file.name):
            left_out["files of the system"].append(str(file))
        elif SUFFIX.search(file.name) and not file.is_dir():
            found.append(file)
        elif file.is_file() and not (file.suffix.lower() in BESIDE or file.name == "dataset.json" or is_dicom(file)):
            others.append(str(file))
    left_out["other files"] += others if found else []
    return found


def pair(images: Sequence[Path], labels: Sequence[Path], left_out: LeftOut) -> list[dict[str, str]]:
    """Put each image and the label of its name into a case; labels alone are left out."""
    check_channels(images)
    by_name: dict[str, Path] = {}
    for file in labels:
        if (other := by_name.setdefault(case_name(file), file)) != file:
            raise ValueError(f"{file}: a second label of the case of {other.name}; leave one of them in the folder")
    cases = [{"image": str(file), "label": str(by_name.pop(case_name(file), ""))} for file in images]
    left_out["labels without image"] += map(str, by_name.values())
    return [{key: text for key, text in case.items() if text} for case in cases]


def pair_in_folders(root: Path, left_out: LeftOut) -> list[dict[str, str]]:
    """Pair the files of each folder, at any depth, that holds both; one of each there need not be named alike.

    Whose a case is, is told by a folder or file named as `PATIENT`, or else by the first folder in which paths differ.
    """
    folders: dict[Path, list[Path]] = {}
    for file in list_below(root):
        folders.setdefault(file.parent, []).append(file)
    parts = {folder: part_labels(files) for folder, files in folders.items()}
    labelled = [folder for folder, (_, labels) in parts.items() if labels]
    left_out["volumes without label"] += [str(f) for folder in parts.keys() - {*labelled} for f in folders[folder]]
    shared, cases = os.path.commonpath(labelled) if labelled else "", []
    for folder in labelled:
        images, labels = parts[folder]
        below = folder.relative_to(shared).parts
        alone = len(images) == len(labels) == 1
        found = [{"image": str(images[0]), "label": str(labels[0])}] if alone else pair(images, labels, left_out)
        for case in found:
            named = find_patient(*below, os.path.basename(case["image"]))
            cases.append({**case, "patient_id": named or next(iter(below), folder.name)})
    return cases


def case_name(file: Path) -> str:
    """Give the name that an image and its label share."""
    return ROLE.sub("", SUFFIX.sub("", file.name)).removesuffix(".seg").removesuffix("_0000")
