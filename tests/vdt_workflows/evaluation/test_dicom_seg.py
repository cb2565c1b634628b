"""DICOM SEG: what is written, read back by highdicom and pydicom, against the NIfTI of the same labels."""

import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged, SaveImaged
from nibabel.affines import apply_affine

from tests.makers.dicom import PERSONAL, uid, write_series
from vdt_transforms.dicom_folders import find_series
from vdt_workflows.drawing import colour
from vdt_workflows.evaluation.dicom_seg import SaveDicomSegd, code_label, writes_dicom

pytest.importorskip("highdicom")

import highdicom
from pydicom import dcmread

NAMES = ["background", "right kidney", "left kidney", "something else"]
SHAPE = (9, 7, 5)  # columns, rows, slices
TILT = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)  # both directions leave every axis
SERIES = {
    "axial": {},
    "reversed": {"places": np.arange(5) * -2.5},  # instance numbers from the head to the feet
    "oblique": {"orientation": TILT},
    "oblique and reversed": {"orientation": TILT, "places": np.arange(5) * -2.5},
}


def make_series(folder, **options):
    fields = {"StudyInstanceUID": uid("study"), "FrameOfReferenceUID": uid("frame"), **options}
    return write_series(folder, shape=SHAPE, **fields)


def segment(folder, out):
    """Draw random labels on a series as MONAI reads it, and write them both ways."""
    image = LoadImaged("image", ensure_channel_first=True)({"image": str(folder)})["image"]
    labels = np.random.default_rng(1).integers(0, 3, image.shape)
    labels[:, :, :, 2] = 0  # a slice without any
    pred = MetaTensor(torch.as_tensor(labels), meta=image.meta)
    saver = SaveImaged("pred", output_dir=str(out), output_postfix="seg", output_dtype=np.uint8, resample=False,
                       separate_folder=False, print_log=False)  # fmt: skip
    SaveDicomSegd("pred", out, NAMES)(saver({"pred": pred}))
    return highdicom.seg.segread(out / f"{folder.name}_seg.dcm")


def paint(segmentation, nifti):
    """Put the frames' pixels into a volume on the NIfTI's grid by nothing but the positions that the file states."""
    painted = np.zeros(nifti.shape, np.uint8)
    orientation = np.reshape(
        segmentation.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)
    ).astype(float)
    spacing = np.array(segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing, float)
    rows, columns = np.mgrid[: segmentation.Rows, : segmentation.Columns]
    for pixels, frame in zip(segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        world = start + columns[..., None] * orientation[0] * spacing[1] + rows[..., None] * orientation[1] * spacing[0]
        voxels = apply_affine(np.linalg.inv(nifti.affine), world * (-1, -1, 1))
        np.testing.assert_allclose(voxels, voxels.round(), atol=1e-3)
        inside = tuple(voxels[pixels > 0].round().astype(int).T)
        assert not painted[inside].any()  # no voxel twice
        painted[inside] = number
    return painted


@pytest.mark.parametrize("kind", SERIES)
def test_each_voxel_lies_where_the_nifti_has_it(tmp_path, kind):
    make_series(tmp_path / "ct", **SERIES[kind])
    written = segment(tmp_path / "ct", tmp_path)
    nifti = nib.load(tmp_path / "ct_seg.nii.gz")
    assert np.asarray(nifti.dataobj).any()
    np.testing.assert_array_equal(paint(written, nifti), np.asarray(nifti.dataobj))


@pytest.mark.parametrize("kind", SERIES)
def test_each_frame_refers_to_the_image_it_lies_on(tmp_path, kind):
    make_series(tmp_path / "ct", **SERIES[kind])
    written = segment(tmp_path / "ct", tmp_path)
    (series,) = find_series(tmp_path / "ct").series
    sources = {str(image.SOPInstanceUID): image for image in (dcmread(file) for file in series.files)}
    assert written.FrameOfReferenceUID == uid("frame")
    assert written.StudyInstanceUID == uid("study")
    assert written.ReferencedSeriesSequence[0].SeriesInstanceUID == series.uid
    referenced = written.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced} == set(sources)
    assert written.NumberOfFrames == 2 * 4  # two labels in four of five slices
    for frame in written.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        position = sources[image.ReferencedSOPInstanceUID].ImagePositionPatient
        np.testing.assert_allclose(frame.PlanePositionSequence[0].ImagePositionPatient, position, atol=1e-4)


def test_highdicom_reads_the_same_volume_back(tmp_path):
    make_series(tmp_path / "ct")
    written = segment(tmp_path / "ct", tmp_path)
    (series,) = find_series(tmp_path / "ct").series
    uids = [str(dcmread(file).SOPInstanceUID) for file in series.files]
    pixels = written.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=False,
                                                   segment_numbers=[1, 2])  # fmt: skip
    nifti = np.asarray(nib.load(tmp_path / "ct_seg.nii.gz").dataobj)
    np.testing.assert_array_equal(pixels.transpose(2, 1, 0), nifti)


