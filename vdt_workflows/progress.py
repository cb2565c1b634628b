"""Signs of life of long work: one bar on a terminal, and a line a minute elsewhere and in the log of a run.

The command `vdt` shows the `signs` of a command; in other processes a bar is drawn on a terminal while it moves.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm import tqdm

Item = TypeVar("Item")

FIRST, EVERY, REDRAW = 5.0, 60.0, 0.5  # seconds until the first line, between lines, between two pictures of the bar
KEPT = 5.0  # seconds that a bar took if it stays on the terminal when it is full
LOG, CLAIM = "log.txt", "settings.json"  # in the folder of the results; see `files.claim`
PACKAGES = ("networks", "vdt_transforms", "vdt_workflows")
HARMLESS = (  # of MONAI's warnings
    r"parsing config_file .*: any `\"_target_\"` value in it is resolved to an importable callable",
    r"monai.metrics.utils get_mask_edges:always_return_as_numpy: Argument `always_return_as_numpy` has been deprecated",
    r"NvImgCodecPydicomReader: nvImageCodec decoder plugin did not register successfully",
)
RESULT = {"result": True}  # `extra` of messages that are shown like warnings
CLEAR = "\x1b[K"  # the rest of the line


@dataclass(eq=False)
class Bar:
    """How far a piece of work is.

    Attributes:
        label: what is done.
        total: of the steps, if it is known.
        done: finished steps.
        first: those of them that an earlier process did.
        divisible: whether `advance` may move the bar within a step.
        note: what else is known, such as a loss.
    """

    label: str
    total: int | None = None
    done: int = 0
    first: int = 0
    divisible: bool = True
    note: str = ""
    share: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def step(self, number: int = 1) -> None:
        """Count finished steps."""
        self.done, self.share = self.done + number, 0.0
        _draw_soon(self)

    def close(self) -> None:
        """Take the bar away; a full one that took long stays on the terminal."""
        if self not in _open:
            return
        seen = self is _open[-1] and _draws()
        _open.remove(self)
        kept = self.total is not None and self.done >= self.total and time.monotonic() - self.began > KEPT
        if seen:
            _write(f"\r{self.show()}{CLEAR}\n" if kept else f"\r{CLEAR}")

    def show(self, columns: int | None = None) -> str:
        """Write the bar as a line of so many columns, those of the terminal by default; 0 draws none in the line."""
        columns = max(_find_width() - 1, 20) if columns is None else columns
        drawn = "|{bar}| {elapsed}<{remaining}{postfix}" if columns else ", {elapsed} gone, {remaining} left{postfix}"
        label = self.label if self.total is None else f"{self.label} {self.done} of {self.total}"
        return tqdm.format_meter(
            min(self.done + self.share, self.total or 0),
            self.total,
            time.monotonic() - self.began,
            columns or None,
            label,
            bar_format="{desc} [{elapsed}]" if self.total is None else "{desc} {percentage:3.0f}%" + drawn,
            postfix=self.note,
            initial=self.first,
        ).rstrip()


_open: list[Bar] = []
_signs: _Signs | None = None
_writing = threading.RLock()
_drawn = 0.0  # when


def open_bar(label: str, total: int | None = None, *, done: int = 0, divisible: bool = True) -> Bar:
    """Begin a bar, which is the one that is shown until it is closed."""
    for waiting in _open[:1]:
        waiting.label = waiting.label.replace("starting", "working")
    _open.append(Bar(label, total, done, done, divisible))
    _draw_soon(_open[-1])
    return _open[-1]


def advance(share: float) -> None:
    """Say which share of its next step the bar that is shown has done."""
    if _open and _open[-1].divisible:
        _open[-1].share = share
        _draw_soon(_open[-1])


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Pass items on, counted by a bar; no bar without a label."""
    if not (label and total):
        yield from items
        return
    bar = open_bar(label, total)
    try:
        for item in items:
            yield item
            bar.step()
    finally:
        bar.close()


def say(lines: str) -> None:
    """Write to the standard error, above a bar."""
    _write(f"\r{CLEAR}{lines}\n" if _open and _draws() else f"{lines}\n")


def _find_width() -> int:
    """Width of the terminal, also where only the standard error goes to it."""
    try:
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(sys.stderr.fileno()).columns or 100
    except (OSError, ValueError):
        return 100


def _draws() -> bool:
    return sys.stderr.isatty() if _signs is None else _signs.draws and not _signs.paused


