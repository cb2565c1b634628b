"""Bundles as zips: what is in them, and that they need nothing of this repository.

Set BARE_PYTHON to the interpreter that is to use and check the zips, in the place of the one that runs the tests: one
that has nothing but what a zip's docs/requirements.txt lists.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch

import vdt_workflows.packaging.bundle_checks as bundle_checks
from networks import ResNet2D, ResNet3D
from tests.support.bundle_runs import BUNDLES, ROOT, run
from vdt_workflows.locks import LOCK
from vdt_workflows.packaging.check import check, check_bundle
from vdt_workflows.packaging.description import describe
from vdt_workflows.packaging.package import (
    LEFT_OUT,
    PACKAGES,
    package_bundle,
    vendor_config,
    vendor_source,
    write_readme,
)
from vdt_workflows.training.checkpoints import read_provenance, save_weights
from vdt_workflows.training.initialisation import initialise
from vdt_workflows.training.shipped import find_weights

NAME = "bcv_multiorgan_segmentation"
BARE = os.path.abspath(os.environ.get("BARE_PYTHON", sys.executable))


@pytest.fixture(scope="module")
def weights(trained):
    return trained(ROOT / "bundles" / NAME) / "models" / "model.pt"


@pytest.fixture(scope="module")
def package(weights, tmp_path_factory):
    """A zip of the bundle trained on two balls."""
    return Path(package_bundle(NAME, str(tmp_path_factory.mktemp("dist")), weights=str(weights)))


@pytest.fixture(scope="module")
def unpacked(package, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(package, folder)
    return folder / NAME


def member(zipped: str, config: str) -> dict:
    """Read one of a zip's configs."""
    with zipfile.ZipFile(zipped) as archive:
        return json.loads(archive.read(f"{NAME}/configs/{config}.json"))


def encoder() -> ResNet3D:
    return ResNet3D(18, base_channels=4, depth_stride=True)


def reweigh(weights: Path, folder: Path, **provenance) -> Path:
    """Copy a run with another provenance in its weights."""
    shutil.copytree(weights.parent, folder)
    state = torch.load(folder / "model.pt", weights_only=True)
    state._metadata[""]["provenance"] = {**read_provenance(weights), **provenance}
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


# What a zip holds --------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_bytes(package, weights, tmp_path):
    again = Path(package_bundle(NAME, str(tmp_path), weights=str(weights)))
    assert again.read_bytes() == package.read_bytes()
    with zipfile.ZipFile(package) as archive:
        entries = archive.infolist()
    kinds = {(e.date_time, e.external_attr >> 16, e.compress_type) for e in entries}
    assert kinds == {((1980, 1, 1, 0, 0, 0), 0o100644, 0)}
    names = [e.filename for e in entries]
    assert names == sorted(names)
    assert all(name.startswith(f"{NAME}/") and "__pycache__" not in name for name in names)


def test_the_code_imports_its_neighbours_from_scripts_alone(unpacked):
    for path in (unpacked / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.partition(".")[0] for module in modules} & {*PACKAGES}, path


def test_every_module_that_bundles_may_reach_is_in_the_zip(unpacked):
    for package in PACKAGES:
        files = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")]
        copied = (unpacked / "scripts" / package).rglob("*.py")
        ours = {file for file in files if file.parts[1] not in LEFT_OUT}
        assert {path.relative_to(unpacked / "scripts") for path in copied} == ours


def test_a_whole_import_of_a_copied_package_is_named_with_its_line():
    with pytest.raises(ValueError, match=r"networks/x\.py, line 2: write `from \.\.\. import`"):
        vendor_source("import os\nimport vdt_transforms.vdt\n", "networks/x.py")


@pytest.mark.parametrize("line", ['import_module(f"networks.{name}")', "importlib.import_module('vdt_workflows')"])
def test_a_module_named_in_quotes_is_refused_with_its_line(line):
    with pytest.raises(ValueError, match=r"networks/x\.py, line 2: import by `__name__`"):
        vendor_source(f"x = 1\ny = {line}\n", "networks/x.py")
    assert vendor_source('import_module(f"{__name__}.x")\n', "networks/x.py")


