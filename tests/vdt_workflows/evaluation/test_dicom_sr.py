"""DICOM Structured Reports: what is written, read back by highdicom, against the JSON of the same findings."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, Orientationd

from tests.makers.dicom import PERSONAL, uid, write_frames, write_series
from vdt_transforms import SliceFolderReader
from vdt_transforms.dicom_folders import find_one_series
from vdt_workflows.evaluation.classification import SaveMalignancy
from vdt_workflows.evaluation.dicom_sr import Finding, place_on_images
from vdt_workflows.evaluation.outputs import SaveLesions

pytest.importorskip("highdicom")

from highdicom.sr import srread
from pydicom import dcmread
from pydicom.sr.codedict import codes

SHAPE = (9, 7, 5)  # columns, rows, slices
UIDS = {"StudyInstanceUID": uid("study"), "FrameOfReferenceUID": uid("frame")}
SERIES = {
    "axial": {},
    "reversed": {"places": np.arange(5) * -2.5},  # instance numbers from the head to the feet
    "oblique": {"orientation": (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)},  # both directions leave every axis
}
BOXES = [[0.5, 0.5, 0.5, 4.5, 2.5, 3.5], [1.5, 1.5, -0.5, 5.5, 4.5, 0.5]]  # in voxels of the turned volume


def load(source):
    turn = Orientationd("image", axcodes="LPI", labels=None)
    reader = LoadImaged("image", reader=SliceFolderReader(spacing=(1, 1, 1)), ensure_channel_first=True)
    return Compose([reader, turn])({"image": str(source)})["image"]


def report_lesions(source, out, boxes=BOXES):
    """Write lesions of which the first has the score 0.9 and the last 0.25."""
    data = {"image": load(source), "box": torch.tensor(boxes).reshape(-1, 6), "label": torch.zeros(len(boxes)).long()}
    scores = torch.linspace(0.9, 0.25, len(boxes))
    SaveLesions(str(out), output_format="dicom_sr")({**data, "label_scores": scores})
    return srread(out / f"{source.name.partition('.')[0]}_sr.dcm")


def report_nodules(source, out, places):
    engine = Engine(lambda engine, batch: None)
    SaveMalignancy(str(out), ["benign", "malignant"], output_format="dicom_sr").attach(engine)
    image = load(source)
    crop = MetaTensor(torch.zeros(1, 4, 4, 4), affine=np.eye(4), meta=image.meta)
    engine.state.batch = [{"image": crop, "position": np.array(place), "nodule_id": str(i)} for i, place in
                          enumerate(places, 1)]  # fmt: skip
    scores = np.linspace(0.9, 0.2, len(places))
    engine.state.output = [{"pred": torch.tensor([1 - score, score])} for score in scores]
    engine.fire_event(Events.ITERATION_COMPLETED)
    engine.fire_event(Events.COMPLETED)
    return srread(out / f"{source.name}_sr.dcm")


def headers_of(source):
    return {str(image.SOPInstanceUID): image for image in (dcmread(file) for file in source.iterdir())}


def to_world(header, points):
    """Bring columns and rows of DICOM's regions, (0, 0) the outer corner of the first pixel, to LPS mm."""
    along, down = np.reshape(header.ImageOrientationPatient, (2, 3)).astype(float)
    columns, rows = (np.asarray(points, float) - 0.5).T[..., None]
    start = np.array(header.ImagePositionPatient, float)
    return start + columns * along * header.PixelSpacing[1] + rows * down * header.PixelSpacing[0]


@pytest.mark.parametrize("kind", SERIES)
def test_rectangles_on_the_images_they_refer_to_are_the_lesions_of_the_json(tmp_path, kind):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS, **SERIES[kind])
    written = report_lesions(tmp_path / "ct", tmp_path)
    headers = headers_of(tmp_path / "ct")
    lesions = json.loads((tmp_path / "ct_lesions.json").read_text())["lesions"]
    groups = written.content.get_volumetric_roi_measurement_groups()
    assert len(groups) == len(lesions) == 2
    for group, lesion in zip(groups, lesions, strict=True):
        axes, size = np.array(lesion["directions_ras"]) * (-1, -1, 1), np.array(lesion["size_mm"])
        through = int(np.abs(axes @ np.cross(*find_one_series(tmp_path / "ct").orientation)).argmax())
        within = [axis for axis in range(3) if axis != through]
        depths = []
        for region in group.roi:
            header = headers[region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID]
            corners = to_world(header, region.value)
            np.testing.assert_array_equal(corners[0], corners[-1])
            apart = (corners - lesion["center_lps_mm"]) @ axes.T
            np.testing.assert_allclose(np.abs(apart[:, within]), np.tile(size[within], (5, 1)) / 2, atol=2e-3)
            assert len({tuple(corner) for corner in np.sign(apart[:, within])}) == 4
            depths.append(apart[:, through].mean())
        count = round(size[through] / 2.5)
        np.testing.assert_allclose(sorted(depths), (np.arange(count) - (count - 1) / 2) * 2.5, atol=2e-3)


def test_scores_names_and_codes_are_those_of_the_findings(tmp_path):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS)
    written = report_lesions(tmp_path / "ct", tmp_path)
    assert written.SOPClassUID.name == "Comprehensive SR Storage"
    assert written.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    assert written.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurement Report"
    groups = written.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["lesion 1", "lesion 2"]
    assert len({group.tracking_uid for group in groups}) == 2
    assert {group.finding_type for group in groups} == {codes.SCT.Lesion}
    for group, score in zip(groups, (90, 25), strict=True):
        (measurement,) = group.get_measurements()
        assert (measurement.name, measurement.unit) == (codes.DCM.CertaintyOfFinding, codes.UCUM.Percent)
        assert measurement.value == pytest.approx(score)


