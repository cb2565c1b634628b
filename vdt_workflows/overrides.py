"""A check of `python -m monai.bundle run` overrides, since MONAI accepts a misspelt one silently."""

from __future__ import annotations

import ast
import builtins
import inspect
import os
import re
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

from vdt_workflows.errors import explanation, in_one_line, root_cause
from vdt_workflows.naming import NAMES, TEXTS, literal, plain

__all__ = ["check_command_line"]

_COMMANDS: dict[str, Callable] = {"run": run, "run_workflow": run_workflow}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MODULE = ("monai", "bundle", "__main__.py")


def check_command_line(argv: Sequence[str] | None = None, folder: str | os.PathLike = ".") -> None:
    """Refuse an override whose id is neither in the config files nor an argument of its component.

    An override of None is refused too, which MONAI ignores, and the words true and false, which it takes for text.
    Paths and names are kept as they were written: fire reads `2024_01` as a number and ends at the `#` of `mine#2`, and
    MONAI takes `run#1` for `run::1`. What begins with `$` or `@` is a name unless it is an expression or a known id.

    It is meant as the first entry of a config's `initialize`. There it reads `sys.argv`, and only if the process
    is `python -m monai.bundle run` (or `run_workflow`, or either under torchrun); in any other process, such as
    MONAI Label or a federated client, it does nothing. No expression of the config is evaluated. In that process it
    also lets errors of these packages (a missing file, a corrupt image) be shown by their sentence alone.

    Args:
        argv: the words after `python -m monai.bundle`, which are then checked whatever the process.
        folder: where those words would be given, from which the paths of the config files start.

    Raises:
        ValueError: if `argv` names an unknown setting (the sentence gives the nearest known ones), or one of those
            values for one.
        SystemExit: the same in the process itself, because MONAI would bury a `ValueError` in its own traceback.
    """
    if argv is not None:
        here = os.getcwd()
        os.chdir(folder)
        try:
            _check(argv)
        finally:
            os.chdir(here)
        return
    if not _is_bundle_process():
        return
    sys.excepthook = _explain
    try:
        for id, text in _check(sys.argv[1:]).items():
            _find_workflow().parser[id] = text
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
    if isinstance(root_cause(error), KeyboardInterrupt):
        sentence = "stopped; give the same command again to go on"
    if sentence is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"monai.bundle: {in_one_line(sentence)}", file=sys.stderr)


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


def given_files() -> list[Path]:
    """JSON files that `python -m monai.bundle run` was given as `--args_file`, if this process is one."""
    try:
        given = _read(sys.argv[1:])[0].get("args_file") if _is_bundle_process() else None
    except Exception:  # what is wrong with it was said before
        given = None
    return [Path(given)] if isinstance(given, str) and given.endswith(".json") else []


def _is_bundle_process() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) == "monai.bundle.__main__" and Path(sys.argv[0]).parts[-3:] == _MODULE


def _find_workflow() -> ConfigWorkflow:
    """Find the workflow that is initialised: MONAI hands its expressions nothing of it."""
    frame = sys._getframe()
    while not isinstance(found := frame.f_locals.get("self"), ConfigWorkflow):
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _check(argv: Sequence[str]) -> dict[str, Any]:
    """Check the overrides; give those that MONAI would change, in a form that it keeps."""
    if not argv or argv[0].replace("-", "_") not in _COMMANDS:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI has shown them while loading the same files
            given, settings, files = _read(argv)
            parser = ConfigParser(ConfigParser.load_config_files(files), globals=False)
            arguments = _bundle_arguments(settings.get("tracking"))
    except Exception:  # a missing or malformed file, in any of the ways of three loaders: MONAI's own error says more
        return {}
    texts = {}
    for id, value in settings.items():
        id = id.removeprefix("+")
        top = ReferenceResolver.split_id(id)[0]
        if id in arguments or (top.startswith("_") and top.endswith("_")):  # `_meta_`, or a record such as `_run_`
            continue
        if (near := _nearest(parser.config, id, arguments)) is not None:
            name = f"--{id}" if id in given or f"+{id}" in given else f"{id} in {settings['args_file']}"
            hint = f"did you mean {' or '.join(f'--{i}' for i in near)}?" if near else "and none with a similar name"
            raise ValueError(f"{name}: no such setting in {', '.join(map(str, files))}{'; ' if near else ', '}{hint}")
        if id in (*TEXTS, *NAMES):
            value = texts[id] = _keep_text(id, value, argv if id in given else None, parser)
        elif isinstance(value, str) and value.lower() in ("true", "false") and id != "overwrite":  # which takes words
            raise ValueError(f"--{id} {value}: MONAI takes this for a word, which counts as true; give True or False")
        if value is None and (id not in parser or parser[id] is not None):
            raise ValueError(
                f"--{id} None: MONAI passes over None; give one of the values that the config's comment names"
            )
        parser[id] = value  # an override may add what a later one changes
    return {id: text for id, text in texts.items() if text != settings[id]}


def _keep_text(id: str, value: Any, argv: Sequence[str] | None, parser: ConfigParser) -> Any:
    """Write a path, a name or a list of names so that MONAI keeps it; `argv` holds it if it is not of a file."""
    if id in NAMES:
        if isinstance(value, list) and not all(isinstance(name, str) for name in value):
            number = next(name for name in value if not isinstance(name, str))
            raise ValueError(f"{id} {value}: {number!r} is no text; quote each name, as --{id} \"['a', 'b']\"")
        return literal(plain(value)) if isinstance(value, list) else value
    text = value if argv is None else _find_word(argv, id)
    if text is None and argv is not None:
        raise ValueError(f"--{id}: needs a value; one that begins with - is written --{id}=-x")
    if (value is None and text in (None, "None")) or (isinstance(value, list) and id == "val_dir"):
        return value
    if not isinstance(text, str):
        raise ValueError(f"{id} {text!r}: is no text; write it in quotes")
    if text[:1] in ("'", '"') and text[1:-1] == value:  # quoted for fire
        text = value
    return value if _is_code(text, parser) else literal(text)


def _find_word(argv: Sequence[str], id: str) -> str | None:
    """Find the last value of an option among the words."""
    found = None
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        option, given, value = word.lstrip("-").partition("=")
        if word.startswith("-") and option.replace("-", "_") == id:
            found = value if given else None if re.match(r"--|-[a-zA-Z]", following) else following
    return found


def _is_code(text: str, parser: ConfigParser) -> bool:
    """Whether a value is an expression whose names are known, a reference to an id, or a macro."""
    if text.startswith(("@", "%")):
        return text[1:] in parser
    if not text.startswith("$"):
        return False
    try:
        tree = ast.parse(re.sub(r"@[\w:#]+", "_", text[1:]), mode="eval")
    except (SyntaxError, ValueError):
        return False
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    imported = re.findall(r"\$import (\w+)", " ".join(map(str, parser.get("imports", []))))
    known = {*dir(builtins), *own, *imported, "_", "monai", "torch", "np", "numpy"}
    return not isinstance(tree.body, ast.Name) and all(name.id in known for name in names)


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
