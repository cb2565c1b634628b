"""Lists of image files: class folders, flat folders with a list, and images to classify."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import ensure_tuple
from torch.utils.data import default_collate

from vdt_workflows.data.folder_index import (
    EXTENSIONS,
    OWN,
    index_files,
    kind_of,
    read_index,
    scan,
    to_paths,
    walk,
    write_index,
)
from vdt_workflows.files import few

logger = logging.getLogger(__name__)

VALIDATION_FOLDERS = ("val", "validation", "valid", "test")
VALIDATION_LISTS = ("meta/val.txt", "val.txt")  # of images that lie flat in one of these


@dataclass(eq=False)
class ImageList(Sequence[dict[str, Any]]):
    """Image files and their classes: `images[i]` is `{"image": absolute path, "label": class index}`.

    A million paths are one array of bytes. With an object for each path, every loader process would end up with its own
    copy of them all, because reading an object changes its reference count.

    Attributes:
        paths: absolute paths, as `to_paths` makes them.
        labels: class index of each image.
        classes: class names, by index.
        left_out: how many files and folders of each kind beside the images are not used.
    """

    paths: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {"image": os.fsdecode(self.paths[index]), "label": int(self.labels[index])}

    def subset(self, indices: np.ndarray | Sequence[int]) -> ImageList:
        """List of the images at `indices`."""
        return ImageList(self.paths[indices], self.labels[indices], self.classes)


def scan_class_folders(
    root: str | Path, *, classes: Sequence[str] | None = None, index_dir: str | Path | None = None
) -> ImageList:
    """List the images of a folder that has one folder for each class, in sorted order.

    Folders inside a class folder belong to the class, linked ones too. Files that are no images by their extension, and
    what belongs to a file system (hidden, `@eaDir`, `lost+found`, ...) are left out and counted. The listing is kept in
    an index file and made again when a folder was added, removed or changed since; paths in it are relative, so it
    moves with the data.

    Args:
        root: folder of the class folders.
        classes: class names in the wanted order, which the folders must have; default: the sorted folder names.
        index_dir: where the index is kept; default: `.vdt_index.npz` in `root`, or the user's cache folder when `root`
            is not writable.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it does not hold two or more class folders with images, or other classes than `classes`, or a
            link gives a folder or an image to two classes.
    """
    root = Path(os.path.abspath(root))  # not resolve(): a link to the data should stay readable as such
    names, beside = _class_names(root)
    if classes is not None and set(classes) != set(names):
        missing, unknown = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        raise ValueError(
            f"the class folders of {root} are not the expected {len(classes)}:"
            f" missing {few(missing, 3) or 'none'}; unknown {few(unknown, 3) or 'none'}"
        )
    if len(names) < 2:
        raise ValueError(f"{root} has the one class folder {names[0]!r}; classification needs two or more")

    files = index_files(root, index_dir)
    indexed = next((found for file in files if (found := read_index(file, root, names)) is not None), None)
    listing = indexed or scan(root, names)
    paths, labels = np.char.add(os.fsencode(root) + b"/", listing["paths"]), listing["labels"]
    empty = [names[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)]
    if empty:
        raise ValueError(f"{root} has class folders without any image ({', '.join(EXTENSIONS)}): {few(empty, 3)}")
    if indexed is None:
        write_index(files, listing)
    how = "by listing its folders" if indexed is None else "from the index"
    left_out = beside + Counter(json.loads(str(listing["left_out"])))
    logger.info("%s: %d images of %d classes used, %s; %s", root, len(labels), len(names), _sum(left_out), how)
    label_of = {name: label for label, name in enumerate(classes or names)}
    return ImageList(paths, np.array([label_of[name] for name in names], np.int32)[labels], list(label_of), left_out)


def _sum(left_out: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    return f"{sum(left_out.values())} left out{f' ({kinds})' if kinds else ''}"


def _class_names(root: Path) -> tuple[list[str], Counter[str]]:
    """Names of the class folders, and what is left out beside them."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; give the folder that holds the class folders")
    kinds = {entry.name: kind_of(entry) for entry in os.scandir(root) if not entry.name.startswith(OWN)}
    names = sorted(name for name, kind in kinds.items() if kind == "folder")
    if not names and "image" in kinds.values():
        raise ValueError(f"{root} has images but no class folders; move the images into one folder for each class")
    if not names:
        raise ValueError(f"{root} has no class folders; give the folder that holds one folder for each class")
    beside = Counter(kind for kind in kinds.values() if kind != "folder")
    return names, beside


