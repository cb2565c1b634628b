from __future__ import annotations

import re
import shutil
import zipfile
from functools import partial
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from monai.data import PydicomReader
from monai.transforms import LoadImage, LoadImaged
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEG2000Lossless

from tests.makers.dicom import AXIAL, uid, write_frames, write_series, write_slice
from vdt_transforms import NoduleReader, SeriesReader, SliceFolderReader, VolumeReader, dicom_folders, dicom_headers
from vdt_transforms.dicom_folders import find_series
from vdt_workflows.data.volumes import list_volumes
from vdt_workflows.parallel import run_parallel

HU = np.arange(6 * 5 * 4).reshape(6, 5, 4) - 60  # (columns, rows, slices)
SHORT = uid("LIDC-IDRI-0001", "a")


def only(folder, **options):
    (series,) = find_series(folder, **options).series
    return series


# One rule for listing and for loading


def cut(size):
    def damage(file):
        file.write_bytes(file.read_bytes()[:size])

    return damage


def localizer(folder, series_uid=None):
    fields = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [0, 0, 0], "Modality": "CT"}
    fields |= {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesInstanceUID": series_uid or "1.2.3"}
    write_slice(folder / "scout.dcm", np.zeros((5, 6), np.uint16), PixelSpacing=[0.6, 0.7], **fields)


def tilt(folder):
    """Shift each slice by 0.7 mm along its columns, as of slices 2.5 mm apart under a tilt of 15.6 degrees."""
    for file in folder.glob("*.dcm"):
        change(file, lambda d: setattr(d, "ImagePositionPatient", [-20, -10 + 0.28 * (d.ImagePositionPatient[2] + 100),
                                                                   d.ImagePositionPatient[2]]))  # fmt: skip


def change(file, edit):
    dataset = dcmread(file)
    edit(dataset)
    dataset.save_as(file)


def rewrite(folder):
    """Write one slice's directions 2e-7 off, and its spacing with more digits."""
    fields = {"ImageOrientationPatient": [1, 2e-7, 0, -2e-7, 1, 0], "PixelSpacing": ["0.600000", "0.70"]}
    change(min(folder.glob("*.dcm")), lambda dataset: [setattr(dataset, *item) for item in fields.items()])


def copy_one(folder):
    file = min(folder.glob("*.dcm"))
    shutil.copy(file, folder / f"{file.stem} (1).dcm")


def drop_rescale(folder):
    for file in folder.glob("*.dcm"):
        change(file, lambda d: delattr(d, "RescaleSlope"))


REFUSED = {
    "a tilted gantry": (tilt, {}, r"gantry tilted by 15\.6 degrees; .*convert it with dcm2niix"),
    "no rescale": (
        drop_rescale,
        {},
        r"\.dcm: has no RescaleSlope or no RescaleIntercept, so its values are not HU; export it anew with both$",
    ),
    "a slice off": (None, {"places": [0, 2.5, 5.4, 7.5]}, r"0\.4 mm off a regular grid; .* a twentieth of"),
    "a missing slice": (None, {"places": [0, 2.5, 7.5, 10]}, "lacks 1 slice, the first between"),
    "a cut file": (lambda folder: cut(-1)(min(folder.iterdir())), {}, r"a000\.dcm: cut short, 59 of 60 bytes"),
    "one slice": (None, {"hu": HU[..., :1]}, "has one slice; a volume needs two or more"),
    "another size": (
        lambda folder: write_series(folder, shape=(6, 4, 1), name="b", origin=(-20, -10, -90), SeriesInstanceUID=SHORT),
        {},
        "mixes slices with 5 x 6 and 4 x 6 pixels",
    ),
    "inverted greys": (None, {"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1 pixels, the darker"),
    "nothing but a cut file": (
        lambda folder: [cut(100)(file) for file in folder.iterdir()],
        {},
        r"a000\.dcm: no DICOM, or cut short .* \(and 3 more damaged files\)",
    ),
}
ACCEPTED = {
    "a copy": (copy_one, "a000 (1).dcm"),
    "a localizer of its own series": (localizer, "scout.dcm: a localizer, left out"),
    "a localizer of the same series": (partial(localizer, series_uid=SHORT), "scout.dcm: a localizer, left out"),
    "numbers written otherwise": (rewrite, ""),
    "other files": (lambda folder: (folder / "LICENSE").write_text("CC BY"), ""),
}


def load(folder, reader="vdt_transforms.SeriesReader", **options):
    return LoadImaged("image", reader=reader, ensure_channel_first=True, **options)({"image": str(folder)})["image"]


@pytest.mark.parametrize("ask", [list_volumes, load])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_volume_is_refused_by_listing_and_loading_alike(tmp_path, case, ask):
    spoil, options, sentence = REFUSED[case]
    write_series(tmp_path / "ct", **{"hu": HU, **options})
    if spoil:
        spoil(tmp_path / "ct")
    with pytest.raises(ValueError, match=sentence) as caught:
        ask(tmp_path / "ct")
    assert str(tmp_path / "ct") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_can_be_left_out_is_left_out_and_named_by_listing_and_loading_alike(tmp_path, case, caplog):
    spoil, named = ACCEPTED[case]
    write_series(tmp_path / "ct", HU)
    spoil(tmp_path / "ct")
    for ask in (list_volumes, load):
        caplog.clear()
        dicom_folders._found.clear()  # or else the second is not told again
        found = ask(tmp_path / "ct")
        messages = [record.message for record in caplog.records if record.name.startswith("vdt_transforms")]
        assert len(messages) == bool(named)
        assert named in "".join(messages)
    np.testing.assert_array_equal(found[0], HU)


def test_an_irregular_series_is_accepted_by_the_knob_of_listing_and_of_loading(tmp_path):
    write_series(tmp_path, HU, places=[0, 2.5, 5.4, 7.5])
    assert list_volumes(tmp_path, irregular="accept") == [{"image": str(tmp_path)}]
    for reader in ("SeriesReader", "VolumeReader", "NoduleReader"):
        np.testing.assert_array_equal(load(tmp_path, f"vdt_transforms.{reader}", irregular="accept")[0], HU)
    for ask in (SeriesReader, partial(list_volumes, tmp_path)):
        with pytest.raises(ValueError, match="irregular must be 'refuse' or 'accept', got 'yes'"):
            ask(irregular="yes")


def test_a_clean_folder_is_read_as_monai_reads_it(tmp_path):
    write_series(tmp_path, HU)
    series = only(tmp_path)
    theirs = LoadImage(reader=PydicomReader(), image_only=True)(tmp_path)
    assert np.array_equal(series.read(), theirs)
    assert np.allclose(series.affine, theirs.affine)


def test_positions_written_to_a_tenth_or_a_hundredth_of_a_millimetre_are_regular(tmp_path):
    write_series(tmp_path / "a", np.zeros((6, 5, 6)), places=[0, 0.6, 1.2, 1.9, 2.5, 3.1])
    np.testing.assert_allclose(load(tmp_path / "a").affine.numpy()[:3, 2], [0, 0, 0.62])
    write_series(tmp_path / "b", np.zeros((6, 5, 30)), places=np.round(np.arange(30) * 1.2345, 2))
    only(tmp_path / "b").check()


def test_a_series_in_two_folders_is_the_volume_of_the_folder_above(tmp_path):
    files = write_series(tmp_path / "ct" / "a", HU)
    (tmp_path / "ct" / "b").mkdir()
    files[1].rename(tmp_path / "ct" / "b" / "x.dcm")
    assert list_volumes(tmp_path) == [{"image": str(tmp_path / "ct")}]
    np.testing.assert_array_equal(load(tmp_path / "ct")[0], HU)


@pytest.mark.parametrize("reader", [SeriesReader, NoduleReader, VolumeReader, SliceFolderReader((1, 1, 1))])
@pytest.mark.parametrize("numbers", [[4, 3, 2, 1], [1, 1, 1, 1], None])
def test_convention_a_series_is_columns_rows_slices_in_hu_with_an_affine_to_ras(tmp_path, reader, numbers):
    for file, number in zip(write_series(tmp_path, HU), numbers or (), strict=False):
        change(file, lambda dataset, number=number: setattr(dataset, "InstanceNumber", number))
    image = load(tmp_path, reader)
    np.testing.assert_array_equal(image[0], HU)
    np.testing.assert_allclose(image.affine, [[-0.7, 0, 0, 20], [0, -0.6, 0, 10], [0, 0, 2.5, -100], [0, 0, 0, 1]])
    assert image.meta["filename_or_obj"] == str(tmp_path)


def test_the_volume_reader_reads_nifti_too(tmp_path):
    nib.save(nib.Nifti1Image(HU.astype(np.int16), np.diag([-0.8, -0.5, 2.5, 1])), tmp_path / "ct.nii.gz")
    image = load(tmp_path / "ct.nii.gz", VolumeReader)
    np.testing.assert_array_equal(image[0], HU)
    np.testing.assert_allclose(image.affine.numpy(), np.diag([-0.8, -0.5, 2.5, 1]))


def test_a_folder_without_a_series_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no DICOM series of CT or MR in it or below it"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="/absent: no such folder; expected one with DICOM files"):
        load(tmp_path / "absent")


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


def test_mr_is_read_as_floats_and_passed_over_where_only_ct_is_asked_for(tmp_path):
    fields = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}
    write_series(tmp_path, HU, RescaleSlope=None, RescaleIntercept=None, **fields)
    assert find_series(tmp_path, modalities=("CT",)).counts == {"MR": 4}
    volume = only(tmp_path).read()
    assert volume.dtype == np.float32
    assert np.array_equal(volume, HU + 1024)


def test_padding_of_ct_is_air(tmp_path):
    hu = np.where(HU < -50, -1500, HU)
    write_series(tmp_path, hu + 1024, RescaleIntercept=-1024 - 1024, PixelPaddingValue=548)
    assert np.array_equal(only(tmp_path).read(), np.where(HU < -50, -1024, HU))


@pytest.mark.parametrize("intercept", [50000, -9024])
def test_values_beyond_those_of_ct_are_refused(tmp_path, intercept):
    write_series(tmp_path, HU, RescaleIntercept=intercept)
    with pytest.raises(
        ValueError, match=r"a\d\d\d\.dcm: values up to -?\d+, which no CT has in HU; this is an integer"
    ):
        only(tmp_path).read()


def test_two_series_in_a_folder_are_kept_apart_and_that_is_said(tmp_path):
    write_series(tmp_path, HU, name="a")
    write_series(tmp_path, HU + 1, name="b")
    found = find_series(tmp_path).series
    assert [series.uid for series in found] == sorted(uid("LIDC-IDRI-0001", name) for name in "ab")
    for series in found:
        assert series.notes == (f"{tmp_path}/.: holds 2 series, which are kept apart by their uid".replace("/.", ""),)
        assert np.array_equal(series.read(), HU + (series.uid != SHORT))


def test_series_of_several_patients_are_sorted_by_patient(tmp_path):
    for patient in ("LIDC-IDRI-0003", "LIDC-IDRI-0001", "LIDC-IDRI-0002"):
        write_series(tmp_path / patient[::-1], HU, patient=patient)
    assert [s.patient_id[-1] for s in find_series(tmp_path).series] == ["1", "2", "3"]


def test_what_is_no_slice_is_skipped_and_counted_by_its_kind(tmp_path):
    write_series(tmp_path, HU)
    (tmp_path / "notes.xml").write_text("<LidcReadMessage/>")
    (tmp_path / ".hidden").write_text("hidden files are passed over")
    kinds = {"SR": "88.33", "SEG": "66.4", "RTSTRUCT": "481.3"}
    for name, end in kinds.items():
        write_slice(tmp_path / f"{name}.dcm", Modality=name, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{end}")
    for number, name in enumerate(("DX", "CR", "DX")):
        write_slice(tmp_path / f"x{number}.dcm", np.zeros((9, 9), np.uint16), Modality=name, SOPClassUID="1.2.3")
    scout = {"SeriesInstanceUID": SHORT, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    write_slice(tmp_path / "scout.dcm", np.zeros((9, 9), np.uint16), **scout)
    write_slice(tmp_path / "DICOMDIR", SOPClassUID="1.2.840.10008.1.3.10", Modality=None)
    found = find_series(tmp_path)
    assert found.counts == {
        **{"CR": 1, "DX": 2, "RTSTRUCT": 1, "SEG": 1, "SR": 1},
        **{"DICOMDIR": 1, "localizer": 1, "not DICOM": 1},
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


def test_of_two_slices_at_one_place_that_with_the_lower_instance_number_is_kept(tmp_path):
    hu = np.arange(5) * np.ones((6, 5, 1), int)
    write_series(tmp_path, hu, places=[0, 2.5, 5, 5, 7.5])
    series = only(tmp_path)
    with pytest.raises(
        ValueError, match=r"has slices at the same place, 1 too many, the first .*\.dcm at -95 mm; the one of"
    ):
        series.check()
    assert series.read(irregular=True)[0, 0].tolist() == [0, 1, 2, 4]


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


# What is wrong with a file


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
    first, second = find_series(tmp_path).series
    with pytest.raises(ValueError, match=rf"^{re.escape(str(files[3]))}: ({reason}).*; copy or download it again$"):
        first.read(irregular=True)
    second.check()


def write_like(file, **fields):
    shape = np.zeros((5, 6), np.uint16)
    given = {"SeriesInstanceUID": SHORT, "PatientID": "LIDC-IDRI-0001", "ImageOrientationPatient": list(AXIAL)}
    given |= {"ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1], **fields}
    write_slice(file, shape, **given)


def test_a_damaged_file_of_no_series_is_listed_apart(tmp_path):
    write_series(tmp_path / "x", HU)
    (tmp_path / "y").mkdir()
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / "y" / name).touch()
    found = find_series(tmp_path)
    assert found.damaged == (
        f"{tmp_path}/y/a.dcm: empty (0 bytes); copy or download it again (and 1 more damaged files)",
    )
    assert found.series[0].errors == ()


def test_pixels_that_cannot_be_decoded_are_named(tmp_path):
    files = write_series(tmp_path, HU)
    fields = {"ImagePositionPatient": [-20, -10, -97.5], "PixelSpacing": [0.6, 0.7], "RescaleSlope": 1}
    pixels = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\x04\0\0\0abcd"
    write_like(files[1], TransferSyntaxUID=JPEG2000Lossless, PixelData=pixels, RescaleIntercept=0, **fields)
    with pytest.raises(ValueError, match=r"a\d\d\d\.dcm: its pixels cannot be decoded \(.*; copy or download it again"):
        only(tmp_path).read()


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path):
    write_series(tmp_path / "x", HU)
    (tmp_path / "x" / "again").symlink_to(tmp_path)
    assert only(tmp_path).notes == ()


# Other forms of a series


def test_a_file_of_many_frames_is_one_volume_with_the_values_and_places_of_each_frame(tmp_path):
    hu = np.arange(6 * 5 * 4).reshape(6, 5, 4) * 12 - 1024  # divisible by the slopes 1 to 4
    places = [5.0, 0.0, 7.5, 2.5]
    write_frames(tmp_path / "ct" / "IM1", hu, places=places)
    for asked in (tmp_path / "ct", tmp_path / "ct" / "IM1"):
        image = load(asked)
        np.testing.assert_array_equal(image[0], hu[..., np.argsort(places)])
        np.testing.assert_allclose(image.affine, [[-0.7, 0, 0, 20], [0, -0.6, 0, 10], [0, 0, 2.5, -100], [0, 0, 0, 1]])


def test_frames_that_are_no_stack_are_refused(tmp_path):
    write_frames(tmp_path / "IM1", HU, places=[0, 2.5, 2.5, 5])
    with pytest.raises(ValueError, match=r"has slices at the same place, 1 too many, the first .*IM1 at -97\.5 mm"):
        load(tmp_path)
    write_frames(tmp_path / "IM1", HU, NumberOfFrames=3)
    with pytest.raises(ValueError, match="IM1: has 3 frames, of which its header describes 4"):
        load(tmp_path)


@pytest.mark.parametrize("element", ["TemporalPositionIdentifier", "AcquisitionNumber", "EchoTime"])
def test_points_of_time_of_one_series_are_volumes_of_their_own(tmp_path, element):
    for number in (2, 10):
        write_series(tmp_path, HU + number, name=f"a{number}", SeriesInstanceUID=SHORT, **{element: number})
    first, second = find_series(tmp_path).series
    assert (first.path.name, second.path.name) == (f"series-{SHORT}-1", f"series-{SHORT}-2")
    np.testing.assert_array_equal(load(first.path)[0], HU + 2)
    np.testing.assert_array_equal(load(second.path)[0], HU + 10)
    with pytest.raises(ValueError, match=r"holds 2 series .* choose one by --series"):
        load(tmp_path)


def bare(file):
    """Take the preamble and the meta information away, as some archives do."""
    dataset = dcmread(file)
    content = Dataset()
    content.update(dataset)
    content.save_as(file, implicit_vr=True, little_endian=True)


def test_files_without_preamble_are_read_and_text_is_not_taken_for_them(tmp_path):
    for file in write_series(tmp_path, HU):
        bare(file)
    (tmp_path / "notes").write_bytes(b"\x08\0 begins like a data set")
    (tmp_path / "README").write_text("no data set")
    np.testing.assert_array_equal(load(tmp_path)[0], HU)
    assert find_series(tmp_path).counts == {"not DICOM": 2}


def test_the_encoding_is_found_under_the_names_of_pydicom_2_too():
    names = {"file_meta": {}, "is_implicit_VR": False}
    assert dicom_headers.syntax_of(SimpleNamespace(**names, is_little_endian=True)) == ExplicitVRLittleEndian
    assert dicom_headers.syntax_of(SimpleNamespace(**names, is_little_endian=False)) == ExplicitVRBigEndian


def test_a_zip_is_read_as_the_folder_in_it_and_leaves_nothing_behind(tmp_path):
    write_series(tmp_path / "in" / "one", HU, SeriesNumber=1)
    write_series(tmp_path / "in" / "one", HU + 1, name="b", SeriesNumber=2)
    (tmp_path / "in" / "DICOMDIR.txt").write_text("a file beside")
    shutil.make_archive(tmp_path / "ct", "zip", tmp_path / "in")
    shutil.rmtree(tmp_path / "in")
    found = [case["image"] for case in list_volumes(tmp_path / "ct.zip")]
    assert found == [str(tmp_path / "ct.zip" / "one" / f"series-{number}") for number in (1, 2)]
    assert [int(load(path)[0].mean() - HU.mean()) for path in found] == [0, 1]
    assert [case["image"] for case in list_volumes(tmp_path)] == found
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct.zip"]


def test_a_zip_that_would_unpack_to_too_much_is_refused_before_it_is(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("out.dcm", bytes(5000))
    monkeypatch.setattr(dicom_headers, "LARGEST", 4999)
    with pytest.raises(ValueError, match=r"bomb\.zip: a file in it would unpack to 5,000 bytes; expected DICOM"):
        list_volumes(tmp_path / "bomb.zip")


def test_a_single_file_stands_for_its_series(tmp_path):
    files = write_series(tmp_path, HU, SeriesNumber=1)
    write_series(tmp_path, HU + 1, name="b", SeriesNumber=2)
    localizer(tmp_path)
    np.testing.assert_array_equal(load(files[2])[0], HU)
    assert list_volumes(files[2]) == [{"image": str(tmp_path / "series-1")}]
    with pytest.raises(ValueError, match=r"scout\.dcm: no image of a CT or MR series \(localizer\)"):
        list_volumes(tmp_path / "scout.dcm")


def test_each_header_is_read_once_until_a_file_changes(tmp_path, monkeypatch):
    read = []
    understand = dicom_headers._understand
    monkeypatch.setattr(dicom_headers, "_understand", lambda path, *rest: read.append(path) or understand(path, *rest))
    files = write_series(tmp_path, HU)
    (case,) = list_volumes(tmp_path)
    load(case["image"])
    load(case["image"])
    assert len(read) == len(files)
    change(files[1], lambda d: setattr(d, "RescaleIntercept", -1000))
    np.testing.assert_array_equal(load(case["image"])[0, ..., 1], HU[..., 1] + 24)


@pytest.mark.parametrize(
    ("stored", "fields"),
    [
        (np.int16(-32768), {}),
        (np.int16(-32768), {"PixelPaddingValue": -32768}),
        (np.int16(2000), {"PixelPaddingValue": 2000}),
        (np.int16(1990), {"PixelPaddingValue": 2000, "PixelPaddingRangeLimit": 1980}),
        (np.uint16(63536), {"PixelPaddingValue": 63536}),
    ],
)
def test_padding_is_air(tmp_path, stored, fields):
    pixels = np.full((5, 6), 1100, stored.dtype)
    pixels[1, 2] = stored
    for number in range(3):
        place = {"ImagePositionPatient": [0, 0, number], "SOPInstanceUID": uid(number)}
        rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelData": pixels.tobytes()}
        write_like(
            tmp_path / f"{number}.dcm", **place, **rescale, **fields, PixelRepresentation=int(stored.dtype == np.int16)
        )
    image = load(tmp_path)[0]
    assert image[2, 1].tolist() == [-1024] * 3
    assert (image == 76).sum() == 3 * 29


def test_series_of_several_patients_under_one_uid_are_refused_without_their_names(tmp_path):
    write_series(tmp_path, HU, patient="DOE", SeriesInstanceUID="1.2")
    write_series(tmp_path, HU, patient="ROE", name="b", origin=(-20, -10, -90), SeriesInstanceUID="1.2")
    with pytest.raises(ValueError, match=r"series 1\.2 mixes slices of several patients") as caught:
        load(tmp_path)
    assert "OE" not in str(caught.value).replace(str(tmp_path), "")


# In several processes


def test_many_files_are_read_by_several_processes_with_the_same_result(tmp_path, monkeypatch):
    write_series(tmp_path, HU)
    alone = dicom_headers.read_headers(tmp_path)
    assert [header.path for header in alone] == sorted(file.name for file in tmp_path.iterdir())
    monkeypatch.setattr(dicom_headers, "CHUNK", 1)
    assert dicom_headers.read_headers(tmp_path, mapper=partial(run_parallel, workers=2)) == alone
