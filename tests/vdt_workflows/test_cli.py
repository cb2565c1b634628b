import inspect
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from tests.support.bundle_runs import ROOT
from vdt_workflows.cli import COMMANDS, _reader, describe_function, find_command, main, run_function


@pytest.fixture(autouse=True)
def script_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/prepare.py"])


def prepare(folder: str, size: int = 80, dry_run: bool = False) -> dict:
    """Prepare a folder.

    Args:
        folder: what to prepare,
            on two lines.
        size: in pixels.
        dry_run: only say what would be done.
    """
    if folder == "endless":
        raise KeyboardInterrupt
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


def test_a_result_that_counts_failures_is_printed_and_ends_with_status_1(capsys):
    with pytest.raises(SystemExit) as end:
        run_function(lambda: {"cells": 4, "failed": 1}, [])
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out) == {"cells": 4, "failed": 1}


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


TEXTS = (
    "2024_01",
    "1.20",
    "mine#2",
    "@x",
    "2024",
    "true",
    "[a]",
    "{b}",
    "%x",
    "$x",
    "a b",
    "None",
    "'x'",
    "Größe",
    "1e3",
)


@pytest.mark.parametrize("words", [["data", "-x", "3"], ["-x3", "data"], ["data", "-o", "mine.json"]])
def test_an_option_of_one_letter_is_refused_where_settings_are_free(words):
    def study(data, **settings):
        raise AssertionError("was called")

    with pytest.raises(SystemExit, match=r"^study: -\w+: no such option; options are written --name value"):
        run_function(study, words, "study")


def test_o_stands_for_the_file_that_a_plan_is_written_to():
    def study(data: str, output_file: str = "", **settings):
        assert (output_file, settings) == ("mine.json", {"stem": "unet"})

    run_function(study, ["data", "-o", "mine.json", "--stem", "unet"], "study")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_handed_over_as_they_are(capsys, text, tmp_path, monkeypatch):
    def take(one: str, several: str | list[str], *rest: str, named: str | None = None):
        return [one, several, named, *rest]

    assert _reader(str) is _reader("str") is _reader(str | None) is str
    take.__annotations__ = {"one": "str", "several": "str | Sequence[str]", "rest": "str", "named": "str | None"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).touch()
    run_function(take, [text, text, text, text, f"--named={text}"])
    assert json.loads(capsys.readouterr().out) == [text] * 5
    run_function(take, ["x", "['a', 'b#c']"])
    assert json.loads(capsys.readouterr().out)[1] == ["a", "b#c"]
    with pytest.raises(SystemExit, match=r"202401 is no text; quote each, as"):
        run_function(take, ["x", "[2024_01, b]"])
    with pytest.raises(SystemExit, match=r"--named: needs a value; one that begins with - is written --named=-x$"):
        run_function(take, ["x", "y", "--named"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["x", "--size", "-1"], "prepare: size must be 0 or more, got -1"),
        (["none"], "prepare: none: no such folder"),
        ([], "no value for the required argument: folder; prepare --help lists the arguments"),
        (["x", "1", "True", "more"], "prepare: Could not consume arg: more; prepare --help lists the arguments"),
    ],
)
def test_an_error_of_the_user_ends_with_its_sentence_alone(capsys, words, sentence):
    with pytest.raises(SystemExit) as end:
        run_function(prepare, words)
    assert end.value.code.endswith(sentence)
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_ends_with_a_sentence_and_the_status_of_shells(capsys):
    with pytest.raises(SystemExit) as end:
        run_function(prepare, ["endless"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "prepare: stopped; give the same command again to go on\n"


def test_an_error_of_ours_keeps_its_traceback():
    def broken(folder: str) -> None:
        raise KeyError(folder)

    with pytest.raises(KeyError):
        run_function(broken, ["x"])


# The command vdt ---------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_names_every_command_and_imports_no_torch():
    code = "import sys; from vdt_workflows.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 27  # with the prompt, of a terminal of 30 rows
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)


def test_the_module_is_the_command_too():
    words = [sys.executable, "-m", "vdt_workflows", "frobnicate"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vdt: frobnicate: no such command; vdt --help lists them\n"


def test_the_version_is_that_of_the_installed_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("vdt 0.")


def test_the_help_of_a_command_shows_each_argument_with_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert describe_function(prepare, "vdt prepare").split("\n\n")[:3] == [
        "usage: vdt prepare FOLDER [OPTIONS]",
        "Prepare a folder.",
        "  FOLDER     what to prepare, on two lines.\n"
        "  --size     in pixels. [80]\n"
        "  --dry_run  only say what would be done.\n"
        "  --verbose  show all messages of libraries, in place of the bar",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_documents_its_arguments_within_80_columns_and_shows_an_example(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    module = import_module(f"vdt_workflows.{COMMANDS[name].module}")
    function = getattr(module, COMMANDS[name].function)
    text = describe_function(function, f"vdt {name}")
    assert f"examples:\n  vdt {name}" in text
    *_, arguments, _ = text.split("\n\n")
    assert max(map(len, text.partition("examples:")[0].splitlines()[1:])) <= 80
    options = [n for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty]
    assert ("-o, --output" in text) == bool({"output", "output_dir", "output_file"} & {*options})
    rows = [line.strip().split("  ", 1) for line in arguments.splitlines() if line[2] != " "]
    assert len(rows) == len(inspect.signature(function).parameters) + 1  # --verbose
    assert all(len(row) == 2 for row in rows), rows


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["prepare", "images", "x"], ("prepare images", ["x"])),
        (["prepare", "x", "y"], ("prepare volumes", ["x", "y"])),
        (["prepare"], ("prepare volumes", [])),
        (["check", "all"], ("check", ["all"])),
    ],
)
def test_a_first_word_without_a_kind_means_the_usual_one(words, found):
    assert find_command(words) == found


@pytest.mark.parametrize(
    ("words", "near"),
    [(["chek"], "did you mean vdt check?"), (["prepare", "volume"], "did you mean vdt prepare volumes?")],
)
def test_a_misspelt_command_is_refused_with_the_nearest(words, near):
    with pytest.raises(SystemExit, match=near.replace("?", r"\?")):
        main(words)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("networks.py", "-m vdt_workflows --version"),
        ("vdt_transforms/__init__.py", "-m vdt_workflows --version"),
        pytest.param("vdt_workflows.py", "-m monai.bundle run --config_file config.json", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_hides_one_of_the_packages_is_named(tmp_path, file, words):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "config.json").write_text(json.dumps({"imports": ["$import vdt_transforms"], "run": ["$print(1)"]}))
    command = [sys.executable, "-W", "ignore", *words.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    name = file.partition("/")[0].removesuffix(".py")
    assert f"/{file}: hides the package {name} in {ROOT / name}; rename it" in done.stderr.splitlines()[-1]


def test_on_a_terminal_a_result_is_written_in_words(monkeypatch, capsys):
    def told() -> dict:
        return {"mean_dice": {"mean": 0.87654, "n": 2}, "rows": [{"name": "a b", "folds": [0.5, 1]}, {"name": "c"}]}

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_function(told, [])
    assert capsys.readouterr().out == "mean dice: mean 0.8765, n 2\nrows: name a b, folds 0.5, 1; name c\n"
