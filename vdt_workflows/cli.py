"""The command `vdt`: one word for each thing that a person does, over the functions that do it."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial, wraps
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import fire

from vdt_workflows.errors import REMEDIES, explanation, in_one_line
from vdt_workflows.naming import TEXTS
from vdt_workflows.progress import signs, uncollected


class Command(NamedTuple):
    """What a command runs, and its line of `vdt --help`."""

    module: str  # of vdt_workflows; imported only when the command is run, so that `vdt --help` answers at once
    function: str
    arguments: str
    summary: str


COMMANDS = {
    "segment": Command("planning.apply", "segment", "VOLUMES -o OUT", "label maps of volumes, by trained weights"),
    "classify": Command("planning.apply", "classify", "SCAN", "how likely nodules are to be malignant"),
    "detect": Command("planning.apply", "detect", "SCANS -o OUT", "lesions of CT, as boxes with scores"),
    "prepare volumes": Command(
        "preparation.segmentation", "prepare_segmentation", "DATA OUTPUT", "volumes with labels, checked and split"
    ),
    "prepare images": Command(
        "preparation.images", "prepare_images", "IMAGES OUTPUT", "class folders of images, made small"
    ),
    "prepare lidc": Command(
        "preparation.lidc_scans", "prepare_lidc", "DICOM OUTPUT", "LIDC-IDRI: nodules cut out and listed"
    ),
    "prepare deeplesion": Command(
        "preparation.deeplesion", "prepare_deeplesion", "FOLDER", "DeepLesion, or volumes with labels: key slices"
    ),
    "plan": Command("planning.plan", "plan", "PREPARED", "settings of a segmentation, from its data"),
    "train": Command("planning.train", "train", "VOLUMES", "a segmentation of your own data, in a given time"),
    "evaluate": Command("planning.apply", "evaluate", "RUN DATA", "scores of trained weights on held-out cases"),
    "pretrain": Command("planning.apply", "pretrain", "IMAGES", "an encoder from images in class folders"),
    "compare": Command("report.matrix", "compare", "ROWS DATASET_DIR", "initialisations compared in many runs"),
    "embed": Command(
        "evaluation.features", "embed_volumes", "VOLUMES -o OUT", "features of volumes by a frozen encoder"
    ),
    "probe": Command("report.probe", "probe_features", "FEATURES...", "what frozen features tell, patient by patient"),
    "report": Command("report.run_page", "report_run", "RUN", "a page about a finished run"),
    "weights": Command("training.shipped", "show_weights", "[NAME]", "the weights that are shipped, or one's card"),
    "convert": Command("preparation.convert", "convert_weights", "SOURCE OUTPUT", "weights of other code, made to fit"),
    "package": Command("packaging.package", "package_bundle", "BUNDLE", "a bundle as a zip that stands alone"),
    "export": Command("packaging.export", "export_bundle", "BUNDLE -o FILE", "a network for MONAI Deploy, or as ONNX"),
    "check": Command("packaging.check", "check_bundle", "BUNDLE_OR_ZIP...", "the checks of the Model Zoo"),
    "serve": Command("packaging.serve", "serve_monai_label", "STUDIES ZIP...", "a MONAI Label server of bundles"),
}
KEPT = {  # by a command that is stopped
    "vdt segment": "the label maps written so far are whole, and the same command makes all of them again",
    "vdt train": "the last whole epoch is kept, and the same command goes on from there",
    "vdt pretrain": "the last whole epoch is kept, and the same command goes on from there",
    "vdt compare": "the finished runs are kept, and the same command goes on from there",
    "vdt prepare volumes": "the finished cases are kept, and the same command goes on from there",
}
VERBOSE = "--verbose", "show all messages of libraries, in place of the bar"
DEFAULT_KINDS = {"prepare": "volumes"}  # what a first word that has kinds means without one
ENDING = (
    "vdt COMMAND --help lists the arguments; `vdt prepare DATA OUTPUT` is `vdt prepare volumes`. Commands that train or"
    " infer print the `python -m monai.bundle run` they stand for; all that it says is in OUT/log.txt, or with"
    " --verbose here."
)


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
        print("\n".join(["usage: vdt COMMAND [ARGUMENTS]", "", *_columns(rows), "", *_wrap(ENDING)]))
    elif words[0] == "--version":
        print(f"vdt {version('vdt-bundles')}")
    else:
        name, rest = find_command(words)
        command = COMMANDS[name]
        try:
            with signs(f"vdt {name}"), uncollected():
                module = import_module(f"{__package__}.{command.module}")
        except KeyboardInterrupt:
            _stop(f"vdt {name}")
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

    On a terminal it is printed in words. The exit status is 1 where it counts something as `failed`.

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
    folder = _find_folder(function)
    words = [f"--{folder}" if word == "-o" and folder else word for word in words]
    verbose = VERBOSE[0] in words
    words = [word for word in words if word != VERBOSE[0]]
    _refuse_unknown(function, words, name)
    args, kwargs = _read_words(function, words, name)
    given = inspect.signature(function).bind(*args, **kwargs).arguments.get(folder)
    try:
        with signs(name, verbose=verbose, folder=given):
            result = function(*args, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        helped = explanation(error) if isinstance(error, OSError) and error.errno in REMEDIES else None
        sys.exit(f"{name}: {in_one_line(helped or error)}")
    except KeyboardInterrupt:
        _stop(name)
    if isinstance(result, dict) and sys.stdout.isatty():
        print("\n".join(f"{key.replace('_', ' ')}: {_in_words(value)}" for key, value in result.items()))
    elif result is not None:
        print(json.dumps(result))
    if isinstance(result, dict) and result.get("failed"):
        sys.exit(1)


def _stop(name: str) -> NoReturn:
    """End a command that the user stopped, with what it keeps."""
    print(f"{name}: stopped; {KEPT.get(name, 'give the same command again to go on')}", file=sys.stderr)
    sys.exit(130)  # as shells have it


def describe_function(function: Callable[..., Any], name: str) -> str:
    """Write the help of a command from the signature and the docstring of its function.

    Args:
        function: with documented arguments, which are the options.
        name: of the command.
    """
    documented = fire.docstrings.parse(inspect.getdoc(function))
    texts = {argument.name: argument.description for argument in documented.args or []}
    words, rows = [f"usage: {name}"], []
    folder = _find_folder(function)
    for parameter in inspect.signature(function).parameters.values():
        text = " ".join((texts.get(parameter.name) or "").split())
        if parameter.kind is parameter.VAR_POSITIONAL:
            option = f"{parameter.name.upper()} ..."
        elif parameter.kind is parameter.VAR_KEYWORD:
            option = "--NAME VALUE ..."
        elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            option = parameter.name.upper()
        else:
            option = f"-o, --{parameter.name}" if parameter.name == folder else f"--{parameter.name}"
            shown = "required" if parameter.default is parameter.empty else parameter.default
            text += "" if shown in (None, "", ()) or shown is False else f" [{shown}]"
        words += [option] if not option.startswith("-") else []
        rows.append((option, text))
    rows += [VERBOSE] if name.startswith("vdt ") else []
    summary = ["\n".join(_wrap(text)) for text in (documented.summary, documented.description) if text]
    lines = (sys.modules[function.__module__].__doc__ or "").splitlines()
    examples = ["  " + " ".join(line.split()) for line in lines if line.startswith("    ")]
    examples = [line for line in examples if line.startswith(f"  {name} ")] or examples
    parts = [" ".join([*words, "[OPTIONS]"]), "\n\n".join(summary), "\n".join(_columns(rows))]
    return "\n\n".join([*parts, "\n".join(["examples:", *examples])] if examples else parts)


def _in_words(value: Any) -> str:
    """Write a result for people: numbers with four digits, and nothing quoted."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_in_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(inner, dict) for inner in value) else ", ").join(map(_in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lay out names and their texts in two columns of the terminal's width."""
    left = max((len(name) for name, _ in rows), default=0) + 4
    lines = []
    for name, text in rows:
        first, *rest = _wrap(text, left) or [""]
        lines += [f"  {name:<{left - 2}}{first}".rstrip(), *(" " * left + line for line in rest)]
    return lines


