import pytest
import torch
from torch import nn

from networks import DepthFirst, ResNet3DClassifier, ResUNet3D, load_pretrained
from tests.support.network_checks import randomise

X, Y, Z = 4, 5, 6  # no two alike, so that a swap of axes shows


class Recorder(nn.Module):
    """Return the input, and remember its size and where its largest value was."""

    def forward(self, x):
        self.size = tuple(x.shape)
        self.place = tuple(int(i) for i in torch.nonzero(x == x.max())[0])
        return x


def volume_with_a_spot_at(x, y, z):
    volume = torch.zeros(1, 1, X, Y, Z)
    volume[0, 0, x, y, z] = 1
    return volume


def test_convention_x_is_width_y_is_height_z_is_depth():
    recorder = Recorder()
    volume = volume_with_a_spot_at(1, 2, 3)
    restored = DepthFirst(recorder)(volume)
    assert recorder.size == (1, 1, Z, Y, X)
    assert recorder.place == (0, 0, 3, 2, 1)
    assert torch.equal(restored, volume)


@pytest.mark.parametrize(
    ("kernel", "moved"),
    [
        pytest.param((3, 1, 1), (1, 2, 4), id="depth-moves-along-Z"),
        pytest.param((1, 3, 1), (1, 3, 3), id="height-moves-along-Y"),
        pytest.param((1, 1, 3), (2, 2, 3), id="width-moves-along-X"),
    ],
)
def test_convention_a_kernel_along_one_network_axis_acts_along_one_axis_of_monai(kernel, moved):
    shift = nn.Conv3d(1, 1, kernel, padding=tuple(k // 2 for k in kernel), bias=False)
    with torch.no_grad():
        shift.weight.copy_(torch.tensor([1.0, 0.0, 0.0]).view(1, 1, *kernel))  # each voxel takes its forerunner
        assert torch.equal(DepthFirst(shift)(volume_with_a_spot_at(1, 2, 3)), volume_with_a_spot_at(*moved))


def test_segmentation_has_the_size_of_monais_volume():
    network = randomise(ResUNet3D(3, base_channels=8)).eval()
    x = torch.randn(2, 1, 32, 17, 5)
    logits = DepthFirst(network)(x)
    assert logits.shape == (2, 3, 32, 17, 5)
    assert torch.equal(logits.permute(0, 1, 4, 3, 2), network(x.permute(0, 1, 4, 3, 2)))


def test_without_restore_a_classifiers_logits_are_left_alone():
    network = randomise(ResNet3DClassifier(18, 4, base_channels=8)).eval()
    x = torch.randn(2, 1, 32, 48, 3)
    logits = DepthFirst(network, restore=False)(x)
    assert logits.shape == (2, 4)
    assert torch.equal(logits, network(x.permute(0, 1, 4, 3, 2)))


def test_input_is_not_changed():
    x = volume_with_a_spot_at(1, 2, 3)
    before = x.clone()
    DepthFirst(nn.ReLU())(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("saved_wrapped", [False, True])
@pytest.mark.parametrize("loaded_wrapped", [False, True])
def test_load_pretrained_sees_through_the_wrapper_on_either_side(saved_wrapped, loaded_wrapped, tmp_path):
    source, target = (ResUNet3D(3, base_channels=8) for _ in range(2))
    randomise(source)
    torch.save((DepthFirst(source) if saved_wrapped else source).state_dict(), tmp_path / "unet.pt")
    report = load_pretrained(DepthFirst(target) if loaded_wrapped else target, tmp_path / "unet.pt")
    assert len(report.matched) == len(source.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())
