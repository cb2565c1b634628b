"""Pre-train on images, transfer to volumes, compare with training from scratch: the whole idea in one command.

    python scripts/demo.py --output_dir demo
    python scripts/demo.py --output_dir demo --images CLASS_FOLDERS --volumes FOLDER_OF_NIFTI_PAIRS

Without data of one's own it draws small synthetic pictures and volumes. Leaves `demo/summary.md` with a table, pictures
beside it, and the whole comparison in `demo/comparison/report.html`. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draw_vdt import draw_vdt
from make_demo_data import make_demo_data

from vdt_workflows.cli import run_function
from vdt_workflows.data.images import find_images
from vdt_workflows.drawing import draw_sheet, draw_tile, to_png
from vdt_workflows.files import claim, read_csv, write_atomic
from vdt_workflows.report.cells import run_bundle
from vdt_workflows.report.charts import draw_curves, draw_example
from vdt_workflows.report.matrix import compare

PRETRAINING = "imagenet_vdt_pretraining"
TRANSFER = {
    **{"spacing": "own", "window": "none", "mean": "own", "std": "own", "pairs": [], "overlap": 0.25},
    "stem": "strided",  # half the resolution, an eighth of the time
    "class_weights": "$[0.2] + [1.0] * (@num_classes - 1)",  # small organs drown in a heavier background
    "train::random_transforms::2::prob": 0.0,  # no flips: they hide on which side an organ lies
}


def demo(
    output_dir: str = "demo",
    images: str = "",
    volumes: str = "",
    epochs: int = 10,
    image_size: int = 64,
    base_channels: int = 16,
    seeds: int = 1,
    steps: int = 600,
    points: int = 4,
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
        steps: optimiser steps of the transfer.
        points: how many times the held-out cases are scored, at equal distances.
        patch_size: voxels, as X, Y, Z.

    Returns:
        The path of the summary.

    Raises:
        ValueError: if `output_dir` holds results of other settings.
    """
    root = Path(output_dir).resolve()
    network = {"epochs": epochs, "image_size": image_size, "base_channels": base_channels}
    claim(root, {"images": images, "volumes": volumes, **network})
    transfer = {**TRANSFER, "base_channels": base_channels, "patch_size": [int(p) for p in patch_size]}
    if not volumes:
        transfer["window"] = [-160, 240]  # HU of soft tissue; what the volumes of others hold is not known
    if not (images and volumes):
        _say("1/4  synthetic pictures and volumes")
        made = make_demo_data(str(root / "data"))
        images, volumes = images or made["images"], volumes or str(Path(made["datalist"]).parent)
    images, volumes = str(Path(images).resolve()), str(Path(volumes).resolve())

    _say("2/4  one picture, read as a volume")
    draw_vdt(str(root / "vdt.png"), image=find_images(images)["val"][0]["image"])

    _say("3/4  VDT pre-training")
    pretraining = root / "pretraining"
    folders = {"ckpt_dir": str(pretraining / "models"), "output_dir": str(pretraining / "eval")}
    marker = pretraining / "finished"
    if not marker.is_file():
        own = {"batch_size": 32, "learning_rate": 0.05, "crop_area": [0.35, 1.0]}
        run_bundle(PRETRAINING, ["train"], {"dataset_dir": images, **folders, **network, **own})
        write_atomic(marker, b"")

    _say("4/4  transfer, and the same from scratch")
    finished = compare(
        f"scratch,vdt={pretraining / 'models' / 'encoder.pt'}",
        volumes,
        str(root / "comparison"),
        settings=transfer,
        fractions=1.0,
        seeds=seeds,
        protocols="short",
        steps=steps,
        points=points,
        training_cases=20,
        held_out=60,
        curve_cases=60,
        workers=min(2, os.cpu_count() or 1),
    )
    results = json.loads(Path(finished["report"]).with_name("results.json").read_text())
    for cell in results["cells"]:
        if cell["state"] != "finished":
            raise ChildProcessError(f"{cell['folder']}/log.txt: {cell['error']}")
    shutil.copy(pretraining / "eval" / "curves.png", root / "pretraining.png")
    curves = draw_curves(results, "short")
    assert curves is not None  # all cells have finished
    write_atomic(root / "dice.png", to_png(curves, dpi=120))
    text, pictures = draw_example(results)
    tiles = [draw_tile(picture, name) for name, picture in pictures]
    write_atomic(root / "examples.png", to_png(draw_sheet(tiles, text)))
    last = read_csv(pretraining / "eval" / "history.csv", ["epoch", "val_top1"], others=True)[-1]
    summary = [
        "# What came out",
        "",
        f"Pre-training on {images}: top-1 {float(last['val_top1']):.3f} on the validation images after {last['epoch']}"
        f" epochs of a ResNet3D-18 with {base_channels} base channels at {image_size} pixels.",
        "",
        f"Transfer to {volumes}:",
        "",
        *make_table(results),
        "",
        "Pictures: `vdt.png` (an image read as a volume), `pretraining.png` (curves), `dice.png` (Dice against steps),",
        "`examples.png` (a held-out case); `comparison/report.html` has all of the comparison. A demonstration at toy",
        "size: it shows that the chain works, not how well the method does.",
        "",
    ]
    write_atomic(root / "summary.md", "\n".join(summary).encode())
    return {"summary": str(root / "summary.md")}


def make_table(results: Mapping[str, Any]) -> list[str]:
    """Make the lines of a table: each row's score against the steps, and what it has over scratch in the end."""
    steps = [step for step, _ in results["summary"][0]["curve"]]
    heads = ["mean Dice after", *(f"{step} steps" for step in steps), "minus scratch"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results["summary"]:
        d = row["difference"]
        cells = [row["row"], *(f"{score:.3f}" for _, score in row["curve"])]
        cells.append("" if d is None else f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(results["summary"][0]["by_seed"])
    note = f"Mean over {seeds} seed{'s' * (seeds > 1)} and {results['held_out']}; in brackets a 95 % interval"
    return [*lines, "", f"{note}. Learned from {results['summary'][0]['labels']} cases."]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_function(demo)
