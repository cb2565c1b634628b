"""Packages with a name of their own, and folders for Hugging Face's hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.utils import optional_import

from networks import read_checkpoint
from tests.support.bundle_runs import ROOT
from vdt_workflows.packaging.check import check
from vdt_workflows.packaging.hub import write_folder
from vdt_workflows.packaging.package import package_bundle
from vdt_workflows.training.shipped import find_weights

BUNDLE, WEIGHTS, NAME = "bcv_multiorgan_segmentation", "hippocampus_mr_w16", "hippocampus_mr_segmentation"
REPO, COMMIT = "someone/hippocampus", "0123456789abcdef0123456789abcdef01234567"
needs_safetensors = pytest.mark.skipif(
    not optional_import("safetensors")[1], reason="safetensors, of the extra hub, is not installed"
)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    return Path(package_bundle(BUNDLE, str(tmp_path_factory.mktemp("dist")), weights=WEIGHTS, name=NAME))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What an upload takes."""
    return Path(package_bundle(BUNDLE, str(tmp_path_factory.mktemp("hub")), weights=WEIGHTS, name=NAME, hub=REPO))


def test_a_package_with_a_name_of_its_own_tells_of_its_weights_and_not_of_its_bundle(zipped):
    assert zipped.name.startswith(f"{NAME}_v")
    with zipfile.ZipFile(zipped) as archive:
        assert {member.partition("/")[0] for member in archive.namelist()} == {NAME}
        readme = archive.read(f"{NAME}/docs/README.md").decode()
        meta, inference = (
            json.loads(archive.read(f"{NAME}/configs/{file}.json")) for file in ("metadata", "inference")
        )
    assert readme.startswith("# Hippocampus segmentation in MR\n")
    assert meta["task"] == "Segmentation of the anterior and posterior hippocampus in MR"
    assert meta["eval_metrics"] == {"mean_dice": 0.875}
    assert meta["pred_classes"] == "logits of the 3 classes"
    image, pred = (meta["network_data_format"][key] for key in ("inputs", "outputs"))
    assert (image["image"]["modality"], image["image"]["format"]) == ("MR", "magnitude")
    assert pred["pred"]["channel_def"] == {"0": "background", "1": "anterior", "2": "posterior"}
    settings = json.loads((find_weights(WEIGHTS) / "run.json").read_text())
    assert {id: inference[id] for id in settings if id in inference} == {
        id: value for id, value in settings.items() if id in inference
    }


def test_values_of_a_file_replace_those_of_the_metadata_inside_objects_too(tmp_path):
    changes = {"authors": "We", "network_data_format": {"inputs": {"image": {"modality": "CT"}}}}
    (tmp_path / "ours.json").write_text(json.dumps(changes))
    path = package_bundle(BUNDLE, str(tmp_path), name="spleen_segmentation", metadata=str(tmp_path / "ours.json"))
    meta = json.loads(zipfile.ZipFile(path).read("spleen_segmentation/configs/metadata.json"))
    assert (meta["name"], meta["authors"]) == ("Spleen segmentation", "We")
    image = meta["network_data_format"]["inputs"]["image"]
    assert (image["modality"], image["num_channels"]) == ("CT", 1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "hippocampus"}, "--name hippocampus: expected small letters, digits and _, ending in _segmentation"),
        ({"name": "../x_segmentation"}, r"--name \.\./x_segmentation: expected small letters"),
        ({"hub": "hippocampus"}, "--hub hippocampus: expected a repository of the hub, as OWNER/bcv"),
        ({"hub": REPO, "weights": WEIGHTS, "weights_url": "https://x/y"}, "--weights_url: the hub's folder holds the"),
    ],
)
def test_a_wrong_name_or_repository_is_refused(tmp_path, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        package_bundle(BUNDLE, str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_origin_is_never_replaced(tmp_path):
    write_folder(tmp_path / "a", {"SHA256SUMS": b"1", "x/y": b"2"}, overwrite=False)
    write_folder(tmp_path / "a", {"SHA256SUMS": b"1", "x/y": b"2"}, overwrite=False)  # the same is no conflict
    with pytest.raises(FileExistsError, match="is there with other content; give --overwrite"):
        write_folder(tmp_path / "a", {"SHA256SUMS": b"3"}, overwrite=False)
    write_folder(tmp_path / "a", {"SHA256SUMS": b"3"}, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "SHA256SUMS"]
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="is there with other content; move it"):
        write_folder(tmp_path / "b", {"SHA256SUMS": b"3"}, overwrite=True)


def test_the_package_that_writes_safetensors_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install safetensors \(the extra \[hub\] has it\)"):
        package_bundle(BUNDLE, str(tmp_path), weights=WEIGHTS, hub=REPO)


@needs_safetensors
def test_the_hub_gets_the_files_of_the_zip_with_a_card_hashes_and_the_same_tensors(folder, zipped):
    from safetensors.torch import load_file

    with zipfile.ZipFile(zipped) as archive:
        files = {member.partition("/")[2]: archive.read(member) for member in archive.namelist()}
    more = {"README.md", "SHA256SUMS", "models/model.safetensors"}
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there.keys() == files.keys() | more
    assert {name for name in files if files[name] != there[name]} == {"configs/metadata.json"}
    sums = dict(reversed(line.split("  ")) for line in there["SHA256SUMS"].decode().splitlines())
    assert sums == {name: hashlib.sha256(there[name]).hexdigest() for name in there if name != "SHA256SUMS"}
    state = read_checkpoint(folder / "models" / "model.pt")
    copied = load_file(folder / "models" / "model.safetensors")
    assert copied.keys() == state.keys()
    assert all(torch.equal(copied[key], state[key]) and copied[key].dtype == state[key].dtype for key in state)


@needs_safetensors
def test_the_cards_front_matter_and_the_metadata_are_as_the_hub_asks(folder):
    meta = json.loads((folder / "configs" / "metadata.json").read_text())
    assert meta["huggingface_url"] == f"https://huggingface.co/{REPO}"
    assert meta["schema"].endswith("meta_schema_hf_20250321.json")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "monai",
        "license": "cc-by-nc-sa-4.0",
        "pipeline_tag": "image-segmentation",
        "tags": ["monai", "medical", "3d", "mr"],
        "datasets": ["medical-segmentation-decathlon", "tiny-imagenet"],
        "metrics": ["dice"],
    }
    assert f"--source huggingface_hub --repo {REPO} " in text
    for name in (WEIGHTS, "vdt_resnet3d18_w16"):  # and the encoder that it started from
        assert f"\n## The weights {name}\n" in text
    assert not re.search(r"/(?:home|root|tmp|work)/", text)


