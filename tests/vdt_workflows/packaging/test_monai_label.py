"""All bundles but pre-training from one MONAI Label server. Set MONAI_LABEL_PYTHON to the interpreter that has it."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pytest
from monai.utils import version_geq
from scipy.ndimage import gaussian_filter

from tests.makers.dicom import write_series
from tests.support.bundle_runs import BUNDLES, ROOT, infer
from tests.support.label_server import PYTHON, ask, predict, serving
from vdt_workflows.packaging.package import package_bundle
from vdt_workflows.packaging.serve import serve_monai_label, unpack

SERVED = [bundle for bundle in BUNDLES if not bundle.name.startswith("imagenet")]
SEGMENTATIONS = [bundle for bundle in SERVED if bundle.name.endswith("_segmentation")]
NAME = "bcv_multiorgan_segmentation"
CLASSIFICATION = "lidc_nodule_classification"
DETECTION = "deeplesion_lesion_detection"
LEAST_SCORE = 0.01  # so that a network of a few steps finds something


# The app -----------------------------------------------------------------------------------------------------------


def make_package(path: Path, name: str = NAME, version: str = "1", *more: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/configs/metadata.json", json.dumps({"version": version}))
        for member in more:
            archive.writestr(member, "x")
    return path


def test_a_package_is_unpacked_once_and_keeps_what_training_changed(tmp_path):
    weights = f"{NAME}/models/model.pt"
    package = make_package(tmp_path / "a.zip", NAME, "1", weights)
    assert unpack(package, tmp_path / "model") == NAME
    trained = tmp_path / "model" / weights
    trained.write_text("trained")
    assert unpack(package, tmp_path / "model") == NAME
    assert trained.read_text() == "trained"
    with pytest.raises(ValueError, match="there is another version of this bundle"):
        unpack(make_package(tmp_path / "b.zip", NAME, "2", weights), tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        (NAME, (), "has no models/model.pt; package the bundle with --weights"),
        (NAME, ("other/x",), "not a bundle's zip"),
        (NAME, (f"{NAME}/../../x",), "not a bundle's zip"),
        ("imagenet_vdt_pretraining", ("imagenet_vdt_pretraining/models/model.pt",), "is not meant for MONAI Label"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_unpacked(tmp_path, name, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        unpack(make_package(tmp_path / "a.zip", name, "1", *more), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_missing_interpreter_zip_or_folder_is_named(tmp_path):
    package = str(make_package(tmp_path / "a.zip", NAME, "1", f"{NAME}/models/model.pt"))
    with pytest.raises(FileNotFoundError, match="none: no such folder of studies"):
        serve_monai_label("none", package)
    with pytest.raises(ValueError, match="name the zips of the bundles to serve"):
        serve_monai_label(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no/python: no such interpreter; give --python"):
        serve_monai_label(str(tmp_path), package, app=str(tmp_path / "app"), python="no/python")
    with pytest.raises(ValueError, match=r"MONAI Label does not start \(.*monailabel.*\)"):
        serve_monai_label(str(tmp_path), package, app=str(tmp_path / "app"), python=sys.executable)


# The server --------------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A running server, and the folder of its bundles."""

    address: str
    models: Path

    def __str__(self) -> str:
        return self.address


@pytest.fixture(scope="module")
def server(answering, volumes, tmp_path_factory):
    """A server of the five bundles, with two volumes to label."""
    if not PYTHON:
        pytest.skip("MONAI_LABEL_PYTHON does not name an interpreter that has MONAI Label")
    folder = tmp_path_factory.mktemp("monai_label")
    weights = [str(answering(bundle) / "model.pt") for bundle in SERVED]
    packages = [package_bundle(b.name, str(folder), weights=path) for b, path in zip(SERVED, weights, strict=True)]
    (folder / "studies").mkdir()
    for case in ("case0", "case1"):
        shutil.copy(volumes / "images" / f"{case}.nii.gz", folder / "studies")
    serve_monai_label(str(folder / "studies"), *packages, start=False, app=str(folder / "app"), python=PYTHON)
    models = folder / "app" / "monaibundle" / "model"
    for bundle in [*SEGMENTATIONS, ROOT / "bundles" / CLASSIFICATION]:  # steps enough to see that it trains
        config = models / bundle.name / "configs" / "train.json"
        content = json.loads(config.read_text())
        few = {"steps_per_epoch": 2, "val_interval": 1, "num_workers": 0, "batch_size": 2}
        config.write_text(json.dumps({**content, **{id: few[id] for id in few if id in content}}))
    config = models / DETECTION / "configs" / "inference.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "least_score": LEAST_SCORE}))
    with serving(str(folder / "studies"), packages, folder) as address:
        yield Server(address, models)


