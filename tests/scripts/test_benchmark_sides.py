from __future__ import annotations

import json
from functools import partial

import benchmarks.networks as benchmark_networks
import benchmarks.volumes as benchmark_volumes
import pytest
import torch
from benchmarks.networks import GROUPS, VARIANTS, Side, compare_networks, count_flops, network_side
from benchmarks.volumes import INFERERS, OVERLAP, add_windows, draw_growth
from monai.inferers import SlidingWindowInferer
from PIL import Image
from torch import nn

from networks import ResNet3DClassifier, ResUNet3D


def test_flop_are_two_for_each_product_of_a_convolution():
    conv = partial(nn.Conv3d, 2, 5, 3, padding=1, bias=False)
    assert count_flops(Side(conv, (1, 2, 6, 7, 8))) == 2 * 5 * 2 * 27 * 6 * 7 * 8


def test_a_strided_stem_asks_for_an_eighth_of_the_arithmetic():
    flops = [count_flops(Side(partial(ResUNet3D, 14, stem=stem), (1, 1, 32, 64, 64))) for stem in ("unet", "strided")]
    assert flops[1] / flops[0] == pytest.approx(1 / 8, rel=0.01)


def test_an_unknown_group_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="there is no group organ; there are encoder, pre-training, organs"):
        compare_networks(["organ"], 1, 1, "cpu")


@pytest.mark.parametrize("group", GROUPS)
def test_the_sides_of_a_group_see_inputs_of_one_size(group):
    sides = list(GROUPS[group].values())
    assert len(sides) > 1
    assert len({(side.shape[0], side.shape[-2:]) for side in sides}) == 1


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "compiled"])
def test_a_side_tells_its_figures_in_a_line(variant, monkeypatch, capsys):
    network = partial(ResNet3DClassifier, 18, 3, base_channels=2)
    monkeypatch.setitem(GROUPS, "tiny", {"ours": Side(network, (2, 1, 3, 32, 32))})
    monkeypatch.setattr(benchmark_networks, "_matmul_rate", lambda device: 1e9)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    network_side("tiny", "ours", variant, 2, "cpu")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["training"]) == len(found["inference"]) == 2
    assert found["parameters_M"] == round(sum(p.numel() for p in network().parameters()) / 1e6, 2)
    assert found["maps"] == (
        [[2, 2, 3, 8, 8], [2, 4, 3, 4, 4], [2, 8, 3, 2, 2], [2, 16, 3, 1, 1]] * (variant == "plain")
    )


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
def test_the_plain_loop_over_windows_gives_what_monais_inferer_gives(mode, monkeypatch):
    monkeypatch.setattr(benchmark_volumes, "ROI", (16, 16, 8))
    torch.manual_seed(0)
    network, volume = nn.Conv3d(1, 3, 3, padding=1), torch.randn(1, 1, 29, 21, 14)
    inferer = SlidingWindowInferer(roi_size=(16, 16, 8), overlap=OVERLAP, mode=mode)
    with torch.inference_mode():
        torch.testing.assert_close(add_windows(volume, network, mode), inferer(volume, network))


def test_growth_is_drawn_for_every_side(tmp_path):
    rows = {
        f"64 x 64 x {slices}": {side: {"seconds": slices / 9, "MB": 20 + slices} for side in INFERERS}
        for slices in (8, 16, 32)
    }
    draw_growth({"settings": {"classes": 2}, "MB_is": "peak", **rows}, tmp_path / "pictures" / "growth.png")
    with Image.open(tmp_path / "pictures" / "growth.png") as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
