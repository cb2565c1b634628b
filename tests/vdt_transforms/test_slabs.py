from collections import Counter

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from vdt_transforms import ForegroundSlices, ForegroundSlicesd, RandSlab, RandSlabd


def scan(slices, first, last, size=4):
    """Each slice holds its own number; the label is 1 in the lower left corner of the slices from first to last."""
    image = torch.arange(slices, dtype=torch.float32).expand(1, size, size, slices).clone()
    label = torch.zeros(1, size, size, slices, dtype=torch.uint8)
    label[:, :2, :2, first : last + 1] = 1
    return MetaTensor(image), MetaTensor(label)


def numbers(slab):
    assert (slab == slab[:, :1, :1]).all()
    return [int(n) for n in slab[0, 0, 0]]


def starts(slab, image, label, draws=3000):
    return Counter(numbers(slab(image, label))[0] for _ in range(draws))


@pytest.mark.parametrize(("first", "last"), [(0, 9), (3, 3), (2, 7)])
def test_foreground_slices_are_the_first_and_the_last_and_without_any_all(first, last):
    assert ForegroundSlices()(scan(10, first, last)[1]).tolist() == [first, last]
    assert ForegroundSlices()(torch.zeros(1, 4, 4, 7)).tolist() == [0, 6]


@pytest.mark.slow
def test_slab_inside_reaches_each_place_of_the_extent_equally_often():
    found = starts(RandSlab(4).set_random_state(0), *scan(20, 5, 14))
    assert sorted(found) == list(range(5, 12))  # the last slab ends with the extent's last slice
    assert max(found.values()) < 1.3 * min(found.values())


@pytest.mark.parametrize(("first", "last"), [(9, 10), (0, 1), (18, 19)])
def test_slab_thicker_than_the_extent_contains_it(first, last):
    image, label = scan(20, first, last)
    slab = RandSlab(6).set_random_state(0)
    for _ in range(50):
        got = numbers(slab(image, label))
        assert got == list(range(got[0], got[0] + 6))
        assert got[0] <= first
        assert got[-1] >= last


def test_scan_thinner_than_the_slab_goes_on_with_its_outermost_slice():
    image, label = scan(3, 1, 1)
    assert numbers(RandSlab(5)(image, label)) == [0, 1, 2, 2, 2]
    assert RandSlab(5)(label, label)[0, 0, 0].tolist() == [0, 1, 0, 0, 0]


def test_middle_slice_comes_from_the_extent_or_from_the_whole_scan():
    label = scan(40, 10, 12)[1]
    slab = RandSlab(4, foreground_prob=0.5, inside=False).set_random_state(0)
    middles = Counter(slab.start + 1 for _ in range(4000) if slab.randomize(label) is None)
    assert sorted(middles) == list(range(40))
    inside = sum(middles[n] for n in (10, 11, 12)) / 4000
    assert inside == pytest.approx(0.5 + 0.5 * 3 / 40, abs=0.03)


def test_slab_at_the_end_of_a_scan_repeats_its_outermost_slice():
    image = scan(8, 0, 0)[0]
    slab = RandSlab(6, inside=False)
    slab.start = -2
    assert numbers(slab(image, randomize=False)) == [0, 0, 0, 1, 2, 3]
    slab.start = 5
    assert numbers(slab(image, randomize=False)) == [5, 6, 7, 7, 7, 7]


def test_slab_that_one_label_fills_is_drawn_again():
    image, label = scan(30, 0, 29)
    label[..., 4:] = 0  # the extent is given: most of it is background alone
    extent = torch.tensor([0, 29])
    slab = RandSlab(4, max_share=0.9, tries=50).set_random_state(0)
    assert all(label[..., int(numbers(slab(image, label, extent))[0]) :].any() for _ in range(200))
    once = RandSlab(4, max_share=0.9, tries=1).set_random_state(0)
    assert not all(label[..., int(numbers(once(image, label, extent))[0]) :].any() for _ in range(200))


def test_keys_share_the_draw_and_the_known_extent_is_used_up():
    image, label = scan(20, 5, 14)
    prepared = ForegroundSlicesd("label")({"image": image, "label": label})
    assert prepared["label_slices"].tolist() == [5, 14]
    prepared["label_slices"] = torch.tensor([16, 19])
    out = RandSlabd(["image", "label"], "label", 4)(prepared)
    assert numbers(out["image"]) == [16, 17, 18, 19]
    assert sorted(out) == ["image", "label"]
    assert out["label"].dtype == torch.uint8
    assert out["label"].shape == (1, 4, 4, 4)


def test_cut_is_a_view_of_the_scan_and_keeps_its_place_in_the_world():
    image, label = scan(20, 5, 8)
    out = RandSlab(4)(image, label)
    assert out.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    np.testing.assert_array_equal(out.affine[:3, 3], [0, 0, 5])


@pytest.mark.parametrize("arguments", [{"slices": 0}, {"slices": 4, "tries": 0}], ids=str)
def test_wrong_argument_is_named(arguments):
    with pytest.raises(ValueError, match="slices and tries must be at least 1"):
        RandSlab(**arguments)
