"""Public data sets: their files in folders and zip archives, published splits, and what is drawn by seed."""

from __future__ import annotations

import gzip
import stat
import zipfile

import nibabel as nib
import numpy as np
import pytest

from vdt_workflows.data.volumes import draw
from vdt_workflows.preparation.public_sets import BTCV, LITS, Split, StoredFile, find_files, find_numbered

PARTS = ["training", "validation", "test"]


def everything(lists):
    return sorted(case for part in PARTS for case in lists[part])


def test_btcv_is_split_as_published():
    lists = Split("published").divide(BTCV, [])
    assert lists["training"] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, *range(21, 35)]
    assert lists["validation"] == lists["test"] == [35, 36, 37, 38, 39, 40]
    assert "validation is the test set" in BTCV.shared_cases
    assert BTCV.labels[2:4] == ("right kidney", "left kidney")
    assert BTCV.labels[12:] == ("right adrenal gland", "left adrenal gland")


def test_lits_is_split_as_published():
    lists = Split("published").divide(LITS, [])
    # In the order of the published lists.
    assert set(lists["validation"]) == {34, 0, 75, 58, 87, 85, 73, 29, 110, 17, 113, 72, 103}
    assert set(lists["test"]) == {52, 26, 42, 88, 77, 20, 65, 112, 86, 2, 99, 127, 19}
    assert [len(lists[part]) for part in PARTS] == [105, 13, 13]
    assert everything(lists) == list(range(131))
    assert lists["training"][:8] == [1, 3, 4, 5, 6, 7, 8, 9]  # 0 and 2 are held out
    assert LITS.shared_cases == ""


def test_the_recommended_btcv_split_keeps_the_test_and_draws_validation_from_training():
    splits = [Split(seed=seed).divide(BTCV, []) for seed in range(5)]
    for lists in splits:
        assert lists["test"] == Split("published").divide(BTCV, [])["test"]
        assert [len(lists[part]) for part in PARTS] == [20, 4, 6]
        assert sorted(lists["training"] + lists["validation"]) == Split("published").divide(BTCV, [])["training"]
    assert len({tuple(lists["validation"]) for lists in splits}) == 5
    assert Split(seed=0).divide(BTCV, []) == splits[0]


def test_the_recommended_lits_split_is_the_published_one_which_keeps_validation_apart():
    assert Split(seed=3).divide(LITS, []) == Split("published").divide(LITS, [])


@pytest.mark.parametrize(("cases", "folds"), [(30, 5), (131, 5), (7, 3), (2, 2)])
def test_over_all_folds_each_case_is_tested_once_and_never_by_a_run_that_saw_it(cases, folds):
    splits = [Split(folds=folds, fold=fold, seed=1).divide_folds(range(cases)) for fold in range(folds)]
    assert sorted(case for lists in splits for case in lists["test"]) == list(range(cases))
    for lists in splits:
        assert everything(lists) == list(range(cases))
        assert lists["training"]
        assert abs(len(lists["test"]) - cases / folds) < 1
    other = Split(folds=folds, seed=2).divide_folds(range(cases))
    assert cases == 2 or other["test"] != splits[0]["test"]


@pytest.mark.parametrize(
    ("folds", "fold", "sentence"),
    [
        (1, 0, "folds must be 2 to 6, the number of cases, got 1"),
        (7, 0, "folds must be 2 to 6, the number of cases, got 7"),
        (3, 3, "fold must be 0 to 2, got 3"),
        (3, -1, "fold must be 0 to 2, got -1"),
    ],
)
def test_a_fold_that_is_not_there_is_named(folds, fold, sentence):
    with pytest.raises(ValueError, match=sentence):
        Split(folds=folds, fold=fold).divide_folds(range(6))


@pytest.mark.parametrize(("cases", "share", "count"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (24, 0.15, 4)])
def test_both_sides_of_a_draw_get_a_case_where_there_are_two(cases, share, count):
    rest, drawn = draw(range(cases), share, 0)
    assert len(drawn) == count
    assert sorted(rest + drawn) == list(range(cases))
    assert rest == sorted(rest)


NAMES = {
    "raw BTCV": (BTCV, "RawData/Training/img/img0007.nii.gz", "RawData/Training/label/label0007.nii.gz"),
    "BTCV in one folder": (BTCV, "all/img0007.nii.gz", "all/label0007.nii.gz"),
    "BTCV with names of images for labels": (BTCV, "imagesTr/img0007.nii.gz", "labelsTr/img0007.nii.gz"),
    "BTCV as nnU-Net": (BTCV, "imagesTr/BTCV_007_0000.nii.gz", "labelsTr/BTCV_007.nii.gz"),
    "LiTS batches": (LITS, "Training Batch 1/volume-7.nii", "Training Batch 1/segmentation-7.nii"),
    "LiTS, packed": (LITS, "b/volume-7.nii.gz", "b/segmentation-7.nii.gz"),
    "LiTS as Decathlon": (LITS, "Task03_Liver/imagesTr/liver_7.nii.gz", "Task03_Liver/labelsTr/liver_7.nii.gz"),
    "LiTS as nnU-Net": (LITS, "imagesTr/liver_7_0000.nii.gz", "labelsTr/liver_7.nii.gz"),
}


