"""Weights of classes, and losses of several levels, against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import DepthFirst, ResUNet3D
from vdt_workflows.training.losses import DeepSupervision, class_weights


def squares(logits, label):
    return (logits - label).square().mean()


def test_levels_weigh_half_of_the_finer_one_and_compare_with_the_nearest_labels():
    network = DepthFirst(ResUNet3D(1, base_channels=4, head_channels=4, deep_supervision=2))
    levels = [torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 2, 2, 2)]
    label = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)  # grows along X
    network.network._side_logits = [level.permute(0, 1, 4, 3, 2) for level in levels[1:]]
    wanted = [squares(levels[0], label)]
    wanted.append(squares(levels[1], torch.tensor([1.0, 3, 5, 7]).view(4, 1, 1)))
    wanted.append(squares(levels[2], torch.tensor([2.0, 6]).view(2, 1, 1)))
    loss = DeepSupervision(squares, network)
    assert loss(levels[0], label).item() == pytest.approx(sum(w / 2**i for i, w in enumerate(wanted)).item() / 1.75)
    assert loss(levels[0], label) == wanted[0]  # the levels of one step are taken once


def test_a_network_without_levels_has_the_loss_alone():
    logits, label = torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 4)
    for network in (nn.Conv3d(1, 1, 1), DepthFirst(nn.Conv3d(1, 1, 1)), ResUNet3D(1, base_channels=4)):
        assert DeepSupervision(squares, network)(logits, label) == squares(logits, label)


@pytest.mark.parametrize("given", ["none", None])
def test_no_class_weights_are_none(given):
    assert class_weights(given, 3) is None


def test_class_weights_are_numbers_of_single_precision():
    assert class_weights([1, 2, 0.5], 3).tolist() == [1.0, 2.0, 0.5]
    assert class_weights([1, 1]).dtype == torch.float32


@pytest.mark.parametrize("weights", [[1, 1], "1, 1, 1", [0, 1, 1], ["a", 1, 1]], ids=str)
def test_class_weights_that_are_not_a_positive_number_for_each_class_are_refused(weights):
    with pytest.raises(ValueError, match="class_weights must be 3 positive numbers, one for each class, got"):
        class_weights(weights, 3)
