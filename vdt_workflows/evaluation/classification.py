"""Benign against malignant: figures with an interval by patient, ROC curve, calibration, and what a run reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from pydicom.sr.codedict import codes

from vdt_workflows.drawing import Plane, cut_planes, draw_planes, draw_sheet, draw_tile, make_figure, to_png
from vdt_workflows.evaluation.dicom_seg import writes_dicom
from vdt_workflows.evaluation.dicom_sr import CANCER, FORMATS, Finding, save_report
from vdt_workflows.files import write_atomic, write_csv, write_json
from vdt_workflows.naming import result_name
from vdt_workflows.progress import RESULT
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)

RESAMPLES = 2000
BINS = 10
DRAWN = 60  # crops in the picture


def score_binary(
    labels: Sequence[int],
    scores: Sequence[float],
    patients: Sequence[str],
    *,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Score probabilities of the class 1 against labels.

    A figure that is undefined, such as the precision where nothing is predicted positive, is None.

    Args:
        labels: 0 or 1, both present.
        scores: probability of 1, from 0 to 1.
        patients: who each one is of. The interval of the AUC comes from drawing patients with replacement, since the
            nodules of one patient are not independent.
        threshold: scores from here on count as class 1.

    Returns:
        `auc` with `auc_interval_95`, `accuracy` with `majority_accuracy` (of always giving the more frequent class),
        `balanced_accuracy`, `sensitivity`, `specificity`, `precision`, `f1`, `confusion_matrix`, `ece` (expected
        calibration error of ten bins), and `threshold`, `count`, `positives` and `patients`.

    Raises:
        ValueError: if a class is missing, or a score is no probability.
    """
    y, p = np.asarray(labels, int), np.asarray(scores, float)
    if not (0 < y.sum() < len(y)):
        raise ValueError(f"scores need both classes, got {int(y.sum())} of class 1 among {len(y)}")
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"scores must be probabilities from 0 to 1, got {p.min():g} to {p.max():g}")
    positive = p >= threshold
    tp, fp = int((positive & (y == 1)).sum()), int((positive & (y == 0)).sum())
    fn, tn = int(y.sum()) - tp, int((y == 0).sum()) - fp
    sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
    low, high = auc_interval(y, p, patients)
    centres, rates, counts = calibration_bins(y, p)
    return {
        "auc": float(weighted_auc(y, p, np.ones((1, len(y))))[0]),
        "auc_interval_95": [low, high],
        "accuracy": (tp + tn) / len(y),
        "majority_accuracy": float(max(y.mean(), 1 - y.mean())),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": tp / (tp + fp) if tp + fp else None,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "confusion_matrix": {"true_positive": tp, "false_positive": fp, "false_negative": fn, "true_negative": tn},
        "ece": float(np.nansum(counts * np.abs(centres - rates)) / len(y)),
        "threshold": threshold,
        "count": len(y),
        "positives": int(y.sum()),
        "patients": len(set(patients)),
    }


