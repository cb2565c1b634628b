"""A MONAI Label server of packages by `vdt serve`, and requests to it. MONAI_LABEL_PYTHON names its interpreter."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.folders import ROOT

PYTHON = os.environ.get("MONAI_LABEL_PYTHON")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(studies: str, packages: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Serve until the block ends, with the app and the log in `folder`; gives the address."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = [sys.executable, "-m", "vdt_workflows.cli", "serve", studies, *packages]
    words += ["--app", str(folder / "app"), "--python", str(PYTHON), "--port", str(port)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with running(words, address + "/info/", folder / "server.log", env=given, cwd=folder):
        yield address


@contextlib.contextmanager
def running(words: list[str], page: str, log: Path, **more) -> Iterator[None]:
    """Run a server until the block ends, which begins when it answers for a page."""
    with log.open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, **more)
    try:
        for _ in range(600):
            if subprocess.run(["curl", "-sf", page], capture_output=True, check=False).returncode == 0:
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


def ask(*words: str) -> bytes:
    """Send a request; a status of 400 or more fails the test with the answer."""
    result = subprocess.run(["curl", "-s", "--fail-with-body", *words], capture_output=True, check=False)
    assert result.returncode == 0, result.stdout.decode(errors="replace")[-3000:]
    return result.stdout


def predict(server: object, name: str, where: str, output: str = "image") -> bytes:
    """Let the server predict: a mask, or JSON."""
    settings = json.dumps({"device": "cpu", "result_dtype": "uint8", "result_extension": ".nii.gz"})
    return ask("-X", "POST", f"{server}/infer/{name}?{where}&output={output}", "-F", f"params={settings}")
