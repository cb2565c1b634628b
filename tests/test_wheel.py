"""The wheel holds the packages and the bundles, and works away from the clone without writing into itself."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.bundle_runs import BUNDLES, ROOT, command

pytestmark = pytest.mark.slow
PACKAGES = ("networks", "vdt_transforms", "vdt_workflows")
BUNDLE = "bcv_multiorgan_segmentation"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel of a copy of the repository that has been worked in."""
    copy = tmp_path_factory.mktemp("copy")
    left_out = shutil.ignore_patterns("models", "eval", "__pycache__")
    for name in (*PACKAGES, "bundles", "scripts", "tests", "weights"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("models/model.pt", "models/run.json", "eval/curves.png"):
        file = copy / "bundles" / BUNDLE / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"mine")
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist", "."]
    subprocess.run([sys.executable, "-m", *words], cwd=copy, check=True)
    (built,) = (copy / "dist").glob("vdt_bundles-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    words = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", *words], check=True)
    return target


def run_installed(installed: Path, folder: Path, *words: str) -> str:
    """Run `python -m` in a folder with the installed packages before all others, and give what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    words = (sys.executable, *words)
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def files_of(folder: Path) -> dict[str, int]:
    """Each file with its time of change; caches of bytecode aside."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def test_the_wheel_has_all_of_the_packages_and_bundles_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name for name in listed if name.partition("/")[0] in PACKAGES and (ROOT / name).is_file()}
    moved = [name for name in listed if name.startswith(("bundles/", "weights/")) and (ROOT / name).is_file()]
    wanted |= {f"vdt_workflows/{name}" for name in moved if name != "weights/vdt_resnet3d18_w64/model.pt"}
    assert names == wanted
    assert {f"vdt_workflows/bundles/{bundle.name}/configs/train.yaml" for bundle in BUNDLES} <= names
    licences = {name.partition(".dist-info/licenses/")[2] for name in zipfile.ZipFile(wheel).namelist()} - {""}
    cards = {name for name in wanted if name.endswith("/card.md")} - {
        "vdt_workflows/weights/vdt_resnet3d18_w64/card.md"  # whose weights are not in it
    }
    assert licences == {"LICENSE", *cards}


def test_the_installed_commands_and_bundles_work_away_from_the_clone(installed, volumes, tmp_path):
    before = files_of(installed)
    code = "import networks, vdt_transforms, vdt_workflows as w; from vdt_workflows.locator import find_bundles\n"
    places = run_installed(installed, tmp_path, "-c", f"{code}print(w.__file__, networks.__file__, find_bundles())")
    assert all(place.startswith(str(installed)) for place in places.split()), places
    assert "vdt COMMAND" in run_installed(installed, tmp_path, "-m", "vdt_workflows", "--help")
    listing = run_installed(installed, tmp_path, "-m", "vdt_workflows", "weights")
    sizes = dict(re.findall(r"^(\w+) .*?  (4.3 MB|not here) ", listing, re.MULTILINE))
    assert sizes == {"vdt_resnet3d18_w16": "4.3 MB", "vdt_resnet3d18_w64": "not here"}

    packed = run_installed(installed, tmp_path, "-m", "vdt_workflows", "package", "lits_liver_segmentation")
    archive = tmp_path / json.loads(packed.splitlines()[-1])
    assert "lits_liver_segmentation/configs/inference.json" in zipfile.ZipFile(archive).namelist()

    bundle = installed / "vdt_workflows" / "bundles" / BUNDLE
    short = {"epochs": 1, "steps_per_epoch": 1}
    run_installed(installed, tmp_path, "-m", *command(bundle, ["train"], tmp_path, volumes, **short))
    weights = {"ckpt_path": "models/model.pt", "args_file": "models/run.json"}
    run_installed(installed, tmp_path, "-m", *command(bundle, ["inference"], tmp_path, volumes, **weights))
    assert len(list((tmp_path / "eval").glob("*_seg.nii.gz"))) == 6
    assert files_of(installed) == before
