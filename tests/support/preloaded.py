"""Python commands in processes of their own, which begin with torch and MONAI imported: that costs more than they do.

`Preloaded` starts this file once. It imports, and forks for each command; the fork then does what the interpreter does
with the command's words.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent.parent)
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "100000"}


class Preloaded:
    """Runs `python WORDS`, one command at a time."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], env=ENVIRONMENT, **pipes)

    def run(self, words: list[str], folder: Path, environment: dict[str, str], log: Path) -> int:
        """Run a command in a folder, with more variables, its output in a file; return its exit status."""
        command = {"words": words, "folder": str(folder), "environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def serve() -> dict:
    """Fork for each line of the input; return the command in the fork alone."""
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def become(words: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), opened, opened)):
        os.dup2(file, stream)
    if words[0] == "-m":
        sys.path[0], sys.argv = folder, words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    from vdt_workflows.report.cells import PRELOADED

    for module in (*PRELOADED, "monai.handlers", "torch.utils.tensorboard", "matplotlib.pyplot"):
        import_module(module)
    become(**serve())
