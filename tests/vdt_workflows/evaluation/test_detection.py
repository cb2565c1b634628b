from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torchvision
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.metrics import compute_froc_curve_data
from PIL import Image

from vdt_workflows.evaluation.detection import (
    RATES,
    RULES,
    KeySlice,
    average_precision,
    bootstrap,
    box_iou,
    draw_froc,
    froc,
    score_detections,
    score_groups,
)

LESION = [0, 0, 10, 10]
MISS = [50, 50, 60, 60]


def one(detections, lesions, **more):
    """A key slice of detections [(box, score)] and lesions [box]."""
    return KeySlice([box for box, _ in detections], [score for _, score in detections], lesions, **more)


def random_slices(seed, images=12, detections=8, distinct=True):
    random = np.random.default_rng(seed)
    slices = []
    for i in range(images):
        corner = random.uniform(0, 40, (random.integers(0, 4), 2))
        lesions = np.hstack([corner, corner + random.uniform(6, 20, corner.shape)])
        boxes = lesions[random.integers(0, len(lesions), detections)] if len(lesions) else np.zeros((detections, 4))
        boxes = boxes + random.normal(0, 1.5, boxes.shape)
        scores = random.random(detections) if distinct else random.integers(0, 4, detections) / 4
        slices.append(
            KeySlice(
                boxes, scores, lesions,
                ignored=random.random(len(lesions)) < 0.2,
                types=random.integers(1, 9, len(lesions)),
                diameters=random.uniform(4, 40, len(lesions)),
                slice_interval=random.choice([1.0, 5.0]),
                patient=str(i // 3),
            )
        )  # fmt: skip
    return slices


# Small cases worked out by hand


def test_one_box_may_find_two_lesions_and_a_repetition_is_neither_by_the_published_rule():
    slices = [one([([0.5, 0.5, 10.5, 10.5], 0.9), (LESION, 0.8), (MISS, 0.7)], [LESION, [1, 1, 11, 11]])]
    curve = froc(slices)
    assert curve.sensitivity.tolist() == [1, 1, 1]
    assert curve.false_positives.tolist() == [0, 0, 1]
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.7]


def test_one_box_finds_one_lesion_and_a_repetition_is_false_by_the_strict_rule():
    slices = [one([([0.5, 0.5, 10.5, 10.5], 0.9), (LESION, 0.8), (LESION, 0.7)], [LESION, [1, 1, 11, 11]])]
    curve = froc(slices, "strict")
    assert curve.sensitivity.tolist() == [0.5, 1, 1]
    assert curve.false_positives.tolist() == [0, 0, 1]


def test_two_images_with_a_hit_and_a_miss_each_have_full_sensitivity_at_half_and_at_one():
    slices = [one([(LESION, 0.9), (MISS, 0.8)], [LESION]), one([(LESION, 0.85), (MISS, 0.1)], [LESION])]
    for rule in RULES:
        assert [froc(slices, rule).at(rate) for rate in (0.5, 1.0)] == [1, 1]


def test_sensitivity_at_a_rate_is_the_best_that_no_more_false_positives_give():
    slices = [one([(LESION, 0.9), (MISS, 0.8)], [LESION]), one([(LESION, 0.7)], [LESION])]  # hit, miss, hit
    assert froc(slices).at(0.5) == 1  # interpolation gives 0.5
    assert froc(slices).at(0.49) == 0.5


def test_a_curve_that_ends_early_keeps_its_last_value_and_says_where_it_ended():
    scores = froc([one([(LESION, 0.9), (MISS, 0.8)], [LESION, MISS[::-1]])]).scores()
    assert scores["sensitivity_at_16"] == scores["sensitivity_at_1"] == 0.5
    assert scores["most_false_positives"] == 1


def test_no_detections_find_nothing():
    scores = score_detections([one([], [LESION]), one([], [])])
    for rule in RULES:
        assert {v for k, v in scores[rule].items() if k != "groups"} == {0}
    assert scores["mAP"] == 0


def test_without_lesions_every_score_is_nan_and_false_positives_are_counted():
    scores = score_detections([one([(MISS, 0.5)], [])])
    assert math.isnan(scores["lenient"]["mean_sensitivity"])
    assert math.isnan(scores["mAP"])
    assert scores["lenient"]["most_false_positives"] == 1
    assert scores["lenient"]["groups"] == {"type": {}, "diameter": {}, "slice_interval": {}}


