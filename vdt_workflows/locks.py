"""Locks of folders: two processes never write to one at the same time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from vdt_workflows.errors import not_written

LOCK = ".vdt.lock"
P = ParamSpec("P")
R = TypeVar("R")
_held: list[ExitStack] = []


def hold(*folders: str | os.PathLike) -> ExitStack:
    """Lock folders for this process, which may lock them again, until `leave_folders`, or what this returns is closed.

    The lock is a hidden file `.vdt.lock` with the process and machine, which stays. A process that ends, however it
    ends, holds nothing.

    Args:
        folders: the folders, which are made if need be.

    Raises:
        BlockingIOError: naming the holder, if another process holds one of them.
        OSError: if one cannot be made or written to.
    """
    stack = ExitStack()
    for folder in map(os.path.realpath, folders):
        path = Path(folder, LOCK)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, thread_local=False, is_singleton=True)
            stack.enter_context(lock.acquire(timeout=2))  # what a killed process leaves may need a moment to end
        except Timeout:
            holder = path.read_text().strip() or "another process"
            stack.close()
            raise BlockingIOError(
                f"{folder}: in use by {holder}; wait for its end, end it, or name another folder"
            ) from None
        except OSError as error:
            raise not_written(path, error) from error
        with suppress(OSError):  # a full disk
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    _held.append(stack)
    stack.callback(_held.remove, stack)
    return stack


def leave_folders() -> None:
    """Unlock what `hold` locked for this process."""
    while _held:
        _held[-1].close()


def leaving(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to unlock what it locked when it returns or fails."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = len(_held)
        try:
            return function(*args, **kwargs)
        finally:
            while len(_held) > before:
                _held[-1].close()

    return run
