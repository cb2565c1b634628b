"""Two processes over gloo do what one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.bundle_runs import BUNDLES, command, read, rows, run
from tests.support.two_nodes import start_nodes, wait_for

pytestmark = pytest.mark.slow  # each test starts processes that import torch and MONAI

SEGMENTATION, _, PRETRAINING, NODULES, *_ = BUNDLES
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
NO_DROPOUT = {"network_def::network::dropout": 0.0}


@pytest.fixture
def run_by_two(preloaded, tmp_path):
    """Return a function that runs a bundle by two processes, started as torchrun does."""

    def run_both(bundle, overlays, folder, data, **settings):
        log, names = tmp_path / "log", ["train", "multi_gpu_train", *overlays]
        words = ["-m", *command(bundle, names, folder, data, **settings)]
        status = preloaded.run(words, tmp_path, {}, log, processes=2)
        assert status == 0, log.read_text()[-6000:]

    return run_both


@pytest.fixture
def run_twice(run_by_two, tmp_path):
    """Return a function that runs a bundle into `one` in this process, and into `two` by two processes."""

    def run_each(bundle, overlays, data, **settings):
        run(bundle, ["train", *overlays], tmp_path / "one", data, **settings)
        run_by_two(bundle, overlays, tmp_path / "two", data, **settings)
        return tmp_path / "one", tmp_path / "two"

    return run_each


def assert_same_scores(*folders):
    one, two = (read(folder / "eval" / "scores.json") for folder in folders)
    assert one.keys() == two.keys()
    for name in {name for name in one if not isinstance(one[name], dict)} - {"confusion_matrix"}:
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


@pytest.mark.parametrize("bundle", [PRETRAINING, NODULES], ids=lambda bundle: bundle.name)  # segmentation: two nodes
def test_evaluation_by_two_processes_equals_evaluation_by_one(bundle, data_of, trained, run_twice):
    more = {"ckpt_path": str(trained(bundle) / "models" / "model.pt")}
    if bundle != PRETRAINING:
        more["part"] = "training"
    # Nine images, an odd number of nodules: none that two processes can share evenly.
    folders = run_twice(bundle, ["evaluate"], data_of(bundle), **more)
    assert_same_scores(*folders)
    if bundle == NODULES:
        a, b = (rows(folder / "eval" / "predictions.csv") for folder in folders)
        assert len(a) % 2
        assert [row["nodule_id"] for row in a] == [row["nodule_id"] for row in b]


@pytest.mark.parametrize("bundle", [PRETRAINING, SEGMENTATION], ids=["pretraining", "segmentation"])
def test_training_with_group_norm_by_two_processes_ends_as_by_one(bundle, data_of, run_twice):
    # Large enough that no norm works on a handful of values, which would blow up the last bits; and no dropout, whose
    # draws differ between processes. What is left is the order of sums.
    more = {"image_size": 64} if bundle == PRETRAINING else {"patch_size": [32, 32, 32], **NO_DROPOUT}
    settings = {"norm": "group", "epochs": 2, "base_channels": 8, **more}
    folders = run_twice(bundle, [], data_of(bundle), **settings)
    name = "model.pt" if bundle == PRETRAINING else "model_last.pt"
    one, two = (torch.load(folder / "models" / name, weights_only=True) for folder in folders)
    assert list(one) == list(two)
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_training_with_batch_norm_by_two_processes_runs_and_only_one_writes(images, run_by_two, tmp_path):
    run_by_two(PRETRAINING, [], tmp_path, images)
    assert (tmp_path / "models" / "model.pt").is_file()
    assert len((tmp_path / "eval" / "history.csv").read_text().splitlines()) == 3


# Two nodes


def last_lines(folder, number):
    return "\n".join((folder / f"node{number}.txt").read_text().splitlines()[-20:])


def test_evaluation_on_two_nodes_equals_evaluation_by_one_process(volumes, trained, tmp_path):
    more = {"ckpt_path": str(trained(SEGMENTATION) / "models" / "model.pt"), "part": "training"}  # five cases
    names = ["train", "multi_gpu_train", "evaluate"]
    nodes = start_nodes(command(SEGMENTATION, names, tmp_path / "two", volumes, **more), tmp_path)
    assert [node.wait(600) for node in nodes] == [0, 0], last_lines(tmp_path, 0)
    run(SEGMENTATION, ["train", "evaluate"], tmp_path / "one", volumes, **more)
    assert_same_scores(tmp_path / "one", tmp_path / "two")


def test_a_killed_process_ends_the_other_node_within_a_minute_with_its_cause(volumes, tmp_path):
    words = command(SEGMENTATION, ["train", "multi_gpu_train"], tmp_path, volumes, epochs=500, val_interval=500)
    nodes = start_nodes(words, tmp_path)
    try:
        wait_for((tmp_path / "eval" / "history.csv").exists, 600)
        children = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
        start = time.monotonic()
        assert all(node.wait(60) for node in nodes)
        assert time.monotonic() - start < 60
    finally:
        for node in nodes:
            node.kill()
    assert "SIGKILL" in last_lines(tmp_path, 1)
    assert "RuntimeError" in last_lines(tmp_path, 0)  # from gloo: the other side has gone


def test_a_sentence_stands_in_the_last_lines_of_torchrun(volumes, tmp_path):
    words = command(SEGMENTATION, ["train", "multi_gpu_train"], tmp_path, volumes, init="vdt", pretrained="/none.pt")
    result = subprocess.run([*TWO, *words], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "/none.pt: no such checkpoint file" in "\n".join(result.stderr.splitlines()[-20:])
