from __future__ import annotations

import re

import pytest
import torch
import torchvision
from network_checks import count, randomise

from networks import (
    DepthFirst,
    FlatConv3d,
    NoduleFCN,
    ResNet2D,
    ResNet2DClassifier,
    ResNet3D,
    ResNet3DClassifier,
    ResUNet3D,
    convert,
    load_pretrained,
)
from vdt_workflows import initialise, load_weights, save_weights


@pytest.fixture
def encoder(tmp_path):
    """A pre-trained encoder's file and its tensors."""
    torch.manual_seed(0)
    network = ResNet3D(18, base_channels=4)
    save_weights(network, tmp_path / "encoder.pt")
    return tmp_path / "encoder.pt", network.state_dict()


def segmenter(seed=1):
    torch.manual_seed(seed)
    return DepthFirst(ResUNet3D(2, depth=18, base_channels=4))


def copy(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_from_scratch_the_random_weights_stay():
    network = segmenter()
    before = copy(network)
    assert initialise(network) is network
    assert initialise(network, "scratch") is network
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_vdt_fills_the_encoder_and_leaves_the_decoder_random(encoder):
    file, tensors = encoder
    network = segmenter()
    before = copy(network)
    assert initialise(network, "vdt", str(file)) is network
    after = network.state_dict()
    inside = {name.split("backbone.")[1]: name for name in after if "backbone." in name}
    assert set(tensors) == set(inside)
    assert all(torch.equal(after[inside[name]], tensor) for name, tensor in tensors.items())
    others = set(after) - set(inside.values())
    assert others
    assert all(torch.equal(after[name], before[name]) for name in others)


@pytest.mark.parametrize(("stem", "part"), [("sum", 1.0), ("mean", 1 / 3)])
def test_the_stem_option_reaches_the_loader(encoder, tmp_path, stem, part):
    tensors = dict(encoder[1])
    grey = tensors["conv1.weight"]
    torch.save({**tensors, "conv1.weight": grey.repeat(1, 3, 1, 1, 1) / 3}, tmp_path / "rgb.pt")
    network = initialise(ResNet3D(18, base_channels=4), "vdt", tmp_path / "rgb.pt", stem=stem)
    torch.testing.assert_close(network.state_dict()["conv1.weight"], grey * part)


def test_an_unknown_init_is_refused_with_the_known_ones():
    known = "'scratch', 'vdt', 'i3d', 'acs', '2.5d', 'kinetics', 'medicalnet', 'genesis', 'imagenet', 'coco'"
    with pytest.raises(ValueError, match=rf"init must be one of \({re.escape(known)}\), got 'video'"):
        initialise(segmenter(), "video")


def test_weights_that_scratch_would_ignore_are_refused(encoder):
    with pytest.raises(ValueError, match=r"init .*'scratch'.* ignores pretrained='.*encoder\.pt'; did you mean"):
        initialise(segmenter(), "scratch", encoder[0])


def test_vdt_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"init 'vdt' needs pretrained, the path of a weights file such as models/enc"):
        initialise(segmenter(), "vdt")


def test_a_missing_file_and_another_architecture_are_refused_and_change_nothing(encoder, tmp_path):
    network = segmenter()
    before = copy(network)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        initialise(network, "vdt", tmp_path / "none.pt")
    save_weights(ResNet3D(34, base_channels=4), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"deeper\.pt: does not fit .*is in the file only"):
        initialise(network, "vdt", tmp_path / "deeper.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


# 2D networks


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"state_dict": {f"module.{k}": v for k, v in n.items()}}])
@pytest.mark.parametrize("init", ["i3d", "acs", "2.5d"])
def test_a_2d_network_starts_a_segmentation_as_it_was_converted(init, wrap, tmp_path):
    source = randomise(ResNet2DClassifier(18, 7, base_channels=4))
    torch.save(wrap(source.state_dict()), tmp_path / "image.pt")
    network = initialise(segmenter(), init, tmp_path / "image.pt")
    grey = torch.randn(1, 1, 24, 32, 40)
    source.backbone[3].stride, source.backbone[0].stride = 2, 1  # the U-Net's stem does not stride
    want = convert(source.backbone, init).eval()(grey.expand(-1, 3, -1, -1, -1))
    got = network.network.backbone.eval()(grey)[-1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert (count(network, FlatConv3d) > 0) == (init != "i3d")
    assert not network.network.decode_head.convs[0].conv.weight.isnan().any()


@pytest.mark.parametrize("init", ["acs", "2.5d"])
def test_what_flat_kernels_save_is_a_native_network_of_the_same_answers(init, tmp_path):
    torch.save(randomise(ResNet2D(18, base_channels=4)).state_dict(), tmp_path / "image.pt")
    network = initialise(segmenter(), init, tmp_path / "image.pt").eval()
    save_weights(network, tmp_path / "model.pt")
    native = segmenter(seed=2)
    load_weights(native, tmp_path / "model.pt")
    x = torch.randn(1, 1, 24, 32, 16)
    with torch.inference_mode():
        torch.testing.assert_close(native.eval()(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_networks_are_read(name, tmp_path):
    torch.save(getattr(torchvision.models, name)().state_dict(), tmp_path / "image.pth")
    with torch.device("meta"):
        network = ResNet3D(int(name[6:]))
    network.to_empty(device="cpu")
    report = load_pretrained(network, tmp_path / "image.pth", conversion="i3d")
    kernels = [n for n, t in network.state_dict().items() if t.dim() == 5]
    assert sorted(report.inflated) == sorted(kernels)
    assert report.folded == ["conv1.weight"]
    assert sorted(report.matched + report.inflated) == sorted(network.state_dict())
    assert set(report.skipped) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("init", "network"),
    [
        ("i3d", lambda: ResNet3DClassifier(18, 2, base_channels=4)),
        ("acs", lambda: NoduleFCN(base_channels=4)),
        ("2.5d", lambda: DepthFirst(ResNet3DClassifier(18, 2, base_channels=4), restore=False)),
    ],
)
def test_every_network_with_this_encoder_takes_them(init, network, tmp_path):
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    network = initialise(network(), init, tmp_path / "image.pt").eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 1, 16, 16, 16)).isfinite().all()


def test_the_wrong_dimension_or_depth_of_a_file_is_told(encoder, tmp_path):
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    with pytest.raises(
        ValueError, match=r"image\.pt: is a 2D network's file .*; say how its kernels become 3D, init 'i3d'"
    ):
        initialise(segmenter(), "vdt", tmp_path / "image.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt: is a 3D network's file .* but 'acs' converts 2D ones"):
        initialise(segmenter(), "acs", encoder[0])
    torch.save(ResNet2D(34, base_channels=8).state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(ValueError, match=r"of the file \(depth 34, here 18; base_channels 8, here 4\)$"):
        initialise(segmenter(), "i3d", tmp_path / "deeper.pt")
