"""Make a small synthetic data set: pictures to pre-train on and CT-like volumes to segment.

    python scripts/make_demo_data.py demo

makes, in about twenty seconds and the same for the same seed:

    demo/settings.json                             the settings it was made with
    demo/images/{train,val}/<class>/*.jpg          one textured shape a picture, in clutter, light and blur
    demo/volumes/{images,labels}/case_000.nii.gz   Hounsfield units (int16) and labels (uint8)
    demo/volumes/dataset.json                      lists of cases, as in the Medical Segmentation Decathlon
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from vdt_workflows.cli import run_function
from vdt_workflows.files import claim, write_json

LABELS = {"0": "background", "1": "organ", "2": "vessel", "3": "lesion"}
AXES_FLIPPED = [(1, 1, 1), (-1, -1, 1), (-1, 1, 1)]  # RAS+, LPS+ as most CT, LAS+


def make_demo_data(
    output_dir: str,
    image_classes: int = 6,
    images_per_class: int = 200,
    image_size: int = 96,
    volumes: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Make the pictures and the volumes in a folder, or reuse the folder if the same call has finished it before.

    Args:
        output_dir: a new or empty folder; an unfinished one of the same settings is made anew.
        image_classes: how many shapes to draw, 2 to 10.
        images_per_class: pictures of a shape, a fifth of them (at least one) for validation; 2 or more.
        image_size: height and width of a picture in pixels, 16 or more.
        volumes: cases, two fifths of them for training, a fifth for validation and the others for the test; 3 or more.
        seed: every picture and volume depends on it and on its own place in the data set only.

    Returns:
        Where the data are and how many; `reused` says whether they had been there.

    Raises:
        ValueError: if a number is out of its range, or the folder was made with other settings.
        FileExistsError: if the folder has files that are not from this script.
    """
    lowest = {"images_per_class": (images_per_class, 2), "image_size": (image_size, 16), "volumes": (volumes, 3)}
    for name, (value, least) in lowest.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if not 2 <= image_classes <= len(SHAPES):
        raise ValueError(f"image_classes must be 2 to {len(SHAPES)}, got {image_classes}")
    settings = {
        "image_classes": image_classes,
        "images_per_class": images_per_class,
        "image_size": image_size,
        "volumes": volumes,
        "seed": seed,
    }
    root = Path(str(output_dir))  # fire reads a folder called 2024 as a number
    claim(root, settings, empty=True)
    listing = root / "volumes" / "dataset.json"  # written last
    finished = listing.is_file()
    if not finished:
        for folder in ("images", "volumes"):
            shutil.rmtree(root / folder, ignore_errors=True)
        _make_images(root / "images", settings)
        _make_volumes(root / "volumes", volumes, seed)
    n_val = max(1, images_per_class // 5)
    return {
        "images": str(root / "images"),
        "classes": list(SHAPES)[:image_classes],
        "train_images": image_classes * (images_per_class - n_val),
        "val_images": image_classes * n_val,
        "datalist": str(listing),
        **{part: len(cases) for part, cases in _split(volumes).items()},
        "reused": finished,
    }


# Pictures ------------------------------------------------------------------------------------------------------------


def _box(u: np.ndarray, v: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, radius: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(sides) / sides
    return np.max([u * np.sin(t) + v * np.cos(t) for t in angles], axis=0) - radius


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.6 - 0.3 * np.cos(5 * np.arctan2(u, v))


# Each is negative inside a shape of radius 1 about the origin, and grows by about one for one unit of distance.
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.8,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.65) - 0.2,
    "square": lambda u, v: _box(u, v, 0.72, 0.72),
    "triangle": lambda u, v: _polygon(u, v, 3, 0.48),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.95, 0.25), _box(u, v, 0.25, 0.95)),
    "stripes": lambda u, v: _box(np.abs(np.abs(u) - 0.33) - 0.33, v, 0.15, 0.9),
    "star": _star,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.7 - np.hypot(u - 0.45, v)),
    "checker": lambda u, v: np.minimum(_box(u - 0.42, v - 0.42, 0.4, 0.4), _box(u + 0.42, v + 0.42, 0.4, 0.4)),
    "corner": lambda u, v: np.minimum(_box(u + 0.6, v, 0.25, 0.85), _box(u, v - 0.6, 0.85, 0.25)),
}


