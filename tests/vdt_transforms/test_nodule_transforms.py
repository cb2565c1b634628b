"""The reader of nodules, the crop around a place in the world, and the rotations of a cube."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.layers import spatial_transforms
from monai.transforms import (
    CenterSpatialCrop,
    Compose,
    LoadImaged,
    Orientationd,
    RandAxisFlip,
    RandRotate90,
    RandSpatialCropd,
)
from nibabel.affines import apply_affine

from tests.makers.volumes import make_affine, write_volume
from vdt_transforms import CropNodule, CropNoduled, NoduleReader, RandRotateCube
from vdt_transforms.nodules import combine_turns


def load(path, **options):
    return LoadImaged("image", reader="vdt_transforms.NoduleReader", ensure_channel_first=True, **options)(
        {"image": str(path)}
    )["image"]


def numbered(*shape):
    """A volume whose voxels all differ."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)


# NoduleReader ------------------------------------------------------------------------------------------------------


def test_convention_a_published_cube_z_y_x_comes_out_as_x_y_z_in_hu(tmp_path):
    voxel = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)  # slices, rows, columns
    voxel[1, 2, 3], voxel[0, 0, 0] = 255, 0
    np.savez(tmp_path / "lidc1_1.npz", voxel=voxel, answer1=voxel > 200)
    image = load(tmp_path / "lidc1_1.npz")
    assert image.shape == (1, 6, 5, 4)
    assert image[0, 3, 2, 1] == 400
    assert image[0, 0, 0, 0] == -1024
    np.testing.assert_allclose(image[0], voxel.T / 255 * 1424 - 1024.0, atol=1e-3)
    assert torch.equal(image.affine, torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)))
    assert str(image.meta["filename_or_obj"]).endswith("lidc1_1.npz")
    mask = load(tmp_path / "lidc1_1.npz", array="answer1")
    np.testing.assert_array_equal(mask[0], (voxel > 200).T)
    assert torch.equal(mask.affine, image.affine)


def test_a_nifti_file_is_read_as_monai_reads_it(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", affine=make_affine((-1.0, -1.0, 1.0), (5.0, 6.0, 7.0)), dtype=np.int16)
    ours = load(path, array="answer1")
    plain = LoadImaged("image", ensure_channel_first=True)({"image": str(path)})["image"]
    assert torch.equal(ours.as_tensor(), plain.as_tensor())
    assert torch.equal(ours.affine, plain.affine)
    assert ours.dtype == plain.dtype


def test_several_files_become_channels(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", voxel=np.full((2, 3, 4), ord(name), np.uint8))
    files = [str(tmp_path / f"{name}.npz") for name in "ab"]
    both = LoadImaged("image", reader=NoduleReader)({"image": files})["image"]
    assert both.shape == (2, 4, 3, 2)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "not a readable nodule or scan"),
        (lambda path: np.savez(path, image=np.zeros((2, 2, 2))), "it has the arrays image, not voxel"),
        (lambda path: np.savez(path, voxel=np.zeros((2, 2))), r"its voxel has the shape \(2, 2\), not \(z, y, x\)"),
        (lambda path: np.savez(path, voxel=np.array([{}])), "not a readable nodule or scan"),
        (lambda path: None, "no such file"),
    ],
)
def test_a_spoilt_cube_is_named_in_one_sentence(tmp_path, write, sentence):
    write(tmp_path / "lidc7_1.npz")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load(tmp_path / "lidc7_1.npz")
    assert "lidc7_1.npz" in str(caught.value)


def test_a_truncated_nifti_cube_is_named_in_one_sentence(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", shape=(20, 20, 20))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.nii\.gz: cut short or damaged"):
        load(path)


# RandRotateCube ----------------------------------------------------------------------------------------------------


