from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from vdt_workflows.training.checkpoints import ResumeRun, SaveWeights
from vdt_workflows.training.processes import join_processes, leave_processes, pick_device, place, share_out
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
    assert ResumeRun(str(tmp_path / "resume.pt"), {}, {}).writes == RunLog(str(tmp_path)).writes == (rank == 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_cases_are_shared_out_once_and_no_process_is_without_any(size, processes):
    shares = [share_out(range(size), rank, processes) for rank in range(processes)]
    assert all(len(share) for share in shares)
    whole = sorted(index for share in shares for index in share)
    assert whole == (list(range(size)) if size >= processes else sorted(processes * list(range(size))))
    with pytest.raises(ValueError, match="data is empty; expected at least one sample"):
        share_out([])
