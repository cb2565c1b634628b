"""The demonstration, end to end at the smallest size, and the data that it takes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from demo import DATA, WEIGHTS, demo
from make_demo_data import make_demo_data
from PIL import Image

from tests.makers.pictures import write_picture
from tests.makers.volumes import write_pair, write_volume
from tests.support.bundle_runs import ROOT
from vdt_workflows.cli import run_function
from vdt_workflows.data.images import find_images
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.files import write_json
from vdt_workflows.training.shipped import list_weights

SMALL = shlex.split("--epochs 1 --image_size 32 --base_channels 4 --seeds 1 --steps 3 --patch_size [16,16,16]")


@pytest.mark.slow  # starts half a dozen processes that import torch and MONAI
@pytest.mark.parametrize("own", [True, False])
def test_the_demo_leaves_a_page_with_its_pictures_and_does_nothing_twice(own, images, volumes, tmp_path, capfd):
    data = ("--images", str(images), "--volumes", str(volumes)) if own else ()
    words = ["--output_dir", str(tmp_path), *data, *SMALL]
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == (6 if own else 7)  # of the last, the segmentation of shipped weights
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert re.search(r"start 1 steps 2 steps 3 steps minus scratch verdict scratch( 0\.\d{3}){3}", text)
    assert re.search(
        r"these images( 0\.\d{3}){3} [+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\) not judged on 1 seed", text
    )
    assert ("CC-BY-SA 4.0" in text) != own
    for link in re.findall(r'href="([^"#]+)"', page):
        assert (tmp_path / link).is_file(), link
    assert "window.Niivue" in (tmp_path / "segmentation.html").read_text()
    written = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*_seg.nii.gz")]}
    assert len(list(tmp_path.glob("comparison/cells/*/*/models/model_last.pt"))) == 2
    run_function(demo, words)
    said = "".join(capfd.readouterr())
    assert "epoch 1/" not in said
    assert "epoch 1 of" not in said
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_the_volumes_of_the_demo_are_whole_and_held_out_from_the_weights_that_segment_them():
    cases = find_volumes(str(DATA / "hippocampus"))
    assert {part: len(found) for part, found in cases.items()} == {"training": 8, "validation": 2, "test": 20}
    for case in (case for part in cases.values() for case in part):
        image, label = (np.asarray(nib.load(case[kind]).dataobj) for kind in ("image", "label"))
        assert (image.dtype, image.min(), image.max()) == (np.uint8, 0, 255)
        assert np.unique(label).tolist() == [0, 1, 2]
    assert "180 to train, 20 for validation, 60 for" in list_weights()[WEIGHTS].text  # which cases: make_demo_data


def test_the_photographs_of_the_demo_are_small_and_of_ten_classes():
    found = find_images(str(DATA / "photographs"))
    assert (len(found["train"]), len(found["val"]), len(found["train"].classes)) == (480, 120, 10)
    for item in found["train"]:
        with Image.open(item["image"]) as picture:
            assert (max(picture.size), picture.mode) == (64, "RGB")
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 3_000_000


def test_the_maker_of_the_data_takes_every_second_test_case_in_8_bits_and_the_first_photographs(tmp_path):
    for i in range(8):
        write_pair(tmp_path / f"images/{i}.nii.gz", tmp_path / f"labels/{i}.nii.gz", seed=i)
    write_volume(tmp_path / "labels/2.nii.gz", np.arange(120).reshape(4, 5, 6) % 3, dtype=np.uint8)
    names = [{kind: f"{kind}s/{i}.nii.gz" for kind in ("image", "label")} for i in range(8)]
    write_json(tmp_path / "dataset.json", {"test": names})
    for part in ("train", "validation"):
        write_picture(tmp_path / part / "hat" / "a.jpg", np.full((90, 128, 3), 200, np.uint8))
    made = make_demo_data(str(tmp_path), str(tmp_path), str(tmp_path / "made"), learned=1)
    assert made == {"volumes": 4, "photographs": 2}
    listed = json.loads((tmp_path / "made/hippocampus/dataset.json").read_text())
    assert [[case["image"] for case in listed[part]] for part in ("training", "test")] == [
        ["images/0.nii.gz"],
        ["images/2.nii.gz", "images/4.nii.gz", "images/6.nii.gz"],
    ]
    image, label = (nib.load(tmp_path / "made" / "hippocampus" / kind / "2.nii.gz") for kind in ("images", "labels"))
    given = np.asarray(nib.load(tmp_path / "images/2.nii.gz").dataobj)
    scaled = (given - given.min()) / np.ptp(given) * 255
    np.testing.assert_allclose(np.asarray(image.dataobj), scaled, atol=0.5001)
    assert np.array_equal(np.asarray(label.dataobj), np.arange(120).reshape(4, 5, 6) % 3)
    assert Image.open(tmp_path / "made/photographs/val/hat/a.jpg").size == (64, 45)
