from __future__ import annotations

import pytest
import torch

from networks import NoduleFCN, load_pretrained
from tests.support.golden import published_weights
from tests.support.network_checks import (
    NORMS,
    assert_every_parameter_gets_a_gradient,
    count,
    randomise,
)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def narrow(num_classes=2, **arguments):
    return NoduleFCN(num_classes, **{"base_channels": 4, **arguments})


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 18, 21), (1, 9, 12)], ids=str)
def test_logits_have_the_size_of_the_input(size):
    logits = randomise(narrow(3)).eval()(torch.randn(2, 1, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


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


@pytest.mark.parametrize("arguments", [{}, {"norm": "group"}, {"shortcut": "A"}, {"checkpointing": True}], ids=str)
def test_every_parameter_learns(arguments):
    network = narrow(zero_init_residual=False, **arguments)
    assert_every_parameter_gets_a_gradient(network, torch.randn(2, 1, 12, 13, 16))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_reaches_encoder_and_head(norm):
    network = narrow(norm=norm)
    for part, norms in ((network.backbone, 20), (network.decode_head, 3)):
        assert {kind: count(part, NORMS[kind]) for kind in NORMS} == {kind: norms * (kind == norm) for kind in NORMS}


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
    torch.save(narrow(2).state_dict(), path)
    report = load_pretrained(narrow(3), path)
    assert report.left_random == ["decode_head.seg_head.3.weight", "decode_head.seg_head.3.bias"]
