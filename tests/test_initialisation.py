from __future__ import annotations

import hashlib

import pytest
import torch

from networks import DepthFirst, ResNet3D, ResUNet3D
from vdt_workflows import INITIALISATIONS, initialise, read_provenance, save_weights


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
    with pytest.raises(ValueError, match=r"init must be one of \('scratch', 'vdt', 'imagenet', 'coco'\), got 'video'"):
        initialise(segmenter(), "video")
    assert INITIALISATIONS == ("scratch", "vdt", "imagenet", "coco")


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


def test_what_is_saved_later_says_which_file_it_started_from(encoder, tmp_path):
    file, tensors = encoder
    save_weights(initialise(segmenter(), "vdt", file), tmp_path / "model.pt", {"depth": 18})
    found = read_provenance(tmp_path / "model.pt")
    assert (found["depth"], found["init"]) == (18, "vdt")
    assert found["pretrained"]["file"] == "encoder.pt"
    assert found["pretrained"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    torch.save(tensors, tmp_path / "published.pth")
    network = initialise(segmenter(), "vdt", tmp_path / "published.pth")
    save_weights(network.network.backbone, tmp_path / "encoder_of_it.pt")
    assert read_provenance(tmp_path / "encoder_of_it.pt")["pretrained"]["provenance"] == {}


def test_weights_from_scratch_name_no_file(tmp_path):
    save_weights(initialise(segmenter()), tmp_path / "model.pt")
    assert read_provenance(tmp_path / "model.pt") == {}
