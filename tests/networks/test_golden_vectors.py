"""The published networks, rebuilt here, give the published numbers from the published names."""

from __future__ import annotations

import pytest
import torch

from networks import P3D, NoduleFCN, ResNet3D, ResNet3DClassifier, ResUNet3D, load_pretrained
from tests.support.golden import TOLERANCE, deviation, published_input, published_weights, read_vector

ALL_STAGES = (0, 1, 2, 3)
NETWORKS = {
    "resnet3d18_vdt": lambda: ResNet3D(18, out_indices=ALL_STAGES),
    "resnet3d50_vdt": lambda: ResNet3D(50, out_indices=ALL_STAGES),
    "resnet3d18_lidc": lambda: ResNet3D(18, depth_stride=True, out_indices=ALL_STAGES),
    "vdt_classifier18": lambda: ResNet3DClassifier(18, 1000),
    "bcv_stdunet": lambda: ResUNet3D(14),
    "lidc_fcn": lambda: NoduleFCN(),
    "p3d63": lambda: P3D(63),
    "mp3d63_groupconv": lambda: P3D(63, conversion="group"),
}
# Tensors and parameters of published layers that nothing uses and that are not built here.
DEAD = {"lidc_fcn": (4, 7_079_426)}


def _with_or_without_backbone(weights):
    """Put `backbone.` before an encoder's names, and take it from the names of a network that has it."""
    if "conv1.weight" in weights or "conv1_custom.weight" in weights:
        return {f"backbone.{key}": tensor for key, tensor in weights.items()}
    return {key.removeprefix("backbone."): tensor for key, tensor in weights.items()}


FILES = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"meta": {"epoch": 90}, "state_dict": weights},
    "model": lambda weights: {"model": weights, "epoch": 90},
    "module.": lambda weights: {f"module.{key}": tensor for key, tensor in weights.items()},
    "backbone.": _with_or_without_backbone,
}


def unfilled(name):
    """The network with NaN for every number, so that a tensor which is not loaded shows in the output."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    network.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    return network


def outputs_of(network, x):
    with torch.inference_mode():
        outputs = network(x)
    return outputs if isinstance(outputs, list) else [outputs]


def cases():
    """Every vector from its plain file and with or without `backbone.`; one from every kind of file."""
    for name in NETWORKS:
        for file in FILES if name == "vdt_classifier18" else ("bare", "backbone."):
            slow = name in ("lidc_fcn", "bcv_stdunet") or (name != "vdt_classifier18" and file != "bare")
            yield pytest.param(name, file, marks=[pytest.mark.slow] if slow else [], id=f"{name}-{file}")


@pytest.mark.parametrize(("name", "file"), cases())
def test_published_checkpoint_gives_the_published_numbers(name, file, tmp_path):
    vector, path = read_vector(name), tmp_path / "published.pth"
    torch.save(FILES[file](published_weights(name)), path)
    network = unfilled(name)
    report = load_pretrained(network, path)
    path.unlink()
    assert len(report.matched) == len(vector["state_dict"]) - DEAD.get(name, (0, 0))[0]
    outputs = outputs_of(network, published_input(vector))
    assert len(outputs) == len(vector["outputs"])
    for output, expected in zip(outputs, vector["outputs"], strict=True):
        assert deviation(output, expected) < TOLERANCE


@pytest.mark.parametrize("name", ["vdt_classifier18", pytest.param("mp3d63_groupconv", marks=pytest.mark.slow)])
def test_half_precision_file_gives_the_numbers_of_its_rounded_weights(name, tmp_path):
    # Half precision rounds a weight by up to 5e-4 of itself, more than the vectors' tolerance: so the output is
    # compared, exactly, with that of the same network holding the rounded weights in float32. A small input does.
    path = tmp_path / "half.pth"
    x = published_input(read_vector(name))[..., :32, :32]
    half = {k: v.half() if v.is_floating_point() else v for k, v in published_weights(name).items()}
    torch.save(half, path)
    loaded = unfilled(name)
    load_pretrained(loaded, path)
    torch.save({k: v.float() if v.is_floating_point() else v for k, v in half.items()}, path)
    rounded = unfilled(name)
    load_pretrained(rounded, path)
    path.unlink()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    encoder = getattr(loaded, "backbone", loaded)
    stem = next(v for k, v in published_weights(name).items() if v.shape[-2:] == (7, 7))
    loaded_stem = getattr(encoder, "conv1", None) or encoder.conv1_custom
    assert torch.equal(loaded_stem.weight, stem.half().float())
    assert not torch.equal(loaded_stem.weight, stem)
    for got, want in zip(outputs_of(loaded, x), outputs_of(rounded, x), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)


def test_a_small_change_of_one_norm_is_seen_by_the_vector():
    vector = read_vector("resnet3d18_vdt")
    network = unfilled("resnet3d18_vdt")
    network.load_state_dict(published_weights("resnet3d18_vdt"))
    network.layer4[1].bn2.eps = 1e-2
    assert deviation(outputs_of(network, published_input(vector))[-1], vector["outputs"][-1]) > TOLERANCE


@pytest.mark.parametrize("name", NETWORKS)
def test_network_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        network = NETWORKS[name]()
    published = read_vector(name)["parameters"] - DEAD.get(name, (0, 0))[1]
    assert sum(p.numel() for p in network.parameters()) == published


@pytest.mark.parametrize(
    ("build", "count"),
    [
        pytest.param(lambda: ResNet3D(34), 63_469_632, id="encoder-34"),
        pytest.param(lambda: ResNet3D(101), 85_201_216, id="encoder-101"),
        pytest.param(lambda: ResUNet3D(14), 40_673_134, id="unet-14-classes"),
        pytest.param(lambda: ResUNet3D(2), 40_672_930, id="unet-2-classes"),
        pytest.param(lambda: ResUNet3D(14, shortcut="A"), 40_499_310, id="unet-14-classes-shortcut-A"),
    ],
)
def test_number_of_parameters_is_the_counted_one(build, count):
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) == count
