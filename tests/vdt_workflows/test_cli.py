from __future__ import annotations

import json

import pytest

from vdt_workflows.cli import run_function


@pytest.fixture(autouse=True)
def script_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/prepare.py"])


def prepare(folder: str, size: int = 80, dry_run: bool = False) -> dict:
    """Prepare a folder."""
    if size < 0:
        raise ValueError(f"size must be 0 or more, got {size}")
    if folder == "none":
        raise FileNotFoundError("none: no such folder")
    print("prepared")
    return {"folder": folder, "size": size, "dry_run": dry_run}


@pytest.mark.parametrize(
    "words",
    [
        ["x", "--size", "64", "--dry_run"],
        ["x", "--size=64", "--dry-run"],
        ["--folder", "x", "--size", "64", "--dry_run", "--", "--separator=@"],
    ],
)
def test_the_words_are_the_functions_arguments_and_its_result_is_a_line_of_json(capsys, words):
    run_function(prepare, words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"folder": "x", "size": 64, "dry_run": True}


def nothing(folder: str) -> None:
    """Return nothing."""


def test_a_function_without_a_result_prints_no_line(capsys):
    run_function(nothing, ["x"])
    assert capsys.readouterr().out == ""


def test_a_boolean_can_be_switched_off_as_fire_has_it(capsys):
    run_function(prepare, ["x", "--nodry_run"])
    assert '"dry_run": false' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--sise", "--size"),
        ("--sise=3", "--size"),
        ("--folders", "--folder"),
        ("--xyz", "--folder or --size or --dry_run"),
    ],
)
def test_a_misspelt_option_is_refused_before_anything_runs(capsys, word, near):
    with pytest.raises(
        SystemExit, match=rf"^prepare: {word.partition('=')[0]}: no such option; did you mean {near}\?$"
    ):
        run_function(prepare, ["x", word, "3"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["x", "--size", "-1"], "prepare: size must be 0 or more, got -1"), (["none"], "prepare: none: no such folder")],
)
def test_an_error_of_the_user_ends_with_its_sentence_alone(words, sentence):
    with pytest.raises(SystemExit) as end:
        run_function(prepare, words)
    assert end.value.code == sentence


def test_an_error_of_ours_keeps_its_traceback():
    def broken(folder: str) -> None:
        raise KeyError(folder)

    with pytest.raises(KeyError):
        run_function(broken, ["x"])
