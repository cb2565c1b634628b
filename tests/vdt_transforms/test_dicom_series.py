from __future__ import annotations

import os
import re
import shutil
import sys

import numpy as np
import pytest
from monai.data import PydicomReader
from monai.transforms import LoadImage
from pydicom.uid import JPEG2000Lossless

from tests.makers.dicom import AXIAL, uid, write_series, write_slice
from vdt_transforms import dicom_headers
from vdt_transforms.dicom_series import find_series

HU = np.arange(6 * 5 * 4).reshape(6, 5, 4) - 60  # (columns, rows, slices)
SHORT = uid("LIDC-IDRI-0001", "a")


def only(folder, **options):
    (series,) = find_series(folder, workers=1, **options).series
    return series


# What is found, and how it is read


def test_a_series_is_found_by_its_headers_and_read_in_the_order_of_its_places(tmp_path):
    write_series(tmp_path / "any" / "depth", HU)
    series = only(tmp_path)
    assert (series.uid, series.patient_id, series.modality) == (SHORT, "LIDC-IDRI-0001", "CT")
    assert (series.columns, series.rows, len(series.files)) == (6, 5, 4)
    assert [file.name for file in series.files] != sorted(file.name for file in series.files)
    assert (series.slice_spacing, series.thickness, series.pixel_spacing) == (2.5, 2.5, (0.6, 0.7))
    volume = series.read()
    assert volume.dtype == np.int16
    assert np.array_equal(volume, HU)
    assert (series.notes, series.irregularities, series.errors) == ((), (), ())


def test_a_voxel_lies_in_the_world_where_dicom_says_with_left_and_back_turned_to_right_and_front(tmp_path):
    write_series(tmp_path, HU, origin=(-20, -10, -100), spacing=(0.7, 0.6, 2.5))
    place = only(tmp_path).affine @ [3, 2, 1, 1]
    assert np.allclose(place[:3], [20 - 3 * 0.7, 10 - 2 * 0.6, -100 + 2.5])


def test_a_clean_folder_is_read_as_monai_reads_it(tmp_path):
    write_series(tmp_path, HU)
    series = only(tmp_path)
    theirs = LoadImage(reader=PydicomReader(), image_only=True)(tmp_path)
    assert np.array_equal(series.read(), theirs)
    assert np.allclose(series.affine, theirs.affine)


@pytest.mark.parametrize(
    ("orientation", "axial", "ascending"),
    [
        pytest.param(AXIAL, True, True, id="axial"),
        pytest.param((-1, 0, 0, 0, -1, 0), True, True, id="turned-by-180-degrees"),
        pytest.param((-1, 0, 0, 0, 1, 0), True, False, id="mirrored"),
        pytest.param((1, 0, 0, 0, 0, -1), False, True, id="coronal"),
        pytest.param((0, 1, 0, 0, 0, -1), False, False, id="sagittal"),
        pytest.param((0.8, 0.6, 0, -0.6, 0.8, 0), False, True, id="oblique"),
    ],
)
def test_slices_go_towards_head_back_or_left_and_the_affine_with_them(tmp_path, orientation, axial, ascending):
    write_series(tmp_path, HU, orientation=orientation, origin=(3, 5, 7), spacing=(0.7, 0.6, 2.5))
    series = only(tmp_path)
    assert series.is_axial == axial
    assert np.array_equal(series.read(), HU if ascending else HU[:, :, ::-1])
    index = np.array([3, 2, 1])
    row, column = np.reshape(orientation, (2, 3))
    lps = np.array([3, 5, 7]) + 3 * 0.7 * row + 2 * 0.6 * column + 1 * 2.5 * np.cross(row, column)
    if not ascending:
        index[2] = 2
    assert np.allclose((series.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-5)
    step = series.affine[:3, 2] * [-1, -1, 1]  # in DICOM's world
    assert step[np.abs(step).argmax()] > 0


def test_each_slice_has_its_own_rescale_and_signed_numbers_are_read(tmp_path):
    write_series(tmp_path, HU[:, :, :1])
    stored = (HU[:, :, 1].T * 2).astype(np.int16)
    fields = {"PatientID": "LIDC-IDRI-0001", "SeriesInstanceUID": SHORT, "ImageOrientationPatient": list(AXIAL)}
    fields |= {"ImagePositionPatient": [-20, -10, -97.5], "PixelSpacing": [0.6, 0.7], "InstanceNumber": 2}
    write_slice(tmp_path / "second", stored, RescaleSlope=0.5, RescaleIntercept=0, **fields)
    assert np.array_equal(only(tmp_path).read(), HU[:, :, :2])


def test_mr_is_read_as_floats_when_asked_for(tmp_path):
    fields = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}
    write_series(tmp_path, HU, RescaleSlope=None, RescaleIntercept=None, **fields)
    assert find_series(tmp_path, workers=1).skipped == {"MR": 4}
    volume = only(tmp_path, modalities=("MR",)).read()
    assert volume.dtype == np.float32
    assert np.array_equal(volume, HU + 1024)


