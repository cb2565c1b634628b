"""How well lesions are detected: free-response ROC and average precision of boxes on key slices.

Pure functions on NumPy arrays. Boxes are (x1, y1, x2, y2) with widths x2 - x1; an overlap is an IoU of at least 0.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vdt_workflows.drawing import make_figure, to_png
from vdt_workflows.errors import check_choice

RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # false positives per image
PUBLISHED_RATES = (0.5, 1.0, 2.0, 4.0)  # of the mean that papers give
RULES = ("lenient", "strict")
LESION_TYPES = {  # by DeepLesion's Coarse_lesion_type
    1: "bone", 2: "abdomen", 3: "mediastinum", 4: "liver", 5: "lung", 6: "kidney", 7: "soft tissue", 8: "pelvis",
}  # fmt: skip
DIAMETERS = {"below 10 mm": (0, 10), "10 to 30 mm": (10, 30), "30 mm and more": (30, np.inf)}
INTERVALS = {"below 2.5 mm": (0, 2.5), "2.5 mm and more": (2.5, np.inf)}
_OF_LESIONS = ("ignored", "types", "diameters")


class KeySlice:
    """What was found on one key slice, and what is there.

    Args:
        boxes: detections (B, 4).
        scores: (B,).
        lesions: true boxes (L, 4).
        ignored: (L,), lesions that are neither to be found nor false positives where found; none by default.
        types: (L,), keys of `LESION_TYPES`; -1 is unknown.
        diameters: (L,), long diameter in mm; NaN is unknown.
        slice_interval: mm between slices; NaN is unknown.
        patient: whose slice it is, for intervals that respect that slices of a patient are alike.
        name: of the slice.

    Raises:
        ValueError: if the lengths do not fit.
    """

    def __init__(
        self,
        boxes: ArrayLike,
        scores: ArrayLike,
        lesions: ArrayLike,
        *,
        ignored: ArrayLike | None = None,
        types: ArrayLike | None = None,
        diameters: ArrayLike | None = None,
        slice_interval: float = np.nan,
        patient: str = "",
        name: str = "",
    ) -> None:
        self.boxes = np.asarray(boxes, float).reshape(-1, 4)
        self.scores = np.asarray(scores, float).reshape(-1)
        self.lesions = np.asarray(lesions, float).reshape(-1, 4)
        count = len(self.lesions)
        self.ignored = np.zeros(count, bool) if ignored is None else np.asarray(ignored, bool)
        self.types = np.full(count, -1) if types is None else np.asarray(types, int)
        self.diameters = np.full(count, np.nan) if diameters is None else np.asarray(diameters, float)
        self.slice_interval = float(slice_interval)
        self.patient = patient
        self.name = name
        lengths = {name: len(getattr(self, name)) for name in ("boxes", "scores", "lesions", *_OF_LESIONS)}
        if lengths["scores"] != lengths["boxes"] or any(lengths[name] != count for name in _OF_LESIONS):
            raise ValueError(f"key slice {name!r}: lengths do not fit: {lengths}")


@dataclass(frozen=True)
class Froc:
    """A free-response ROC curve: what each threshold on the score gives, from the highest on.

    Detections of one score come and go together, so that the curve does not depend on the order of the slices.

    Attributes:
        thresholds: (T,), falling.
        false_positives: (T,), per image.
        sensitivity: (T,), of all lesions.
        images: number of images.
        lesions: number of lesions.
    """

    thresholds: np.ndarray
    false_positives: np.ndarray
    sensitivity: np.ndarray
    images: int
    lesions: int

    def at(self, rate: float) -> float:
        """Sensitivity at `rate` false positives per image: the best that no more of them give.

        Beyond the curve's end its last value holds; without lesions it is NaN.
        """
        if not self.lesions:
            return float("nan")
        reached = np.searchsorted(self.false_positives, rate * (1 + 1e-12), side="right")
        return float(self.sensitivity[reached - 1]) if reached else 0.0

    def scores(self) -> dict[str, float]:
        """Sensitivities at `RATES`, their mean, the published mean (over 0.5 to 4), and how far the curve goes."""
        found = {f"sensitivity_at_{rate:g}": self.at(rate) for rate in RATES}
        return {
            **found,
            "mean_sensitivity": float(np.mean(list(found.values()))),
            "mean_sensitivity_0.5_to_4": float(np.mean([self.at(rate) for rate in PUBLISHED_RATES])),
            "most_false_positives": float(self.false_positives[-1]) if len(self.false_positives) else 0.0,
        }


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes (A, 4) and (B, 4), as (A, B); 0 where both are empty."""
    a, b = a[:, None], b[None]
    common = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    union = sum((boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1) for boxes in (a, b)) - common
    return common / np.where(union > 0, union, 1)


