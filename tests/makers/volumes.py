"""Makers of small data for the tests."""

from pathlib import Path

import nibabel as nib
import numpy as np


def make_affine(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0)):
    """Voxel to world, in mm, along the axes."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def write_volume(path, values=None, *, shape=(4, 5, 6), affine=None, dtype=np.float32, seed=0):
    """Write a NIfTI volume, of random numbers unless its values are given, and return its path."""
    if values is None:
        values = np.random.default_rng(seed).normal(size=shape)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values).astype(dtype), make_affine() if affine is None else affine), path)
    return path


def write_pair(image, label, **options):
    """Write an image and a label of zeros on its grid, and return their paths."""
    image = write_volume(image, **options)
    return image, write_volume(label, np.zeros(nib.load(image).shape), affine=nib.load(image).affine, dtype=np.uint8)
