"""Lesions that only neighbouring slices tell from vessels, and what the detector makes of them."""

from __future__ import annotations

import monai.bundle
import numpy as np
import pytest
from benchmarks import slice_context
from benchmarks.slice_context import SLICES, draw_scan
from scipy.ndimage import label

from tests.support.bundle_runs import ROOT, config_files, rows

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
    for seed in range(30):
        image, mask = draw_scan(np.random.default_rng(seed))
        for centre, area in discs(image, MIDDLE):
            x, y = centre.round().astype(int)
            brightness = image[x - 2 : x + 3, y - 2 : y + 3, MIDDLE].mean()
            (balls if mask[x, y, MIDDLE] else vessels).append((area, brightness))
    assert (len(balls), len(vessels)) == (30, 90)
    for ball, vessel in zip(np.transpose(balls), np.transpose(vessels), strict=True):
        error = np.hypot(ball.std() / 30**0.5, vessel.std() / 90**0.5)
        assert abs(ball.mean() - vessel.mean()) < 3 * error
        assert ball.std() / vessel.std() == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_nine_slices_find_what_the_centre_slice_alone_cannot(tmp_path, monkeypatch):
    """Who sees the centre slice alone takes a disc out of four: at half a false positive an image, one ball in six."""
    monkeypatch.setattr(slice_context, "ARMS", {"nine slices": 2.5})
    monkeypatch.setattr(slice_context, "SIZE", 96)
    monkeypatch.setattr(slice_context, "run_bundle", run_here)
    slice_context.lesion_context(str(tmp_path), seeds=1, volumes=100, epochs=6)
    (row,) = rows(tmp_path / "table.csv")
    assert row["side"] == "nine slices"
    assert float(row["at_0.5"]) > 1 / 6 + 0.3


@pytest.mark.slow
def test_both_arms_are_trained_and_scored_once(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(slice_context, "run_bundle", lambda *words: runs.append(words[1]) or run_here(*words))
    for _ in range(2):
        slice_context.lesion_context(str(tmp_path), seeds=1, volumes=20, epochs=1)
    assert runs == 2 * [["train"], ["train", "evaluate"]]
    assert [row["side"] for row in rows(tmp_path / "table.csv")] == ["nine slices", "centre slice repeated"]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4


def run_here(name, configs, settings):
    """Do what `run_bundle` does, without processes that import first."""
    bundle = ROOT / "bundles" / name
    monai.bundle.run(config_file=config_files(bundle, configs), bundle_root=str(bundle), logging_file=False, **settings)
