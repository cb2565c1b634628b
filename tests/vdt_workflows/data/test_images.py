import logging
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.makers.pictures import make_classes, make_files
from vdt_workflows.data import folder_index
from vdt_workflows.data.images import (
    collate_images,
    find_images,
    list_images,
    read_image_list,
    scan_class_folders,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty user cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vdt-bundles"


@pytest.fixture
def scans(monkeypatch):
    """The folders that were listed, in order; asking for the class names is not counted."""
    listed = []
    scan = folder_index.scan

    def counted(root, names):
        listed.append(root)
        return scan(root, names)

    monkeypatch.setattr("vdt_workflows.data.images.scan", counted)
    return listed


def relative(images, root):
    return [(os.path.relpath(item["image"], root), item["label"]) for item in images]


@pytest.fixture
def animals(tmp_path):
    return make_classes(tmp_path / "animals", dog=3, cat=2)


@pytest.mark.parametrize("classes", [None, ["dog", "cat"]])
def test_images_are_sorted_and_their_labels_those_of_the_given_classes_or_the_sorted_folders(animals, classes):
    images = scan_class_folders(animals, classes=classes)
    assert images.classes == (classes or ["cat", "dog"])
    names = ["cat/000.jpg", "cat/001.jpg", "dog/000.jpg", "dog/001.jpg", "dog/002.jpg"]
    assert relative(images, animals) == [(name, images.classes.index(name[:3])) for name in names]
    assert images.labels.tolist() == [label for _, label in relative(images, animals)]
    assert images.labels.dtype == np.int32


def test_paths_are_absolute_even_for_a_relative_root(animals, monkeypatch):
    monkeypatch.chdir(animals.parent)
    assert scan_class_folders("animals")[0]["image"] == str(animals / "cat" / "000.jpg")


def test_every_picture_in_a_class_folder_counts_and_nothing_else(tmp_path):
    make_files(tmp_path / "data", "a/x.JPEG", "a/deep/er/y.Png", "b/z.webp", "b/é ü.tif", "b/w.pgm")
    make_files(tmp_path / "data", "a/notes.txt", "a/.hidden.jpg", "a/.cache/x.jpg", ".git/x.jpg", "readme.jpg", "a/jpg")
    images = scan_class_folders(tmp_path / "data")
    expected = ["a/deep/er/y.Png", "a/x.JPEG", "b/w.pgm", "b/z.webp", "b/é ü.tif"]
    assert relative(images, tmp_path / "data") == list(zip(expected, [0, 0, 1, 1, 1], strict=True))


def test_what_a_server_or_a_system_keeps_beside_the_pictures_is_left_out_and_counted(tmp_path, caplog):
    root = make_classes(tmp_path / "data", cat=2, dog=2)
    make_files(root, *(f"cat/{name}" for name in ("a.jfif", "b.AVIF", "c.JPG", "notes.txt", "._a.jpg", "Thumbs.db")))
    make_files(root, "cat/@eaDir/000.jpg/SYNOPHOTO_THUMB_M.jpg", "dog/@eaDir/x.jpg", "@eaDir/x.jpg", "dog/raw.HEIC")
    (root / "lost+found").mkdir()
    (root / "dog" / "gone.jpg").symlink_to("nowhere.jpg")
    for _ in range(2):  # listed, and from the index
        caplog.clear()
        with caplog.at_level(logging.INFO):
            images = scan_class_folders(root)
        assert images.classes == ["cat", "dog"]
        assert np.bincount(images.labels).tolist() == [5, 2]
        kinds = {"@eaDir": 3, "lost+found": 1, ".txt": 1, "._*": 1, "Thumbs.db": 1, ".heic": 1, "broken link": 1}
        assert images.left_out == kinds
        assert "7 images of 2 classes used, 9 left out (1 ._*, 1 .heic, 1 .txt, 3 @eaDir," in caplog.text
    with caplog.at_level(logging.INFO):
        assert len(list_images(root)) == 7
    assert "7 images used, 9 left out" in caplog.text


def test_a_class_folder_may_be_a_link_and_linked_folders_belong_to_their_class(animals, tmp_path):
    make_classes(tmp_path / "elsewhere", owl=2, more=3)
    (animals / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (animals / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (animals / "cat" / "self").symlink_to(".")
    images = scan_class_folders(animals)
    assert images.classes == ["cat", "dog", "owl"]
    assert np.bincount(images.labels).tolist() == [5, 3, 2]
    assert images.left_out == {"linked again": 1}


@pytest.mark.parametrize(
    ("link", "target"),
    [("cat/up", ".."), ("cat/more", "../dog"), ("hound", "dog"), ("cat/x.jpg", "../dog/000.jpg")],
)
def test_a_link_that_gives_a_picture_to_two_classes_is_refused(animals, link, target):
    (animals / link).symlink_to(target)
    with pytest.raises(ValueError, match=r"animals: .* and .* are one by a link, but in two classes; remove the link"):
        scan_class_folders(animals)


def test_a_validation_folder_that_is_the_training_folder_is_named(tmp_path, caplog):
    root = make_classes(tmp_path / "data", **{"train/cat": 2, "train/dog": 2})
    (root / "val").symlink_to("train")
    assert len(find_images(root)["val"]) == 4
    assert "train: its images are both trained on and validated on" in caplog.text


def test_an_image_list_is_a_sequence(animals):
    images = scan_class_folders(animals)
    assert len(images) == 5
    assert images[-1] == images[4] == {"image": str(animals / "dog" / "002.jpg"), "label": 1}
    assert images[1:3] == [images[1], images[2]]
    assert next(reversed(images)) == images[np.int64(4)]
    assert type(images[0]["label"]) is int
    with pytest.raises(IndexError):
        images[5]


def test_a_subset_keeps_the_classes_and_the_given_order_and_survives_pickling(animals):
    images = scan_class_folders(animals)
    subset = pickle.loads(pickle.dumps(images.subset([4, 0])))
    assert list(subset) == [images[4], images[0]]
    assert list(subset.subset(np.array([1]))) == [images[0]]
    assert subset.classes == images.classes


def test_the_second_scan_uses_the_index(animals, scans, caplog):
    first = scan_class_folders(animals)
    with caplog.at_level(logging.INFO):
        second = scan_class_folders(animals)
    assert len(scans) == 1
    assert list(second) == list(first)
    assert "5 images of 2 classes used, 0 left out; from the index" in caplog.text


def test_the_index_moves_with_the_data(animals, scans):
    scan_class_folders(animals)
    moved = animals.rename(animals.with_name("moved"))
    assert scan_class_folders(moved)[0]["image"] == str(moved / "cat" / "000.jpg")
    assert len(scans) == 1


CHANGES = {
    "file added": lambda root: make_files(root, "cat/new.jpg"),
    "file added in a new folder": lambda root: make_files(root, "cat/deeper/new.jpg"),
    "class added": lambda root: make_files(root, "owl/new.jpg"),
    "file removed": lambda root: (root / "dog" / "000.jpg").unlink(),
    "its time set back": lambda root: [make_files(root, "cat/new.jpg"), os.utime(root / "cat", ns=(0, 0))],
    "class renamed": lambda root: (root / "dog").rename(root / "hound"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_listed_again(animals, scans, change):
    make_files(animals, "cat/deeper/old.jpg")
    for folder in ("cat", "cat/deeper", "dog"):
        os.utime(animals / folder, ns=(0, 0))  # so that the change cannot fall into the same tick of the clock
    scan_class_folders(animals)
    change(animals)
    images = scan_class_folders(animals)
    assert len(scans) == 2
    assert sorted(item["image"] for item in images) == sorted(str(file) for file in animals.rglob("*.jpg"))
    scan_class_folders(animals)
    assert len(scans) == 2


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "version", "labels", "pickle"])
def test_a_damaged_index_is_made_again(animals, scans, damage):
    expected = list(scan_class_folders(animals))
    file = animals / ".vdt_index.npz"
    data = file.read_bytes()
    with np.load(file) as archive:
        content = dict(archive)
    if damage in ("version", "labels", "pickle"):
        wrong = {"version": 0, "labels": content["labels"] + 1, "pickle": np.array([{}])}[damage]
        np.savez(file, **{**content, "labels" if damage == "pickle" else damage: wrong})
    else:
        middle = data.index(b"cat/000.jpg")
        flipped = data[:middle] + b"C" + data[middle + 1 :]
        file.write_bytes({"empty": b"", "text": b"hello", "cut": data[:200], "flipped": flipped}[damage])
    for _ in range(2):
        assert list(scan_class_folders(animals)) == expected
        assert len(scans) == 2


def read_only(monkeypatch, root):
    """Refuse new files in `root`; permissions would not stop a test that runs as root."""
    write_atomic = folder_index.write_atomic

    def refuse(file, content):
        if Path(file).parent == root:
            raise PermissionError(13, "Permission denied", str(file))
        write_atomic(file, content)

    monkeypatch.setattr(folder_index, "write_atomic", refuse)


def test_the_index_of_a_read_only_folder_is_in_the_users_cache(animals, scans, cache, monkeypatch):
    read_only(monkeypatch, animals)
    first = scan_class_folders(animals)
    assert not (animals / ".vdt_index.npz").exists()
    assert len(list(cache.glob("animals-*.npz"))) == 1
    assert list(scan_class_folders(animals)) == list(first)
    assert len(scans) == 1


def test_without_a_place_for_the_index_the_list_still_comes(animals, scans, cache, monkeypatch, caplog):
    read_only(monkeypatch, animals)
    make_files(cache.parent.parent, cache.parent.name)  # a file where the cache folder would be
    assert len(scan_class_folders(animals)) == len(scan_class_folders(animals)) == 5
    assert len(scans) == 2
    assert "could not be kept" in caplog.text


def test_the_index_can_be_kept_elsewhere(animals, scans, tmp_path):
    for _ in range(2):
        scan_class_folders(animals, index_dir=tmp_path / "indices")
        assert len(scans) == 1
    assert not (animals / ".vdt_index.npz").exists()


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ([], FileNotFoundError, "there is no folder .*data"),
        (["readme.txt"], ValueError, "data has no class folders"),
        (["a.jpg", "b.jpg"], ValueError, "data has images but no class folders"),
        (["cat/a.jpg"], ValueError, "data has the one class folder 'cat'"),
        (["cat/a.jpg", "dog/a.txt", "owl/b.jpg"], ValueError, "class folders without any image .*: dog$"),
    ],
    ids=["missing", "empty", "images directly", "one class", "empty class"],
)
def test_a_folder_of_another_shape_is_refused_in_one_sentence(tmp_path, files, kind, message):
    make_files(tmp_path / "data", *files)
    with pytest.raises(kind, match=message) as caught:
        scan_class_folders(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_other_classes_than_expected_are_named(animals):
    expected = ["cat", *(f"class{i}" for i in range(5))]
    with pytest.raises(ValueError, match="missing class0, class1, class2 and 2 more; unknown dog"):
        scan_class_folders(animals, classes=expected)


@pytest.fixture
def flat(tmp_path):
    """ImageNet's layout: training class folders, flat validation images with a list."""
    root = make_classes(tmp_path / "flat", **{"train/cat": 3, "train/dog": 3})
    make_files(root, "val/one.jpg", "val/two words.jpg")
    make_files(root, "meta/val.txt")
    (root / "meta" / "val.txt").write_text("two words.jpg 1\n\none.jpg 0\n")
    return root


@pytest.mark.parametrize("place", ["meta/val.txt", "val.txt"])
def test_flat_validation_images_get_their_classes_from_the_list(flat, caplog, place):
    (flat / "meta" / "val.txt").rename(flat / place)
    with caplog.at_level(logging.INFO):
        found = find_images(flat)
    assert "6 training and 2 validation images of 2 classes" in caplog.text
    assert relative(found["val"], flat / "val") == [("two words.jpg", 1), ("one.jpg", 0)]
    make_files(flat, "val/three.jpg", "val/.DS_Store")
    assert find_images(flat)["val"].left_out == {"image": 1, ".DS_Store": 1}
    assert found["val"].classes == ["cat", "dog"]


def test_flat_validation_images_without_a_list_are_refused(flat):
    (flat / "meta" / "val.txt").unlink()
    with pytest.raises(ValueError, match=r"val has no class folders; give .*meta/val\.txt or .*flat/val\.txt"):
        find_images(flat)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("one.jpg 0\none.jpg", ValueError, ", line 2: expected a file name, a blank and a class index, got 'one.jpg'"),
        ("one.jpg cat", ValueError, ", line 1: .* got 'one.jpg cat'"),
        ("one.jpg -1", ValueError, ", line 1: .* got 'one.jpg -1'"),
        ("one.jpg 2", ValueError, ", line 1: .* must be below 2, got 2"),
        ("three.jpg 0", FileNotFoundError, ", line 1: there is no image 'three.jpg'"),
        ("", ValueError, " names no image"),
    ],
)
def test_a_wrong_line_of_the_list_is_named(flat, text, kind, message):
    list_file = flat / "meta" / "val.txt"
    list_file.write_text(text)
    with pytest.raises(kind, match=rf"val\.txt{message}"):
        read_image_list(flat / "val", list_file, ["cat", "dog"])


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_validation_class_folders_are_found_under_their_usual_names(tmp_path, name):
    last = {"test/cat": 1, "test/dog": 2}  # taken only where there is no other
    parts = {"train/cat": 3, "train/dog": 3, **last, f"{name}/cat": 2, f"{name}/dog": 2}
    found = find_images(make_classes(tmp_path / "data", **parts))
    assert (len(found["train"]), len(found["val"])) == (6, 4)


