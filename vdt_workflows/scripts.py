"""The thin command line over a script's function."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fire


def run_script(function: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run a function with the words of the command line; what it returns is printed as one line of JSON.

    fire calls the function first and complains of a misspelt option after that; here it is refused before. The errors
    that a user can mend end the script with their sentence alone.

    Args:
        function: with documented arguments, which are the options.
        argv: the words, those of the process by default.

    Raises:
        SystemExit: with a sentence, if there is no such option, or the function raises ValueError, OSError,
            ImportError or MemoryError.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = Path(sys.argv[0]).stem
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
