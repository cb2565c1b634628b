"""Damage files in seeded ways, read each as the bundles and commands do, and count what becomes of it."""

from __future__ import annotations

import json as json_format
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import LoadImaged
from PIL import Image

from networks import ResNet3DClassifier, load_pretrained
from tests.faults.outcomes import OUTCOMES, draw_picture, make_classes, quiet, report
from tests.makers.dicom import write_series
from tests.makers.nodules import write_nodules
from tests.makers.volumes import make_affine, write_volume
from vdt_transforms import LoadNaturalImage, NoduleReader, SeriesReader
from vdt_transforms.dicom_series import find_series
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.images import find_images
from vdt_workflows.data.nodule_tables import list_nodules
from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.errors import explanation
from vdt_workflows.training.checkpoints import ResumeRun, load_weights, save_weights

WAYS = ("cut", "bit", "bytes", "zeros", "inserted", "removed", "repeated", "empty", "other", "start")


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a good one is made, and what reads it.

    Attributes:
        name: of the kind.
        make: writes good files into a folder, and gives those that are damaged, one at a time.
        read: reads the folder, and gives what it read as plain values, tensors or arrays.
        exact: whether other values than those of the whole file are a wrong result, since the format has checksums.
    """

    name: str
    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    exact: bool = False


def files(number: int = 2000, seed: int = 0, kinds: str = "", json: str | None = None) -> dict[str, Any]:
    """Damage files in seeded ways, one at a time, and read each as the bundles and commands do.

    Args:
        number: damaged files in all, shared out to the kinds.
        seed: of the damage.
        kinds: names of kinds, by commas, in place of all.
        json: file for the result.
    """
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds.split(",")]
    result = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for position, kind in enumerate(chosen):
            share = number // len(chosen) + (position < number % len(chosen))
            result[kind.name] = damage_kind(kind, Path(folder, kind.name), share, seed)
    return report("files", result, json)


def damage_kind(kind: Kind, folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Read `number` damaged files of one kind: how often which outcome, and the errors that are unclear.

    A file survives when the values are those of the whole file, and counts as changed when they are others, which is
    lost for a kind whose format tells.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, sum(kind.name.encode())])
    targets = kind.make(folder)
    expected = kind.read(folder)  # what is whole must be read
    whole = {file: file.read_bytes() for file in targets}
    counts: Counter[str] = Counter()
    details = []
    for i in range(number):
        file = targets[int(rng.integers(len(targets)))]
        how, damaged = damage(whole[file], rng)
        file.write_bytes(damaged)
        case = f"{i}, {file.name}, {how}"
        try:
            same = equal(kind.read(folder), expected)
            counts["survived" if same else "lost" if kind.exact else "changed"] += 1
            details += [f"{case}: other values were read"] if kind.exact and not same else []
        except Exception as error:
            sentence = explanation(error)
            names = {str(file), str(file.parent), file.name}
            clear = sentence is not None and "\n" not in sentence and any(name in sentence for name in names)
            counts["refused" if clear else "unclear"] += 1
            details += [] if clear else [f"{case}: {type(error).__name__}: {str(error)[:300]}"]
        counts["lost"] += any(other.read_bytes() != content for other, content in whole.items() if other != file)
        file.write_bytes(whole[file])
    return {**{name: counts[name] for name in OUTCOMES}, "details": details[:10]}


def equal(one: Any, other: Any) -> bool:
    """Whether two results of reading hold the same values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray | torch.Tensor) and isinstance(other, np.ndarray | torch.Tensor):
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
    return bool(one == other)


