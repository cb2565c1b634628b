"""Class folders are listed once: the index file that keeps the paths and labels of their images."""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdt_workflows.files import kind_of_system, write_atomic

logger = logging.getLogger(__name__)

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif",
    ".ppm", ".pgm", ".pbm", ".jp2",
)  # fmt: skip
OWN = ".vdt_"  # how names of these packages start
INDEX = f"{OWN}index.npz"
VERSION = 3  # of the index file
Listing = dict[str, np.ndarray]


def is_image(name: str) -> bool:
    """Whether a file is listed: an image by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def kind_of(entry: os.DirEntry) -> str:
    """Say what is in a folder: a "folder" or an "image" to use, or what is left out, such as `@eaDir` or `.txt`."""
    if (system := kind_of_system(entry.name)) is not None:
        return system
    if entry.is_dir():
        return "folder"
    if entry.is_symlink() and not os.path.isfile(entry):
        return "broken link"
    return "image" if is_image(entry.name) else Path(entry.name).suffix.lower() or "no extension"


class Folder(NamedTuple):
    """A folder that was listed: paths are relative to the root of the walk."""

    path: str
    times: tuple[int, int]  # of the last change of its content and of itself, in ns
    images: list[str]
    left_out: list[tuple[str, str]]  # paths, and what they are: `@eaDir`, `.txt`, ...


def walk(root: Path, names: Iterable[str]) -> Iterator[Folder]:
    """Go through the folders `names` of `root` and all below them, through links too, each real folder once.

    Raises:
        ValueError: if a link gives a folder or an image to two of `names`.
    """
    owners: dict[str, tuple[str, str]] = {}  # of real folders and linked images: the name, and the path below root

    def own(real: str, name: str, path: str) -> bool:
        owner, first = owners.setdefault(real, (name, path))
        if owner != name:
            raise ValueError(f"{root}: {first} and {path} are one by a link, but in two classes; remove the link")
        return first == path

    for name in names:
        pending = [name]
        while pending:
            folder = pending.pop()
            real = os.path.realpath(root / folder)
            # Before the listing: a file that arrives in between then makes the index stale, and is not lost for good.
            found = Folder(folder, _times(root / folder), [], [])
            if not own(real, name, folder):
                found.left_out.append((folder, "linked again"))
                yield found
                continue
            with os.scandir(real) as entries:
                for entry in entries:
                    path, kind = f"{folder}/{entry.name}", kind_of(entry)
                    if kind == "folder":
                        pending.append(path)
                    elif kind != "image" and not entry.name.startswith(OWN):
                        found.left_out.append((path, kind))
                    elif kind == "image":
                        found.images.append(path)
                        target = os.path.realpath(entry) if entry.is_symlink() else f"{real}/{entry.name}"
                        if entry.is_symlink() or target in owners:
                            own(target, name, path)
                        if entry.is_symlink() and owners.get(os.path.dirname(target), (name,))[0] != name:
                            own(os.path.dirname(target), name, path)
            yield found


def _times(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_mtime_ns, status.st_ctime_ns


def scan(root: Path, names: Sequence[str]) -> Listing:
    """List the images in the class folders `names` of `root`, at any depth, sorted.

    Returns:
        "paths" (relative), "labels", how many of each kind are "left_out" (JSON), and what shows whether the listing
        still holds: the "folders" seen and the "times" of their last changes.
    """
    images: dict[str, list[str]] = {name: [] for name in names}
    folders, left_out = [], Counter[str]()
    for found in walk(root, names):
        images[found.path.split("/")[0]] += found.images
        left_out.update(kind for _, kind in found.left_out)
        folders.append(found)
    return {
        "paths": to_paths(path for paths in images.values() for path in sorted(paths)),
        "labels": np.repeat(np.arange(len(names), dtype=np.int32), [len(paths) for paths in images.values()]),
        "left_out": np.array(json.dumps(left_out)),
        "folders": to_paths(found.path for found in folders),
        "times": np.array([found.times for found in folders], int),
    }


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
            listing = {key: archive[key] for key in ("paths", "labels", "left_out", "folders", "times")}
        folders = [os.fsdecode(folder) for folder in listing["folders"]]
        holds = (
            list(dict.fromkeys(folder.split("/")[0] for folder in folders)) == list(names)
            and [_times(root / folder) for folder in folders] == list(map(tuple, listing["times"].tolist()))
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
