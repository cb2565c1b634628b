from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from tests.makers.dicom import write_series
from tests.makers.volumes import write_pair, write_volume
from vdt_workflows.data.volume_files import draw
from vdt_workflows.data.volumes import find_volumes, list_scans, list_volumes


def write_nrrd(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(values), path)
    return path


def make_set(root, count=3, image="images/c{}.nii.gz", label="labels/c{}.nii.gz"):
    for number in range(count):
        write_pair(root / image.format(number), root / label.format(number), shape=(2, 2, 2))
    return root


def names(cases):
    return sorted(Path(case["image"]).name for case in cases)


def test_capitals_and_other_formats_are_read_as_pairs(tmp_path):
    make_set(tmp_path, 2, "images/c{}.NII.GZ", "labels/c{}.Nii")
    write_nrrd(tmp_path / "images/c7.nrrd", np.zeros((2, 2, 2), np.int16))
    write_nrrd(tmp_path / "labels/c7.seg.NRRD", np.zeros((2, 2, 2), np.uint8))
    write_nrrd(tmp_path / "images/c8.mhd", np.zeros((2, 2, 2), np.int16))
    write_nrrd(tmp_path / "labels/c8.mha", np.zeros((2, 2, 2), np.uint8))
    cases = find_volumes(tmp_path)
    assert names(cases["training"] + cases["validation"]) == ["c0.NII.GZ", "c1.NII.GZ", "c7.nrrd", "c8.mhd"]


def test_what_is_left_out_is_named_and_counted(tmp_path, caplog):
    make_set(tmp_path)
    write_volume(tmp_path / "labels" / "extra.nii.gz", shape=(2, 2, 2))
    for junk in ("images/._c0.nii.gz", "images/.DS_Store", "labels/Thumbs.db", "labels/notes.txt"):
        (tmp_path / junk).write_bytes(b"")
    (tmp_path / "images" / "@eaDir").mkdir()
    find_volumes(tmp_path)
    line = caplog.messages[-1]
    assert ": 3 used, 6 left out; 2 training, 1 validation, 0 test; " in line
    assert "4 files of the system (.DS_Store, ._c0.nii.gz, @eaDir and 1 more)" in line
    assert "1 labels without image (extra.nii.gz)" in line
    assert "1 other files (notes.txt)" in line


def test_files_and_series_of_one_folder_are_all_used(tmp_path, caplog):
    file = write_volume(tmp_path / "a.nii.gz")
    write_series(tmp_path / "study" / "ct")
    write_volume(tmp_path / "deep" / "b.nii.gz")
    assert list_volumes(tmp_path) == [{"image": str(file)}, {"image": str(tmp_path / "study" / "ct")}]
    assert list_scans(tmp_path) == list_volumes(tmp_path)
    assert ": 2 used, 1 left out; 1 volumes of other folders (b.nii.gz)" in caplog.messages[-1]


def test_volumes_of_folders_of_their_own_are_used_but_for_labels(tmp_path):
    for patient in ("P1", "P2"):
        write_pair(tmp_path / patient / "image.nii.gz", tmp_path / patient / "label.nii.gz")
    (tmp_path / "P2" / "up").symlink_to(tmp_path)
    assert [os.path.relpath(case["image"], tmp_path) for case in list_volumes(tmp_path)] == [
        "P1/image.nii.gz",
        "P2/image.nii.gz",
    ]


def test_a_folder_for_each_case_is_a_case_and_the_first_folder_that_differs_its_patient(tmp_path, caplog):
    for place in ("P1/a", "P1/b", "P2/a"):
        write_pair(tmp_path / place / "image.nii.gz", tmp_path / place / "label.nii.gz")
    write_pair(tmp_path / "P3" / "img1.nii", tmp_path / "P3" / "label1.nii")
    write_pair(tmp_path / "P3" / "img2.nii", tmp_path / "P3" / "label2.nii")
    write_volume(tmp_path / "P4" / "image.nii.gz")
    cases = find_volumes(tmp_path, val_fraction=0.3)
    both = [case for group in cases.values() for case in group]
    found = [[os.path.relpath(case[key], tmp_path) for key in ("image", "label")] for case in both]
    assert ["P1/a/image.nii.gz", "P1/a/label.nii.gz"] in found
    assert ["P3/img2.nii", "P3/label2.nii"] in found
    assert len(found) == 5
    patients = [{os.path.relpath(case["image"], tmp_path)[:2] for case in group} for group in cases.values()]
    assert [*map(len, patients)] == [2, 1, 0]
    assert not patients[0] & patients[1]
    assert ": 5 used, 1 left out; " in caplog.messages[-1]
    assert caplog.messages[-1].endswith("; 1 volumes without label (image.nii.gz)")


