"""The figures against MONAI's and against what is known, the interval by patient, and the pictures."""

import io
import json

import numpy as np
import pytest
import torch
from monai.metrics import CalibrationErrorMetric, compute_roc_auc
from PIL import Image

from vdt_workflows.evaluation.classification import (
    auc_interval,
    calibration_bins,
    draw_reliability,
    draw_roc,
    roc_curve,
    score_binary,
    weighted_auc,
)


def draw(count=300, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(int)
    scores = 1 / (1 + np.exp(-rng.normal(labels, 1.0)))
    return labels, np.round(scores, 1) if ties else scores, [str(i // 3) for i in range(count)]


def auc(labels, scores):
    return float(weighted_auc(labels, scores, np.ones((1, len(labels))))[0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_area_is_monais(seed, ties):
    labels, scores, _ = draw(seed=seed, ties=ties)
    assert auc(labels, scores) == pytest.approx(compute_roc_auc(torch.tensor(scores), torch.tensor(labels)))


def test_a_weight_counts_as_that_many_samples():
    labels, scores, _ = draw(60, ties=True)
    weights = np.random.default_rng(1).integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weights)
    assert weighted_auc(labels, scores, weights[None])[0] == pytest.approx(auc(labels[repeated], scores[repeated]))
    assert np.isnan(weighted_auc(labels, scores, labels[None].astype(float))[0])


def test_the_curve_has_the_area_and_ends_in_the_corners():
    labels, scores, _ = draw(ties=True)
    false, true, thresholds = roc_curve(labels, scores)
    assert np.trapezoid(true, false) == pytest.approx(auc(labels, scores))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    for x, y, threshold in zip(false, true, thresholds, strict=True):
        assert y == np.mean(scores[labels == 1] >= threshold)
        assert x == np.mean(scores[labels == 0] >= threshold)


def test_figures_of_a_known_table():
    labels, scores = [1] * 5 + [0] * 10, [0.9] * 4 + [0.2] + [0.8] * 3 + [0.1] * 7
    figures = score_binary(labels, scores, list("abcdefghijklmno"))
    counts = {"true_positive": 4, "false_positive": 3, "false_negative": 1, "true_negative": 7}
    assert figures["confusion_matrix"] == counts
    expected = {
        **{"accuracy": 11 / 15, "majority_accuracy": 10 / 15, "balanced_accuracy": 0.75, "sensitivity": 0.8},
        **{"specificity": 0.7, "precision": 4 / 7, "f1": 8 / 12, "count": 15, "positives": 5, "patients": 15},
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert score_binary(labels, scores, list("abcdefghijklmno"), threshold=0.95)["precision"] is None
    json.dumps(figures, allow_nan=False)


def test_the_calibration_error_is_monais():
    labels, scores, patients = draw()
    metric = CalibrationErrorMetric(num_bins=10)
    metric(torch.tensor(scores)[None, None], torch.tensor(labels)[None, None])
    assert score_binary(labels, scores, patients)["ece"] == pytest.approx(float(metric.aggregate()), abs=1e-6)
    means, rates, counts = calibration_bins(labels, scores)
    inside = (scores >= 0.3) & (scores < 0.4)
    assert (means[3], rates[3], counts[3]) == pytest.approx(
        (scores[inside].mean(), labels[inside].mean(), inside.sum()), abs=1e-6
    )


def test_the_interval_draws_patients_and_not_nodules():
    labels, scores, _ = draw(60)
    twenty = np.repeat(np.arange(60), 20)  # each patient's one nodule twenty times over tells nothing new
    patients = [str(i) for i in twenty]
    one = auc_interval(labels, scores, [str(i) for i in range(60)])
    assert auc_interval(labels[twenty], scores[twenty], patients) == pytest.approx(one)
    wrong = auc_interval(labels[twenty], scores[twenty], [str(i) for i in range(1200)])
    assert wrong[1] - wrong[0] < 0.5 * (one[1] - one[0])


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shift, patients = np.repeat(rng.normal(0, 1, 60), 3), [str(i // 3) for i in range(180)]
        labels = (rng.random(180) < 0.4).astype(int)
        low, high = auc_interval(labels, rng.normal(shift, 1), patients, resamples=400)
        held += low <= 0.5 <= high
    assert 88 <= held <= 100


def test_the_interval_depends_on_the_seed_alone():
    labels, scores, patients = draw()
    assert auc_interval(labels, scores, patients, seed=3) == auc_interval(labels, scores, patients, seed=3)
    assert auc_interval(labels, scores, patients, seed=3) != auc_interval(labels, scores, patients, seed=4)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="scores need both classes, got 0 of class 1 among 2"):
        score_binary([0, 0], [0.1, 0.2], ["a", "b"])
    with pytest.raises(ValueError, match="scores must be probabilities from 0 to 1, got -1 to 2"):
        score_binary([0, 1], [-1, 2], ["a", "b"])


@pytest.mark.parametrize("picture", [draw_roc, draw_reliability])
@pytest.mark.parametrize("count", [3, 300])
def test_pictures_are_drawn_for_few_and_for_many(picture, count):
    labels, scores, patients = draw(count, seed=4)
    labels[:2] = (0, 1)
    png = picture(labels, scores, score_binary(labels, scores, patients), "a $title$ with_signs")
    assert min(Image.open(io.BytesIO(png)).size) > 400
