"""Class folders are listed once: the index file that keeps the paths and labels of their images."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.files import write_atomic

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
INDEX = ".vdt_index.npz"
VERSION = 2  # of the index file
Listing = dict[str, np.ndarray]


def is_image(name: str) -> bool:
    """Whether a file is listed: an image by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def scan(root: Path, names: Sequence[str]) -> Listing:
    """List the images in the class folders `names` of `root`, at any depth, sorted.

    Returns:
        "paths" (relative), "labels", and what shows whether the listing still holds: the "folders" seen and the
        "times" of their last change.
    """
    folders, times, paths, counts = [], [], [], []
    for name in names:
        images, pending = [], [name]
        while pending:
            folder = pending.pop()
            folders.append(folder)
            # Before the listing: a file that arrives in between then makes the index stale, and is not lost for good.
            times.append(os.stat(root / folder).st_mtime_ns)
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                        pending.append(f"{folder}/{entry.name}")
                    elif is_image(entry.name):
                        images.append(f"{folder}/{entry.name}")
        paths += sorted(images)
        counts.append(len(images))
    labels = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    return {"paths": to_paths(paths), "labels": labels, "folders": to_paths(folders), "times": np.array(times, int)}


def to_paths(names: Iterable[str]) -> np.ndarray:
    """Names as one array of bytes, padded with zero bytes, which no file name contains."""
    return np.array([os.fsencode(name) for name in names], "S")


def index_files(root: Path, index_dir: str | Path | None) -> list[Path]:
    """Where the index of `root` may be, the best place first: `index_dir`, or else `root` and the user's cache."""
    name = f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"
    if index_dir is not None:
        return [Path(index_dir) / name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / INDEX, cache / "vdt-bundles" / name]


def read_index(file: Path, root: Path, names: Sequence[str]) -> Listing | None:
    """Read an index; None when there is none, when it is damaged, or when a folder has changed since."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            if archive["version"] != VERSION:
                return None
            listing = {key: archive[key] for key in ("paths", "labels", "folders", "times")}
        folders = [os.fsdecode(folder) for folder in listing["folders"]]
        holds = (
            list(dict.fromkeys(folder.split("/")[0] for folder in folders)) == list(names)
            and [os.stat(root / folder).st_mtime_ns for folder in folders] == listing["times"].tolist()
            and len(listing["paths"]) == len(listing["labels"])
            and 0 <= listing["labels"].min() <= listing["labels"].max() < len(names)
        )
        return listing if holds else None
    except (FileNotFoundError, NotADirectoryError):
        return None  # no index yet, or a listed folder is gone
    except Exception as error:  # broken bytes raise whatever they lead to, and an index is never worth a stop
        logger.warning("%s cannot be read and is made again (%s)", file, error)
        return None


def write_index(files: Sequence[Path], listing: Listing) -> None:
    """Write the index to the first of `files` that can be written; no reader ever sees half of one."""
    buffer = io.BytesIO()
    contents: dict[str, Any] = {"version": VERSION, **listing}
    np.savez(buffer, **contents)
    for file in files:
        try:
            write_atomic(file, buffer.getvalue())
            return
        except OSError as error:
            logger.info("no index at %s (%s)", file, error)
    logger.warning("the image list could not be kept; the folders will be listed again at the next start")