@pytest.mark.parametrize("place", ["{visit}/sub-0{n}", "sub-0{n}/{visit}", "{visit}"])
def test_visits_of_a_subject_are_in_one_part_wherever_its_name_stands(tmp_path, place):
    for visit in ("baseline", "followup"):
        for n in range(1, 6):
            folder = tmp_path / place.format(visit=visit, n=n)
            write_pair(folder / f"sub-0{n}_image.nii.gz", folder / f"seg_sub-0{n}_image.nii.gz")
    cases = find_volumes(tmp_path, val_fraction=0.4)
    parts = [{re.search(r"sub-0\d", case["image"])[0] for case in cases[part]} for part in ("training", "validation")]
    assert [len(cases[part]) for part in ("training", "validation")] == [6, 4]
    assert [*map(len, parts)] == [3, 2]
    assert not parts[0] & parts[1]


def test_two_labels_of_one_image_are_refused(tmp_path):
    make_set(tmp_path, 2)
    write_volume(tmp_path / "labels" / "c1.nii", shape=(2, 2, 2))
    with pytest.raises(ValueError, match=r"c1\.nii\.gz: a second label of the case of c1\.nii; leave one of them"):
        find_volumes(tmp_path)


def test_label_maps_that_a_segmentation_wrote_beside_the_volumes_are_left_out(tmp_path, caplog):
    for name in ("a", "a_seg", "b"):
        write_volume(tmp_path / f"{name}.nii.gz")
    assert [os.path.basename(case["image"]) for case in list_volumes(tmp_path)] == ["a.nii.gz", "b.nii.gz"]
    assert "1 labels (a_seg.nii.gz)" in caplog.messages[-1]
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "b.nii.gz").unlink()
    assert len(list_volumes(tmp_path)) == 1  # asked for as it is


def test_several_channels_are_refused_in_one_sentence(tmp_path):
    make_set(tmp_path, 2, "imagesTr/c{}_0000.nii.gz", "labelsTr/c{}.nii.gz")
    write_volume(tmp_path / "imagesTr" / "c1_0001.nii.gz", shape=(2, 2, 2))
    for listing in (find_volumes, list_volumes):
        with pytest.raises(ValueError, match=r"c1_0001\.nii\.gz: a second channel of c1_0000\.nii\.gz; .*one channel"):
            listing(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_written_by_windows_is_read(tmp_path, encoding):
    make_set(tmp_path, 2)
    entries = [{"image": f".\\images\\c{n}.nii.gz", "label": f".\\labels\\c{n}.nii.gz"} for n in range(2)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}), encoding=encoding)
    cases = find_volumes(tmp_path)
    assert names(cases["training"] + cases["validation"]) == ["c0.nii.gz", "c1.nii.gz"]


def test_a_patient_is_in_one_part(tmp_path):
    named = [f"patient{n:03d}_frame{f:02d}.nii.gz" for n in range(5) for f in (1, 12)]
    for seed in range(5):
        rest, share = draw(named, 0.4, seed)
        assert len(share) == 4
        assert not {name[:10] for name in rest} & {name[:10] for name in share}
    make_set(tmp_path, 3)
    entries = [{"image": f"images/c{n}.nii.gz", "label": f"labels/c{n}.nii.gz", "patient_id": n // 2} for n in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    cases = find_volumes(tmp_path, val_fraction=0.3)
    assert sorted(map(len, cases.values())) == [0, 1, 2]
    assert all(set(case) == {"image", "label"} for case in cases["training"])
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries[:1], "test": entries[1:]}))
    with pytest.raises(ValueError, match=r"dataset\.json: patient 0 is listed for training and for test; list it once"):
        find_volumes(tmp_path)


def test_an_unusable_file_does_not_end_a_listing_that_skips(tmp_path, caplog):
    write_volume(tmp_path / "good.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no gzip")
    (tmp_path / "bad.nrrd").write_bytes(b"no header")
    sheared = np.diag([1.0, 1, 1, 1])
    sheared[1, 2] = 0.5
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), sheared), tmp_path / "sheared.nii.gz")
    assert names(list_volumes(tmp_path, on_error="skip")) == ["good.nii.gz"]
    assert ": 1 used, 3 left out; 3 unusable, see above (bad.nii.gz, bad.nrrd, sheared.nii.gz)" in caplog.messages[-1]
