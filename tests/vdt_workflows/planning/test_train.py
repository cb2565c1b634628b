"""`vdt train`: the lines that it stands for, and whole runs."""

from __future__ import annotations

import ast
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from networks import ResNet3D
from tests.support.bundle_runs import read, rows
from vdt_workflows.cli import main
from vdt_workflows.overrides import check_command_line
from vdt_workflows.planning import lines as runner
from vdt_workflows.planning.train import start_from, train
from vdt_workflows.training.shipped import find_weights


@pytest.fixture
def raw(tmp_path):
    """Cubes of 900 in noise around 0, at known places."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "raw" / kind).mkdir(parents=True)
    for number in range(6):
        labels = np.zeros((24, 24, 24), np.uint8)
        labels[number + 4 : number + 12, 6:16, 6:18] = 1
        image = random.normal(0, 50, labels.shape) + 900.0 * labels
        for kind, values in (("images", image.astype(np.int16)), ("labels", labels)):
            nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "raw" / kind / f"case{number}.nii.gz")
    return tmp_path / "raw"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Words of the processes that would run; the second leaves a score."""
    called = []

    def run(words, cwd, check):
        called.append(words)
        folder = words[words.index("--bundle_root") + 1]
        check_command_line_in(cwd, words[words.index("run") :], monkeypatch)
        (tmp_path / folder / "eval").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "eval" / "scores.json").write_text('{"mean_dice": [0.5, 0.1]}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    return called


def page(root):
    return {"folder": str(root), "page": str(root / "report.html")}


def check_command_line_in(folder, words, monkeypatch):
    with monkeypatch.context() as here:
        here.chdir(folder)
        check_command_line(words)


def words_by_option(words):
    start = words.index("run") + 1
    return {name: value for name, value in zip(words[start::2], words[start + 1 :: 2], strict=False)}  # --began=TIME


def test_the_lines_name_plan_data_and_every_further_setting(raw, runs, tmp_path):
    options = {"minutes": 5, "learning_rate": 0.001, "train::random_transforms::2::prob": 0, "base_channels": 8}
    options["cache_dir"] = "%x"
    found = train(str(raw), str(tmp_path / "run"), device="cpu", **options)
    training, evaluation = (words_by_option(words) for words in runs)
    assert "timed.yaml" in training["--config_file"]
    assert training["--args_file"] == str(tmp_path / "run" / "plan.json")
    assert training["--learning_rate"] == "0.001"
    assert training["--train::random_transforms::2::prob"] == "0"
    assert training["--minutes"] == "5"
    assert ast.literal_eval(training["--cache_dir"].removeprefix("$")) == "%x"
    assert training["--dataset_dir"] == str(tmp_path / "run" / "data")
    assert evaluation["--args_file"] == str(tmp_path / "run" / "models" / "run.json")
    assert evaluation["--part"] == "test"
    assert found == {"mean_dice": [0.5, 0.1], "cases": "test", **page(tmp_path / "run")}
    planned = read(tmp_path / "run" / "plan.json")
    assert planned["base_channels"] == 8
    assert not {"epochs", "steps_per_epoch"} & planned.keys()  # which the time decides


def test_the_width_is_that_of_the_encoder_unless_another_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ResNet3D(18, base_channels=8).state_dict(), "mine.pt")
    file = str(tmp_path / "mine.pt")
    assert start_from({"init": "vdt"}) == {"init": "vdt", "base_channels": 16}
    assert start_from({"init": "acs", "base_channels": 64}) == {"init": "acs", "base_channels": 64}
    found = start_from({"init": "vdt", "pretrained": "mine.pt"})
    assert found == {"init": "vdt", "pretrained": file, "base_channels": 8, "depth": 18}
    named = start_from({"init": "vdt", "pretrained": "vdt_resnet3d18_w16"})
    assert named["pretrained"] == str(find_weights("vdt_resnet3d18_w16") / "model.pt")
    assert named["base_channels"] == 16
    assert start_from({"init": "kinetics"}) == {"init": "kinetics"}
    assert start_from({}) == {}


def test_a_changed_plan_is_kept_and_a_training_that_is_there_says_itself_whether_it_is_the_same(raw, runs, tmp_path):
    train(str(raw), str(tmp_path / "run"), device="cpu")
    plan = tmp_path / "run" / "plan.json"
    changed = {**read(plan), "patch_size": [16, 16, 16]}
    plan.write_text(json.dumps(changed))
    train(str(raw), str(tmp_path / "run"), device="cpu")
    assert [any("evaluate" in word for word in words) for words in runs] == [False, True, False, True]
    assert read(plan) == changed


def test_one_case_is_learned_from_and_scored_with_a_word(raw, runs, tmp_path, caplog):
    for number in range(1, 6):
        for kind in ("images", "labels"):
            (raw / kind / f"case{number}.nii.gz").unlink()
    assert train(str(raw), str(tmp_path / "run"), device="cpu")["cases"] == "validation"
    lists = read(tmp_path / "run" / "data" / "dataset.json")
    assert lists["training"] == lists["validation"]
    assert "one case alone" in lists["shared_cases"]
    assert "scores on it say nothing of other cases" in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"protocol": "fast"}, "protocol must be recommended or an overlay"),
        ({"device": "gpu"}, "device must be cpu"),
        ({"args_file": "none.json"}, "--args_file none.json: vdt train writes and gives its own; give settings as"),
        ({"epoch": 3}, "--epoch: no such setting in configs/train.yaml; did you mean --epochs"),
        ({"clock": "cpu"}, "--clock: no such setting in configs/train.yaml, and none with a similar name"),
        (
            {"val_fration": 0.1, "minutes": 2},
            "--val_fration: no such setting in configs/train.yaml, configs/short.yaml",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_prepared(raw, runs, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(str(raw), str(tmp_path / "run"), **options)
    assert not runs
    assert not (tmp_path / "run").exists()


def test_the_prepared_data_of_a_run_are_not_prepared_again(raw, runs, tmp_path):
    train(str(raw), str(tmp_path / "run"), device="cpu")
    written = (tmp_path / "run" / "data" / "dataset.json").stat().st_mtime_ns
    train(str(tmp_path / "run" / "data"), str(tmp_path / "run"), device="cpu")
    assert (tmp_path / "run" / "data" / "dataset.json").stat().st_mtime_ns == written


def test_a_failed_run_ends_the_command(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="the run failed, its own message is above"):
        main(["train", str(raw), "-o", str(tmp_path / "run"), "--device", "cpu"])


@pytest.mark.slow
def test_a_box_of_time_trains_and_scores_and_goes_on_to_the_same_end(raw, tmp_path):
    root = tmp_path / "run"
    options = {"base_channels": 4, "num_workers": 0, "device": "cpu"}
    found = train(str(raw), str(root), minutes=2, **options)
    assert found["mean_dice"]["mean"] > 0.3  # one minute gave 0.33 on a machine of a quarter of the speed
    fitted = read(root / "eval" / "time.json")
    history = rows(root / "eval" / "history.csv")
    assert len(history) >= 1  # of fitted["epochs"], but KeepPace changes them where the machine is slower or faster
    assert int(history[-1]["step"]) == len(history) * fitted["steps_per_epoch"]
    assert read(root / "models" / "run.json")["_run_"]["timing"]["epochs"] == fitted["epochs"]
