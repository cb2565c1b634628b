import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy.spatial.transform import Rotation

from vdt_transforms import RandFlipLeftRightd
from vdt_transforms.volumes import left_right_axis

BCV = [[2, 3], [12, 13]]


def oblique(angles, order):
    """An affine of 0.8 x 0.9 x 3 mm voxels, its axes in another order, turned by some degrees."""
    axes = np.eye(3)[:, order] * [-1, 1, 1]
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ axes @ np.diag([0.8, 0.9, 3.0])
    affine[:3, 3] = [10, -20, 30]
    return torch.as_tensor(affine)


AFFINES = [
    pytest.param(torch.diag(torch.tensor([1.0, 1, 1, 1], dtype=torch.float64)), 0, id="RAS"),
    pytest.param(torch.diag(torch.tensor([-1.0, -1, 2, 1], dtype=torch.float64)), 0, id="LPS"),
    pytest.param(oblique((0, 0, 0), [1, 2, 0]), 2, id="left-right-last"),
    pytest.param(oblique((10, -15, 20), [0, 1, 2]), 0, id="oblique"),
    pytest.param(oblique((12, 8, -20), [2, 0, 1]), 1, id="oblique-and-permuted"),
]


def body(affine):
    """An image of noise and a label map with organs 1 to 13, most of them on one side only."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 6, 7, 8), generator=generator)
    label = torch.randint(0, 14, (1, 6, 7, 8), generator=generator, dtype=torch.uint8)
    return {"image": MetaTensor(image, affine=affine), "label": MetaTensor(label, affine=affine)}


def mirror(data, prob=1.0):
    return RandFlipLeftRightd(["image", "label"], "label", prob=prob, pairs=BCV)(data)


def swapped(label, pairs=BCV):
    out = label.clone()
    for a, b in pairs:
        out[label == a], out[label == b] = b, a
    return out


@pytest.mark.parametrize(("affine", "axis"), AFFINES)
def test_axis_is_the_one_that_runs_from_left_to_right(affine, axis):
    assert left_right_axis(affine) == axis


@pytest.mark.parametrize(("affine", "axis"), AFFINES)
def test_a_flip_mirrors_voxels_in_their_places_in_the_world_and_exchanges_the_paired_labels(affine, axis):
    data = body(affine)
    out = mirror(data)
    for key, volume in out.items():
        assert volume.applied_operations == []
        voxel = torch.tensor([1.0, 2, 3, 1], dtype=torch.float64)
        mirrored = voxel.clone()
        mirrored[axis] = volume.shape[axis + 1] - 1 - voxel[axis]
        torch.testing.assert_close(volume.affine @ mirrored, data[key].affine @ voxel)
    assert torch.equal(out["image"].as_tensor(), data["image"].as_tensor().flip(axis + 1))
    assert torch.equal(out["label"].as_tensor(), swapped(data["label"].as_tensor()).flip(axis + 1))


def test_flip_happens_as_often_as_asked():
    flip = RandFlipLeftRightd(["image", "label"], "label", prob=0.3, pairs=BCV).set_random_state(0)
    data, done = body(torch.eye(4, dtype=torch.float64)), []
    for _ in range(300):
        out = flip(data)
        done.append({key: not torch.equal(out[key].as_tensor(), data[key].as_tensor()) for key in data})
    assert all(flips["image"] == flips["label"] for flips in done)
    assert 60 < sum(flips["image"] for flips in done) < 120


def test_orientation_before_the_flip_changes_nothing_about_who_is_who():
    data = body(torch.diag(torch.tensor([-1.0, -1, 2, 1], dtype=torch.float64)))
    to_ras = Orientation("RAS", labels=None)
    first = mirror({key: to_ras(volume) for key, volume in data.items()})["label"]
    last = to_ras(mirror(data)["label"])
    # RAS turns the flipped map's axis back, so compare in the array of the flipped world: the mirror image.
    assert torch.equal(first.as_tensor().flip(1), last.as_tensor())


@pytest.mark.parametrize("pairs", [[[2, 3], [3, 4]], [[2]], [[2, 2]]], ids=str)
def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(ValueError, match="pairs must hold each label once, two a pair"):
        RandFlipLeftRightd("image", pairs=pairs)
