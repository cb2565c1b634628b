from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import ResUNet3D
from tests.support.network_checks import assert_every_parameter_gets_a_gradient, randomise

SIZES = [(16, 32, 48), (17, 35, 50), (5, 48, 64), (33, 33, 33), (1, 20, 40)]
VARIANTS = [
    pytest.param({}, id="published"),
    pytest.param({"stem": "strided"}, id="strided-stem"),
    pytest.param({"stem": "strided", "fine_channels": 4}, id="fine-stage"),
    pytest.param({"depth_stride": False}, id="depth-not-strided"),
    pytest.param({"norm": "group"}, id="group-norm"),
]


def narrow(num_classes=3, **arguments):
    return ResUNet3D(num_classes, **{"base_channels": 8, **arguments})


@pytest.mark.parametrize("arguments", VARIANTS)
@torch.no_grad()
def test_logits_have_the_size_of_the_input(arguments):
    network = randomise(narrow(**arguments)).eval()
    for size in SIZES:
        logits = network(torch.randn(1, 1, *size))
        assert logits.shape == (1, 3, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [
        *VARIANTS,
        pytest.param({"shortcut": "A"}, id="shortcut-A"),
        pytest.param({"norm": "instance"}, id="instance-norm"),
    ],
)
def test_every_parameter_learns(arguments):
    network = narrow(dropout=0.0, zero_init_residual=False, **arguments)
    assert_every_parameter_gets_a_gradient(network, torch.randn(2, 1, 17, 35, 50))


@pytest.mark.parametrize("depth_stride", [True, False])
def test_multiples_of_16_are_upsampled_by_two(depth_stride):
    network = randomise(narrow(depth_stride=depth_stride)).eval()
    double = nn.Upsample(scale_factor=(2 if depth_stride else 1, 2, 2), mode="trilinear", align_corners=False)
    with torch.inference_mode():
        x = torch.randn(1, 1, 16, 32, 48)
        *skips, deep = network.backbone(x)
        for number, skip in reversed(list(enumerate(skips))):
            stage = network.neck.decoder[str(number)]
            deep = stage.fuse(torch.cat([skip, stage.reduce(double(deep))], dim=1))
        torch.testing.assert_close(network(x), network.decode_head(deep))


def test_decoder_without_depth_stride_answers_each_number_of_slices():
    network = randomise(narrow(depth_stride=False)).eval()
    assert [tuple(level[1:]) for level in network.backbone.reductions] == [(r, r) for r in (1, 2, 4, 8, 16)]
    assert {level[0] for level in network.backbone.reductions} == {1}
    for slices in (1, 3, 4):
        assert network(torch.randn(1, 1, slices, 32, 32)).shape[2] == slices


def test_strided_stem_interpolates_the_logits_of_half_the_resolution():
    network = randomise(narrow(stem="strided")).eval()
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.inference_mode():
        half = network.decode_head(network.neck(network.backbone(x))[0])
        assert half.shape == (1, 3, 16, 16, 32)
        want = nn.functional.interpolate(half, scale_factor=2, mode="trilinear", align_corners=False)
        torch.testing.assert_close(network(x), want)


def test_the_fine_stage_sees_the_map_of_half_the_resolution_and_the_input_voxel_by_voxel():
    network = randomise(narrow(stem="strided", fine_channels=4, head_channels=0)).eval()
    x = torch.randn(1, 1, 32, 32, 64)
    with torch.inference_mode():
        half = network.neck(network.backbone(x))[0]
        up = nn.functional.relu(network.fine.bn(network.fine.up(half)))
        want = network.decode_head(network.fine.fuse(torch.cat([up, x], 1)))
        torch.testing.assert_close(network(x), want)
        assert up.shape == (1, 4, 32, 32, 64)
        only = torch.zeros_like(half)
        only[..., 3, 5, 7] = 1  # a voxel of half the resolution is eight of the full one
        assert network.fine.up(only).abs().sum(1)[0].nonzero().unique(dim=0).shape == (8, 3)


def test_the_fine_stage_follows_the_strides_of_the_stem_and_refuses_one_that_has_none():
    thick = [[1, 2, 2], [1, 2, 2], 1, 2, [1, 2, 2], 1]
    network = narrow(stem="strided", fine_channels=4, strides=thick)
    assert network.fine.up.kernel_size == network.fine.up.stride == (1, 2, 2)
    assert network(torch.randn(2, 1, 10, 33, 47)).shape == (2, 3, 10, 33, 47)
    with pytest.raises(ValueError, match="fine_channels must be 0 for a stem that does not stride, got 4"):
        narrow(fine_channels=4)


