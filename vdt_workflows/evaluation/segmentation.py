"""Score segmented cases organ by organ, and leave a table, a summary and pictures of them."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics.utils import get_edge_surface_distance

from vdt_transforms import RestoreGrid
from vdt_workflows.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
SMOOTH = 1e-5  # of the published pooled Dice
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}


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
    from scipy.ndimage import find_objects  # comes with scikit-image, and only evaluation needs it

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
    """The box around both, with a margin of one voxel, so that surfaces stay surfaces."""
    sides = zip(a, b, shape, strict=True)
    return tuple(slice(max(min(u.start, v.start) - 1, 0), min(max(u.stop, v.stop) + 1, n)) for u, v, n in sides)


def _distances(masks: Sequence[np.ndarray], spacing: Sequence[float]) -> tuple[float, float]:
    """The values of MONAI's `compute_hausdorff_distance` and `compute_average_surface_distance`, in half their time.

    Each of the two would find the surfaces and the distances between them anew.
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


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    known = np.asarray([v for v in values if math.isfinite(v)])
    mean = float(known.mean()) if len(known) else math.nan
    return {"mean": mean, "sd": float(known.std(ddof=1)) if len(known) > 1 else math.nan, "n": len(known)}


@dataclass
class _Shown:
    """What the picture of a case needs: for each plane the image, label and prediction, and the sizes of a pixel."""

    case: str
    planes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, float]] = field(default_factory=dict)


class CaseScores:
    """Handler: score each case of an evaluation, on the grid of its own label, and write what was found.

    Into the folder go `cases.csv` (a row for each case and organ), `scores.json` (the engine's metrics, the notes, and
    what `summarise` gives), `scores.png` (the spread of each organ's Dice and distances) and `examples.png` (the worst,
    the median and the best case in three planes: the label as a line, the prediction as a shade). Processes share
    their cases.

    Args:
        folder: where the files go.
        label_names: by label value, the background first.
        notes: plain values for the record (protocol, checkpoint, data, ...).
        surfaces: whether to measure distances between surfaces too.
        writes: whether this process writes (rank 0).
    """

    def __init__(
        self,
        folder: str,
        label_names: Sequence[str],
        notes: Mapping[str, Any] | None = None,
        *,
        surfaces: bool = True,
        writes: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.label_names = list(label_names)
        self.notes = dict(notes or {})
        self.surfaces = surfaces
        self.writes = writes
        self.scores: list[OrganScore] = []
        self.shown: list[_Shown] = []

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._score)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self.scores, self.shown = [], []

    def _score(self, engine: Engine) -> None:
        for item in engine.state.output:
            image, label, pred = item["image"], item["label"], item["pred"]
            name = Path(str(image.meta.get("filename_or_obj", f"case {len(self.shown)}"))).name
            spacing = np.asarray(label.pixdim).tolist()
            found, true = (np.asarray(v.as_tensor().cpu()[0]).round().astype(np.uint8) for v in (pred, label))
            self.scores += score_organs(found, true, self.label_names, spacing, name, self.surfaces)
            self.shown.append(_central_planes(name, image, found, true, spacing))

    def _write(self, engine: Engine) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, (self.scores, self.shown))
            # Where there are fewer cases than processes, all of them score all cases.
            self.scores = list({(s.case, s.organ): s for scores, _ in parts for s in scores}.values())
            self.shown = list({s.case: s for _, shown in parts for s in shown}.values())
        self.scores.sort(key=lambda s: (s.case, self.label_names.index(s.organ)))
        summary = summarise(self.scores, self.label_names)
        if not self.writes:
            return
        write_atomic(self.folder / "cases.csv", _as_csv(self.scores))
        metrics = {name: torch.as_tensor(value).tolist() for name, value in engine.state.metrics.items()}
        record = {**metrics, **summary, "_run_": self.notes}
        write_atomic(self.folder / "scores.json", json.dumps(_finite(record), indent=2, default=str).encode())
        write_atomic(self.folder / "scores.png", draw_scores(self.scores, self.label_names))
        write_atomic(self.folder / "examples.png", draw_examples(self.shown, self.scores, self.label_names))
        for line in _as_table(summary).splitlines():
            logger.info("%s", line)
        logger.info("cases.csv, scores.json, scores.png and examples.png in %s", self.folder)


def _as_csv(scores: Sequence[OrganScore]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(OrganScore.__dataclass_fields__))
    writer.writeheader()
    for score in scores:
        row = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(score).items()}
        writer.writerow({k: "" if v == "nan" else v for k, v in row.items()})
    return text.getvalue().encode()


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


