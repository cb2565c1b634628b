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


NEAR = [0.5, 0.5, 10.5, 10.5]  # overlaps LESION and ALSO
ALSO = [1, 1, 11, 11]
HIT, IGNORED = one([(LESION, 0.5)], [LESION]), {"ignored": [False, True]}
CURVES = {  # rule, slices, thresholds, sensitivity, false positives per image
    "published: one box may find two lesions, a repetition is neither": (
        "lenient", [one([(NEAR, 3), (LESION, 2), (MISS, 1)], [LESION, ALSO])], [3, 2, 1], [1, 1, 1], [0, 0, 1]
    ),
    "strict: one box finds one lesion, a repetition is false": (
        "strict", [one([(NEAR, 3), (LESION, 2), (LESION, 1)], [LESION, ALSO])], [3, 2, 1], [0.5, 1, 1], [0, 0, 1]
    ),
    "an image without lesions counts as an image": (
        "lenient", [one([(LESION, 0.9), (MISS, 0.8)], [LESION]), one([], [])], [0.9, 0.8], [1, 1], [0, 0.5]
    ),
    "equal scores come together": ("lenient", [HIT, one([(MISS, 0.5)], [])], [0.5], [1], [0.5]),
    "equal scores come together in any order": ("lenient", [one([(MISS, 0.5)], []), HIT], [0.5], [1], [0.5]),
    **{
        f"{rule}: an ignored lesion is neither to be found nor false": (
            rule, [one([(MISS, 0.9), (LESION, 0.8)], [LESION, MISS], **IGNORED)], [0.9, 0.8], [0, 1], [0, 0]
        )
        for rule in RULES
    },
    "an overlap of exactly half is a hit": ("lenient", [one([([0, 0, 10, 5], 1)], [LESION])], [1], [1], [0]),
    "an overlap below half is none": ("lenient", [one([([0, 0, 10, 4.9], 1)], [LESION])], [1], [0], [1]),
}  # fmt: skip


@pytest.mark.parametrize("case", CURVES)
def test_small_curves_are_those_worked_out_by_hand(case):
    rule, slices, *wanted = CURVES[case]
    curve = froc(slices, rule)
    found = [curve.thresholds, curve.sensitivity, curve.false_positives]
    assert [values.tolist() for values in found] == wanted


def test_sensitivity_at_a_rate_is_the_best_that_no_more_false_positives_give():
    slices = [one([(LESION, 0.9), (MISS, 0.8)], [LESION]), one([(LESION, 0.7)], [LESION])]  # hit, miss, hit
    for rule in RULES:
        assert [froc(slices, rule).at(rate) for rate in (0.49, 0.5, 1)] == [0.5, 1, 1]  # interpolation gives 0.5 at 0.5


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


def test_boxes_without_area_overlap_nothing():
    assert box_iou(np.zeros((1, 4)), np.array([LESION, [0, 0, 0, 0]])).tolist() == [[0, 0]]


def test_unknown_rule_and_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rule must be 'lenient' or 'strict', got 'coco'"):
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
    boxes, scores, lesions, ignored = zip(*((s.boxes, s.scores, s.lesions, s.ignored) for s in slices), strict=True)
    found_classes, true_classes = ([np.zeros(len(v), int) for v in part] for part in (boxes, lesions))
    matched = matching_batch(
        box_iou, metric.get_iou_thresholds(), boxes, found_classes, scores, lesions, true_classes, ignored
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
