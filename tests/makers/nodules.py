"""Makers of lung nodules whose class shows in their shape alone: smooth ones are benign, spiculated ones malignant."""

from itertools import zip_longest
from pathlib import Path

import numpy as np

from tests.makers.volumes import make_affine, write_volume
from vdt_workflows.data.nodule_tables import COLUMNS, PUBLISHED_TABLE
from vdt_workflows.files import write_csv

PUBLISHED_HEADING = [
    *("index", "uid", "scan", "name", "roi", "volume", "diameter_mm", "coordZ", "coordY", "coordX"),
    *("spacingZ", "spacingY", "spacingX", "nodIDs1", "nodIDs2", "nodIDs3", "nodIDs4", "subtlety", "internalStructure"),
    *("calcification", "sphericity", "margin", "lobulation", "spiculation", "texture", "malignancy"),
    *("malignancy_mode", "subset", "remark"),
]


def draw_nodule(rng, spiculated, size=64):
    """HU of a cube (x, y, z) of lung with a nodule in its centre, and the nodule's mask.

    Both classes have the same range of sizes and densities, and both have vessels near them.
    """
    grid = np.indices((size,) * 3, dtype=np.float32) - np.float32((size - 1) / 2)
    distance = np.sqrt((grid**2).sum(0))
    radius = rng.uniform(5, 9)
    wave = sum(np.tensordot(_direction(rng), grid, 1) for _ in range(3)) / np.maximum(distance, 1)
    soft = radius * (0.8 if spiculated else 1) * (1 + 0.12 * wave) - distance  # mm inside the surface
    for _ in range(rng.integers(20, 28) if spiculated else 0):
        along, across = _cylinder(grid, _direction(rng), np.zeros(3))
        length = radius * rng.uniform(1.8, 2.4)
        soft = np.maximum(soft, np.where(along > 0, 3.5 * (1 - along / length) - across, -9))
    lung = rng.uniform(-880, -800) + rng.normal(0, 40, distance.shape).astype(np.float32)
    filled = np.clip(soft + 0.5, 0, 1)
    for _ in range(4):
        away = _direction(rng) * rng.uniform(12, 24)
        filled = np.maximum(filled, np.clip(rng.uniform(1, 2) - _cylinder(grid, _direction(rng), away)[1], 0, 1))
    hu = lung + filled * (rng.uniform(0, 60) - lung.mean())
    return hu.clip(-1024, 3000).astype(np.int16), (soft > 0).astype(np.uint8)


def _direction(rng):
    vector = rng.normal(size=3)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _cylinder(grid, direction, through):
    offset = grid - np.asarray(through, np.float32)[:, None, None, None]
    along = np.tensordot(direction, offset, 1)
    return along, np.sqrt(np.maximum((offset**2).sum(0) - along**2, 0))


def draw_votes(rng, malignant):
    """Malignancy ratings of one to four readers whose most frequent one is 1, 2, 4 or 5, or 3 for `None`."""
    mode = 3 if malignant is None else int(rng.choice([4, 5] if malignant else [1, 2]))
    return [mode] * int(rng.integers(1, 4)) + ([mode + 1 if mode < 5 else 4] if rng.random() < 0.3 else [])


def make_list(patients=12, most=3, seed=0, indeterminate=0.15):
    """Nodules as {patient, number, malignant, votes}; about half of the patients have both classes."""
    rng = np.random.default_rng(seed)
    found = []
    for patient in range(patients):
        for number in range(1, int(rng.integers(1, most + 1)) + 1):
            malignant = None if rng.random() < indeterminate else bool((patient + number) % 2)
            found.append(
                {"patient": patient, "number": number, "malignant": malignant, "votes": draw_votes(rng, malignant)}
            )
    return found


def nodule_id(nodule):
    return f"LIDC-IDRI-{nodule['patient']:04d}_1_{nodule['number']:02d}"


def own_row(nodule):
    votes = nodule["votes"]
    name = nodule_id(nodule)
    return dict.fromkeys(COLUMNS, "1") | {
        "nodule_id": name,
        "patient_id": f"LIDC-IDRI-{nodule['patient']:04d}",
        "malignancy_mode": str(votes[0]),
        "malignancy_mean": f"{np.mean(votes):.4f}",
        "malignancy_votes": " ".join(map(str, votes)),
        "diameter_mm": "9.5",
        "image": f"images/{name}.nii.gz",
        "label": f"labels/{name}.nii.gz",
    }


def write_table(path, rows, columns=COLUMNS):
    write_csv(path, rows, columns)


def write_nodules(root, nodules=None, *, size=64, seed=0, empty=False, **options):
    """Write a prepared folder and return the nodules; `empty` leaves the volumes' files empty."""
    root, nodules = Path(root), make_list(seed=seed, **options) if nodules is None else nodules
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index, nodule in enumerate(nodules):
        files = [root / folder / f"{nodule_id(nodule)}.nii.gz" for folder in ("images", "labels")]
        if empty:
            [file.touch() for file in files]
            continue
        for file, values in zip(files, _drawn(nodule, index, seed, size), strict=True):
            affine = make_affine((-1.0, -1.0, 1.0), (40.0 - index, 120.0 + 3 * index, -200.0 + 7 * index))
            write_volume(file, values, affine=affine, dtype=values.dtype)
    write_table(root / "nodules.csv", map(own_row, nodules))
    return nodules


def write_published(root, nodules=None, *, size=80, seed=0, empty=False, **options):
    """Write the published layout, `lidc<scan>_<nodule>.npz` and their table in `info/`, and return the nodules."""
    root, nodules = Path(root), make_list(seed=seed, **options) if nodules is None else nodules
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, nodule in enumerate(nodules):
        name, votes = f"lidc{nodule['patient']}_{nodule['number']}", nodule["votes"]
        row = dict.fromkeys(PUBLISHED_HEADING, "1")
        row |= {"index": name, "uid": f"LIDC-IDRI-{nodule['patient']:04d}", "malignancy_mode": votes[0]}
        rows.append(row | {"malignancy": "".join(map(str, votes)).ljust(4, "x"), "diameter_mm": 9.5, "remark": ""})
        if empty:
            (root / f"{name}.npz").touch()
            continue
        hu, mask = _drawn(nodule, index, seed, size)
        voxel = ((hu.clip(-1024, 400) + 1024.0) / 1424 * 255).round().astype(np.uint8)
        np.savez_compressed(root / f"{name}.npz", voxel=voxel.transpose(), answer1=mask.transpose())
    write_table(root / "info" / PUBLISHED_TABLE, rows, PUBLISHED_HEADING)
    return nodules


def write_published_split(path, train, test):
    """Columns of unequal length, as published."""
    lines = [f"{i},{a},{b}\n" for i, (a, b) in enumerate(zip_longest(train, test, fillvalue=""))]
    Path(path).write_text(",train,test\n" + "".join(lines))
    return path


def _drawn(nodule, index, seed, size):
    rng = np.random.default_rng([seed, index])
    malignant = bool(rng.integers(2)) if nodule["malignant"] is None else nodule["malignant"]
    return draw_nodule(rng, malignant, size)
