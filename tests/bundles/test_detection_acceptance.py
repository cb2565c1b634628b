"""What a re-implementation of the published lesion detector must reproduce, point by point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from networks import P3D, LesionDetector, load_pretrained
from networks.detector import ExactAnchors
from tests.makers.deeplesion import row, write_csv, write_series
from tests.support.golden import read_vector
from tests.vdt_workflows.preparation.test_deeplesion import prepare, script, written
from vdt_transforms.slice_stacks import slice_mixes
from vdt_workflows.evaluation.detection import KeySlice, froc


@pytest.mark.parametrize(
    ("depth", "conversion", "parameters", "channels"),
    [
        (63, "center", 27_281_728, (256, 512, 1024, 2048)),
        (63, "group", 27_316_288, (256, 512, 1024, 2048)),
        ("18ba", "center", 15_257_536, (64, 128, 256, 512)),
        ("18ba", "group", 15_266_176, (64, 128, 256, 512)),
    ],
)
def test_1_parameters_and_shapes(depth, conversion, parameters, channels):
    with torch.device("meta"):
        network = P3D(depth, conversion=conversion)
        depths = []
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            stage.register_forward_hook(lambda module, x, y: depths.append(y.shape[2]))
        maps = network(torch.empty(1, 1, 9, 512, 512))
    assert sum(p.numel() for p in network.parameters()) == parameters
    sides = (128, 64, 32, 16)
    assert [tuple(m.shape) for m in maps] == [(1, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert depths == ([9, 5, 3, 1] if conversion == "center" else [9, 9, 9, 9])


def test_2_group_convolution_is_the_weighted_sum_and_one_hot_the_centre():
    transform = P3D("18ba", conversion="group", base_channels=4).groupconv_1
    x = torch.randn(2, 4, 9, 5, 6)
    assert torch.equal(transform(x), x[:, :, 4])
    torch.nn.init.normal_(transform.weight)
    weights = transform.weight.reshape(4, 9)
    torch.testing.assert_close(transform(x), (weights[None, :, :, None, None] * x).sum(2))


def test_3_state_dict_has_the_published_names_and_half_precision_loads(tmp_path):
    for name, conversion in (("p3d63", "center"), ("mp3d63_groupconv", "group")):
        with torch.device("meta"):
            state = P3D(63, conversion=conversion).state_dict()
        assert {key: list(tensor.shape) for key, tensor in state.items()} == read_vector(name)["state_dict"]
    assert len(read_vector("mp3d63_groupconv")["state_dict"]) == 211
    network = LesionDetector("18ba", base_channels=4, pyramid_channels=8, head_channels=8)
    assert len(network.backbone.state_dict()) == 112
    half = {f"backbone.{k}": v.half() for k, v in network.backbone.state_dict().items() if "groupconv" not in k}
    torch.save({"state_dict": half}, tmp_path / "coco.pth")
    report = load_pretrained(network, tmp_path / "coco.pth")
    assert (len(report.matched), len(report.centred)) == (108, 4)


@pytest.mark.parametrize("interval", [0.25, 0.5, 0.6, 1, 2, 2.5, 3, 5])
def test_4_interpolation_is_exact(interval):
    places = [interval * sum(o * w for o, w in mix) for mix in slice_mixes(9, 2.5, interval)]
    np.testing.assert_allclose(places, 2.5 * np.arange(-4, 5), atol=1e-4)


def test_5_boxes_and_split_counts(tmp_path):
    write_series(tmp_path / "Images_png" / "000001_01_01", [109])
    write_csv(tmp_path / "DL_info.csv", [row()])
    prepare(str(tmp_path))
    np.testing.assert_allclose(written(tmp_path)["test"][0]["boxes"], [[225.169, 89.0204, 240.252, 110.977]], atol=1e-4)
    assert sum(lesions for lesions, _ in script.OFFICIAL.values()) == 32_735
    assert sum(slices for _, slices in script.OFFICIAL.values()) == 32_120


def test_6_froc():
    lesions = [[0, 0, 10, 10], [1, 1, 11, 11]]
    boxes = [[0.5, 0.5, 10.5, 10.5], [0, 0, 10, 10], [50, 50, 60, 60]]
    curve = froc([KeySlice(boxes, [0.9, 0.8, 0.7], lesions)])
    assert curve.sensitivity.tolist() == [1, 1, 1]  # one box finds both lesions
    assert curve.false_positives.tolist() == [0, 0, 1]
    two = [KeySlice(boxes[1:], scores, lesions[:1]) for scores in ([0.9, 0.8], [0.85, 0.1])]
    assert (froc(two).at(0.5), froc(two).at(1.0)) == (1, 1)
    assert froc([KeySlice([], [], lesions)]).at(4) == 0  # no detections
    assert froc([*two, KeySlice([], [], [])]).images == 3  # an image without lesions
    assert froc(two).at(16) == 1  # the curve ends early
    tied = [KeySlice(boxes[1:], [0.5, 0.5], lesions[:1])]
    assert (froc(tied).at(0.5), froc(tied).at(1)) == (0, 1)


def test_7_anchors():
    maps = [torch.zeros(1, 1, 512 // s, 512 // s) for s in (4, 8, 16, 32, 64)]
    (anchors,) = ExactAnchors()(ImageList(torch.zeros(1, 9, 512, 512), [(512, 512)]), maps)
    assert len(anchors) == 65_472
    torch.testing.assert_close(anchors[0], torch.tensor([-22.627, -11.314, 22.627, 11.314]) / 2, atol=1e-3, rtol=0)
