import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch
from monai.transforms import Compose, LoadImage, ScaleIntensityRange
from torch import nn

from networks import VolumeLesionDetector
from networks.volume_detector import link_boxes
from tests.makers.deeplesion import write_series
from tests.makers.dicom import write_series as write_dicom
from tests.support.bundle_runs import ROOT, config_files
from vdt_transforms import RandResizeStack, SliceFolderReader, SliceStackReader
from vdt_workflows.data.volumes import list_scans
from vdt_workflows.evaluation.outputs import SaveLesions

BUNDLE = ROOT / "bundles" / "deeplesion_lesion_detection"


class Bright(nn.Module):
    """Stands in for a detector: one box around what is bright in the centre slice, its score the brightness."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, stacks):
        self.calls += 1
        rows = torch.zeros(len(stacks), 100, 6)
        for row, stack in zip(rows, stacks, strict=True):
            centre = stack[len(stack) // 2]
            x, y = torch.where(centre > 1)
            if len(x):
                row[0] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1, centre.max() / 3, 1])
        return rows


def volume(values, spacing=(0.8, 0.7, 2.5)):
    affine = torch.diag(torch.tensor([-spacing[0], -spacing[1], -spacing[2], 1.0]))
    return MetaTensor(torch.as_tensor(values, dtype=torch.float32)[None, None], affine=affine)


# Whole volumes


def test_a_lesion_is_one_box_of_the_whole_volume_in_its_voxels():
    values = np.full((40, 24, 9), -500.0)
    values[10:20, 5:12, 3:6] = 1000
    values[30:34, 15:20, 7] = 900
    for size in (0, 80):
        (found,) = VolumeLesionDetector(Bright(), size=size)(volume(values), use_inferer=True)
        assert found["label"].tolist() == [0, 0]
        assert (found["label_scores"].diff() < 0).all()
        np.testing.assert_allclose(found["box"], [[10, 5, 2.5, 20, 12, 5.5], [30, 15, 6.5, 34, 20, 7.5]], atol=0.51)


def test_every_slice_is_a_key_slice_once_in_batches():
    network = Bright()
    detector = VolumeLesionDetector(network, batch=4, size=0)
    detector(volume(np.zeros((8, 8, 10))))
    assert network.calls == 3


def test_two_volumes_of_a_batch_and_none_found():
    values = np.full((2, 1, 8, 8, 5), -500.0)
    values[1, 0, 2:5, 2:5, 2] = 1000
    batch = MetaTensor(torch.as_tensor(values, dtype=torch.float32), affine=torch.eye(4))
    found = VolumeLesionDetector(Bright(), size=0)(batch)
    assert [len(f["box"]) for f in found] == [0, 1]
    assert found[0]["box"].shape == (0, 6)


def test_network_is_settable_and_low_scores_are_left_out():
    values = np.full((8, 8, 5), -500.0)
    values[2:5, 2:5, 2] = 1000
    detector = VolumeLesionDetector(nn.Identity(), size=0, least_score=0.9)
    detector.network = Bright()
    assert len(detector(volume(values))[0]["box"]) == 0
    detector.least_score = 0.1
    assert len(detector(volume(values))[0]["box"]) == 1


def test_plain_tensor_is_refused_as_it_has_no_distance():
    with pytest.raises(ValueError, match="must be MetaTensors, whose affine holds the distance between slices"):
        VolumeLesionDetector(Bright())(torch.zeros(1, 1, 8, 8, 5))


@pytest.mark.parametrize(("interval", "distance"), [(1.0, 2.5), (2.0, 2.5), (5.0, 2.5), (2.0, 0)])
def test_stacks_of_a_volume_are_those_that_training_reads_from_slices(tmp_path, interval, distance):
    random = np.random.default_rng(0)
    slices = {n: np.rint(random.normal(0, 800, (20, 28))) for n in range(1, 15)}
    write_series(tmp_path / "scan", slices, slices)
    scan = LoadImage(reader=SliceFolderReader([0.8, 0.8, interval]))(tmp_path / "scan")
    assert scan.shape == (28, 20, 14)
    assert scan.pixdim.tolist() == pytest.approx([0.8, 0.8, interval])
    training = Compose(
        [ScaleIntensityRange(-1024, 1050, -2.118, 2.249, clip=True), RandResizeStack(42)],
    )
    detector, plain = VolumeLesionDetector(nn.Identity(), size=42, distance=distance), torch.as_tensor(scan)
    for number in (1, 7, 14):
        wanted = training(SliceStackReader(distance=distance)(tmp_path / "scan" / f"{number:03d}.png", interval))
        torch.testing.assert_close(
            detector.stack(plain, number - 1, interval), torch.as_tensor(wanted), atol=1e-5, rtol=0
        )


# Boxes through slices


def linked(boxes, scores, slices, **more):
    found, best = link_boxes(torch.tensor(boxes).float(), torch.tensor(scores), torch.tensor(slices), **more)
    return found.tolist(), [round(s, 4) for s in best.tolist()]


def test_boxes_of_neighbouring_slices_are_one_lesion_weighted_by_score():
    boxes = [[0, 0, 10, 10], [2, 0, 12, 10], [2, 0, 12, 10]]
    found, best = linked(boxes, [0.5, 1.0, 0.5], [4, 5, 6])
    assert found == [[1.5, 0, 3.5, 11.5, 10, 6.5]]
    assert best == [1.0]


def test_a_slice_without_a_box_ends_a_lesion():
    found, _ = linked([[0, 0, 10, 10]] * 3, [0.9, 0.8, 0.7], [1, 2, 4])
    assert [(f[2], f[5]) for f in found] == [(0.5, 2.5), (3.5, 4.5)]


def test_a_box_that_overlaps_too_little_or_scores_too_low_begins_its_own():
    found, best = linked([[0, 0, 10, 10], [8, 0, 18, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.4], [1, 2, 2])
    assert best == [0.9, 0.8, 0.4]
    found, best = linked([[0, 0, 10, 10], [8, 0, 18, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.5], [1, 2, 2])
    assert best == [0.9, 0.8]
    assert [f[5] - f[2] for f in found] == [2, 1]


def test_a_second_box_at_the_same_place_vanishes():
    _, best = linked([[0, 0, 10, 10], [1, 0, 11, 10], [40, 0, 50, 10]], [0.9, 0.8, 0.7], [1, 1, 1])
    assert best == [0.9, 0.7]


def test_order_of_the_boxes_does_not_matter():
    random = np.random.default_rng(0)
    corner = random.uniform(0, 30, (60, 2))
    boxes, scores, slices = np.hstack([corner, corner + 10]), random.permutation(60) / 60, random.integers(0, 8, 60)
    order = random.permutation(60)
    first = linked(boxes.tolist(), scores.tolist(), slices.tolist())
    again = linked(boxes[order].tolist(), scores[order].tolist(), slices[order].tolist())
    assert first[1] == again[1]
    np.testing.assert_allclose(first[0], again[0], atol=1e-4)


# Folders of slices


def test_folder_of_slices_is_listed_read_and_its_faults_are_named(tmp_path):
    write_series(tmp_path / "scan", [3, 4, 5], size=(4, 6))
    assert list_scans(tmp_path / "scan") == [{"image": str(tmp_path / "scan")}]
    reader = SliceFolderReader([1, 1, 5])
    assert reader.verify_suffix(tmp_path / "scan")
    assert not reader.verify_suffix(tmp_path / "scan" / "003.png")
    with pytest.raises(ValueError, match=r"003.png: not a readable NIfTI volume"):
        reader.get_data(reader.read(tmp_path / "scan" / "003.png"))
    write_series(tmp_path / "scan", [7], size=(4, 6))
    with pytest.raises(ValueError, match=r"slice 6 is missing before 007.png"):
        list_scans(tmp_path / "scan")
    write_series(tmp_path / "scan", [6], size=(4, 7))
    with pytest.raises(ValueError, match=r"006.png: has \(7, 4\) pixels, the first slice \(6, 4\)"):
        reader.get_data(reader.read(tmp_path / "scan"))
    with pytest.raises(ValueError, match="spacing must be three positive numbers of mm"):
        SliceFolderReader([1, 0, 1])


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, -1, 0)], ids=["supine", "turned"])
def test_lesion_of_a_dicom_series_is_found_at_its_place_in_the_patient(tmp_path, orientation):
    hu = np.full((40, 24, 9), -500)
    hu[10:20, 5:12, 3:6] = 1000
    spacing, origin = (0.8, 0.7, 2.5), np.array([-20.0, -10.0, -100.0])
    write_dicom(tmp_path / "scan", hu, spacing=spacing, origin=origin, orientation=orientation)
    parser = ConfigParser(ConfigParser.load_config_file(config_files(BUNDLE, ["inference"])[0]))
    parser.update({"dataset_dir": str(tmp_path / "scan"), "bundle_root": str(BUNDLE), "size": 0})
    parser.update({"network": Bright(), "dataloader::num_workers": 0, "output_dir": str(tmp_path), "device": "cpu"})
    batch = next(iter(parser.get_parsed_content("dataloader")))
    (found,) = parser.get_parsed_content("detector")(batch["image"])
    SaveLesions(str(tmp_path))({"image": decollate_batch(batch["image"])[0], **found})
    (lesion,) = json.loads((tmp_path / "scan_lesions.json").read_text())["lesions"]
    middle = np.array([14.5, 8, 4]) * spacing * [orientation[0], orientation[4], 1]  # edges of the box are pixels' ends
    np.testing.assert_allclose(lesion["center_lps_mm"], origin + middle, atol=0.45)
    np.testing.assert_allclose(lesion["size_mm"], np.multiply((10, 7, 3), spacing), atol=1e-3)


def test_damaged_dicom_series_is_named_rather_than_read_by_another_reader(tmp_path):
    files = write_dicom(tmp_path / "scan")
    files[1].unlink()
    with pytest.raises(ValueError, match=r"uneven slices, 2\.5 to 5 mm apart"):
        LoadImage(reader=SliceFolderReader([1, 1, 5]))(tmp_path / "scan")


def test_what_is_no_scan_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a volume or a folder of volumes"):
        list_scans(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no volume file .* nor DICOM series in or below it"):
        list_scans(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.nii\.gz: not a readable NIfTI volume"):
        list_scans(tmp_path)