def _make_images(folder: Path, settings: dict[str, int]) -> None:
    size, n, seed = settings["image_size"], settings["images_per_class"], settings["seed"]
    for c, shape in enumerate(list(SHAPES)[: settings["image_classes"]]):
        for i in range(n):
            target = folder / ("val" if i < max(1, n // 5) else "train") / shape
            target.mkdir(parents=True, exist_ok=True)
            picture = draw_image(shape, size, np.random.default_rng([seed, 0, c, i]))
            Image.fromarray(picture).save(target / f"{shape}_{i:04d}.jpg", quality=92)


def draw_image(shape: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A colour picture (size, size, 3) in uint8 of one shape, whose colour, place, size and tilt vary."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    behind = rng.uniform(0.1, 0.6, 3)
    image = _textured(behind, size, rng)
    image += rng.uniform(-0.15, 0.15, 3) * x[..., None] + rng.uniform(-0.15, 0.15, 3) * y[..., None]
    for _ in range(rng.integers(2, 6)):  # what is small, or only a line, is clutter
        u, v = _frame(x, y, rng, reach=1.0, scale=rng.uniform(0.05, 0.14))
        blot = _box(u, v, rng.uniform(0.4, 6), 0.25) if rng.random() < 0.5 else np.hypot(u, v * rng.uniform(0.5, 1)) - 1
        image = _paint(image, rng.uniform(0.05, 0.9, 3), 0.15 * blot, size, rng.uniform(0.5, 0.9))
    u, v = _frame(x, y, rng, reach=0.3, scale=rng.uniform(0.45, 0.7), turn=0.3)
    front = behind + rng.uniform(0.1, 0.5, 3)  # lit: brighter in every colour than what is behind it
    image = _paint(image, _textured(front, size, rng), 0.5 * SHAPES[shape](u, v), size)
    u, v = _frame(x, y, rng, reach=0.8, scale=rng.uniform(0.03, 0.06))  # a twig in front
    image = _paint(image, rng.uniform(0.05, 0.9, 3), 0.05 * _box(u, v, 12, 0.6), size)
    light = 1 + rng.uniform(-0.3, 0.3) * x + rng.uniform(-0.3, 0.3) * y - rng.uniform(0, 0.2) * (x**2 + y**2)
    blur = rng.uniform(0.3, 1.2)
    image = gaussian_filter(image * light[..., None], (blur, blur, 0), mode="nearest")
    image += rng.normal(0, rng.uniform(0.005, 0.04), image.shape)
    return (255 * image.clip(0, 1)).astype(np.uint8)


def _frame(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, *, reach: float, scale: float, turn: float = np.pi
) -> tuple[np.ndarray, np.ndarray]:
    """The picture's coordinates as seen from a thing with a place, a rotation and an aspect of its own."""
    angle, (cx, cy) = rng.uniform(-turn, turn), rng.uniform(-reach, reach, 2)
    u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    v = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    aspect = rng.uniform(0.9, 1.1)
    return u / scale * aspect, v / scale / aspect


def _textured(colour: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    grain = _noise((size, size), rng.uniform(1, 6), rng) * rng.uniform(0.02, 0.1)
    return colour + grain[..., None] * rng.uniform(0.5, 1, 3)


def _paint(image: np.ndarray, colour: np.ndarray, distance: np.ndarray, size: int, opacity: float = 1.0) -> np.ndarray:
    cover = opacity / (1 + np.exp(np.clip(distance * size, -30, 30)))[..., None]
    return image * (1 - cover) + colour * cover


# Volumes -------------------------------------------------------------------------------------------------------------


def _split(volumes: int) -> dict[str, range]:
    n_train, n_val = max(1, volumes * 2 // 5), max(1, volumes // 5)
    return {
        "training": range(n_train),
        "validation": range(n_train, n_train + n_val),
        "test": range(n_train + n_val, volumes),
    }


def _make_volumes(folder: Path, volumes: int, seed: int) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(volumes):
        rng = np.random.default_rng([seed, 1, i])
        image, label = draw_volume(rng)
        spacing = (*[rng.uniform(1.4, 2.0)] * 2, rng.uniform(2.5, 4.0))  # mm
        flips = AXES_FLIPPED[i % len(AXES_FLIPPED)]
        affine = np.diag([*np.multiply(spacing, flips), 1.0])
        affine[:3, 3] = rng.uniform(-50, 50, 3)
        for kind, array in {"images": image, "labels": label}.items():
            nifti = nib.Nifti1Image(array[:: flips[0], :: flips[1], :: flips[2]], affine)
            nifti.set_qform(affine, 1)  # ITK reads this one, MONAI's nibabel reader the next
            nifti.set_sform(affine, 1)
            nifti.header.set_xyzt_units("mm")
            nib.save(nifti, folder / kind / f"case_{i:03d}.nii.gz")
    entry = "./{}/case_{:03d}.nii.gz".format
    datalist = {
        "name": "demo",
        "description": "synthetic CT-like volumes, made by scripts/make_demo_data.py",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": LABELS,
        **{
            part: [{"image": entry("images", i), "label": entry("labels", i)} for i in cases]
            for part, cases in _split(volumes).items()
        },
    }
    write_json(folder / "dataset.json", datalist, indent=2)


def draw_volume(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image in HU (int16) and its labels (uint8), (X, Y, Z) in RAS+ order.

    The organ lies on the patient's right and is streaky; its twin on the left is as bright but smooth. The vessel is
    bent; a straight one runs beside it. The lesion is a shell; solid blobs of its brightness lie about. So neither
    brightness nor place alone gives a label.
    """
    shape = (*rng.integers(44, 53, 2), rng.integers(28, 37))
    x, y, z = (np.arange(n).reshape([-1 if a == b else 1 for b in range(3)]) for a, n in enumerate(shape))
    centre = np.array(shape) / 2

    def ellipsoid(at: np.ndarray, radii: Any) -> np.ndarray:
        """0 at the centre, 1 on the surface."""
        return np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), at, radii, strict=True)))

    def tube(bend: float, at: np.ndarray, phase: float) -> np.ndarray:
        """Distance in voxels from a line along z that swings sideways by `bend` voxels."""
        return np.hypot(x - at[0] - bend * np.sin(2 * np.pi * z / shape[2] + phase), y - at[1] + 0 * z)

    wobble = 1 + 0.04 * _noise(shape, 5, rng)
    body = ellipsoid(centre, (*(centre[:2] * rng.uniform(0.84, 0.94, 2)), 1e6)) * wobble
    hu = np.where(body < 1, 40.0, -1000.0)
    hu[(body > 0.88) & (body < 1)] = -100  # fat
    hu[ellipsoid(centre * (1, 0.3, 1), (3.5, 3, 1e6)) < 1] = 350  # spine
    label = np.zeros(shape, np.uint8)

    radii = np.array([6.5, 8, 8]) * rng.uniform(0.85, 1.15, 3)
    offset = np.array([centre[0] * rng.uniform(0.42, 0.5), rng.uniform(-3, 3), rng.uniform(-3, 3)])
    bright = rng.uniform(65, 85)
    streaks = 28 * np.sin(2 * np.pi * (x + rng.uniform(0.6, 1.2) * y) / rng.uniform(4, 5.5) + 0.3 * z)
    organ = ellipsoid(centre + offset, radii) * wobble < 1
    twin = ellipsoid(centre + offset * (-1, 1, 1), radii) * wobble < 1
    hu, label[organ] = np.where(organ, bright + streaks, np.where(twin, bright, hu)), 1

    bright, phase = rng.uniform(110, 140), rng.uniform(0, 2 * np.pi)
    order = rng.choice([-1, 1])
    vessel = tube(rng.uniform(3, 4), np.add(centre, (0, 5 * order, 0)), phase) < rng.uniform(1.7, 2.3)
    straight = tube(0, np.add(centre, (rng.uniform(-2, 2), -5 * order, 0)), 0) < rng.uniform(1.7, 2.3)
    hu[straight | vessel], label[vessel] = bright, 2

    bright = rng.uniform(95, 115)
    places = [(-0.25, 0.62), (0.25, 0.62), (-0.3, -0.5), (0.3, -0.5)]
    for i, (px, py) in enumerate(rng.permutation(places)):
        at = centre * (1 + px, 1 + py, 1 + rng.uniform(-0.6, 0.6))
        radius = rng.uniform(3, 4)
        distance = ellipsoid(at, (radius, radius, radius * 0.9))
        ball = distance < 1
        if i == 0:  # a rim with a dark core; all of it is the lesion
            hu[ball], label[ball] = np.where(distance < 0.55, 15, bright)[ball], 3
        else:
            hu[ball], label[ball] = bright, 0

    hu[ellipsoid(centre + rng.uniform(-0.3, 0.3, 3) * centre, rng.uniform(1.5, 2.5, 3)) < 1] = -800  # bowel gas
    label[hu == -800] = 0
    angle = rng.uniform(0, np.pi)
    rays = np.sin(1.3 * (np.cos(angle) * x + np.sin(angle) * y) + 0 * z)
    hu = (
        gaussian_filter(hu, 0.6, mode="nearest")
        + 12 * _noise(shape, 1, rng)
        + 8 * _noise(shape, 4, rng)
        + rng.uniform(2, 6) * rays
    )
    hu += rng.normal(0, 8, shape)
    return hu.clip(-1024, 3071).round().astype(np.int16), label


# Noise ---------------------------------------------------------------------------------------------------------------


def _noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of unit variance whose grain is about sigma voxels."""
    noise = gaussian_filter(rng.normal(size=shape), sigma, mode="nearest")
    return (noise - noise.mean()) / noise.std()


if __name__ == "__main__":
    run_function(make_demo_data)