def test_no_images_have_no_score():
    assert math.isnan(froc([]).scores()["mean_sensitivity"])
    assert math.isnan(average_precision([])["mAP"])


def test_an_image_without_lesions_counts_as_an_image():
    with_one = froc([one([(LESION, 0.9), (MISS, 0.8)], [LESION])])
    with_two = froc([one([(LESION, 0.9), (MISS, 0.8)], [LESION]), one([], [])])
    assert with_two.false_positives[-1] == with_one.false_positives[-1] / 2


def test_detections_of_one_score_come_together_whatever_their_order():
    hit_first = [one([(LESION, 0.5)], [LESION]), one([(MISS, 0.5)], [])]
    for slices in (hit_first, hit_first[::-1]):
        curve = froc(slices)
        assert (curve.thresholds.tolist(), curve.sensitivity.tolist()) == ([0.5], [1])
        assert curve.at(0.4) == 0


def test_an_overlap_of_exactly_half_is_a_hit():
    assert froc([one([([0, 0, 10, 5], 1)], [LESION])]).at(0) == 1
    assert froc([one([([0, 0, 10, 4.9], 1)], [LESION])]).at(0) == 0


@pytest.mark.parametrize("rule", RULES)
def test_an_ignored_lesion_is_neither_to_be_found_nor_false(rule):
    slices = [one([(MISS, 0.9), (LESION, 0.8)], [LESION, MISS], ignored=[False, True])]
    curve = froc(slices, rule)
    assert curve.lesions == 1
    assert curve.sensitivity.tolist() == [0, 1]
    assert curve.false_positives.tolist() == [0, 0]


def test_boxes_without_area_overlap_nothing():
    assert box_iou(np.zeros((1, 4)), np.array([LESION, [0, 0, 0, 0]])).tolist() == [[0, 0]]


def test_unknown_rule_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rule must be one of .*, got 'coco'"):
        froc([one([], [LESION])], "coco")
    with pytest.raises(ValueError, match="key slice 'a': lengths do not fit"):
        KeySlice([LESION], [], [LESION], name="a")


# Against the rules written out, and against other implementations


def written_out(slices, rule):
    """The rules in loops, detection by detection: [(score, lesions found, false)] by falling score."""
    pooled = sorted(((-s.scores[d], i, d) for i, s in enumerate(slices) for d in range(len(s.scores))))
    hit, out = [np.zeros(len(s.lesions), bool) for s in slices], []
    for negative, i, d in pooled:
        s = slices[i]
        iou = box_iou(s.boxes[d : d + 1], s.lesions)[0]
        candidates = [g for g in range(len(iou)) if iou[g] >= 0.5 and not s.ignored[g] and not hit[i][g]]
        overlapped = [g for g in range(len(iou)) if iou[g] >= 0.5]
        if rule == "strict":
            candidates = sorted(candidates, key=lambda g: -iou[g])[:1]
            overlapped = [g for g in overlapped if s.ignored[g]]
        hit[i][candidates] = True
        out.append((-negative, len(candidates), not candidates and not overlapped))
    return out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_curve_is_that_of_the_rules_written_out(seed, rule):
    slices = random_slices(seed)
    wanted, curve = written_out(slices, rule), froc(slices, rule)
    lesions = sum((~s.ignored).sum() for s in slices)
    assert curve.lesions == lesions
    np.testing.assert_allclose(curve.thresholds, [w[0] for w in wanted])
    np.testing.assert_allclose(curve.sensitivity, np.cumsum([w[1] for w in wanted]) / lesions)
    np.testing.assert_allclose(curve.false_positives, np.cumsum([w[2] for w in wanted]) / len(slices))


@pytest.mark.parametrize("rule", RULES)
def test_scores_do_not_depend_on_the_order_of_slices_and_detections_also_with_ties(rule):
    slices = random_slices(0, distinct=False)
    order = np.random.default_rng(1).permutation(len(slices))
    assert froc([slices[i] for i in order], rule).scores() == froc(slices, rule).scores()


def test_monai_gives_the_same_curve_from_the_matched_detections():
    slices = [s for s in random_slices(3) if not s.ignored.any()]
    wanted = written_out(slices, "strict")
    lesions = sum(len(s.lesions) for s in slices)
    rates, sensitivity = compute_froc_curve_data(
        np.array([w[0] for w in wanted if w[2]]), np.array([w[0] for w in wanted if w[1]]), lesions, len(slices)
    )
    curve = froc(slices, "strict")
    for rate, value in zip(rates, sensitivity, strict=True):
        assert curve.at(rate) >= value - 1e-12
        assert any(np.isclose(curve.sensitivity, value) & np.isclose(curve.false_positives, rate)) or value == rate == 0


