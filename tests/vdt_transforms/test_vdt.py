import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor

from vdt_transforms import (
    MEAN,
    STD,
    ImageToVolume,
    InterpolateSlices,
    RandSliceDrift,
    RandSliceShuffle,
    RandSliceShuffled,
    VolumeToImage,
)

ROWS, COLUMNS = 4, 7
KINDS = [
    pytest.param(np.asarray, id="numpy"),
    pytest.param(torch.from_numpy, id="torch"),
    pytest.param(lambda x: MetaTensor(torch.from_numpy(x), meta={"filename_or_obj": "a.png"}), id="metatensor"),
]


def image(channels=3, dtype="uint8"):
    return np.random.default_rng(0).integers(0, 255, (channels, ROWS, COLUMNS)).astype(dtype)


def equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def orders(shuffle, times, slices=3):
    """What the shuffle makes of a volume whose slices hold their numbers."""
    numbers = np.arange(slices)[None, :, None, None]
    return [tuple(shuffle(numbers)[0, :, 0, 0].tolist()) for _ in range(times)]


# ImageToVolume and VolumeToImage


def test_the_constants_are_the_means_of_imagenets_three_channels():
    assert pytest.approx(np.mean([123.675, 116.28, 103.53])) == MEAN
    assert pytest.approx(np.mean([58.395, 57.12, 57.375])) == STD
    assert (MEAN, STD) == (114.495, 57.63)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_the_volume_back_to_an_image_is_the_image(kind, dtype):
    given = kind(image(dtype=dtype))
    back = VolumeToImage()(ImageToVolume()(given))
    assert equal(back, given)
    assert (type(back), back.dtype) == (type(given), given.dtype)
    lifted = ImageToVolume(mean=MEAN, std=STD)(given)
    assert str(lifted.dtype).removeprefix("torch.") == "float32"
    assert type(lifted) is type(given)
    np.testing.assert_allclose(np.asarray(lifted)[0], (image(dtype=dtype).astype(float) - MEAN) / STD, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(VolumeToImage(MEAN, STD)(lifted)), image(), atol=1e-4)


def test_convention_colours_become_slices_rows_stay_rows_and_columns_stay_columns():
    given = np.zeros((3, ROWS, COLUMNS), np.uint8)
    given[2, 1, 6] = 255  # blue, second row, last column
    lifted = ImageToVolume()(given)
    assert lifted.shape == (1, 3, ROWS, COLUMNS)
    assert np.argwhere(lifted).tolist() == [[0, 2, 1, 6]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slices", [1, 3, 5])
def test_a_grey_image_is_repeated(kind, slices):
    lifted = ImageToVolume(slices)(kind(image(1)))
    assert lifted.shape == (1, slices, ROWS, COLUMNS)
    for i in range(slices):
        assert equal(lifted[0, i], image(1)[0])


def test_metadata_is_kept():
    given = KINDS[2].values[0](image())
    for transform in (ImageToVolume(), ImageToVolume(mean=MEAN, std=STD)):
        assert transform(given).meta["filename_or_obj"] == "a.png"


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (2, ROWS, COLUMNS), (4, ROWS, COLUMNS), (1, 3, ROWS, COLUMNS)])
def test_an_image_of_another_shape_is_refused_with_a_sentence(shape):
    with pytest.raises(ValueError, match=r"img must have shape \(3, H, W\), or \(1, H, W\).*got \(" + str(shape[0])):
        ImageToVolume()(np.zeros(shape))


@pytest.mark.parametrize("shape", [(3, ROWS, COLUMNS), (2, 3, ROWS, COLUMNS), (1, 1, 3, ROWS, COLUMNS)])
def test_a_volume_of_another_shape_is_refused_with_a_sentence(shape):
    with pytest.raises(ValueError, match=r"img must have shape \(1, D, H, W\), got \(" + str(shape[0])):
        VolumeToImage()(torch.zeros(shape))


@pytest.mark.parametrize("std", [0, -1.0])
def test_a_std_that_is_not_positive_is_refused(std):
    with pytest.raises(ValueError, match=f"std must be positive, got {std}"):
        ImageToVolume(std=std)


# RandSliceShuffle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slices", [1, 3, 8])
def test_a_shuffle_is_a_permutation_of_the_slices(kind, slices):
    given = kind(image(slices, "float32")[None])
    shuffle = RandSliceShuffle().set_random_state(0)
    for _ in range(10):
        shuffled = shuffle(given)
        assert shuffled.shape == given.shape
        assert sorted(shuffle.order) == list(range(slices))
        assert equal(shuffled, np.asarray(given)[:, shuffle.order])


