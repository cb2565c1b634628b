"""The demonstration and the transfer table, end to end at the smallest size."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from bundle_runs import ROOT
from PIL import Image

pytestmark = pytest.mark.slow  # each starts half a dozen processes that import torch and MONAI

SMALL = shlex.split("--epochs 1 --image_size 32 --base_channels 4 --steps [2,4] --patch_size [16,16,16]")


def script(name, *words):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_the_demo_leaves_a_table_and_pictures_and_does_nothing_twice(images, volumes, tmp_path):
    words = ["--output_dir", tmp_path, "--images", images, "--volumes", volumes, *SMALL]
    script("demo", *words)
    for name in ("vdt.png", "pretraining.png", "dice.png", "examples.png"):
        assert Image.open(tmp_path / name).size[0] > 300, name
    summary = (tmp_path / "summary.md").read_text()
    assert re.search(r"\| vdt \| 0\.\d{3} ± 0\.000 \|", summary)
    models = tmp_path / "transfer" / "vdt-seed0" / "models" / "model_last.pt"
    written = models.stat().st_mtime_ns
    assert "epoch 1/" not in script("demo", *words)
    assert models.stat().st_mtime_ns == written


def test_the_table_holds_both_sides_at_every_step_on_the_same_cases(images, volumes, trained, tmp_path):
    encoder = trained(ROOT / "bundles" / "imagenet_vdt_pretraining") / "models" / "encoder.pt"
    words = ["--volumes", volumes, "--encoder", encoder, "--output_dir", tmp_path, "--seeds", 2, "--steps", "[1,2]"]
    script("transfer", *words, "--training_cases", 2, "--patch_size", "[16,16,16]")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["init"], r["seed"], r["step"]) for r in rows} == {
        (init, seed, step) for init in ("scratch", "vdt") for seed in "01" for step in "12"
    }
    lists = [json.loads((tmp_path / f"seed{seed}.json").read_text()) for seed in (0, 1)]
    assert lists[0]["validation"] == lists[1]["validation"]
    scored = {case["image"] for case in lists[0]["validation"]}
    assert not any(case["image"] in scored for seed in lists for case in seed["training"])