def test_expressions_and_targets_point_into_scripts():
    config = {
        "imports": ["$import os", "$import vdt_workflows"],
        "bundle_root": ".",
        "data": "$vdt_workflows.list_volumes(@dataset_dir) + [networks.DepthFirst, 'vdt_transforms.x', my_networks.y]",
        "load": {"_target_": "LoadImaged", "reader": "vdt_transforms.NoduleReader"},
        "net": {"_target_": "networks.DepthFirst", "network": {"_target_": "torch.nn.ReLU"}},
        "text": "networks of all kinds",
    }
    out = vendor_config(config, complete=True)
    assert "$import vdt_workflows" not in out["imports"]
    data = "$@vdt_workflows.list_volumes(@dataset_dir) + [@networks.DepthFirst, 'vdt_transforms.x', my_networks.y]"
    assert out["data"] == data
    load = {"_target_": "LoadImaged", "reader": "scripts.vdt_transforms.NoduleReader"}
    assert out["load"] == {**load, "_requires_": "@code"}
    assert out["net"]["_target_"] == "scripts.networks.DepthFirst"
    assert "_requires_" not in out["net"]["network"]
    assert out["text"] == config["text"]


def test_the_settings_of_the_run_are_the_defaults_and_the_metadata_follow(unpacked):
    inference, train = (json.loads((unpacked / "configs" / f"{n}.json").read_text()) for n in ("inference", "train"))
    for config in (inference, train):
        assert config["label_names"] == ["background", "a", "b"]
        assert config["patch_size"] == [16, 24, 16]
        assert config["base_channels"] == 4
    meta = json.loads((unpacked / "configs" / "metadata.json").read_text())
    pred = meta["network_data_format"]["outputs"]["pred"]
    assert pred["num_channels"] == 3
    assert pred["channel_def"] == {"0": "background", "1": "a", "2": "b"}
    image = meta["network_data_format"]["inputs"]["image"]
    assert (image["modality"], image["value_range"]) == ("CT", [])  # the window is another
    assert set(json.loads((unpacked / "models" / "run.json").read_text())) <= set(inference)


def test_a_run_by_the_paper_protocol_leaves_its_config_as_the_default(weights, tmp_path):
    copy = reweigh(weights, tmp_path / "models", protocol="paper")
    record = copy.parent / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "protocol": "paper"}))
    train = member(package_bundle(NAME, str(tmp_path), weights=str(copy)), "train")
    assert (train["protocol"], train["best_name"], train["base_channels"]) == ("paper", "model_best.pt", 4)
    assert train["train"]["places"][0]["_target_"] == "scripts.vdt_transforms.ForegroundSlicesd"


def test_figures_of_an_evaluation_become_those_of_the_metadata(weights, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"val_mean_dice": 0.5, "_run_": {"part": "test"}}))
    zipped = package_bundle(NAME, str(tmp_path), weights=str(weights), scores=str(tmp_path / "scores.json"))
    assert member(zipped, "metadata")["eval_metrics"] == {"val_mean_dice": 0.5}


def test_figures_of_other_weights_or_beyond_what_a_dice_can_be_are_refused(weights, tmp_path):
    (tmp_path / "other.pt").write_bytes(weights.read_bytes() + b" ")
    scores = tmp_path / "scores.json"
    given = {"weights": str(weights), "scores": str(scores)}
    scores.write_text(json.dumps({"val_mean_dice": 0.5, "_run_": {"checkpoint": str(tmp_path / "other.pt")}}))
    with pytest.raises(ValueError, match=r"the scores of .*other\.pt, which holds other weights than"):
        package_bundle(NAME, str(tmp_path), **given)
    scores.write_text(json.dumps({"val_mean_dice": 17}))
    with pytest.raises(ValueError, match="val_mean_dice is 17; expected 0 to 1"):
        package_bundle(NAME, str(tmp_path), **given)
    scores.write_text(json.dumps({"val_mean_dice": 0.5, "_run_": {"checkpoint": str(weights)}}))
    assert package_bundle(NAME, str(tmp_path), **given)


