"""What is asked of every network alike: shapes, finite values, gradients, and copies that answer as the network."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import nn

from networks import (
    P3D,
    DepthFirst,
    GenesisUNet3D,
    LesionDetector,
    NoduleFCN,
    ResNet2D,
    ResNet2DClassifier,
    ResNet3D,
    ResNet3DClassifier,
    ResUNet3D,
)
from networks.layers import InstanceNorm
from networks.resnet3d import norm_layer
from tests.support.network_checks import (
    COPIES,
    NORMS,
    as_list,
    assert_compiled_step_is_the_eager_step,
    assert_copy_answers_alike,
    assert_every_parameter_gets_a_gradient,
    probe_loss,
    randomise,
)

SPARE = {"checkpointing": True, "shortcut": "A", "norm": "group"}
FLAT = {"stem": "flat", "strides": (1, 2, 1, 2), "depth_stride": True, "base_channels": 8}
DETECTOR = partial(LesionDetector, "18ba", base_channels=4, pyramid_channels=16, head_channels=32)
# name: how it is built, an input of an odd size without its batch axis, the outputs' shapes without theirs
NETWORKS = {
    "encoder": (
        partial(ResNet3D, 18, out_indices=(0, 1, 2, 3), **FLAT),
        (1, 6, 17, 16),
        [(8, 6, 17, 16), (16, 3, 9, 8), (32, 3, 9, 8), (64, 2, 5, 4)],
    ),
    "encoder-spare": (partial(ResNet3D, 18, **FLAT, **SPARE), (1, 6, 17, 16), [(64, 2, 5, 4)]),
    "encoder-two-stages": (
        partial(ResNet3D, 18, return_stem=True, out_indices=(1,), **FLAT),
        (1, 6, 17, 16),
        [(8, 6, 17, 16), (16, 3, 9, 8)],
    ),
    "encoder-2d": (partial(ResNet2D, 50, base_channels=8, norm="group"), (3, 65, 48), [(256, 3, 2)]),
    "classifier": (partial(ResNet3DClassifier, 18, 5, base_channels=8, dropout=0.2), (3, 33, 48), [(5,)]),
    "classifier-spare": (
        partial(ResNet3DClassifier, 34, 5, base_channels=8, in_channels=2, **SPARE),
        (2, 1, 33, 48),
        [(5,)],
    ),
    "classifier-2d": (partial(ResNet2DClassifier, 18, 5, base_channels=8), (1, 3, 65, 48), [(5,)]),
    "unet": (  # with a strided stem, which takes every path of the code
        partial(ResUNet3D, 3, base_channels=8, stem="strided"),
        (1, 16, 17, 35),
        [(3, 16, 17, 35)],
    ),
    "unet-fine": (
        partial(ResUNet3D, 3, base_channels=8, stem="strided", fine_channels=4, head_channels=0),
        (1, 16, 17, 35),
        [(3, 16, 17, 35)],
    ),
    "unet-spare": (
        partial(ResUNet3D, 3, 50, base_channels=6, head_channels=5, in_channels=2, **SPARE),
        (2, 16, 32, 33),
        [(3, 16, 32, 33)],
    ),
    "fcn": (partial(NoduleFCN, 2, base_channels=4), (1, 12, 13, 18), [(2, 12, 13, 18)]),
    "fcn-spare": (partial(NoduleFCN, 3, base_channels=4, **SPARE), (1, 1, 9, 12), [(3, 1, 9, 12)]),
    "genesis": (partial(GenesisUNet3D, 2, base_channels=2), (1, 3, 17, 8), [(2, 3, 17, 8)]),
    "p3d": (partial(P3D, "18ba", base_channels=4), (9, 40, 70), [(4, 10, 18), (8, 5, 9), (16, 3, 5), (32, 2, 3)]),
    "p3d-bottlenecks": (
        partial(P3D, 18, base_channels=4),
        (9, 33, 48),
        [(16, 9, 12), (32, 5, 6), (64, 3, 3), (128, 2, 2)],
    ),
    "mp3d-63": (
        partial(P3D, 63, base_channels=2, conversion="group"),
        (9, 40, 48),
        [(8, 10, 12), (16, 5, 6), (32, 3, 3), (64, 2, 2)],
    ),
    "mp3d": (
        partial(P3D, "18ba", base_channels=4, conversion="group"),
        (1, 9, 33, 48),
        [(4, 9, 12), (8, 5, 6), (16, 3, 3), (32, 2, 2)],
    ),
    "depth-first": (lambda: DepthFirst(nn.Conv3d(1, 2, 3)), (1, 33, 32, 17), [(2, 31, 30, 15)]),
    "depth-first-classifier": (
        lambda: DepthFirst(ResNet3DClassifier(18, 2, base_channels=8), restore=False),
        (1, 33, 32, 17),
        [(2,)],
    ),
    "detector": (DETECTOR, (9, 64, 70), [(100, 6)]),
    "detector-p3d": (partial(DETECTOR, columns_first=True, conversion="center"), (1, 9, 64, 70), [(100, 6)]),
}
# In training a detector takes targets and returns losses (test_detector.py), whose boxes are drawn at random.
WITHOUT_TARGETS = [name for name in NETWORKS if not name.startswith("detector")]


def make(name, batch):
    build, size, _ = NETWORKS[name]
    return build(), torch.randn(batch, *size)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_finite_and_of_the_shape_of_the_table(name, batch):
    network, x = make(name, batch)
    with torch.no_grad():
        outputs = as_list(randomise(network).eval()(x))
    assert [tuple(y.shape) for y in outputs] == [(batch, *shape) for shape in NETWORKS[name][2]]
    assert all(y.isfinite().all() for y in outputs)


@pytest.mark.parametrize("name", WITHOUT_TARGETS)
def test_every_parameter_gets_a_gradient(name):
    network, x = make(name, 2)
    assert_every_parameter_gets_a_gradient(randomise(network), x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_goes_through_a_file_into_another_network(name):
    network, x = make(name, 1)
    file = io.BytesIO()
    torch.save(randomise(network).eval().state_dict(), file)
    file.seek(0)
    twin = make(name, 1)[0].eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for got, want in zip(as_list(twin(x)), as_list(network(x)), strict=True):
            assert torch.equal(got, want)


def copies():
    """Every network in every kind of copy; the compiled kinds of near relatives take seconds.

    torch.export stops at the number of boxes: test_detector.py expects its error.
    """
    for name in NETWORKS:
        relative = name.endswith(("-spare", "-two-stages", "-bottlenecks", "-63", "-first-classifier"))
        for how in COPIES:
            if not (how == "exported" and name.startswith("detector")):
                slow = relative and how in ("scripted", "exported")
                yield pytest.param(name, how, marks=[pytest.mark.slow] if slow else [], id=f"{name}-{how}")


# In float32, boxes of nearly equal score may change places; what is compared is exact in practice on one machine.
@pytest.mark.parametrize(("name", "how"), copies())
def test_copy_answers_as_the_network_does(name, how):
    assert_copy_answers_alike(*make(name, 1), how)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("build", "numbers"),
    [
        pytest.param(partial(ResNet3D, 18), {"": 20}, id="18"),
        pytest.param(partial(ResNet3D, 34), {"": 36}, id="34"),
        pytest.param(partial(ResNet3D, 50), {"": 53}, id="50"),
        pytest.param(partial(ResNet3D, 18, shortcut="A"), {"": 17}, id="18-shortcut-A"),
        pytest.param(partial(ResNet3D, 50, shortcut="A"), {"": 49}, id="50-shortcut-A"),
        pytest.param(partial(ResNet3D, 18, out_indices=(1,)), {"": 10}, id="18-two-stages"),
        pytest.param(partial(ResNet3DClassifier, 18, 5), {"": 20}, id="classifier"),
        pytest.param(partial(ResUNet3D, 3), {"backbone": 20, "neck": 12, "decode_head": 2}, id="unet"),
        pytest.param(partial(NoduleFCN, 2), {"backbone": 20, "decode_head": 3}, id="fcn"),
    ],
)
def test_norm_reaches_every_layer(build, numbers, norm):
    with torch.device("meta"):
        network = build(norm=norm)
    for part, number in numbers.items():
        found = [find_norm(m) for m in network.get_submodule(part).modules() if find_norm(m)]
        assert found == [norm] * number


def find_norm(module):
    if isinstance(module, nn.GroupNorm):
        return "instance" if isinstance(module, InstanceNorm) else "group"
    return "batch" if isinstance(module, nn.BatchNorm3d) else None


def test_instance_norm_is_torchs_and_gives_its_bias_where_a_map_has_one_voxel():
    norm = norm_layer("instance", 6)
    x = 3 * torch.randn(2, 6, 4, 3, 5) + 1
    torch.testing.assert_close(norm(x), nn.InstanceNorm3d(6, affine=True)(x))
    assert norm(x[:1, :, :1, :1, :1]).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["unet", "p3d"])  # of the encoder: test_resnet3d.py
def test_checkpointing_changes_no_bit_of_the_gradients(name):
    build, size, _ = NETWORKS[name]
    more = {"dropout": 0.0} if name == "unet" else {}
    networks = [randomise(build(checkpointing=checkpointing, **more)) for checkpointing in (False, True)]
    x = torch.randn(2, *size)
    for network in networks:
        probe_loss(network(x)).backward()
    for (parameter, a), b in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), parameter


@pytest.mark.slow  # compiling takes seconds
@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(partial(ResNet3D, depth_stride=True, out_indices=(1, 3)), (2, 1, 16, 32, 48), id="encoder"),
        pytest.param(partial(ResNet3DClassifier, num_classes=5), (4, 3, 64, 64), id="classifier"),
        pytest.param(
            partial(ResUNet3D, 3, dropout=0.0, norm="batch", checkpointing=True), (2, 1, 16, 32, 33), id="unet"
        ),
        pytest.param(partial(P3D, conversion="group"), (1, 1, 9, 32, 32), id="mp3d"),
    ],
)
def test_compiled_training_step_is_the_eager_one(build, size):
    assert_compiled_step_is_the_eager_step(build(depth=18, base_channels=4), torch.randn(size))


@pytest.mark.parametrize(
    "build",
    [
        partial(ResNet3DClassifier, 18),
        partial(ResNet2DClassifier, 18),
        ResUNet3D,
        NoduleFCN,
        GenesisUNet3D,
        LesionDetector,
    ],
)
def test_a_number_of_classes_below_one_is_refused(build):
    with torch.device("meta"), pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build(num_classes=0)