class Matches:
    """All detections of all slices by falling score, and which lesions of its slice each of them overlaps.

    It is computed once for all rules, groups of lesions and bootstrap samples.

    Attributes:
        scores: (D,), falling; equal ones in the order of the slices.
        image: (D,), number of the slice.
        pairs: (P, 2), number of a detection and number of a lesion that it overlaps, by rising detection.
        iou: (P,).
        lesion_image: (L,), number of the slice; lesions are numbered through all slices.
        counted: (L,), the lesions that are not ignored.
    """

    def __init__(self, slices: Sequence[KeySlice]) -> None:
        self.images = len(slices)
        scores = np.concatenate([np.zeros(0), *(s.scores for s in slices)])
        image = np.repeat(np.arange(len(slices)), [len(s.boxes) for s in slices])
        order = np.argsort(-scores, kind="stable")
        self.scores, self.image = scores[order], image[order]
        self.lesion_image = np.repeat(np.arange(len(slices)), [len(s.lesions) for s in slices])
        self.counted = ~np.concatenate([np.zeros(0, bool), *(s.ignored for s in slices)])
        first = np.searchsorted(self.lesion_image, np.arange(len(slices)))  # lesion of each slice
        pairs, ious = [np.zeros((0, 2), int)], [np.zeros(0)]
        for s, at, lesion in zip(slices, np.searchsorted(image, np.arange(len(slices))), first, strict=True):
            iou = box_iou(s.boxes, s.lesions)
            over = np.argwhere(iou >= 0.5)
            pairs.append(over + np.array([at, lesion]))
            ious.append(iou[tuple(over.T)])
        joined = np.concatenate(pairs)
        joined[:, 0] = np.argsort(order)[joined[:, 0]]  # from the slices' order to that of the scores
        rising = np.argsort(joined[:, 0], kind="stable")
        self.pairs, self.iou = joined[rising], np.concatenate(ious)[rising]
        self.last = np.flatnonzero(np.diff(self.scores, append=-np.inf))  # detection of each score

    def judge(self, counted: np.ndarray, rule: str = "lenient") -> tuple[np.ndarray, np.ndarray]:
        """Count for each detection how many lesions it finds, and decide whether it is a false positive.

        "lenient" is the published rule: a detection finds every lesion that it overlaps and that was not found before;
        one that overlaps found lesions alone is neither. "strict" is one-to-one, as in COCO: a detection finds the free
        lesion that it overlaps most; one that overlaps found lesions alone is false. With either, a detection that
        finds nothing and overlaps lesions that are not counted is neither.

        Args:
            counted: (L,), the lesions to be found; the others are ignored.
            rule: "lenient" or "strict".

        Returns:
            lesions found (D,) and whether false (D,).
        """
        check_choice("rule", rule, RULES)
        found, excused = np.zeros(len(self.scores), int), np.zeros(len(self.scores), bool)
        detection, lesion = self.pairs.T
        excused[detection if rule == "lenient" else detection[~counted[lesion]]] = True
        detection, lesion, iou = detection[counted[lesion]], lesion[counted[lesion]], self.iou[counted[lesion]]
        if rule == "lenient":
            _, first = np.unique(lesion, return_index=True)
            np.add.at(found, detection[first], 1)
        else:
            free = counted.copy()
            for pairs in np.split(np.arange(len(detection)), np.flatnonzero(np.diff(detection)) + 1):
                best = max((i for i in pairs if free[lesion[i]]), key=iou.__getitem__, default=None)
                if best is not None:
                    free[lesion[best]], found[detection[best]] = False, 1
        return found, (found == 0) & ~excused

    def curve(
        self, judged: tuple[np.ndarray, np.ndarray], counted: np.ndarray, weights: np.ndarray | None = None
    ) -> Froc:
        """Compute the curve from what `judge` gave; `weights` (images,) are how often each image counts."""
        weights = np.ones(self.images, int) if weights is None else weights
        found, false = (np.cumsum(j * weights[self.image])[self.last] for j in judged)
        images, lesions = int(weights.sum()), int(weights[self.lesion_image] @ counted)
        return Froc(self.scores[self.last], false / max(images, 1), found / max(lesions, 1), images, lesions)


