from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine

from tests.faults.interruptions import KillsItsLoader, cut_short, kills, places, processes, training
from tests.faults.outcomes import OUTCOMES, in_child, make_classes
from vdt_workflows.errors import explanation
from vdt_workflows.files import claim, write_csv, write_json
from vdt_workflows.training.checkpoints import ResumeRun, save_weights
from vdt_workflows.training.runs import RunLog

pytestmark = pytest.mark.faults


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones():
    for name, result in kills(times=2).items():
        assert name == "total" or result["survived"] == 2, result["details"]


@pytest.mark.slow
def test_runs_that_never_resume_are_found(monkeypatch):
    save = ResumeRun.save
    monkeypatch.setattr(ResumeRun, "save", lambda *given: (save(*given), time.sleep(0.2)))  # or it ends before the kill
    monkeypatch.setattr("vdt_workflows.training.runs.round", lambda seconds, digits: seconds, raising=False)  # to tell
    monkeypatch.setattr(ResumeRun, "load", lambda self, engine: None)
    result = kills(times=1, what="training", after="eval/resume.pt")["training"]
    assert result["lost"] == 1, result
    assert "epochs that were finished were trained again" in str(result["details"])


def write_in_place(path, content, *, durable=True):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.slow
def test_writes_that_are_not_atomic_are_found(monkeypatch, tmp_path):
    for place in ("files", "preparation.images", "training.runs"):
        monkeypatch.setattr(f"vdt_workflows.{place}.write_atomic", write_in_place)
    result = places()
    assert result["full disk, preparation"]["lost"] == result["full disk, training"]["lost"] == 1, result


def test_files_that_are_cut_short_are_found_under_every_kind_of_name(tmp_path):
    make_classes(tmp_path / "images", 1)
    save_weights(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    write_json(tmp_path / "a.json", {"a": [1, 2, 3]})
    write_csv(tmp_path / "a.csv", [{"a": 1}], ["a"])
    files = [file for file in tmp_path.rglob("*.*") if file.is_file()]
    assert cut_short(tmp_path) == []
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert len(cut_short(tmp_path)) == len(files) == 9


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
    (tmp_path / ".ab12cd.part").write_text("{")
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
