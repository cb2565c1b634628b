"""Tiny data and trained bundles that several test files share.

What imports torch and MONAI is imported where it is used: the process of pytest-xdist that only hands out tests reads
this file too.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.makers.pictures import write_picture
from tests.support.folders import BUNDLES
from tests.support.preloaded import Preloaded

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands in processes of their own; two tests run at a time


def pytest_collection_modifyitems():
    import torch

    torch.set_num_threads(1)  # threads of small networks wait for each other more than they work


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def bundle(request):
    return request.param


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Three classes of colour, eight training and three validation pictures each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 3)):
        for label, colour in enumerate(("red", "green", "blue")):
            for i in range(number):
                pixels = rng.integers(0, 120, (40, 52, 3))
                pixels[..., label] += 120
                write_picture(root / part / colour / f"{i}.jpg", pixels.astype(np.uint8))
    return root


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """Six volumes with a bright and a dark ball, 2 mm slices, the first axis pointing left."""
    root = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    for name in ("images", "labels"):
        (root / name).mkdir()
    for i in range(6):
        grid = np.indices((20, 22, 15))
        label = np.zeros(grid.shape[1:], np.uint8)
        for value, centre in ((1, (6, 7, 7)), (2, (14, 15, 7))):
            label[sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < 16] = value
        image = np.array([0, 300, -300])[label] + rng.normal(0, 30, label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.int16), affine), root / "images" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / "labels" / f"case{i}.nii.gz")
    return root


@pytest.fixture(scope="session")
def nodules(tmp_path_factory):
    """Smooth and spiculated nodules of 23 patients in cubes of 20 mm, prepared."""
    from tests.makers.nodules import write_nodules

    root = tmp_path_factory.mktemp("nodules")
    write_nodules(root, patients=23, most=2, size=20)
    return root


@pytest.fixture(scope="session")
def key_slices(tmp_path_factory):
    """Four training, two validation and two test patients with a ball in 11 slices, prepared."""
    from tests.makers.deeplesion import make_deeplesion
    from vdt_workflows.preparation.deeplesion import prepare_deeplesion

    root = make_deeplesion(tmp_path_factory.mktemp("key_slices"))
    prepare_deeplesion(str(root))
    return root


@pytest.fixture(scope="session")
def data_of(images, nodules, key_slices, volumes):
    """Return a function that gives the folder of data for a bundle."""
    special = {"imagenet": images, "lidc": nodules, "deeplesion": key_slices}
    return lambda bundle: special.get(bundle.name.partition("_")[0], volumes)


@pytest.fixture
def data(bundle, data_of):
    return data_of(bundle)


@pytest.fixture(scope="session")
def trained(data_of, tmp_path_factory):
    """Return a function that trains a bundle once and gives the folder of its models and results."""
    from tests.support.bundle_runs import BASE, run

    done: dict[str, Path] = {}

    def train(bundle: Path) -> Path:
        if bundle.name not in done:
            folder = tmp_path_factory.mktemp(bundle.name)
            run(bundle, BASE, folder, data_of(bundle))
            done[bundle.name] = folder
        return done[bundle.name]

    return train


@pytest.fixture(scope="session")
def answering(trained, tmp_path_factory):
    """Return a function that gives the models of a trained bundle, where a segmentation tells voxels apart.

    A few steps teach it that all is background, so that any two masks are equal. Its last layer is drawn at random.
    """
    import torch

    @cache
    def models(bundle: Path) -> Path:
        folder = trained(bundle) / "models"
        if not bundle.name.endswith("_segmentation"):
            return folder
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("answering") / "models")
        state = torch.load(folder / "model.pt", weights_only=True)
        *_, weight, bias = state
        drawn = torch.randn(state[weight].shape, generator=torch.Generator().manual_seed(0))
        state[weight] = drawn - drawn.mean(1, keepdim=True)  # features are positive
        state[bias].zero_()
        torch.save(state, folder / "model.pt")
        return folder

    return models


@pytest.fixture(scope="session")
def preloaded():
    """Runs Python commands in processes of their own that have imported torch and MONAI."""
    started = Preloaded()
    yield started
    started.close()
