"""The command `vdt`: one word for each thing that a person does, over the functions that do it."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import fire

# What each word runs, by module and function: they are imported when asked for, so that `vdt --help` answers at once.
COMMANDS = {
    "prepare": "preparation.segmentation:prepare_segmentation",
    "prepare images": "preparation.images:prepare_images",
    "prepare volumes": "preparation.segmentation:prepare_segmentation",
    "prepare lidc": "preparation.lidc_scans:prepare_lidc",
    "prepare deeplesion": "preparation.deeplesion:prepare_deeplesion",
    "compare": "report.matrix:compare",
    "report": "report.run_page:report_run",
    "convert": "preparation.convert:convert_weights",
    "package": "packaging.package:package_bundle",
    "check": "packaging.check:check_bundle",
    "serve": "packaging.serve:serve_monai_label",
}
HELP = """\
usage: vdt COMMAND [ARGUMENTS]

  prepare CASES OUTPUT           volumes with labels, checked and listed for the segmentation bundles
  prepare images IMAGES OUTPUT   pictures in class folders, upright and small, for pre-training
  prepare lidc DICOM OUTPUT      LIDC-IDRI: nodules cut out and listed
  prepare deeplesion FOLDER      DeepLesion, or volumes with labels: key slices listed
  compare ROWS DATASET_DIR       ways of pre-training against each other, as a matrix of runs and a page
  report RUN                     a page of a finished run
  convert SOURCE OUTPUT          weights of others, as a file that the bundles take
  package BUNDLE                 a bundle as a zip that needs nothing else
  check BUNDLE_OR_ZIP            what the Model Zoo's checks say of it
  serve STUDIES ZIPS             a MONAI Label server

vdt COMMAND --help tells the arguments. Trainings and inference are bundles: python -m monai.bundle run."""


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
        print(HELP)
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        sys.exit(f"vdt: {name}: no such command; {f'did you mean {near[0]}?' if near else 'vdt --help lists them'}")
    module, _, function = COMMANDS[name].partition(":")
    run_function(
        getattr(import_module(f"vdt_workflows.{module}"), function), words[len(name.split()) :], name=f"vdt {name}"
    )


def run_function(function: Callable[..., Any], argv: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a function with the words of the command line; what it returns is printed as one line of JSON.

    fire calls the function first and complains of a misspelt option after that; here it is refused before. The errors
    that a user can mend end the process with their sentence alone.

    Args:
        function: with documented arguments, which are the options.
        argv: the words, those of the process by default.
        name: of the command, that of the process by default.

    Raises:
        SystemExit: with a sentence, if there is no such option, or the function raises ValueError, OSError,
            ImportError or MemoryError.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or os.path.basename(sys.argv[0]).removesuffix(".py")
    _refuse_unknown(function, words, name)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fire.Fire(function, command=words, name=name, serialize=_write_result)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"{name}: {error}")


def _write_result(result: Any) -> str | None:
    return None if result is None else json.dumps(result)


def _refuse_unknown(function: Callable[..., Any], words: Sequence[str], name: str) -> None:
    known = list(inspect.signature(function).parameters)
    for word in words:
        if word == "--":  # what follows is for fire itself
            return
        option = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or option in (*known, "help") or option.removeprefix("no") in known:
            continue
        near = get_close_matches(option, known, n=1) or known
        sys.exit(f"{name}: --{option}: no such option; did you mean {' or '.join(f'--{n}' for n in near)}?")


if __name__ == "__main__":
    main()