def read_image_list(folder: str | Path, list_file: str | Path, classes: Sequence[str]) -> ImageList:
    """List images that lie flat in one folder and whose classes are in a text file, as ImageNet's validation set.

    Args:
        folder: folder of the images.
        list_file: one image a line: file name, blank, class index.
        classes: class names, by index.

    Raises:
        FileNotFoundError: if the folder, the list or a listed image does not exist.
        ValueError: if a line cannot be understood.
    """
    folder = Path(os.path.abspath(folder))
    kinds = {entry.name: kind_of(entry) for entry in os.scandir(folder)}
    paths, labels = [], []
    with open(list_file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{list_file}, line {number}"
            name, _, index = line.strip().rpartition(" ")
            name = name.strip()
            if not name or not index.isdecimal():
                raise ValueError(f"{place}: expected a file name, a blank and a class index, got {line.strip()!r}")
            if int(index) >= len(classes):
                raise ValueError(f"{place}: the class index must be below {len(classes)}, got {index}")
            if name not in kinds and not (folder / name).is_file():
                raise FileNotFoundError(f"{place}: there is no image {name!r} in {folder}")
            paths.append(f"{folder}/{name}")
            labels.append(int(index))
    if not paths:
        raise ValueError(f"{list_file} names no image")
    left_out = Counter(kinds[name] for name in {*kinds} - {Path(path).name for path in paths})
    logger.info("%s: %d images of %s used, %s", folder, len(paths), list_file, _sum(left_out))
    return ImageList(to_paths(paths), np.array(labels, np.int32), classes, left_out)


def find_images(
    dataset_dir: str | Path,
    *,
    train_dir: str | Path | Sequence[str | Path] | None = None,
    val_dir: str | Path | Sequence[str | Path] | None = None,
    val_fraction: float = 0.1,
    shuffle_labels: bool = False,
    seed: int = 0,
) -> dict[str, ImageList]:
    """Find the training and validation images of a data set, in any of the layouts people have.

    - `train/` beside `val/`, `validation/`, `valid/` or `test/` (the first that exists), each with class folders
    - the same, with flat validation images and their list in `meta/val.txt` or `val.txt`
    - `train/` alone, or class folders alone: a seeded part of each class is kept for validation

    Args:
        dataset_dir: folder of the data set.
        train_dir: the training folder or folders, in place of `train/`.
        val_dir: the validation folder or folders, in place of the names above.
        val_fraction: part of each class kept for validation where there is no validation folder.
        shuffle_labels: permute the training labels: a control experiment, in which a network can only memorise. Each
            class keeps its number of labels; validation labels stay true.
        seed: seed of both choices.

    Returns:
        The lists "train" and "val"; classes are those of the (first) training folder.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if a folder is not laid out in one of these ways; see `scan_class_folders`.
    """
    root = Path(dataset_dir)
    has_parts = train_dir is not None or (root / "train").is_dir()
    train_dirs, val_dirs = ([Path(folder) for folder in ensure_tuple(given or ())] for given in (train_dir, val_dir))
    train_dirs = train_dirs or [root / "train" if has_parts else root]
    if has_parts and not val_dirs:
        val_dirs = [root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()][:1]

    first = scan_class_folders(train_dirs[0])
    train = _join([first, *(scan_class_folders(folder, classes=first.classes) for folder in train_dirs[1:])])
    if val_dirs:
        if both := {folder.resolve() for folder in train_dirs} & {folder.resolve() for folder in val_dirs}:
            logger.warning("%s: its images are both trained on and validated on", min(both))
        val = _join([_validation_list(folder, root, first.classes) for folder in val_dirs])
    else:
        train, val = _split(train, val_fraction, seed)
        logger.info("no validation folder in %s: a part of %g of each class is kept for it", root, val_fraction)
    if shuffle_labels:
        train.labels = np.random.default_rng([seed, 1]).permutation(train.labels)
        logger.info("the training labels are shuffled")
    logger.info("%d training and %d validation images of %d classes", len(train), len(val), len(train.classes))
    return {"train": train, "val": val}


def _validation_list(folder: Path, root: Path, classes: Sequence[str]) -> ImageList:
    if not folder.is_dir() or any(kind_of(entry) == "folder" for entry in os.scandir(folder)):
        return scan_class_folders(folder, classes=classes)
    list_files = [root / name for name in VALIDATION_LISTS]
    if (list_file := next((file for file in list_files if file.is_file()), None)) is None:
        raise ValueError(
            f"{folder} has no class folders; give it one for each class, or the list {list_files[0]} or {list_files[1]}"
            " with a file name and a class index in each line"
        )
    return read_image_list(folder, list_file, classes)


def _join(lists: Sequence[ImageList]) -> ImageList:
    paths, labels = (np.concatenate([getattr(images, part) for images in lists]) for part in ("paths", "labels"))
    return ImageList(paths, labels, lists[0].classes, sum((Counter(images.left_out) for images in lists), Counter()))


def _split(images: ImageList, val_fraction: float, seed: int) -> tuple[ImageList, ImageList]:
    """Split each class; one with two images or more has some in both parts."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(images), bool)
    ends = np.cumsum(np.bincount(images.labels))
    for members in np.split(np.argsort(images.labels, kind="stable"), ends[:-1]):
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        chosen[random.permutation(members)[:count]] = True
    return images.subset(np.flatnonzero(~chosen)), images.subset(np.flatnonzero(chosen))


def list_images(source: str | os.PathLike) -> list[dict[str, str]]:
    """List the images to classify: one file, or all below a folder (see `scan_class_folders`), as `image` and `path`.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder holds no image file.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected an image or a folder of images")
    if path.is_file():
        return [{"image": str(path), "path": str(path)}]
    found = list(walk(path, ["."]))
    files = sorted(path / name for folder in found for name in folder.images)
    left_out = _sum(Counter(kind for folder in found for _, kind in folder.left_out))
    if not files:
        raise ValueError(f"{path}: no image file in it or below it, {left_out}")
    logger.info("%s: %d images used, %s", path, len(files), left_out)
    return [{"image": str(file), "path": str(file)} for file in files]


def collate_images(samples: Sequence[dict[str, Any]], mean: float = 0.0, std: float = 1.0) -> dict[str, Any]:
    """Batch the samples, without those that could not be read.

    Args:
        samples: samples as `default_collate` takes them, or `{"skipped": why}`.
        mean: subtracted from the batch's "image". Each image is normalised in its place in the batch, while it is
            still in the processor's cache.
        std: divides it; with a mean or a std it becomes float32.

    Returns:
        The batch, with the reasons listed under "skipped".

    Raises:
        RuntimeError: if no sample could be read.
    """
    skipped = [sample["skipped"] for sample in samples if "skipped" in sample]
    kept = [sample for sample in samples if "skipped" not in sample]
    if not kept:
        raise RuntimeError(f"none of the {len(samples)} images of a batch could be read; the first: {skipped[0]}")
    if (mean, std) == (0.0, 1.0):
        return {**default_collate(kept), "skipped": skipped}
    images = [sample["image"] for sample in kept]
    batch = torch.empty((len(images), *images[0].shape), dtype=torch.float32)
    for row, image in zip(batch, images, strict=True):
        row.copy_(image).sub_(mean).div_(std)
    rest = default_collate([{key: value for key, value in sample.items() if key != "image"} for sample in kept])
    return {"image": batch, **rest, "skipped": skipped}