def test_combined_turns_are_the_turns_one_after_the_other():
    x = numbered(3, 4, 5)[0]
    for *turns, reflection in product(range(4), range(4), range(4), (None, 0, 1, 2)):
        expected = x
        for count, plane in zip(turns, ((0, 1), (0, 2), (1, 2)), strict=True):
            expected = np.rot90(expected, count, plane)
        if reflection is not None:
            expected = np.flip(expected, reflection)
        axes, back = combine_turns(turns, reflection)
        turned = np.flip(x.transpose(axes), [i for i in range(3) if back[i]])
        assert np.array_equal(turned, expected), (turns, reflection)


@pytest.mark.parametrize(("reflect", "orientations"), [(False, 24), (True, 48)])
def test_each_orientation_occurs_as_often_as_the_published_draws_make_it(reflect, orientations):
    expected = Counter()
    for *turns, reflection in product(range(4), range(4), range(4), (None, 0, 1, 2) if reflect else (None,)):
        axes, back = combine_turns(turns, reflection)
        expected[tuple(axes), tuple(back)] += 1
    rotate, draws = RandRotateCube(reflect=reflect), 64 * orientations
    rotate.set_random_state(0)
    found = Counter()
    for _ in range(draws):
        rotate.randomize()
        found[tuple(rotate.axes), tuple(rotate.back)] += 1
    assert len(expected) == len(found) == orientations
    for orientation, times in expected.items():
        mean = draws * times / expected.total()
        assert abs(found[orientation] - mean) < 4.5 * np.sqrt(mean), orientation


def test_rotations_are_proper_and_eight_of_them_come_twice_as_often():
    expected = Counter()
    for turns in product(range(4), repeat=3):
        axes, back = combine_turns(turns, None)
        matrix = np.zeros((3, 3))
        matrix[range(3), axes] = np.where(back, -1, 1)
        assert np.linalg.det(matrix) == pytest.approx(1)
        expected[tuple(axes), tuple(back)] += 1
    assert sorted(expected.values()) == [2] * 16 + [4] * 8


@pytest.mark.slow
def test_monais_transforms_draw_the_same_orientations():
    ours, parts = RandRotateCube(), [RandRotate90(0.75, 3, plane) for plane in ((0, 1), (0, 2), (1, 2))]
    parts.append(RandAxisFlip(0.75))
    x, draws = torch.from_numpy(numbered(2, 2, 2)), 1200
    for seed, transform in enumerate((ours, *parts)):
        transform.set_random_state(seed)
    found = [Counter(tuple(np.asarray(f(x)).flatten()) for _ in range(draws)) for f in (ours, Compose(parts))]
    for orientation in set(found[0]) | set(found[1]):
        a, b = found[0][orientation], found[1][orientation]
        assert abs(a - b) < 4.5 * np.sqrt(a + b)


def test_each_voxel_keeps_its_place_in_the_world():
    affine = torch.tensor([[-0.5, 0, 0, 9], [0, 0, 2, -4], [0, 1, 0, 30], [0, 0, 0, 1]], dtype=torch.float64)
    x, rotate = MetaTensor(torch.from_numpy(numbered(3, 4, 5)), affine=affine), RandRotateCube()
    rotate.set_random_state(0)
    for _ in range(30):
        y = rotate(x)
        for voxel in ((0, 0, 0), (1, 2, 2), (2, 1, 0)):
            world = y.affine @ torch.tensor([*voxel, 1.0], dtype=torch.float64)
            source = torch.linalg.solve(affine, world)[:3].round().long()
            assert y[(0, *voxel)] == x[(0, *source)]


# CropNodule --------------------------------------------------------------------------------------------------------

OBLIQUE = np.array([[-0.7, 0, 0, 30.0], [0, -0.6, 0.2, 40.0], [0, 0.1, 2.4, -50.0], [0, 0, 0, 1.0]])


def ramp(shape, affine):
    """A volume whose value is a plane in the world, x + 2 y + 3 z mm, which linear interpolation gives exactly."""
    world = apply_affine(affine, np.stack(np.indices(shape), -1))
    return MetaTensor(torch.as_tensor(world @ [1.0, 2.0, 3.0])[None].float(), affine=torch.as_tensor(affine))


