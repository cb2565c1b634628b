"""Compare a pre-trained encoder with training from scratch on a folder of labelled volumes.

    python scripts/transfer.py --volumes DIR --encoder bundles/imagenet_vdt_pretraining/models/encoder.pt

Both sides are ordinary runs of the bcv_multiorgan_segmentation bundle: same cases, same order, same augmentation draws,
same steps, for each seed. The held-out cases are scored at several step counts and never select anything. Leaves
`table.csv`, `table.md`, `dice.png` and `examples.png`; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from math import gcd
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vdt_workflows import claim, find_volumes, read_provenance, run_script, write_atomic

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"
SEGMENTATION = "bcv_multiorgan_segmentation"
INITS = ("scratch", "vdt")

logger = logging.getLogger(__name__)


def run_bundle(bundle: str, configs: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Run a bundle's configs as a user would, in a process of its own.

    Raises:
        ChildProcessError: if the run fails.
    """
    files = [f"configs/{name}.yaml" for name in configs]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(files)]
    command += ["--bundle_root", "."]
    for name, value in settings.items():
        command += [f"--{name}", value if isinstance(value, str) else repr(value)]
    # Threads that spin for ever while they wait would take the cores from the loader processes.
    environment = {"GOMP_SPINCOUNT": "100000", **os.environ}
    if subprocess.run(command, cwd=BUNDLES / bundle, env=environment, check=False).returncode:
        raise ChildProcessError(f"the run of bundles/{bundle} failed; its own message is above")


def transfer(
    volumes: str,
    encoder: str,
    output_dir: str = "transfer",
    seeds: int = 3,
    steps: Sequence[int] = (50, 100, 200),
    training_cases: int = 20,
    scored_cases: int = 60,
    batch_size: int = 2,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    patch_size: Sequence[int] = (48, 64, 48),
    spacing: Sequence[float] | None = None,
    window: Sequence[float] | None = None,
    datalist: str | None = None,
) -> dict[str, Any]:
    """Train from scratch and from the encoder, score both on the same held-out cases, and write the comparison.

    Args:
        volumes: folder of NIfTI pairs (see `vdt_workflows.find_volumes`).
        encoder: `encoder.pt` of a VDT pre-training.
        output_dir: folder for the runs, the table and the pictures.
        seeds: number of seeds; each draws other training cases, weights, crops and order.
        steps: optimiser steps after which the held-out cases are scored.
        training_cases: cases that each run learns from, at most.
        scored_cases: held-out cases, the same for every run, at most.
        batch_size: volumes of one step.
        learning_rate: of both sides, with a polynomial decay over all steps.
        momentum: of both sides.
        patch_size: voxels, as X, Y, Z.
        spacing: mm, as X, Y, Z; None keeps each volume's own.
        window: intensities that values are clipped to; None does not clip. Volumes are normalised one by one.
        datalist: JSON list in place of what the folder says; its test cases are the held-out ones.

    Returns:
        Paths of the table and the pictures.

    Raises:
        ValueError: if `output_dir` holds results of other settings.
    """
    root = Path(output_dir).resolve()
    encoder = str(Path(encoder).resolve())
    steps = sorted(steps)
    interval = reduce(gcd, steps)
    pool, scored = _hold_out(find_volumes(volumes, datalist=datalist), scored_cases)
    names = _label_names(Path(volumes), datalist, [case["label"] for case in pool])
    shared = {
        "dataset_dir": str(Path(volumes).resolve()),
        "label_names": names,
        "spacing": "own" if spacing is None else [float(s) for s in spacing],
        "window": "none" if window is None else [float(w) for w in window],
        "mean": "own",
        "std": "own",
        "patch_size": [int(p) for p in patch_size],
        "overlap": 0.25,
        "epochs": steps[-1] // interval,
        "steps_per_epoch": interval,
        "val_interval": 1,
        "batch_size": batch_size,
        "micro_batch": batch_size,
        "learning_rate": learning_rate,
        "momentum": momentum,
        "pairs": [],
        "num_workers": 0,
        **{name: read_provenance(encoder)[name] for name in ("depth", "base_channels", "norm")},
    }
    weights = hashlib.sha256(Path(encoder).read_bytes()).hexdigest()
    claim(root, {**shared, "datalist": datalist, "encoder": weights, "cases": [training_cases, scored_cases]})
    rows = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(pool))[:training_cases]
        cases = {"training": [pool[i] for i in sorted(order.tolist())], "validation": scored}
        chosen = root / f"seed{seed}.json"
        write_atomic(chosen, json.dumps(cases, indent=1).encode())
        for init in INITS:
            folder = root / f"{init}-seed{seed}"
            history = folder / "eval" / "history.csv"
            if len(_read_history(history)) < shared["epochs"]:
                logger.info("seed %d of %d, from %s", seed + 1, seeds, init)
                own = {"datalist": str(chosen), "seed": seed, "init": init, "ckpt_dir": str(folder / "models")}
                own |= {"output_dir": str(folder / "eval")} | ({"pretrained": encoder} if init == "vdt" else {})
                run_bundle(SEGMENTATION, ["train"], {**shared, **own})
            for row in _read_history(history):
                if int(row["step"]) in steps:
                    rows.append(
                        {"init": init, "seed": seed, "step": int(row["step"]), "dice": float(row["val_mean_dice"])}
                    )
    _write_table(root, rows, steps, f"{len(scored)} held-out cases, {min(training_cases, len(pool))} training cases")
    _draw_examples(root, scored[0])
    logger.info("%s", (root / "table.md").read_text())
    return {"table": str(root / "table.csv"), "pictures": [str(root / "dice.png"), str(root / "examples.png")]}


