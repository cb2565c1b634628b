from __future__ import annotations

import os
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    RandScaleIntensityd,
    RandSpatialCropd,
    Transform,
)
from monai.utils import SpaceKeys

from tests.makers.pictures import make_files
from tests.makers.volumes import make_affine, write_pair, write_volume
from tests.support.augmented import RandCount, augmentation, images, loaded, same
from vdt_transforms import CheckFinited
from vdt_workflows.data import cache
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.sampling import SeededDataset


@pytest.fixture(params=["memory", "disk", "none"])
def cached(request, tmp_path):
    """A dataset with each kind of cache."""
    return partial(SeededCacheDataset, cache=request.param, cache_dir=tmp_path / "cache", progress=False)


@pytest.fixture
def cases(tmp_path):
    affine = make_affine((-1, 1, 3))
    paths = [(tmp_path / f"image{i}.nii.gz", tmp_path / f"label{i}.nii.gz") for i in range(3)]
    for seed, pair in enumerate(paths):
        write_pair(*pair, seed=seed, affine=affine)
    return [{"image": str(image), "label": str(label)} for image, label in paths]


def loading(*more):
    keys = ["image", "label"]
    fixed = [LoadImaged(keys), EnsureChannelFirstd(keys), CheckFinited(keys), Orientationd(keys, "RAS", labels=None)]
    return Compose([*fixed, EnsureTyped(keys, dtype=[torch.float32, torch.uint8]), *more])