@needs_safetensors
@pytest.mark.slow
def test_the_zip_and_the_folder_pass_the_check(zipped, folder):
    for place in (zipped, folder):
        assert not [sentence for found in check(place).values() for sentence in found]


@pytest.mark.slow
def test_the_unpacked_zip_segments_without_a_further_setting_as_the_weights_do(zipped, volumes, tmp_path):
    shutil.unpack_archive(zipped, tmp_path)
    image = str(volumes / "images" / "case0.nii.gz")
    words = ["--config_file", f"{NAME}/configs/inference.json", "--bundle_root", NAME, "--dataset_dir", image]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", *words], cwd=tmp_path, env=bare, check=True)
    words = ["segment", image, "-o", "labels", "--weights", WEIGHTS]
    ours = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "vdt_workflows.cli", *words], cwd=tmp_path, env=ours, check=True)
    a, b = (nib.load(tmp_path / place / "case0_seg.nii.gz") for place in (f"{NAME}/eval", "labels"))
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    np.testing.assert_array_equal(a.affine, b.affine)


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Answer on the loopback as the hub does for one repository, as far as a download asks."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": COMMIT} for path in files]
    answers = {
        f"/api/models/{REPO}/refs": {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}],
            **{"converts": [], "tags": []},
        },
        f"/api/models/{REPO}/revision/main": {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]},
        f"/api/models/{REPO}/tree/{COMMIT}": tree,
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = files.get(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"))
            content = file if file is not None else json.dumps(answers[path]).encode() if path in answers else None
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if content is not None and self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@needs_safetensors
@pytest.mark.slow
def test_monai_downloads_the_folder_from_a_hub_and_loads_its_network(folder, tmp_path):
    pytest.importorskip("huggingface_hub")
    words = ["--name", NAME, "--source", "huggingface_hub", "--repo", REPO, "--bundle_dir", str(tmp_path)]
    with hub_of(folder) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        environment |= {"HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-m", "monai.bundle", "download", *words], env=environment, check=True)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert (tmp_path / NAME / path.relative_to(folder)).read_bytes() == path.read_bytes()
    code = f"import monai; n = monai.bundle.load({NAME!r}, bundle_dir={str(tmp_path)!r}, workflow_type='inference')"
    code += "; print(sum(p.numel() for p in n.parameters()))"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state = read_checkpoint(find_weights(WEIGHTS) / "model.pt")
    assert int(done.stdout.split()[-1]) == sum(
        value.numel() for key, value in state.items() if not re.search(r"running_|num_batches", key)
    )
