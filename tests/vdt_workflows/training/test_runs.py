import io
import json
import logging
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from PIL import Image

from tests.support.bundle_runs import rows as read_rows
from vdt_workflows.training.runs import Attach, RememberRun, RunLog, SaveScores, SkippedImages, draw_curves

PICTURE = (1000, 400)  # pixels


# RunLog


def make_run(folder, *, scores=None, interval=1, rate=None, losses=(1.0, 2.0, 6.0), as_list=False, **options):
    """An engine with a log; `scores` are the validator's metrics, a function of the epoch."""

    def step(engine, batch):
        output = {"loss": torch.tensor(batch, requires_grad=True) * engine.state.epoch}
        return [output] if as_list else output

    engine = Engine(step)
    validator = None
    if scores is not None:
        validator = Engine(lambda engine, batch: None)
        validator.add_event_handler(
            Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(scores(engine.state.epoch))
        )
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=interval), lambda e: validator.run([0]))
    optimizer = None
    if rate is not None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        group = optimizer.param_groups[0]
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: group.update(lr=group["lr"] / 10))
    log = RunLog(str(folder), validator, optimizer, **options)
    log.attach(engine)
    return engine, log, list(losses)


@pytest.mark.parametrize("as_list", [False, True])  # as MONAI's trainers give it without and with decollate
def test_each_epoch_is_a_row_of_the_history(tmp_path, as_list):
    engine, log, data = make_run(tmp_path / "out", scores=lambda epoch: {"dice": epoch / 8}, rate=0.5, as_list=as_list)
    engine.run(data, max_epochs=3)
    rows = read_rows(tmp_path / "out" / "history.csv")
    assert list(rows[0]) == ["epoch", "step", "train_loss", "lr", "dice", "seconds"]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert [float(row["train_loss"]) for row in rows] == [3.0, 6.0, 9.0]
    np.testing.assert_allclose([float(row["lr"]) for row in rows], [0.5, 0.05, 0.005])  # during the epoch
    assert [float(row["dice"]) for row in rows] == [1 / 8, 2 / 8, 3 / 8]
    assert all(0 <= float(row["seconds"]) < 60 for row in rows)
    assert [row["train_loss"] for row in log.rows] == [3.0, 6.0, 9.0]


def test_epochs_without_validation_leave_the_scores_empty(tmp_path):
    engine, _, data = make_run(tmp_path, scores=lambda epoch: {"dice": epoch / 8}, interval=2)
    engine.run(data, max_epochs=4)
    assert [row["dice"] for row in read_rows(tmp_path / "history.csv")] == ["", "0.25", "", "0.5"]


def test_a_score_for_each_class_becomes_a_column_for_each(tmp_path):
    engine, log, data = make_run(tmp_path, scores=lambda epoch: {"dice": torch.tensor([0.25, 0.5]), "mean": [0.5]})
    engine.run(data, max_epochs=1)
    assert log.rows[0].items() >= {"dice_1": 0.25, "dice_2": 0.5, "mean": 0.5}.items()


def test_a_killed_runs_rows_are_taken_back(tmp_path):
    engine, log, data = make_run(tmp_path, scores=lambda epoch: {"dice": epoch / 8})
    engine.run(data, max_epochs=2)
    state = json.loads(json.dumps(log.state_dict()))
    engine, log, data = make_run(tmp_path, scores=lambda epoch: {"dice": epoch / 8})
    log.load_state_dict(state)
    engine.load_state_dict({"epoch": 2, "max_epochs": 4, "epoch_length": len(data)})
    engine.run(data, max_epochs=4)
    rows = read_rows(tmp_path / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["train_loss"]) for row in rows] == [3.0, 6.0, 9.0, 12.0]
    assert len(state["rows"]) == 2


def test_one_line_of_text_tells_the_epoch(tmp_path, caplog):
    engine, _, data = make_run(tmp_path, scores=lambda epoch: {"dice": 0.123456})
    with caplog.at_level(logging.INFO, "vdt_workflows.training.runs"):
        engine.run(data, max_epochs=2)
    assert "epoch 2/2, step 6: train_loss 6, dice 0.1235, seconds" in caplog.text


def test_a_process_that_does_not_write_only_keeps_its_rows(tmp_path):
    engine, log, data = make_run(tmp_path / "out", writes=False)
    engine.run(data, max_epochs=2)
    assert len(log.rows) == 2
    assert not (tmp_path / "out").exists()


def test_the_curves_are_a_picture(tmp_path):
    engine, _, data = make_run(tmp_path, scores=lambda epoch: {"dice": 0.5, "val_loss": 1.0}, interval=2, title="A run")
    engine.run(data, max_epochs=2)
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", PICTURE)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"epoch": 1, "step": 1, "train_loss": float("nan"), "seconds": 0.0}],
        [{"epoch": 1, "train_loss": float("inf")}, {"epoch": 2, "train_loss": 1.0}],
    ],
    ids=["none", "nan", "inf"],
)
def test_curves_of_little_or_no_sense_are_drawn_too_under_a_title_that_is_no_formula(rows):
    with Image.open(io.BytesIO(draw_curves(rows, r"$\frac$"))) as picture:
        assert picture.size == PICTURE


