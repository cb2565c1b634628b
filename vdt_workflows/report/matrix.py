"""Compare ways to start a network: a matrix of initialisations, shares of the labels and seeds, on data of your own.

    vdt compare --rows "scratch,vdt=bundles/imagenet_vdt_pretraining/models/encoder.pt" --dataset_dir DIR
    vdt compare --rows rows.yaml --dataset_dir DIR --fractions 0.1,0.5,1 --seeds 3 --workers 2

Each cell of the matrix is an ordinary run of a bundle. All rows of a share and a seed see the same cases in the same
order with the same augmentation for the same steps; all cells are scored on the same held-out cases, which select
nothing. A matrix that was interrupted goes on where it stopped, and may grow by rows, shares and seeds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vdt_workflows.errors import check_choice
from vdt_workflows.files import claim, hash_file, remove_unfinished, write_atomic, write_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.locks import leaving
from vdt_workflows.naming import NAMES, literal, plain
from vdt_workflows.overrides import check_command_line
from vdt_workflows.progress import say, track
from vdt_workflows.report.cells import Cell, Stage, run_cells
from vdt_workflows.report.comparison_page import write_page
from vdt_workflows.report.held_out import count_cases, describe_cases, find_label_names, split_nodules, split_volumes
from vdt_workflows.report.rows import (
    Row,
    as_list,
    choose_reference,
    find_protocols,
    merge_settings,
    name_weights,
    read_mapping,
    read_rows,
)
from vdt_workflows.report.statistics import Key, collect, write_tables


@dataclass(frozen=True)
class Task:
    """What a bundle needs to be compared.

    Attributes:
        metric: column of history.csv that is followed while training.
        title: what the score is called.
        steps: config id of the steps of an epoch.
        weights: file of the last step's weights.
        train: more settings of the training; nothing may be selected.
        score: more settings of the scoring.
        example: whether inference of one held-out volume is drawn.
    """

    metric: str
    title: str
    steps: str = "steps_per_epoch"
    weights: str = "model_last.pt"
    train: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    example: bool = False


SEGMENTATION = Task(
    "val_mean_dice",
    "mean Dice",
    train={"best_name": "model_best.pt", "last_name": "model_last.pt"},
    score={"part": "test", "surfaces": False},
)
CLASSIFICATION = Task(
    "val_auc",
    "area under the ROC curve",
    steps="steps",
    weights="model.pt",
    train={"selection": "last"},
    score={"part": "test"},
)


def find_task(bundle: str) -> Task:
    """Say how a bundle is compared: every one that segments, and the classification of nodules."""
    segmentations = sorted(path.name for path in find_bundles().glob("*_segmentation"))
    check_choice("bundle", bundle, (*segmentations, "lidc_nodule_classification"))
    if bundle in segmentations:
        return replace(SEGMENTATION, example=not bundle.startswith("lidc"))
    return CLASSIFICATION


@leaving
def compare(
    rows: str | Sequence[Any],
    dataset_dir: str,
    output_dir: str = "comparison",
    bundle: str = "bcv_multiorgan_segmentation",
    settings: str | Mapping[str, Any] = "",
    fractions: float | Sequence[float] = (0.1, 0.5, 1.0),
    seeds: int = 3,
    protocols: str | Sequence[str] = "recommended",
    steps: int = 200,
    points: int = 4,
    held_out: int = 60,
    curve_cases: int = 20,
    training_cases: int | None = None,
    datalist: str | None = None,
    reference: str = "",
    pictures: bool = True,
    workers: int = 1,
    threads: int = 1,
    ray: str | None = None,
    ray_resources: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Run what is missing of the matrix, and write the report.

    Args:
        rows: a YAML or JSON file with a list of rows (`name`, `init`, `pretrained`, `settings`, `configs`, `note`), or
            words such as "scratch,vdt=encoder.pt".
        dataset_dir: the data, as the bundle takes them.
        output_dir: folder for the runs and the report.
        bundle: a segmentation bundle or lidc_nodule_classification.
        settings: overrides for every cell by config id, as a mapping or a YAML or JSON file.
        fractions: shares of the labelled cases to learn from; a smaller share is part of each larger one.
        seeds: number of seeds; each draws other labelled cases, weights, crops and order.
        protocols: of the bundle (see `find_protocols`), one or several: "recommended", "paper" or "short".
        steps: optimiser steps of every cell.
        points: how many times the score is followed in training, at equal distances.
        held_out: cases that are scored, at most; the same for all cells.
        curve_cases: of these, those that the score is followed on in training.
        training_cases: labelled cases of which the fractions are taken, at most; all by default.
        datalist: JSON list in place of what the folder says; its test cases are the held-out ones.
        reference: row that the others are compared with; "scratch" if there is one, or the first.
        pictures: whether each row segments one held-out volume for the page, where the bundle makes volumes.
        workers: cells at once on this machine, on its CUDA devices in turn; 0 only writes the report of what is there.
        threads: CPU threads of a cell.
        ray: address of a Ray cluster to run on instead ("auto", "ray://host:10001", or "local").
        ray_resources: what Ray reserves for a cell, such as "{'num_cpus': 4, 'num_gpus': 1}".

    Returns:
        Path of the report, and how many cells are finished and failed; `vdt compare` exits with status 1 if any failed.

    Raises:
        BlockingIOError: if another process runs cells in `output_dir`.
        FileNotFoundError: if a file of weights, rows, settings or an overlay is missing.
        ValueError: if a row, an initialisation, a setting or a protocol is unknown, a fraction is no case at all, or
            `output_dir` holds results of other settings.
    """
    task = find_task(bundle)
    root = Path(output_dir).resolve()
    shared = read_mapping(settings, "settings")
    plan = [name_weights(row, shared) for row in read_rows(rows)]
    shares = sorted({float(f) for f in as_list(fractions)})
    known = find_protocols(bundle)
    names = list(dict.fromkeys(str(p) for p in as_list(protocols)))
    for name in names:
        if name not in known:
            raise ValueError(f"protocols of {bundle} must be among {', '.join(known)}, got {name!r}")
    if points < 1 or steps % points or seeds < 1:
        raise ValueError(
            f"steps must be a multiple of points, and points and seeds at least 1; got {steps=}, {points=}, {seeds=}"
        )
    base = choose_reference(plan, reference)
    geometry = str(shared.get("geometry", "refuse"))

    if bundle.startswith("lidc"):
        split = split_nodules(bundle, dataset_dir, shared, held_out, curve_cases, training_cases)
    else:
        split = split_volumes(dataset_dir, datalist, held_out, curve_cases, training_cases, geometry)
        if bundle.startswith("bcv") and "label_names" not in shared:
            shared["label_names"] = find_label_names(dataset_dir, datalist, split.pool, geometry)
    counts = {share: count_cases(share, split.size) for share in shares}
    described, data_dir = describe_cases(split.scored), str(Path(dataset_dir).resolve())
    common = {
        **{"bundle": bundle, "dataset_dir": data_dir, "settings": shared, "steps": steps, "points": points},
        **{"curve_cases": curve_cases, "held_out": described, "pool": describe_cases(split.pool)},
    }
    lists: dict[Path, dict[str, Any]] = {}
    cells: dict[Key, Cell] = {}
    for seed, share in product(range(seeds), shares):
        chosen = root / "data" / f"share{share:g}-seed{seed}.json"
        lists[chosen] = split.draw(counts[share], seed)
        example = split.example if pictures and task.example and (seed, share) == (0, shares[-1]) else None
        data = literal({"dataset_dir": data_dir, split.option: str(chosen)})
        train: dict[str, Any] = {"seed": seed, "epochs": points, task.steps: steps // points, "val_interval": 1}
        train |= {**task.train, **data, **split.train}
        for name, row in product(names, plan):
            prefix = f"{name}-" if known[name] else ""
            folder = root / "cells" / row.folder / f"{prefix}share{share:g}-seed{seed}"
            weights = folder / "models" / task.weights
            stages = _plan_stages(row, known[name], weights, shared, train, {**task.score, **data}, example)
            title = f"{prefix}{row.name}, {share:.0%} of the labels, seed {seed}"
            cell = Cell(title, str(folder), str(find_bundles() / bundle), stages, str(weights), threads)
            cells[name, row.name, share, seed] = cell
    for cell in {key[:2]: cell for key, cell in cells.items()}.values():
        _check_settings(cell)
    alone = workers > 0 or ray is not None
    claim(root, common, alone=alone)
    if alone:
        remove_unfinished(root / "data", *(root / "cells").glob("*"))
    for row in plan:
        claim(root / "cells" / row.folder, row.identity(), alone=False)
    for path, content in lists.items():
        write_json(path, content)

    try:
        _run(list(cells.values()), workers, ray, ray_resources)
    finally:
        results = collect(cells, counts, task.metric, base)
        results |= {
            "title": f"{bundle.replace('_', ' ')}: {len(plan)} ways to start, against {base}",
            **{"metric": task.title, "held_out": described.partition(",")[0], "steps": steps},
            **{"curve_cases": min(curve_cases, len(split.scored)), "example": split.example},
            "provenance": _trace(root, common, plan, cells.values()),
        }
        write_tables(root, results)
        write_atomic(root / "report.html", write_page(results).encode())
    states = Counter(cell["state"] for cell in results["cells"])
    return {"report": str(root / "report.html"), "cells": len(cells), **states}


def _plan_stages(
    row: Row,
    overlay: str,
    weights: Path,
    shared: Mapping[str, Any],
    train: Mapping[str, Any],
    score: Mapping[str, Any],
    example: Mapping[str, str] | None,
) -> tuple[Stage, ...]:
    """Plan the runs of a cell, which leave `weights` in the folder models/ of the cell's."""
    models, folder = weights.parent, weights.parents[1]
    configs = ("configs/train.yaml", *([overlay] if overlay else []), *row.configs)
    settings = {"norm": "batch"}  # of all rows, since pre-trained files have it
    settings |= {n: literal(plain(v)) if n in NAMES else v for n, v in merge_settings(shared, row).items()}
    start = literal({"init": row.init} | ({} if row.pretrained is None else {"pretrained": row.pretrained}))
    folders = literal({"ckpt_dir": str(models), "output_dir": str(folder / "eval")})
    train = {"num_workers": 0, **settings, **start, **train, **folders}
    left = {"ckpt_path": literal(str(weights)), "args_file": str(models / "run.json")}
    score = {"num_workers": 0, **settings, **score, **left, "output_dir": literal(str(folder / "scores"))}
    stages = (Stage("training", configs, train), Stage("scoring", (*configs, "configs/evaluate.yaml"), score))
    if example is None:
        return stages
    own = {name: value for name, value in settings.items() if name.startswith(("network_def", "geometry"))}
    shown = {**own, **left, **literal({"dataset_dir": example["image"], "output_dir": str(folder / "example")})}
    return (*stages, Stage("example", ("configs/inference.yaml", *row.configs), shown))


def _check_settings(cell: Cell) -> None:
    """Refuse a misspelt setting before anything runs, as the bundle's command line does."""
    try:
        check_command_line(cell.stages[0].words(), cell.bundle)
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from None


def _run(cells: Sequence[Cell], workers: int, ray: str | None, resources: Mapping[str, float] | None) -> None:
    if workers == 0 and ray is None:
        return
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = (visible.split(",") if visible else [str(i) for i in range(count)])[:count]
    waiting = sum(cell.result() is None for cell in cells)
    ended = run_cells(cells, workers=workers, devices=devices, ray=ray, ray_resources=resources)
    for cell in track(ended, waiting, "runs finished"):
        if cell.result() is None:
            say(f"failed: {cell.name}: {cell.error()}")


def _trace(root: Path, common: Mapping[str, Any], rows: Sequence[Row], cells: Iterable[Cell]) -> dict[str, Any]:
    """Say what the results come from: settings, files by their hashes, versions, machines and durations."""
    results = [result for cell in cells if (result := cell.result())]
    configs = sorted((find_bundles() / common["bundle"] / "configs").glob("*.yaml"))
    varied = {
        name: [json.loads(value) for value in sorted({json.dumps(result[name]) for result in results})]
        for name in ("versions", "machine", "commit", "threads")
    }
    took = [stage for result in results for stage in result["stages"].values()]
    return {
        **common,
        "rows": [{**row.identity(), "pretrained": row.pretrained, "note": row.note} for row in rows],
        "bundle_configs": {path.name: hash_file(path) for path in configs},
        "splits": {path.name: hash_file(path) for path in sorted((root / "data").glob("*.json"))},
        **varied,
        "hours": round(sum(stage["seconds"] for stage in took) / 3600, 3),
        "cpu_hours": round(sum(stage["cpu_seconds"] for stage in took) / 3600, 3),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