def test_shuffled_labels_are_those_of_other_training_images(tmp_path):
    root = make_classes(tmp_path / "data", **{"train/cat": 30, "train/dog": 10, "val/cat": 3, "val/dog": 2})
    true = find_images(root)
    shuffled, again, other = (find_images(root, shuffle_labels=True, seed=seed) for seed in (0, 0, 1))
    assert [item["image"] for item in true["train"]] == [item["image"] for item in shuffled["train"]]
    assert Counter(shuffled["train"].labels.tolist()) == {0: 30, 1: 10}
    assert shuffled["train"].labels.tolist() != true["train"].labels.tolist()
    assert shuffled["train"].labels.tolist() == again["train"].labels.tolist() != other["train"].labels.tolist()
    assert shuffled["val"].labels.tolist() == true["val"].labels.tolist()


def test_validation_folders_with_other_classes_are_refused(tmp_path):
    root = make_classes(tmp_path / "data", **{"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/owl": 1})
    with pytest.raises(ValueError, match="val are not the expected 2: missing dog; unknown owl"):
        find_images(root)


@pytest.mark.parametrize("parts", ["train/", ""])
def test_class_folders_alone_are_split_within_each_class(tmp_path, parts):
    root = make_classes(tmp_path / "data", **{f"{parts}cat": 20, f"{parts}dog": 10, f"{parts}owl": 2, f"{parts}yak": 1})
    found = find_images(root, val_fraction=0.2)
    assert Counter(found["val"].labels.tolist()) == {0: 4, 1: 2, 2: 1}
    assert Counter(found["train"].labels.tolist()) == {0: 16, 1: 8, 2: 1, 3: 1}
    files = [item["image"] for part in found.values() for item in part]
    assert sorted(files) == sorted(str(file) for file in root.rglob("*.jpg"))


