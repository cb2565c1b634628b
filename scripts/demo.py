"""Pre-train on images, transfer to volumes, compare with training from scratch: the whole idea in one command.

    python scripts/demo.py --output_dir demo
    python scripts/demo.py --output_dir demo --images CLASS_FOLDERS --volumes FOLDER_OF_NIFTI_PAIRS

Without data of one's own it draws small synthetic pictures and volumes. Leaves `demo/summary.md` with the tables, and
pictures beside it. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import csv
import shutil
import time
from pathlib import Path

import numpy as np
from make_demo_data import make_demo_data
from matplotlib.figure import Figure
from transfer import run_bundle, save_figure, transfer

from vdt_transforms import ImageToVolume, LoadNaturalImage, RandSliceShuffle
from vdt_workflows import claim, find_images, run_script, write_atomic

PRETRAINING = "imagenet_vdt_pretraining"


def demo(
    output_dir: str = "demo",
    images: str = "",
    volumes: str = "",
    epochs: int = 10,
    image_size: int = 64,
    base_channels: int = 16,
    seeds: int = 1,
    steps: tuple[int, ...] = (60, 120, 180),
    patch_size: tuple[int, ...] = (32, 32, 32),
) -> dict[str, str]:
    """Run the whole chain.

    Args:
        output_dir: folder for everything.
        images: folder of class folders, or of train/ and val/ with class folders; synthetic pictures if empty.
        volumes: folder of NIfTI pairs; synthetic volumes if empty.
        epochs: passes of the pre-training over the images.
        image_size: pixels.
        base_channels: width of the network; 64 is the published one.
        seeds: seeds of the transfer.
        steps: optimiser steps after which the transfer is scored.
        patch_size: voxels, as X, Y, Z.

    Returns:
        The path of the summary.

    Raises:
        ValueError: if `output_dir` holds results of other settings.
    """
    start = time.time()
    root = Path(output_dir).resolve()
    network = {"epochs": epochs, "image_size": image_size, "base_channels": base_channels}
    claim(root, {"images": images, "volumes": volumes, **network})
    if not (images and volumes):
        _say("1/4  synthetic pictures and volumes")
        made = make_demo_data(str(root / "data"))
        images, volumes = images or made["images"], volumes or str(Path(made["datalist"]).parent)
    images, volumes = str(Path(images).resolve()), str(Path(volumes).resolve())

    _say("2/4  one picture, read as a volume")
    draw_vdt(images, root / "vdt.png")

    _say("3/4  VDT pre-training")
    pretraining = root / "pretraining"
    settings = {
        "dataset_dir": images,
        "ckpt_dir": str(pretraining / "models"),
        "output_dir": str(pretraining / "eval"),
        **network,
        "batch_size": 32,
        "learning_rate": 0.05,
        "crop_area": [0.35, 1.0],
    }
    marker = pretraining / "finished"
    if not marker.is_file():
        run_bundle(PRETRAINING, ["train"], settings)
        write_atomic(marker, b"")

    _say("4/4  transfer, and the same from scratch")
    transfer(
        volumes,
        str(pretraining / "models" / "encoder.pt"),
        str(root / "transfer"),
        seeds=seeds,
        steps=steps,
        patch_size=patch_size,
    )
    shutil.copy(pretraining / "eval" / "curves.png", root / "pretraining.png")
    for name in ("dice.png", "examples.png"):
        shutil.copy(root / "transfer" / name, root / name)
    with (pretraining / "eval" / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    summary = [
        "# What came out",
        "",
        f"Pre-training on {images}: top-1 {float(last['val_top1']):.3f} on the validation images after {last['epoch']}"
        f" epochs of a ResNet3D-18 with {base_channels} base channels at {image_size} pixels.",
        "",
        f"Transfer to {volumes}:",
        "",
        (root / "transfer" / "table.md").read_text(),
        "Pictures: `vdt.png` (an image read as a volume), `pretraining.png` (curves), `dice.png` (Dice against steps),",
        "`examples.png` (a held-out case). A demonstration at toy size: it shows that the chain works, not how well",
        "the method does.",
        "",
    ]
    write_atomic(root / "summary.md", "\n".join(summary).encode())
    _say(f"done in {(time.time() - start) / 60:.1f} minutes")
    return {"summary": str(root / "summary.md")}


def draw_vdt(images: str, path: Path) -> None:
    """Draw an image, the three slices it is read as, and the same slices in a random order."""
    found = find_images(images)["val"]
    image = LoadNaturalImage()(found[0]["image"])
    volume = ImageToVolume()(image)
    shuffled = RandSliceShuffle().set_random_state(seed=1)(volume)
    rows = [("image", image.permute(1, 2, 0)[None]), ("volume", volume[0]), ("shuffled", shuffled[0])]
    figure = Figure(figsize=(8, 6), layout="constrained")
    grid = figure.subplots(3, 3)
    for axes_row, (name, slices) in zip(grid, rows, strict=True):
        for number, axes in enumerate(axes_row):
            axes.axis("off")
            if number < len(slices):
                picture = np.asarray(slices[number])
                axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
                title = f"{tuple(image.shape)} colours" if name == "image" else f"{name}: slice {number + 1} of 3"
                axes.set_title(title, fontsize="small")
    figure.suptitle("The variable dimension transform: colours become slices")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_script(demo)