def test_two_series_in_a_folder_are_kept_apart_and_that_is_said(tmp_path):
    write_series(tmp_path, HU, name="a")
    write_series(tmp_path, HU + 1, name="b")
    found = find_series(tmp_path, workers=1).series
    assert [series.uid for series in found] == sorted(uid("LIDC-IDRI-0001", name) for name in "ab")
    for series in found:
        assert series.notes == (f"{tmp_path}/.: holds 2 series, which are kept apart by their uid".replace("/.", ""),)
        assert np.array_equal(series.read(), HU + (series.uid != SHORT))


def test_series_of_several_patients_are_sorted_by_patient(tmp_path):
    for patient in ("LIDC-IDRI-0003", "LIDC-IDRI-0001", "LIDC-IDRI-0002"):
        write_series(tmp_path / patient[::-1], HU, patient=patient)
    assert [s.patient_id[-1] for s in find_series(tmp_path, workers=1).series] == ["1", "2", "3"]


def test_what_is_no_slice_is_skipped_and_counted_by_its_kind(tmp_path):
    write_series(tmp_path, HU)
    (tmp_path / "notes.xml").write_text("<LidcReadMessage/>")
    (tmp_path / ".hidden").write_text("hidden files are not looked at")
    kinds = {"SR": "88.33", "SEG": "66.4", "RTSTRUCT": "481.3"}
    for name, end in kinds.items():
        write_slice(tmp_path / f"{name}.dcm", Modality=name, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{end}")
    for number, name in enumerate(("DX", "CR", "DX")):
        write_slice(tmp_path / f"x{number}.dcm", np.zeros((9, 9), np.uint16), Modality=name, SOPClassUID="1.2.3")
    scout = {"SeriesInstanceUID": SHORT, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_slice(tmp_path / "scout.dcm", np.zeros((9, 9), np.uint16), **scout)
    write_slice(tmp_path / "frames.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    found = find_series(tmp_path, workers=1)
    assert found.skipped == {
        **{"CR": 1, "DX": 2, "RTSTRUCT": 1, "SEG": 1, "SR": 1},
        **{"localizer": 1, "multi-frame CT": 1, "not DICOM": 1},
    }
    assert found.damaged == ()
    assert only(tmp_path).errors == ()


# What is wrong with a series


def test_missing_slices_are_counted_and_placed(tmp_path):
    write_series(tmp_path, np.zeros((6, 5, 4)), places=[0, 2.5, 10, 12.5])
    series = only(tmp_path)
    message = (
        rf"^{re.escape(str(tmp_path))}: series {SHORT} lacks 2 slices, the first between -97\.5 and -90 mm where slices"
        r" are 2\.5 mm apart; copy or download the series again$"
    )
    with pytest.raises(ValueError, match=message):
        series.read()
    assert series.read(irregular=True).shape == (6, 5, 4)


def test_uneven_slices_are_told_with_their_distances(tmp_path):
    write_series(tmp_path, np.zeros((6, 5, 4)), places=[0, 2.5, 5.5, 7.5])
    message = r"series [\d.]+ has uneven slices, 2 to 3 mm apart and up to 0\.5 mm off a regular grid$"
    with pytest.raises(ValueError, match=message):
        only(tmp_path).check()
    only(tmp_path).check(irregular=True)


def test_places_rounded_to_a_hundredth_of_a_mm_are_even(tmp_path):
    write_series(tmp_path, np.zeros((6, 5, 30)), places=np.round(np.arange(30) * 1.2345, 2))
    only(tmp_path).check()


def test_of_two_slices_at_one_place_that_with_the_lower_instance_number_is_kept(tmp_path):
    hu = np.arange(5) * np.ones((6, 5, 1), int)
    write_series(tmp_path, hu, places=[0, 2.5, 5, 5, 7.5])
    series = only(tmp_path)
    with pytest.raises(
        ValueError, match=r"has slices at the same place, 1 too many, the first .*\.dcm at -95 mm; the one of"
    ):
        series.check()
    assert series.read(irregular=True)[0, 0].tolist() == [0, 1, 2, 4]


def test_a_copy_of_a_file_is_read_once_and_that_is_said(tmp_path):
    files = write_series(tmp_path / "one", HU)
    (tmp_path / "two").mkdir()
    for file in files[:2]:
        shutil.copy(file, tmp_path / "two")
    series = only(tmp_path)
    assert np.array_equal(series.read(), HU)
    assert series.notes == (f"{tmp_path}/one: series {SHORT} has 2 files twice; one copy of each is read",)


def test_a_tilted_gantry_is_refused(tmp_path):
    tilt = np.deg2rad(15)
    for index in range(3):
        position = [-20, -10, -100 + 2.5 * index]
        orientation = [1, 0, 0, 0, np.cos(tilt).round(6), -np.sin(tilt).round(6)]
        fields = {"ImagePositionPatient": position, "ImageOrientationPatient": orientation, "PixelSpacing": [0.7, 0.7]}
        fields |= {"RescaleSlope": 1, "RescaleIntercept": 0, "SeriesInstanceUID": SHORT}
        write_slice(tmp_path / f"{index}.dcm", np.zeros((5, 6), np.uint16), **fields)
    with pytest.raises(
        ValueError, match=r"its slices shift sideways by up to 1\.3 mm, as with a tilted gantry; expected"
    ):
        only(tmp_path).check()


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"shape": (6, 4, 1)}, r"5 x 6 and 4 x 6|4 x 6 and 5 x 6) pixels"),
        ({"spacing": (0.8, 0.6, 2.5)}, r"0\.6 x 0\.7 and 0\.6 x 0\.8) mm between pixels"),
        ({"orientation": (1, 0, 0, 0, 0, -1)}, r".*) as directions of rows and columns"),
    ],
)
def test_slices_of_different_geometry_in_one_series_are_refused(tmp_path, other, shown):
    write_series(tmp_path / "x", HU)
    write_series(tmp_path / "y", **{"shape": (6, 5, 1), "origin": (-20, -10, -90), **other})
    with pytest.raises(ValueError, match=rf"series {SHORT} mixes slices with ({shown}; expected the same in all$"):
        only(tmp_path).read(irregular=True)


