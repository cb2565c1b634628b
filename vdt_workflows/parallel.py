"""Work shared out to processes, and the progress bar."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch
from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def track(items: Iterable[Result], total: int, label: str) -> Iterator[Result]:
    """Pass items on, with a progress bar on the standard error; no bar without a label."""
    return iter(tqdm(items, label, total, disable=not (label and total), dynamic_ncols=True))


def run_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int | None = None, label: str = ""
) -> Iterator[Result]:
    """Yield `function(task)` of each task as it is done, whichever is done first.

    An error of a task ends the others that have not begun and is raised here. The processes end when this one does,
    however it ends.

    Args:
        function: a function that another process can import.
        tasks: its arguments.
        workers: number of processes, all cores by default; 1 works in this process.
        label: what the progress bar says; no bar if empty.

    Raises:
        OSError: if a process is killed from outside, as by a system that runs out of memory.
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        yield from track(map(function, tasks), len(tasks), label)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(os.getpid(), workers))
    try:
        for future in track(as_completed([pool.submit(function, task) for task in tasks]), len(tasks), label):
            yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            f"a worker process was killed, most likely for want of memory; use fewer workers than {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, workers: int) -> None:
    """Take a worker's share of the cores, and follow the main process."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    follow_parent(parent)


def follow_parent(parent: int | None = None) -> None:
    """Leave Ctrl-C to the main process, and end when it ends: a killed process cannot stop its workers."""
    parent = os.getppid() if parent is None else parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
