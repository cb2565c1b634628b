import monai.transforms
import numpy as np
import pytest
import torch
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd

import vdt_transforms
from tests.makers.volumes import make_affine, write_pair

SPACING = (1.5, 1.0, 2.0)  # mm


@pytest.fixture
def files(tmp_path):
    affine = make_affine((0.8, 1.3, 3.0), (-20, 5, 40))
    image, label = write_pair(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", shape=(9, 7, 5), affine=affine)
    return {"image": str(image), "label": str(label)}


def pipeline(spacingd):
    keys = ["image", "label"]
    return Compose(
        [
            LoadImaged(keys, ensure_channel_first=True),
            Orientationd(keys, axcodes="RAS", labels=None),
            spacingd(keys, pixdim=SPACING, mode=("bilinear", "nearest")),
        ]
    )


def test_spacing_is_monais():
    assert vdt_transforms.Spacing is monai.transforms.Spacing


def test_spacingd_does_what_monais_does(files):
    ours, theirs = (pipeline(module.Spacingd)(files) for module in (vdt_transforms, monai.transforms))
    assert set(ours) == set(theirs)
    for key in files:
        assert torch.equal(ours[key].as_tensor(), theirs[key].as_tensor())
        assert torch.equal(ours[key].affine, theirs[key].affine)
    np.testing.assert_allclose(ours["image"].pixdim, SPACING)


def test_text_beside_the_volume_is_kept(files):
    """MONAI Label puts the file's path there; MONAI's own Spacingd fails on it."""
    beside = {"image_path": files["image"], "label_number": 3, "image_meta_dict": {"a": 1}, "note": "x"}
    given = {**files, **beside}
    plain, kept = pipeline(vdt_transforms.Spacingd)(files), pipeline(vdt_transforms.Spacingd)(given)
    assert torch.equal(plain["image"].as_tensor(), kept["image"].as_tensor())
    assert {key: kept[key] for key in ("image_path", "label_number", "note")} == {
        "image_path": files["image"],
        "label_number": 3,
        "note": "x",
    }
    assert given == {**files, **beside}


@pytest.mark.parametrize("beside", [{}, {"image_path": "somewhere"}])
def test_invertd_brings_the_volume_back_on_its_grid(files, beside):
    transform = pipeline(vdt_transforms.Spacingd)
    original = LoadImaged("image", ensure_channel_first=True)(files)["image"]
    data = transform({**files, **beside})
    data["pred"] = data["image"].clone()
    back = Invertd("pred", transform, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert back.shape == original.shape
    np.testing.assert_allclose(back.affine, original.affine, atol=1e-6)


def test_volumes_keep_their_own_voxel_size_where_asked(files):
    transform = vdt_transforms.Spacingd(["image", "label"], "own", mode=("bilinear", "nearest"))
    data = LoadImaged(["image", "label"])(files)
    for out in (transform(data), transform.inverse(transform(data))):
        assert out == data
        assert not out["image"].applied_operations
    with pytest.raises(ValueError, match="pixdim must be voxel sizes in mm, or 'own', got 'mine'"):
        vdt_transforms.Spacingd("image", "mine")
