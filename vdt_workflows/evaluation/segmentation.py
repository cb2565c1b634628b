"""Score segmented cases organ by organ, and write a table, a summary and pictures of them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics.utils import get_edge_surface_distance
from scipy.ndimage import find_objects

from vdt_transforms import RestoreGrid
from vdt_workflows.drawing import (
    Plane,
    cut_planes,
    draw_planes,
    draw_sheet,
    draw_tile,
    find_centre,
    make_figure,
    to_grey,
    to_png,
)
from vdt_workflows.files import write_atomic, write_csv, write_json
from vdt_workflows.naming import tell_apart
from vdt_workflows.progress import RESULT
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)
SMOOTH = 1e-5  # of the published pooled Dice
Planes = list[Plane]


@dataclass
class OrganScore:
    """One organ of one case. Distances are NaN where the organ is missing on either side, Dice where on both.

    Attributes:
        case: name of the image file.
        organ: name of the label.
        dice: overlap, 0 to 1.
        hd95_mm: the greater of the two directed 95th percentiles of the distances between the surfaces.
        asd_mm: mean distance between the surfaces, over both directions.
        common, predicted, labelled: voxels in both maps, in the prediction and in the label.
        predicted_ml, labelled_ml: volumes.
    """

    case: str
    organ: str
    dice: float
    hd95_mm: float
    asd_mm: float
    common: int
    predicted: int
    labelled: int
    predicted_ml: float
    labelled_ml: float


def score_organs(
    pred: np.ndarray,
    label: np.ndarray,
    label_names: Sequence[str],
    spacing: Sequence[float],
    case: str = "",
    surfaces: bool = True,
) -> list[OrganScore]:
    """Compare two label maps organ by organ, the background left out.

    Each organ is cut out with a margin before its surfaces are measured, which changes no distance and takes seconds
    where whole volumes take minutes.

    Args:
        pred: whole numbers (X, Y, Z).
        label: the same shape.
        label_names: by label value, the background first.
        spacing: voxel size in mm, as X, Y, Z.
        case: name to report.
        surfaces: whether to measure distances; they are NaN otherwise.

    Raises:
        ValueError: if the shapes differ.
    """
    if pred.shape != label.shape:
        raise ValueError(f"{case}: prediction {pred.shape} and label {label.shape} must have the same shape")
    count = len(label_names) - 1
    boxes = [find_objects(volume.astype(np.int32, copy=False), count) for volume in (pred, label)]
    ml = float(np.prod(spacing)) / 1000
    scores = []
    for value, organ in enumerate(label_names[1:], 1):
        found = [boxes[side][value - 1] for side in (0, 1)]
        a, b = (int((v[box] == value).sum()) if box else 0 for v, box in zip((pred, label), found, strict=True))
        common, hd95, asd = 0, math.nan, math.nan
        if all(found):
            box = _around(found[0], found[1], label.shape)
            masks = [v[box] == value for v in (pred, label)]
            common = int((masks[0] & masks[1]).sum())
            if surfaces:
                hd95, asd = _distances(masks, spacing)
        dice = 2 * common / (a + b) if a + b else math.nan
        scores.append(OrganScore(case, organ, dice, hd95, asd, common, a, b, a * ml, b * ml))
    return scores


def _around(a: Sequence[slice], b: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
    """Find the box around both, with a margin of one voxel, so that no surface is cut off."""
    sides = zip(a, b, shape, strict=True)
    return tuple(slice(max(min(u.start, v.start) - 1, 0), min(max(u.stop, v.stop) + 1, n)) for u, v, n in sides)


def _distances(masks: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[float, float]:
    """The values of MONAI's `compute_hausdorff_distance` and `compute_average_surface_distance`, in half their time.

    Each of the two would compute the surfaces and the distances between them for itself.
    """
    sides = [torch.as_tensor(mask) for mask in masks]
    _, distances, _ = get_edge_surface_distance(*sides, spacing=tuple(map(float, spacing)), symmetric=True)
    hd95 = max(float(torch.quantile(directed, 0.95)) for directed in distances)
    return hd95, float(torch.cat(list(distances)).mean())


def summarise(scores: Sequence[OrganScore], label_names: Sequence[str]) -> dict[str, Any]:
    """Give means and standard deviations over cases, and the pooled Dice of the published code.

    `mean_dice` is the mean over cases of each case's mean over the organs that it has. `pooled_dice` counts the voxels
    of all cases as if they were one volume, so that large cases weigh more: (2 I + e [U = 0]) / (I + U + e) with the
    common voxels I, those in either map U, and e = 1e-5 (source: the evaluation of `medseg/` in the published code,
    which reports its mean as mDice3D).
    """
    organs: dict[str, Any] = {}
    for organ in label_names[1:]:
        own = [s for s in scores if s.organ == organ]
        common = sum(s.common for s in own)
        union = sum(s.predicted + s.labelled for s in own) - common
        organs[organ] = {
            "dice": _mean_and_deviation([s.dice for s in own]),
            "pooled_dice": (2 * common + SMOOTH * (union == 0)) / (common + union + SMOOTH),
            "hd95_mm": _mean_and_deviation([s.hd95_mm for s in own]),
            "asd_mm": _mean_and_deviation([s.asd_mm for s in own]),
            "missed": sum(s.labelled > 0 and s.predicted == 0 for s in own),
            "invented": sum(s.labelled == 0 and s.predicted > 0 for s in own),
        }
    return {
        "mean_dice": _mean_and_deviation(list(case_means(scores).values())),
        "mean_pooled_dice": float(np.mean([o["pooled_dice"] for o in organs.values()])),
        "mean_hd95_mm": _mean_and_deviation([s.hd95_mm for s in scores]),
        "mean_asd_mm": _mean_and_deviation([s.asd_mm for s in scores]),
        "organs": organs,
    }


def case_means(scores: Sequence[OrganScore]) -> dict[str, float]:
    """Mean Dice of each case, over the organs that it has."""
    cases: dict[str, list[float]] = {}
    for score in scores:
        cases.setdefault(score.case, []).append(score.dice)
    return {case: _mean_and_deviation(values)["mean"] for case, values in cases.items()}


def rank_examples(scores: Sequence[OrganScore]) -> dict[str, str]:
    """Name the cases of the best, the median and the worst mean Dice by their rank; of two there is no median."""
    means = case_means(scores)
    ranked = sorted(means, key=lambda case: -1.0 if math.isnan(means[case]) else means[case])
    if len(ranked) == 1:
        return {"the only case": ranked[0]}
    ranks = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    return {rank: case for rank, case in ranks.items() if rank != "median" or len(ranked) > 2}


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    known = np.asarray([v for v in values if math.isfinite(v)])
    mean = float(known.mean()) if len(known) else math.nan
    return {"mean": mean, "sd": float(known.std(ddof=1)) if len(known) > 1 else math.nan, "n": len(known)}


@dataclass(eq=False)
class CaseScores:
    """Handler: score each case of an evaluation, on the grid of its own label, and write the scores.

    Into the folder go `cases.csv` (a row for each case and organ), `scores.json` (the engine's metrics, the notes, and
    what `summarise` gives), `scores.png` (the spread of each organ's Dice and distances) and `examples.png` (see
    `draw_examples`). The first process writes the cases of all.

    Args:
        folder: where the files go.
        label_names: by label value, the background first.
        notes: plain values for the record (protocol, checkpoint, data, ...).
        surfaces: whether to measure distances between surfaces too.
    """

    folder: str
    label_names: Sequence[str]
    notes: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    surfaces: bool = True
    scores: list[OrganScore] = field(default_factory=list, init=False)
    shown: dict[str, tuple[Planes, Planes, Planes]] = field(default_factory=dict, init=False)

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self.scores, self.shown = [], {}

    def _score(self, engine: Engine) -> None:
        for item in engine.state.output:
            image, label, pred = item["image"], item["label"], item["pred"]
            name = str(image.meta.get("filename_or_obj", f"case {len(self.shown)}"))
            spacing = np.asarray(label.pixdim).tolist()
            found, true = (np.asarray(v.as_tensor().cpu()[0]).round().astype(np.uint8) for v in (pred, label))
            self.scores += score_organs(found, true, self.label_names, spacing, name, self.surfaces)
            self.shown[name] = central_planes(image, true, found)

    def _write(self, engine: Engine) -> None:
        parts = idist.all_gather((self.scores, self.shown))
        if not is_first_process():
            return
        # Where there are fewer cases than processes, all of them score all cases.
        scores = {(s.case, s.organ): s for part, _ in parts for s in part}
        shown = {path: planes for _, part in parts for path, planes in part.items()}
        names = tell_apart(shown, os.path.basename)
        renamed = (replace(s, case=names[s.case]) for s in scores.values())
        self.scores = sorted(renamed, key=lambda s: (s.case, self.label_names.index(s.organ)))
        self.shown = {names[path]: planes for path, planes in shown.items()}
        folder, summary = Path(self.folder), summarise(self.scores, self.label_names)
        write_csv(folder / "cases.csv", [_row(s) for s in self.scores], [f.name for f in fields(OrganScore)])
        metrics = {name: torch.as_tensor(value).tolist() for name, value in engine.state.metrics.items()}
        examples = rank_examples(self.scores)
        write_json(folder / "scores.json", _finite({**metrics, **summary, "examples": examples, "_run_": self.notes}))
        write_atomic(folder / "scores.png", draw_scores(self.scores, self.label_names))
        write_atomic(folder / "examples.png", draw_examples(self.shown, self.scores, self.label_names))
        for line in _as_table(summary).splitlines():
            logger.info("%s", line, extra=RESULT)
        logger.info("cases.csv, scores.json, scores.png and examples.png in %s", self.folder)


def _row(score: OrganScore) -> dict[str, Any]:
    """Round the numbers; those that are undefined are empty."""
    row = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in asdict(score).items()}
    return {name: "" if value == "nan" else value for name, value in row.items()}


def _finite(value: Any) -> Any:
    """NaN is no JSON; it becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_table(summary: Mapping[str, Any]) -> str:
    width = max(len(organ) for organ in summary["organs"]) + 2
    lines = [f"{'organ':{width}}{'Dice':>14}{'pooled':>9}{'HD95 mm':>15}{'ASD mm':>14}  missed"]
    columns = ("dice", "pooled_dice", "hd95_mm", "asd_mm")
    rows = [(name, *(organ[c] for c in columns), organ["missed"]) for name, organ in summary["organs"].items()]
    rows.append(("mean", *(summary[f"mean_{c}"] for c in columns), sum(row[-1] for row in rows)))
    for name, dice, pooled, hd95, asd, missed in rows:
        cells = [_with_spread(v, p) for v, p in ((dice, 3), (hd95, 1), (asd, 2))]
        lines.append(f"{name:{width}}{cells[0]:>14}{pooled:>9.3f}{cells[1]:>15}{cells[2]:>14}{missed:>8}")
    return "\n".join(lines)


