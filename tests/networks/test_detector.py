from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from networks import LesionDetector, load_pretrained
from networks.detector import AIR, AlignedRoIPool, ExactAnchors, assign_anchors
from tests.support.network_checks import (
    assert_every_parameter_gets_a_gradient,
    randomise,
    scripted_and_saved,
)

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def narrow(depth="18ba", **arguments):
    return LesionDetector(depth, **{"base_channels": 4, "pyramid_channels": 16, "head_channels": 32, **arguments})


def target(*boxes):
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64)}


# Parts


@pytest.mark.parametrize(
    ("depth", "conversion", "backbone_and_heads", "neck"),
    [
        (63, "group", 45_156_437, 3_344_384),
        (63, "center", 45_121_877, 3_344_384),
        ("18ba", "group", 32_369_045, 2_607_104),
        ("18ba", "center", 32_360_405, 2_607_104),
    ],
)
def test_number_of_parameters_is_the_published_one_but_for_boxes_of_the_background(
    depth, conversion, backbone_and_heads, neck
):
    with torch.device("meta"):
        network = LesionDetector(depth, conversion=conversion)
    assert sum(p.numel() for p in network.parameters()) == backbone_and_heads + 4 * (1024 + 1)
    assert sum(p.numel() for p in network.neck.parameters()) == neck
    assert sum(p.numel() for p in network.rpn.parameters()) == 593_935