def test_the_split_depends_on_the_seed_alone(tmp_path):
    root = make_classes(tmp_path / "data", cat=50, dog=50)
    first, again, other = (list(find_images(root, seed=seed)["val"]) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_split_needs_a_part_between_0_and_1(animals, fraction):
    with pytest.raises(ValueError, match=f"val_fraction must be between 0 and 1, got {fraction}"):
        find_images(animals, val_fraction=fraction)


def test_given_folders_take_the_place_of_the_usual_ones(tmp_path):
    parts = {f"{folder}/{name}": 2 for folder in ("train", "more", "check", "val") for name in ("cat", "dog")}
    root = make_classes(tmp_path / "data", **parts)
    found = find_images(root, train_dir=[root / "train", root / "more"], val_dir=str(root / "check"))
    assert {Path(item["image"]).parts[-3] for item in found["train"]} == {"train", "more"}
    assert {Path(item["image"]).parts[-3] for item in found["val"]} == {"check"}
    assert found["train"].labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_samples_that_could_not_be_read_are_left_out_of_the_batch():
    good = [{"image": torch.full((1, 2), float(i)), "label": i} for i in range(2)]
    batch = collate_images([good[0], {"skipped": "a.jpg is empty"}, good[1]])
    assert batch["image"].tolist() == [[[0.0, 0.0]], [[1.0, 1.0]]]
    assert batch["label"].tolist() == [0, 1]
    assert batch["skipped"] == ["a.jpg is empty"]
    assert collate_images(good)["skipped"] == []


def test_a_batch_without_any_image_is_an_error():
    with pytest.raises(RuntimeError, match=r"none of the 2 images .*: a\.jpg is empty"):
        collate_images([{"skipped": "a.jpg is empty"}, {"skipped": "b.jpg is empty"}])


def test_normalising_in_the_batch_gives_what_normalising_before_gives():
    samples = [{"image": torch.randint(0, 256, (1, 3, 5, 7), dtype=torch.uint8), "label": i} for i in range(3)]
    before = [{**s, "image": s["image"].to(torch.float32).sub_(114.495).div_(57.63)} for s in samples]
    batch, expected = collate_images(samples, mean=114.495, std=57.63), collate_images(before)
    assert torch.equal(batch["image"], expected["image"])
    assert batch["image"].is_contiguous()
    assert batch["label"].tolist() == expected["label"].tolist()


def test_one_image_or_all_below_a_folder_are_listed(tmp_path):
    files = [str(make_files(tmp_path, name) / name) for name in ("b.png", "deep/er/a.JPG", "notes.txt")][:2]
    assert list_images(tmp_path) == [{"image": file, "path": file} for file in files]
    assert list_images(files[0]) == [{"image": files[0], "path": files[0]}]


def test_nothing_to_classify_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none: no such file or folder; expected an image or a folder of"):
        list_images(tmp_path / "none")
    with pytest.raises(ValueError, match=": no image file in it or below it"):
        list_images(tmp_path)
