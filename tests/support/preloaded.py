"""Python commands in processes of their own, which begin with torch and MONAI imported: that costs more than they do.

`Preloaded` starts this file once. It imports others' packages, and forks for each command; the fork then does what the
interpreter does with the command's words, and imports ours as a new interpreter would.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent.parent)
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "100000"}


class Preloaded:
    """Runs `python WORDS`, one command at a time, which may be of several processes, as torchrun starts them."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], env=ENVIRONMENT, **pipes)

    def run(self, words: list[str], folder: Path, environment: dict[str, str], log: Path, processes: int = 1) -> int:
        """Run a command in a folder, with more variables, its output in a file; return its exit status."""
        log.write_text("")
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            environment = {**environment, **meet, "WORLD_SIZE": str(processes)}
        command = {"words": words, "folder": str(folder), "environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps([command, processes]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve() -> dict:
    """Fork for each process of each line of the input; return the command in the forks alone."""
    while line := sys.stdin.readline():
        command, processes = json.loads(line)
        running, status = set(), 0
        for rank in range(processes):
            if (pid := os.fork()) == 0:
                command["environment"] |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                return command
            running.add(pid)
        while running:
            pid, ended = os.wait()
            running.remove(pid)
            if ended and not status:  # as torchrun: the others end with the first that fails
                status = os.waitstatus_to_exitcode(ended)
                for other in running:
                    os.kill(other, signal.SIGKILL)
        print(status, flush=True)
    sys.exit()


def become(words: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), opened, opened)):
        os.dup2(file, stream)
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    monai = ("bundle", "engines", "handlers", "networks.nets")
    for module in (*(f"monai.{name}" for name in monai), "torch.utils.tensorboard", "matplotlib.pyplot"):
        import_module(module)
    become(**serve())