def test_weights_that_lie_elsewhere_are_fetched_and_checked(weights, tmp_path):
    zipped = package_bundle(NAME, str(tmp_path), weights=str(weights), weights_url=weights.as_uri())
    shutil.unpack_archive(zipped, tmp_path)
    assert not (tmp_path / NAME / "models" / "model.pt").exists()
    monai.bundle.download_large_files(bundle_path=str(tmp_path / NAME))
    assert (tmp_path / NAME / "models" / "model.pt").read_bytes() == weights.read_bytes()


# What is refused ---------------------------------------------------------------------------------------------------


def test_weights_that_started_from_those_of_others_are_refused(weights, tmp_path):
    published, tuned = tmp_path / "published.pth", tmp_path / "encoder.pt"
    torch.save(encoder().state_dict(), published)
    with pytest.raises(ValueError, match=r"published\.pth: says nothing of its origin"):
        package_bundle(NAME, str(tmp_path), weights=str(published), run=str(weights.parent / "run.json"))
    save_weights(initialise(encoder(), "vdt", published), tuned, {"depth": 18})  # by us
    first, later = (initialise(encoder(), "vdt", file).origin for file in (published, tuned))
    assert later["pretrained"]["provenance"]["pretrained"]["file"] == "published.pth"
    others = r"started from published\.pth \(SHA-256 \w{12}\.\.\.\), which these bundles"
    imagenet = ({"init": "imagenet"}, r"published weights of others \(init 'imagenet'\)")
    for number, (origin, sentence) in enumerate([(first, others), (later, others), imagenet]):
        path = reweigh(weights, tmp_path / str(number), **origin)
        with pytest.raises(ValueError, match=sentence):
            package_bundle(NAME, str(tmp_path), weights=str(path))


def test_weights_of_our_own_pre_training_are_packaged(weights, tmp_path):
    save_weights(encoder(), tmp_path / "encoder.pt", {"depth": 18})
    origin = initialise(encoder(), "vdt", tmp_path / "encoder.pt").origin
    assert package_bundle(NAME, str(tmp_path), weights=str(reweigh(weights, tmp_path / "models", **origin)))


def test_shipped_weights_and_those_that_started_from_them_carry_their_cards(weights, tmp_path):
    name = "vdt_resnet3d18_w16"
    shipped = package_bundle("imagenet_vdt_pretraining", str(tmp_path), weights=name)
    origin = initialise(ResNet3D(18, base_channels=16), "vdt", find_weights(name) / "model.pt").origin
    tuned = package_bundle(NAME, str(tmp_path), weights=str(reweigh(weights, tmp_path / "models", **origin)))
    for zipped, bundle in ((shipped, "imagenet_vdt_pretraining"), (tuned, NAME)):
        archive = zipfile.ZipFile(zipped)
        assert archive.read(f"{bundle}/docs/weights/{name}.md") == (find_weights(name) / "card.md").read_bytes()
        terms = archive.read(f"{bundle}/docs/data_license.txt").decode()
        assert terms.startswith("Weights, but no data, are part of this bundle.")
        assert f"For the weights CC-BY-NC-4.0 holds, and the terms of the data that docs/weights/{name}.md" in terms
    held = zipfile.ZipFile(shipped).read("imagenet_vdt_pretraining/models/model.pt")
    assert held == (find_weights(name) / "model.pt").read_bytes()


@pytest.mark.parametrize("init", ["i3d", "acs", "2.5d"])
def test_weights_that_were_converted_are_packaged_if_the_2d_ones_are_ours(weights, tmp_path, init):
    twin = ResNet2D(18, base_channels=4)
    save_weights(twin, tmp_path / "encoder.pt", {"depth": 18})
    torch.save(twin.state_dict(), tmp_path / "published.pth")
    paths = {}
    for file in ("encoder.pt", "published.pth"):
        paths[file] = reweigh(weights, tmp_path / f"from {file}", **initialise(encoder(), init, tmp_path / file).origin)
    assert package_bundle(NAME, str(tmp_path), weights=str(paths["encoder.pt"]))
    with pytest.raises(ValueError, match=r"started from published\.pth .* bundles did not write"):
        package_bundle(NAME, str(tmp_path), weights=str(paths["published.pth"]))