def compare(mask: bytes, reference: Path, folder: Path) -> None:
    (folder / "served.nii.gz").write_bytes(mask)
    ours, theirs = nib.load(reference), nib.load(folder / "served.nii.gz")
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
    assert len(np.unique(ours.dataobj)) > 1
    np.testing.assert_allclose(theirs.affine, ours.affine, atol=1e-4)


def put_label(server: Server, case: str, path: Path) -> None:
    place = f"{server}/datastore/label?image={case}&tag=final"
    ask("-X", "PUT", place, "-F", "params={}", "-F", f"label=@{path}")


def train_twice(server: Server, name: str) -> None:
    """Train twice; each time the weights must change."""
    weights = server.models / name / "models" / "model.pt"
    wanted = {"max_epochs": 1, "val_split": 0.5, "device": "cpu", "multi_gpu": False}
    for _ in range(2):
        before = weights.read_bytes()
        words = ["-H", "Content-Type: application/json", "-d", json.dumps(wanted)]
        ask("-X", "POST", f"{server}/train/{name}?run_sync=true", *words)
        changed = weights.read_bytes() != before
        assert changed


@pytest.mark.slow
def test_the_server_lists_the_bundles_with_their_kinds_and_labels(server):
    models = json.loads(ask(f"{server}/info/"))["models"]
    assert {name: model["type"] for name, model in models.items()} == {
        bundle.name: bundle.name.rpartition("_")[2] for bundle in SERVED
    }
    assert models[NAME]["labels"] == {"a": 1, "b": 2}
    assert models["lits_liver_segmentation"]["labels"] == {"liver": 1}
    assert models["lidc_nodule_classification"]["labels"] == {"benign": 0, "malignant": 1}


TABLES = r"""
import json, pathlib, re
import monailabel
from monailabel.datastore.utils.colors import GENERIC_ANATOMY_COLORS

pages = pathlib.Path(monailabel.__file__).parent.glob("endpoints/static/ohif/*.js")
found = re.findall(r"label: '([^']+)',\s+value: rgbToHex\((\d+), (\d+), (\d+)\)", "".join(p.read_text() for p in pages))
print(json.dumps([GENERIC_ANATOMY_COLORS, {name: [int(n) for n in rgb] for name, *rgb in found}]))
"""


@pytest.mark.slow
def test_the_documented_colours_are_those_of_the_viewers_since_the_server_sends_none(server):
    assert "color" not in ask(f"{server}/info/").decode().lower()
    done = subprocess.run([str(PYTHON), "-c", TABLES], capture_output=True, text=True, check=True)
    slicer, ohif = json.loads(done.stdout.splitlines()[-1])
    text = (ROOT / "docs" / "monai_label.md").read_text().partition("## Colours")[2]
    rows = dict(re.findall(r"^\| ([a-z, ]+?) \| ([\w, ]+) \|$", text, re.MULTILINE))
    documented = {name: colour for names, colour in rows.items() if names != "label" for name in names.split(", ")}
    for name, colour in documented.items():
        rgb = None if colour == "not in the tables" else [int(n) for n in colour.split(", ")]
        assert (slicer.get(name), ohif.get(name)) == (rgb, rgb), name
    for bundle in SEGMENTATIONS:
        meta = json.loads((bundle / "configs" / "metadata.json").read_text())
        names = meta["network_data_format"]["outputs"]["pred"]["channel_def"].values()
        assert {*names} - {"background"} <= set(documented)
    assert slicer["mass"] == ohif["mass"] == ohif["liver tumor"]


def make_series(folder: Path, **more) -> Path:
    """Write a DICOM series, oblong in all directions; smooth, so that no two parts of a mask are equally large."""
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(20, 22, 15)), 2)
    hu = np.rint(smooth / smooth.std() * 200).astype(int)
    write_series(folder, hu, spacing=(0.8, 0.7, 2.5), origin=(-20.0, -10.0, -100.0), **more)
    return folder


@contextlib.contextmanager
def sent(server: Server, series: Path) -> Iterator[str]:
    """Send a series to the server as a viewer does, and give what asks for it."""
    files = [word for path in sorted(series.iterdir()) for word in ("-F", f"files=@{path}")]
    name = json.loads(ask("-X", "PUT", f"{server}/session/", *files))["session_id"]
    yield f"session_id={name}"
    ask("-X", "DELETE", f"{server}/session/{name}")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return make_series(tmp_path_factory.mktemp("series") / "ct")


@pytest.fixture(scope="module")
def session(server, series):
    with sent(server, series) as where:
        yield where


@pytest.fixture(params=["nifti", "dicom"])
def source(request, session, series, volumes):
    """A volume, and how to ask the server for it."""
    return (series, session) if request.param == "dicom" else (volumes / "images" / "case0.nii.gz", "image=case0")