def _central_planes(
    case: str, image: MetaTensor, pred: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> _Shown:
    """Cut the case where its organs are, in the three planes of the body, as a radiologist looks at it."""
    values = image.as_tensor()
    low, high = np.percentile(values.flatten()[:: max(values.numel() // 100_000, 1)].float().cpu().numpy(), (1, 99))
    grey = ((values - low) / max(high - low, 1e-6)).clamp(0, 1).mul(255).to(torch.uint8)
    restored = RestoreGrid()(MetaTensor(grey, affine=image.affine), image)
    affine = np.asarray(image.meta["original_affine"])
    volumes, sizes = _to_body_axes([np.asarray(restored)[0], label, pred], affine, spacing)
    organs = volumes[1] > 0 if volumes[1].any() else volumes[2] > 0
    shown = _Shown(case)
    for plane, axis in PLANES.items():
        others = tuple(a for a in range(3) if a != axis)
        counts = organs.sum(axis=others)
        place = int(counts.argmax()) if counts.any() else organs.shape[axis] // 2
        cut = [np.take(v, place, axis=axis).T[::-1].copy() for v in volumes]  # rows: head or front on top
        shown.planes[plane] = (*cut, float(sizes[others[1]] / sizes[others[0]]))
    return shown


def _to_body_axes(
    volumes: list[np.ndarray], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn volumes to axes that run to the left, the front and the head (the viewer faces the patient)."""
    import nibabel as nib

    order = nib.io_orientation(affine)
    wanted = nib.orientations.ornt_transform(order, nib.orientations.axcodes2ornt("LAS"))
    turned = [nib.orientations.apply_orientation(volume, wanted) for volume in volumes]
    sizes = np.empty(3)
    sizes[wanted[:, 0].astype(int)] = spacing
    return turned, sizes


def draw_scores(scores: Sequence[OrganScore], label_names: Sequence[str]) -> bytes:
    """Draw the spread over cases of each organ's Dice and 95th-percentile Hausdorff distance, as a PNG."""
    from matplotlib.figure import Figure  # half a second that only a run that draws pays

    organs = list(label_names[1:])
    panels = [("dice", "Dice")]
    if any(math.isfinite(s.hd95_mm) for s in scores):
        panels.append(("hd95_mm", "95th-percentile Hausdorff distance, mm"))
    figure = Figure(figsize=(max(6, 1.5 + 0.75 * len(organs)), 3.6 * len(panels)), layout="constrained")
    for axes, (name, title) in zip(np.atleast_1d(figure.subplots(len(panels), 1)), panels, strict=True):
        values = [[v for s in scores if s.organ == o and math.isfinite(v := getattr(s, name))] for o in organs]
        axes.boxplot(values, tick_labels=organs, showfliers=False, medianprops={"color": "black"})
        for place, own in enumerate(values, 1):
            spread = np.linspace(-0.15, 0.15, len(own)) if len(own) > 1 else [0.0]
            axes.plot(place + np.asarray(spread[: len(own)]), own, "o", markersize=3, alpha=0.6, color="tab:blue")
        axes.set_ylabel(title)
        axes.tick_params(axis="x", rotation=30 if len(organs) > 3 else 0)
        axes.grid(axis="y", alpha=0.3)
        if name == "dice":
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_ylim(bottom=0)
    cases = len({s.case for s in scores})
    figure.suptitle(f"{cases} case{'s' * (cases != 1)}, a point each; boxes are quartiles")
    return _png(figure)


def draw_examples(shown: Sequence[_Shown], scores: Sequence[OrganScore], label_names: Sequence[str]) -> bytes:
    """Draw the worst, the median and the best case in three planes, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    means = case_means(scores)
    ranked = sorted(shown, key=lambda s: -1.0 if math.isnan(means[s.case]) else means[s.case])
    ranks = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    if len(shown) == 1:
        ranks = {"the only case": shown[0]}
    chosen = {case.case: (rank, case) for rank, case in ranks.items()}  # of two cases each comes once
    colours = colormaps["tab20" if len(label_names) > 11 else "tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(12, 4.1 * len(chosen) + 0.8), layout="constrained")
    grid = figure.subplots(len(chosen), len(PLANES), squeeze=False)
    for row, (rank, case) in zip(grid, reversed(chosen.values()), strict=True):
        for axes, (plane, (grey, label, pred, aspect)) in zip(row, case.planes.items(), strict=True):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255, aspect=aspect)
            shade = np.zeros((*pred.shape, 4))
            for value in range(1, len(label_names)):
                colour = colours[(value - 1) % len(colours)]
                shade[pred == value] = (*colour, 0.45)
                if (label == value).any():
                    axes.contour(label == value, [0.5], colors=[colour], linewidths=1.2)
            axes.imshow(shade, aspect=aspect, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            title = f"{rank}: {case.case}, Dice {means[case.case]:.3f}" if plane == "axial" else plane
            axes.set_title(title, fontsize="medium")
    handles = [Line2D([], [], color=colours[i % len(colours)], lw=3, label=n) for i, n in enumerate(label_names[1:])]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), fontsize="small")
    figure.suptitle("line: label; shade: prediction; patient's right on the viewer's left", fontsize="medium")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