def test_with_a_fine_stage_the_map_of_half_the_resolution_learns_too():
    network = narrow(stem="strided", fine_channels=4, deep_supervision=2)
    network(torch.randn(2, 1, 16, 32, 48))
    sizes = [tuple(side.shape) for side in network.take_side_logits()]
    assert sizes == [(2, 3, 8, 16, 24), (2, 3, 4, 8, 12)]


def test_head_width_dropout_and_classes_arrive():
    head = narrow(num_classes=7, head_channels=5, dropout=0.25).decode_head
    assert [m.out_channels for m in head.modules() if isinstance(m, nn.Conv3d)] == [5, 5, 7]
    assert head.dropout.p == 0.25


def test_dropout_drops_whole_channels_while_training_only():
    network = randomise(narrow(dropout=0.5, head_channels=64, norm="group"))
    seen = []
    network.decode_head.dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    network(torch.randn(1, 1, 16, 32, 32))
    network.eval()(torch.randn(1, 1, 16, 32, 32))
    (before, after), (same, again) = seen
    dropped = [not channel.any() for channel in after[0]]
    assert any(dropped)
    assert not all(dropped)
    assert all(torch.equal(a, 2 * b) for a, b, gone in zip(after[0], before[0], dropped, strict=True) if not gone)
    assert torch.equal(same, again)


def test_the_published_head_starts_small_around_zero_and_ours_as_pytorch_starts_a_convolution():
    published = narrow(num_classes=14, head_std=0.01).decode_head.conv_seg
    assert not published.bias.any()
    assert published.weight.std().item() == pytest.approx(0.01, rel=0.25)
    ours = narrow(num_classes=14).decode_head.conv_seg
    assert 0.9 * 16**-0.5 < ours.weight.abs().max() <= 16**-0.5  # uniform, by the number of inputs
    assert ours.bias.any()


def test_a_network_from_scratch_tells_a_bright_block_from_its_surroundings_within_thirty_steps():
    torch.manual_seed(0)
    label = torch.zeros(2, 16, 16, 16, dtype=torch.long)
    label[0, 5:10, 6:12, 4:9] = 1
    label[1, 4:9, 3:8, 6:12] = 1
    image = label[:, None] + 0.3 * torch.randn(2, 1, 16, 16, 16)
    network = narrow(num_classes=2, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(image), label).backward()
        optimizer.step()
    found = network(image).argmax(1)
    assert 2 * (found & label).sum() / (found + label).sum() > 0.8


def test_logits_are_not_probabilities():
    logits = randomise(narrow()).eval()(torch.randn(1, 1, 16, 16, 32))
    assert logits.min() < 0
    assert not torch.allclose(logits.sum(1), torch.ones(1))


def test_each_image_of_a_batch_is_segmented_as_if_alone():
    network = randomise(narrow()).eval()
    x = torch.randn(2, 1, 16, 17, 32)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]))


def test_deep_supervision_gives_logits_of_coarser_maps_once_and_leaves_forward_as_it_is():
    torch.manual_seed(0)
    plain, deep = narrow(dropout=0.0), narrow(dropout=0.0, deep_supervision=2)
    deep.load_state_dict(plain.state_dict())  # which has no heads of coarser maps
    x = torch.randn(2, 1, 16, 32, 48)
    assert torch.equal(plain(x), deep(x))
    sizes = [tuple(side.shape) for side in deep.take_side_logits()]
    assert sizes == [(2, 3, 8, 16, 24), (2, 3, 4, 8, 12)]
    assert deep.take_side_logits() == plain.take_side_logits() == []
    deep.eval()(x)
    assert deep.take_side_logits() == []
    plain.load_state_dict(deep.state_dict())  # its heads of coarser maps are left out
    assert torch.equal(plain.eval()(x), torch.jit.script(deep)(x))


def test_heads_of_coarser_maps_learn_with_the_others():
    network = narrow(dropout=0.0, deep_supervision=3)
    logits = network(torch.randn(2, 1, 17, 35, 50))
    sum(level.square().mean() for level in (logits, *network.take_side_logits())).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