def test_a_report_lists_the_images_of_its_series_as_evidence_in_the_study_of_the_images(tmp_path):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS)
    written = report_lesions(tmp_path / "ct", tmp_path)
    assert (written.StudyInstanceUID, written.PatientID) == (uid("study"), "LIDC-IDRI-0001")
    series = [
        one for study in written.CurrentRequestedProcedureEvidenceSequence for one in study.ReferencedSeriesSequence
    ]
    assert {one.SeriesInstanceUID for one in series} == {find_one_series(tmp_path / "ct").uid}
    images = [image.ReferencedSOPInstanceUID for one in series for image in one.ReferencedSOPSequence]
    assert sorted(images) == sorted(headers_of(tmp_path / "ct"))


def test_nothing_found_is_reported_as_no_lesions(tmp_path):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS)
    written = report_lesions(tmp_path / "ct", tmp_path, [])
    assert written.content.get_volumetric_roi_measurement_groups() == []
    (group,) = written.content.get_image_measurement_groups()
    (count,) = group.get_measurements()
    assert (count.name, count.value) == (codes.SCT.NumberOfLesions, 0)


@pytest.mark.parametrize("kind", SERIES)
def test_nodules_are_points_on_the_nearest_image_with_malignancy_and_class(tmp_path, kind):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS, **SERIES[kind])
    headers, affine = headers_of(tmp_path / "ct"), find_one_series(tmp_path / "ct").affine
    places = [(affine @ [3.25, 4, 2, 1])[:3], (affine @ [6, 1.5, 3.3, 1])[:3]]  # RAS
    written = report_nodules(tmp_path / "ct", tmp_path, places)
    groups = written.content.get_planar_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["nodule 1", "nodule 2"]
    for group, place, apart in zip(groups, places, (0, 0.3 * 2.5), strict=True):
        region = group.roi
        assert region.graphic_type.value == "POINT"
        header = headers[region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID]
        (point,) = to_world(header, region.value)
        normal = np.cross(*np.reshape(header.ImageOrientationPatient, (2, 3)))
        off = point - place * (-1, -1, 1)
        assert abs(off @ normal) == pytest.approx(apart, abs=1e-3)
        np.testing.assert_allclose(off - off @ normal * normal, 0, atol=1e-3)
        assert group.finding_type == codes.SCT.Nodule
        assert group.finding_sites[0].value == codes.SCT.Lung
    for group, value, called in zip(groups, (90, 20), (codes.SCT.Malignant, codes.SCT.Benign), strict=True):
        (measurement,) = group.get_measurements()
        assert (measurement.name, measurement.unit) == (codes.DCM.ProbabilityOfCancer, codes.UCUM.Percent)
        assert measurement.value == pytest.approx(value)
        (evaluation,) = group.get_qualitative_evaluations()
        assert evaluation.value == called


def test_frames_of_one_file_are_referred_to_by_their_number(tmp_path):
    (tmp_path / "ct").mkdir()
    hu = np.random.default_rng(0).integers(0, 500, SHAPE)
    write_frames(tmp_path / "ct" / "all.dcm", hu, places=np.arange(5) * -2.5, PatientID="P-1", **UIDS)
    lowest = find_one_series(tmp_path / "ct").affine[:3, 3]
    (group,) = report_nodules(tmp_path / "ct", tmp_path, [lowest]).content.get_planar_roi_measurement_groups()
    (reference,) = group.roi.ContentSequence[0].ReferencedSOPSequence
    assert reference.ReferencedFrameNumber == 5


def test_only_the_patient_id_of_the_patients_data_is_copied(tmp_path):
    write_series(tmp_path / "ct", shape=SHAPE, patient="P-17", **UIDS, **PERSONAL)
    report_lesions(tmp_path / "ct", tmp_path)
    content = (tmp_path / "ct_sr.dcm").read_bytes()
    assert b"P-17" in content
    assert [text for text in PERSONAL.values() if text.encode() in content] == []


def test_a_nifti_has_no_series_to_refer_to(tmp_path):
    image = MetaTensor(torch.zeros(1, 3, 3, 3), meta={"filename_or_obj": "/somewhere/case.nii.gz"})
    data = {"image": image, "box": torch.zeros(0, 6), "label": [], "label_scores": []}
    with pytest.raises(ValueError, match=r"case\.nii\.gz: no DICOM series, .*; use output_format: json$"):
        SaveLesions(str(tmp_path), output_format="dicom_sr")(data)


def test_a_finding_outside_of_the_images_is_refused(tmp_path):
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS)
    series = find_one_series(tmp_path / "ct")
    place = (series.affine @ [3, 3, 7, 1])[None, :3]
    with pytest.raises(ValueError, match="ct: nodule 1 lies outside of its 5 images of 7 x 9"):
        place_on_images(Finding("nodule 1", "nodule", 0.5, place), series)


def test_an_unknown_output_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="output_format must be 'json' or 'dicom_sr', got 'dicom_seg'"):
        SaveLesions(str(tmp_path), output_format="dicom_seg")


@pytest.mark.parametrize("boxes", [BOXES, []], ids=["lesions", "nothing"])
def test_dcmtk_reads_the_report_without_complaint(tmp_path, boxes):
    if not shutil.which("dsrdump"):
        pytest.skip("needs dsrdump (Debian: dcmtk)")
    write_series(tmp_path / "ct", shape=SHAPE, **UIDS)
    report_lesions(tmp_path / "ct", tmp_path, boxes)
    words = ["dsrdump", "--verbose", "--processing-details", str(tmp_path / "ct_sr.dcm")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("W:", "E:"))] == []
    assert "Imaging Measurement Report" in done.stdout
