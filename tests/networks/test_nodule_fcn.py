import pytest
import torch

from networks import NoduleFCN, load_pretrained
from tests.support.golden import published_weights


def test_maps_are_the_published_ones_of_a_48_cube():
    with torch.device("meta"):
        network = NoduleFCN().eval()
        assert [tuple(f.shape[1:]) for f in network.backbone(torch.zeros(1, 1, 48, 48, 48))] == [
            (64, 48, 48, 48),
            (128, 24, 24, 24),
            (512, 12, 12, 12),
        ]


def test_head_widths_follow_the_encoder():
    with torch.device("meta"):
        head = NoduleFCN(depth=50, base_channels=16).decode_head
    assert head.conv1.conv.weight.shape == (512, 128 + 512, 1, 1, 1)
    assert head.conv2.conv.weight.shape == (512, 16 + 512, 1, 1, 1)
    assert head.seg_head[0].weight.shape == (128, 512, 3, 3, 3)


@pytest.mark.slow
def test_published_layers_that_nothing_uses_are_reported_as_skipped(tmp_path):
    path = tmp_path / "published.pth"
    torch.save(published_weights("lidc_fcn"), path)
    network = NoduleFCN()
    report = load_pretrained(network, path)
    dead = {f"decode_head.{layer}.{kind}" for layer in ("conv3.conv", "conv_seg") for kind in ("weight", "bias")}
    assert set(report.skipped) == dead
    assert not report.left_random


def test_checkpoint_of_other_classes_leaves_the_last_layer_random(tmp_path):
    path = tmp_path / "two.pt"
    torch.save(NoduleFCN(2, base_channels=4).state_dict(), path)
    report = load_pretrained(NoduleFCN(3, base_channels=4), path)
    assert report.left_random == ["decode_head.seg_head.3.weight", "decode_head.seg_head.3.bias"]
