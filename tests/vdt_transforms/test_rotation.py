"""Rotations and factors are those of the body in mm, whatever the voxels, and thick slices stay in their plane."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import RandCropByLabelClassesd

from vdt_transforms import RandRotateScale, RandRotateScaled, RandTurnedCropd


def rod(spacing, axis=0):
    """A volume of about 40 mm with a rod of 30 mm through its centre, along one axis."""
    size = [int(41 / s) // 2 * 2 + 1 for s in spacing]
    axes = [(np.arange(n) - n // 2) * s for n, s in zip(size, spacing, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    across = np.delete(places, axis, 0)
    inside = (np.abs(places[axis]) <= 15) & (np.abs(across).max(0) <= 3)
    return MetaTensor(torch.tensor(inside[None].astype(np.float32)), affine=torch.diag(torch.tensor([*spacing, 1.0])))


def direction(volume, spacing):
    """The direction and the length, in mm, of the longest axis of what is in a volume."""
    places = (volume.as_tensor()[0] > 0.5).nonzero().double() * torch.tensor(spacing, dtype=torch.float64)
    values, vectors = np.linalg.eigh(np.cov(places.numpy().T))
    return vectors[:, -1], np.sqrt(12 * values[-1])


def turn(volume, angles, factor=1.0):
    transform = RandRotateScale()
    transform.angles, transform.factor = angles, factor
    return transform(volume, randomize=False)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.8, 0.8, 2.0), (2.0, 1.0, 1.0)], ids=str)
def test_a_rod_turns_by_the_angle_drawn_in_mm(spacing):
    turned, length = direction(turn(rod(spacing), [0, 0.3, 0]), spacing)
    assert np.degrees(np.arctan2(abs(turned[2]), abs(turned[0]))) == pytest.approx(np.degrees(0.3), abs=2.5)
    assert abs(turned[1]) < 0.03
    assert length == pytest.approx(30, abs=3)


def test_a_factor_is_one_of_lengths():
    assert direction(turn(rod((1, 1, 2)), [0, 0, 0], 0.7), (1, 1, 2))[1] == pytest.approx(0.7 * 31, abs=1.5)


def test_thick_slices_are_turned_in_their_plane_and_neither_mixed_nor_scaled():
    volume = rod((0.8, 0.8, 3))
    volume[0] = torch.arange(volume.shape[-1])
    assert torch.allclose(turn(volume, [0.3, 0.3, 0.3], 0.8), volume, atol=1e-4)
    turned, _ = direction(turn(rod((0.8, 0.8, 3)), [0.3, 0.3, 0.3]), (0.8, 0.8, 3))
    assert np.degrees(np.arctan2(abs(turned[1]), abs(turned[0]))) == pytest.approx(np.degrees(0.3), abs=2.5)
    assert abs(turned[2]) < 0.01


def test_images_and_labels_turn_together_and_labels_stay_whole_numbers():
    image = rod((1, 1, 2))
    data = {"image": image, "label": 3 * image.to(torch.uint8)}
    transform = RandRotateScaled(["image", "label"], mode=["bilinear", "nearest"], prob=1.0).set_random_state(0)
    out = transform(data)
    assert out["label"].dtype == torch.uint8
    assert set(out["label"].unique().tolist()) == {0, 3}
    assert ((out["image"] > 0.5) == (out["label"] > 0)).float().mean() > 0.99
    assert not torch.equal(out["image"], image)


def test_it_happens_as_often_as_asked():
    transform = RandRotateScale(prob=0.25)
    transform.set_random_state(0)
    seen = []
    for _ in range(400):
        transform.randomize()
        seen.append((any(transform.angles), transform.factor != 1))
    assert np.mean(seen, 0) == pytest.approx([0.25, 0.25], abs=0.06)


def test_factors_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"scaling must be two positive factors, got \[0, 1\]"):
        RandRotateScale(scaling=[0, 1])


# Crops that are turned ------------------------------------------------------------------------------------------------


def coordinates(shape, spacing=(1.0, 1.0, 1.0)):
    """A volume whose three channels are the voxel's own place."""
    places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in shape), indexing="ij"))
    return MetaTensor(places, affine=torch.diag(torch.tensor([*spacing, 1.0])))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.5, 10.0)], ids=str)
def test_a_turned_part_holds_what_lies_there_in_the_volume(spacing):
    volume = coordinates((60, 70, 40), spacing)
    transform = RandRotateScale()
    transform.angles, transform.factor = [0.1, 0.2, 2.0], 1.3
    start, size = np.array([18, 20, 12]), np.array([16, 21, 8])
    part = transform.sample(volume, start, size, "bilinear")
    assert part.shape == (3, *size)
    offsets = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) - (size - 1) / 2
    expected = offsets @ transform.matrix(spacing)[:3, :3].T + start + (size - 1) / 2
    assert np.allclose(part.permute(1, 2, 3, 0).numpy(), expected, atol=1e-3)


def test_a_part_at_the_edge_goes_on_with_the_border_where_the_volume_ends():
    transform = RandRotateScale()
    transform.angles = [0, 0, np.pi / 4]
    part = transform.sample(coordinates((20, 20, 4)), [0, 0, 0], [12, 12, 4], "bilinear")
    assert part[0].min() == part[1].min() == 0  # beyond voxel 0 there is nothing
    assert part[1].max() == pytest.approx(5.5 + 5.5 * 2**0.5, abs=1e-3)  # of a part that ends at 11


def test_a_part_that_is_not_turned_is_cut_out_as_it_is():
    volume = coordinates((20, 20, 8))
    assert torch.equal(RandRotateScale().sample(volume, [3, 4, 1], [5, 6, 2], "bilinear"), volume[:, 3:8, 4:10, 1:3])


def make_crops(prob, **options):
    image = rod((1, 1, 2))
    data = {"image": image, "label": 2 * image.to(torch.uint8), "name": "a"}
    turn = RandRotateScale(rotation=3.0, prob=prob)
    given = {"label_key": "label", "spatial_size": (16, 12, 8), "num_classes": 3, "warn": False, **options}
    crop = RandTurnedCropd(["image", "label"], turn, ["bilinear", "nearest"], **given)
    return crop.set_random_state(1)(data), data


def test_crops_of_image_and_label_are_turned_together_about_one_centre():
    crops, data = make_crops(1.0, num_samples=4)
    assert [tuple(crop[key].shape) for crop in crops for key in ("image", "label")] == 8 * [(1, 16, 12, 8)]
    for crop in crops:
        assert crop["name"] == "a"
        assert crop["label"].dtype == torch.uint8
        assert set(crop["label"].unique().tolist()) <= {0, 2}
        assert ((crop["image"] > 0.5) == (crop["label"] > 0)).float().mean() > 0.97
    assert len({crop["image"].sum().item() for crop in crops}) > 1
    assert data["image"].shape == rod((1, 1, 2)).shape


def test_crops_that_are_not_turned_are_those_of_monai():
    options = {"label_key": "label", "spatial_size": (16, 12, 8), "num_classes": 3, "warn": False, "num_samples": 3}
    crops, data = make_crops(0.0, num_samples=3)
    theirs = RandCropByLabelClassesd(["image", "label"], **options).set_random_state(1)(data)
    for ours, other in zip(crops, theirs, strict=True):
        assert all(torch.equal(ours[key], other[key]) for key in ("image", "label"))
        assert torch.equal(ours["image"].affine, other["image"].affine)
