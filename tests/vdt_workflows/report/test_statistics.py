"""The statistics of a comparison, against values worked out by hand."""

import numpy as np
import pytest

from vdt_workflows.report.statistics import CaseTable, first_reach, paired_difference


def test_a_score_is_the_mean_over_the_cases_that_have_one():
    table = CaseTable(np.array([[0.2, 0.4, np.nan], [1.0, 0.0, 0.5]]))
    np.testing.assert_allclose(table.scores(), [[0.3, 0.5]])
    np.testing.assert_allclose(table.scores(np.array([[2, 0, 1], [0, 1, 1]])), [[0.2, 2.5 / 3], [0.4, 0.25]])


def test_with_labels_a_score_is_the_area_under_the_roc_curve():
    labels = np.array([0, 0, 1, 1])
    # positives .4 and .8 against negatives .1 and .4: three wins and a tie of four
    table = CaseTable(np.array([[0.1, 0.4, 0.4, 0.8]]), labels)
    np.testing.assert_allclose(table.scores(), [[3.5 / 4]])
    # the tied positive twice and the untied not at all: a win and a half of two, twice
    np.testing.assert_allclose(table.scores(np.array([[1, 1, 2, 0]])), [[0.75]])
    assert np.isnan(table.scores(np.array([[1, 1, 0, 0]]))).all()


def test_what_is_the_same_for_both_rows_leaves_no_spread():
    theirs = np.random.default_rng(0).uniform(size=(3, 20))
    found = paired_difference(CaseTable(theirs + 0.125), CaseTable(theirs))
    assert [found[name] for name in ("mean", "low", "high")] == pytest.approx([0.125] * 3)
    assert found["by_seed"] == pytest.approx([0.125] * 3)


def test_the_interval_of_two_cases_is_what_two_cases_can_draw():
    # one seed, differences 0 and 1: a sample's mean is 0, 1/2 or 1 with chances 1/4, 1/2 and 1/4
    ours, theirs = CaseTable(np.array([[0.0, 1.0]])), CaseTable(np.zeros((1, 2)))
    found = paired_difference(ours, theirs)
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.0, 1.0)
    half = paired_difference(ours, theirs, level=0.4)
    assert (half["low"], half["high"]) == (0.5, 0.5)


def test_the_interval_counts_the_spread_of_seeds_and_of_cases():
    # differences s_i + c_j, zero in the mean: variance of a sample's mean is var(s)/S + var(c)/C
    seeds, cases = np.linspace(-0.3, 0.3, 30)[:, None], np.linspace(-0.4, 0.4, 50)
    found = paired_difference(CaseTable(seeds + cases), CaseTable(np.zeros((30, 50))))
    expected = 1.96 * np.sqrt(seeds.var() / 30 + cases.var() / 50)
    assert found["high"] == pytest.approx(expected, rel=0.08)
    assert found["low"] == pytest.approx(-expected, rel=0.08)


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"same seeds and cases.*\(1, 3\) and \(1, 2\)"):
        paired_difference(CaseTable(np.zeros((1, 3))), CaseTable(np.zeros((1, 2))))
    with pytest.raises(ValueError, match="same seeds and cases"):
        paired_difference(CaseTable(np.zeros((1, 2)), np.array([0, 1])), CaseTable(np.zeros((1, 2))))


@pytest.mark.parametrize(("target", "place"), [(0.3, 15), (0.4, 20), (0.6, 76), (0.1, 10), (0.05, 10), (0.81, None)])
def test_a_target_is_reached_on_the_line_between_two_points(target, place):
    # .6 lies three fifths along the last line, reached at 40 + .6 * 60
    points = [(10, 0.2), (20, 0.4), (40, 0.3), (100, 0.8)]
    assert first_reach(points, target) == (None if place is None else pytest.approx(place))
