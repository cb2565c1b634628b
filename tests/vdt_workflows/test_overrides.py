from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from monai.bundle import ConfigWorkflow, run

from vdt_workflows import overrides
from vdt_workflows.naming import plain
from vdt_workflows.overrides import check_command_line

CONFIG = """
imports: ["$import os", "$from vdt_workflows.overrides import check_command_line"]
dataset_dir: data
learning_rate: 1.0e-3
weights: null
boom: "$1 / 0"
optimizer: {_target_: torch.optim.Adam, params: "$@network.parameters()"}
network: {_target_: "$torch.nn.Linear", in_features: 1, out_features: 1}
crop: {_target_: CenterSpatialCropd, keys: image}
optional: {_target_: not_installed.Thing}
train:
  trainer: {max_epochs: 2}
  handlers:
  - {_target_: StatsHandler, name: loss}
initialize: ["$check_command_line()"]
run: ["$print('ran with', @dataset_dir)"]
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG)
    return str(path)


def check(config: str, *words: str, command: str = "run") -> None:
    check_command_line([command, "--config_file", config, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset_dir", "x"],
        ["--dataset_dir=x=y"],
        ["--dataset-dir", "x"],
        ["-dataset_dir", "x"],
        ["--learning_rate", "-1"],
        ["--learning_rate", "-1e-3", "--dataset_dir", "x"],
        ["--train::trainer::max_epochs", "3"],
        ["--train#trainer#max_epochs=3"],
        ["--train::handlers::0::_disabled_", "True"],
        ["--train::handlers::0::name", "x"],
        ["--train::handlers::0::tag_name", "x"],
        ["--train::trainer::_desc_", "x"],
        ["--optimizer::lr", "1"],
        ["--crop::roi_size", "[8,8,8]"],
        ["--network::bias", "False"],
        ["--optional::size", "1"],
        ["--+imports", "['$import sys']"],
        ["--_meta_::version", "1.0.0"],
        ["--run_id", "run", "--init_id=initialize", "--final_id", "x", "--meta_file", "x", "--logging_file", "False"],
        ["--workflow_type", "train", "--workflow_name", "ConfigWorkflow", "--properties_path", "x"],
        ["--tracking", "mlflow", "--experiment_name", "x", "--tracking_uri", "x"],
        ["--train", "{'epochs': 1}", "--train::epochs", "3"],
        ["--dataset_dir", "x", "--", "--trace"],
    ],
    ids=" ".join,
)
def test_a_legitimate_command_line_passes(config: str, words: list[str]) -> None:
    check(config, *words)


def test_positional_ids_pass(config: str) -> None:
    check_command_line(["run", "training", "initialize", "--config_file", config])


def test_run_workflow_is_read_like_run(config: str) -> None:
    check(config, "--dataset_dir", "x", command="run_workflow")
    with pytest.raises(ValueError, match="--datasetdir: no such setting"):
        check(config, "--datasetdir", "x", command="run-workflow")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--datsetdir", "x"], "--datsetdir: no such setting in {}; did you mean --dataset_dir?"),
        (["--datsetdir=x"], "--datsetdir: no such setting in {}; did you mean --dataset_dir?"),
        (["-datset-dir", "x"], "--datset_dir: no such setting in {}; did you mean --dataset_dir?"),
        (["--datset_dir"], "--datset_dir: no such setting in {}; did you mean --dataset_dir?"),
        (["--datset_dir", "None"], "--datset_dir: no such setting in {}; did you mean --dataset_dir?"),
        (["--+import", "[]"], "--import: no such setting in {}; did you mean --imports?"),
        (["--runid", "x"], "--runid: no such setting in {}; did you mean --run_id or --run?"),
        (["--max_epochs", "3"], "--max_epochs: no such setting in {}; did you mean --train::trainer::max_epochs?"),
        (
            ["--train::trainer::max_epoch", "3"],
            "--train::trainer::max_epoch: no such setting in {}; did you mean --train::trainer::max_epochs?",
        ),
        (
            ["--train#triner#max_epochs", "3"],
            "--train#triner#max_epochs: no such setting in {}; did you mean --train::trainer::max_epochs?",
        ),
        (
            ["--train::learning_rate", "1"],
            "--train::learning_rate: no such setting in {}; did you mean --learning_rate?",
        ),
        (
            ["--train::handlers::0::tagname", "x"],
            "--train::handlers::0::tagname: no such setting in {}; "
            "did you mean --train::handlers::0::tag_name or --train::handlers::0::name?",
        ),
        (["--train::handlers::1", "{}"], "--train::handlers::1: no such setting in {}, and none with a similar name"),
        (["--dataset_dir::x", "1"], "--dataset_dir::x: no such setting in {}, and none with a similar name"),
        (["--optimizer::beta", "1"], "--optimizer::beta: no such setting in {}; did you mean --optimizer::betas?"),
        (["--zzz", "1"], "--zzz: no such setting in {}, and none with a similar name"),
        (["--tracking_uri", "x"], "--tracking_uri: no such setting in {}; did you mean --tracking?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_name_is_refused_with_the_nearest_known_ones(config: str, words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match="no such setting") as error:
        check(config, *words)
    assert str(error.value) == sentence.format(config)


@pytest.mark.parametrize("word", ["false", "true", "FALSE"])
def test_a_truth_value_that_monai_takes_for_a_word_is_refused(config: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"--learning_rate {word}: MONAI takes this for a word.*give True or False"):
        check(config, "--learning_rate", word)
    check(config, "--learning_rate", word.title())
    check(config, "--dataset_dir", word)


@pytest.mark.parametrize("name", ["dataset_dir", "optimizer::lr"])
def test_none_which_monai_passes_over_is_refused_but_where_the_config_says_none_too(config: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name} None: MONAI passes over None; give one of the values"):
        check(config, f"--{name}", "None")
    check(config, "--weights", "None")  # as the args_file of a run says what was not set


def test_a_flag_that_fire_reads_as_its_negation_is_refused(config: str) -> None:
    with pytest.raises(ValueError, match="--_dataset_dir: no such setting"):  # fire: _dataset_dir=False
        check(config, "--no_dataset_dir")


def test_what_an_overlay_adds_is_known(config: str, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("train::trainer::amp: true\nextra: 1\n+imports: ['$import sys']\n")
    files = f"['{config}', '{overlay}']"
    check(files, "--extra", "2", "--train::trainer::amp", "False", "--imports::2", "$import re")
    with pytest.raises(
        ValueError, match=r"--extr: no such setting in .*train.yaml, .*overlay.yaml; did you mean --extra\?"
    ):
        check(files, "--extr", "2")
    with pytest.raises(ValueError, match="--extra: no such setting"):
        check(config, "--extra", "2")


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_an_args_file_is_checked_with_the_command_line(config: str, tmp_path: Path, write) -> None:
    args = tmp_path / ("run.json" if write is json.dumps else "run.yaml")
    settings = {"config_file": [config], "run_id": "run", "train#trainer#max_epochs": 1, "_run_": {"seed": 1}}
    args.write_text(write(settings))
    check_command_line(["run", "--args_file", str(args), "--dataset_dir", "x"])
    with pytest.raises(ValueError, match=r"^--datsetdir: no such setting"):
        check_command_line(["run", "--args_file", str(args), "--datsetdir", "x"])
    args.write_text(write({**settings, "datsetdir": "x"}))
    with pytest.raises(ValueError, match="datsetdir in ") as error:
        check_command_line(["run", "--args_file", str(args)])
    assert str(error.value) == f"datsetdir in {args}: no such setting in {config}; did you mean --dataset_dir?"


@pytest.mark.parametrize("text", [None, "a: [", "- a", "a::b: 1"], ids=["missing", "unclosed", "list", "no parent"])
def test_a_broken_config_file_is_left_to_monai(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text)
    check(str(path), "--datsetdir", "x")


@pytest.mark.parametrize(
    "argv", [[], ["run"], ["run", "--a", "1"], ["verify_net_in_out", "--config_file", "x", "--a", "1"]], ids=" ".join
)
def test_without_a_run_of_config_files_there_is_nothing_to_check(argv: list[str]) -> None:
    check_command_line(argv)


def test_a_process_that_is_not_monai_bundle_is_not_disturbed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["monai/bundle/__main__.py", "run", "--config_file", config, "--datsetdir", "x"])
    check_command_line()
    workflow = ConfigWorkflow(config, logging_file=False, workflow_type=None, datsetdir="x")
    workflow.initialize()
    workflow.run()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "2024_01",
            "1.20",
            "2024",
            "true",
            "True",
            "[a]",
            "{b}",
            "(a, b)",
            "1e3",
            "mine#2",
            "#",
            "x#1/y#2",
            "a b",
            "0x10",
        ),
        *(
            "@x",
            "$x",
            "$HOME/x",
            "$ 5",
            "@x::y",
            "-x",
            "=",
            "a=b",
            "'",
            "'a",
            "Größe",
            "\\n",
            "a\nb",
            "None#",
            "_",
            "1_0",
        ),
    ],
)
def test_a_path_is_the_text_that_was_written(config: str, name: str, monkeypatch, capsys) -> None:
    words = ["run", "--config_file", config, f"--dataset_dir={name}"]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", *words])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(overrides, "_is_bundle_process", lambda: True)
    _, settings, _ = overrides._read(words)  # by fire, as MONAI has it
    run(**settings)
    assert capsys.readouterr().out == f"ran with {name}\n"


@pytest.mark.parametrize("value", ["$'a' + 'b'", "$os.path.join('a', 'b')", "@learning_rate", "%learning_rate"])
def test_an_expression_and_a_reference_stay_what_they_are(config: str, value: str) -> None:
    assert overrides._check(["run", "--config_file", config, "--dataset_dir", value]) == {}


def test_names_are_texts_and_numbers_among_them_are_refused(config: str) -> None:
    Path(config).write_text(CONFIG + "label_names: [a]\n")
    given = ["run", "--config_file", config, "--label_names"]
    found = overrides._check([*given, "['a', 'C#', '$x', '@a']"])
    assert plain(found) == {"label_names": ["a", "C#", "$x", "@a"]}
    assert found != plain(found)
    with pytest.raises(ValueError, match=r"label_names .*: 1.2 is no text; quote each name, as"):
        overrides._check([*given, "[a, 1.20]"])
    with pytest.raises(ValueError, match=r"^--dataset_dir: needs a value; one that begins with - is written --dataset"):
        overrides._check(["run", "--config_file", config, "--dataset_dir", "--learning_rate", "1"])


def run_bundle(*words: str) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


@pytest.mark.slow
def test_a_real_run_ends_with_the_sentence(config: str) -> None:
    process = run_bundle("--config_file", config, "--datsetdir", "x")
    assert process.returncode != 0
    assert process.stderr.endswith(f"--datsetdir: no such setting in {config}; did you mean --dataset_dir?\n")
    assert "ran with" not in process.stdout


@pytest.mark.slow
def test_a_real_run_with_known_names_runs(config: str) -> None:
    process = run_bundle("--config_file", config, "--dataset_dir", "here", "--train#trainer#max_epochs", "-1")
    assert process.returncode == 0, process.stderr
    assert "ran with here" in process.stdout
