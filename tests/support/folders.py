"""The repository's folder and its bundles; what folders hold, and processes that are killed or should have ended."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())


def contents(root, pattern="*"):
    """The bytes of every file below a folder, by name."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob(pattern)) if file.is_file()}


def times(root, pattern):
    """The time of change of every file below a folder."""
    return {file: file.stat().st_mtime_ns for file in root.rglob(pattern)}


def run_until_killed(function, *args, **kwargs):
    """Run a function that kills its own process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def wait_until_ended(pids, seconds=60):
    """Wait until none of these processes runs any more."""
    until = time.monotonic() + seconds
    while any(map(_is_running, pids)):
        assert time.monotonic() < until
        time.sleep(0.01)


def _is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