def test_iou_is_torchvisions():
    a, b = (np.random.default_rng(i).uniform(0, 9, (5, 2, 2)).cumsum(1).reshape(5, 4) for i in range(2))
    wanted = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(box_iou(a, b), wanted)


def test_average_precision_is_that_of_monai_with_all_detections_of_a_slice_together():
    slices = random_slices(4, detections=30)
    metric = COCOMetric(["lesion"], iou_list=(0.5, 0.75), iou_range=(0.5, 0.95, 0.05), max_detection=(100,))
    matched = matching_batch(
        box_iou,
        metric.get_iou_thresholds(),
        [s.boxes for s in slices],
        [np.zeros(len(s.boxes), int) for s in slices],
        [s.scores for s in slices],
        [s.lesions for s in slices],
        [np.zeros(len(s.lesions), int) for s in slices],
        [s.ignored for s in slices],
    )
    found = average_precision(slices)
    assert found["mAP"] == pytest.approx(metric(matched)[0]["mAP_IoU_0.50_0.95_0.05_MaxDet_100"], abs=1e-12)
    assert 0 < found["mAP"] < found["AP_50"] < 1


def test_perfect_detections_score_one_everywhere():
    slices = [KeySlice(s.lesions, np.ones(len(s.lesions)), s.lesions) for s in random_slices(0)]
    scores = score_detections(slices)
    assert scores["mAP"] == scores["AP_50"] == scores["strict"]["mean_sensitivity"] == 1
    assert scores["strict"]["most_false_positives"] == 0


# Groups, intervals, picture


def test_groups_count_their_lesions_and_ignore_detections_on_the_others():
    slices = [
        one([(LESION, 0.9), (MISS, 0.8), ([20, 20, 30, 30], 0.7)], [LESION, MISS], types=[5, 4], diameters=[5.0, 10.0],
            slice_interval=5.0),
        one([(MISS, 0.9)], [LESION], types=[-1], diameters=[np.nan], slice_interval=1.0),
    ]  # fmt: skip
    groups = score_groups(slices)
    assert set(groups["type"]) == {"lung", "liver"}
    assert groups["type"]["lung"]["lesions"] == 1
    assert groups["type"]["lung"]["images"] == 2
    assert groups["type"]["lung"]["sensitivity_at_1"] == 1
    assert groups["type"]["lung"]["most_false_positives"] == 1  # the box on the liver lesion is ignored
    assert set(groups["diameter"]) == {"below 10 mm", "10 to 30 mm"}
    assert groups["slice_interval"]["below 2.5 mm"] == {
        "lesions": 1, "images": 1, **froc(slices[1:]).scores(),
    }  # fmt: skip
    assert groups["slice_interval"]["2.5 mm and more"]["lesions"] == 2


def test_a_grouping_by_type_has_the_lesions_of_all_known_types():
    slices = random_slices(2)
    groups = score_groups(slices, "strict")
    assert sum(g["lesions"] for g in groups["type"].values()) == froc(slices).lesions


def test_intervals_hold_the_score_are_repeatable_and_vanish_for_one_patient():
    slices = random_slices(1, images=60)
    scores, ends = froc(slices).scores(), bootstrap(slices, samples=200)
    for name in ("mean_sensitivity", "sensitivity_at_1"):
        assert ends[name][0] < scores[name] < ends[name][1]
    assert bootstrap(slices, samples=200) == ends
    alone = [KeySlice(s.boxes, s.scores, s.lesions) for s in slices]
    low, high = bootstrap(alone, samples=5)["mean_sensitivity"]
    assert low == high == froc(alone).scores()["mean_sensitivity"]


def test_picture_of_the_curves_opens():
    slices = random_slices(0)
    curves = {rule: froc(slices, rule) for rule in RULES}
    image = Image.open(io.BytesIO(draw_froc({**curves, "nothing found": froc([one([], [LESION])])}, "a title")))
    assert image.size[0] > 500


def test_rates_are_those_of_the_field():
    assert RATES == (0.5, 1, 2, 4, 8, 16)
