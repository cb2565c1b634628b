"""Work shared out to processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from vdt_workflows.progress import track

Task = TypeVar("Task")
Result = TypeVar("Result")


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
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(workers,))
    try:
        for future in track(as_completed([pool.submit(function, task) for task in tasks]), len(tasks), label):
            yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            f"a worker process was killed, most likely for want of memory; use fewer workers than {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(workers: int) -> None:
    """Take a worker's share of the cores, leave Ctrl-C to the main process, and end when it ends."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def free_memory() -> float:
    """Give the bytes that processes may still take here or in this container; infinite if Linux does not say."""
    limits = [math.inf]
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        most, now = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        limits.append(most - now + int(used["inactive_file"]))
    return min(limits)


def local_share() -> tuple[int, int]:
    """Give the number of this process among those that torchrun started on this machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def follow_parent() -> None:
    """End this process when the one that started it does: a killed process cannot stop those that it started."""
    parent, number = multiprocessing.parent_process(), os.getppid()

    def watch() -> None:
        if parent is not None:  # also where a fork server stands in between
            parent.join()
        while parent is None and os.getppid() == number:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