# RememberRun

SETTINGS = {"depth": 18, "mean": 114.495, "class_names": ["cat", "dog"], "norm": "batch", "none": None}


def remember(file, settings, notes=None, results=None):
    engine = Engine(lambda engine, batch: None)
    engine.state.device = torch.device("cpu")
    RememberRun(str(file), settings, notes, results).attach(engine)
    engine.run([0])
    return json.loads(file.read_text())


def test_the_settings_and_how_the_run_began_are_written(tmp_path):
    content = remember(tmp_path / "models" / "run.json", SETTINGS, {"seed": 3, "protocol": "paper"})
    record = content.pop("_run_")
    assert content == SETTINGS
    assert (record["seed"], record["protocol"], record["device"]) == (3, "paper", "cpu")
    assert record["torch"] == torch.__version__
    assert {"command", "started", "python", "monai"} <= set(record)


def test_what_lists_results_is_for_other_programs_and_the_settings_are_for_monai(tmp_path):
    settings = {"volumes": ["/data/a#1.nii.gz"], "label_names": ["@home", "%x"]}
    assert remember(tmp_path / "run.json", settings)["volumes"] == ["$'/data/a\\x231\\x2enii\\x2egz'"]
    (tmp_path / "a#1_seg.nii.gz").touch()
    content = remember(tmp_path / "inference.json", settings, None, str(tmp_path))
    assert content["label_names"] == ["@home", "%x"]
    assert content["results"] == {"/data/a#1.nii.gz": ["a#1_seg.nii.gz"]}


def test_values_that_json_does_not_know_are_written_plainly(tmp_path):
    settings = {"size": (1, 2), "a": np.arange(2), "b": np.float32(0.5), "c": torch.ones(2), "path": Path("x/y")}
    content = remember(tmp_path / "run.json", settings)
    content.pop("_run_")
    assert content == {"size": [1, 2], "a": [0, 1], "b": 0.5, "c": [1.0, 1.0], "path": "x/y"}


@pytest.mark.parametrize("names", [["cat", "dog"], ["@eaDir", "$1", "%gone::x", " $x", "it's @a \\@b", "5 $"]])
def test_another_stage_takes_the_settings(tmp_path, monkeypatch, names):
    """As `monai.bundle run` does with --args_file: the file's entries override the config's."""
    command = ["monai.bundle", "run", "--lr", "$1/10", "--x", "@gone", "--y", "%train::gone", "--z", "%gone.yaml::x"]
    monkeypatch.setattr("sys.argv", command)
    record = remember(tmp_path / "run.json", {**SETTINGS, "class_names": names}, {"note": "@gone"})["_run_"]
    assert shlex.split(record["command"]) == command
    parser = ConfigParser({"depth": 50, "class_names": [], "text": "$'resnet' + str(@depth)"})
    parser.update(ConfigParser.load_config_file(tmp_path / "run.json"))
    assert parser.get_parsed_content("depth") == 18
    assert parser.get_parsed_content("class_names") == names
    assert parser.get_parsed_content("text") == "resnet18"


# SaveScores


def test_scores_are_written_with_what_they_were_measured_on(tmp_path):
    engine = Engine(lambda engine, batch: None)
    SaveScores(str(tmp_path / "out" / "scores.json"), {"data": Path("a/b"), "cases": 3}).attach(engine)
    scores = {"dice": torch.tensor([0.5, 0.25]), "mean": 0.375, "count": np.int64(3)}
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(scores))
    engine.run([0])
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written == {"dice": [0.5, 0.25], "mean": 0.375, "count": 3, "_run_": {"data": "a/b", "cases": 3}}


# Attach


def test_attach_attaches_the_handler_itself():
    seen = []
    Attach(SimpleNamespace(attach=seen.append)).attach("engine")
    assert seen == ["engine"]


# SkippedImages


def test_each_image_left_out_is_named_once_and_counted(tmp_path, caplog):
    engine = Engine(lambda engine, batch: None)
    SkippedImages(str(tmp_path / "out" / "skipped.txt")).attach(engine)
    with caplog.at_level(logging.WARNING):
        batches = [["a.jpg: cut"], [], ["b.jpg: no", "a.jpg: cut"]]
        engine.run([{"skipped": reasons} for reasons in batches], max_epochs=3)
    assert (tmp_path / "out" / "skipped.txt").read_text() == "a.jpg: cut\nb.jpg: no\n"
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if m.startswith("left out")] == ["left out: a.jpg: cut", "left out: b.jpg: no"]
    assert messages[-1] == f"2 images left out so far, listed in {tmp_path / 'out' / 'skipped.txt'}"


def test_where_none_is_left_out_nothing_is_written(tmp_path, caplog):
    engine = Engine(lambda engine, batch: None)
    SkippedImages(str(tmp_path / "skipped.txt")).attach(engine)
    with caplog.at_level(logging.WARNING):
        engine.run([{"skipped": []}], max_epochs=2)
    assert not caplog.records
    assert not list(tmp_path.iterdir())