def test_a_single_slice_is_no_volume(tmp_path):
    write_series(tmp_path, HU[:, :, :1])
    with pytest.raises(ValueError, match="has one slice; a volume needs two or more"):
        only(tmp_path).check()


def test_ct_without_rescale_has_no_hounsfield_units(tmp_path):
    write_series(tmp_path, HU, RescaleIntercept=None)
    with pytest.raises(
        ValueError, match=r"a\d\d\d\.dcm: has no RescaleSlope or no RescaleIntercept, so its values are"
    ):
        only(tmp_path).check()


# What is wrong with a file


def cut(size):
    def damage(file):
        file.write_bytes(file.read_bytes()[:size])

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(cut(0), r"empty \(0 bytes\)", id="empty"),
        pytest.param(cut(100), "no DICOM, or cut short within its first bytes", id="preamble"),
        pytest.param(cut(250), "has no Modality, as if cut short in its header", id="file-meta"),
        pytest.param(cut(560), "has no .* and no Rows and no Columns", id="header"),
        pytest.param(cut(-1), "cut short, 59 of 60 bytes of pixels are there", id="pixels"),
        pytest.param(lambda file: file.write_text("no image"), "no DICOM, or cut short within", id="text"),
        pytest.param(
            lambda file: write_like(file, ImagePositionPatient=None), "has no ImagePositionPatient", id="no-place"
        ),
        pytest.param(lambda file: write_like(file, PixelSpacing=None), "has no PixelSpacing", id="no-spacing"),
        pytest.param(lambda file: write_like(file, PixelSpacing=[1]), "has no PixelSpacing", id="one-spacing"),
        pytest.param(lambda file: write_like(file, PixelSpacing=[1, 0]), "has pixels of 1.0 x 0.0 mm", id="spacing-0"),
    ],
)
def test_a_damaged_file_is_named_by_the_series_of_its_folder(tmp_path, damage, reason):
    files = write_series(tmp_path / "x", HU)
    write_series(tmp_path / "y", HU, patient="LIDC-IDRI-0002")
    damage(files[3])
    first, second = find_series(tmp_path, workers=1).series
    with pytest.raises(ValueError, match=rf"^{re.escape(str(files[3]))}: ({reason}).*; copy or download it again$"):
        first.read(irregular=True)
    second.check()


