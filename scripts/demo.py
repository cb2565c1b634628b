"""The whole idea in one command: a picture as a volume, pre-training on photographs, fine-tuning beside scratch.

    python scripts/demo.py --output_dir demo
    python scripts/demo.py --output_dir demo --images CLASS_FOLDERS --volumes FOLDER_OF_NIFTI_PAIRS

Without data of one's own it takes the photographs and the MR volumes of demo_data/. Leaves `demo/index.html`, which
says what was done and what came out, and beside it the pages that it links to. Interrupted, it goes on where it
stopped.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draw_vdt import draw_vdt
from markupsafe import Markup

from vdt_workflows.cli import run_function
from vdt_workflows.data.images import find_images
from vdt_workflows.drawing import list_colours, to_png
from vdt_workflows.files import claim, read_csv, read_json, write_atomic
from vdt_workflows.planning.apply import evaluate, pretrain, segment
from vdt_workflows.report.charts import draw_curves, draw_example, to_svg
from vdt_workflows.report.comparison_page import judge
from vdt_workflows.report.matrix import compare
from vdt_workflows.report.pages import render, to_base64
from vdt_workflows.report.run_page import report_run
from vdt_workflows.report.viewer import find_viewer
from vdt_workflows.training.shipped import MODEL, find_encoders, find_weights

DATA = Path(__file__).resolve().parents[1] / "demo_data"
WEIGHTS = "hippocampus_mr_w16"
PRETRAINING = {"batch_size": 32, "learning_rate": 0.05, "crop_area": [0.35, 1.0]}
TRANSFER = {
    **{"spacing": "own", "window": "none", "mean": "own", "std": "own", "pairs": [], "overlap": 0.25},
    "stem": "strided",  # half the resolution, an eighth of the time
    "mirror": 0.0,  # no flips: they hide on which side an organ lies
}


def demo(
    output_dir: str = "demo",
    images: str = "",
    volumes: str = "",
    epochs: int = 36,
    image_size: int = 32,
    base_channels: int = 16,
    seeds: int = 3,
    steps: int = 60,
    cases: int = 5,
    patch_size: tuple[int, ...] = (32, 32, 32),
) -> dict[str, str]:
    """Run the whole chain.

    Args:
        output_dir: folder for everything.
        images: folder of class folders, or of train/ and val/ with class folders; photographs of clothes if empty.
        volumes: folder of NIfTI pairs; MR of the hippocampus if empty.
        epochs: passes of the pre-training over the images.
        image_size: pixels.
        base_channels: width of the network; 64 is the published one.
        seeds: seeds of the fine-tuning, each with other cases to learn from.
        steps: optimiser steps of the fine-tuning, a multiple of 3.
        cases: labelled cases to learn from, of up to 10; up to 20 others are held out.
        patch_size: voxels, as X, Y, Z.

    Returns:
        The path of the page.

    Raises:
        ValueError: if `output_dir` holds results of other settings.
        ChildProcessError: if a run fails.
        ImportError: if ipyniivue, which has the viewer, is not installed.
    """
    find_viewer()
    root = Path(output_dir).resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more pay little at this size
    network = {"image_size": image_size, "base_channels": base_channels}
    claim(root, {"images": images, "volumes": volumes, "epochs": epochs, **network})
    photographs = str(Path(images or DATA / "photographs").resolve())
    scans = str(Path(volumes or DATA / "hippocampus").resolve())

    if not images and not volumes:
        _say("real data, toy size: under four minutes on two idle cores; stopped, the same command goes on")
    _say("1/4  one picture, read as a volume")
    found = find_images(photographs)
    draw_vdt(str(root / "vdt.png"), image=found["val"][0]["image"])

    _say(f"2/4  pre-training on {len(found['train'])} images")
    started = root / "pretraining"
    if not (started / "finished").is_file():
        pretrain(photographs, str(started), epochs=epochs, **network, **PRETRAINING)
        write_atomic(started / "finished", b"")
    last = read_csv(started / "eval" / "history.csv", ["epoch", "val_top1"], others=True)[-1]

    _say("3/4  fine-tuning: from scratch, from these images, and from shipped weights")
    rows: list[dict[str, Any]] = [{"name": "scratch", "note": "random weights"}]
    rows += [{"name": "these images", "init": "vdt", "pretrained": str(started / "models" / "encoder.pt")}]
    if shipped := find_encoders("vdt").get((18, base_channels)):
        rows += [{"name": "shipped", "init": "vdt", "pretrained": str(find_weights(shipped) / MODEL), "note": shipped}]
    results = _compare(rows, scans, root, cases, seeds, steps, base_channels, patch_size)

    _say("4/4  a segmentation")
    place = root / "segmentation"
    scores = None if volumes else _segment(scans, place)
    run = Path(next(c["folder"] for c in results["cells"] if c["row"] == rows[-1]["name"])) / "example"
    report_run(str(run if volumes else place), str(root / "segmentation.html"))

    curves = draw_curves(results, "short")
    assert curves is not None  # all cells have finished
    names = results["provenance"]["settings"]["label_names"][1:]
    text, pictures = draw_example(results)
    page = render(
        "demo.html",
        title="What came out",
        own=[bool(images), bool(volumes)],
        counts=[len(found[part]) for part in ("train", "val")],
        classes=len(found["train"].classes),
        epochs=int(last["epoch"]),
        top1=float(last["val_top1"]),
        **network,
        results=results,
        table_of_scores=_make_table(results),
        seeds=len(results["summary"][0]["by_seed"]),
        shipped=shipped,
        weights=WEIGHTS,
        scores=scores,
        chart=Markup(to_svg(curves)),
        example_text=text,
        examples=[(name, to_base64(to_png(pixels))) for name, pixels in pictures],
        labels=[names, list_colours(range(1, len(names) + 1))],
        pictures={
            name: to_base64(path.read_bytes())
            for name, path in {
                "vdt": root / "vdt.png",
                "pretraining": started / "eval" / "curves.png",
                "segmentation": place / "eval" / "examples.png",
            }.items()
            if path.is_file()
        },
        commands=[
            shlex.join(["vdt", *words])
            for words in (
                ("pretrain", photographs, "-o", "encoder"),
                ("train", scans, "--output_dir", "mine", "--minutes", "10", "--init", "vdt"),
                ("segment", f"{scans}/images", "-o", "labels", "--weights", WEIGHTS),
            )
        ],
    )
    write_atomic(root / "index.html", page.encode())
    return {"page": str(root / "index.html")}


def _compare(
    rows: Sequence[dict[str, Any]],
    scans: str,
    root: Path,
    cases: int,
    seeds: int,
    steps: int,
    base_channels: int,
    patch_size: Sequence[int],
) -> dict[str, Any]:
    """Fine-tune every row on the same few cases for the same steps, and read the scores on held-out cases."""
    finished = compare(
        rows,
        scans,
        str(root / "comparison"),
        settings={**TRANSFER, "base_channels": base_channels, "patch_size": [int(p) for p in patch_size]},
        fractions=cases / 10,
        seeds=seeds,
        protocols="short",
        steps=steps,
        points=3,
        training_cases=10,
        held_out=20,
        curve_cases=20,
        workers=min(2, os.cpu_count() or 1),
    )
    results = read_json(Path(finished["report"]).with_name("results.json"))
    for cell in results["cells"]:
        if cell["state"] != "finished":
            raise ChildProcessError(f"{cell['folder']}/log.txt: {cell['error']}")
    return results


def _segment(scans: str, place: Path) -> dict[str, Any]:
    """Score shipped weights on the test cases, and segment the worst, the median and the best for the viewer."""
    finished = place / "inference.json"
    if not finished.is_file():
        evaluate(WEIGHTS, scans, str(place / "eval"), part="test")
        examples = read_json(place / "eval" / "scores.json")["examples"]
        (place / "volumes").mkdir(exist_ok=True)
        for number, rank in enumerate(("worst", "median", "best"), 1):
            name = examples[rank]
            shutil.copy(Path(scans, "images", name), place / "volumes" / f"{number}_{rank}_{name}")
        segment(str(place / "volumes"), str(place), WEIGHTS)
    return read_json(place / "eval" / "scores.json")


def _make_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Make the heads and rows of a table: the score against the steps, and what a row has over scratch in the end."""
    steps = [step for step, _ in results["summary"][0]["curve"]]
    heads = ["start", *(f"{step} steps" for step in steps), "minus scratch", "verdict"]
    rows = []
    for row in results["summary"]:
        d = row["difference"]
        ends = ["", ""] if d is None else [f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})", judge(d)]
        rows.append([row["row"], *(f"{score:.3f}" for _, score in row["curve"]), *ends])
    return heads, rows


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_function(demo)
