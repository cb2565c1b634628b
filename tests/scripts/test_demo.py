"""The demonstration, end to end at the smallest size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

from tests.support.bundle_runs import ROOT

pytestmark = pytest.mark.slow  # starts half a dozen processes that import torch and MONAI

SMALL = shlex.split("--epochs 1 --image_size 32 --base_channels 4 --steps 2 --points 2 --patch_size [16,16,16]")


def demo(*words):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_the_demo_leaves_a_table_and_pictures_and_does_nothing_twice(images, volumes, tmp_path):
    words = ["--output_dir", tmp_path, "--images", images, "--volumes", volumes, *SMALL]
    demo(*words)
    for name in ("vdt.png", "pretraining.png", "dice.png", "examples.png"):
        assert Image.open(tmp_path / name).size[0] > 300, name
    summary = (tmp_path / "summary.md").read_text()
    assert "| mean Dice after | 1 steps | 2 steps | minus scratch |" in summary
    assert re.search(r"\| vdt \| 0\.\d{3} \| 0\.\d{3} \| [+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\) \|", summary)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(list(tmp_path.glob("comparison/cells/*/*/models/model_last.pt"))) == 2
    assert "epoch 1/" not in demo(*words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")} == written