def test_weights_need_the_record_of_their_run_and_must_fit_it(weights, tmp_path):
    copy = shutil.copy(weights, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run\.json: no such file; give --run"):
        package_bundle(NAME, str(tmp_path), weights=copy)
    other = json.dumps({**json.loads((weights.parent / "run.json").read_text()), "base_channels": 8})
    wrong = {
        other: r"run\.json: contradicts .*model\.pt, .* \(base_channels 8, not 4\)",
        "{}": "not the record of a run",
        "cut": "no whole JSON",
        "3": "not a JSON object",
    }
    for text, sentence in wrong.items():
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            package_bundle(NAME, str(tmp_path), weights=copy)
    with pytest.raises(ValueError, match="--scores describes weights; give --weights too"):
        package_bundle(NAME, str(tmp_path), scores="scores.json")
    assert not list(tmp_path.glob("*.zip"))


def test_a_version_that_is_out_is_not_replaced_by_another(package, tmp_path):
    shutil.copy(package, tmp_path)
    with pytest.raises(FileExistsError, match=r"another package of version .*; raise the version in metadata\.json"):
        package_bundle(NAME, str(tmp_path))
    assert (tmp_path / package.name).read_bytes() == package.read_bytes()
    package_bundle(NAME, str(tmp_path), overwrite=True)
    assert (tmp_path / package.name).read_bytes() != package.read_bytes()


def test_what_a_killed_packaging_left_half_written_is_removed(tmp_path):
    (tmp_path / ".abc123.part").write_bytes(b"PK")
    path = package_bundle(NAME, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir() if file.name != LOCK] == [Path(path).name]


def test_an_unknown_bundle_is_named_with_those_there_are():
    with pytest.raises(FileNotFoundError, match="bcv: no such bundle; there are bcv_multiorgan_segmentation, "):
        package_bundle("bcv")


# What a zip does ---------------------------------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch):
    """Restore the search path and the modules of `scripts`."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.mark.usefixtures("apart")
def test_two_packages_in_one_process_use_their_own_code(unpacked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other" / NAME
    shutil.copytree(unpacked, other)
    with (other / "scripts" / "networks" / "depth_first.py").open("a") as file:
        file.write("\nDepthFirst.marked = True\n")
    for _ in range(2):
        for folder, marked in ((unpacked, False), (other, True)):
            network = monai.bundle.load(NAME, bundle_dir=str(folder.parent), workflow_type="inference", device="cpu")
            assert type(network).__module__ == "scripts.networks.depth_first"
            assert hasattr(network, "marked") == marked


WORKFLOW = """
from monai.bundle import create_workflow

name, image = "bcv_multiorgan_segmentation", "IMAGE"
given = {"bundle_root": name, "dataset_dir": image}
workflow = create_workflow(config_file=f"{name}/configs/inference.json", workflow_type="inference", **given)
workflow.run()
workflow.finalize()
"""
RESULTS = {
    "imagenet_vdt_pretraining": "predictions.csv",
    "lidc_nodule_classification": "malignancy.csv",
    "deeplesion_lesion_detection": "case0_lesions.mrk.json",
}


@pytest.fixture(scope="module")
def meant(images, volumes, tmp_path_factory):
    """What the words in capitals of the READMEs' examples stand for."""
    scan = volumes / "images" / "case0.nii.gz"
    positions = tmp_path_factory.mktemp("positions") / "positions.csv"
    positions.write_text("x_mm,y_mm,z_mm\n-6,7,14\n-14,15,14\n")
    scans = dict.fromkeys(("VOLUME_OR_FOLDER", "CUBE_OR_FOLDER", "CT", "SCAN"), scan)
    return {**scans, "IMAGE_OR_FOLDER": images / "val" / "red", "POSITIONS": positions}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [*((bundle.name, "command") for bundle in BUNDLES), (NAME, "workflow")])