def _wrap(text: str, left: int = 0) -> list[str]:
    """Break a text into lines of the terminal's width, without so many columns on the left."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    return textwrap.wrap(text, max(width - left, 30), break_on_hyphens=False)


def _find_folder(function: Callable[..., Any]) -> str:
    """Name the argument that -o stands for, if there is one."""
    return next((n for n in ("output_dir", "output", "output_file") if n in inspect.signature(function).parameters), "")


def _read_words(function: Callable[..., Any], words: Sequence[str], name: str) -> tuple[tuple, dict[str, Any]]:
    """Let fire read the words for a stand-in, so that what does not fit is refused before the function is called.

    What the signature has as text is handed over as it is, where fire would read numbers, lists and comments.
    """
    given: list[Any] = []
    readers = {n: _reader(p.annotation) for n, p in inspect.signature(function).parameters.items()}
    if _is_free(function):
        readers = {**dict.fromkeys(TEXTS, str), **readers}

    @fire.decorators.SetParseFns(**readers)
    @fire.decorators.SetParseFn(fire.parser.DefaultParseValue if _is_free(function) else str)  # of **settings, *names
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


def _is_free(function: Callable[..., Any]) -> bool:
    """Whether a function takes settings of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _reader(annotation: Any) -> Callable[[str], Any]:
    """Choose how the words of an argument are read, by its annotation."""
    written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = {kind.strip() for kind in written.split("|")}
    if kinds <= {"str", "None"}:
        return str
    return partial(_read_value, text="str" in kinds, texts="Sequence[str]" in written)


def _read_value(word: str, *, text: bool, texts: bool) -> Any:
    """Read a value as fire does, but for a text that is not written as a list, or is a file."""
    if text and (not word.startswith(("[", "(", "{")) or os.path.exists(word)):
        return word
    value = fire.parser.DefaultParseValue(word)
    numbers = [name for name in value if not isinstance(name, str)] if texts and isinstance(value, Iterable) else []
    if numbers:
        sys.exit(f"vdt: {word}: {numbers[0]!r} is no text; quote each, as \"['a', 'b']\"")
    return value


def _refuse_unknown(function: Callable[..., Any], words: Sequence[str], name: str) -> None:
    parameters = inspect.signature(function).parameters
    free = _is_free(function)
    known = list(parameters)
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word == "--":  # what follows is for fire itself
            return
        if re.match(r"-[a-zA-Z]", word):  # fire would take it for a setting of one letter
            sys.exit(f"{name}: {word}: no such option; options are written --name value; {name} --help lists them")
        option, has_value, _ = word[2:].partition("=")
        option = option.replace("-", "_")
        if word.startswith("--") and option in known:
            if (
                parameters[option].annotation not in ("bool", bool)
                and not has_value
                and re.match(r"--|-[a-zA-Z]", following)
            ):
                sys.exit(f"{name}: --{option}: needs a value; one that begins with - is written --{option}=-x")
        elif word.startswith("--") and option.removeprefix("no") not in known and not free:  # a bundle knows its own
            near = get_close_matches(option, known, n=1) or known
            sys.exit(f"{name}: --{option}: no such option; did you mean {' or '.join(f'--{n}' for n in near)}?")


if __name__ == "__main__":
    main()
