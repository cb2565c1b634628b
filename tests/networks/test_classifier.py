from __future__ import annotations

import pytest
import torch

from networks import ResNet3DClassifier
from tests.support.network_checks import (
    NORMS,
    assert_every_parameter_gets_a_gradient,
    count,
    randomise,
)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def narrow(depth=18, num_classes=5, **arguments):
    return ResNet3DClassifier(depth, num_classes, **{"base_channels": 8, **arguments})


@pytest.mark.parametrize(
    ("depth", "arguments", "size"),
    [
        pytest.param(18, {}, (2, 1, 3, 64, 64), id="image"),
        pytest.param(18, {}, (2, 3, 65, 70), id="image-without-channel-axis"),
        pytest.param(18, {"depth_stride": True}, (1, 1, 33, 35, 50), id="volume-of-odd-size"),
        pytest.param(50, {"norm": "group"}, (1, 1, 3, 40, 33), id="50-group-norm"),
        pytest.param(34, {"shortcut": "A"}, (2, 1, 1, 33, 48), id="34-one-slice"),
        pytest.param(18, {"checkpointing": True, "in_channels": 2}, (2, 2, 3, 40, 40), id="checkpointing"),
    ],
)
def test_one_row_of_logits_for_each_volume_and_every_parameter_learns(depth, arguments, size):
    network = narrow(depth, zero_init_residual=False, **arguments)
    x = torch.randn(size)
    assert network(x).shape == (size[0], 5)
    assert_every_parameter_gets_a_gradient(network, x)


def test_logits_are_the_linear_layer_of_the_mean_over_the_last_map():
    network = randomise(narrow()).eval()
    x = torch.randn(2, 3, 48, 64)
    (last,) = network.backbone(x)
    want = last.mean((2, 3, 4)) @ network.head.fc.weight.T + network.head.fc.bias
    torch.testing.assert_close(network(x), want)


def test_image_and_one_channel_volume_are_the_same_input():
    network = randomise(narrow()).eval()
    x = torch.randn(2, 3, 48, 64)
    assert torch.equal(network(x), network(x[:, None]))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_reaches_every_layer(norm):
    assert {kind: count(narrow(norm=norm), NORMS[kind]) for kind in NORMS} == {k: 20 * (k == norm) for k in NORMS}


def test_dropout_acts_on_pooled_features_while_training_only():
    network = randomise(narrow(dropout=0.5, norm="group"))
    seen = []
    network.head.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    x = torch.randn(2, 3, 32, 32)
    network(x)
    network.eval()(x)
    (before, after), (same, again) = seen
    kept = after != 0
    assert 0 < kept.sum() < (before != 0).sum()
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert torch.equal(same, again)


def test_names_are_the_published_ones():
    names = list(narrow().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "head"}
    assert [name for name in names if name.startswith("head")] == ["head.fc.weight", "head.fc.bias"]
    assert names[0] == "backbone.conv1.weight"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param({"depth": 20}, "depth must be one of", id="depth"),
        pytest.param({"norm": "layer"}, "norm must be one of", id="norm"),
    ],
)
def test_wrong_argument_is_named_with_its_value(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        narrow(**arguments)
