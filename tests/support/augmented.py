"""Samples with random transforms of every build, for the tests of the datasets."""

import numpy as np
import torch
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    EnsureTyped,
    OneOf,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    Randomizable,
    RandScaleIntensityd,
    RandShiftIntensityd,
)

from vdt_transforms import RandSliceShuffled
from vdt_workflows.data.sampling import SeededSampler


class RandCount(Randomizable):
    """Not a MONAI transform: a callable that draws."""

    def __call__(self, data):
        return {**data, "drawn": int(self.R.randint(1 << 30))}


def augmentation():
    """Random transforms of every build: plain, nested, chosen at random, with transforms inside."""
    return Compose(
        [
            EnsureTyped("image"),
            Compose([RandFlipd("image", prob=0.5), Compose([RandGaussianNoised("image", prob=0.5)])]),
            RandAffined("image", prob=0.7, rotate_range=0.5, translate_range=1.0, padding_mode="border"),
            OneOf([RandScaleIntensityd("image", 0.5, prob=1), RandShiftIntensityd("image", 0.5, prob=1)]),
            RandSliceShuffled("image"),
            RandCount(),
        ]
    )


def images(count=6):
    return [{"image": np.random.default_rng(i).normal(size=(1, 3, 5, 4)).astype(np.float32)} for i in range(count)]


def loaded(dataset, workers=0, epoch=0, seed=0, batch_size=2, **options):
    """The samples that MONAI's loader gives in one epoch, by (pass, index)."""
    sampler = SeededSampler(dataset)
    sampler.set_epoch(epoch)
    torch.manual_seed(seed)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, **options)
    rows = [row for batch in loader for row in zip(batch["image"], batch["drawn"].tolist(), strict=True)]
    return dict(zip(sampler, rows, strict=True))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][0], b[k][0]) and a[k][1] == b[k][1] for k in a)