def auc_interval(
    labels: np.ndarray, scores: np.ndarray, patients: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Interval of 95 % of the AUC, by drawing as many patients as there are, with replacement."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    drawn = weighted_auc(labels, scores, draws[:, owner])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a draw without one of the classes has none
    return float(low), float(high)


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights (R, N), ties counted half; NaN where a class has no weight."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    weights = weights[:, order]
    positive = np.add.reduceat(weights * (labels[order] == 1), starts, axis=1)  # of each distinct score
    negative = np.add.reduceat(weights * (labels[order] == 0), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, (positive * below).sum(1) / np.where(pairs > 0, pairs, 1), np.nan)


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive rate, true positive rate and threshold at each distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each distinct score
    true, false = np.cumsum(labels[order] == 1)[last], np.cumsum(labels[order] == 0)[last]
    thresholds = np.concatenate(([np.inf], scores[order][last]))
    return np.concatenate(([0], false / false[-1])), np.concatenate(([0], true / true[-1])), thresholds


def calibration_bins(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean score, part of class 1 and number in each bin; the first two are NaN where a bin is empty."""
    from monai.metrics import calibration_binning  # since 1.6; inference runs on older ones too

    pair = (torch.as_tensor(np.asarray(values, np.float32))[None, None] for values in (scores, labels))
    return tuple(bins[0, 0].double().numpy() for bins in calibration_binning(*pair, num_bins=BINS))


def draw_roc(labels: np.ndarray, scores: np.ndarray, figures: Mapping[str, Any], title: str = "") -> bytes:
    """Draw the ROC curve as a PNG, with some thresholds along it."""
    figure, axes = _square(title)
    false, true, thresholds = roc_curve(labels, scores)
    low, high = figures["auc_interval_95"]
    axes.plot(false, true, color="C0", label=f"AUC {figures['auc']:.3f} ({low:.3f} to {high:.3f})")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="chance 0.500")
    shown: list[tuple[float, float]] = []
    for wanted in (figures["threshold"], 0.1, 0.3, 0.5, 0.7, 0.9):
        at = int(np.flatnonzero(thresholds >= wanted)[-1])  # the lowest score that still counts as 1
        place = (float(false[at]), float(true[at]))
        if any(np.hypot(place[0] - x, place[1] - y) < 0.05 for x, y in shown):
            continue  # the labels would lie on each other
        own = not shown
        shown.append(place)
        axes.plot(*place, "o", color="C1" if own else "C0", markersize=7 if own else 4)
        axes.annotate(f"{wanted:g}", place, (7, -11), textcoords="offset points", fontsize="small")
    own_point = f"threshold {figures['threshold']:g}: sensitivity {figures['sensitivity']:.3f}"
    axes.plot([], [], "o", color="C1", label=f"{own_point},\nspecificity {figures['specificity']:.3f}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.legend(loc="lower right", fontsize="small", title="dots: thresholds of the score", title_fontsize="small")
    return to_png(figure)


def draw_reliability(labels: np.ndarray, scores: np.ndarray, figures: Mapping[str, Any], title: str = "") -> bytes:
    """Draw how often the class 1 is true for each bin of scores, as a PNG."""
    figure, axes = _square(title)
    centres, rates, counts = calibration_bins(labels, scores)
    used = counts > 0
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="calibrated")
    axes.plot(centres[used], rates[used], "o-", color="C0", label=f"expected calibration error {figures['ece']:.3f}")
    for x, y, count in zip(centres[used], rates[used], counts[used], strict=True):
        axes.annotate(f"{int(count)}", (x, y), (6, -11), textcoords="offset points", fontsize="small")
    axes.set(xlabel="mean score of the bin", ylabel="part that is malignant")
    axes.legend(loc="upper left", fontsize="small", title="numbers: nodules in the bin", title_fontsize="small")
    return to_png(figure)


def _square(title: str) -> tuple[Any, Any]:
    figure, axes = make_figure(5.4, 5.6)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="small", parse_math=False)
    return figure, axes


@dataclass(eq=False)
class ReportNodules:
    """Handler: report an evaluation of benign against malignant.

    Writes `scores.json` (the engine's metrics and those of `score_binary`, with the notes), `predictions.csv` (each
    nodule's patient, label and score), `roc.png` and `reliability.png`. With several processes each needs the handler,
    and the first one writes for all.

    The batches need `nodule_id`, `patient_id` and `label`, and the evaluator's output the probabilities under `pred`.

    Args:
        folder: where the files go.
        threshold: scores from here on count as malignant.
        notes: plain values for the record: checkpoint, protocol, label rule, split.
        title: heading of the pictures.
    """

    folder: str
    _: KW_ONLY
    threshold: float = 0.5
    notes: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    found: dict[str, tuple[str, int, float]] = field(default_factory=dict, init=False)

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
        found = {name: nodule for part in idist.all_gather(self.found) for name, nodule in part.items()}
        if not is_first_process():
            return
        rows = [(name, *found[name], int(found[name][2] >= self.threshold)) for name in sorted(found)]
        _, patients, labels, scores, _ = zip(*rows, strict=True)
        figures = score_binary(labels, scores, patients, threshold=self.threshold)
        folder = Path(self.folder)
        write_json(folder / "scores.json", {**engine.state.metrics, **figures, "_run_": self.notes})
        columns = ["nodule_id", "patient_id", "label", "score", "called"]
        table = [{**dict(zip(columns, row, strict=True)), "score": f"{row[3]:.6f}"} for row in rows]
        write_csv(folder / "predictions.csv", table, columns)
        y, p = np.array(labels), np.array(scores)
        write_atomic(folder / "roc.png", draw_roc(y, p, figures, self.title))
        write_atomic(folder / "reliability.png", draw_reliability(y, p, figures, self.title))
        low, high = figures["auc_interval_95"]
        logger.info(
            "%s: AUC %.3f (%.3f to %.3f), accuracy %.3f (the more frequent class alone: %.3f), balanced accuracy %.3f,"
            " sensitivity %.3f, specificity %.3f, calibration error %.3f; %d nodules of %d patients; written to %s",
            *(self.title or "evaluation", figures["auc"], low, high, figures["accuracy"], figures["majority_accuracy"]),
            *(figures["balanced_accuracy"], figures["sensitivity"], figures["specificity"], figures["ece"]),
            *(figures["count"], figures["patients"], self.folder),
        )


@dataclass(eq=False)
class SaveMalignancy:
    """Handler: write the probability that each nodule is malignant, and draw the crops that the network was given.

    Writes `malignancy.json`, `malignancy.csv` and `crops.png` (three planes of each crop). The batches need the crops
    under `image` and their `position` in mm, and may have a `nodule_id`; the evaluator's output needs the probabilities
    under `pred`.

    Args:
        folder: where the files go.
        class_names: of benign and malignant.
        threshold: scores from here on count as malignant.
        shown: values of the crop that are drawn black and white.
        output_format: "json", or "dicom_sr" for a Structured Report too, of a DICOM series (see `save_report`).
        notes: plain values for the record.

    Raises:
        ImportError: if highdicom is missing, which "dicom_sr" needs.
        ValueError: if the format is neither.
    """

    folder: str
    class_names: Sequence[str]
    _: KW_ONLY
    threshold: float = 0.5
    shown: tuple[float, float] = (0.0, 1.0)
    output_format: str = "json"
    notes: Mapping[str, Any] = field(default_factory=dict)
    found: list[dict[str, Any]] = field(default_factory=list, init=False)
    crops: list[list[Plane]] = field(default_factory=list, init=False)
    reported: dict[str, list[Finding]] = field(default_factory=dict, init=False)  # by image

    def __post_init__(self) -> None:
        self.reports = writes_dicom(self.output_format, FORMATS)

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
            name = item.get("nodule_id", result_name(file))
            place_mm = {"x_mm": x, "y_mm": y, "z_mm": z}
            self.found.append({"image": file, "nodule_id": name, **place_mm, "malignancy": score, "class": called})
            place = np.asarray(item["position"], float).reshape(1, 3)
            self.reported.setdefault(file, []).append(Finding(f"nodule {name}", "nodule", score, place, called))
            if len(self.crops) < DRAWN:
                self.crops.append(cut_planes(item["image"].cpu().numpy()[0], item["image"].affine))

    def _write(self, engine: Engine) -> None:
        folder, content = Path(self.folder), {"nodules": self.found, "threshold": self.threshold, "_run_": self.notes}
        write_json(folder / "malignancy.json", content)
        write_csv(folder / "malignancy.csv", self.found, list(self.found[0]))
        for file, findings in self.reported.items() if self.reports else ():
            save_report(findings, file, folder, measured=CANCER, site=codes.SCT.Lung)
        titles = [f"{nodule['nodule_id']}: {nodule['class']} {nodule['malignancy']:.2f}" for nodule in self.found]
        pictures = [draw_planes(planes, window=self.shown, panel=150) for planes in self.crops]
        tiles = [draw_tile(picture, title) for picture, title in zip(pictures, titles, strict=False)]
        write_atomic(folder / "crops.png", to_png(draw_sheet(tiles, "axial, coronal, sagittal", columns=3)))
        more = f" (the first {DRAWN} drawn)" if len(self.found) > DRAWN else ""
        for nodule, title in zip(self.found[:DRAWN], titles, strict=False):
            logger.info("%s at (%s, %s, %s) mm", title, nodule["x_mm"], nodule["y_mm"], nodule["z_mm"], extra=RESULT)
        logger.info("%d nodules: malignancy.json, .csv and crops.png%s in %s", len(self.found), more, self.folder)
