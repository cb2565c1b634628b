"""The benchmark of reading nine-slice stacks; `benchmark.py` is its command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vdt_transforms import SliceStackReader, SliceStackReaderd
from vdt_workflows.data.cache import SeededCacheDataset

SERIES = ("000001_01_01", "000002_01_01")
DISTANCE, SIDE_SLICES = 2.5, 4


def write_scans(folder: Path, slices: int, size: int = 512, seed: int = 0) -> float:
    """Write two series of 16-bit PNG slices that are as hard to decode as a CT's; return a file's mean kB."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((size, size)) / size - 0.5
    body = np.hypot(x, 1.3 * y) < 0.45
    sizes = []
    for series in SERIES:
        (folder / series).mkdir(parents=True)
        for number in range(1, slices + 1):
            waves = sum(
                np.sin(2 * np.pi * (rng.uniform(2, 8) * x + rng.uniform(2, 8) * y) + number / 5) for _ in range(3)
            )
            hu = np.where(body, 100 * waves + rng.normal(0, 12, x.shape), -1000 + rng.normal(0, 4, x.shape))
            path = folder / series / f"{number:03d}.png"
            Image.fromarray((hu.clip(-1024, 3071).round() + 32768).astype(np.uint16)).save(path)
            sizes.append(path.stat().st_size)
    return float(np.mean(sizes)) / 1000


def stack_passes(folder: Path, slices: int, interval: float) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """Ways to read the stacks around all inner slices of two series, `interval` mm apart; each yields (9, X, Y) in HU.

    In "shuffled", key slices of the two series take turns, so that none finds what the last one read. In "in order"
    each series is read through. The cache is filled here. What it keeps and the plain loop gives are of "shuffled".
    """
    reach = math.ceil(SIDE_SLICES * DISTANCE / interval)
    numbers = range(1 + reach, slices + 1 - reach)
    in_order = [folder / series / f"{number:03d}.png" for series in SERIES for number in numbers]
    shuffled = [path for pair in zip(*np.split(np.array(in_order), 2), strict=True) for path in pair]
    items = [{"image": str(path), "slice_interval": interval} for path in shuffled]
    cached = SeededCacheDataset(
        items, [SliceStackReaderd("image")], cache="disk", cache_dir=folder / f"cache{interval:g}", progress=False
    )

    def ours(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        reader = SliceStackReader()
        return (np.asarray(reader(path, interval)) for path in paths)

    return {
        "plain loop": lambda: (plain_stack(path, interval) for path in shuffled),
        "shuffled": lambda: ours(shuffled),
        "in order": lambda: ours(in_order),
        "disk cache": lambda: (np.array(cached[i]["image"]) for i in range(len(items))),
    }


def plain_stack(path: Path, interval: float) -> np.ndarray:
    """Read for each of the nine places the file at it, or the two around it, and interpolate; (9, X, Y) in HU."""

    def read(number: int) -> np.ndarray:
        with Image.open(path.with_name(f"{number:03d}.png")) as image:
            return np.asarray(image).astype(np.float32) - 32768

    planes = []
    for place in range(-SIDE_SLICES, SIDE_SLICES + 1):
        wanted = int(path.stem) + place * DISTANCE / interval
        low = math.floor(wanted)
        part = np.float32(wanted - low)
        planes.append((1 - part) * read(low) + part * read(low + 1) if part else read(low))
    return np.stack(planes).transpose(0, 2, 1)
