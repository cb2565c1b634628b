"""Detection scores inside MONAI's evaluator, and the report of an evaluation: detections, scores, curve, pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor

from vdt_workflows.drawing import make_figure, to_png
from vdt_workflows.errors import check_choice
from vdt_workflows.evaluation.detection import (
    RATES,
    RULES,
    KeySlice,
    average_precision,
    box_iou,
    draw_froc,
    froc,
    score_detections,
)
from vdt_workflows.files import write_atomic, write_json
from vdt_workflows.naming import tell_apart
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)


def as_key_slices(predictions: Tensor, labels: Sequence[Mapping[str, Any]]) -> list[KeySlice]:
    """Bring detections (N, 100, 6) back to the pixels of their files, and put them together with the labels."""
    rows = predictions.detach().cpu().numpy()
    slices = []
    for found, label in zip(rows, labels, strict=True):
        found = found[found[:, 5] > 0]
        boxes = found[:, :4] / np.tile(np.asarray(label["scale"], float), 2)
        slices.append(KeySlice(boxes, found[:, 4], **label["truth"]))
    return slices


class DetectionScores(Metric):
    """Metric: the mean sensitivity at 0.5, 1, 2 and 4 false positives per image, by the rule asked for.

    It takes the network's detections (N, 100, 6) and the labels of `collate_key_slices`. Under its own name with an
    ending, the evaluator's metrics also get the sensitivities at the single rates and COCO's average precision.

    Args:
        rule: "lenient", as published, or "strict" (see `detection.Matches.judge`).

    Attributes:
        slices: what was scored, of all processes, once the evaluation is complete.
    """

    def __init__(self, rule: str = "lenient") -> None:
        check_choice("rule", rule, RULES)
        self.rule = rule
        self.slices: list[KeySlice] = []
        super().__init__(output_transform=lambda output: (output["pred"], output["label"]))

    def reset(self) -> None:
        """Forget what was scored."""
        self.slices = []

    def update(self, output: tuple[Tensor, Sequence[Mapping[str, Any]]]) -> None:
        """Take a batch of detections and labels."""
        self.slices += as_key_slices(*output)

    def compute(self) -> float:
        """Score all slices of all processes."""
        self.slices = [slice_ for part in idist.all_gather(self.slices) for slice_ in part]
        return froc(self.slices, self.rule).scores()["mean_sensitivity_0.5_to_4"]

    def completed(self, engine: Engine, name: str) -> None:
        """Store the score, and the others under `<name>_...`, in the metrics of the engine."""
        super().completed(engine, name)
        curve = froc(self.slices, self.rule)
        precision = average_precision(self.slices)
        found = {f"at_{rate:g}": curve.at(rate) for rate in RATES} | {n: precision[n] for n in ("AP_50", "mAP")}
        engine.state.metrics.update({f"{name}_{ending}": value for ending, value in found.items()})


@dataclass(eq=False)
class DetectionReport:
    """Handler: write the detections of an evaluation and their scores. The first process writes for all.

    - `detections.json`: boxes and scores of each slice, in pixels of its file
    - `scores.json`: what `score_detections` gives, with the notes
    - `froc.png`: the curve by both rules
    - `slices/*.png`: key slices with lesions found and missed and false positives, at the threshold of one false
      positive per image

    Args:
        folder: where they go.
        scores: the evaluator's metric.
        intervals: number of bootstrap samples of patients, 0 for no intervals.
        pictures: number of slices to draw, evenly spread over the evaluation.
        notes: plain values for the record (checkpoint, split, ...).
    """

    folder: str
    scores: DetectionScores
    _: KW_ONLY
    intervals: int = 1000
    pictures: int = 24
    notes: Mapping[str, Any] = field(default_factory=dict)

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator, after its metric."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._keep)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        self._drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._step = max(1, (engine.state.epoch_length or 1) // max(self.pictures, 1))

    def _keep(self, engine: Engine) -> None:
        """Keep the centre slice of some batches, for the pictures."""
        if (engine.state.iteration - 1) % self._step or len(self._drawn) >= self.pictures:
            return
        stack, label = engine.state.output["image"][0], engine.state.output["label"][0]
        self._drawn[label["truth"]["name"]] = stack[len(stack) // 2].float().cpu().numpy(), np.asarray(label["scale"])

    def _write(self, engine: Engine) -> None:
        if not is_first_process():
            return
        slices, folder = self.scores.slices, Path(self.folder)
        scored = {**engine.state.metrics, **score_detections(slices, intervals=self.intervals), "_run_": self.notes}
        write_json(folder / "scores.json", scored)
        listed = [
            {"image": s.name, "boxes": s.boxes.round(2).tolist(), "scores": s.scores.round(6).tolist()} for s in slices
        ]
        write_json(folder / "detections.json", listed, indent=None)
        curves = {rule: froc(slices, rule) for rule in RULES}
        write_atomic(folder / "froc.png", draw_froc(curves, f"{len(slices)} key slices"))
        curve = curves["lenient"]
        allowed = np.flatnonzero(curve.false_positives <= 1)
        threshold = float(curve.thresholds[allowed[-1]]) if len(allowed) else 1.0
        files = tell_apart(self._drawn, lambda name: name.removeprefix("Images_png/").replace("/", "_"))
        for slice_ in slices:
            if slice_.name in files:
                picture = draw_slice(*self._drawn[slice_.name], slice_, threshold)
                write_atomic((folder / "slices" / files[slice_.name]).with_suffix(".png"), picture)
        for rule in RULES:
            found = curves[rule].scores()
            shown = ", ".join(f"{k.removeprefix('sensitivity_')} {100 * v:.2f}" for k, v in found.items() if "_at" in k)
            logger.info("%s: sensitivity (%%) %s", rule, shown)


def draw_slice(pixels: np.ndarray, scale: np.ndarray, slice_: KeySlice, threshold: float) -> bytes:
    """Draw a key slice (X, Y), `scale` times as large as its file, with lesions and detections from `threshold` on.

    Lesions: green where found, orange where missed, grey where ignored. Detections: blue with their score, red where
    they overlap no lesion.
    """
    from matplotlib.patches import Rectangle

    width, height = pixels.shape / scale
    figure, axes = make_figure(6, 6 * height / width + 0.5)
    axes.imshow(pixels.T, cmap="gray", extent=(0, width, height, 0))
    shown = slice_.scores >= threshold
    overlap = box_iou(slice_.boxes[shown], slice_.lesions) >= 0.5
    found, hits = np.asarray(overlap.any(0)), np.asarray(overlap.any(1))

    def outline(box: np.ndarray, colour: str, **style: Any) -> None:
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, **style))

    for box, is_found, ignored in zip(slice_.lesions, found, slice_.ignored, strict=True):
        outline(box, "0.6" if ignored else "limegreen" if is_found else "orange", linewidth=2)
    for box, score, hit in zip(slice_.boxes[shown], slice_.scores[shown], hits, strict=True):
        colour = "deepskyblue" if hit else "red"
        outline(box, colour, linewidth=1, linestyle="--")
        axes.text(box[2] + 2, box[1], f"{score:.2f}", color=colour, fontsize=7, va="top")
    missed, false = int((~found & ~slice_.ignored).sum()), int((~hits).sum())
    axes.set_title(f"{slice_.name}\nmissed {missed} of {int((~slice_.ignored).sum())}, false {false}, "
                   f"from score {threshold:.2f}", fontsize=8, parse_math=False)  # fmt: skip
    axes.set_axis_off()
    return to_png(figure)
