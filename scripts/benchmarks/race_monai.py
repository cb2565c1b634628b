"""A contestant of the race: MONAI's UNet, trained as its tutorials do, for so many minutes of this process.

    python scripts/benchmarks/race_monai.py TRAINING TEST OUT --minutes 6 --rate 0.001 --seed 0 --classes 3

TRAINING and TEST hold `images/` and `labels/`; OUT gets a label file of the same name for each of TEST's images. Where
slices are thick, the network strides across them only when the other axes are as coarse, and patches turn in their
plane.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from monai.data import CacheDataset, DataLoader, Dataset, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SaveImaged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism


def choose_strides(spacing: Sequence[float], patch: Sequence[int]) -> list[tuple[int, ...]]:
    """Halve, four times, the axes that are not twice as coarse as the finest and that the patch can be halved along."""
    strides, now, left = [], list(spacing), list(patch)
    for _ in range(4):
        level = tuple(2 if a < 2 * min(now) and n % 2 == 0 else 1 for a, n in zip(now, left, strict=True))
        now, left = [a * s for a, s in zip(now, level, strict=True)], [n // s for n, s in zip(left, level, strict=True)]
        strides.append(level)
    return strides


def main(
    training: str,
    test: str,
    output_dir: str,
    minutes: float = 6,
    rate: float = 1e-3,
    seed: int = 0,
    classes: int = 3,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    patch: tuple[int, ...] = (32, 48, 32),
) -> None:
    """Train for `minutes` of CPU time since the process began, and segment the test cases.

    `spacing` is in mm and `patch` in voxels, both as X, Y, Z.
    """
    set_determinism(seed)
    keys, modes = ["image", "label"], ("bilinear", "nearest")
    turns = [0.3 if max(spacing) < 3 * min(spacing) or spacing[axis] == max(spacing) else 0.0 for axis in range(3)]
    prepared = [
        LoadImaged(keys, allow_missing_keys=True),
        EnsureChannelFirstd(keys, allow_missing_keys=True),
        Orientationd(keys, axcodes="RAS", labels=None, allow_missing_keys=True),
        Spacingd(keys, pixdim=spacing, mode=modes, allow_missing_keys=True),
        NormalizeIntensityd("image"),
        SpatialPadd(keys, spatial_size=patch, allow_missing_keys=True),
    ]
    random = [
        RandCropByPosNegLabeld(keys, "label", spatial_size=patch, pos=1, neg=1, num_samples=2),
        *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
        RandRotated(keys, range_x=turns[0], range_y=turns[1], range_z=turns[2], prob=0.2, mode=modes),
        RandGaussianNoised("image", prob=0.1, std=0.1),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
    ]
    images = sorted(Path(training, "images").iterdir())
    cases = [{"image": str(image), "label": str(Path(training, "labels", image.name))} for image in images]
    data = CacheDataset(cases, Compose(prepared + random), progress=False)
    strides: Any = choose_strides(spacing, patch)
    network = UNet(3, 1, classes, (16, 32, 64, 128, 256), strides, num_res_units=2, norm="batch")
    loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    loader, steps = DataLoader(data, batch_size=2, shuffle=True), 0
    while (progress := time.process_time() / 60 / minutes) < 1:
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate * max(1 - time.process_time() / 60 / minutes, 0) ** 0.9
            optimizer.zero_grad()
            loss(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
            steps += 1
    print(f"{steps} steps, {time.process_time():.0f} s, {progress:.2f} of the time at the last pass")

    network.eval()
    preprocessing = Compose(prepared)
    save = {"output_dir": output_dir, "output_postfix": "", "separate_folder": False, "print_log": False}
    after = Compose(
        [
            Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
            SaveImaged("pred", output_dtype="uint8", **save),
        ]
    )
    tests = [{"image": str(image)} for image in sorted(Path(test, "images").iterdir())]
    with torch.no_grad():
        for batch in DataLoader(Dataset(tests, preprocessing)):
            batch["pred"] = sliding_window_inference(batch["image"], patch, 4, network, overlap=0.5, mode="gaussian")
            for item in decollate_batch(batch):
                after(item)


if __name__ == "__main__":
    fire.Fire(main)
