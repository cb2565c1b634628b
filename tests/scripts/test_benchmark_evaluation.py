import numpy as np
import pytest
from benchmarks.evaluation import ORGANS, make_organs, make_slices, monai_distances, plain_froc
from benchmarks.startup import time_statements

from vdt_workflows.evaluation.detection import froc
from vdt_workflows.evaluation.segmentation import score_organs

SPACING = (4.0, 4.0, 8.0)


def test_the_curve_is_that_of_a_plain_loop():
    slices = make_slices(120, 30)
    rates = (0.125, 0.5, 1, 2, 4, 8, 16)
    curve = froc(slices)
    found = [curve.at(rate) for rate in rates]
    np.testing.assert_allclose(found, plain_froc(slices, rates), atol=1e-12)
    assert 0 < found[0] < found[-1]


@pytest.mark.parametrize("strays", [0, 3])
def test_surface_distances_are_those_of_monais_two_functions(strays):
    label = make_organs((100, 100, 56), SPACING)
    pred = make_organs((100, 100, 56), SPACING, shift=12.0, grow=1.1, strays=strays)
    scores = score_organs(pred, label, ["background", *ORGANS], SPACING)
    expected = [monai_distances(pred == value, label == value, SPACING) for value in range(1, 14)]
    np.testing.assert_array_equal([(score.hd95_mm, score.asd_mm) for score in scores], expected)
    assert all(score.hd95_mm > 0 for score in scores)


def test_seconds_are_those_of_the_statements_alone():
    cpu, clock = time_statements("time.sleep(0.5)", "time.sleep(0.05)")
    assert 0.05 <= clock < 0.5
    assert cpu < 0.05
    with pytest.raises(RuntimeError, match="No module named 'nowhere'"):
        time_statements("", "import nowhere")
