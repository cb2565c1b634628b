import re
from functools import partial

import benchmarks.network_steps as network_steps
import benchmarks.volumes as benchmark_volumes
import pytest
import torch
from benchmarks.network_steps import GROUPS, VARIANTS, Entry, compare_networks, count_flops, time_network
from benchmarks.volumes import INFERERS, OVERLAP, add_windows, draw_growth
from monai.inferers import SlidingWindowInferer
from PIL import Image
from torch import nn

from networks import ResNet3DClassifier, ResUNet3D


def test_flop_are_two_for_each_product_of_a_convolution():
    conv = partial(nn.Conv3d, 2, 5, 3, padding=1, bias=False)
    assert count_flops(Entry(conv, (1, 2, 6, 7, 8))) == 2 * 5 * 2 * 27 * 6 * 7 * 8


def test_a_strided_stem_asks_for_an_eighth_of_the_arithmetic():
    with torch.device("meta"):  # where no weight is drawn
        entries = [Entry(partial(ResUNet3D, 14, stem=stem), (1, 1, 32, 64, 64)) for stem in ("unet", "strided")]
        flops = [count_flops(entry) for entry in entries]
    assert flops[1] / flops[0] == pytest.approx(1 / 8, rel=0.01)


def test_an_unknown_group_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"groups must be 'encoder', 'pre-training', 'organs', .*, got 'organ'"):
        compare_networks(["organ"], 1, 1, "cpu")


@pytest.mark.parametrize("group", GROUPS)
def test_the_networks_of_a_group_see_inputs_of_one_size(group):
    entries = list(GROUPS[group].values())
    assert len(entries) > 1
    assert len({(entry.shape[0], entry.shape[-2:]) for entry in entries}) == 1


def test_the_encoders_that_are_compared_give_maps_of_equal_shapes():
    shapes = []
    for entry in GROUPS["encoder"].values():
        with torch.device("meta"):  # where no weight is drawn
            network = entry.build().eval()
        stages = [module for name, module in network.named_modules() if re.fullmatch(r"(.*\.)?layer\d", name)]
        found = []
        for stage in stages:
            stage.register_forward_hook(lambda stage, x, out, found=found: found.append(out.shape))
        network(torch.empty(entry.shape, device="meta"))
        shapes.append(found)
    assert len(shapes[0]) == 4
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "compiled"])
def test_a_network_is_timed_with_each_knob(variant, monkeypatch):
    network = partial(ResNet3DClassifier, 18, 3, base_channels=2)
    monkeypatch.setitem(GROUPS, "tiny", {"ours": Entry(network, (2, 1, 3, 32, 32))})
    monkeypatch.setattr(network_steps, "_matmul_rate", lambda device: 1e9)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = time_network("tiny", "ours", variant, 2, "cpu")
    assert len(found["training"]) == len(found["inference"]) == 2
    assert found["parameters_M"] == round(sum(p.numel() for p in network().parameters()) / 1e6, 2)


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_the_plain_loop_over_windows_gives_what_monais_inferer_gives(mode, monkeypatch):
    monkeypatch.setattr(benchmark_volumes, "ROI", (16, 16, 8))
    torch.manual_seed(0)
    network, volume = nn.Conv3d(1, 3, 3, padding=1), torch.randn(1, 1, 29, 21, 14)
    inferer = SlidingWindowInferer(roi_size=(16, 16, 8), overlap=OVERLAP, mode=mode)
    with torch.inference_mode():
        torch.testing.assert_close(add_windows(volume, network, mode, OVERLAP), inferer(volume, network))


def test_growth_is_drawn_for_every_implementation(tmp_path):
    at = {slices: {"seconds": slices / 9, "MB": 20 + slices} for slices in (8, 16, 32)}
    rows = {f"64 x 64 x {slices}": dict.fromkeys(INFERERS, found) for slices, found in at.items()}
    draw_growth(rows, tmp_path / "pictures" / "growth.png", "convolution")
    with Image.open(tmp_path / "pictures" / "growth.png") as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
