import copy
import io

import pytest
import torch
import torchvision
from monai.networks.nets.resnet import ResNet as MonaiResNet
from torch import nn

from networks import ResNet2D, ResNet3D, ResUNet3D, load_pretrained
from networks.layers import StemConv3d
from networks.resnet3d import BasicBlock, Bottleneck, ZeroPadShortcut
from tests.support.network_checks import (
    COPIES,
    assert_every_parameter_gets_a_gradient,
    probe_loss,
    randomise,
)

ALL = {"out_indices": (0, 1, 2, 3)}
FLAT = {"stem": "flat", "strides": (1, 2, 1, 2), "depth_stride": True}  # LIDC segmentation


def narrow(depth=18, **arguments):
    return ResNet3D(depth, **{"base_channels": 8, **arguments})


def saved_weights(network):
    """The network's state dict, through a file."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SHAPES = [
    # depth, arguments, input, maps (channels of the input's batch, depth, height, width)
    pytest.param(
        18, ALL, (2, 1, 3, 64, 64), [(8, 3, 16, 16), (16, 3, 8, 8), (32, 3, 4, 4), (64, 3, 2, 2)], id="18-image"
    ),
    pytest.param(18, {}, (1, 1, 3, 64, 64), [(64, 3, 2, 2)], id="18-last-map-only"),
    pytest.param(18, {}, (2, 3, 33, 65), [(64, 3, 2, 3)], id="18-image-without-channel-axis"),
    pytest.param(18, {"in_channels": 3}, (1, 3, 5, 33, 64), [(64, 5, 2, 2)], id="18-three-channels"),
    pytest.param(
        18,
        {"depth_stride": True, **ALL},
        (1, 1, 33, 35, 50),
        [(8, 9, 9, 13), (16, 5, 5, 7), (32, 3, 3, 4), (64, 2, 2, 2)],
        id="18-depth-stride-odd-size",
    ),
    pytest.param(34, {"depth_stride": True}, (2, 1, 32, 32, 40), [(64, 1, 1, 2)], id="34-depth-stride"),
    pytest.param(
        50, ALL, (2, 1, 3, 32, 48), [(32, 3, 8, 12), (64, 3, 4, 6), (128, 3, 2, 3), (256, 3, 1, 2)], id="50-image"
    ),
    pytest.param(
        18,
        {"stem": "unet", "depth_stride": True, "return_stem": True, **ALL},
        (1, 1, 16, 17, 34),
        [(8, 16, 17, 34), (8, 8, 9, 17), (16, 4, 5, 9), (32, 2, 3, 5), (64, 1, 2, 3)],
        id="18-unet-stem",
    ),
    pytest.param(
        50,
        {"stem": "unet", "return_stem": True, "out_indices": (1,)},
        (1, 1, 5, 16, 24),
        [(8, 5, 16, 24), (64, 5, 4, 6)],
        id="50-unet-stem-and-second-map",
    ),
    pytest.param(
        18,
        {**FLAT, **ALL},
        (2, 1, 16, 17, 18),
        [(8, 16, 17, 18), (16, 8, 9, 9), (32, 8, 9, 9), (64, 4, 5, 5)],
        id="18-flat-stem",
    ),
    pytest.param(
        18,
        {"return_stem": True, "out_indices": (2, 0)},
        (1, 1, 4, 31, 33),
        [(8, 4, 16, 17), (8, 4, 8, 9), (32, 4, 2, 3)],
        id="18-maps-come-shallow-to-deep",
    ),
    pytest.param(
        50, {"strides": (1, 2, 1, 2), "depth_stride": True}, (2, 1, 33, 32, 32), [(256, 3, 2, 2)], id="50-strides"
    ),
    pytest.param(18, {"shortcut": "A"}, (1, 1, 3, 65, 64), [(64, 3, 3, 2)], id="18-shortcut-A"),
    pytest.param(50, {"shortcut": "A", "depth_stride": True}, (2, 1, 17, 33, 40), [(256, 1, 2, 2)], id="50-shortcut-A"),
    pytest.param(18, {"norm": "group"}, (1, 1, 3, 32, 64), [(64, 3, 1, 2)], id="18-group-norm"),
    pytest.param(18, {"norm": "instance"}, (1, 1, 3, 64, 48), [(64, 3, 2, 2)], id="18-instance-norm"),
    pytest.param(50, {"norm": "group", "base_channels": 6}, (1, 1, 2, 33, 40), [(192, 2, 2, 2)], id="50-width-6"),
]


@pytest.mark.parametrize(("depth", "arguments", "size", "maps"), SHAPES)
def test_maps_are_those_of_the_table_as_the_attributes_say_and_every_parameter_learns(depth, arguments, size, maps):
    network = narrow(depth, zero_init_residual=False, **arguments)
    x = torch.randn(size)
    assert [tuple(y.shape) for y in network(x)] == [(size[0], *shape) for shape in maps]
    assert network.channels == [shape[0] for shape in maps]
    for reduction, shape in zip(network.reductions, maps, strict=True):
        assert shape[1:] == tuple(-(-n // r) for n, r in zip(size[-3:], reduction, strict=True))
    assert_every_parameter_gets_a_gradient(network, x)


def test_reductions_are_products_of_the_strides():
    published = narrow(return_stem=True, **ALL)
    assert published.reductions == [(1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (1, 32, 32)]
    assert narrow(return_stem=True, **FLAT, **ALL).reductions == [(r, r, r) for r in (1, 1, 2, 2, 4)]


def test_strides_of_each_axis_are_those_asked_for_and_weights_are_the_same():
    thick = [[1, 2, 2], [1, 2, 2], 1, [2, 2, 2], [2, 2, 1], [1, 1, 1]]
    network = narrow(return_stem=True, strides=thick, **ALL).eval()
    maps = network(torch.zeros(1, 1, 12, 32, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(12, 16, 16), (12, 8, 8), (6, 4, 4), (3, 2, 4), (3, 2, 4)]
    assert network.reductions == [(1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 8), (4, 16, 8)]
    assert network.state_dict().keys() == narrow(return_stem=True, **ALL).state_dict().keys()
    assert network.architecture["strides"] == thick  # plain values, for the file
    six = narrow(strides=(2, 2, 1, 2, 2, 2), **ALL)
    assert six.reductions == narrow(**ALL).reductions


def test_a_network_of_other_strides_by_axis_is_refused_and_one_of_the_same_loads():
    thick = {"strides": [[1, 2, 2], [1, 2, 2], 1, 2, 2, 2]}
    state = narrow(**thick).state_dict()
    narrow(strides=[(1, 2, 2), (1, 2, 2), 1, 2, 2, 2]).load_state_dict(state)
    with pytest.raises(ValueError, match="strides="):
        narrow().load_state_dict(state)


def test_image_without_channel_axis_is_read_as_slices():
    network = randomise(narrow()).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x)[0], network(x[:, None])[0])


# Norms


def test_group_norm_has_32_groups_or_groups_of_two_channels_at_least():
    assert {
        m.num_groups for m in ResNet3D(18, norm="group", out_indices=(0,)).modules() if hasattr(m, "num_groups")
    } == {32}
    assert [narrow(norm="group", base_channels=c, out_indices=(0,)).bn1.num_groups for c in (6, 8, 48)] == [1, 4, 8]


# Shortcuts, and how blocks start


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("size", [(4, 6, 8), (5, 7, 9)])
def test_shortcut_a_is_every_stride_th_voxel_and_zeros(stride, size):
    x = torch.randn(2, 3, *size)
    y = ZeroPadShortcut(5, stride)(x)
    d, h, w = stride
    assert torch.equal(y[:, :3], x[:, :, ::d, ::h, ::w])
    assert y.shape[1] == 8
    assert not y[:, 3:].any()


def test_shortcut_a_lets_the_gradient_through():
    network = narrow(shortcut="A", zero_init_residual=True)  # blocks pass their shortcut only, so gradients must too
    probe_loss(network(torch.randn(2, 1, 3, 32, 64))).backward()
    assert network.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize(("channels", "stride"), [(1, 2), (1, 1), (2, 2)])
def test_stem_of_few_slices_trains_by_the_same_sums_without_the_padding(slices, channels, stride):
    torch.manual_seed(0)
    stem = StemConv3d(channels, 4, (1, stride, stride)).double()
    x = torch.randn(2, channels, slices, 18, 13, dtype=torch.float64, requires_grad=True)
    results = []
    for training in (True, False):
        y = stem.train(training)(x)
        results.append((y, *torch.autograd.grad((y * torch.cos(y)).sum(), (x, stem.weight))))
    for ours, ordinary in zip(*results, strict=True):
        assert ours.shape == ordinary.shape
        assert (ours - ordinary).abs().max() < 1e-11 * ordinary.abs().max()  # float64


@pytest.mark.parametrize(("slices", "stride"), [(4, 1), (3, 2)])
def test_stem_of_more_slices_or_strided_depth_stays_the_3d_convolution(slices, stride):
    stem = StemConv3d(1, 4, (stride, 2, 2))
    x = torch.randn(2, 1, slices, 18, 13)
    assert torch.equal(stem(x), nn.functional.conv3d(x, stem.weight, None, stem.stride, 3))


@pytest.mark.parametrize("depth", [18, 50])
def test_shortcut_a_has_no_weights_and_b_has_four(depth):
    assert not [name for name in narrow(depth, shortcut="A").state_dict() if "downsample" in name]
    names = [name for name, _ in narrow(depth).named_parameters() if "downsample" in name]
    first_stage = depth == 50  # whose blocks widen at once
    assert len(names) == 3 * (3 + first_stage)


@pytest.mark.parametrize(("depth", "last"), [(18, "bn2"), (50, "bn3")])
def test_zero_init_residual_makes_every_block_start_as_its_shortcut(depth, last):
    network = narrow(depth, zero_init_residual=True)
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock | Bottleneck)]
    assert len(blocks) == {18: 8, 50: 16}[depth]
    for block in blocks:
        assert not getattr(block, last).weight.any()
        x = torch.rand(2, block.conv1.in_channels, 2, 4, 4)
        assert torch.equal(block(x), nn.functional.relu(x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("depth", [18, 50])
def test_without_zero_init_residual_no_block_starts_as_its_shortcut(depth):
    network = narrow(depth)
    assert all((m.weight == 1).all() for m in network.modules() if isinstance(m, nn.BatchNorm3d))
    x = torch.rand(2, network.layer1[1].conv1.in_channels, 2, 4, 4)
    assert not torch.allclose(network.layer1[1](x), x)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("kind", [ResNet2D, ResNet3D])
def test_convolutions_start_kaiming_normal_by_fan_out_norms_at_one_and_the_last_of_a_block_at_zero(kind, depth):
    network = kind(depth, base_channels=16, zero_init_residual=True)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    assert len(convolutions) == {18: 20, 50: 53}[depth]
    for conv in convolutions:
        wanted = (2 / (conv.out_channels * conv.weight[0, 0].numel())) ** 0.5
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.15)
        assert conv.weight.abs().max().item() > 2.3 * wanted  # a normal one: a uniform one ends at 1.73
        assert conv.bias is None
    last = "bn2" if depth == 18 else "bn3"
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)}
    for name, norm in norms.items():
        assert (norm.weight == (0 if name.endswith(last) else 1)).all(), name
        assert not norm.bias.any()


# Freezing


def parts(network):
    return {
        0: [network.conv1, network.bn1], 1: [network.layer1], 2: [network.layer2], 3: [network.layer3],
        4: [network.layer4],
    }  # fmt: skip


@pytest.mark.parametrize("frozen", [-1, 0, 2, 4])
def test_frozen_stages_do_not_train_and_keep_their_statistics(frozen):
    network = narrow(frozen_stages=frozen, zero_init_residual=False).eval().train()
    before = copy.deepcopy(network.state_dict())
    trained = [p for p in network.parameters() if p.requires_grad]
    if trained:
        probe_loss(network(torch.randn(2, 1, 3, 32, 64))).backward()
        torch.optim.SGD(trained, 0.1).step()
    else:
        network(torch.randn(2, 1, 3, 32, 64))
    after = network.state_dict()
    for part, modules in parts(network).items():
        assert all(m.training == (part > frozen) for m in modules)
        assert all(p.requires_grad == (part > frozen) for m in modules for p in m.parameters())
    for name in before:
        part = int(name[5]) if name.startswith("layer") else 0
        assert torch.equal(before[name], after[name]) == (part <= frozen), name


def test_norm_eval_keeps_the_statistics_and_still_trains_the_weights():
    network = narrow(norm_eval=True, zero_init_residual=False)
    before = copy.deepcopy(network.state_dict())
    probe_loss(network.eval().train()(torch.randn(2, 1, 3, 32, 64))).backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    after = network.state_dict()
    for name in before:
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(before[name], after[name]) == statistic, name
    assert network.training
    assert network.layer4.training


# Checkpointing


@pytest.mark.parametrize(
    ("depth", "arguments"),
    [
        pytest.param(18, {}, id="18"),
        pytest.param(50, {}, id="50"),
        pytest.param(18, {"norm": "group"}, id="18-group-norm"),
        pytest.param(18, {"norm_eval": True}, id="18-norm-eval"),
        pytest.param(18, {"frozen_stages": 2}, id="18-frozen-stages"),
        pytest.param(18, {"shortcut": "A"}, id="18-shortcut-A"),
    ],
)
def test_checkpointing_changes_no_bit_of_output_gradients_or_statistics(depth, arguments):
    plain = randomise(narrow(depth, return_stem=True, **ALL, **arguments))
    spare = randomise(narrow(depth, return_stem=True, checkpointing=True, **ALL, **arguments))
    for step in range(2):
        x = torch.randn(2, 1, 3, 32, 64, generator=torch.Generator().manual_seed(step))
        maps = [network(x) for network in (plain, spare)]
        assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
        for output in maps:
            probe_loss(output).backward()
    for (name, a), b in zip(plain.named_parameters(), spare.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, spare.state_dict()[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_each_stage_again_in_the_backward_pass(checkpointing):
    network, calls = narrow(checkpointing=checkpointing), []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    loss = probe_loss(network(torch.randn(2, 1, 3, 32, 32)))
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == (8 if checkpointing else 4)


def test_checkpointing_leaves_momentum_as_it_was():
    network = narrow(checkpointing=True)
    probe_loss(network(torch.randn(2, 1, 3, 32, 32))).backward()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert {m.momentum for m in norms} == {0.1}
    assert {m.num_batches_tracked.item() for m in norms} == {1}


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param({"depth": 19}, "depth must be one of 18, 34, 50, 101, 152, got 19", id="depth"),
        pytest.param({"stem": "7x7"}, "stem must be one of .*'strided', 'unet', 'flat'.*, got '7x7'", id="stem"),
        pytest.param({"shortcut": "C"}, "shortcut must be one of 'A', 'B', got 'C'", id="shortcut"),
        pytest.param(
            {"strides": (1, 2, 2)}, r"strides must be four positive integers, .*got \(1, 2, 2\)", id="strides"
        ),
        pytest.param({"strides": (1, 2, 0, 2)}, "strides must be four positive integers", id="stride-of-zero"),
        pytest.param({"strides": (1, 2, (1, 2), 2)}, "strides must be four positive integers", id="stride-of-two-axes"),
        pytest.param({"strides": (1, 2, 1, 2, 1, 1), "stem": "flat"}, "flat", id="stride-of-a-missing-pool"),
        pytest.param({"norm": "layer"}, "norm must be one of .*'batch', 'group', 'instance'.*, got 'layer'", id="norm"),
        pytest.param({"out_indices": ()}, "out_indices must name stages 0 to 3, got", id="no-stage"),
        pytest.param({"out_indices": (4,)}, r"out_indices must name stages 0 to 3, got \(4,\)", id="fifth-stage"),
        pytest.param({"frozen_stages": 5}, r"frozen_stages must be -1 \(none\) to 4, got 5", id="frozen_stages"),
    ],
)
def test_wrong_argument_is_named_with_its_value(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        narrow(**arguments)


# Parity


@pytest.mark.parametrize(("depth", "build"), [(18, torchvision.models.resnet18), (50, torchvision.models.resnet50)])
def test_2d_kernels_as_centre_slices_give_torchvisions_maps_of_one_slice(depth, build):
    flat = randomise(build(weights=None)).eval()
    with torch.device("meta"):
        network = ResNet3D(depth, in_channels=3, **ALL)
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = flat.state_dict()[name].clone()
        if tensor.dim() == 5:
            kernel = torch.zeros(tensor.shape)
            kernel[:, :, tensor.shape[2] // 2] = state[name]
            state[name] = kernel
    network.load_state_dict(state, assign=True)
    maps = []
    for stage in (flat.layer1, flat.layer2, flat.layer3, flat.layer4):
        stage.register_forward_hook(lambda module, args, output: maps.append(output))
    x = torch.randn(2, 3, 65, 64)
    with torch.inference_mode():
        flat(x)
        ours = network.eval()(x[:, :, None])
    for got, want in zip(ours, maps, strict=True):
        torch.testing.assert_close(got[:, :, 0], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("depth", "block", "layers"), [(18, "basic", [2, 2, 2, 2]), (50, "bottleneck", [3, 4, 6, 3])], ids=["18", "50"]
)
def test_monai_resnet_of_the_same_weights_gives_the_same_maps(depth, block, layers, tmp_path):
    theirs = MonaiResNet(
        block, layers, [8, 16, 32, 64], spatial_dims=3, n_input_channels=1, conv1_t_size=7, conv1_t_stride=2,
        shortcut_type="B", bias_downsample=False, feed_forward=False,
    )  # fmt: skip
    torch.save(randomise(theirs).eval().state_dict(), tmp_path / "monai.pt")
    network = narrow(depth, depth_stride=True, **ALL).eval()
    report = load_pretrained(network, tmp_path / "monai.pt")
    assert len(report.matched) == len(network.state_dict())
    assert not report.skipped
    maps = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        stage.register_forward_hook(lambda module, args, output: maps.append(output))
    x = torch.randn(2, 1, 33, 35, 50)
    with torch.inference_mode():
        pooled, ours = theirs(x), network(x)
    for got, want in zip(ours, maps, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours[-1].mean((2, 3, 4)), pooled)


# Copies


def test_pickled_and_deep_copied_networks_still_carry_and_check_their_architecture():
    for how in ("pickled", "deep-copied"):
        twin = COPIES[how](narrow(shortcut="A"), None)
        assert twin.state_dict()._metadata[""]["architecture"]["shortcut"] == "A"
        with pytest.raises(ValueError, match="depth_stride=True"):
            twin.load_state_dict(narrow(shortcut="A", depth_stride=True).state_dict())


# Architecture in the state dict


def test_state_dict_carries_the_architecture_through_a_file():
    network = narrow(depth_stride=True, stem="unet")
    assert saved_weights(network)._metadata[""]["architecture"] == {
        "depth": 18, "depth_stride": True, "stem": "unet", "strides": [1, 2, 2, 2], "shortcut": "B", "norm": "batch",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        pytest.param({"depth_stride": True}, r"depth_stride=True \(here False\)", id="depth_stride"),
        pytest.param({"stem": "flat"}, r"stem='flat' \(here 'strided'\)", id="stem"),
        pytest.param({"strides": (1, 2, 1, 2)}, r"strides=\[1, 2, 1, 2\] \(here \[1, 2, 2, 2\]\)", id="strides"),
        pytest.param({"norm": "instance"}, r"norm='instance' \(here 'batch'\)", id="norm"),
    ],
)
def test_state_dict_of_another_architecture_is_refused_whole(there, sentence):
    network = narrow()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=sentence) as refusal:
        network.load_state_dict(saved_weights(randomise(narrow(**there))))
    assert "build the network with the same arguments" in str(refusal.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_architecture_is_checked_inside_other_networks_too():
    with pytest.raises(ValueError, match="depth_stride=True"):
        ResUNet3D(2, base_channels=8, depth_stride=False).load_state_dict(
            saved_weights(ResUNet3D(2, base_channels=8, depth_stride=True))
        )


def test_state_dict_loads_into_the_same_architecture_and_from_a_plain_dictionary():
    source, network = randomise(narrow()), narrow(checkpointing=True, frozen_stages=1, norm_eval=True)
    network.load_state_dict(saved_weights(source))
    narrow(depth_stride=True).load_state_dict(dict(source.state_dict()))  # no metadata, nothing to compare
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_state_dict_of_a_version_that_had_dilations_loads_unless_it_was_dilated():
    state, network = saved_weights(randomise(narrow())), narrow()
    state._metadata[""]["architecture"]["dilations"] = [1, 1, 1, 1]
    network.load_state_dict(state)
    assert torch.equal(network.conv1.weight, state["conv1.weight"])
    state._metadata[""]["architecture"]["dilations"] = [1, 1, 2, 4]
    with pytest.raises(ValueError, match=r"dilations=\[1, 1, 2, 4\] \(here \[1, 1, 1, 1\]\)"):
        network.load_state_dict(state)


def test_load_pretrained_allows_other_strides_and_stems(tmp_path):
    torch.save(randomise(narrow()).state_dict(), tmp_path / "image.pt")
    for arguments in ({"depth_stride": True}, {"stem": "unet"}, FLAT):
        network = narrow(**arguments)
        assert len(load_pretrained(network, tmp_path / "image.pt").matched) == len(network.state_dict())


def test_stages_after_the_last_wanted_one_are_not_built():
    network = narrow(out_indices=(1,))
    assert {name.split(".")[0] for name in network.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}
    assert len(network(torch.zeros(1, 1, 3, 32, 32))) == 1


def test_names_are_torchvisions():
    for depth, build in ((18, torchvision.models.resnet18), (50, torchvision.models.resnet50)):
        with torch.device("meta"):
            theirs, ours = build(weights=None).state_dict(), ResNet3D(depth).state_dict()
        assert list(ours) == [name for name in theirs if not name.startswith("fc.")]


def test_each_depth_has_its_numbers_of_blocks():
    with torch.device("meta"):
        blocks = {
            depth: [len(stage) for stage in (n.layer1, n.layer2, n.layer3, n.layer4)]
            for depth, n in ((depth, ResNet3D(depth)) for depth in (18, 34, 50, 101, 152))
        }
    assert blocks == {18: [2] * 4, 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