def test_a_package_answers_as_the_bundle_from_anywhere_without_the_repository(answering, meant, tmp_path, name, way):
    bundle = ROOT / "bundles" / name
    shutil.copytree(answering(bundle), tmp_path / "models")
    record = tmp_path / "models" / "run.json"
    if name.endswith("_detection"):  # so that there is something to compare
        record.write_text(json.dumps({**json.loads(record.read_text()), "least_score": 0.01}))
    zipped = package_bundle(name, str(tmp_path), weights=str(tmp_path / "models" / "model.pt"))
    shutil.unpack_archive(zipped, tmp_path / "elsewhere")
    text = (tmp_path / "elsewhere" / name / "docs" / "README.md").read_text()
    (command,) = re.findall(r"^python -m (monai\.bundle run .*?)\n```", text, re.DOTALL | re.MULTILINE)[:1]
    words = [str(meant.get(word, word)) for word in command.replace("\\\n", " ").split()]
    given = {word[2:]: value for word, value in itertools.pairwise(words) if word in ("--dataset_dir", "--positions")}
    assert set(given.values()) <= {str(path) for path in meant.values()}
    run(bundle, ["inference"], tmp_path, given.pop("dataset_dir"), args_file=str(record), **given)
    words = ["-m", *words] if way == "command" else ["-c", WORKFLOW.replace("IMAGE", str(meant["CT"]))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # as here: more threads add in another order, which the last digit shows
    subprocess.run([BARE, "-I", *words], cwd=tmp_path / "elsewhere", env=environment, check=True)
    result = RESULTS.get(name, "case0_seg.nii.gz")
    ours, theirs = (folder / "eval" / result for folder in (tmp_path, tmp_path / "elsewhere" / name))
    if result.endswith(".nii.gz"):
        np.testing.assert_array_equal(*(np.asarray(nib.load(path).dataobj) for path in (ours, theirs)))
        np.testing.assert_array_equal(nib.load(ours).affine, nib.load(theirs).affine)
        assert len(np.unique(nib.load(ours).dataobj)) > 1
    else:
        ours, theirs = ([float(n) for n in re.findall(r"-?\d+\.?\d*", path.read_text())] for path in (ours, theirs))
        assert len(ours) > 5
        assert theirs == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_bundle_passes_its_checks_in_the_repository_and_from_its_zip(bundle, trained, tmp_path):
    weights = trained(bundle) / "models" / "model.pt"
    found = check(Path(package_bundle(bundle.name, str(tmp_path), weights=str(weights))), BARE)
    assert {"files", "metadata", "configs", "network", "readme", "isolation"} <= set(found)
    assert not any(found.values()), found
    if bundle.name == NAME:  # the others in this process, which has the imports done
        assert not any(check(bundle).values())
    else:
        whole = bundle_checks.Bundle(bundle)
        assert not [fault for one in bundle_checks.CHECKS for fault in bundle_checks.find_faults(whole, one)]


def test_the_example_of_a_package_gives_all_that_the_bundles_own_does():
    text = write_readme(ROOT / "bundles" / "lidc_nodule_classification", has_weights=True, url=None)
    first = text.index("monai.bundle run")
    assert "    --dataset_dir SCAN --positions POSITIONS\n```" in text[first : first + 300]


# What the checks find ----------------------------------------------------------------------------------------------


def faults(folder: Path, name: str) -> str:
    return "\n".join(bundle_checks.find_faults(bundle_checks.Bundle(folder), getattr(bundle_checks, f"check_{name}")))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture
def copied(tmp_path):
    """A copy of the bundle's folder in the repository."""
    ignore = shutil.ignore_patterns("models", "eval", "data")
    return shutil.copytree(ROOT / "bundles" / NAME, tmp_path / NAME, ignore=ignore)


@pytest.mark.parametrize(
    ("name", "path", "old", "new", "sentence"),
    [
        ("files", "docs/README.md", "## Data", "## Data in /home/someone/x", "a path of one machine: /home/someone"),
        ("metadata", "configs/metadata.json", '"version": "', '"version": "9', "the changelog has no entry 9"),
        ("metadata", "configs/metadata.json", '"1": "spleen"', '"1": "Spleen"', "is not the config's names"),
        ("metadata", "configs/metadata.json", '"authors": "The', '"author": "The', "'authors' is a required property"),
        ("configs", "configs/train.yaml", "networks.ResUNet3D", "networks.ResUNet4D", "which cannot be imported"),
        ("configs", "configs/inference.yaml", "\ninferer:", "\ninfer:", "the id inferer, which MONAI asks for"),
        ("configs", "configs/inference.yaml", "depth: '@depth'", "depth: 34", "define different networks"),
        ("readme", "docs/README.md", "--part validation", "--parts validation", "--parts: no such setting"),
        ("readme", "docs/README.md", "configs/inference.yaml", "configs/infer.yaml", "configs/infer.yaml is not there"),
    ],
)
def test_a_fault_is_found(copied, name, path, old, new, sentence):
    edit(copied / path, old, new)
    assert sentence in faults(copied, name)


def test_a_missing_licence_and_a_heavy_file_are_found(copied):
    (copied / "LICENSE").unlink()
    with (copied / "docs" / "scan.bin").open("wb") as file:
        file.truncate(26_000_000)
    assert faults(copied, "files") == (
        "LICENSE is missing\ndocs/scan.bin has 26,000,000 bytes; the Model Zoo takes 25,000,000, or large_files.yml"
    )


def test_a_package_that_the_code_needs_and_the_metadata_lack_is_found(unpacked, tmp_path):
    shutil.copytree(unpacked, tmp_path / NAME)
    edit(tmp_path / NAME / "configs" / "metadata.json", '"pydicom"', '"pydicam"')
    assert faults(tmp_path / NAME, "metadata").endswith("lacks pydicom, which the code imports")


def test_what_is_no_package_is_named(tmp_path):
    (tmp_path / "cut.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"1 fault in 1 bundle"):
        check_bundle(str(tmp_path / "cut.zip"))
    for number, names in enumerate([("a/x", "b/x"), ("a/../b",), ("/a/x",), ("a",), ()]):
        zipped = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(zipped, "w") as archive:
            for name in names:
                archive.writestr(name, "")
        assert "has one folder of the bundle's name" in check(zipped)["archive"][0]
    with pytest.raises(FileNotFoundError, match="nothing: no bundle and no zip; there are all, bcv"):
        check_bundle("nothing")


def test_another_interpreter_checks_a_zip_and_is_found_from_the_working_directory(
    package, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").write_text("#!/bin/sh\necho No module named monai >&2\nexit 1\n")
    (tmp_path / "bare").chmod(0o755)
    with caplog.at_level("INFO"), pytest.raises(ValueError, match="1 fault in 1 bundle"):
        check_bundle(str(package), workers=1, python="./bare")
    assert "No module named monai" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"--python \./none: no such interpreter"):
        check_bundle(str(package), python="./none")


def test_the_overlays_of_a_training_are_known_as_such():
    bundle = bundle_checks.Bundle(ROOT / "bundles" / NAME)
    assert {bundle_checks.base(bundle, name) for name in bundle.overlays()} == {"train"}


@pytest.mark.parametrize(("noted", "shown"), [("MR", "MR"), ("unknown", "CT"), ("$'T1'", "T1")])
def test_metadata_say_the_modality_that_the_run_noted_if_it_is_known(noted, shown):
    source = ROOT / "bundles" / "bcv_multiorgan_segmentation" / "configs" / "metadata.json"
    made = describe(json.loads(source.read_text()), {"modality": noted}, {})
    assert made["network_data_format"]["inputs"]["image"]["modality"] == shown
