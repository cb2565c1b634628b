from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from tests.faults.interruptions import KillsItsLoader, kills, places, processes, training
from tests.faults.outcomes import OUTCOMES, in_child
from vdt_workflows.errors import explanation
from vdt_workflows.files import claim
from vdt_workflows.training.runs import RunLog

pytestmark = pytest.mark.faults


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones():
    for name, result in kills(times=2).items():
        assert name == "total" or result["survived"] == 2, result["details"]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "refused"), [(places, 4), (processes, 3)])
def test_a_full_or_read_only_disk_and_a_process_that_dies_end_in_a_sentence(part, refused):
    assert part()["total"] == {**dict.fromkeys(OUTCOMES, 0), "refused": refused}


@pytest.mark.slow
def test_training_that_cannot_go_on_stops_with_advice():
    result = training()
    assert "try a lower --learning_rate than" in result["loss of NaN"]["details"][0]
    assert "out of memory" in result["too little memory"]["details"][0]
    assert result["total"]["refused"] == 2


def test_a_folder_whose_claim_was_killed_can_be_claimed(tmp_path):
    (tmp_path / ".settings.json.ab12cd").write_text("{")
    claim(tmp_path, {"size": 1}, empty=True)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "other.txt").touch()
    with pytest.raises(FileExistsError, match="files that are not from this script"):
        claim(tmp_path, {"size": 1}, empty=True)


def test_a_loader_process_that_dies_names_the_setting_that_helps():
    # in a process of its own, since torch raises from a signal handler, wherever the process happens to be
    loader = torch.utils.data.DataLoader(KillsItsLoader(), 2, num_workers=1)
    status, output = in_child(lambda: list(loader), 60)
    assert status == 1
    assert "sentence: a loader process died, most likely for want of memory" in output
    assert output.strip().endswith("use fewer --num_workers, or 0")
    assert explanation(ConnectionResetError(104, "Connection reset by peer")) is None


def run_losses(losses, tmp_path, scaler=None):
    """Run an engine whose losses are given, and give the number of the step at which it ended."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    engine = Engine(lambda engine, loss: {"loss": torch.tensor(loss)})
    engine.scaler = scaler
    RunLog(str(tmp_path), optimizer=optimizer).attach(engine)
    engine.run(losses, max_epochs=1)
    return engine.state.iteration


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_once_and_writes_nothing(tmp_path, loss):
    with pytest.raises(ValueError, match=rf"the loss is {loss:g} at step 3, in epoch 1 of 1; .*learning_rate than 0.5"):
        run_losses([1.0, 1.0, loss, 1.0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_with_a_gradient_scaler_a_few_such_steps_are_passed_over_and_many_are_not(tmp_path):
    scaler = SimpleNamespace(is_enabled=lambda: True)
    nan = float("nan")
    assert run_losses([1.0, nan, nan, *[1.0] * 30, *[nan] * 19], tmp_path, scaler) == 52
    with pytest.raises(ValueError, match="the loss is nan at step 21"):
        run_losses([1.0, *[nan] * 40], tmp_path, scaler)
