"""Serve packaged bundles from one MONAI Label server, without the network.

    vdt serve STUDIES dist/*.zip --python monailabel/bin/python

STUDIES is a folder of volumes. The zips are those of `package_bundle.py`, with weights; each brings its own code, so
that MONAI Label's environment needs no package of this repository. `docs/monai_label.md` tells how to make it.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TASKS = ("_segmentation", "_classification", "_detection")  # what MONAI Label takes the kind of a model from
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
        app: folder for MONAI Label's app and the unpacked bundles. A bundle that is
            there with the same version is not unpacked again.
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
    words = [
        python,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(place),
        "--studies",
        str(Path(studies).absolute()),
    ]
    words += ["--host", host, "--port", str(port)]
    words += [word for name, value in conf.items() for word in ("--conf", name, value)]
    if not start:
        return " ".join(words)
    logger.info("serving %s at http://%s:%s", ", ".join(names), host, port)
    sys.stdout.flush()
    os.execve(python, words, environment)


def unpack(package: Path, folder: Path) -> str:
    """Unpack a bundle's zip and return its name.

    Raises:
        FileNotFoundError: if there is no such zip.
        ValueError: if it is no zip, has no weights, or is not for MONAI Label.
    """
    if not package.is_file():
        raise FileNotFoundError(f"{package}: no such zip")
    try:
        with zipfile.ZipFile(package) as archive:
            paths = archive.namelist()
            name = paths[0].partition("/")[0]
            if any(not path.startswith(f"{name}/") or ".." in path.split("/") for path in paths):
                raise ValueError(f"{package}: not a bundle's zip, which has one folder of the bundle's name")
            if not name.endswith(TASKS):
                raise ValueError(f"{package}: {name} is not meant for MONAI Label")
            if f"{name}/models/model.pt" not in paths:
                raise ValueError(f"{package}: has no models/model.pt; package the bundle with --weights")
            metadata = archive.read(f"{name}/configs/metadata.json")
            target = folder / name
            if target.is_dir() and (target / "configs" / "metadata.json").read_bytes() == metadata:
                return name
            if target.is_dir():
                raise ValueError(
                    f"{target}: there is another version of this bundle; move it away or name another --app"
                )
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as half:
                archive.extractall(half)
                shutil.move(str(Path(half) / name), target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{package}: not a whole zip ({error})") from error
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