@pytest.mark.parametrize("layout", NAMES)
def test_the_names_of_every_layout_are_understood(layout):
    data_set, image, label = NAMES[layout]
    files = [StoredFile(image), StoredFile("data.zip", label)]
    assert find_numbered(files, data_set) == {7: {"image": files[0], "label": files[1]}}


def test_files_of_other_numbers_and_kinds_are_left_alone():
    names = ["Testing/img/img0061.nii.gz", "img/img0011.nii.gz", "img/atlas.nii.gz", "other/case_7.nii.gz"]
    assert find_numbered([StoredFile(name) for name in names], BTCV) == {}
    assert find_numbered([StoredFile("test/test-volume-7.nii")], LITS) == {}


def test_two_files_of_one_case_are_named():
    files = [StoredFile("a/img0007.nii.gz"), StoredFile("b/img0007.nii.gz")]
    with pytest.raises(ValueError, match=r"BTCV case 0007 has two images, a/img0007.nii.gz and b/img0007.nii.gz; name"):
        find_numbered(files, BTCV)


# Files


def make_zip(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_volumes_are_found_at_any_depth_of_folders_and_archives_and_hidden_ones_are_not(tmp_path):
    for name in ("b/c/x.nii", "b/y.nii.gz", "b/notes.txt", "b/._y.nii.gz", ".trash/z.nii.gz"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text("")
    names = ["RawData/Training/img/img0001.nii.gz", "__MACOSX/RawData/._img0001.nii.gz", "RawData/read.me", ".a/x.nii"]
    archive = make_zip(tmp_path / "data.zip", **dict.fromkeys(names, ""))
    found = find_files([tmp_path / "f", archive])
    assert [str(file) for file in found] == [
        f"{archive}: RawData/Training/img/img0001.nii.gz",
        f"{tmp_path}/f/b/c/x.nii",
        f"{tmp_path}/f/b/y.nii.gz",
    ]
    assert [(file.folder, file.name) for file in found] == [
        ("img", "img0001.nii.gz"),
        ("c", "x.nii"),
        ("b", "y.nii.gz"),
    ]


def test_an_archive_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("img/img0001.nii.gz")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match=r"data\.zip: its member 'img/img0001\.nii\.gz' leads out of the archive"):
        find_files([tmp_path / "data.zip"])


def test_what_is_no_folder_and_no_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none: no such folder or archive$"):
        find_files([tmp_path / "none"])
    (tmp_path / "cut.zip").write_bytes(make_zip(tmp_path / "whole.zip", a="b").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut\.zip: neither a folder nor a whole zip archive; download it again"):
        find_files([tmp_path / "cut.zip"])
    with pytest.raises(ValueError, match=r": no volume file \(.*\) in it; it holds cut\.zip, so name that instead$"):
        find_files([tmp_path])


def test_a_member_is_streamed_out_and_a_damaged_one_is_named(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 40))
    content = nib.Nifti1Image(values.astype(np.int16), np.eye(4)).to_bytes()
    archive = make_zip(tmp_path / "data.zip", **{"a/x.nii": content, "a/y.nii": content})
    good, bad = find_files([archive])
    assert good.open_in(tmp_path / "out").read_bytes() == content
    whole = bytearray(archive.read_bytes())
    whole[whole.index(b"a/y.nii") + 50] ^= 255
    archive.write_bytes(whole)
    with pytest.raises(ValueError, match=r"data\.zip: a/y\.nii: cannot be unpacked \(.*\); download the archive again"):
        bad.open_in(tmp_path / "out")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_member_that_unpacks_to_more_than_its_header_says_is_left_packed(tmp_path, name):
    content = nib.Nifti1Image(np.zeros((35, 51, 35), np.int16), np.eye(4)).to_bytes()
    sound = gzip.compress(content) if name.endswith(".gz") else content
    make_zip(tmp_path / "sound.zip", **{name: sound})
    make_zip(tmp_path / "bomb.zip", **{name: sound + bytes(9 << 20)})
    assert StoredFile(str(tmp_path / "sound.zip"), name).open_in(tmp_path / "out").read_bytes() == sound
    with pytest.raises(
        ValueError, match=r"bomb.zip: x.* unpacks to 9\d+ bytes, but its header speaks of 125302; not unpacked$"
    ):
        StoredFile(str(tmp_path / "bomb.zip"), name).open_in(tmp_path / "other")
    assert not any((tmp_path / "other").iterdir())


def test_a_stamp_changes_with_the_content(tmp_path):
    path = tmp_path / "x.nii"
    path.write_text("one")
    first = StoredFile(str(path)).stamp()
    path.write_text("other")
    assert StoredFile(str(path)).stamp() != first
    member = StoredFile(str(tmp_path / "data.zip"), "x.nii")
    stamps = []
    for text in ("abc", "abd", "abc"):
        make_zip(tmp_path / "data.zip", **{"x.nii": text})
        stamps.append(member.stamp())
    assert stamps[0] == stamps[2] != stamps[1]
