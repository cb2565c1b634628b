"""Volumes in folders and zip archives."""

from __future__ import annotations

import zipfile

import pytest

from vdt_workflows.preparation.stored_files import StoredFile, find_files


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


@pytest.mark.parametrize("name", ["../x.nii.gz", "a/../../x.nii.gz", "/etc/x.nii.gz", "C:/x.nii.gz", "..\\x.nii.gz"])
def test_an_archive_whose_names_lead_out_of_it_is_refused(tmp_path, name):
    archive = make_zip(tmp_path / "data.zip", **{"img/img0001.nii.gz": "", name: ""})
    with pytest.raises(ValueError, match=r"data\.zip: its member '.*' leads out of the archive"):
        find_files([archive])


def test_what_is_no_folder_and_no_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none: no such folder or archive$"):
        find_files([tmp_path / "none"])
    (tmp_path / "cut.zip").write_bytes(make_zip(tmp_path / "whole.zip", a="b").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut\.zip: neither a folder nor a whole zip archive; download it again"):
        find_files([tmp_path / "cut.zip"])
    with pytest.raises(
        ValueError, match=r": no \.nii or \.nii\.gz file in it; it holds cut\.zip, so name that instead$"
    ):
        find_files([tmp_path])


def test_a_member_is_streamed_out_and_a_damaged_one_is_named(tmp_path):
    content = bytes(range(256)) * 5000
    archive = make_zip(tmp_path / "data.zip", **{"a/x.nii": content, "a/y.nii": content})
    good, bad = find_files([archive])
    (tmp_path / "out").mkdir()
    assert good.open_in(tmp_path / "out").read_bytes() == content
    whole = bytearray(archive.read_bytes())
    whole[whole.index(b"a/y.nii") + 50] ^= 255
    archive.write_bytes(whole)
    with pytest.raises(ValueError, match=r"data\.zip: a/y\.nii: cannot be unpacked \(.*\); download the archive again"):
        bad.open_in(tmp_path / "out")


def test_a_stamp_changes_with_the_content(tmp_path):
    path = tmp_path / "x.nii"
    path.write_text("one")
    first = StoredFile(str(path)).stamp()
    path.write_text("other")
    assert StoredFile(str(path)).stamp() != first
    stamps = [
        StoredFile(str(make_zip(tmp_path / "data.zip", **{"x.nii": text})), "x.nii").stamp()
        for text in ("abc", "abd", "abc")
    ]
    assert stamps[0] == stamps[2] != stamps[1]
