"""A check of `python -m monai.bundle run` overrides, since MONAI accepts a misspelt one silently."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from pydoc import locate
from types import TracebackType
from typing import Any

import fire
from monai.bundle import (
    DEFAULT_EXP_MGMT_SETTINGS,
    ID_SEP_KEY,
    ConfigParser,
    ConfigWorkflow,
    ReferenceResolver,
    create_workflow,
    run,
    run_workflow,
    update_kwargs,
)
from monai.bundle.config_item import ConfigComponent
from monai.utils import ensure_tuple
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from vdt_workflows.errors import explanation, root_cause

__all__ = ["check_command_line"]

_COMMANDS: dict[str, Callable] = {"run": run, "run_workflow": run_workflow}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MODULE = ("monai", "bundle", "__main__.py")


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuse an override whose id is neither in the config files nor an argument of its component.

    An override of None is refused too, which MONAI ignores, and the words true and false, which it takes for text.

    It is meant as the first entry of a config's `initialize`. There it reads `sys.argv`, and only if the process
    is `python -m monai.bundle run` (or `run_workflow`, or either under torchrun); in any other process, such as
    MONAI Label or a federated client, it does nothing. No expression of the config is evaluated. In that process it
    also lets errors of these packages (a missing file, a corrupt image) be shown by their sentence alone.

    Args:
        argv: the words after `python -m monai.bundle`, which are then checked whatever the process.

    Raises:
        ValueError: if `argv` names an unknown setting (the sentence gives the nearest known ones), or one of those
            values for one.
        SystemExit: the same in the process itself, because MONAI would bury a `ValueError` in its own traceback.
    """
    if argv is not None:
        return _check(argv)
    if not _is_bundle_process():
        return
    sys.excepthook = _explain
    try:
        _check(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"monai.bundle: {error}")


def _explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show the sentence of an error that these packages raised, in place of MONAI's tracebacks around it.

    Under torchrun the error is also left for its summary, whose last lines name the process that failed first and why.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        try:
            raise root_cause(error)
        except BaseException as cause:  # torch records the exception that is being handled
            get_error_handler().record_exception(cause)
    sentence = explanation(error, _settings_of(sys.argv[1:]))
    if sentence is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"monai.bundle: {sentence}", file=sys.stderr)


def _settings_of(argv: Sequence[str]) -> list[str]:
    """Top-level ids of the config files of a command line; empty where they cannot be read."""
    try:
        return list(ConfigParser.load_config_files(_read(argv)[2]))
    except Exception:  # the run had its own error before
        return []


def _read(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], tuple]:
    """Read a command line: what it gives itself, that with its args_file, and the config files."""
    given = _read_arguments(_COMMANDS[argv[0].replace("-", "_")], argv[1:])
    settings = update_kwargs(given.get("args_file"), ignore_none=False, **given)
    return given, settings, ensure_tuple(settings["config_file"])


def _is_bundle_process() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) == "monai.bundle.__main__" and Path(sys.argv[0]).parts[-3:] == _MODULE


def _check(argv: Sequence[str]) -> None:
    if not argv or argv[0].replace("-", "_") not in _COMMANDS:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI has shown them while loading the same files
            given, settings, files = _read(argv)
            parser = ConfigParser(ConfigParser.load_config_files(files), globals=False)
            arguments = _bundle_arguments(settings.get("tracking"))
    except Exception:  # a missing or malformed file, in any of the ways of three loaders: MONAI's own error says more
        return
    for id, value in settings.items():
        id = id.removeprefix("+")
        top = ReferenceResolver.split_id(id)[0]
        if id in arguments or (top.startswith("_") and top.endswith("_")):  # `_meta_`, or a record such as `_run_`
            continue
        if (near := _nearest(parser.config, id, arguments)) is not None:
            name = f"--{id}" if id in given or f"+{id}" in given else f"{id} in {settings['args_file']}"
            hint = f"did you mean {' or '.join(f'--{i}' for i in near)}?" if near else "and none with a similar name"
            raise ValueError(f"{name}: no such setting in {', '.join(map(str, files))}{'; ' if near else ', '}{hint}")
        if value is None:
            raise ValueError(
                f"--{id} None: MONAI passes over None; give one of the values that the config's comment names"
            )
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise ValueError(f"--{id} {value}: MONAI takes this for a word, which counts as true; give True or False")
        parser[id] = value  # an override may add what a later one changes


def _read_arguments(command: Callable, words: Sequence[str]) -> dict[str, Any]:
    """Let fire itself read the words, with a stand-in for the command, so that both read them alike."""
    taken: dict[str, Any] = {}

    @wraps(command)
    def stand_in(*args: Any, **kwargs: Any) -> None:
        named = zip(inspect.signature(command).parameters, args, strict=False)  # fire passes the defaults too
        taken.update({name: value for name, value in named if value is not None}, **kwargs)

    words, _ = fire.parser.SeparateFlagArgs(list(words))
    fire.Fire(stand_in, command=words)
    return taken


def _bundle_arguments(tracking: Any) -> set[str]:
    """Names that MONAI itself takes, among them those of its experiment tracking when that is asked for."""
    names = {name for f in (run, run_workflow, create_workflow, ConfigWorkflow) for name in _keywords(f)[0]}
    if tracking is not None:
        known = isinstance(tracking, str) and tracking in DEFAULT_EXP_MGMT_SETTINGS
        patch = DEFAULT_EXP_MGMT_SETTINGS[tracking] if known else ConfigParser.load_config_files(tracking)
        names |= patch["configs"].keys() - patch["handlers_id"].keys()
    return names


def _nearest(config: Any, id: str, arguments: set[str]) -> list[str] | None:
    """The ids most like one that the config does not know, or `None` if it knows the id."""
    node, parts = config, ReferenceResolver.split_id(id)
    for depth, part in enumerate(parts):
        children = _children(node)
        if part in children:
            node = children[part]
            continue
        known = [*children]
        if depth == 0:
            known += sorted(arguments)
        elif depth == len(parts) - 1 and isinstance(node, dict):
            keywords, takes_any = _component_keywords(node)
            if takes_any or part in keywords or part in ConfigComponent.non_arg_keys:
                return None
            known += keywords
        near = dict.fromkeys(get_close_matches(part, known))
        if near or isinstance(node, list):
            return [ID_SEP_KEY.join([*parts[:depth], name, *parts[depth + 1 :]]) for name in near]
        return [i for i in _ids(config) if i.split(ID_SEP_KEY)[-1] == parts[-1]][:3]
    return None


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, list):
        return {str(i): child for i, child in enumerate(node)}
    return {name: child for name, child in node.items() if isinstance(name, str)} if isinstance(node, dict) else {}


def _ids(node: Any, prefix: str = "") -> Iterator[str]:
    for name, child in _children(node).items():
        yield f"{prefix}{name}"
        yield from _ids(child, f"{prefix}{name}{ID_SEP_KEY}")


def _component_keywords(component: dict) -> tuple[list[str], bool]:
    """Keywords that a component's class takes, and whether it takes others or cannot be known before the run."""
    if "_target_" not in component:
        return [], False
    target = component["_target_"]
    if isinstance(target, str) and target.startswith(("$", "@", "%")):
        return [], True
    target = ConfigComponent(component).resolve_module_name()
    return _keywords(locate(target) if isinstance(target, str) else target)


def _keywords(function: Any) -> tuple[list[str], bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not found, or a built-in without a signature
        return [], True
    names = [p.name for p in parameters if p.kind not in (*_VARIADIC, inspect.Parameter.POSITIONAL_ONLY)]
    return names, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
