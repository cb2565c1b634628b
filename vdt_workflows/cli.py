"""The command `vdt`: one word for each thing that a person does, over the functions that do it."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import fire


class Command(NamedTuple):
    """What a command runs, and its line of `vdt --help`."""

    module: str  # of vdt_workflows; imported only when the command is run, so that `vdt --help` answers at once
    function: str
    arguments: str
    summary: str


COMMANDS = {
    "prepare volumes": Command(
        "preparation.segmentation", "prepare_segmentation", "DATA OUTPUT", "volumes with labels, checked and split"
    ),
    "prepare images": Command(
        "preparation.images", "prepare_images", "IMAGES OUTPUT", "class folders of images, made small for pre-training"
    ),
    "prepare lidc": Command(
        "preparation.lidc_scans", "prepare_lidc", "DICOM OUTPUT", "LIDC-IDRI: nodules cut out and listed"
    ),
    "prepare deeplesion": Command(
        "preparation.deeplesion", "prepare_deeplesion", "FOLDER", "DeepLesion, or volumes with labels: key slices"
    ),
    "compare": Command("report.matrix", "compare", "ROWS DATASET_DIR", "starts of training compared in many runs"),
    "report": Command("report.run_page", "report_run", "RUN", "a page about a finished run"),
    "convert": Command("preparation.convert", "convert_weights", "SOURCE OUTPUT", "weights of other code, made to fit"),
    "package": Command("packaging.package", "package_bundle", "BUNDLE", "a bundle as a zip that stands alone"),
    "check": Command("packaging.check", "check_bundle", "BUNDLE_OR_ZIP...", "the checks of the Model Zoo"),
    "serve": Command("packaging.serve", "serve_monai_label", "STUDIES ZIP...", "a MONAI Label server of bundles"),
}
DEFAULT_KINDS = {"prepare": "volumes"}  # what a first word that has kinds means without one
ENDING = """\
vdt COMMAND --help lists the arguments; `vdt prepare DATA OUTPUT` is `vdt prepare volumes`.
Training and inference are bundles: python -m monai.bundle run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with the words of the command line.

    Args:
        argv: the words, those of the process by default.

    Raises:
        SystemExit: with a sentence, if there is no such command or option, or the command fails in a way that the user
            can mend.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        rows = [(f"{name} {command.arguments}", command.summary) for name, command in COMMANDS.items()]
        print("\n".join(["usage: vdt COMMAND [ARGUMENTS]", "", *_columns(rows), "", ENDING]))
    elif words[0] == "--version":
        print(f"vdt {version('vdt-bundles')}")
    else:
        name, rest = find_command(words)
        command = COMMANDS[name]
        module = import_module(f"{__package__}.{command.module}")
        run_function(getattr(module, command.function), rest, name=f"vdt {name}")


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split the words of a command line into the name of a command and its arguments.

    Raises:
        SystemExit: with the nearest one, if there is no such command.
    """
    first, *rest = words
    kinds = [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]
    if first in COMMANDS:
        return first, rest
    if rest and rest[0] in kinds:
        return f"{first} {rest[0]}", rest[1:]
    if first in DEFAULT_KINDS:
        near = get_close_matches(rest[0], kinds, n=1) if rest and not os.path.exists(rest[0]) else []
        if near:
            sys.exit(f"vdt: {first} {rest[0]}: no such folder, and no such kind; did you mean vdt {first} {near[0]}?")
        return f"{first} {DEFAULT_KINDS[first]}", rest
    near = get_close_matches(first, [*COMMANDS, *DEFAULT_KINDS], n=1)
    sys.exit(f"vdt: {first}: no such command; {f'did you mean vdt {near[0]}?' if near else 'vdt --help lists them'}")


def run_function(function: Callable[..., Any], argv: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a function with the words of the command line; what it returns is printed as one line of JSON.

    Args:
        function: with documented arguments, which are the options.
        argv: the words, those of the process by default.
        name: of the command, that of the process by default.

    Raises:
        SystemExit: with a sentence, if the words do not fit the function, if it raises ValueError, OSError, ImportError
            or MemoryError, or if the user stops it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or os.path.basename(sys.argv[0]).removesuffix(".py")
    if {"-h", "--help"} & {*words}:
        print(describe_function(function, name))
        return
    _refuse_unknown(function, words, name)
    args, kwargs = _read_words(function, words, name)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = function(*args, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: stopped; give the same command again to go on", file=sys.stderr)
        sys.exit(130)  # as shells have it
    if result is not None:
        print(json.dumps(result))


def describe_function(function: Callable[..., Any], name: str) -> str:
    """Write the help of a command from the signature and the docstring of its function.

    Args:
        function: with documented arguments, which are the options.
        name: of the command.
    """
    documented = fire.docstrings.parse(inspect.getdoc(function))
    texts = {argument.name: argument.description for argument in documented.args or []}
    words, rows = [f"usage: {name}"], []
    for parameter in inspect.signature(function).parameters.values():
        text = " ".join((texts.get(parameter.name) or "").split())
        if parameter.kind is parameter.VAR_POSITIONAL:
            option = f"{parameter.name.upper()} ..."
        elif parameter.default is parameter.empty:
            option = parameter.name.upper()
        else:
            option = f"--{parameter.name}"
            text += "" if parameter.default in (None, "") or parameter.default is False else f" [{parameter.default}]"
        words += [option] if not option.startswith("--") else []
        rows.append((option, text))
    summary = [documented.summary or "", *([documented.description] if documented.description else [])]
    lines = (sys.modules[function.__module__].__doc__ or "").splitlines()
    examples = ["  " + " ".join(line.split()) for line in lines if line.startswith("    ")]
    parts = [" ".join([*words, "[OPTIONS]"]), "\n\n".join(summary), "\n".join(_columns(rows))]
    return "\n\n".join([*parts, "\n".join(["examples:", *examples])] if examples else parts)


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lay out names and their texts in two columns of the terminal's width."""
    left = max((len(name) for name, _ in rows), default=0) + 4
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = []
    for name, text in rows:
        first, *rest = textwrap.wrap(text, max(width - left, 30), break_on_hyphens=False) or [""]
        lines += [f"  {name:<{left - 2}}{first}".rstrip(), *(" " * left + line for line in rest)]
    return lines


def _read_words(function: Callable[..., Any], words: Sequence[str], name: str) -> tuple[tuple, dict[str, Any]]:
    """Let fire read the words for a stand-in, so that what does not fit is refused before the function is called."""
    given: list[Any] = []

    @wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> None:
        given[:] = args, kwargs

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(stand_in, command=list(words), name=name)
    except fire.core.FireExit as end:
        if end.code:
            reason = end.trace.elements[-1].ErrorAsStr() or said.getvalue()
            sys.exit(f"{name}: {' '.join(reason.split())}; {name} --help lists the arguments")
        raise
    return given[0], given[1]


def _refuse_unknown(function: Callable[..., Any], words: Sequence[str], name: str) -> None:
    known = list(inspect.signature(function).parameters)
    for word in words:
        if word == "--":  # what follows is for fire itself
            return
        option = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or option in known or option.removeprefix("no") in known:
            continue
        near = get_close_matches(option, known, n=1) or known
        sys.exit(f"{name}: --{option}: no such option; did you mean {' or '.join(f'--{n}' for n in near)}?")


if __name__ == "__main__":
    main()
