from __future__ import annotations

import os
import platform
import resource
import select
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.autograd.graph import saved_tensors_hooks

from networks import ResUNet3D
from vdt_workflows.training.checkpoints import ResumeRun, SaveWeights
from vdt_workflows.training.processes import join_processes, leave_processes, pick_device, place, share_batch, share_out
from vdt_workflows.training.runs import RememberRun, RunLog, SaveScores


@pytest.mark.parametrize(
    ("kind", "size", "last"), [(nn.Conv3d, 5, torch.channels_last_3d), (nn.Conv2d, 4, torch.channels_last)]
)
def test_channels_lie_side_by_side_in_2d_and_3d_networks_where_asked(kind, size, last):
    network = nn.Sequential(kind(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    before = [parameter.clone() for parameter in network.parameters()]
    assert place(network, "cpu")[0].weight.is_contiguous()
    assert place(network, "cpu", channels_last=True) is network
    assert network[0].weight.dim() == size
    assert network[0].weight.is_contiguous(memory_format=last)
    assert not network[0].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("cuda", [False, True])
def test_batch_statistics_are_shared_where_there_is_cuda(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    network = place(nn.Sequential(nn.BatchNorm3d(2)), "cpu", sync_bn=True)
    assert isinstance(network[0], nn.SyncBatchNorm) == cuda
    assert pick_device(3) == torch.device("cuda:3" if cuda else "cpu")


def test_a_process_joins_once_and_leaves(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        join_processes("cpu")
        assert distributed.get_backend() == "gloo"
    for _ in range(2):
        leave_processes()
        assert not distributed.is_initialized()


def test_a_process_of_a_killed_torchrun_ends(monkeypatch):
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alive, writing = os.pipe()
    if not (launcher := os.fork()):
        if not os.fork():
            join_processes("cpu")
            os.write(writing, b"joined")
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(alive, 6) == b"joined"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([alive], [], [], 20)[0]
    assert os.read(alive, 6) == b""


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_writes(monkeypatch, tmp_path, rank):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: rank)
    engine = SimpleNamespace(state=SimpleNamespace(device="cpu", metrics={"score": 0.5}))
    for handler in (
        SaveWeights(nn.Linear(2, 2), str(tmp_path / "model.pt")),
        RememberRun(str(tmp_path / "run.json"), {"depth": 18}),
        SaveScores(str(tmp_path / "scores.json")),
    ):
        handler(engine)
    assert len(list(tmp_path.iterdir())) == (3 if rank == 0 else 0)
    assert ResumeRun(str(tmp_path / "resume.pt"), {}).writes == RunLog(str(tmp_path)).writes == (rank == 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_cases_are_shared_out_once_and_no_process_is_without_any(size, processes):
    shares = [share_out(range(size), rank, processes) for rank in range(processes)]
    assert all(len(share) for share in shares)
    whole = sorted(index for share in shares for index in share)
    assert whole == (list(range(size)) if size >= processes else sorted(processes * list(range(size))))
    with pytest.raises(ValueError, match="data is empty; expected at least one sample"):
        share_out([])


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "shared"),
    [(256, 1, 64, (64, 4)), (24, 8, 1, (1, 3)), (24, 4, 6, (6, 1)), (6, 1, 64, (6, 1)), (32, 4, None, (8, 1))],
)
def test_a_batch_is_shared_evenly(batch, processes, micro, shared):
    assert share_batch(batch, processes, micro) == shared
    assert shared[0] * shared[1] * processes == batch


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "near"),
    [
        (2, 8, 2, "shared by 8 processes; give --batch_size 8, or start 2 processes"),
        (16, 3, 2, "shared by 3 processes; give --batch_size 15 or 18, or start 2 processes"),
        (16, 1, 3, "16 samples of each process .* give --micro_batch 2 or 4, or --batch_size 15 or 18"),
        (3, 1, 2, "3 samples .* give --micro_batch 1 or 3, or --batch_size 2 or 4"),
        (0, 1, 2, "must be at least 1, got 0"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(batch, processes, micro, near):
    with pytest.raises(ValueError, match=near):
        share_batch(batch, processes, micro)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_on_the_cpu_is_kept_for_the_next():
    network = place(ResUNet3D(2, 18, base_channels=4), "cpu")
    faults, kept = [], []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
            network(torch.ones(1, 1, 16, 48, 48)).square().mean().backward()
        network.zero_grad()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    pages = sum(kept) / len(faults) / resource.getpagesize()  # 6,000, that the backward pass of a step needs
    assert np.median(faults[3:]) < pages  # touched for the first time; without, 55,000 in each step