def write_like(file, **fields):
    shape = np.zeros((5, 6), np.uint16)
    write_slice(
        file,
        shape,
        **{
            "SeriesInstanceUID": SHORT,
            "ImageOrientationPatient": list(AXIAL),
            **{"ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1], **fields},
        },
    )


def test_a_damaged_file_of_no_series_is_told_apart(tmp_path):
    write_series(tmp_path / "x", HU)
    (tmp_path / "y").mkdir()
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / "y" / name).touch()
    found = find_series(tmp_path, workers=1)
    assert found.damaged == (
        f"{tmp_path}/y/a.dcm: empty (0 bytes); copy or download it again (and 1 more damaged files)",
    )
    assert found.series[0].errors == ()


def test_pixels_that_cannot_be_decoded_are_named(tmp_path):
    files = write_series(tmp_path, HU)
    fields = {
        "TransferSyntaxUID": JPEG2000Lossless,
        "PixelData": b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\x04\0\0\0abcd",
    }
    write_like(
        files[1],
        ImagePositionPatient=[-20, -10, -97.5],
        RescaleSlope=1,
        RescaleIntercept=0,
        PixelSpacing=[0.6, 0.7],
        **fields,
    )
    with pytest.raises(ValueError, match=r"a\d\d\d\.dcm: its pixels cannot be decoded \(.*; copy or download it again"):
        only(tmp_path).read()


def test_colours_and_inverted_greys_are_refused(tmp_path):
    write_series(tmp_path, HU, PhotometricInterpretation="MONOCHROME1")
    message = r"MONOCHROME1 pixels of shape \(5, 6\); expected MONOCHROME2 of shape \(5, 6\)"
    with pytest.raises(ValueError, match=message):
        only(tmp_path).read()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none: no such folder; expected one with DICOM files"):
        find_series(tmp_path / "none")


def test_without_pydicom_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"needs pydicom; install it with: pip install pydicom"):
        find_series(tmp_path)


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path):
    write_series(tmp_path / "x", HU)
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    assert only(tmp_path).notes == ()


# The index


@pytest.fixture
def reads(monkeypatch):
    """Names of the files whose headers are read."""
    names = []
    read = dicom_headers.read_header

    def spy(root, path):
        names.append(os.path.basename(path))
        return read(root, path)

    monkeypatch.setattr(dicom_headers, "read_header", spy)
    return names


def test_what_is_in_the_index_is_not_opened_again_but_what_changed_is(tmp_path, reads):
    data, index = tmp_path / "data", tmp_path / "index.json.gz"
    files = write_series(data, HU)
    first = only(data, index_file=index)
    assert len(reads) == 4
    reads.clear()
    second = only(data, index_file=index)
    assert reads == []
    assert second.files == first.files
    assert np.array_equal(second.positions, first.positions)

    cut(-1)(files[2])
    (data / "new.txt").touch()
    files[0].unlink()
    series = only(data, index_file=index)
    assert sorted(reads) == sorted([files[2].name, "new.txt"])
    assert "cut short" in series.errors[0]
    assert len(series.files) == 2


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, reads):
    files = write_series(tmp_path / "data", HU)
    cut(100)(files[0])
    assert only(tmp_path / "data", index_file=tmp_path / "index").errors
    reads.clear()
    assert only(tmp_path / "data", index_file=tmp_path / "index").errors
    assert reads == [files[0].name]


@pytest.mark.parametrize("content", [b"", b"no gzip", b"\x1f\x8b\x08\x00broken"])
def test_a_broken_index_is_made_again(tmp_path, reads, content):
    (tmp_path / "index").write_bytes(content)
    write_series(tmp_path / "data", HU)
    for expected in (4, 0):
        only(tmp_path / "data", index_file=tmp_path / "index")
        assert len(reads) == expected
        reads.clear()


def test_the_index_of_another_folder_is_not_taken(tmp_path, reads):
    for name in "xy":
        write_series(tmp_path / name, HU)
        only(tmp_path / name, index_file=tmp_path / "index")
    assert len(reads) == 8


def test_many_files_are_read_by_several_processes_with_the_same_result(tmp_path, monkeypatch):
    write_series(tmp_path, HU)
    alone = dicom_headers.read_headers(tmp_path, workers=1)
    monkeypatch.setattr(dicom_headers, "CHUNK", 1)
    assert dicom_headers.read_headers(tmp_path, workers=2) == alone
