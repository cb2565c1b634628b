"""The reader of nodule cubes, the rotations of a cube, and the crop that MONAI's transforms make of it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    Invertd,
    LoadImaged,
    RandAxisFlip,
    RandRotate90,
    RandSpatialCropd,
    ResizeWithPadOrCropd,
)
from synthetic import make_affine, write_volume

from vdt_transforms import NoduleReader, RandRotateCube, RandRotateCubed
from vdt_transforms.nodules import combine_turns

KINDS = [
    pytest.param(np.asarray, id="numpy"),
    pytest.param(torch.from_numpy, id="torch"),
    pytest.param(lambda x: MetaTensor(torch.from_numpy(x)), id="metatensor"),
]


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


def test_a_published_mask_comes_out_on_the_grid_of_its_cube(tmp_path):
    voxel = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    np.savez(tmp_path / "a.npz", voxel=voxel, answer1=voxel > 200)
    mask = load(tmp_path / "a.npz", array="answer1")
    np.testing.assert_array_equal(mask[0], (voxel > 200).T)
    assert torch.equal(mask.affine, load(tmp_path / "a.npz").affine)


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
    both = LoadImaged("image", reader=NoduleReader)({"image": [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]})[
        "image"
    ]
    assert both.shape == (2, 4, 3, 2)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "not a readable nodule"),
        (lambda path: np.savez(path, image=np.zeros((2, 2, 2))), "it has the arrays image, not voxel"),
        (lambda path: np.savez(path, voxel=np.zeros((2, 2))), r"its voxel has the shape \(2, 2\), not \(z, y, x\)"),
        (lambda path: np.savez(path, voxel=np.array([{}])), "not a readable nodule"),
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
    with pytest.raises(ValueError, match=r"a\.nii\.gz: not a readable nodule"):
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


def test_monais_transforms_draw_the_same_orientations():
    ours, parts = RandRotateCube(), [RandRotate90(0.75, 3, plane) for plane in ((0, 1), (0, 2), (1, 2))]
    parts.append(RandAxisFlip(0.75))
    x, draws = torch.from_numpy(numbered(2, 2, 2)), 600
    for seed, transform in enumerate((ours, *parts)):
        transform.set_random_state(seed)
    found = [Counter(tuple(np.asarray(f(x)).flatten()) for _ in range(draws)) for f in (ours, Compose(parts))]
    assert set(found[0]) == set(found[1])
    for orientation, times in found[0].items():
        assert abs(times - found[1][orientation]) < 5 * np.sqrt(2 * times)


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_mask_turn_together_and_keep_their_types(kind):
    rotate = RandRotateCubed(["image", "label"])
    rotate.set_random_state(1)
    image, label = kind(numbered(4, 4, 4)), kind(numbered(4, 4, 4).astype(np.uint8))
    for _ in range(20):
        out = rotate({"image": image, "label": label, "name": "a"})
        assert np.array_equal(np.asarray(out["image"]).astype(np.uint8), np.asarray(out["label"]))
        assert type(out["image"]) is type(image)
        assert out["label"].dtype == label.dtype
        assert out["name"] == "a"
    assert np.array_equal(np.asarray(image), numbered(4, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_input_agree(kind):
    rotate, plain = RandRotateCube(), RandRotateCube()
    for transform in (rotate, plain):
        transform.set_random_state(2)
    for _ in range(10):
        assert np.array_equal(np.asarray(rotate(kind(numbered(4, 4, 4)))), plain(numbered(4, 4, 4)))


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


def test_inverse_gives_the_volume_and_its_affine_back():
    x = MetaTensor(torch.from_numpy(numbered(3, 4, 5)), affine=torch.diag(torch.tensor([-1.0, -1, 2, 1])))
    forward = Compose([RandRotateCubed(["image", "label"])])
    forward.set_random_state(0)
    for _ in range(20):
        out = forward({"image": x, "label": x.clone()})
        back = Invertd(["image", "label"], forward, orig_keys=["image", "label"])(out)
        for key in ("image", "label"):
            assert torch.equal(back[key].as_tensor(), x.as_tensor())
            assert torch.allclose(back[key].affine, x.affine)
            assert back[key].applied_operations == []


def test_the_same_seed_turns_alike_and_another_does_not():
    def turned(seed):
        rotate = RandRotateCubed("image")
        rotate.set_random_state(seed)
        return [tuple(rotate({"image": numbered(3, 3, 3)})["image"].flatten()) for _ in range(20)]

    assert turned(1) == turned(1)
    assert turned(1) != turned(2)


# The crop that MONAI's transforms make -----------------------------------------------------------------------------


def crop(size, jitter):
    return Compose(
        [
            ResizeWithPadOrCropd("image", size + 2 * jitter, value=-1024),
            RandSpatialCropd("image", size, random_center=True, random_size=False),
        ]
    )


@pytest.mark.parametrize("size", [80, 64, 61])
def test_the_jittered_crop_is_shifted_by_each_whole_number_from_minus_five_to_five(size):
    places = np.indices((size,) * 3, dtype=np.float32)
    cropped, found = crop(48, 5), [Counter(), Counter(), Counter()]
    cropped.set_random_state(0)
    for _ in range(330):
        corner = cropped({"image": places})["image"][:, 0, 0, 0]
        for axis in range(3):
            found[axis][int(corner[axis]) - (size // 2 - 24)] += 1
    for axis in range(3):
        assert sorted(found[axis]) == list(range(-5, 6))
        assert max(abs(n - 30) for n in found[axis].values()) < 4.5 * np.sqrt(30)


def test_a_small_cube_is_padded_with_air_around_its_centre():
    out = crop(48, 0)({"image": np.zeros((1, 32, 40, 48), np.float32)})["image"]
    assert out.shape == (1, 48, 48, 48)
    assert torch.equal(out[0, 8:40, 4:44], torch.zeros(32, 40, 48))
    assert (out == 0).sum() == 32 * 40 * 48
    assert out.min() == -1024


def test_the_crop_keeps_the_nodules_place_in_the_world(tmp_path):
    values = np.zeros((64, 64, 64), np.int16)
    values[32, 32, 32] = 300
    affine = make_affine((-1.0, -1.0, 1.0), (50.0, 60.0, -70.0))
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "a.nii.gz")
    out = crop(48, 5)({"image": load(tmp_path / "a.nii.gz")})["image"]
    place = (out[0] == 300).nonzero()[0]
    world = out.affine @ torch.tensor([*place, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(world, affine @ [32, 32, 32, 1])
