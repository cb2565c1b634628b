from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_data.py"
make_demo_data = runpy.run_path(str(SCRIPT))["make_demo_data"]
TINY: dict[str, Any] = {"image_classes": 3, "images_per_class": 5, "image_size": 32, "volumes": 5}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    make_demo_data(str(root), **TINY)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def volumes(root: Path) -> list[tuple[nib.Nifti1Image, nib.Nifti1Image]]:
    """Give the images and labels of all cases."""
    images, labels = (sorted((root / "volumes" / kind).iterdir()) for kind in ("images", "labels"))
    return [(nib.load(image), nib.load(label)) for image, label in zip(images, labels, strict=True)]


def test_the_same_seed_makes_the_same_files_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    make_demo_data(str(tmp_path / "same"), **TINY)
    assert contents(tmp_path / "same") == contents(demo)
    make_demo_data(str(tmp_path / "other"), **TINY, seed=1)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(demo).keys()
    assert [name for name, data in contents(demo).items() if other[name] == data] == ["volumes/dataset.json"]


def test_a_picture_does_not_depend_on_how_many_are_made(demo: Path, tmp_path: Path) -> None:
    make_demo_data(str(tmp_path), **{**TINY, "image_classes": 2, "volumes": 3})
    few, many = contents(tmp_path), contents(demo)
    assert not [name for name in few if name.endswith(("jpg", "gz")) and few[name] != many[name]]


def test_pictures_are_colour_and_of_the_asked_size_and_count(demo: Path) -> None:
    for part, count in {"train": 4, "val": 1}.items():
        folders = sorted((demo / "images" / part).iterdir())
        assert [f.name for f in folders] == ["disc", "ring", "square"]
        for path in (p for f in folders for p in f.iterdir()):
            with Image.open(path) as picture:
                assert (picture.mode, picture.size, picture.format) == ("RGB", (32, 32), "JPEG")
        assert {len(list(f.iterdir())) for f in folders} == {count}


def test_every_shape_can_be_drawn(tmp_path: Path) -> None:
    made = make_demo_data(str(tmp_path), **{**TINY, "image_classes": 10, "images_per_class": 2, "volumes": 3})
    pictures = [np.asarray(Image.open(p)) for p in tmp_path.rglob("*.jpg")]
    assert len(made["classes"]) == 10
    assert len(pictures) == 20
    assert min(p.std() for p in pictures) > 5


def test_every_volume_has_all_labels_in_hounsfield_units_that_alone_tell_none(demo: Path) -> None:
    for image, label in volumes(demo):
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        hu, labels = np.asarray(image.dataobj), np.asarray(label.dataobj)
        assert np.unique(labels).tolist() == [0, 1, 2, 3]
        assert -1024 <= hu.min() < hu.max() <= 3071
        assert hu[0].mean() < -900  # air outside the body
        assert 30 < np.median(hu[hu > -300]) < 50
        for k in (1, 2, 3):
            low, high = np.quantile(hu[labels == k], [0.1, 0.9])
            alike = (hu >= low) & (hu <= high)
            assert (labels[alike] != k).sum() > (labels[alike] == k).sum()


def test_image_and_label_share_an_affine_that_is_flipped_in_some_cases_and_puts_the_body_the_same_way(
    demo: Path,
) -> None:
    codes = []
    for image, label in volumes(demo):
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        x, y, z = image.header.get_zooms()
        assert x == y < z / 1.2
        codes.append("".join(nib.aff2axcodes(image.affine)))
        hu, labels = (nib.as_closest_canonical(volume).get_fdata() for volume in (image, label))
        assert np.argwhere(labels == 1)[:, 0].mean() > labels.shape[0] / 2  # the organ is on the right
        assert np.argwhere(hu > 250)[:, 1].mean() < hu.shape[1] / 2  # the spine at the back
    assert codes == ["RAS", "LPS", "LAS", "RAS", "LPS"]


def test_the_datalist_is_read_by_monai_and_its_parts_are_apart(demo: Path) -> None:
    path = demo / "volumes" / "dataset.json"
    parts = {key: load_decathlon_datalist(path, True, key) for key in ("training", "validation", "test")}
    assert {key: len(cases) for key, cases in parts.items()} == {"training": 2, "validation": 1, "test": 2}
    cases = [case for part in parts.values() for case in part]
    assert all(Path(case[kind]).is_file() for case in cases for kind in ("image", "label"))
    assert len({case["image"] for case in cases}) == 5
    assert all(Path(case["image"]).name == Path(case["label"]).name for case in cases)
    assert list(json.loads(path.read_text())["labels"]) == ["0", "1", "2", "3"]


def test_a_finished_folder_is_reused_and_refused_to_other_settings(demo: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo.glob("*/**/*")}
    made = make_demo_data(str(demo), **TINY)
    assert made["reused"]
    assert {p: p.stat().st_mtime_ns for p in demo.glob("*/**/*")} == before
    with pytest.raises(ValueError, match="holds results made with seed 0, not 3; name another folder"):
        make_demo_data(str(demo), **TINY, seed=3)


def test_an_interrupted_run_is_made_anew(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo_data(str(tmp_path), **TINY)
    monkeypatch.undo()
    (tmp_path / "images" / "train" / "disc" / "old.jpg").touch()
    assert not make_demo_data(str(tmp_path), **TINY)["reused"]
    assert contents(tmp_path) == contents(demo)


def test_a_folder_with_files_of_others_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").touch()
    with pytest.raises(FileExistsError, match="not from this script; name a new folder"):
        make_demo_data(str(tmp_path), **TINY)
    assert list(contents(tmp_path)) == ["images/mine.jpg"]


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("image_classes", 11, "2 to 10"),
        ("image_classes", 1, "2 to 10"),
        ("images_per_class", 1, "2 or more"),
        ("image_size", 8, "16 or more"),
        ("volumes", 2, "3 or more"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(tmp_path: Path, name: str, value: int, right: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be {right}, got {value}"):
        make_demo_data(str(tmp_path / "demo"), **{**TINY, name: value})
    assert not (tmp_path / "demo").exists()


def test_the_command_prints_one_line_of_json(demo: Path) -> None:
    words = [f"--{name}={value}" for name, value in TINY.items()]
    done = subprocess.run([sys.executable, SCRIPT, demo, *words], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    made = json.loads(line)
    assert Path(made["datalist"]).is_file()
    assert Path(made["images"]).is_dir()
    assert (made["train_images"], made["val_images"], made["training"], made["test"]) == (12, 3, 2, 2)