@pytest.mark.slow
@pytest.mark.parametrize("bundle", SEGMENTATIONS, ids=lambda path: path.name)
def test_the_served_mask_is_that_of_the_bundle_voxel_for_voxel(server, source, bundle, answering, tmp_path):
    image, where = source
    infer(bundle, answering(bundle), tmp_path, image)
    written = tmp_path / "eval" / f"{image.name.partition('.')[0]}_seg.nii.gz"
    compare(predict(server, bundle.name, where), written, tmp_path)


@pytest.mark.slow
def test_the_mask_of_an_oblique_series_is_that_of_the_bundle(server, answering, tmp_path):
    bundle, angle = ROOT / "bundles" / NAME, np.deg2rad(12)
    orientation = (np.cos(angle), np.sin(angle), 0, -0.8 * np.sin(angle), 0.8 * np.cos(angle), 0.6)
    series = make_series(tmp_path / "ct", orientation=orientation)
    infer(bundle, answering(bundle), tmp_path, series)
    with sent(server, series) as where:
        compare(predict(server, NAME, where), tmp_path / "eval" / "ct_seg.nii.gz", tmp_path)


@pytest.mark.slow
def test_the_served_boxes_are_those_of_the_bundle(server, source, answering, tmp_path):
    bundle = ROOT / "bundles" / DETECTION
    image, where = source
    infer(bundle, answering(bundle), tmp_path, image, least_score=LEAST_SCORE)
    name = image.name.partition(".")[0]
    ours = json.loads((tmp_path / "eval" / f"{name}_lesions.mrk.json").read_text())["markups"]
    theirs = json.loads(predict(server, DETECTION, where))["markups"]
    assert len(ours) == len(theirs) > 0
    assert {box["coordinateSystem"] for box in theirs} == {"LPS"}
    for key in ("center", "size"):
        np.testing.assert_allclose([box[key] for box in theirs], [box[key] for box in ours], atol=1e-3)


@pytest.mark.slow
def test_the_served_scores_are_those_of_the_bundle(server, source, answering, tmp_path):
    bundle, given = ROOT / "bundles" / CLASSIFICATION, {}
    image, where = source
    if image.is_dir():  # the bundle needs the nodule's position; the server takes the middle
        (tmp_path / "middle.csv").write_text("column,row,slice\n9.5,10.5,7\n")
        given["positions"] = str(tmp_path / "middle.csv")
    infer(bundle, answering(bundle), tmp_path, image, **given)
    (nodule,) = json.loads((tmp_path / "eval" / "malignancy.json").read_text())["nodules"]
    found = json.loads(predict(server, CLASSIFICATION, where, "json"))["prediction"]
    assert [entry["label"] for entry in found] == ["benign", "malignant"]
    assert found[1]["score"] == pytest.approx(nodule["malignancy"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", SEGMENTATIONS, ids=lambda path: path.name)
def test_a_segmentation_trains_twice_in_a_row_and_still_answers_on_the_grid_of_the_image(
    server, bundle, volumes, tmp_path
):
    words = [str(PYTHON), "-c", "import monai; print(monai.__version__)"]
    version = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]
    if not version_geq(version, "1.6.1"):
        pytest.skip(f"training segmentations needs MONAI 1.6.1; there it is {version}")
    before = predict(server, bundle.name, "image=case0")
    for case in ("case0", "case1"):
        label = nib.load(volumes / "labels" / f"{case}.nii.gz")
        mask = (np.asarray(label.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, label.affine), tmp_path / "label.nii.gz")
        put_label(server, case, tmp_path / "label.nii.gz")
    train_twice(server, bundle.name)
    (tmp_path / "a.nii.gz").write_bytes(before)
    (tmp_path / "b.nii.gz").write_bytes(predict(server, bundle.name, "image=case0"))
    a, b = (nib.load(tmp_path / f"{name}.nii.gz") for name in "ab")
    assert a.shape == b.shape
    np.testing.assert_array_equal(a.affine, b.affine)


@pytest.mark.slow
@pytest.mark.parametrize("name", [DETECTION, "unknown_segmentation"])
def test_what_cannot_be_trained_is_not_offered_and_refused_in_a_sentence(server, name):
    assert set(json.loads(ask(f"{server}/info/"))["trainers"]) == {b.name for b in SERVED} - {DETECTION}
    words = ["curl", "-s", "-w", "%{http_code}", "-X", "POST", f"{server}/train/{name}?run_sync=true"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert answer.endswith("400")
    assert f"model '{name}': cannot be trained through MONAI Label; " in json.loads(answer[:-3])["detail"]


@pytest.mark.slow
def test_the_classification_trains_twice_in_a_row_from_json_labels(server, tmp_path):
    for case, name in (("case0", "benign"), ("case1", "malignant")):
        (tmp_path / "label.json").write_text(json.dumps({"label": name}))
        put_label(server, case, tmp_path / "label.json")
    train_twice(server, CLASSIFICATION)
    found = json.loads(predict(server, CLASSIFICATION, "image=case0", "json"))["prediction"]
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)
