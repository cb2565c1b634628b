"""Whole-volume inference gives MONAI's labels, on whatever grid is asked for, from a few slices of logits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Invertd, SpatialPadd
from torch import nn

from tests.makers.volumes import make_affine
from vdt_transforms import Spacingd
from vdt_workflows.evaluation.inference import PULL, SlabInferer

WINDOW = {"roi_size": (24, 32, 16), "overlap": (0.5, 0.5, 0.625)}
CHANNELS = 5


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Conv3d(1, CHANNELS, 3, padding=1).requires_grad_(False)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_same_labels(labels, logits):
    """Equal but for voxels whose two best logits are equal up to rounding."""
    best = logits.topk(2, 1).values
    clear = (best[:, :1] - best[:, 1:]) > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], logits.argmax(1, keepdim=True).to(labels)[clear])


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("size", [(40, 50, 60), (24, 32, 16), (20, 50, 13), (33, 48, 44), (25, 33, 17)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_labels_are_those_of_the_default_inferer(network, size, mode, batch):
    x = noise(batch, 1, *size)
    labels = SlabInferer(**WINDOW, mode=mode, sw_batch_size=3)(x, network)
    assert labels.shape == (batch, 1, *size)
    assert labels.dtype == torch.uint8
    assert_same_labels(labels, SlidingWindowInferer(**WINDOW, mode=mode)(x, network))


@pytest.mark.parametrize(
    ("slices", "windows"),
    [(33, 18), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((32, 9), (44, 18), (85, 54)))],
)
def test_windows_of_a_512_pixel_scan_are_as_many_as_published(slices, windows):
    seen = []

    def look(x):
        seen.extend(x)
        return x

    SlabInferer((256, 256, 32), (0.5, 0.5, 0.625))(torch.zeros(1, 1, 512, 512, slices), look)
    assert len(seen) == windows


def test_logits_of_one_window_depth_are_all_that_is_held(network):
    inferer, largest = SlabInferer(**WINDOW), []
    slabs = inferer._slabs

    def watched(*args):
        for start, slab in slabs(*args):
            largest.append(slab.shape[1])
            yield start, slab

    inferer._slabs = watched
    inferer(noise(1, 1, 24, 32, 200), network)
    assert max(largest) <= 16
    assert sum(largest) == 200


def resampled(size, spacing, pixdim, pad=None):
    steps = [Spacingd("image", pixdim=pixdim)] + ([SpatialPadd("image", pad)] if pad else [])
    preprocessing = Compose(steps)
    image = MetaTensor(noise(1, *size), affine=torch.as_tensor(make_affine(spacing, (5, -6, 70))))
    return preprocessing, preprocessing({"image": image})


@pytest.mark.parametrize(
    ("spacing", "pixdim", "pad"),
    [
        pytest.param((1, 1.3, 2.5), (0.8, 1, 1), None, id="finer"),
        pytest.param((1, 1, 1), (1, 1, 2.5), None, id="thicker-slices"),
        pytest.param((0.7, 0.7, 5), (1.1, 0.9, 1), (48, 48, 99), id="mixed-and-padded"),
    ],
)
def test_inverted_logits_are_those_that_monai_inverts(network, spacing, pixdim, pad):
    preprocessing, prepared = resampled((40, 45, 30), spacing, pixdim, pad)
    batch = list_data_collate([prepared])
    labels = SlabInferer(**WINDOW, inversion="logits")(batch["image"], network)
    prepared["pred"] = decollate_batch(SlidingWindowInferer(**WINDOW)(batch["image"], network))[0]
    inverse = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(prepared)["pred"]
    assert labels.shape[2:] == inverse.shape[1:] == (40, 45, 30)
    np.testing.assert_allclose(labels.affine.reshape(4, 4), inverse.affine, atol=1e-9)
    # MONAI takes zeros beyond the outermost voxels' centres, this goes on with their values.
    assert_same_labels(labels[..., 1:-1, 1:-1, 1:-1], inverse[None, :, 1:-1, 1:-1, 1:-1].as_tensor())


def test_labels_stay_on_the_networks_grid_unless_logits_are_inverted(network):
    _, prepared = resampled((30, 33, 20), (1, 1, 2), (1, 1, 1))
    batch = list_data_collate([prepared])["image"]
    labels = SlabInferer(**WINDOW)(batch, network)
    assert labels.shape == batch.shape
    np.testing.assert_array_equal(labels.affine, batch.affine)


def test_volume_that_was_never_resampled_inverts_to_itself(network):
    image = list_data_collate([MetaTensor(noise(1, 30, 33, 20))])
    labels = [SlabInferer(**WINDOW, inversion=inversion)(image, network) for inversion in ("labels", "logits")]
    assert torch.equal(labels[0], labels[1])


def test_a_plain_tensor_does_not_tell_how_to_invert_it(network):
    with pytest.raises(ValueError, match="needs a MetaTensor, which records the transforms"):
        SlabInferer(**WINDOW, inversion="logits")(noise(1, 1, 30, 33, 20), network)


def sided(x):
    """Class 1 where the first axis is low, 2 where it is high, whatever the image shows."""
    ramp = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1, 1).expand_as(x)
    return torch.cat([torch.full_like(x, -0.5), -ramp, ramp], 1)


def test_left_right_flip_exchanges_the_names_of_the_sides():
    x = noise(1, 1, 24, 32, 16)
    plain = SlabInferer(**WINDOW)(x, sided)
    swapped = SlabInferer(**WINDOW, flips=[[0]], swap=[[1, 2]])(x, sided)
    assert torch.equal(plain, swapped)
    blurred = SlabInferer(**WINDOW, flips=[[0]])(x, lambda x: sided(x)[:, 1:])
    assert not blurred.any()  # without the exchange the two sides' logits average to the same


def test_flips_average_the_logits_of_mirror_images(network):
    x = noise(1, 1, *WINDOW["roi_size"])
    logits = network(x) + network(x.flip(3)).flip(3) + network(x.flip((2, 4))).flip((2, 4))
    assert_same_labels(SlabInferer(**WINDOW, flips=[[1], [0, 2]])(x, network), logits / 3)


def test_the_pull_of_class_weights_is_taken_from_the_logits():
    x = noise(1, 1, 24, 32, 16)
    odds = torch.sigmoid(x)  # of class 1 against class 0, as it is in the data
    weights = [0.1, 2]

    def learnt(x):  # what weights make of them, beside an unweighted Dice
        return torch.cat([torch.sigmoid(-x) * weights[0] ** PULL, torch.sigmoid(x) * weights[1] ** PULL], 1).log()

    assert torch.equal(SlabInferer(**WINDOW, class_weights=weights)(x, learnt), (odds > 0.5).to(torch.uint8))
    assert SlabInferer(**WINDOW)(x, learnt).sum() > 1.5 * (odds > 0.5).sum()
    with pytest.raises(ValueError, match="class_weights has 3 values for a network of 2"):
        SlabInferer(**WINDOW, class_weights=[1, 1, 1])(x, learnt)


def test_windows_in_air_are_not_shown_and_are_background():
    seen = []

    def everything_is_an_organ(x):
        seen.append(x)
        return torch.cat([torch.zeros_like(x), torch.ones_like(x)], 1)

    x = torch.full((1, 1, 24, 32, 160), -2.0)
    x[..., 50:90] = 0.5
    labels = SlabInferer(**WINDOW, skip_below=-1.9)(x, everything_is_an_organ)
    assert all((window > -1.9).any() for window in seen)
    shown = len(seen)
    everywhere = SlabInferer(**WINDOW)(x, everything_is_an_organ)
    assert shown < 0.5 * (len(seen) - shown)
    assert labels[..., 50:90].all()
    assert not labels[..., :34].any()
    assert not labels[..., 106:].any()
    assert everywhere.all()


def test_a_volume_of_air_alone_is_background(network):
    labels = SlabInferer(**WINDOW, skip_below=0.0)(torch.full((1, 1, 30, 33, 40), -1.0), network)
    assert labels.shape == (1, 1, 30, 33, 40)
    assert not labels.any()


def test_half_precision_logits_are_summed_in_single_precision(network):
    x = noise(1, 1, 24, 32, 64)
    halves = SlidingWindowInferer(**WINDOW)(x, lambda w: network(w).half().float())
    assert_same_labels(SlabInferer(**WINDOW)(x, lambda w: network(w).half()), halves)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "linear"}, "mode must be 'constant' or 'gaussian'"),
        ({"inversion": "none"}, "inversion must be 'labels' or 'logits'"),
        ({"roi_size": (24, 32)}, "roi_size must be three positive numbers"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1"),
        ({"skip_below": "air"}, "skip_below must be a number or 'none'"),
        ({"flips": [[3]]}, "flips must hold lists of axes"),
        ({"flips": [[0], [0, 1]], "mirrored": [0]}, r"training did not flip axis 1, .* mirrored is \[0\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_argument_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        partial(SlabInferer, **WINDOW)(**arguments)
