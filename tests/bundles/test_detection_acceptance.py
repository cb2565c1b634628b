"""The published lesion detector at its own size; its parts are tested in tests/networks, one by one."""

import pytest
import torch

from networks import P3D, LesionDetector, load_pretrained
from tests.support.golden import read_vector


@pytest.mark.parametrize(
    ("depth", "conversion", "parameters", "channels"),
    [
        (63, "center", 27_281_728, (256, 512, 1024, 2048)),
        (63, "group", 27_316_288, (256, 512, 1024, 2048)),
        ("18ba", "center", 15_257_536, (64, 128, 256, 512)),
        ("18ba", "group", 15_266_176, (64, 128, 256, 512)),
    ],
)
def test_parameters_and_maps_of_512_pixels_are_the_published_ones(depth, conversion, parameters, channels):
    with torch.device("meta"):
        network = P3D(depth, conversion=conversion)
        depths = []
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            stage.register_forward_hook(lambda module, x, y: depths.append(y.shape[2]))
        maps = network(torch.empty(1, 1, 9, 512, 512))
    assert sum(p.numel() for p in network.parameters()) == parameters
    sides = (128, 64, 32, 16)
    assert [tuple(m.shape) for m in maps] == [(1, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert depths == ([9, 5, 3, 1] if conversion == "center" else [9, 9, 9, 9])


def test_state_dict_has_the_published_names_and_half_precision_loads(tmp_path):
    for name, conversion in (("p3d63", "center"), ("mp3d63_groupconv", "group")):
        with torch.device("meta"):
            state = P3D(63, conversion=conversion).state_dict()
        assert {key: list(tensor.shape) for key, tensor in state.items()} == read_vector(name)["state_dict"]
    assert len(read_vector("mp3d63_groupconv")["state_dict"]) == 211
    network = LesionDetector("18ba", base_channels=4, pyramid_channels=8, head_channels=8)
    assert len(network.backbone.state_dict()) == 112
    half = {f"backbone.{k}": v.half() for k, v in network.backbone.state_dict().items() if "groupconv" not in k}
    torch.save({"state_dict": half}, tmp_path / "coco.pth")
    report = load_pretrained(network, tmp_path / "coco.pth")
    assert (len(report.matched), len(report.centred)) == (108, 4)