def test_512_pixels_have_the_published_anchors():
    maps = [torch.zeros(1, 1, 512 // s, 512 // s) for s in (4, 8, 16, 32, 64)]
    (anchors,) = ExactAnchors()(ImageList(torch.zeros(1, 9, 512, 512), [(512, 512)]), maps)
    assert len(anchors) == 65_472
    first = torch.tensor([[22.627417, 11.313708], [16, 16], [11.313708, 22.627417]])  # width, height; not rounded
    torch.testing.assert_close(anchors[:3, 2:] - anchors[:3, :2], first)
    assert torch.equal(anchors[:3, :2] + anchors[:3, 2:], torch.zeros(3, 2))  # centred on multiples of the stride
    torch.testing.assert_close(anchors[3:6] - anchors[:3], torch.tensor([4.0, 0, 4, 0]).expand(3, 4))


def test_the_fifth_level_has_stride_64_where_64_does_not_divide_the_image():
    maps = [torch.zeros(1, 1, n, n) for n in (24, 12, 6, 3, 2)]  # of 96 pixels
    (anchors,) = ExactAnchors()(ImageList(torch.zeros(1, 9, 96, 96), [(96, 96)]), maps)
    centres = (anchors[-12:, :2] + anchors[-12:, 2:]) / 2
    assert centres[::3].tolist() == [[0, 0], [64, 0], [0, 64], [64, 64]]


def published_assignment(anchors, boxes, size):
    """The published rules, anchor by anchor."""
    labels, index = [0] * len(anchors), [0] * len(anchors)
    inside = [a[0] >= 0 and a[1] >= 0 and a[2] < size[1] and a[3] < size[0] for a in anchors.tolist()]
    iou = box_iou(boxes, anchors)
    for a in range(len(anchors)):
        best = iou[:, a].max()
        index[a] = int(iou[:, a].argmax())
        labels[a] = 1 if best >= 0.7 else 0 if best < 0.3 else -1
    for lesion in range(len(boxes)):
        best = max(iou[lesion, a] for a in range(len(anchors)) if inside[a])
        for a in range(len(anchors)):
            if inside[a] and best >= 0.3 and iou[lesion, a] == best:
                labels[a], index[a] = 1, lesion
    return [label if i else -1 for label, i in zip(labels, inside, strict=True)], index


def test_anchors_are_assigned_by_the_published_rules():
    maps = [torch.zeros(1, 1, 12, 16), torch.zeros(1, 1, 6, 8), *[torch.zeros(1, 1, 1, 1)] * 3]
    (anchors,) = ExactAnchors()(ImageList(torch.zeros(1, 9, 48, 64), [(48, 64)]), maps)
    boxes = torch.tensor([[10.0, 8, 26, 24], [12, 10, 27, 25], [0, 0, 9, 7], [30, 12, 52, 24], [20, 8, 63, 47]])
    labels, learnt = assign_anchors(anchors, boxes, torch.tensor([48, 64]))
    wanted, index = published_assignment(anchors, boxes, (48, 64))
    assert labels.tolist() == wanted
    assert {-1, 0, 1} == set(wanted)
    positive = labels == 1
    assert torch.equal(learnt[positive], boxes[torch.tensor(index)][positive])


def test_image_without_lesions_makes_all_inner_anchors_background():
    anchors = torch.tensor([[0.0, 0, 16, 16], [-1, 0, 15, 16], [50, 30, 66, 46]])
    labels, _ = assign_anchors(anchors, torch.zeros(0, 4), torch.tensor([48, 64]))
    assert labels.tolist() == [0, -1, -1]


def test_pooling_reads_between_pixels_with_the_half_pixel_correction():
    columns = torch.arange(64.0).expand(1, 1, 48, 64)
    features = {str(i): columns[..., : 48 // 2**i, : 64 // 2**i] for i in range(4)}
    box = torch.tensor([[16.0, 60, 128, 172]])  # 112 px: the second map, of stride 8, where a bin is two pixels wide
    pooled = AlignedRoIPool()(features, [box], [(192, 256)])
    torch.testing.assert_close(pooled[0, 0, 0], 16 / 8 - 0.5 + 2 * torch.arange(7.0) + 1)
    small = torch.tensor([[40.0, 60, 47, 67]])  # the first map, of stride 4; bins of a quarter pixel
    torch.testing.assert_close(AlignedRoIPool()(features, [small], [(192, 256)])[0, 0, 0],
                               (40 + 0.5 + torch.arange(7.0)) / 4 - 0.5)  # fmt: skip


@pytest.mark.parametrize(
    ("side", "level"), [(8, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (900, 3)]
)
def test_boxes_read_the_map_of_their_size(side, level):
    features = {str(i): torch.full((1, 1, 64, 64), float(i)) for i in range(4)}
    assert AlignedRoIPool()(features, [torch.tensor([[0.0, 0, side, side]])], [(1024, 1024)])[0, 0, 3, 3] == level


# Training


def test_training_gives_four_losses_and_every_parameter_learns():
    network = randomise(narrow())

    def losses(x):
        return list(network(x, [target([60, 70, 120, 110], [30, 20, 44, 36]), target([10, 10, 120, 110])]).values())

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return losses(x)

    assert set(network(torch.randn(1, 9, 64, 64), [target([10, 10, 30, 30])])) == LOSSES
    assert_every_parameter_gets_a_gradient(Losses(), torch.randn(2, 9, 160, 192))  # room for anchors of all levels


def test_image_without_lesions_trains_on_background_alone():
    losses = narrow()(torch.randn(1, 9, 64, 64), [target()])
    assert losses["loss_box_reg"] == 0
    assert losses["loss_rpn_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    assert losses["loss_classifier"] > 0


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="training needs targets"):
        narrow()(torch.randn(1, 9, 64, 64))


@pytest.mark.slow
def test_a_few_steps_find_the_one_lesion():
    network = narrow()
    x = torch.randn(1, 9, 64, 96) * 0.1
    x[:, 3:6, 20:40, 50:74] += 2
    box = [50, 20, 74, 40]
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(network(x, [target(box)]).values()).backward()
        optimizer.step()
    network.eval()
    best = network(x)[0, 0]
    assert box_iou(best[None, :4], torch.tensor([box]).float()).item() > 0.6
    assert best[5] == 1


# Evaluation


def test_evaluation_gives_rows_by_falling_score_that_detect_gives_as_dictionaries():
    network, x = randomise(narrow()).eval(), torch.randn(2, 9, 70, 50)
    with torch.no_grad():
        rows, found = network(x), network.detect(x)
    assert rows.shape == (2, 100, 6)
    for row, one in zip(rows, found, strict=True):
        count = len(one["boxes"])
        assert 0 < count <= 100
        assert torch.equal(row[:count, :4], one["boxes"])
        assert torch.equal(row[:count, 4], one["scores"])
        assert (row[:count, 4].diff() <= 0).all()
        assert (row[:count, 5] == 1).all()
        assert not row[count:].any()
        x2, y2 = one["boxes"][:, 2].max(), one["boxes"][:, 3].max()
        assert x2 <= 50  # boxes are clipped to the image, not to its padding
        assert y2 <= 70


def test_channel_axis_and_lists_are_taken_too():
    network, x = randomise(narrow()).eval(), torch.randn(2, 9, 64, 32)
    with torch.no_grad():
        want = network(x)
        assert torch.equal(network(x[:, None]), want)
        assert torch.equal(network(list(x)), want)


def test_smaller_image_of_a_batch_is_padded_with_air_and_its_boxes_stay_inside():
    network = narrow().eval()
    large, small = torch.randn(9, 64, 96), torch.randn(9, 40, 32)
    batch, sizes = network._batch([large, small])
    assert batch.shape == (2, 9, 64, 96)
    assert sizes == [(64, 96), (40, 32)]
    assert (batch[1, :, 40:] == AIR).all()
    assert (batch[1, :, :, 32:] == AIR).all()
    with torch.no_grad():
        found = network.detect([large, small])[1]["boxes"]
    assert len(found)
    assert found[:, 2].max() <= 32
    assert found[:, 3].max() <= 40


def test_convention_columns_first_turns_the_image_and_leaves_the_boxes():
    rows_first = randomise(narrow()).eval()
    columns_first = narrow(columns_first=True).eval()
    columns_first.load_state_dict(rows_first.state_dict())
    x = torch.randn(1, 9, 64, 96)
    with torch.no_grad():
        assert torch.equal(columns_first(x.transpose(-1, -2)), rows_first(x))
    losses = []
    for network, image in ((rows_first, x), (columns_first, x.transpose(-1, -2))):
        torch.manual_seed(0)  # of the samplers
        losses.append(network.train()(image, [target([50, 20, 74, 40])]))
    assert losses[0] == losses[1]


ARGUMENTS = pytest.mark.parametrize(
    "arguments", [{}, {"columns_first": True, "conversion": "center"}], ids=["mp3d", "p3d"]
)


@ARGUMENTS
def test_scripted_copy_answers_as_the_network_does_at_any_size_and_with_a_channel_axis(arguments):
    network = randomise(narrow(**arguments)).eval()
    scripted = scripted_and_saved(network, None)
    with torch.no_grad():
        for size in ((2, 9, 40, 64), (1, 1, 9, 96, 64)):
            x = torch.randn(size)
            torch.testing.assert_close(scripted(x), network(x))


@pytest.mark.slow
def test_torch_export_stops_at_the_number_of_boxes():
    with pytest.raises(RuntimeError, match="data-dependent"):  # once torchvision mends it, say so in docs/export.md
        torch.export.export(narrow().eval(), (torch.randn(1, 9, 64, 64),))


# Weights


def as_mmdetection(network, version):
    """Rename, and reorder classes, as MMDetection stores them."""
    names = {
        "neck.inner_blocks.{}.0.": "neck.lateral_convs.{}.conv.",
        "neck.layer_blocks.{}.0.": "neck.fpn_convs.{}.conv.",
    }
    names = {k.format(i): v.format(i) for k, v in names.items() for i in range(4)}
    head = "roi_head.bbox_head." if version == 2 else "bbox_head."
    names |= {
        "rpn.head.conv.0.0.": "rpn_head.rpn_conv.",
        "rpn.head.cls_logits.": "rpn_head.rpn_cls.",
        "rpn.head.bbox_pred.": "rpn_head.rpn_reg.",
        "roi_heads.box_head.fc6.": head + "shared_fcs.0.",
        "roi_heads.box_head.fc7.": head + "shared_fcs.1.",
        "roi_heads.box_predictor.cls_score.": head + "fc_cls.",
        "roi_heads.box_predictor.bbox_pred.": head + "fc_reg.",
    }
    weights = {}
    for name, tensor in network.state_dict().items():
        if version == 2 and "cls_score" in name:
            tensor = torch.cat([tensor[1:], tensor[:1]])
        if version == 2 and "box_predictor.bbox_pred" in name:
            tensor = tensor[4:]
        start = next((n for n in names if name.startswith(n)), "")
        weights[names.get(start, "") + name.removeprefix(start)] = tensor
    return weights


@pytest.mark.parametrize("version", [1, 2])
def test_published_detector_loads_whole_and_answers_alike(version, tmp_path):
    source = randomise(narrow()).eval()
    torch.save({"meta": {}, "state_dict": as_mmdetection(source, version)}, tmp_path / "published.pth")
    network = narrow().eval()
    report = load_pretrained(network, tmp_path / "published.pth")
    assert (report.skipped, report.left_random, report.centred) == ({}, [], [])
    x = torch.randn(1, 9, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), source(x))


def test_detector_of_80_classes_in_half_precision_leaves_the_predictor_alone(tmp_path):
    source = randomise(narrow(num_classes=80))
    weights = {k: v.half() for k, v in as_mmdetection(source, 1).items() if "groupconv" not in k}
    torch.save({"state_dict": weights}, tmp_path / "coco.pth")
    network = narrow()
    before = network.roi_heads.box_predictor.cls_score.weight.clone()
    report = load_pretrained(network, tmp_path / "coco.pth")
    assert sorted(report.left_random) == sorted(report.skipped)
    assert {n.rsplit(".", 2)[-2] for n in report.skipped} == {"cls_score", "bbox_pred"}
    assert report.centred == [f"backbone.groupconv_{i}.weight" for i in range(1, 5)]
    assert torch.equal(network.roi_heads.box_predictor.cls_score.weight, before)
    assert torch.equal(network.rpn.head.cls_logits.weight, source.rpn.head.cls_logits.weight.half().float())


def test_bare_backbone_file_starts_the_detector(tmp_path):
    source = randomise(narrow()).backbone
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    network = narrow()
    report = load_pretrained(network, tmp_path / "backbone.pth")
    assert len(report.matched) == len(source.state_dict())
    assert all(torch.equal(network.backbone.state_dict()[k], v) for k, v in source.state_dict().items())
    assert all(not name.startswith("backbone.") for name in report.left_random)