def _with_spread(value: Mapping[str, float], digits: int) -> str:
    """A mean, with its standard deviation where there are several cases."""
    spread = f" ± {value['sd']:.{digits}f}" if math.isfinite(value["sd"]) else ""
    return f"{value['mean']:.{digits}f}{spread}"


def central_planes(image: MetaTensor, label: np.ndarray, pred: np.ndarray) -> tuple[Planes, Planes, Planes]:
    """Cut the image, the label and the prediction where most of the organs is, on the grid of the file.

    Args:
        image: (1, X, Y, Z) on the network's grid, with MONAI's record of the file's.
        label: (X, Y, Z), on the file's grid.
        pred: the same shape.
    """
    affine, centre = np.asarray(image.meta["original_affine"]), find_centre(label)
    if centre is None:
        centre = find_centre(pred) or tuple(length // 2 for length in label.shape)
    step = max(round((image.numel() / 100_000) ** (1 / 3)), 1)
    low, high = map(float, np.percentile(image.as_tensor()[:, ::step, ::step, ::step].float().cpu().numpy(), (1, 99)))
    found, true = cut_planes(pred, affine, centre), cut_planes(label, affine, centre)
    planes = []
    for axis, plane in zip(np.argsort(nib.io_orientation(affine)[:, 0])[::-1], true, strict=True):
        # Slice by slice: a whole CT on the grid of its file would take seconds and more than a gigabyte.
        place = np.where(np.arange(3) == axis, centre, 0)
        moved = nib.affines.from_matvec(affine[:3, :3], nib.affines.apply_affine(affine, place))
        size = np.where(np.arange(3) == axis, 1, label.shape)
        slab = MetaTensor(torch.empty(0), meta={**image.meta, "original_affine": moved, "spatial_shape": size})
        restored = np.asarray(RestoreGrid(outside=low)(image, slab).cpu())[0]
        cut = next(p for p in cut_planes(restored, affine, (centre - place).tolist()) if p.name == plane.name)
        planes.append(cut._replace(values=to_grey(cut.values, (low, max(high, low + 1e-6)))))
    return planes, true, found


def draw_scores(scores: Sequence[OrganScore], label_names: Sequence[str]) -> bytes:
    """Draw the spread over cases of each organ's Dice and 95th-percentile Hausdorff distance, as a PNG."""
    organs = list(label_names[1:])
    panels = [("dice", "Dice")]
    if any(math.isfinite(s.hd95_mm) for s in scores):
        panels.append(("hd95_mm", "95th-percentile Hausdorff distance, mm"))
    figure, rows = make_figure(max(6, 1.5 + 0.75 * len(organs)), 3.6 * len(panels), len(panels))
    for axes, (name, title) in zip(np.atleast_1d(rows), panels, strict=True):
        values = [[v for s in scores if s.organ == o and math.isfinite(v := getattr(s, name))] for o in organs]
        axes.boxplot(values, tick_labels=organs, showfliers=False, medianprops={"color": "black"})
        for place, own in enumerate(values, 1):
            spread = np.linspace(-0.15, 0.15, len(own)) if len(own) > 1 else [0.0]
            axes.plot(place + np.asarray(spread[: len(own)]), own, "o", markersize=3, alpha=0.6, color="tab:blue")
        axes.set_ylabel(title)
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
        axes.tick_params(axis="x", rotation=30 if len(organs) > 3 else 0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_ylim((-0.02, 1.02) if name == "dice" else (0, None))
    cases = len({s.case for s in scores})
    figure.suptitle(f"{cases} case{'s' * (cases != 1)}, a point each; boxes are quartiles")
    return to_png(figure, dpi=110)


def draw_examples(
    shown: Mapping[str, tuple[Planes, Planes, Planes]], scores: Sequence[OrganScore], label_names: Sequence[str]
) -> bytes:
    """Draw the worst, the median and the best case, as a PNG: the label as a line, the prediction as a shade.

    Args:
        shown: by case, the planes of the image (0 to 255), of the label and of the prediction.
        scores: of all cases.
        label_names: by label value, the background first.
    """
    means, tiles = case_means(scores), []
    for rank, case in reversed(rank_examples(scores).items()):
        image, label, pred = shown[case]
        picture = draw_planes(image, pred, label, window=(0, 255), panel=400)
        tiles.append(draw_tile(picture, f"{rank}: {case}, Dice {means[case]:.3f}"))
    legend = dict(enumerate(label_names[1:], 1))
    return to_png(draw_sheet(tiles, "line: label; shade: prediction", legend, columns=1))
