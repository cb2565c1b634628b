"""Serve packaged bundles from one MONAI Label server, without the network.

    vdt serve STUDIES dist/*.zip --python monailabel/bin/python

STUDIES is a folder of volumes. The zips are those of `vdt package`, with weights; each brings its own code, so that
MONAI Label's environment needs no package of this repository. `docs/monai_label.md` explains how to make it.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vdt_workflows.packaging.check import open_package

TASKS = ("_segmentation", "_classification", "_detection")  # endings by which MONAI Label knows the kind of a model
logger = logging.getLogger(__name__)


def serve_monai_label(
    studies: str,
    *packages: str,
    app: str = "monai_label",
    python: str = sys.executable,
    host: str = "127.0.0.1",
    port: int = 8000,
    start: bool = True,
) -> str | None:
    """Make an app of the bundles and start its server in place of this process.

    Args:
        studies: folder of the volumes to label.
        packages: zips of bundles, each with its weights.
        app: folder for MONAI Label's app and the unpacked bundles; a bundle that is there already, with the same
            metadata, is not unpacked again.
        python: the interpreter that has MONAI Label.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: number to listen at.
        start: start the server; otherwise return its command.

    Raises:
        FileNotFoundError: if a folder, a zip or the interpreter is not there.
        ValueError: if a zip has no weights or is not for MONAI Label.
    """
    if not Path(studies).is_dir():
        raise FileNotFoundError(f"{studies}: no such folder of studies")
    if not packages:
        raise ValueError("name the zips of the bundles to serve; vdt package makes them")
    place = Path(app).absolute() / "monaibundle"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{environment.get('PATH', '')}"
    if not place.is_dir():
        copy = ["apps", "--download", "--name", "monaibundle", "--output", str(place.parent)]
        _run([python, "-m", "monailabel.main", *copy], environment)
    names = [unpack(Path(package), place / "model") for package in packages]
    # any other source than MONAI's would do: it keeps the server from asking the network for local bundles
    conf = {"models": ",".join(names), "zoo_source": "local", "sam2": "false"}
    words = [python, "-m", "monailabel.main", "start_server", "--app", str(place)]
    words += ["--studies", str(Path(studies).absolute())]
    words += ["--host", host, "--port", str(port)]
    words += [word for name, value in conf.items() for word in ("--conf", name, value)]
    if not start:
        return " ".join(words)
    logger.info("serving %s at http://%s:%s", ", ".join(names), host, port)
    sys.stdout.flush()
    os.execve(python, words, environment)


def unpack(package: Path, folder: Path) -> str:
    """Unpack a bundle's zip, unless its folder is there, and return the bundle's name.

    Raises:
        FileNotFoundError: if there is no such zip.
        ValueError: if it is no bundle's zip, has no weights, is not for MONAI Label, or another version is there.
    """
    with open_package(package) as (archive, name):
        if not name.endswith(TASKS):
            raise ValueError(f"{package}: {name} is not meant for MONAI Label")
        if f"{name}/models/model.pt" not in archive.namelist():
            raise ValueError(f"{package}: has no models/model.pt; package the bundle with --weights")
        target = folder / name
        if not target.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as half:
                archive.extractall(half)
                shutil.move(Path(half) / name, target)
        elif (target / "configs" / "metadata.json").read_bytes() != archive.read(f"{name}/configs/metadata.json"):
            raise ValueError(f"{target}: there is another version of this bundle; move it away or name another --app")
    return name


def _run(words: list[str], environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{words[0]}: no such interpreter; give --python, the one that has MONAI Label"
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{words[0]}: MONAI Label does not start ({last}); see docs/monai_label.md")
