"""The benchmark of evaluation: FROC curves and surface distances."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.timing import alternate, quartiles_of, ratio
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from vdt_workflows.evaluation.detection import RULES, KeySlice, box_iou, froc
from vdt_workflows.evaluation.segmentation import OrganScore, score_organs

# Full axes in mm of ellipsoids about as large as BCV's organs.
ORGANS = {
    "spleen": (110, 80, 70),
    "right kidney": (60, 60, 110),
    "left kidney": (60, 60, 110),
    "gallbladder": (35, 80, 35),
    "esophagus": (20, 20, 150),
    "liver": (200, 160, 150),
    "stomach": (200, 100, 100),
    "aorta": (22, 22, 250),
    "inferior vena cava": (25, 22, 220),
    "portal and splenic vein": (100, 20, 40),
    "pancreas": (130, 40, 40),
    "right adrenal gland": (30, 10, 25),
    "left adrenal gland": (30, 10, 25),
}


def compare_evaluation(
    images: int = 4831,
    boxes: int = 100,
    shape: Sequence[int] = (512, 512, 300),
    spacing: Sequence[float] = (0.8, 0.8, 1.5),
    strays: int = 3,
    repeats: int = 3,
) -> dict[str, Any]:
    """Compare FROC curves with a plain loop, and the surface distances of 13 organs with MONAI's two functions.

    Seconds are of the processor. The surfaces are measured twice: of organs in one piece, and of a prediction of which
    some organs have a part in the corner of the volume.

    Args:
        images: key slices, as many as the test part of DeepLesion has.
        boxes: detections of a slice.
        shape: voxels of the label maps.
        spacing: of the label maps, in mm.
        strays: organs with such a part.
        repeats: timed passes of each implementation.
    """
    torch.set_num_threads(1)
    return {
        "froc": _compare_froc(images, boxes, repeats),
        "surfaces": _compare_surfaces(shape, spacing, 0, repeats),
        "surfaces_with_stray_parts": _compare_surfaces(shape, spacing, strays, repeats),
    }


def _compare_froc(images: int, boxes: int, repeats: int) -> dict[str, Any]:
    slices = make_slices(images, boxes)
    rates = (0.5, 1, 2, 4, 8, 16)
    theirs = plain_froc(slices, rates)
    curve = froc(slices)
    passes: dict[str, Callable[[], object]] = {f"ours, {rule}": partial(froc, slices, rule) for rule in RULES}
    passes["plain loop, lenient"] = partial(plain_froc, slices, rates)
    seconds = alternate(passes, repeats, time.process_time)
    return {
        "settings": {"images": images, "boxes_an_image": boxes, "lesions": curve.lesions, "repeats": repeats},
        "seconds_of_a_core": quartiles_of(seconds),
        "largest_difference_of_sensitivity": max(abs(curve.at(r) - t) for r, t in zip(rates, theirs, strict=True)),
    }


def make_slices(images: int, boxes: int, seed: int = 0) -> list[KeySlice]:
    """Make key slices of 512 x 512 pixels with a lesion or two each; a few boxes of each slice lie about them."""
    rng = np.random.default_rng(seed)
    slices = []
    for number in range(images):
        corners = rng.uniform(0, 450, (boxes, 2))
        found = np.concatenate([corners, corners + rng.uniform(8, 60, (boxes, 2))], 1)
        corners = rng.uniform(0, 450, (1 + number % 50 // 49, 2))
        lesions = np.concatenate([corners, corners + rng.uniform(8, 60, corners.shape)], 1)
        near = rng.integers(len(lesions), size=min(5, boxes))
        found[: len(near)] = lesions[near] + rng.normal(0, 4, (len(near), 4))
        slices.append(KeySlice(found, rng.uniform(0, 1, boxes), lesions, patient=str(number // 5)))
    return slices


def plain_froc(slices: Sequence[KeySlice], rates: Sequence[float]) -> list[float]:
    """Give the sensitivities by the lenient rule with a loop over the boxes of each slice, best first."""
    scores, found, false = [], [], []
    lesions = 0
    for item in slices:
        hits = box_iou(item.boxes, item.lesions) >= 0.5
        free = [True] * len(item.lesions)
        lesions += len(free)
        for box in np.argsort(-item.scores, kind="stable"):
            touched = [lesion for lesion in range(len(free)) if hits[box, lesion]]
            scores.append(item.scores[box])
            found.append(sum(free[lesion] for lesion in touched))
            false.append(not touched)
            for lesion in touched:
                free[lesion] = False
    order = np.argsort(-np.asarray(scores), kind="stable")
    sensitivity, per_image = np.cumsum(np.asarray(found)[order]) / lesions, np.cumsum(np.asarray(false)[order])
    last = np.searchsorted(per_image, np.asarray(rates) * len(slices), side="right") - 1
    return [float(sensitivity[i]) if i >= 0 else 0.0 for i in last]


def _compare_surfaces(shape: Sequence[int], spacing: Sequence[float], strays: int, repeats: int) -> dict[str, Any]:
    label = make_organs(shape, spacing)
    pred = make_organs(shape, spacing, shift=3.0, grow=1.03, strays=strays)
    names = ["background", *ORGANS]
    values: dict[str, list[tuple[float, float]]] = {}

    def ours() -> None:
        scores: list[OrganScore] = score_organs(pred, label, names, spacing)
        values["ours"] = [(score.hd95_mm, score.asd_mm) for score in scores]

    def theirs() -> None:
        values["theirs"] = [monai_distances(pred == value, label == value, spacing) for value in range(1, len(names))]

    seconds = alternate({"ours": ours, "theirs": theirs}, repeats, time.process_time)
    difference = np.abs(np.subtract(values["ours"], values["theirs"])).max()
    return {
        "settings": {"voxels": list(shape), "spacing_mm": list(spacing), "organs": len(ORGANS), "stray_parts": strays},
        "repeats": repeats,
        "seconds_a_case_of_a_core": quartiles_of(seconds),
        "ratio": ratio(seconds["theirs"], seconds["ours"]),
        "largest_difference_mm": float(difference),
        "mean_hd95_and_asd_mm": [round(float(v), 2) for v in np.mean(values["ours"], 0)],
    }


def make_organs(
    shape: Sequence[int], spacing: Sequence[float], shift: float = 0, grow: float = 1, strays: int = 0
) -> np.ndarray:
    """Make a label map (X, Y, Z) of ellipsoids, moved by up to `shift` / 2 mm and larger by a factor.

    Small organs lie before large ones, so that all are seen.
    The first `strays` organs have a part of a few voxels in a corner of the volume, as predictions do.
    """
    size = np.multiply(shape, spacing)
    volume = np.zeros(shape, np.uint8)
    rng = np.random.default_rng(0)
    by_size = sorted(enumerate(ORGANS.values(), 1), key=lambda organ: -np.prod(organ[1]))
    for value, axes in by_size:
        centre = rng.uniform(0.3, 0.7, 3) * size + shift * (rng.random(3) - 0.5)
        radii = np.minimum(np.multiply(axes, grow / 2), size / 4)
        low = np.maximum(((centre - radii) / spacing).astype(int), 0)
        high = np.minimum(((centre + radii) / spacing).astype(int) + 2, shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        grid = np.ogrid[box]
        inside = sum(((g * s - c) / r) ** 2 for g, s, c, r in zip(grid, spacing, centre, radii, strict=True)) <= 1
        volume[box][inside] = value
    for value in range(1, strays + 1):
        volume[4 * value : 4 * value + 3, 2:5, 1:3] = value
    return volume


def monai_distances(pred: np.ndarray, label: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """Call MONAI's two functions on the masks of one organ, one after the other."""
    masks = [torch.as_tensor(mask)[None, None] for mask in (pred, label)]
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    hausdorff = compute_hausdorff_distance(*masks, percentile=95, **options)
    average = compute_average_surface_distance(*masks, symmetric=True, **options)
    return float(hausdorff), float(average)