def _draw_soon(bar: Bar) -> None:
    global _drawn
    if bar is _open[-1] and _draws() and time.monotonic() > _drawn + REDRAW / 5:
        _drawn = time.monotonic()
        _write(f"\r{bar.show()}{CLEAR}")


def _write(text: str) -> None:
    with _writing, suppress(OSError, ValueError):  # nobody listens
        sys.stderr.write(text)
        sys.stderr.flush()


@dataclass(eq=False)
class _Signs:
    """Those of one process."""

    name: str
    verbose: bool
    folder: Path | None
    started: bool
    draws: bool
    paused: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        following = time.monotonic() + FIRST
        while not self.ended.wait(REDRAW):
            bars = _open[-1:]  # the others wait
            if self.paused or not bars:
                continue
            if self.draws:
                _write(f"\r{bars[0].show()}{CLEAR}")
            if time.monotonic() >= following:
                following = time.monotonic() + EVERY
                self.tell(f"{self.name}: {bars[0].show(0)}")

    def tell(self, line: str) -> None:
        if not self.draws:
            _write(f"{line}\n")
        dated = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
        with suppress(OSError):  # a full disk ends the work itself
            if self.started and not self.verbose:
                os.write(1, dated.encode())
            elif self.folder is not None and (self.folder / CLAIM).is_file():
                with (self.folder / LOG).open("a") as log:
                    log.write(dated)


@contextmanager
def signs(
    name: str, *, verbose: bool = False, folder: str | os.PathLike | None = None, started: bool = False
) -> Iterator[None]:
    """Show signs of life of a command while it runs, its warnings and, if `verbose`, the messages of libraries.

    On a terminal that is one bar, the innermost of those that are open, redrawn twice a second; else, and in `LOG` of
    the folder, a line after `FIRST` seconds and `EVERY` seconds from then on. All go to the standard error.

    Args:
        name: of the command.
        verbose: whether messages of libraries are shown; there is no bar between them.
        folder: of the results, which gets the log once it is claimed.
        started: whether this process was started by the command: it configures the root logger itself, and without
            `verbose` its standard output goes to the log.
    """
    global _signs
    atexit.register(gc.freeze)  # else seconds go into collecting what ends anyway
    before = _signs
    _signs = _Signs(name, verbose, Path(folder) if folder else None, started, sys.stderr.isatty() and not verbose)
    if started and not verbose:
        log = os.open(Path(folder or "", LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.close(log)
    bar, thread = open_bar("starting"), threading.Thread(target=_signs.run, daemon=True)
    thread.start()
    try:
        with _listening(verbose, started):
            yield
    finally:
        _signs.ended.set()
        thread.join()
        for left in reversed(_open[_open.index(bar) :]):  # by an error
            left.close()
        _signs = before


@contextmanager
def _listening(verbose: bool, started: bool) -> Iterator[None]:
    """Show what is logged: warnings, and messages of these packages where they do not go to the log."""
    root, ours = logging.getLogger(), [logging.getLogger(package) for package in PACKAGES]
    levels = {logger: logger.level for logger in (root, *ours)}
    plugin = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")  # warns that an optional decoder is missing
    levels[plugin] = plugin.level
    plugin.setLevel(logging.INFO if verbose else logging.ERROR)
    handler = _Above()
    if started:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or hasattr(record, "result"))
    handler.setFormatter(logging.Formatter("%(message)s"))
    heard = [root] if not started else [] if verbose else [*ours, logging.getLogger("py.warnings")]
    for logger in heard:
        logger.addHandler(handler)
    if not started:
        root.setLevel(logging.INFO if verbose else logging.WARNING)
        for logger in ours:
            logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = cast(Any, _show_warning)
            for message in () if verbose else HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger in heard:
            logger.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)


class _Above(logging.Handler):
    """Writes messages above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    logging.getLogger("py.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)


@contextmanager
def uncollected() -> Iterator[None]:
    """Do without the collection of garbage, which takes a quarter of the time of large imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def paused() -> Iterator[tuple[str, bool] | None]:
    """Leave the terminal to another process; gives the name of the command whose signs it shows, and `verbose`."""
    if _signs is None:
        yield None
        return
    if _draws():
        _write(f"\r{CLEAR}")
    _signs.paused = True
    try:
        yield _signs.name, _signs.verbose
    finally:
        _signs.paused = False


def _forget() -> None:
    """Leave bars and lines to the process that this one was forked from."""
    global _signs, _writing
    _writing = threading.RLock()
    _open.clear()
    _signs = _Signs("", False, None, started=False, draws=False)


os.register_at_fork(after_in_child=_forget)
