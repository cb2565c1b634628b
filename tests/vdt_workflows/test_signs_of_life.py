"""What commands write to a terminal: never silent, nothing of the libraries', the results last; and Ctrl-C."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("pty")

from tests.makers.dicom import write_series
from tests.support.terminal import run_in_terminal

pytestmark = pytest.mark.slow
LONGEST = 10.0  # seconds without a sign, on an idle machine
TINY = ["--base_channels", "4", "--num_workers", "0", "--patch_size", "[16,24,16]", "--overlap", "0"]
SCALE = ["--spacing", "own", "--window", "none", "--mean", "own", "--std", "own"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("signs")


@pytest.fixture(scope="module")
def run(volumes, place):
    """The folder of a run of `vdt train`, and what that wrote."""
    words = ["train", str(volumes), "-o", "run", "--minutes", "2", "--clock", "cpu", "--device", "cpu", *TINY]
    return place / "run", run_in_terminal(words, place)


def check(watched, last):
    assert watched.status == 0, watched.text
    assert watched.silence < LONGEST
    assert not re.findall("INFO|WARNING|Warning|ignite", watched.text)
    assert re.search(last + r"\r?\n$", watched.text), watched.text[-300:]


def test_train_shows_steps_with_loss_and_score_and_the_scores_last(run):
    folder, watched = run
    check(watched, rf"page: {folder}/report.html")
    assert re.search(r"epoch \d+ of \d+, step \d+ of \d+ .*<\d\d:\d\d, loss \d\S*, mean dice [01]\.\d+", watched.text)
    assert "timing a validation case" in watched.text
    assert "INFO ignite" in (folder / "log.txt").read_text()


def test_segment_counts_volumes(run, volumes, place):
    watched = run_in_terminal(["segment", str(volumes / "images"), "-o", "out", "--weights", str(run[0])], place)
    check(watched, rf"folder: {place / 'out'}")
    assert re.search(r"segmented \d of 6", watched.text)


def test_classify_shows_a_bar(nodules, place):
    words = ["classify", str(nodules), "-o", "classes", "--weights", "lung_nodule_malignancy_w16"]
    watched = run_in_terminal(words, place)
    check(watched, rf"folder: {place / 'classes'}")
    assert re.search(r"classified \d+ of \d+", watched.text)


def test_prepare_counts_cases(volumes, place):
    watched = run_in_terminal(["prepare", str(volumes), "prepared", "--workers", "1"], place)
    check(watched, r"pictures: .*")
    assert re.search(r"cases \d of 6", watched.text)


def test_embed_counts_volumes(volumes, place):
    watched = run_in_terminal(["embed", str(volumes / "images"), "-o", "features.csv"], place)
    check(watched, r"left out: 0")
    assert re.search(r"embedded \d of 6", watched.text)


def test_probe_counts_folds(nodules, place):
    run_in_terminal(["embed", str(nodules), "-o", "nodules.csv", "--size", "16"], place)
    watched = run_in_terminal(["probe", "nodules.csv", "--target", "malignancy_mean", "--above", "3"], place)
    check(watched, r"score 0\.\d+, .*")
    assert re.search(r"folds fitted \d of 5", watched.text)


def test_plan_times_steps(run, place):
    watched = run_in_terminal(["plan", "run/data", "--minutes", "1", *TINY[:2]], place)
    check(watched, r"plan\.json.*")
    assert "timing some steps" in watched.text


def test_a_large_dicom_series_is_segmented_and_classified_with_signs(place):
    """Loading, resampling and writing take the time."""
    rows, columns = np.indices((512, 512), np.float32) - 256
    body = np.where(rows**2 + columns**2 < 200**2, 40.0, -1000.0)
    write_series(place / "series", np.repeat(body[..., None], 100, -1), spacing=(0.8, 0.8, 2.0))
    words = ["series", "-o", "large", "--weights", "hippocampus_mr_w16"]
    words += ["--spacing", "[8,8,8]", "--modality", "unknown"]  # weights of MR refuse a CT
    check(run_in_terminal(["segment", *words], place), rf"folder: {place / 'large'}")
    (place / "positions.csv").write_text("column,row,slice\n256,256,50\n")
    words = ["series", "-o", "scan", "--weights", "lung_nodule_malignancy_w16", "--positions", "positions.csv"]
    check(run_in_terminal(["classify", *words], place), rf"folder: {place / 'scan'}")


def test_compare_counts_runs(volumes, place):
    words = ["compare", "scratch", str(volumes), "-o", "comparison", "--fractions", "1", "--seeds", "1", "--steps", "2"]
    words += ["--points", "1", "--held_out", "1", "--curve_cases", "1", "--settings", "settings.json"]
    (place / "settings.json").write_text('{"base_channels": 4, "patch_size": [16, 24, 16], "spacing": "own"}')
    watched = run_in_terminal(words, place)
    check(watched, r"finished: 1")
    assert re.search(r"runs finished 0 of 1", watched.text)


@pytest.mark.parametrize("stop_at", [r"starting \[00:01\]", r"step [1-9]\d* of"])
def test_ctrl_c_ends_with_a_sentence_and_all_processes(volumes, tmp_path, stop_at):
    words = ["train", str(volumes), "-o", "run", "--device", "cpu", "--epochs", "50", *TINY]
    watched = run_in_terminal(words, tmp_path, stop_at)
    # Where C code met the signal, in an import, Python ends by it afterwards; shells say 130 of both.
    assert watched.status in (130, -2)
    sentence = "vdt train: stopped; the last whole epoch is kept, and the same command goes on from there"
    assert re.search(rf"\x1b\[K{sentence}\r?\n$", watched.text)
    assert not watched.left
    assert "Traceback" not in watched.text