def test_segments_have_the_names_codes_and_colours_of_the_labels(tmp_path):
    make_series(tmp_path / "ct")
    written = segment(tmp_path / "ct", tmp_path)
    assert [item.SegmentLabel for item in written.SegmentSequence] == NAMES[1:]
    lab = [item.RecommendedDisplayCIELabValue for item in written.SegmentSequence]
    rgb = [highdicom.color.CIELabColor.from_dicom_value(tuple(value)).to_rgb() for value in lab]
    np.testing.assert_allclose(rgb, [colour(value) for value in (1, 2, 3)], atol=2)
    kidney = written.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    assert (kidney.CodeValue, kidney.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    other = written.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0]
    assert (other.CodingSchemeDesignator, other.CodeMeaning) == ("99VDT", "something else")


@pytest.mark.parametrize(
    ("name", "category", "kind", "side"),
    [
        ("spleen", "Anatomical Structure", "Spleen", None),
        ("left adrenal gland", "Anatomical Structure", "Adrenal gland", "Left"),
        ("Oesophagus", "Anatomical Structure", "Esophagus", None),
        ("liver tumour", "Morphologically Abnormal Structure", "Neoplasm", None),
        ("nodule", "Morphologically Abnormal Structure", "Nodule", None),
        ("anterior", "Anatomical Structure", "anterior", None),
    ],
)
def test_labels_are_coded_by_their_names(name, category, kind, side):
    given = code_label(name)
    assert [code and code.meaning for code in given] == [category, kind, side]


def test_only_the_patient_id_of_the_patients_data_is_copied(tmp_path):
    make_series(tmp_path / "ct", patient="P-17", **PERSONAL)
    segment(tmp_path / "ct", tmp_path)
    content = (tmp_path / "ct_seg.dcm").read_bytes()
    assert b"P-17" in content
    assert [text for text in PERSONAL.values() if text.encode() in content] == []


def test_images_in_a_zip_archive_are_referred_to(tmp_path):
    make_series(tmp_path / "ct")
    shutil.make_archive(str(tmp_path / "ct"), "zip", tmp_path / "ct")
    image = LoadImaged("image", reader="vdt_transforms.VolumeReader", ensure_channel_first=True)(
        {"image": str(tmp_path / "ct.zip")}
    )["image"]
    SaveDicomSegd("pred", tmp_path, NAMES)({"pred": MetaTensor(torch.ones(image.shape), meta=image.meta)})
    assert highdicom.seg.segread(tmp_path / "ct_seg.dcm").NumberOfFrames == SHAPE[2]


def test_labels_of_nothing_are_written(tmp_path):
    make_series(tmp_path / "ct")
    image = LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "ct")})["image"]
    SaveDicomSegd("pred", tmp_path, NAMES)({"pred": MetaTensor(torch.zeros(image.shape), meta=image.meta)})
    assert not highdicom.seg.segread(tmp_path / "ct_seg.dcm").pixel_array.any()


def test_a_nifti_has_no_series_to_refer_to(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / "case.nii.gz")
    image = LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "case.nii.gz")})["image"]
    with pytest.raises(ValueError, match=r"case\.nii\.gz: no DICOM series, .*; use output_format: nifti$"):
        SaveDicomSegd("pred", tmp_path, NAMES)({"pred": image})


def test_labels_on_another_grid_are_refused(tmp_path):
    make_series(tmp_path / "ct")
    image = LoadImaged("image", ensure_channel_first=True)({"image": str(tmp_path / "ct")})["image"]
    with pytest.raises(ValueError, match=r"ct: the labels do not lie on the pixels of its 5 images of 7 x 9"):
        SaveDicomSegd("pred", tmp_path, NAMES)({"pred": image[:, 1:]})


@pytest.mark.parametrize("name", ["StudyInstanceUID", "FrameOfReferenceUID", "PatientID"])
def test_a_source_without_an_identifier_is_named(tmp_path, name):
    options = {"patient": None} if name == "PatientID" else {name: None}
    make_series(tmp_path / "ct", **options)
    with pytest.raises(ValueError, match=rf"a\d\d\d\.dcm: has no {name}, which a DICOM result of it must have"):
        segment(tmp_path / "ct", tmp_path)


def test_without_highdicom_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(ImportError, match="needs highdicom; install it with: pip install highdicom"):
        SaveDicomSegd("pred", tmp_path, NAMES)


def test_an_unknown_output_format_is_refused():
    assert [writes_dicom("nifti"), writes_dicom("dicom_seg")] == [False, True]
    with pytest.raises(ValueError, match="output_format must be 'nifti' or 'dicom_seg', got 'dicom'"):
        writes_dicom("dicom")