@pytest.mark.parametrize("spacing", [1.0, 0.8, 2.0])
@pytest.mark.parametrize(
    "affine", [make_affine((-0.7, -0.7, 2.5), (30.0, 40.0, -50.0)), OBLIQUE], ids=["axial", "oblique"]
)
def test_a_crop_has_each_voxel_at_its_place_in_the_world(affine, spacing):
    volume, position = ramp((90, 100, 40), affine), apply_affine(affine, (45.3, 52.8, 20.6))
    cube = CropNodule(16, spacing)(volume, position)
    np.testing.assert_allclose(cube[0], ramp((16, 16, 16), cube.affine.numpy())[0], atol=1e-3)
    np.testing.assert_allclose(apply_affine(cube.affine.numpy(), [7.5] * 3), position, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(cube.affine.numpy()[:3, :3], axis=0), spacing)


def test_a_crop_has_each_voxel_at_its_place_with_monai_1_5_too(monkeypatch):
    """That version scales as without aligned corners, even where it samples with them."""
    as_now = spatial_transforms.to_norm_affine

    def as_then(**given):
        return as_now(**{**given, "align_corners": False})

    monkeypatch.setattr(spatial_transforms, "to_norm_affine", as_then)
    volume, position = ramp((90, 100, 40), OBLIQUE), apply_affine(OBLIQUE, (45.3, 52.8, 20.6))
    cube = CropNodule(16, 0.8)(volume, position)
    np.testing.assert_allclose(cube[0], ramp((16, 16, 16), cube.affine.numpy())[0], atol=1e-3)


def test_a_crop_on_the_grid_takes_voxels_as_they_are():
    affine = make_affine((-1.0, -1.0, 1.0), (5.0, 6.0, 7.0))
    volume = MetaTensor(torch.from_numpy(numbered(20, 21, 22)), affine=torch.as_tensor(affine))
    cube = CropNodule(8)(volume, apply_affine(affine, (9.5, 10.5, 11.5)))
    assert torch.equal(cube.as_tensor(), volume.as_tensor()[:, 6:14, 7:15, 8:16])
    assert torch.equal(CropNodule(8)(volume).as_tensor(), CenterSpatialCrop(8)(volume).as_tensor())
    assert cube.as_tensor().untyped_storage().nbytes() == 8**3 * 4  # no hold on the whole scan


def test_a_crop_that_leaves_the_scan_is_filled_with_air_and_not_shifted(caplog):
    affine = make_affine((0.7, 0.7, 2.0))
    cube = CropNodule(16)(ramp((60, 60, 60), affine), (1.0, 20.0, 60.0))
    places = apply_affine(cube.affine.numpy(), np.stack(np.indices((16,) * 3), -1))
    inside = (places >= 0).all(-1)
    np.testing.assert_allclose(cube[0][inside], (places @ [1.0, 2.0, 3.0])[inside], atol=1e-3)
    np.testing.assert_allclose(cube[0][(places <= -0.7).any(-1)], -1024, atol=1e-3)
    assert 0.3 < inside.mean() < 0.7
    assert "the crop at (1.0, 20.0, 60.0) mm leaves the scan; outside is taken as air" in caplog.text


def test_a_small_cube_is_filled_up_around_its_centre():
    cube = CropNodule(48)(torch.zeros(1, 32, 40, 48))
    assert torch.equal(cube.as_tensor()[0, 8:40, 4:44], torch.zeros(32, 40, 48))
    assert (cube == 0).sum() == 32 * 40 * 48
    assert cube.min() == -1024


