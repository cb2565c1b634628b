import pytest
import torch
from torch import nn

from networks import GenesisUNet3D
from tests.support.network_checks import count, randomise


def test_it_has_the_published_names_and_number_of_parameters():
    with torch.device("meta"):
        network = GenesisUNet3D(14)
    assert sum(p.numel() for p in network.parameters()) == 19_074_510
    state = network.state_dict()
    assert state["down_tr64.ops.0.conv1.weight"].shape == (32, 1, 3, 3, 3)
    assert state["down_tr512.ops.1.conv1.weight"].shape == (512, 256, 3, 3, 3)
    assert state["up_tr256.up_conv.weight"].shape == (512, 512, 2, 2, 2)
    assert state["up_tr256.ops.0.conv1.weight"].shape == (256, 768, 3, 3, 3)
    assert state["up_tr64.ops.1.bn1.running_mean"].shape == (64,)
    assert state["out_tr.final_conv.weight"].shape == (14, 64, 1, 1, 1)
    assert count(network, nn.BatchNorm3d) == 14


def test_logits_are_not_squeezed_and_evaluation_uses_the_stored_statistics():
    network, x = randomise(GenesisUNet3D(2, base_channels=4)), 10 * torch.randn(2, 1, 8, 8, 8)
    assert network.train()(x).abs().max() > 1
    network.eval()
    with torch.inference_mode():
        torch.testing.assert_close(network(x)[:1], network(x[:1]), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="base_channels must be even, got 3"):
        GenesisUNet3D(2, base_channels=3)