def _hold_out(cases: Mapping[str, list[dict[str, str]]], number: int) -> tuple[list[dict], list[dict]]:
    """Separate the cases to learn from and the cases to score; test cases with labels are the first to be scored."""
    tests = [case for case in cases["test"] if "label" in case]
    labelled = [*cases["training"], *cases["validation"]]
    if tests:
        return labelled, tests[:number]
    order = np.random.default_rng(0).permutation(len(labelled))
    number = min(number, max(1, len(labelled) // 2))
    return [labelled[i] for i in sorted(order[number:])], [labelled[i] for i in sorted(order[:number])]


def _label_names(volumes: Path, datalist: str | None, labels: Sequence[str]) -> list[str]:
    """Take the names from dataset.json, or number the values that the labels hold."""
    listing = Path(datalist) if datalist else volumes / "dataset.json"
    if listing.is_file():
        found = json.loads(listing.read_text()).get("labels", {})
        if found:
            by_value = {int(k): v for k, v in found.items()} if "0" in found else {int(v): k for k, v in found.items()}
            return [by_value[value] for value in sorted(by_value)]
    highest = max(int(np.asarray(nib.load(path).dataobj).max()) for path in labels)
    return ["background", *(f"label {value}" for value in range(1, highest + 1))]


def _read_history(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def _write_table(root: Path, rows: list[dict[str, Any]], steps: Sequence[int], note: str) -> None:
    lines = ["init,seed,step,dice", *(f"{r['init']},{r['seed']},{r['step']},{r['dice']:.4f}" for r in rows)]
    write_atomic(root / "table.csv", ("\n".join(lines) + "\n").encode())

    def scores(init: str, step: int) -> np.ndarray:
        return np.array([r["dice"] for r in rows if r["init"] == init and r["step"] == step])

    table = ["| mean Dice after | " + " | ".join(f"{s} steps" for s in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for init in INITS:
        means = [scores(init, s).mean() for s in steps]
        spreads = [scores(init, s).std(ddof=1) if len(scores(init, s)) > 1 else 0.0 for s in steps]
        cells = [f"{m:.3f} ± {d:.3f}" for m, d in zip(means, spreads, strict=True)]
        table.append(f"| {init} | " + " | ".join(cells) + " |")
        axes.errorbar(steps, means, spreads, marker="o", capsize=4, label=init)
    difference = [scores("vdt", s) - scores("scratch", s) for s in steps]
    table.append("| vdt minus scratch | " + " | ".join(f"{d.mean():+.3f}" for d in difference) + " |")
    seeds = len(difference[0])
    table += ["", f"Mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; {note}.", ""]
    write_atomic(root / "table.md", "\n".join(table).encode())
    axes.set(xlabel="optimiser steps", ylabel="mean Dice", title=note, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, root / "dice.png")


def _draw_examples(root: Path, case: Mapping[str, str]) -> None:
    """Draw one held-out case: its label, and what each side's last weights of seed 0 make of it."""
    labels = {"label": np.asarray(nib.load(case["label"]).dataobj)}
    for init in INITS:
        folder = root / f"{init}-seed0"
        found = list((folder / "example").glob("*_seg.nii.gz"))
        if not found:
            models = folder / "models"
            own = {"dataset_dir": case["image"], "ckpt_path": str(models / "model_last.pt")}
            own |= {"output_dir": str(folder / "example"), "args_file": str(models / "run.json")}
            run_bundle(SEGMENTATION, ["inference"], own)
            found = list((folder / "example").glob("*_seg.nii.gz"))
        labels[init] = np.asarray(nib.load(found[0]).dataobj)
    image = np.asarray(nib.load(case["image"]).dataobj).astype(np.float32)
    middle = int(np.argmax((labels["label"] > 0).sum(axis=(0, 1))))
    low, high = np.percentile(image, [1, 99])
    figure = Figure(figsize=(3.2 * len(labels), 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        axes.imshow(image[:, :, middle].T, cmap="gray", vmin=low, vmax=high, origin="lower")
        shown = np.ma.masked_equal(label[:, :, middle].T, 0)
        axes.imshow(shown, cmap="tab10", vmin=1, vmax=10, alpha=0.5, origin="lower", interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    figure.suptitle(f"{Path(case['image']).name}, slice {middle}")
    save_figure(figure, root / "examples.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, without a display."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_script(transfer)
