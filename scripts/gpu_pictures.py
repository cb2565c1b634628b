"""Pictures that lie on a GPU as uint8, and the crops, colours and slices that are drawn of them for whole batches."""

from __future__ import annotations

import io
import math
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from PIL import Image
from torch import Tensor

from vdt_transforms.vdt import MEAN, STD, RandSliceDrift, drift_slices, interpolate_slices


@dataclass
class Run:
    """One encoder: what its network is, what its pictures are turned into, and for how long it trains.

    `share` is the length of the schedule, as a part of the epochs that a whole one has.
    """

    name: str
    width: int = 16
    norm: str = "batch"
    twin: bool = False  # 2D, of colours
    slices: int = 3
    drift: float = 0.0  # of RandSliceDrift's defaults
    shuffle_labels: bool = False
    grey: bool = False
    share: float = 1.0
    weight_decay: float = 1e-4
    channels_last: bool | None = None  # null: as measured
    rate: float | None = None  # null: the best of `RATES` after a short schedule
    epochs: int = 0
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pictures:
    """Pictures as uint8 (N, 3, H, W) and their classes, both on the device; `classes` are the names by label."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def pack(source: str, output: str) -> None:
    """Decode pictures in class folders, of a folder or a zip, and write them as one tensor: they are of one size."""
    names, blobs = read_files(Path(source))
    classes = sorted({Path(name).parent.name for name in names})
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        images = torch.from_numpy(np.stack(list(pool.map(decode, blobs, chunksize=500))))
    labels = torch.tensor([classes.index(Path(name).parent.name) for name in names])
    torch.save({"images": images.permute(0, 3, 1, 2).contiguous(), "labels": labels, "classes": classes}, output)
    print(f"{output}: {len(labels)} pictures of {len(classes)} classes, {tuple(images.shape[1:3])} pixels")


def read_files(source: Path) -> tuple[list[str], list[bytes]]:
    """Give the names and contents of the pictures."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            return names, [archive.read(name) for name in names]
    files = sorted(file for file in source.glob("*/*") if file.is_file())
    return [str(file) for file in files], [file.read_bytes() for file in files]


def decode(blob: bytes) -> np.ndarray:
    """Decode one picture, as RGB."""
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))


def load(paths: str, device: torch.device, classes: list[str] | None = None) -> Pictures:
    """Join the packs.

    Args:
        paths: of the packs, joined by commas.
        device: that holds the pictures.
        classes: that they must have; by default those of the first pack.

    Raises:
        ValueError: if a pack is named twice, or its classes are others, so that its labels would mean something else.
    """
    names = paths.split(",")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]}: a pack must be named once, got it {names.count(twice[0])} times in {paths}")
    packs = {path: torch.load(path, weights_only=True) for path in names}
    known = classes or next(iter(packs.values()))["classes"]
    for path, pack in packs.items():
        if pack["classes"] != known:
            other = sorted(set(pack["classes"]) ^ set(known))
            raise ValueError(
                f"{path}: its classes must be the {len(known)} of the first pack, {other[:3]} are not in both"
            )
    images = torch.cat([pack["images"] for pack in packs.values()])
    labels = torch.cat([pack["labels"] for pack in packs.values()])
    return Pictures(images.to(device), labels.to(device), known)


def crop(images: Tensor, draw: torch.Generator, area: tuple[float, float]) -> Tensor:
    """Do what RandResizedCropImage does, without its antialiasing: (N, 3, S, S), 0 to 255, to the same."""
    number, device = len(images), images.device
    part = torch.empty(number, device=device).uniform_(*area, generator=draw)
    aspect = torch.empty(number, device=device).uniform_(-1, 1, generator=draw).mul(math.log(4 / 3)).exp()
    height, width = (part / aspect).sqrt().clamp(max=1), (part * aspect).sqrt().clamp(max=1)
    place = torch.rand(2, number, device=device, generator=draw) * 2 - 1
    flip = torch.randint(2, (number,), device=device, generator=draw) * 2 - 1
    zero = torch.zeros_like(part)
    x = torch.stack([width * flip, zero, place[0] * (1 - width)], -1)
    y = torch.stack([zero, height, place[1] * (1 - height)], -1)
    grid = F.affine_grid(torch.stack([x, y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def to_volumes(images: Tensor, run: Run, draw: torch.Generator | None = None) -> Tensor:
    """(N, 3, H, W), 0 to 255 -> normalised (N, 1, slices, H, W), or (N, 3, H, W) for a 2D twin.

    `draw` shuffles and moves the slices; without, as in validation, they are red, green and blue.
    """
    images = images.float()
    if run.grey:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
        images = (images * weights[:, None, None]).sum(1, keepdim=True).repeat(1, 3, 1, 1)
    images = (images - MEAN) / STD
    if run.twin:
        return images
    if draw is not None:
        order = torch.rand(len(images), 3, device=images.device, generator=draw).argsort(1)
        images = images.gather(1, order[:, :, None, None].expand_as(images))
    volumes = images[:, None]
    if run.slices != 3:
        volumes = interpolate_slices(volumes, run.slices)
    if draw is not None and run.drift:
        limits = torch.tensor(RandSliceDrift().limits, dtype=torch.float32, device=images.device) * run.drift
        rates = (torch.rand(len(images), 4, device=images.device, generator=draw) * 2 - 1) * limits
        volumes = drift_slices(volumes, rates)
    return volumes
