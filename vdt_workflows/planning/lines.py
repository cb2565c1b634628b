"""Lines of `python -m monai.bundle run`: written, and run by the commands that stand for them."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vdt_workflows.errors import not_written, root_cause
from vdt_workflows.naming import join_words, literal
from vdt_workflows.progress import LOG, open_bar, paused, say, signs, uncollected

CHILD = "from vdt_workflows.planning.lines import run_bundle; run_bundle({name!r}, {verbose!r}, {folder!r})"
BUNDLE = "bcv_multiorgan_segmentation"  # that planned trainings run
STOPPED = 130  # as shells have it


def run_line(bundle: Path, words: Sequence[str], root: Path) -> None:
    """Print a line of `python -m monai.bundle run`, and run it in the bundle's folder.

    Args:
        bundle: the folder.
        words: what follows `run`.
        root: folder of the results, which a failure names; what MONAI says goes to its log, but in Python and of
            commands with --verbose.

    Raises:
        ChildProcessError: if the run fails.
        KeyboardInterrupt: if the user stops it.
        OSError: if the folder cannot be written.
    """
    command = ["run", *words]
    line = f"cd {join_words([str(bundle)])}; {join_words(['python', '-m', 'monai.bundle', *command])}"
    say(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(root, error) from error
    with paused() as shown:
        name, verbose = shown or (root.name, True)  # in Python
        code = CHILD.format(name=name, verbose=verbose, folder=str(root))
        ended = subprocess.run([sys.executable, "-c", code, *command], cwd=bundle, check=False).returncode
    if ended in (STOPPED, -signal.SIGINT):
        raise KeyboardInterrupt
    if ended:
        more = "" if verbose else f", and all of it in {root / LOG}"
        raise ChildProcessError(f"{root}: the run failed, its own message is above{more}")


def run_bundle(name: str, verbose: bool, folder: str) -> None:
    """Do what `python -m monai.bundle` does, with the signs of a command, in a process that ends with its parent."""
    try:
        with signs(name, verbose=verbose, folder=folder, started=True):
            with uncollected():
                import monai.bundle  # noqa: F401  (seconds, as of torch)

                from vdt_workflows.parallel import follow_parent

            follow_parent()
            runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except BaseException as error:
        if isinstance(root_cause(error), KeyboardInterrupt):
            sys.exit(STOPPED)  # the command says it
        raise


def make_page(folder: str, volumes: int) -> str:
    """Put the results in a folder into its report.html, with so many volumes to look at; give its path."""
    with closing(open_bar("writing the page")):
        with uncollected():
            from vdt_workflows.report.run_page import report_run  # seconds

        return str(report_run(folder, volumes=volumes)["page"])


def config_words(names: Sequence[str]) -> list[str]:
    """Give the option of a bundle's config files, by their bare names."""
    return ["--config_file", str([os.path.join("configs", f"{name}.yaml") for name in names])]


def setting_words(settings: Mapping[str, Any]) -> list[str]:
    """Give the options of settings, in words that MONAI reads as they were meant."""
    texts = {name: value if isinstance(value, str) else repr(value) for name, value in settings.items()}
    # MONAI ends in a traceback at what it takes for an unknown macro.
    return [word for name, text in texts.items() for word in (f"--{name}", literal(text) if text[:1] == "%" else text)]