def damage(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage a file's content in one of the ways that disks, networks and people do."""
    data = bytearray(content)
    place = int(rng.integers(len(data)))
    length = int(rng.integers(1, max(2, len(data) // 4)))
    how = str(rng.choice(WAYS))
    if how == "cut":
        del data[place:]
    elif how == "bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        for at in rng.integers(len(data), size=int(rng.integers(2, 30))):
            data[int(at)] = int(rng.integers(256))
    elif how == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif how == "inserted":
        data[place:place] = rng.integers(256, size=length, dtype=np.uint8).tobytes()
    elif how == "removed":
        del data[place : place + length]
    elif how == "repeated":
        data[place:place] = data[place : place + length]
    elif how == "empty":
        data.clear()
    elif how == "other":
        data = bytearray(b"<html><body>404 not found</body></html>\n")
    else:  # the first bytes, where formats keep what matters
        for at in rng.integers(min(len(data), 352), size=3):
            data[int(at)] = int(rng.integers(256))
    return how, bytes(data)


# Kinds of files


def _make_pictures(folder: Path) -> list[Path]:
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        **{f"a.{kind}": (draw_picture(1), {}) for kind in ("jpg", "png", "webp", "gif")},
        "a.tif": (draw_picture(1), {"compression": "tiff_lzw"}),
        "turned.jpg": (draw_picture(2), {"exif": turned}),
        "cmyk.jpg": (draw_picture(3).convert("CMYK"), {}),
        "palette.png": (draw_picture(4).convert("P"), {}),
        "progressive.jpg": (draw_picture(5), {"progressive": True}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return [folder / name for name in pictures]


def _read_pictures(folder: Path) -> Any:
    load = LoadNaturalImage()
    return [load(file) for file in sorted(folder.iterdir())]


def _make_index(folder: Path) -> list[Path]:
    make_classes(folder)
    find_images(folder)
    return sorted(folder.rglob(".vdt_index.npz"))


def _read_index(folder: Path) -> Any:
    return {part: [dict(item) for item in items] for part, items in find_images(folder).items()}


def _make_volumes(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        write_volume(
            folder / kind / f"case{i}{suffix}",
            rng.integers(0, 3, (9, 10, 11)),
            affine=make_affine((-1, 1, 2)),
            dtype=np.uint8 if kind == "labels" else np.int16,
        )
        for kind in ("images", "labels")
        for i, suffix in enumerate((".nii", ".nii.gz"))
    ]


def _read_volumes(folder: Path) -> Any:
    found = find_volumes(folder, val_fraction=0.5)
    data = [case for part in ("training", "validation") for case in found[part]]
    transform = [LoadImaged(["image", "label"], ensure_channel_first=True)]
    items = SeededCacheDataset(data, transform, cache="memory", progress=False)
    return [(item[key], item[key].affine) for item in items for key in ("image", "label")]


def _make_series(folder: Path) -> list[Path]:
    write_series(folder, shape=(9, 8, 4))
    return sorted(folder.glob("*"))


def _read_series(folder: Path) -> Any:
    for series in find_series(folder, modalities=("CT", "MR")).series:
        series.check()
    image = LoadImaged("image", reader=SeriesReader)({"image": str(folder)})["image"]
    return image, image.affine


def _make_cubes(folder: Path) -> list[Path]:
    cube = (np.arange(512) % 256).astype(np.uint8).reshape(8, 8, 8)
    np.savez(folder / "lidc1_1.npz", voxel=cube, answer1=cube)
    np.savez_compressed(folder / "lidc2_1.npz", voxel=cube, answer1=cube)
    return sorted(folder.glob("*.npz"))


def _read_cubes(folder: Path) -> Any:
    load = LoadImaged("image", reader=NoduleReader)
    return [load(item)["image"] for item in list_nodules(folder)]


RUN_STATE = {"settings": {}, "epoch": 1, "iteration": 2, "objects": {}, "scaler": {}}


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return ResNet3DClassifier(18, 3, base_channels=4)


def _make_checkpoints(folder: Path) -> list[Path]:
    save_weights(_network(), folder / "model.pt", {"depth": 18})
    torch.save(RUN_STATE, folder / "resume.pt")
    return [folder / "model.pt", folder / "resume.pt"]


def _read_checkpoints(folder: Path) -> Any:
    read = []
    for load in (load_weights, load_pretrained):
        network = ResNet3DClassifier(18, 3, base_channels=4)
        load(network, folder / "model.pt")
        read.append({name: value.numpy() for name, value in network.state_dict().items()})
    return read, ResumeRun(str(folder / "resume.pt"), {}, {})._read()


def _make_tables(folder: Path) -> list[Path]:
    write_nodules(folder, patients=6, most=2, size=4)
    (folder / "positions.csv").write_text("nodule_id,x_mm,y_mm,z_mm\na,1,2,3\nb,4,5,6\n")
    return [folder / "nodules.csv", folder / "positions.csv"]


def _read_tables(folder: Path) -> Any:
    image = sorted((folder / "images").iterdir())[0]
    return find_nodules(folder), list_nodules(image, folder / "positions.csv")


def _make_json(folder: Path) -> list[Path]:
    _make_volumes(folder)
    cases = [{"image": f"images/case{i}{s}", "label": f"labels/case{i}{s}"} for i, s in enumerate((".nii", ".nii.gz"))]
    content = {"name": "x", "labels": {"0": "background", "1": "a"}, "training": cases[:1], "validation": cases[1:]}
    (folder / "dataset.json").write_text(json_format.dumps(content, indent=1))
    return [folder / "dataset.json"]


KINDS = (
    Kind("image", _make_pictures, _read_pictures),
    Kind("image index", _make_index, _read_index, exact=True),
    Kind("NIfTI", _make_volumes, _read_volumes),
    Kind("DICOM", _make_series, _read_series),
    Kind("npz", _make_cubes, _read_cubes, exact=True),
    Kind("checkpoint", _make_checkpoints, _read_checkpoints, exact=True),
    Kind("csv", _make_tables, _read_tables),
    Kind("json", _make_json, find_volumes),
)
