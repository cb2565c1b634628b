"""Weights turned into native files and into MONAI's."""

import json

import pytest
import torch
import torchvision
from monai.networks.nets import ResNet as MonaiResNet
from monai.networks.nets import resnet18

from networks import ResNet2D, ResNet3D, ResNet3DClassifier, load_pretrained
from tests.support.network_checks import randomise
from vdt_workflows.cli import run_function
from vdt_workflows.preparation.convert import convert_weights
from vdt_workflows.training.checkpoints import save_weights
from vdt_workflows.training.initialisation import initialise


@pytest.fixture
def image(tmp_path):
    """A 2D classifier's file, with torchvision's names."""
    torch.manual_seed(0)
    state = randomise(ResNet2D(18, base_channels=4)).state_dict()
    torch.save({**state, "fc.weight": torch.zeros(3, 32), "fc.bias": torch.zeros(3)}, tmp_path / "image.pth")
    return tmp_path / "image.pth"


@pytest.mark.parametrize("init", ["i3d", "acs", "2.5d"])
def test_a_2d_file_becomes_native_with_a_word_for_each_tensor(init, image, tmp_path):
    result = convert_weights(str(image), str(tmp_path / "encoder.pt"), init=init)
    assert result["architecture"] == {
        "depth": 18, "base_channels": 4, "in_channels": 3, "shortcut": "B", "norm": "batch",
    }  # fmt: skip
    assert (result["copied"], result["summed"], result["inflated"], result["dropped"]) == (100, 1, 20, 2)
    tensors = json.loads((tmp_path / "encoder.json").read_text())["tensors"]
    assert set(tensors) == set(torch.load(image))
    assert tensors["conv1.weight"] == "summed over the channels of its input, inflated"
    assert tensors["layer1.0.conv1.weight"] == "inflated"
    assert tensors["fc.bias"] == "dropped, ResNet3D has no such layer"
    by_file = initialise(ResNet3D(18, base_channels=4), "vdt", tmp_path / "encoder.pt").state_dict()
    at_once = ResNet3D(18, base_channels=4)
    load_pretrained(at_once, image, conversion=init)
    assert all(torch.equal(tensor, by_file[name]) for name, tensor in at_once.state_dict().items())


def test_the_mean_of_an_rgb_stem_is_a_third_of_its_sum(image, tmp_path):
    stems = []
    for stem in ("sum", "mean"):
        convert_weights(str(image), str(tmp_path / f"{stem}.pt"), init="i3d", stem=stem)
        stems.append(torch.load(tmp_path / f"{stem}.pt")["conv1.weight"])
    torch.testing.assert_close(stems[1], stems[0] / 3)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_monais_own_resnet_answers_as_the_encoder_with_depth_strides(shortcut, tmp_path):
    source = randomise(ResNet3DClassifier(18, 2, base_channels=4, shortcut=shortcut)).eval()
    save_weights(source, tmp_path / "model.pt")
    result = convert_weights(str(tmp_path / "model.pt"), str(tmp_path / "monai.pt"), target="monai")
    assert "strides the slice axis" in result["lost"][0]
    theirs = MonaiResNet("basic", [2, 2, 2, 2], **result["call"]).eval()
    theirs.load_state_dict(torch.load(tmp_path / "monai.pt", weights_only=True))
    ours = ResNet3D(18, base_channels=4, shortcut=shortcut, depth_stride=True)
    load_pretrained(ours, tmp_path / "model.pt")
    x = torch.randn(1, 1, 17, 33, 40)
    with torch.inference_mode():
        want = ours.eval()(x)[-1].mean((2, 3, 4))
        torch.testing.assert_close(theirs(x), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        lossy = source.backbone(x)[-1].mean((2, 3, 4))  # without depth strides it answers otherwise, as the result says
        assert not torch.allclose(lossy, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def test_monais_function_takes_the_file_by_its_name(tmp_path):
    torch.save(ResNet3D(18).state_dict(), tmp_path / "encoder.pt")
    result = convert_weights(str(tmp_path / "encoder.pt"), str(tmp_path / "monai.pt"), target="monai")
    network = resnet18(pretrained=str(tmp_path / "monai.pt"), **result["call"])
    assert torch.equal(network.state_dict()["conv1.weight"].cpu(), torch.load(tmp_path / "encoder.pt")["conv1.weight"])


def test_a_video_resnet_of_torchvision_is_read(tmp_path):
    with torch.device("meta"):
        state = torchvision.models.video.r3d_18().state_dict()
    empty = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    torch.save(empty, tmp_path / "r3d_18.pth")
    result = convert_weights(str(tmp_path / "r3d_18.pth"), str(tmp_path / "encoder.pt"))
    tensors = json.loads((tmp_path / "encoder.json").read_text())["tensors"]
    summed = "summed over the channels of its input, filled up with zeros from 3 to 7 taps along depth"
    assert tensors["conv1.weight"] == summed
    assert (result["architecture"]["depth"], result["copied"]) == (18, 119)


def test_wrong_requests_are_answered_in_one_sentence(image, tmp_path):
    trained, output = tmp_path / "trained.pt", str(tmp_path / "out.pt")
    torch.save(ResNet3D(18, base_channels=4).state_dict(), trained)
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for arguments, kind, sentence in (
        ((image, output), ValueError, r"image\.pth: is a 2D network's file .* init 'i3d', 'acs', '2\.5d'"),
        ((trained, output, "i3d"), ValueError, r"trained\.pt: is a 3D network's file"),
        ((trained, output, "vdt"), ValueError, r"init must be one of \('i3d', 'acs', '2\.5d'\), or left out .*'vdt'"),
        ((trained, output, None, "sum", "2d"), ValueError, r"target must be 'native' or 'monai', got '2d'"),
        (
            (tmp_path / "other.pt", output),
            ValueError,
            r"other\.pt: holds no ResNet of 18, .*; its first tensor is a\.w",
        ),
        ((tmp_path / "none.pt", output), FileNotFoundError, r"none\.pt: no such checkpoint file"),
        (
            (image, str(trained), "i3d"),
            FileExistsError,
            r"trained\.pt: exists already; name another output, or add --o",
        ),
    ):
        names = ("source", "output", "init", "stem", "target")
        with pytest.raises(kind, match=sentence) as caught:
            convert_weights(**{n: a and str(a) for n, a in zip(names, arguments, strict=False)})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.pt").exists()


def test_the_command_line_prints_one_line_of_json(image, tmp_path, capsys):
    run_function(convert_weights, ["--source", str(image), "--output", str(tmp_path / "e.pt"), "--init", "2.5d"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["inflated"] == 20
