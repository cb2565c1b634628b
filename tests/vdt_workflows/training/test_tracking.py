"""Experiment tracking by MONAI's own knob, which the check of the command line must let through."""

import os
import sqlite3
import subprocess
import sys

import pytest

from tests.support.bundle_runs import BASE, ROOT, command, history


@pytest.mark.slow
def test_mlflow_keeps_the_curves_in_the_output_folder(volumes, tmp_path):
    pytest.importorskip("mlflow")
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    words = [sys.executable, "-m", *command(bundle, BASE, tmp_path, volumes, tracking="mlflow")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = [float(row["val_mean_dice"]) for row in history(tmp_path)]
    database = sqlite3.connect(tmp_path / "eval" / "mlruns.db")
    found = database.execute("SELECT value FROM metrics WHERE key = 'val_mean_dice' ORDER BY step").fetchall()
    assert [value for (value,) in found] == pytest.approx(expected)