def test_a_position_outside_the_scan_is_refused(tmp_path):
    path = write_volume(tmp_path / "ct.nii.gz", shape=(20, 20, 10), affine=make_affine((-1.0, -1.0, 2.0), (10, 10, -5)))
    sentence = (
        r"ct\.nii\.gz: the position \(0\.0, 0\.0, 20\.0\) mm is outside the volume, which reaches from"
        r" \(-9\.0, -9\.0, -5\.0\) to \(10\.0, 10\.0, 13\.0\) mm"
    )
    with pytest.raises(ValueError, match=sentence):
        CropNodule(8)(load(path), (0.0, 0.0, 20.0))


def test_a_mask_is_cropped_without_values_between():
    affine = make_affine((0.7, 0.7, 2.0))
    mask = MetaTensor(
        torch.from_numpy((numbered(30, 30, 30) % 3 == 0).astype(np.float32)), affine=torch.as_tensor(affine)
    )
    cube = CropNodule(10, mode="nearest", fill=0.0)(mask, (10.1, 10.2, 30.3))
    assert set(cube.unique().tolist()) == {0.0, 1.0}


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="size and spacing must be positive, got 0 and"):
        CropNodule(0)


def test_each_nodule_of_a_scan_becomes_an_item_with_what_belongs_to_it(tmp_path):
    affine = make_affine((-0.8, -0.8, 2.0), (20.0, 30.0, -40.0))
    path = write_volume(tmp_path / "ct.nii.gz", ramp((60, 60, 40), affine)[0], affine=affine)
    nodules = [{"nodule_id": "a", "position": (0.0, 10.0, 0.0)}, {"nodule_id": "b", "voxel": (25.0, 30.5, 18.0)}]
    crop = Compose([
        LoadImaged("image", reader="vdt_transforms.NoduleReader", ensure_channel_first=True),
        Orientationd("image", axcodes="RAS", labels=None),
        CropNoduled("image", 12),
    ])  # fmt: skip
    items = crop({"image": str(path), "nodules": nodules, "scan": 7})
    assert [(item["nodule_id"], item["scan"], item["image"].shape) for item in items] == [
        ("a", 7, (1, 12, 12, 12)),
        ("b", 7, (1, 12, 12, 12)),
    ]
    np.testing.assert_allclose(items[0]["position"], (0.0, 10.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(items[1]["position"], apply_affine(affine, (25.0, 30.5, 18.0)), atol=1e-6)
    for item in items:
        np.testing.assert_allclose(item["image"][0], ramp((12,) * 3, item["image"].affine.numpy())[0], atol=1e-3)
    whole = crop({"image": str(path)})
    np.testing.assert_allclose(whole["position"], apply_affine(affine, (29.5, 29.5, 19.5)), atol=1e-6)


def test_the_inner_size_of_a_cube_is_the_same_from_its_file_and_from_its_scan(tmp_path):
    affine = make_affine((-1.0, -1.0, 1.0), (20.0, 30.0, -40.0))
    scan = write_volume(tmp_path / "ct.nii.gz", shape=(40, 41, 42), affine=affine, dtype=np.int16, seed=3)
    volume, position = load(scan), apply_affine(affine, (17.5, 20.5, 22.5))
    cube = CropNodule(24)(volume, position)
    assert torch.equal(CropNodule(16)(cube).as_tensor(), CropNodule(16)(volume, position).as_tensor())


# The jittered crop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [80, 64, 61])
def test_the_jittered_crop_is_shifted_by_each_whole_number_from_minus_five_to_five(size):
    places = torch.from_numpy(np.indices((size,) * 3, dtype=np.float32))
    jittered, found = RandSpatialCropd("image", 48, random_size=False), [Counter(), Counter(), Counter()]
    prepared = CropNoduled("image", 48 + 2 * 5)({"image": places})
    jittered.set_random_state(0)
    for _ in range(330):
        corner = jittered(prepared)["image"][:, 0, 0, 0]
        for axis in range(3):
            found[axis][int(corner[axis]) - (size // 2 - 24)] += 1
    for axis in range(3):
        assert sorted(found[axis]) == list(range(-5, 6))
        assert max(abs(n - 30) for n in found[axis].values()) < 4.5 * np.sqrt(30)
