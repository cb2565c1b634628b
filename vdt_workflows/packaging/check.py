"""Check a bundle as the Model Zoo and MONAI Label do, without the network.

    vdt check all
    vdt check dist/lits_liver_segmentation_v0.2.0.zip
    vdt check dist/*.zip --python bare/bin/python

Checked are files, licences and sizes; the metadata against its schema; the ids that MONAI requires; that every target
can be imported; `verify_net_in_out`; `ckpt_export`, and that the exported network answers as the network; the README's
commands. A zip is unpacked and checked in a process that does not see the repository; there `monai.bundle.load` must
give a network too, and only the zip's own code may run. `--python` lets another interpreter do that, such as one that
has nothing but what the zip's `docs/requirements.txt` lists.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from vdt_workflows.locator import find_bundles

CHECKS = Path(__file__).with_name("bundle_checks.py")
logger = logging.getLogger(__name__)


def check_bundle(*names: str, workers: int = 2, python: str = sys.executable) -> None:
    """Check bundles; log one line for each check, and what is wrong.

    Args:
        names: folders of `bundles/`, paths of folders or zips, or "all" for every folder of `bundles/`.
        workers: processes at once.
        python: the interpreter that checks zips, this one by default; it needs what their metadata list. Folders of
            the repository are checked by this one.

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
    faults = 0
    with ThreadPoolExecutor(workers) as pool:  # each starts a process; a venv's link to its interpreter is not resolved
        results = pool.map(partial(check, python=os.path.abspath(started)), places)
        for place, found in zip(places, results, strict=True):
            for name, sentences in found.items():
                logger.info("%s: %s %s", place.name, name, "ok" if not sentences else "FAILED")
                for sentence in sentences:
                    logger.info("  %s", sentence)
                faults += len(sentences)
    if faults:
        raise ValueError(f"{faults} fault{'s' if faults > 1 else ''} in {len(places)} bundle(s), named above")


def find(name: str) -> list[Path]:
    """Find the folders or the zip that a name of the command line stands for.

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
    """Check a folder, or a zip after unpacking it; list what is wrong for each check.

    Args:
        place: a bundle's folder, or a zip.
        python: the interpreter that checks what is packaged.
    """
    if place.is_dir():
        return _run_checks(place, python, packaged=(place / "scripts").is_dir())
    with tempfile.TemporaryDirectory() as folder:
        try:
            with open_package(place) as (archive, bundle):
                archive.extractall(folder)
        except ValueError as error:
            return {"archive": [str(error)]}
        named = place.name.startswith(f"{bundle}_v") or place.stem == bundle
        found = {"archive": [] if named else [f"{place.name}: its folder is {bundle}"]}
        return {**found, **_run_checks(Path(folder) / bundle, python, packaged=True)}


@contextlib.contextmanager
def open_package(path: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """Open a bundle's zip, with the bundle's name.

    Raises:
        FileNotFoundError: if there is no such zip.
        ValueError: if it is not a whole zip, or has members outside of one folder of the bundle's name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such zip")
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name.split("/") for name in archive.namelist()]
            top = members[0][0] if members else ""
            if not top or any(len(parts) < 2 or parts[0] != top or ".." in parts for parts in members):
                raise ValueError(f"{path}: not a bundle's zip, which has one folder of the bundle's name")
            packed, unpacked = (sum(getattr(i, a) for i in archive.infolist()) for a in ("compress_size", "file_size"))
            if unpacked > 100 * packed + (1 << 24):
                raise ValueError(f"{path}: unpacks to {unpacked} bytes from {packed}; not a bundle's zip")
            yield archive, top
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a whole zip ({error})") from error


def _run_checks(folder: Path, python: str, *, packaged: bool) -> dict[str, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [python, "-I"]
    if not packaged:
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        words = [sys.executable, "-W", "ignore"]
    with tempfile.TemporaryDirectory() as elsewhere:
        found = Path(elsewhere) / "found.json"
        words += [str(CHECKS), str(folder), str(found)]
        result = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            return {"start": [(result.stderr.strip().splitlines() or [f"ended with {result.returncode}"])[-1]]}
        return json.loads(found.read_text())
