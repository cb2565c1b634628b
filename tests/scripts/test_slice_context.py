"""Lesions that only neighbouring slices tell from vessels, and what the detector makes of them."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
from benchmarks.slice_context import SLICES, draw_scan
from scipy.ndimage import label

from tests.support.bundle_runs import ROOT

MIDDLE = SLICES // 2


def discs(image, z):
    """Centres and areas of what is bright in slice z."""
    found, count = label(image[:, :, z] > -400)
    return [(np.argwhere(found == i).mean(0), int((found == i).sum())) for i in range(1, count + 1)]


@pytest.mark.parametrize("seed", range(3))
def test_a_ball_and_three_vessels_are_discs_in_the_key_slice_and_vessels_go_on(seed):
    image, mask = draw_scan(np.random.default_rng(seed))
    assert len(discs(image, MIDDLE)) == 4
    assert len(discs(image, 0)) == len(discs(image, SLICES - 1)) == 3
    assert mask.sum((0, 1)).argmax() == MIDDLE  # the key slice of the data set
    assert not mask[:, :, [0, 1, -2, -1]].any()


def test_balls_and_vessels_have_the_same_areas_and_brightness_in_the_key_slice():
    balls, vessels = [], []
    for seed in range(60):
        image, mask = draw_scan(np.random.default_rng(seed))
        for centre, area in discs(image, MIDDLE):
            x, y = centre.round().astype(int)
            brightness = image[x - 2 : x + 3, y - 2 : y + 3, MIDDLE].mean()
            (balls if mask[x, y, MIDDLE] else vessels).append((area, brightness))
    assert (len(balls), len(vessels)) == (60, 180)
    for ball, vessel in zip(np.transpose(balls), np.transpose(vessels), strict=True):
        error = np.hypot(ball.std() / 60**0.5, vessel.std() / 180**0.5)
        assert abs(ball.mean() - vessel.mean()) < 3 * error
        assert ball.std() / vessel.std() == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_nine_slices_find_what_the_centre_slice_alone_cannot(tmp_path):
    script = ROOT / "scripts" / "benchmarks" / "slice_context.py"
    words = [sys.executable, "-W", "ignore", script, tmp_path, "--seeds", "1"]
    subprocess.run([str(word) for word in words], check=True, timeout=3600)  # about three minutes of one core
    with (tmp_path / "table.csv").open() as file:
        at = {row["side"]: float(row["at_0.5"]) for row in csv.DictReader(file)}
    assert at["nine slices"] > at["centre slice repeated"] + 0.2
