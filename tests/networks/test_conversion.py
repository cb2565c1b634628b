"""2D networks made 3D: inflated, spread over three views, or flat."""

import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from networks import FlatConv3d, ResNet2D, ResNet3D, ResUNet3D, constrain, convert, expand
from networks.conversion import METHODS, planes, to_2d, to_3d
from tests.support.golden import TOLERANCE, deviation, published_input, published_weights, read_vector
from tests.support.network_checks import assert_every_parameter_gets_a_gradient, count, probe_loss, randomise

FLAT = ["acs", "2.5d"]


def encoder():
    """torchvision's ResNet-18 for grey images, without its head."""
    network = torchvision.models.resnet18()
    network.conv1 = nn.Conv2d(1, 64, 7, 2, padding=3, bias=False)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((name, getattr(network, name)) for name in names))


@pytest.mark.parametrize(("vector", "method"), [("resnet18_2d_ACS", "acs"), ("resnet18_2d_25D", "2.5d")])
def test_a_converted_network_gives_the_published_numbers_flat_and_written_out(vector, method):
    expected = read_vector(vector)
    network = convert(encoder(), method).eval()
    network.load_state_dict(published_weights(vector))
    assert sum(p.numel() for p in network.parameters()) == expected["parameters"]
    x = published_input(expected)
    with torch.inference_mode():
        flat, written_out = network(x), expand(copy.deepcopy(network))(x)
    assert deviation(flat, expected["outputs"][0]) < TOLERANCE
    torch.testing.assert_close(written_out, flat, rtol=0, atol=1e-5 * flat.abs().max().item())


