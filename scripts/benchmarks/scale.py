"""The benchmark of a list of as many pictures as ImageNet has, against torchvision's list of them."""

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import peak_memory, run_alone
from PIL import Image
from torchvision.datasets import ImageFolder

from vdt_workflows.data.images import scan_class_folders

FILES = 100  # that the links share; a file system allows some 65,000 of one
LISTS = ("first time", "from the index", "torchvision ImageFolder")


def measure_many_images(
    images: int = 1_281_167, classes: int = 1000, loaders: int = 8, folder: str | None = None
) -> dict[str, Any]:
    """List pictures in class folders and read the list in forked loader processes: seconds, and MB of all of them.

    Args:
        images: hard links of a few small pictures.
        classes: folders.
        loaders: processes that each read the whole list, as those of a training do within some epochs.
        folder: where the links are made; the system's for temporary files by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        _make_links(Path(root), images, classes)
        found = {name: run_alone(list_images, root, name, loaders) for name in LISTS}
    return {
        "settings": {"images": images, "classes": classes, "loaders": loaders},
        "MB_is": "of the process, beyond what it held before; of the loaders, memory that none shares, in all",
        **found,
    }


def _make_links(root: Path, images: int, classes: int) -> None:
    originals = root / ".originals"  # hidden, so no class
    originals.mkdir()
    for number in range(FILES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(originals / f"{number}.jpg")
    for label in range(classes):
        (root / f"n{label:08}").mkdir()
        for number in range(label, images, classes):
            os.link(originals / f"{number % FILES}.jpg", root / f"n{label:08}" / f"n{label:08}_{number:07}.jpg")


def list_images(root: str, name: str, loaders: int) -> dict[str, float]:
    """List in this process, then read all entries in each of the loaders."""
    before, start = peak_memory(), time.perf_counter()
    entries: Sequence[Any] = _List(root).samples if name.startswith("torchvision") else scan_class_folders(root)
    seconds, peak = time.perf_counter() - start, peak_memory() - before
    context: Any = multiprocessing.get_context("fork")
    connections = []
    processes = []
    for _ in range(loaders):
        mine, other = context.Pipe()
        process = context.Process(target=_read_all, args=(entries, other))
        process.start()
        connections.append(mine)
        processes.append(process)
    own = sum(connection.recv() for connection in connections)  # all have read before the first ends
    for connection, process in zip(connections, processes, strict=True):
        connection.send("end")
        process.join()
    return {"images": len(entries), "seconds": round(seconds, 2), "MB": peak // 1024, "loaders' MB": round(own / 1024)}


class _List(ImageFolder):
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
        return names, {name: label for label, name in enumerate(names)}


def _read_all(entries: Sequence[Any], connection: Any) -> None:
    before = _unshared()
    for index in range(len(entries)):
        entries[index]
    connection.send(_unshared() - before)
    connection.recv()


def _unshared() -> int:
    """Memory in KiB that this process shares with none."""
    return int(sum(map(int, re.findall(r"^Private_\w+: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M))))
