"""Serve packaged bundles from one MONAI Label server, without the network.

    vdt serve STUDIES dist/*.zip --python monailabel/bin/python

STUDIES is a folder of volumes or of DICOM series, or the address of a DICOMweb store. The zips are those of `vdt
package`, with weights; each brings its own code, so that MONAI Label's environment needs no package of this repository.
`docs/monai_label.md` explains how to make it.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vdt_workflows.files import write_atomic
from vdt_workflows.packaging.check import open_package
from vdt_workflows.packaging.label_studies import find_studies

TASKS = ("_segmentation", "_classification", "_detection")  # endings by which MONAI Label knows the kind of a model
REFUSAL = """

# Added by vdt serve: what cannot be trained from labels of a viewer is refused in a sentence, and not offered.
from fastapi import HTTPException


class MyApp(MyApp, MONAILabelApp):  # which MONAI Label looks for among the direct bases
    def init_trainers(self):
        return {name: task for name, task in super().init_trainers().items() if not name.endswith("_detection")}

    def train(self, request):
        name = request.get("model")
        if name not in self._trainers:
            why = "a detection trains on the key slices of a prepared data set, by its train.yaml alone"
            why = why if str(name).endswith("_detection") else f"expected one of {', '.join(self._trainers)}"
            raise HTTPException(400, f"model {name!r}: cannot be trained through MONAI Label; {why}")
        return super().train(request)
"""
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
        studies: what to label: folder of volumes (.nii.gz, .nii, .nrrd), folder or zip with DICOM series, which become
            volumes in the app's folder, or address of a DICOMweb store (http://127.0.0.1:8042/dicom-web).
        packages: zips of bundles, each with its weights.
        app: folder for MONAI Label's app and the unpacked bundles; a bundle that is there already, with the same
            metadata, is not unpacked again.
        python: the interpreter that has MONAI Label.
        host: address to listen at; 0.0.0.0 lets other machines in.
        port: number to listen at.
        start: `--start False` returns the command of the server without starting it.

    Raises:
        FileNotFoundError: if a folder, a zip or the interpreter is not there.
        ValueError: if a zip has no weights or is not for MONAI Label, or there is nothing to label.
    """
    if not packages:
        raise ValueError("name the zips of the bundles to serve; vdt package makes them")
    place = Path(app).absolute() / "monaibundle"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{environment.get('PATH', '')}"
    source = find_studies(studies, place.parent / "studies", environment["PATH"])
    if not place.is_dir():
        copy = ["apps", "--download", "--name", "monaibundle", "--output", str(place.parent)]
        _run([python, "-m", "monailabel.main", *copy], environment)
    add_refusal(place / "main.py")
    names = [unpack(Path(package), place / "model") for package in packages]
    # any other source than MONAI's would do: it keeps the server from asking the network for local bundles
    conf = {"models": ",".join(names), "zoo_source": "local", "sam2": "false"}
    words = [python, "-m", "monailabel.main", "start_server", "--app", str(place)]
    words += ["--studies", source]
    words += ["--host", host, "--port", str(port)]
    words += [word for name, value in conf.items() for word in ("--conf", name, value)]
    if not start:
        return " ".join(words)
    logger.info("serving %s at http://%s:%s", ", ".join(names), host, port)
    sys.stdout.flush()
    os.execve(python, words, environment)


def add_refusal(main: Path) -> None:
    """Add to the copy of MONAI Label's app how trainings are refused that would end in an error of a library.

    Raises:
        ValueError: if the app is not MONAI Label's for bundles.
    """
    text = main.read_text(encoding="utf-8")
    if "class MyApp(MONAILabelApp):" not in text:
        raise ValueError(f"{main}: not the app of MONAI Label for bundles; name another --app")
    if REFUSAL not in text:
        write_atomic(main, (text + REFUSAL).encode())


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
