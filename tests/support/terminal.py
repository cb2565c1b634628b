"""A command in a terminal of its own: what it writes and when, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.bundle_runs import ROOT


class Watched(NamedTuple):
    """How a command ended, all that it wrote, its longest silence in seconds, and the processes that outlived it."""

    status: int
    text: str
    silence: float
    left: list[str]


def run_in_terminal(words: Sequence[str], folder: Path, stop_at: str = "", columns: int = 100) -> Watched:
    """Run `vdt` with these words; Ctrl-C is pressed once when what it wrote matches `stop_at`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def take_terminal() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which is ignored in what a shell put into the background
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "vdt_workflows", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal
    )
    os.close(theirs)
    text, silence, last, pressed = "", 0.0, time.monotonic(), not stop_at
    while True:
        try:
            written = os.read(ours, 1 << 16)
        except OSError:  # Linux's way of saying that nobody has the terminal any more
            written = b""
        now = time.monotonic()
        silence, last = max(silence, now - last), now
        if not written:
            break
        text += written.decode(errors="replace")
        if not pressed and re.search(stop_at, text):
            os.write(ours, b"\x03")
            pressed = True
    os.close(ours)
    status = process.wait()
    time.sleep(2)  # what follows its parent looks for it every second
    listed = subprocess.run(["ps", "-o", "args=", "-s", str(process.pid)], capture_output=True, text=True, check=False)
    left = listed.stdout.splitlines()
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    return Watched(status, text, silence, left)
