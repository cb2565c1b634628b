from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import ResUNet3D
from networks.layers import PointwiseConv3d

LAST = torch.channels_last_3d


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_a_pointwise_convolution_is_torchs_with_its_gradients_and_keeps_the_layout(layout, bias):
    torch.manual_seed(0)
    ours, theirs = PointwiseConv3d(5, 3, 1, bias=bias), nn.Conv3d(5, 3, 1, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 4, 6, 7).contiguous(memory_format=layout).requires_grad_()
    answers = [network(x) for network in (ours, theirs, torch.jit.script(ours))]
    assert answers[0].is_contiguous(memory_format=layout)
    for answer in answers:
        torch.testing.assert_close(answer, answers[1])
    sums = [answer.square().sum() for answer in answers]
    own_gradients = torch.autograd.grad(sums[0], [x, *ours.parameters()])
    for own, other in zip(own_gradients, torch.autograd.grad(sums[1], [x, *theirs.parameters()]), strict=True):
        torch.testing.assert_close(own, other)


def test_a_pointwise_convolution_strides():
    ours = PointwiseConv3d(5, 3, 1, (1, 2, 2))
    x = torch.randn(2, 5, 4, 6, 7).contiguous(memory_format=LAST)
    torch.testing.assert_close(ours(x), nn.functional.conv3d(x, ours.weight, ours.bias, (1, 2, 2)))


def test_channels_stay_last_through_the_whole_network_on_one_thread():
    """Whatever one layer puts first, the next convolutions copy."""
    network = ResUNet3D(3, base_channels=8, stem="strided", fine_channels=8, head_channels=0).to(memory_format=LAST)
    found = {}

    def look(name):
        def hook(layer, inputs, output):
            found[name] = output.is_contiguous(memory_format=LAST)

        return hook

    for name, layer in network.named_modules():
        if not list(layer.children()) and not isinstance(layer, nn.Identity):
            layer.register_forward_hook(look(name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network(torch.randn(2, 1, 16, 32, 48))
    torch.set_num_threads(threads)
    assert len(found) > 60
    assert [name for name, last in found.items() if not last] == []