def test_an_inflated_network_answers_a_constant_volume_as_the_2d_network_answers_its_slice():
    network = randomise(ResNet2D(18, in_channels=1, base_channels=4)).eval()
    inflated = convert(network, "i3d")
    image = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        want = network(image)
        got = inflated(image[:, :, None].expand(-1, -1, 480, -1, -1))
    middle = got[:, :, got.shape[2] // 2]
    assert got.shape[2] == 15
    torch.testing.assert_close(middle, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert not torch.allclose(got[:, :, 0], want, rtol=0, atol=1e-2 * want.abs().max().item())  # feels the border


def test_torchvisions_whole_network_converts_with_its_head():
    network = randomise(torchvision.models.resnet18(num_classes=3)).eval()
    image = torch.randn(1, 3, 40, 40)
    volume = image[:, :, None].expand(-1, -1, 9, -1, -1)
    flat = convert(network, "2.5d")
    with torch.inference_mode():
        torch.testing.assert_close(flat(volume), network(image), rtol=1e-4, atol=1e-3)  # no border along depth
        assert convert(network, "i3d")(volume).shape == convert(network, "acs")(volume).shape == (1, 3)
    assert count(network, nn.Conv2d) == 20  # left as it was


@pytest.mark.parametrize("stride", [1, 2])
def test_acs_is_three_2d_convolutions_one_for_each_view(stride):
    conv = nn.Conv2d(2, 8, 3, stride, padding=1)
    layer = convert(conv, "acs")
    x = torch.randn(1, 2, 6, 7, 8)
    with torch.inference_mode():
        got = layer(x)
        for rows, axis in ((slice(0, 3), 2), (slice(3, 6), 3), (slice(6, 8), 4)):  # 8 = 3 + 3 + 2
            kept = x.index_select(axis, torch.arange(0, x.shape[axis], stride))
            slices = [nn.functional.conv2d(s, conv.weight[rows], conv.bias[rows], stride, 1) for s in kept.unbind(axis)]
            torch.testing.assert_close(got[:, rows], torch.stack(slices, axis))


@pytest.mark.parametrize(
    ("channels", "counts"),
    [(64, (22, 21, 21)), (128, (43, 43, 42)), (512, (171, 171, 170)), (14, (5, 5, 4)), (6, (2, 2, 2)), (2, (1, 1))],
)
def test_the_three_views_share_the_channels_as_published(channels, counts):
    found = list(planes("acs", channels))
    assert tuple(rows.stop - rows.start for rows, _ in found) == counts
    assert [axis for _, axis in found] == list(range(len(counts)))
    assert [rows.start for rows, _ in found] == [sum(counts[:i]) for i in range(len(counts))]


@pytest.mark.parametrize("method", FLAT)
@pytest.mark.parametrize(
    "sizes",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 2, "stride": 2},
        {"kernel_size": 7, "padding": 3, "stride": 2},
        {"kernel_size": 4, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 1, "stride": 2},
    ],
    ids=lambda sizes: "-".join(f"{name}={value}" for name, value in sizes.items()),
)
def test_flat_kernels_written_out_answer_alike_and_have_the_same_gradients(method, sizes):
    layer = convert(nn.Conv2d(4, 8, **sizes), method)
    assert isinstance(layer, FlatConv3d)
    native = expand(copy.deepcopy(layer))
    assert type(native) is nn.Conv3d
    x = torch.randn(2, 4, 9, 10, 11)
    got, want = layer(x), native(x)
    torch.testing.assert_close(got, want)
    probe_loss(got).backward()
    probe_loss(want).backward()
    size = layer.kernel_size[0]
    wanted = to_2d(native.weight.grad, method) if size > 1 else native.weight.grad[:, :, 0]
    torch.testing.assert_close(layer.weight.grad[:, :, 0], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_come_back_from_3d(method):
    kernel = torch.randn(7, 2, 3, 3)
    back = to_2d(to_3d(kernel, method), method)
    if method == "i3d":
        torch.testing.assert_close(back, kernel)
    else:
        assert torch.equal(back, kernel)


@pytest.mark.parametrize("method", FLAT)
def test_the_state_dict_is_the_native_networks_and_comes_back_exactly(method):
    network = constrain(ResUNet3D(2, base_channels=4, head_channels=4), method)
    native = ResUNet3D(2, base_channels=4, head_channels=4)
    state = network.state_dict()
    native.load_state_dict(state)
    twin = constrain(ResUNet3D(2, base_channels=4, head_channels=4), method)
    twin.load_state_dict(native.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
    assert any(p.shape[2:] == (1, 3, 3) for p in twin.parameters())
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in native.parameters()) / 2
    x = torch.randn(1, 1, 16, 20, 24)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(x), native.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", FLAT)
def test_training_moves_every_flat_kernel_and_nothing_outside_its_plane(method):
    network = constrain(ResUNet3D(2, base_channels=4, head_channels=4, zero_init_residual=False), method)
    network.to(memory_format=torch.channels_last_3d)  # as the bundles do on a CPU
    assert_every_parameter_gets_a_gradient(network, torch.randn(2, 1, 16, 16, 32))
    torch.optim.SGD(network.parameters(), 0.1).step()
    kernel = network.state_dict()["backbone.layer1.0.conv1.weight"]
    assert torch.equal(to_3d(to_2d(kernel, method), method), kernel)


def test_random_kernels_keep_the_spread_of_kaimings_rule_on_the_plane():
    network = constrain(ResNet3D(18, base_channels=32), "2.5d")
    weight = network.layer2[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_kernels_that_are_not_flat_are_refused_by_flat_layers():
    network = constrain(ResNet3D(18, base_channels=4), "acs")
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1\.weight has values outside the planes of 'acs'"):
        network.load_state_dict(ResNet3D(18, base_channels=4).state_dict())


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.MaxPool2d(3, 2, padding=1), (1, 2, 8, 9)),
        (nn.AvgPool2d(2), (1, 2, 8, 8)),
        (nn.AdaptiveAvgPool2d((2, 2)), (1, 2, 8, 8)),
        (nn.AdaptiveMaxPool2d(2), (1, 2, 8, 8)),
        (nn.InstanceNorm2d(2, affine=True), (1, 2, 8, 8)),
        (nn.BatchNorm2d(2, eps=1e-3).eval(), (1, 2, 8, 8)),
        (nn.GroupNorm(1, 2), (1, 2, 8, 8)),
        (nn.Dropout2d(0.5).eval(), (1, 2, 8, 8)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 4, 4)),
        (nn.UpsamplingNearest2d(scale_factor=2), (1, 2, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_layers_answer_a_constant_volume_as_its_slice(layer, x):
    image = torch.randn(x)
    got = convert(layer, "i3d")(image[:, :, None].expand(-1, -1, 8, -1, -1))
    want = layer(image)
    torch.testing.assert_close(got, want[:, :, None].expand_as(got))


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (
            nn.ConvTranspose2d(1, 1, 2),
            r"layer '1', ConvTranspose2d, has no 3D form here; known are Conv2d, BatchNorm2d",
        ),
        (
            nn.Conv2d(1, 1, (3, 5)),
            r"layer '1', Conv2d, has kernel_size \(3, 5\); only layers that treat both axes alike",
        ),
        (nn.MaxPool2d((2, 1)), r"layer '1', MaxPool2d, has kernel_size \(2, 1\)"),
        (nn.AvgPool2d(2, divisor_override=3), r"layer '1', AvgPool2d, has a divisor_override"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), r"layer '1', Upsample, is bicubic, which torch has in 2D alone"),
    ],
    ids=["transposed", "oblong kernel", "oblong pool", "divisor", "bicubic"],
)
def test_a_layer_without_a_3d_form_is_named(layer, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(nn.Sequential(nn.ReLU(), layer), "i3d")


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"method must be one of 'i3d', 'acs', '2\.5d', got '3d'"):
        convert(nn.ReLU(), "3d")
    with pytest.raises(ValueError, match=r"method must be one of 'acs', '2\.5d', got 'i3d'"):
        constrain(nn.ReLU(), "i3d")
    with pytest.raises(ValueError, match=r"kernel must have shape \(O, I, K, K\), got \(1, 1, 3\)"):
        to_3d(torch.zeros(1, 1, 3), "i3d")
    with pytest.raises(ValueError, match=r"kernel must have shape \(O, I, K, K, K\), got \(1, 1, 1, 3, 3\)"):
        to_2d(torch.zeros(1, 1, 1, 3, 3), "i3d")
