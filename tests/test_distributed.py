"""Two processes over gloo do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from bundle_runs import ROOT, command

pytestmark = pytest.mark.slow  # each test starts processes that import torch and MONAI

PRETRAINING = ROOT / "bundles" / "imagenet_vdt_pretraining"
SEGMENTATION = ROOT / "bundles" / "bcv_multiorgan_segmentation"
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
ONE = [sys.executable, "-m"]
NO_DROPOUT = {"network_def::network::dropout": 0.0}


def execute(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.mark.parametrize(
    ("bundle", "metric"),
    [(PRETRAINING, "val_top1"), (SEGMENTATION, "val_mean_dice")],
    ids=["pretraining", "segmentation"],
)
def test_evaluation_by_two_processes_equals_evaluation_by_one(bundle, metric, images, volumes, trained, tmp_path):
    data = images if bundle == PRETRAINING else volumes
    path = str(trained(bundle) / "models" / "model.pt")
    # Nine images and five cases: no number that two processes can share evenly.
    scores = {}
    for name, start, overlay in (("one", ONE, []), ("two", TWO, ["multi_gpu_train"])):
        more = {"ckpt_path": path} | ({} if bundle == PRETRAINING else {"part": "training"})
        execute([*start, *command(bundle, ["train", *overlay, "evaluate"], tmp_path / name, data, **more)])
        scores[name] = json.loads((tmp_path / name / "eval" / "scores.json").read_text())
    assert scores["two"][metric] == pytest.approx(scores["one"][metric], abs=1e-6)


@pytest.mark.parametrize("bundle", [PRETRAINING, SEGMENTATION], ids=["pretraining", "segmentation"])
def test_training_with_group_norm_by_two_processes_ends_as_by_one(bundle, images, volumes, tmp_path):
    data = images if bundle == PRETRAINING else volumes
    # Large enough that no norm works on a handful of values, which would blow up the last bits; and no dropout, whose
    # draws differ between processes. What is left is the order of sums.
    more = {"image_size": 64} if bundle == PRETRAINING else {"patch_size": [32, 32, 32], **NO_DROPOUT}
    for name, start, overlay in (("one", ONE, []), ("two", TWO, ["multi_gpu_train"])):
        settings = {"norm": "group", "epochs": 2, "base_channels": 8, **more}
        execute([*start, *command(bundle, ["train", *overlay], tmp_path / name, data, **settings)])
    name = "model.pt" if bundle == PRETRAINING else "model_last.pt"
    one, two = (torch.load(tmp_path / n / "models" / name, weights_only=True) for n in ("one", "two"))
    assert list(one) == list(two)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_training_with_batch_norm_by_two_processes_runs_and_only_one_writes(images, tmp_path):
    execute([*TWO, *command(PRETRAINING, ["train", "multi_gpu_train"], tmp_path, images)])
    assert (tmp_path / "models" / "model.pt").is_file()
    assert len((tmp_path / "eval" / "history.csv").read_text().splitlines()) == 3