def froc(slices: Sequence[KeySlice], rule: str = "lenient") -> Froc:
    """Compute the curve of all slices by a rule of `Matches.judge`; slices without lesions count as images too."""
    matches = Matches(slices)
    return matches.curve(matches.judge(matches.counted, rule), matches.counted)


def bootstrap(
    slices: Sequence[KeySlice], rule: str = "lenient", *, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Intervals of 95 % of `Froc.scores` by drawing patients with replacement, each with all its slices.

    Returns:
        The lower and upper end by the name of the score; NaN if nothing can be drawn.
    """
    matches = Matches(slices)
    judged = matches.judge(matches.counted, rule)
    patients, owner = np.unique([s.patient for s in slices], return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        times = np.bincount(random.integers(len(patients), size=len(patients)), minlength=len(patients))
        drawn.append(matches.curve(judged, matches.counted, times[owner]).scores())
    ends = {name: np.nanpercentile([d[name] for d in drawn], [2.5, 97.5]) for name in drawn[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def score_groups(slices: Sequence[KeySlice], rule: str = "lenient") -> dict[str, dict[str, dict[str, float]]]:
    """Score lesions by type, by diameter and by slice interval.

    For types and diameters all images count, and detections on lesions outside the group are ignored, neither found nor
    false. For slice intervals the images of the group count alone.

    Returns:
        `Froc.scores`, `lesions` and `images` by name of the grouping and of the group; groups without lesions are left
        out.
    """
    if not slices:
        return {}
    matches = Matches(slices)
    types, diameters = (np.concatenate([getattr(s, name) for s in slices]) for name in ("types", "diameters"))
    intervals = np.array([s.slice_interval for s in slices])
    lesions = {
        "type": {name: types == number for number, name in LESION_TYPES.items()},
        "diameter": {name: (diameters >= low) & (diameters < high) for name, (low, high) in DIAMETERS.items()},
    }
    images = {n: ((intervals >= low) & (intervals < high)).astype(int) for n, (low, high) in INTERVALS.items()}
    curves: dict[str, dict[str, Froc]] = {}
    for grouping, groups in lesions.items():
        chosen = {name: matches.counted & group for name, group in groups.items()}
        curves[grouping] = {name: matches.curve(matches.judge(c, rule), c) for name, c in chosen.items()}
    judged = matches.judge(matches.counted, rule)
    curves["slice_interval"] = {n: matches.curve(judged, matches.counted, chosen) for n, chosen in images.items()}
    return {
        grouping: {n: {"lesions": c.lesions, "images": c.images, **c.scores()} for n, c in groups.items() if c.lesions}
        for grouping, groups in curves.items()
    }


def average_precision(slices: Sequence[KeySlice]) -> dict[str, float]:
    """COCO's average precision of one class: `mAP` (IoU 0.5 to 0.95), `AP_50` and `AP_75`; NaN without lesions.

    MONAI's `COCOMetric` does it. Its matching loops in Python over detections, thresholds and lesions, so detections
    that overlap no lesion are handed to it as slices without lesions, which changes no figure and takes a tenth of the
    time.
    """
    from monai.apps.detection.metrics.coco import COCOMetric  # a second that only an evaluation pays
    from monai.apps.detection.metrics.matching import matching_batch

    metric = COCOMetric(["lesion"], iou_list=(0.5, 0.75), iou_range=(0.5, 0.95, 0.05), max_detection=(100,))
    touching, others = [], []
    for s in slices:
        best = np.argsort(-s.scores, kind="stable")[:100]
        near = box_iou(s.boxes[best], s.lesions).max(1, initial=0) >= 0.5
        touching.append(KeySlice(s.boxes[best[near]], s.scores[best[near]], s.lesions, ignored=s.ignored))
        others.append(KeySlice(s.boxes[best[~near]], s.scores[best[~near]], np.zeros((0, 4))))
    parts = touching + others
    names = {"mAP": "mAP_IoU_0.50_0.95_0.05_", "AP_50": "AP_IoU_0.50_", "AP_75": "AP_IoU_0.75_"}
    if not any((~s.ignored).any() for s in slices):
        return dict.fromkeys(names, float("nan"))
    boxes, scores, lesions, ignored = zip(*((s.boxes, s.scores, s.lesions, s.ignored) for s in parts), strict=True)
    classes, true_classes = ([np.zeros(len(b), int) for b in part] for part in (boxes, lesions))  # of one class
    thresholds = metric.get_iou_thresholds()
    matched = matching_batch(box_iou, thresholds, boxes, classes, scores, lesions, true_classes, ignored)
    values = metric(matched)[0]
    return {name: values[f"{key}MaxDet_100"] for name, key in names.items()}


def score_detections(slices: Sequence[KeySlice], *, intervals: int = 0) -> dict[str, object]:
    """Score the detections of a data set in every way of this module, as plain values by name.

    Args:
        slices: the key slices.
        intervals: number of bootstrap samples of patients; 0 gives no intervals.
    """
    result: dict[str, object] = {
        "images": len(slices),
        "lesions": int(sum((~s.ignored).sum() for s in slices)),
        "ignored_lesions": int(sum(s.ignored.sum() for s in slices)),
        "patients": len({s.patient for s in slices}),
        **average_precision(slices),
    }
    for rule in RULES:
        result[rule] = {**froc(slices, rule).scores(), "groups": score_groups(slices, rule)}
        if intervals:
            result[f"{rule}_95_percent_intervals"] = bootstrap(slices, rule, samples=intervals)
    return result


def draw_froc(curves: Mapping[str, Froc], title: str = "") -> bytes:
    """Draw sensitivity against false positives per image, on a logarithmic axis from 1/8 to 16, as a PNG."""
    figure, axes = make_figure(6, 4.5)
    for name, curve in curves.items():
        rates = np.unique(np.concatenate([np.geomspace(0.125, 16, 400), curve.false_positives]))
        rates = rates[(rates >= 0.125) & (rates <= 16)]
        values = [100 * curve.at(rate) for rate in rates]
        mean = 100 * curve.scores()["mean_sensitivity_0.5_to_4"]
        (line,) = axes.step(rates, values, where="post", label=f"{name}: {mean:.1f} % (mean of 0.5 to 4)")
        axes.plot(RATES, [100 * curve.at(r) for r in RATES], "o", markersize=4, color=line.get_color())
    ticks = (0.125, 0.25, *RATES)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set(xlim=(0.125, 16), ylim=(0, 101), xlabel="false positives per image", ylabel="sensitivity (%)")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(loc="lower right", fontsize="small")
    figure.suptitle(title, parse_math=False)
    return to_png(figure)
