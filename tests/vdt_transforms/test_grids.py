"""A network that knows the answer gives it back on the file's grid, whatever was done to the volume before."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose, Invertd, LoadImaged, Orientationd, SpatialPadd
from scipy.spatial.transform import Rotation

from tests.makers.volumes import write_volume
from vdt_transforms import RestoreGrid, RestoreGridd, Spacingd


def affine_of(axes, spacing, angles=(0, 0, 0)):
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.asarray(axes, dtype=float) @ np.diag(spacing)
    affine[:3, 3] = [-31, 12.5, 140]
    return affine


RAS = np.eye(3)
LPS = np.diag([-1, -1, 1])
ASL = np.array([[0, 0, -1], [1, 0, 0], [0, 1, 0]])
GRIDS = [
    pytest.param(affine_of(RAS, (1, 1, 1)), id="RAS"),
    pytest.param(affine_of(LPS, (0.8, 0.8, 2.5)), id="LPS-anisotropic"),
    pytest.param(affine_of(ASL, (3, 0.7, 0.9)), id="ASL-anisotropic"),
    pytest.param(affine_of(LPS, (0.8, 0.8, 2.5), (8, -12, 15)), id="oblique"),
    pytest.param(affine_of(ASL, (1, 1, 1), (-20, 5, 10)), id="oblique-and-permuted"),
]


@pytest.fixture
def organ(tmp_path):
    """Write a label map of boxes on a grid, and return its path and values."""

    def write(affine, shape=(30, 26, 24)):
        label = np.zeros(shape, np.uint8)
        label[4:15, 6:20, 3:15] = 1
        label[12:26, 8:14, 6:21] = 2
        return write_volume(tmp_path / "organ.nii.gz", label, affine=affine, dtype=np.uint8), label

    return write


def prepare(path, *more):
    load = LoadImaged("image", ensure_channel_first=True)
    preprocessing = Compose([load, Orientationd("image", axcodes="RAS", labels=None), *more])
    return preprocessing, preprocessing({"image": str(path)})


@pytest.mark.parametrize("affine", GRIDS)
@pytest.mark.parametrize("pad", [False, True])
def test_labels_of_an_identity_network_come_back_exactly(organ, affine, pad):
    path, label = organ(affine)
    more = [SpatialPadd("image", (48, 20, 32))] if pad else []
    _, prepared = prepare(path, *more)
    prepared["pred"] = prepared["image"].clone()
    out = RestoreGridd("pred")(prepared)["pred"]
    np.testing.assert_array_equal(out[0], label)
    np.testing.assert_allclose(out.affine, affine, atol=1e-4)
    assert out.meta["filename_or_obj"] == str(path)


@pytest.mark.parametrize("affine", GRIDS)
@pytest.mark.parametrize("pixdim", [(0.7, 0.8, 1.1), (1.6, 1.4, 3.1)], ids=["finer", "coarser"])
def test_resampled_labels_come_back_as_from_monai(organ, affine, pixdim):
    path, label = organ(affine)
    preprocessing, prepared = prepare(
        path, Spacingd("image", pixdim=pixdim, mode="nearest"), SpatialPadd("image", (60, 60, 60))
    )
    prepared["pred"] = prepared["image"].clone()
    out = RestoreGridd("pred")(prepared)["pred"]
    theirs = Invertd("pred", preprocessing, orig_keys="image")(prepared)["pred"]
    assert out.shape == theirs.shape == (1, *label.shape)
    # Positions halfway between two voxels may round either way.
    assert (out.as_tensor() == theirs.as_tensor()).float().mean() > 0.98
    assert set(out.unique().tolist()) == {0, 1, 2}


def test_cropped_labels_are_background_outside(organ):
    path, label = organ(affine_of(LPS, (1, 1, 1)))
    _, prepared = prepare(path, CenterSpatialCropd("image", (10, 10, 10)))
    out = RestoreGrid()(prepared["image"].clone(), prepared["image"])
    kept = np.zeros_like(label)
    kept[10:20, 8:18, 7:17] = label[10:20, 8:18, 7:17]
    np.testing.assert_array_equal(out[0], kept)


def test_a_turned_volume_is_refused_with_its_name(organ):
    path, _ = organ(affine_of(RAS, (1, 1, 1)))
    _, prepared = prepare(path)
    turned = MetaTensor(prepared["image"].as_tensor(), affine=torch.as_tensor(affine_of(RAS, (1, 1, 1), (0, 0, 20))))
    with pytest.raises(ValueError, match=r"organ.nii.gz: turned by other than right angles"):
        RestoreGrid()(turned, prepared["image"])


def test_a_tensor_without_a_grid_is_refused():
    with pytest.raises(ValueError, match="must be MetaTensors"):
        RestoreGrid()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
