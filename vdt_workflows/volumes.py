"""Find the image and label volumes of a data set, in the layouts people have them in, and check that they fit."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

logger = logging.getLogger(__name__)

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
) -> dict[str, list[Case]]:
    """List the cases of a data set: `training` and `validation` with labels, `test` with labels where there are some.

    Understands a datalist JSON in the style of the Medical Segmentation Decathlon (`training`, optional `validation`
    and `test`, paths relative to the file), `dataset.json` in `dataset_dir`, and folders of NIfTI pairs: `imagesTr` and
    `labelsTr`, `images` and `labels`, or all files in one folder. Image and label belong together if their names are
    equal up to a leading role (`img0001`, `label0001`; `volume-3`, `segmentation-3`) and nnU-Net's `_0000`.

    Args:
        dataset_dir: the folder.
        datalist: a datalist JSON to use instead of what the folder says.
        val_fraction: share of the training cases that becomes `validation` where none is named.
        seed: seed of that split.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        ValueError: if there are no pairs, a case has no label, or an image and its label differ in shape or affine.
    """
    root = Path(dataset_dir)
    if datalist is None and (root / "dataset.json").is_file() and not _is_nnunet(root):
        datalist = root / "dataset.json"
    if datalist is not None:
        cases = _read_datalist(Path(datalist))
    else:
        if not root.is_dir():
            raise FileNotFoundError(f"dataset_dir {root}: no such folder")
        cases = {"training": _find_pairs(root, FOLDERS, flat=True), "test": _find_pairs(root, TEST_FOLDERS)}
    if not cases["training"]:
        raise ValueError(
            f"{datalist or root}: no training cases; expected pairs of NIfTI files in images/ and labels/,"
            " imagesTr/ and labelsTr/, or a dataset.json that lists them under 'training'"
        )
    for case in [c for name in ("training", "validation") for c in cases.get(name, []) if "label" not in c]:
        raise ValueError(f"{case['image']}: has no label, which training and validation need")
    for case in [c for group in cases.values() for c in group]:
        check_geometry(case)
    if not cases.get("validation"):
        order = np.random.default_rng(seed).permutation(len(cases["training"]))
        count = min(max(round(val_fraction * len(order)), 1), len(order) - 1) if len(order) > 1 else 0
        chosen = set(order[:count].tolist())
        cases["validation"] = [c for i, c in enumerate(cases["training"]) if i in chosen]
        cases["training"] = [c for i, c in enumerate(cases["training"]) if i not in chosen]
    logger.info("%s: %s", datalist or root, ", ".join(f"{len(v)} {k}" for k, v in cases.items()))
    return cases


def list_volumes(source: str | os.PathLike) -> list[Case]:
    """List the volumes to segment: a NIfTI file, a folder of them, or a data set's `imagesTs`, `imagesTr` or `images`.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder has no NIfTI file.
    """
    path = Path(source)
    if path.is_file():
        return [{"image": str(path)}]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a NIfTI volume or a folder of them")
    for folder in (path, path / "imagesTs", path / "imagesTr", path / "images"):
        if folder.is_dir() and _nifti(folder):
            return [{"image": str(file)} for file in _nifti(folder)]
    raise ValueError(f"{path}: no .nii or .nii.gz file in it, nor in its images folders")


def check_geometry(case: Case) -> None:
    """Raise ValueError if a case's image and label are not on the same grid (only the files' headers are read)."""
    grids = {}
    for key in ("image", "label"):
        if key in case:
            if not os.path.isfile(case[key]):
                raise FileNotFoundError(f"{case[key]}: no such file")
            try:
                header = nib.load(case[key])
            except ImageFileError as error:
                raise ValueError(f"{case[key]}: not a readable NIfTI volume ({error})") from error
            grids[key] = header.shape[:3], header.affine
    if len(grids) < 2:
        return
    (shape, affine), (label_shape, label_affine) = grids["image"], grids["label"]
    if shape != label_shape:
        raise ValueError(f"{case['label']}: shape {label_shape}, but its image {case['image']} has shape {shape}")
    off = float(np.abs(affine - label_affine).max())
    if off > 1e-2:
        raise ValueError(
            f"{case['label']}: its affine differs from that of {case['image']} by up to {off:.3g} mm;"
            " both must lie on the same grid"
        )


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
    cases: dict[str, list[Case]] = {}
    for name in ("training", "validation", "test"):
        entries: Any = (content.get(name) or []) if isinstance(content, dict) else []
        if not isinstance(entries, list):
            raise ValueError(f"datalist {path}: {name} holds {entries!r}; expected a list of cases")
        entries = [{"image": e} if isinstance(e, str) else e for e in entries]
        bad = [e for e in entries if not isinstance(e, dict) or not isinstance(e.get("image"), str)]
        bad += [e for e in entries if e not in bad and not isinstance(e.get("label", ""), str)]
        if bad:
            raise ValueError(f'datalist {path}: {name} holds {bad[0]!r}; expected {{"image": path, "label": path}}')
        cases[name] = [{k: str(path.parent / e[k]) for k in ("image", "label") if k in e} for e in entries]
    return cases


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
    for image in images:
        if _case_name(image) not in by_name:
            raise ValueError(f"{image}: no label of the same name beside {len(labels)} labels")
    return [{"image": str(f), "label": str(by_name[_case_name(f)])} for f in images]


def _nifti(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if SUFFIX.search(f.name) and not f.name.startswith("."))


def _case_name(file: Path) -> str:
    return ROLE.sub("", SUFFIX.sub("", file.name)).removesuffix("_0000")