class Counted(Transform):
    """Passes on, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self, data):
        self.calls += 1
        return data


def test_cache_changes_no_draw(cached):
    expected = loaded(SeededDataset(images(), augmentation()), epoch=1)
    dataset = cached(images(), augmentation())
    assert same(loaded(dataset, epoch=1), expected)
    assert same(loaded(dataset, epoch=1), expected)  # the first time left the cache as it was


def test_names_of_enums_are_written_as_plain_text_by_every_python():
    kept = cache._to_plain(MetaTensor(torch.zeros(1, 2, 2, 2), meta={"space": SpaceKeys.RAS}))
    assert [type(value) for value in (SpaceKeys.RAS, kept["_meta_"]["space"])] == [SpaceKeys, str]
    assert kept["_meta_"]["space"] == "RAS"


def test_two_workers_change_no_draw(cached):
    expected = loaded(SeededDataset(images(), augmentation()))
    assert same(loaded(cached(images(), augmentation()), 2), expected)


def test_crops_of_one_volume_are_reproducible_and_differ(cached):
    crop = RandCropByPosNegLabeld("image", "image", spatial_size=(2, 2, 2), num_samples=4)
    crops = [cached(images(), crop)[1, 2] for _ in range(2)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(*crops, strict=True))
    assert not all(torch.equal(crops[0][0]["image"], other["image"]) for other in crops[0][1:])


def test_volumes_come_with_what_is_known_of_them(cached, cases):
    sample = cached(cases, loading())[1]
    direct = loading()(cases[1])
    for key in ("image", "label"):
        assert isinstance(sample[key], MetaTensor)
        assert torch.equal(sample[key].as_tensor(), direct[key].as_tensor())
        assert sample[key].dtype == direct[key].dtype
        np.testing.assert_array_equal(sample[key].affine, direct[key].affine)
        for name in ("original_affine", "spatial_shape"):
            np.testing.assert_array_equal(sample[key].meta[name], direct[key].meta[name])
        assert sample[key].meta["filename_or_obj"] == cases[1][key]
        assert [op["class"] for op in sample[key].applied_operations] == ["Orientation"]


@pytest.mark.parametrize(("cache", "calls"), [("memory", 3), ("disk", 3), ("none", 6)])
def test_fixed_transforms_run_once_for_each_sample(cache, calls, cases, tmp_path):
    counted = Counted()
    transform = loading(counted, RandSpatialCropd(["image", "label"], (2, 2, 2)))
    dataset = SeededCacheDataset(cases, transform, cache=cache, cache_dir=tmp_path / "cache", progress=False)
    for key in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        dataset[key]
    assert counted.calls == calls


def test_what_later_transforms_write_does_not_reach_the_cache(cached, cases):
    def double_in_place(volume):
        volume *= 2
        return volume

    crop = RandSpatialCropd(["image", "label"], (4, 5, 6))  # the whole volume
    dataset = cached(cases, loading(crop, Lambdad("image", double_in_place)))
    first, second = (dataset[number, 0]["image"].as_tensor().clone() for number in range(2))
    assert torch.equal(first, second)


def test_disk_cache_serves_the_next_run(cases, tmp_path):
    counted = Counted()
    make = partial(SeededCacheDataset, cases, cache="disk", cache_dir=tmp_path / "cache", progress=False)
    make(loading(Counted(), RandScaleIntensityd("image", 0.1)))
    again = make(loading(counted, RandScaleIntensityd("image", 0.5)))  # what is random is not part of what is kept
    assert again[0]["image"].shape == (1, 4, 5, 6)
    assert counted.calls == 0
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 3


def save_again(file):
    """Change one voxel, with checksums of the zip that fit."""
    content = torch.load(file, weights_only=True)
    content["image"]["_volume_"].flatten()[0] += 1
    torch.save(content, file)


DAMAGE = {
    "byte": lambda file: file.write_bytes((data := file.read_bytes())[:900] + bytes([data[900] ^ 4]) + data[901:]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "pickle": lambda file: file.write_bytes(pickle.dumps(Counted())),
    "another": save_again,
    "no record": lambda file: file.with_suffix(".json").unlink(),
    "cut record": lambda file: file.with_suffix(".json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_of_the_disk_cache_is_named_and_made_again(cases, tmp_path, caplog, damage):
    make = partial(SeededCacheDataset, cases, cache="disk", cache_dir=tmp_path / "cache", progress=False)
    first = make(loading())
    expected, file = first[0]["image"].as_tensor().clone(), first.kept[0]  # not the map of a file that is cut
    times = (status := file.stat()).st_atime_ns, status.st_mtime_ns
    damage(file)
    os.utime(file, ns=times)
    again = make(loading())
    assert f"{file}: damaged, or changed since it was written; it is made again" in caplog.text
    assert torch.equal(again[0]["image"].as_tensor(), expected)
    caplog.clear()
    again = make(loading())
    assert "made again" not in caplog.text
    file.write_bytes(file.read_bytes())  # as another process of the run does that prepares the same sample
    assert torch.equal(again[0]["image"].as_tensor(), expected)
    save_again(file)
    with pytest.raises(ValueError, match=rf"{file}: changed while in use; start again"):
        again[0]


def test_disk_cache_notices_a_slice_that_changed_in_its_folder_whatever_its_time_says(tmp_path):
    folder = make_files(tmp_path / "series", "a.dcm", "b.dcm")
    item = {"image": str(folder)}
    make = partial(SeededCacheDataset, [item], Lambdad("image", measure), cache="disk", progress=False)
    assert make(cache_dir=tmp_path / "cache")[0]["image"] == 0
    (folder / "b.dcm").write_bytes(b"1")
    os.utime(folder / "b.dcm", ns=(1, 1))
    assert make(cache_dir=tmp_path / "cache")[0]["image"] == 1


def measure(folder):
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))


def test_disk_cache_notices_a_changed_file_and_changed_transforms(cases, tmp_path):
    make = partial(SeededCacheDataset, cache="disk", cache_dir=tmp_path / "cache", progress=False)
    make(cases, loading())
    write_volume(cases[0]["image"], np.full((4, 5, 6), 7.0), affine=make_affine((-1, 1, 3)))
    os.utime(cases[0]["image"], ns=(1, 1))
    assert (make(cases, loading())[0]["image"] == 7).all()
    assert make(cases, loading(Lambdad("image", negative)))[0]["image"].max() == -7


def negative(volume):
    return -volume


def test_disk_cache_reads_a_crop_without_the_rest(tmp_path):
    big = {"image": str(write_volume(tmp_path / "big.nii", shape=(200, 200, 100)))}
    load = [LoadImaged("image"), EnsureChannelFirstd("image"), RandSpatialCropd("image", (8, 8, 8))]
    dataset = SeededCacheDataset([big], load, cache="disk", cache_dir=tmp_path / "cache", progress=False)
    dataset[0]
    before = resident_kilobytes()
    kept = [dataset[number, 0]["image"] for number in range(5)]
    assert resident_kilobytes() - before < 8_000  # of 16,000
    assert all(crop.untyped_storage().nbytes() == 4 * 8**3 for crop in kept)


def resident_kilobytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def test_bad_sample_is_named_left_out_and_counted(cached, cases, caplog):
    write_volume(cases[1]["image"], np.full((4, 5, 6), np.nan))
    dataset = cached(cases, loading(), on_error="skip")
    assert len(dataset) == 2
    assert [dataset[i]["image"].meta["filename_or_obj"] for i in range(2)] == [cases[0]["image"], cases[2]["image"]]
    assert "image1.nii.gz: 120 voxels are NaN or infinite" in caplog.text
    assert "1 of 3 samples are left out" in caplog.text


def test_bad_sample_stops_unless_asked(cached, cases):
    write_volume(cases[1]["image"], np.full((4, 5, 6), np.nan))
    with pytest.raises(ValueError, match=r"image1.nii.gz: 120 voxels are NaN or infinite"):
        cached(cases, loading())[1]


def test_nothing_usable_is_an_error(cached, cases):
    for case in cases:
        write_volume(case["image"], np.full((4, 5, 6), np.nan))
    with pytest.raises(ValueError, match="none of the 3 samples can be used"):
        cached(cases, loading(), on_error="skip")


def fail(value):
    raise ValueError("the sentence that helps")


def test_errors_show_the_sentence_that_helps(cached):
    with pytest.raises(ValueError, match=r"^the sentence that helps$"):
        cached(images(), [Lambdad("image", fail), RandCount()])[0, 0]
    with pytest.raises(ValueError, match=r"^the sentence that helps$"):
        cached(images(), [RandCount(), Lambdad("image", fail)])[0, 0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"cache": "ram"}, "cache must be .*, got 'ram'"),
        ({"cache": "disk"}, "cache 'disk' needs cache_dir"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SeededCacheDataset(images(), augmentation(), **arguments)


def test_samples_that_do_not_fit_the_memory_go_to_disk(cases, tmp_path, monkeypatch, caplog):
    expected = SeededCacheDataset(cases, loading())
    monkeypatch.setattr(cache, "free_memory", lambda: 100.0)
    dataset = SeededCacheDataset(cases, loading(), cache_dir=tmp_path / "cache")
    assert (dataset.cache, len(list((tmp_path / "cache").glob("*.pt")))) == ("disk", 3)
    assert "do not fit the 6e-08 GB of memory for them; they go to disk" in caplog.text
    assert all(torch.equal(dataset[i]["image"], expected[i]["image"]) for i in range(3))
    assert SeededCacheDataset(cases, loading()).cache == "memory"  # nowhere to go


def test_the_memory_that_samples_take_is_said_before_the_training(cases, caplog):
    caplog.set_level("INFO")
    dataset = SeededCacheDataset(cases, loading())
    voxels = sum(sample["image"].numel() for sample in dataset.kept)
    assert sum(dataset.sizes) == 5 * voxels  # float32 and uint8
    assert "3 samples are kept in memory" in caplog.text


def test_processes_of_one_machine_map_the_same_files(cases, tmp_path, monkeypatch):
    """Two processes in turn, as torchrun names them: each prepares its share, and the files hold the data once."""
    counts, made = [], {}
    processes = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr(cache, "distributed", processes)
    processes.barrier = lambda: counts.append(len(list(tmp_path.glob("shared/*.pt"))))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("LOCAL_RANK", rank)
        made[rank] = SeededCacheDataset(cases, loading(), cache_dir=tmp_path / "shared")
    assert counts == [1, 3]  # before the second process came the first had to prepare the others too
    assert made["0"].kept == made["1"].kept
    assert torch.equal(made["0"][2]["image"], SeededCacheDataset(cases, loading())[2]["image"])
