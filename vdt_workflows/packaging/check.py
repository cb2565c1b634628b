"""Look at a bundle as the Model Zoo's checks and MONAI Label do, without the network.

    vdt check all
    vdt check dist/lits_liver_segmentation_v0.2.0.zip
    vdt check dist/*.zip --python bare/bin/python

Files, licences and sizes; metadata against its schema; MONAI's required ids; targets that import;
`verify_net_in_out`; `ckpt_export`, and that its answer is the network's; the README's commands. A zip is unpacked and
looked at in a process that does not see the repository; there `monai.bundle.load` must give a network too, and only the
zip's own code may run. `--python` lets another interpreter do that, such as one that has nothing but what the zip's
`docs/requirements.txt` lists.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

from vdt_workflows.locator import find_bundles
from vdt_workflows.parallel import run_parallel

CHECKS = Path(__file__).with_name("bundle_checks.py")
logger = logging.getLogger(__name__)


def check_bundle(*names: str, workers: int = 2, python: str = sys.executable) -> None:
    """Check bundles; log one line for each check, and what is wrong.

    Args:
        names: folders of `bundles/`, paths of folders or zips, or "all" for every folder of `bundles/`.
        workers: processes at once.
        python: the interpreter that looks at zips, this one by default; it needs what their metadata list. Folders of
            the repository are looked at by this one.

    Raises:
        FileNotFoundError: if there is no such bundle or interpreter.
        ValueError: with the number of faults, if there are any.
    """
    if not names:
        raise ValueError("name a bundle, a zip, or all")
    places = [place for name in names for place in find(name)]
    started = shutil.which(python)
    if started is None:
        raise FileNotFoundError(f"--python {python}: no such interpreter; give the path of one, as bare/bin/python")
    task = partial(_check, python=os.path.abspath(started))  # a link of a venv stays one
    results = dict(run_parallel(task, places, workers=workers))
    faults = 0
    for place in places:
        for name, sentences in results[place].items():
            logger.info("%s: %s %s", place.name, name, "ok" if not sentences else "FAILED")
            for sentence in sentences:
                logger.info("  %s", sentence)
            faults += len(sentences)
    if faults:
        raise ValueError(f"{faults} fault{'s' if faults > 1 else ''} in {len(places)} bundle(s), named above")


def find(name: str) -> list[Path]:
    """Find what a name of the command line stands for.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    folders = sorted(path.parent for path in find_bundles().glob("*/configs"))
    if name == "all":
        return folders
    for path in (Path(name), find_bundles() / name):
        if path.is_file() or (path / "configs").is_dir():
            return [path.resolve()]
    raise FileNotFoundError(f"{name}: no bundle and no zip; there are all, {', '.join(path.name for path in folders)}")


def check(place: Path, python: str = sys.executable) -> dict[str, list[str]]:
    """Check a folder, or a zip after unpacking it; give what is wrong for each check.

    Args:
        place: a bundle's folder, or a zip.
        python: the interpreter that looks at what is packaged.
    """
    if place.is_dir():
        return _look(place, python, packaged=(place / "scripts").is_dir())
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(place) as archive:
                parts = [PurePosixPath(name).parts for name in archive.namelist()]
                tops = {part[0] for part in parts if part}
                if len(tops) != 1 or any(".." in part or part[0] == "/" for part in parts):
                    return {"archive": [f"{place}: a bundle's zip has one folder of the bundle's name, not {tops}"]}
                archive.extractall(folder)
        except zipfile.BadZipFile as error:
            return {"archive": [f"{place}: not a whole zip ({error})"]}
        (top,) = tops
        found = _look(Path(folder) / top, python, packaged=True)
        named = place.name.startswith(f"{top}_v") or place.stem == top
        return {"archive": [] if named else [f"{place.name}: its folder is {top}"], **found}


def _check(place: Path, python: str) -> tuple[Path, dict[str, list[str]]]:
    return place, check(place, python)


def _look(folder: Path, python: str, *, packaged: bool) -> dict[str, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = ["-I"] if packaged else ["-W", "ignore"]
    if not packaged:
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory() as elsewhere:
        found = Path(elsewhere) / "found.json"
        words = [python if packaged else sys.executable, *flags, str(CHECKS), str(folder), str(found)]
        result = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            return {"start": [(result.stderr.strip().splitlines() or [f"ended with {result.returncode}"])[-1]]}
        return json.loads(found.read_text())