def test_all_six_orders_come_about_equally_often():
    counts = Counter(orders(RandSliceShuffle().set_random_state(0), 3000))
    assert set(counts) == set(permutations(range(3)))
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 20.5  # 99.9 % of fair shuffles, 5 degrees of freedom


def test_prob_is_the_share_of_volumes_that_are_shuffled():
    shuffle = RandSliceShuffle(prob=0.3).set_random_state(0)
    shuffled = sum(order != tuple(range(8)) for order in orders(shuffle, 1000, slices=8))
    assert 250 < shuffled < 350


def loaded(workers, seed):
    """Orders of 24 volumes, by two workers or none."""
    numbers = torch.arange(6.0)[None, :, None, None]
    data = Dataset([{"image": numbers}] * 24, RandSliceShuffled("image"))
    torch.manual_seed(seed)
    loader = DataLoader(data, batch_size=1, num_workers=workers, generator=torch.Generator().manual_seed(seed))
    return [tuple(batch["image"].flatten().tolist()) for batch in loader]


def test_two_workers_draw_differently_and_reproducibly():
    first = loaded(2, seed=0)
    assert first == loaded(2, seed=0)
    assert first != loaded(2, seed=1)
    assert first[0::2] != first[1::2]  # batches alternate between the workers


# InterpolateSlices and RandSliceDrift


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_interpolated_slices_lie_on_the_line_between_their_neighbours(dtype):
    values = np.array([10, 40, 100], dtype)
    volume = np.broadcast_to(values[:, None, None], (1, 3, 2, 2)).copy()
    found = InterpolateSlices(5)(volume)
    assert found.dtype == volume.dtype
    assert found[0, :, 1, 0].tolist() == [10, 25, 40, 70, 100]


@pytest.mark.parametrize("kind", KINDS)
def test_three_slices_of_three_are_left_as_they_are(kind):
    given = kind(image(3, "float32")[None])
    assert InterpolateSlices(3)(given) is given


def drifted(volume, **rates):
    """What a drift of fixed rates makes of a volume."""
    drift = RandSliceDrift().set_random_state(0)
    drift.randomize()
    drift.rates = np.array([rates.get(name, 0.0) for name in ("down", "across", "turn", "growth")])
    return drift(volume, randomize=False)


def test_a_drift_shifts_the_ends_apart_and_keeps_the_middle():
    volume = np.zeros((1, 3, 16, 16), "float32")
    volume[0, :, 8, 4] = 1
    moved = drifted(volume, down=2 / 16, across=-1 / 16)
    places = [np.unravel_index(slice_.argmax(), slice_.shape) for slice_ in moved[0]]
    assert places == [(6, 5), (8, 4), (10, 3)]
    assert np.allclose(moved.sum(axis=(0, 2, 3)), 1)  # whole pixels: nothing is lost or smeared


def test_a_quarter_turn_from_slice_to_slice_is_numpy_s_rot90():
    volume = np.random.default_rng(0).random((1, 3, 9, 9), "float32")
    moved = drifted(volume, turn=np.pi / 2)
    assert np.allclose(moved[0, 1], volume[0, 1], atol=1e-5)
    assert np.allclose(moved[0, 0], np.rot90(volume[0, 0], 1), atol=1e-4)
    assert np.allclose(moved[0, 2], np.rot90(volume[0, 2], -1), atol=1e-4)


def test_growth_makes_a_square_as_much_larger():
    volume = np.zeros((1, 3, 64, 64), "float32")
    volume[0, :, 24:40, 24:40] = 1
    small, same, large = drifted(volume, growth=np.log(1.5))[0].sum(axis=(1, 2))
    assert same == pytest.approx(256, rel=1e-5)
    assert large == pytest.approx(256 * 1.5**2, rel=0.02)
    assert small == pytest.approx(256 / 1.5**2, rel=0.05)  # of 11 pixels a side, with soft edges


def test_the_rates_of_a_drift_stay_within_their_limits_and_reach_them():
    drift = RandSliceDrift(shift=0.1, angle=10, scale=0.2).set_random_state(0)
    drawn = []
    for _ in range(500):
        drift.randomize()
        drawn.append(drift.rates)
    limits = [0.1, 0.1, np.deg2rad(10), np.log(1.2)]
    assert np.allclose(np.abs(drawn).max(axis=0), limits, rtol=0.02)
    assert np.all(np.abs(drawn) <= limits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InterpolateSlices(1), "slices must be 2 or more, got 1"),
        (lambda: InterpolateSlices(5)(np.zeros((3, 4, 4))), "img must have shape"),
        (lambda: RandSliceDrift(shift=-0.1), "shift must not be negative, got -0.1"),
    ],
)
def test_wrong_numbers_of_slices_and_limits_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
