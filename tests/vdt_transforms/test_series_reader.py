"""DICOM folders: the geometry, and what MONAI's reader would pass over in silence."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImaged
from nibabel.affines import apply_affine

from vdt_transforms import NoduleReader, SeriesReader, VolumeReader

pydicom = pytest.importorskip("pydicom")

SHAPE = (5, 4, 6)  # columns, rows, slices
SPACING = (0.8, 0.5, 2.5)  # of columns, rows and slices, in mm


def volume(seed=0):
    return np.random.default_rng(seed).integers(-1000, 400, SHAPE).astype(np.int16)


def write_slice(path, pixels, position, number, *, series="1.2.3", orientation=(1, 0, 0, 0, 1, 0), intercept=-1024):
    """Write one CT slice (columns, rows) in HU."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{series}.{number}"
    dataset.Modality, dataset.SeriesInstanceUID, dataset.InstanceNumber = "CT", series, number
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [float(x) for x in position], list(orientation)
    dataset.PixelSpacing = [SPACING[1], SPACING[0]]  # of rows, of columns
    dataset.Columns, dataset.Rows = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept
    dataset.PixelData = (pixels.T - intercept).astype(np.int16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, values=None, heights=None, numbers=None, **options):
    """Write a scan as slices, in an order of names that says nothing."""
    values = volume() if values is None else values
    heights = [-30 + SPACING[2] * k for k in range(values.shape[2])] if heights is None else heights
    numbers = range(1, len(heights) + 1) if numbers is None else numbers
    for k, (height, number) in enumerate(zip(heights, numbers, strict=True)):
        write_slice(folder / f"{(k * 7) % 11:02d}.dcm", values[..., k], (-20.0, 10.0, height), number, **options)
    return folder


def load(folder, reader="vdt_transforms.SeriesReader"):
    return LoadImaged("image", reader=reader, ensure_channel_first=True)({"image": str(folder)})["image"]


@pytest.mark.parametrize("reader", [SeriesReader, NoduleReader, VolumeReader])
def test_convention_a_series_is_columns_rows_slices_in_hu_with_an_affine_to_ras(tmp_path, reader):
    image = load(write_series(tmp_path), reader)
    np.testing.assert_array_equal(image[0], volume())
    np.testing.assert_allclose(image.affine, [[-0.8, 0, 0, 20], [0, -0.5, 0, -10], [0, 0, 2.5, -30], [0, 0, 0, 1]])


@pytest.mark.parametrize("numbers", [[6, 5, 4, 3, 2, 1], [3, 1, 6, 2, 5, 4], [1, 1, 1, 1, 1, 1]])
def test_slices_lie_in_the_order_of_their_positions_whatever_their_numbers(tmp_path, numbers):
    image = load(write_series(tmp_path, numbers=numbers))
    np.testing.assert_array_equal(image[0], volume())
    np.testing.assert_allclose(image.affine.numpy()[:3, 2], [0, 0, 2.5])


def test_a_tilted_series_keeps_each_voxel_at_its_place(tmp_path):
    row, column = np.array([0, 1, 0]), np.array([0.0, 0.0, -1.0])
    normal = np.cross(row, column)
    for k in range(SHAPE[2]):
        position = (3, 4, 5) + 2.5 * k * normal
        write_slice(tmp_path / f"{k}.dcm", volume()[..., k], position, 9 - k, orientation=[*row, *column])
    image = load(tmp_path)
    for voxel in ((0, 0, 0), (4, 1, 2), (2, 3, 5)):
        lps = (3, 4, 5) + voxel[0] * 0.8 * row + voxel[1] * 0.5 * column + voxel[2] * 2.5 * normal
        np.testing.assert_allclose(apply_affine(image.affine.numpy(), voxel), lps * (-1, -1, 1), atol=1e-9)
    np.testing.assert_array_equal(image[0], volume())


def test_distances_rounded_to_a_tenth_of_a_millimetre_are_equal(tmp_path):
    image = load(write_series(tmp_path, heights=[0, 0.6, 1.2, 1.9, 2.5, 3.1]))
    np.testing.assert_allclose(image.affine.numpy()[:3, 2], [0, 0, 0.62])


def test_the_volume_reader_reads_nifti_too(tmp_path):
    nib.save(nib.Nifti1Image(volume(), np.diag([-0.8, -0.5, 2.5, 1])), tmp_path / "ct.nii.gz")
    image = load(tmp_path / "ct.nii.gz", VolumeReader)
    np.testing.assert_array_equal(image[0], volume())
    np.testing.assert_allclose(image.affine.numpy(), np.diag([-0.8, -0.5, 2.5, 1]))


def test_files_that_are_no_images_and_folders_above_are_passed_over(tmp_path):
    write_series(tmp_path / "study" / "series")
    (tmp_path / "LICENSE").write_text("CC BY")
    (tmp_path / "study" / "annotations.xml").write_text("<xml/>")
    np.testing.assert_array_equal(load(tmp_path)[0], volume())


def test_a_series_of_one_slice_is_a_volume_of_one(tmp_path):
    image = load(write_series(tmp_path, volume()[..., :1]))
    assert image.shape[1:3] == SHAPE[:2]


def spoil_nothing(folder):
    pass


def cut_short(folder):
    (folder / "00.dcm").write_bytes((folder / "00.dcm").read_bytes()[:-20])


@pytest.mark.parametrize(
    ("options", "spoil", "sentence"),
    [
        (
            {"heights": [0, 2.5, 5, 10, 12.5, 15]},
            spoil_nothing,
            r"6 slices are not at equal distances \(2\.50 mm\): 1 are",
        ),
        ({"heights": [0, 2.5, 5, 10, 12.5, 15]}, spoil_nothing, r"the first at 5\.00 mm \(then 10\.00, 5\.00 mm on\)"),
        ({"heights": [0, 2.5, 5, 5, 7.5, 10]}, spoil_nothing, r"the first at 5\.00 mm \(twice\)"),
        ({}, cut_short, "its slices cannot be read|damaged or cut short"),
        (
            {},
            lambda folder: write_series(folder / "other", series="1.2.9"),
            r"holds 2 series \(1\.2\.3 with 6, 1\.2\.9 with 6 images\); give the folder of one",
        ),
        (
            {},
            lambda folder: write_slice(folder / "x.dcm", np.zeros((3, 3)), (-20, 10, 100), 7),
            "its slices differ in Rows: 3, 4",
        ),
    ],
)
def test_a_spoilt_series_is_refused_in_one_sentence(tmp_path, options, spoil, sentence):
    spoil(write_series(tmp_path, **options))
    with pytest.raises(ValueError, match=sentence) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no DICOM image with a position in it or below it"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "absent")
