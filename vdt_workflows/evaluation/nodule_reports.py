"""Handlers that report on nodules: how well a test went, and what a network says of new ones."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from vdt_workflows.evaluation.classification import draw_reliability, draw_roc, score_binary
from vdt_workflows.files import write_atomic

logger = logging.getLogger(__name__)

DRAWN = 60  # crops in the picture


class ReportNodules:
    """Handler: report an evaluation of benign against malignant.

    Writes `scores.json` (the engine's metrics and those of `score_binary`, with the notes), `predictions.csv` (each
    nodule's patient, label and score), `roc.png` and `reliability.png`. With several processes each needs the handler,
    and the first writes for all.

    The batches need `nodule_id`, `patient_id` and `label`, and the evaluator's output the probabilities under `pred`.

    Args:
        folder: where the files go.
        threshold: scores from here on are called malignant.
        notes: plain values for the record: checkpoint, protocol, label rule, split.
        title: heading of the pictures.
        writes: whether this process writes (rank 0).
    """

    def __init__(
        self,
        folder: str,
        *,
        threshold: float = 0.5,
        notes: Mapping[str, Any] | None = None,
        title: str = "",
        writes: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.threshold = threshold
        self.notes = notes or {}
        self.title = title
        self.writes = writes
        self.found: dict[str, tuple[str, int, float]] = {}

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.STARTED, lambda engine: self.found.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            score = float(output["pred"][1])
            self.found[item["nodule_id"]] = (item["patient_id"], int(item["label"]), score)

    def _write(self, engine: Engine) -> None:
        found = _of_all_processes(self.found)
        if not self.writes:
            return
        names = sorted(found)
        patients, labels, scores = zip(*(found[name] for name in names), strict=True)
        figures = score_binary(labels, scores, patients, threshold=self.threshold)
        engine_scores = {name: torch.as_tensor(value).tolist() for name, value in engine.state.metrics.items()}
        content = {**engine_scores, **figures, "_run_": self.notes}
        write_atomic(self.folder / "scores.json", json.dumps(content, indent=2, default=str).encode())
        called = [int(score >= self.threshold) for score in scores]
        rows = list(zip(names, patients, labels, [f"{score:.6f}" for score in scores], called, strict=True))
        _write_csv(self.folder / "predictions.csv", ["nodule_id", "patient_id", "label", "score", "called"], rows)
        y, p = np.array(labels), np.array(scores)
        write_atomic(self.folder / "roc.png", draw_roc(y, p, figures, self.title))
        write_atomic(self.folder / "reliability.png", draw_reliability(y, p, figures, self.title))
        low, high = figures["auc_interval_95"]
        logger.info(
            "%s: AUC %.3f (%.3f to %.3f), accuracy %.3f (the more frequent class alone: %.3f), balanced accuracy %.3f,"
            " sensitivity %.3f, specificity %.3f, calibration error %.3f; %d nodules of %d patients; written to %s",
            *(self.title or "evaluation", figures["auc"], low, high, figures["accuracy"], figures["majority_accuracy"]),
            *(figures["balanced_accuracy"], figures["sensitivity"], figures["specificity"], figures["ece"]),
            *(figures["count"], figures["patients"], self.folder),
        )


class SaveMalignancy:
    """Handler: write the probability that each nodule is malignant, and draw the crops that were looked at.

    Writes `malignancy.json`, `malignancy.csv` and `crops.png` (three planes of each crop in RAS, as radiologists see
    them). The batches need the crops under `image` and their `position` in mm, and may have a `nodule_id`; the
    evaluator's output needs the probabilities under `pred`.

    Args:
        folder: where the files go.
        class_names: of benign and malignant.
        threshold: scores from here on are called malignant.
        shown: values of the crop that are drawn black and white.
        notes: plain values for the record.
    """

    def __init__(
        self,
        folder: str,
        class_names: Sequence[str],
        *,
        threshold: float = 0.5,
        shown: tuple[float, float] = (0.0, 1.0),
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.class_names = class_names
        self.threshold = threshold
        self.shown = shown
        self.notes = notes or {}
        self.found: list[dict[str, Any]] = []
        self.crops: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            score = float(output["pred"][1])
            file = str(item["image"].meta["filename_or_obj"])
            x, y, z = (round(float(value), 2) for value in item["position"])
            called = self.class_names[int(score >= self.threshold)]
            name = item.get("nodule_id", Path(file).name.split(".")[0])
            place = {"x_mm": x, "y_mm": y, "z_mm": z}
            self.found.append({"image": file, "nodule_id": name, **place, "malignancy": score, "class": called})
            if len(self.crops) < DRAWN:
                self.crops.append(item["image"].cpu().numpy()[0])

    def _write(self, engine: Engine) -> None:
        content = {"nodules": self.found, "threshold": self.threshold, "_run_": self.notes}
        write_atomic(self.folder / "malignancy.json", json.dumps(content, indent=2, default=str).encode())
        rows = [[*nodule.values()] for nodule in self.found]
        _write_csv(self.folder / "malignancy.csv", [*self.found[0]], rows)
        titles = [f"{nodule['nodule_id']}: {nodule['class']} {nodule['malignancy']:.2f}" for nodule in self.found]
        write_atomic(self.folder / "crops.png", draw_crops(self.crops, titles, self.shown))
        more = f" (the first {DRAWN} drawn)" if len(self.found) > DRAWN else ""
        for nodule, title in zip(self.found[:DRAWN], titles, strict=False):
            logger.info("%s at (%s, %s, %s) mm", title, nodule["x_mm"], nodule["y_mm"], nodule["z_mm"])
        logger.info("%d nodules: malignancy.json, .csv and crops.png%s in %s", len(self.found), more, self.folder)


def draw_crops(crops: Sequence[np.ndarray], titles: Sequence[str], shown: tuple[float, float]) -> bytes:
    """Draw three planes through the middle of each cube (X, Y, Z) in RAS, side by side: axial, coronal, sagittal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only a run that draws pays
    from matplotlib.figure import Figure

    columns = min(3, len(crops))
    rows = -(-len(crops) // columns)
    # Fixed places: the automatic layouts take a minute for sixty nodules.
    figure = Figure(figsize=(4.8 * columns, 1.85 * rows), facecolor="white")
    for i, (crop, title) in enumerate(zip(crops, titles, strict=False)):
        x, y, z = (n // 2 for n in crop.shape)
        # The patient's right on the left and front on top; front on the left in the sagittal plane.
        planes = [plane.T[::-1] for plane in (crop[::-1, :, z], crop[::-1, y, :], crop[x, ::-1, :])]
        gap = np.full((len(planes[0]), 2), shown[1])
        row, column = divmod(i, columns)
        width, height = 1 / columns, 1 / rows
        axes = figure.add_axes((column * width + 0.01, 1 - (row + 1) * height, width - 0.02, height * 0.86))
        picture = np.hstack([planes[0], gap, planes[1], gap, planes[2]])
        axes.imshow(picture, cmap="gray", vmin=shown[0], vmax=shown[1], interpolation="nearest")
        axes.set_title(title, fontsize="small", parse_math=False, pad=3)
        axes.set_axis_off()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _of_all_processes(found: dict[str, Any]) -> dict[str, Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def _write_csv(path: Path, heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(heading)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
