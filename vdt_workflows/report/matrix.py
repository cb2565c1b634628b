"""Compare ways to start a network: a matrix of initialisations, shares of the labels and seeds, on data of your own.

    vdt compare --rows "scratch,vdt=bundles/imagenet_vdt_pretraining/models/encoder.pt" --dataset_dir DIR
    vdt compare --rows rows.yaml --dataset_dir DIR --fractions 0.1,0.5,1 --seeds 3 --workers 2

Each cell of the matrix is an ordinary run of a bundle. All rows of a share and a seed see the same cases in the same
order with the same augmentation for the same steps; all cells are scored on the same held-out cases, which select
nothing. The output folder holds `report.html`, `results.csv` and `results.json`. A matrix that was interrupted goes on
where it stopped, and may grow by rows, shares and seeds. docs/compare.md tells more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from tqdm import tqdm

from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.files import claim, hash_file, write_atomic
from vdt_workflows.locator import find_bundles
from vdt_workflows.overrides import check_command_line
from vdt_workflows.report.cells import Cell, Stage, run_cells
from vdt_workflows.report.comparison_page import write_page
from vdt_workflows.report.comparison_results import collect, write_tables
from vdt_workflows.training.initialisation import INITIALISATIONS

logger = logging.getLogger(__name__)


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


VOLUMES = Task("val_mean_dice", "mean Dice", score={"part": "test", "surfaces": False}, example=True)
TASKS = {
    "bcv_multiorgan_segmentation": VOLUMES,
    "lits_liver_segmentation": VOLUMES,
    "lidc_nodule_segmentation": Task("val_mean_dice", "mean Dice", score={"part": "test", "surfaces": False}),
    "lidc_nodule_classification": Task(
        "val_auc",
        "area under the ROC curve",
        steps="steps",
        weights="model.pt",
        train={"selection": "last"},
        score={"part": "test"},
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the matrix: how the network starts, or another network.

    Attributes:
        name: in the report.
        init: the bundle's `--init`; the name by default.
        pretrained: path of the weights.
        settings: more overrides by config id.
        configs: overlays, such as one with another `network_def`; inference takes them too.
        note: what the report says of the row.
    """

    name: str
    init: str
    pretrained: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    note: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^A-Za-z0-9.+]+", "-", self.name).strip("-.")


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
        Paths of the report and the tables, and how many cells are finished and failed.

    Raises:
        FileNotFoundError: if a file of weights, rows, settings or an overlay is missing.
        ValueError: if a row, an initialisation, a setting or a protocol is unknown, a fraction is no case at all, or
            `output_dir` holds results of other settings.
    """
    task = TASKS.get(bundle)
    if task is None:
        raise ValueError(f"bundle must be one of {', '.join(TASKS)}, got {bundle!r}")
    root = Path(output_dir).resolve()
    shared = _read_mapping(settings, "settings")
    plan = read_rows(rows)
    shares = sorted({float(f) for f in _listed(fractions)})
    known = find_protocols(bundle)
    names = list(dict.fromkeys(str(p) for p in _listed(protocols)))
    for name in names:
        if name not in known:
            raise ValueError(f"protocols of {bundle} must be among {', '.join(known)}, got {name!r}")
    if steps % points or seeds < 1:
        raise ValueError(f"steps must be a multiple of points, and seeds at least 1; got {steps=}, {points=}, {seeds=}")
    base = choose_reference(plan, reference)

    if bundle.startswith("lidc"):
        split = NoduleSplit(bundle, dataset_dir, shared, held_out, curve_cases, training_cases)
    else:
        split = VolumeSplit(dataset_dir, datalist, held_out, curve_cases, training_cases)
        if bundle.startswith("bcv") and "label_names" not in shared:
            shared = {**shared, "label_names": split.label_names()}
    counts = {share: count_cases(share, split.size) for share in shares}
    common = {
        **{"bundle": bundle, "dataset_dir": str(Path(dataset_dir).resolve()), "settings": shared, "steps": steps},
        **{"points": points, "curve_cases": curve_cases, "held_out": split.held_out, "pool": split.pool},
    }
    lists: dict[Path, dict[str, Any]] = {}
    cells: dict[tuple[str, str, float, int], Cell] = {}
    for seed in range(seeds):
        for share in shares:
            chosen = root / "data" / f"share{share:g}-seed{seed}.json"
            lists[chosen] = split.draw(counts[share], seed)
            for name in names:
                for row in plan:
                    drawn = pictures and task.example and (seed, share) == (0, shares[-1])
                    example = split.example if drawn else None
                    cells[name, row.name, share, seed] = _make_cell(
                        root, bundle, row, (name, share, seed), known[name], merge_settings(shared, row),
                        (steps, points), split.settings(str(chosen)), example, threads,
                    )  # fmt: skip
    for cell in {key[:2]: cell for key, cell in cells.items()}.values():
        _check_settings(cell)
    claim(root, common)
    for row in plan:
        claim(root / "cells" / row.folder, describe_row(row))
    for path, content in lists.items():
        write_atomic(path, json.dumps(content, indent=1).encode())

    try:
        _run(list(cells.values()), workers, ray, ray_resources)
    finally:
        results = collect(cells, counts, task.metric, base)
        results |= {
            "title": f"{bundle.replace('_', ' ')}: {len(plan)} ways to start, against {base}",
            **{"metric": task.title, "held_out": split.held_out.partition(",")[0], "steps": steps},
            **{"curve_cases": min(curve_cases, len(split.scored)), "example": split.example},
            "provenance": _trace(root, common, plan, cells.values()),
        }
        write_tables(root, results)
        write_atomic(root / "report.html", write_page(results).encode())
    states = Counter(cell["state"] for cell in results["cells"])
    return {"report": str(root / "report.html"), "cells": len(cells), **states}


# What is compared --------------------------------------------------------------------------------------------------


def read_rows(rows: str | Sequence[Any]) -> list[Row]:
    """Read rows from a file, or from words such as "scratch,vdt=encoder.pt".

    Paths in a file are relative to its folder; `~` and environment variables are replaced.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a row is malformed, its initialisation unknown, or two rows share a name.
    """
    folder = Path.cwd()
    entries: Any = rows
    if isinstance(rows, str) and Path(rows).suffix in (".yaml", ".yml", ".json"):
        folder = Path(rows).resolve().parent
        entries = _read_file(Path(rows), "rows")
        entries = entries.get("rows") if isinstance(entries, dict) else entries
    elif isinstance(rows, str):
        entries = rows.split(",")
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"rows {rows!r}: expected a list of rows, or words such as scratch,vdt=encoder.pt")
    found = [_read_row(entry, folder) for entry in entries]
    for i, row in enumerate(found):
        if not row.folder or row.folder in [other.folder for other in found[:i]]:
            raise ValueError(f"rows: {row.name!r} names two rows, or none; give each a name of its own")
    return found


def _read_row(entry: Any, folder: Path) -> Row:
    if isinstance(entry, str):
        name, _, path = entry.strip().partition("=")
        entry = {"name": name, "pretrained": path or None}
    known = list(Row.__dataclass_fields__)
    if not isinstance(entry, dict) or not entry.get("name"):
        raise ValueError(f"rows: {entry!r} is no row; expected a mapping with {', '.join(known)}")
    for key in entry:
        if key not in known:
            near = get_close_matches(str(key), known, n=1) or known
            raise ValueError(f"row {entry['name']!r}: {key!r} is unknown; did you mean {' or '.join(near)}?")
    name, init = str(entry["name"]), str(entry.get("init") or entry["name"])
    if init not in INITIALISATIONS:
        raise ValueError(f"row {name!r}: init must be one of {', '.join(INITIALISATIONS)}, got {init!r}")

    def place(path: str, what: str) -> str:
        found = folder / Path(os.path.expandvars(path)).expanduser()
        if not found.is_file():
            raise FileNotFoundError(f"row {name!r}: {what} {found}: no such file")
        return str(found.resolve())

    pretrained = entry.get("pretrained")
    configs = entry.get("configs") or ()
    return Row(
        name,
        init,
        None if pretrained is None else place(str(pretrained), "pretrained"),
        _read_mapping(entry.get("settings") or {}, f"row {name!r}: settings"),
        tuple(place(str(c), "config") for c in ([configs] if isinstance(configs, str) else configs)),
        str(entry.get("note") or ""),
    )


def find_protocols(bundle: str) -> dict[str, str]:
    """List the protocols of a bundle: that of train.yaml, and each overlay that sets `protocol`.

    Returns:
        The overlay's path from the bundle's folder, by protocol; empty for train.yaml's own.
    """
    folder = find_bundles() / bundle
    found = {}
    for path in sorted((folder / "configs").glob("*.yaml"), key=lambda p: (p.name != "train.yaml", p.name)):
        protocol = yaml.safe_load(path.read_text()).get("protocol")
        if protocol is not None and path.name != "inference.yaml":
            found[str(protocol)] = "" if path.name == "train.yaml" else str(path.relative_to(folder))
    return found


def describe_row(row: Row) -> dict[str, Any]:
    """Say what makes a row what it is: files by their content, wherever they lie."""
    hashes = {Path(path).name: hash_file(path) for path in row.configs}
    weights = None if row.pretrained is None else hash_file(row.pretrained)
    return {"name": row.name, "init": row.init, "weights": weights, "settings": dict(row.settings), "configs": hashes}


def merge_settings(shared: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Put a row's settings over those of all rows; parts of a network that its overlays replace are left out."""
    contents = [_read_mapping(path, f"row {row.name!r}: config") for path in row.configs]
    replaced = [
        f"{name.replace('#', '::')}::"
        for content in contents
        for name, value in content.items()
        if name.startswith("network_def") and isinstance(value, dict) and "_target_" in value
    ]
    kept = {k: v for k, v in shared.items() if not k.replace("#", "::").startswith(tuple(replaced))}
    return {**kept, **row.settings}


def choose_reference(rows: Sequence[Row], reference: str) -> str:
    """Name the row that the others are compared with.

    Raises:
        ValueError: if there is no row of that name.
    """
    names = [row.name for row in rows]
    if reference and reference not in names:
        raise ValueError(f"reference must be one of the rows {', '.join(names)}, got {reference!r}")
    return reference or ("scratch" if "scratch" in names else names[0])


def count_cases(share: float, available: int) -> int:
    """Number of labelled cases of a share.

    Raises:
        ValueError: if the share is not in (0, 1], or is no case at all.
    """
    if not 0 < share <= 1:
        raise ValueError(f"fractions must be above 0 and at most 1, got {share:g}")
    count = int(share * available + 0.5)
    if count == 0:
        least = -(-5000 // available) / 10000
        raise ValueError(f"fraction {share:g} of {available} labelled cases is none; take at least {least:g}")
    return count


# Which cases -------------------------------------------------------------------------------------------------------


class VolumeSplit:
    """Volumes to learn from and volumes to score."""

    def __init__(
        self, dataset_dir: str, datalist: str | None, held_out: int, curve_cases: int, training_cases: int | None
    ) -> None:
        self.source = (Path(dataset_dir), datalist)
        pool, scored = hold_out(find_volumes(dataset_dir, datalist=datalist), held_out)
        order = np.random.default_rng(0).permutation(len(pool))[:training_cases]
        self._pool, self.scored = [_absolute(pool[i]) for i in sorted(order.tolist())], [_absolute(c) for c in scored]
        self._curve = self.scored[:curve_cases]
        self.size = len(self._pool)
        self.pool, self.held_out = _describe_cases(self._pool), _describe_cases(self.scored)
        self.example = self.scored[0]

    def draw(self, count: int, seed: int) -> dict[str, Any]:
        """Give the datalist of a cell: the labelled cases, those of the curve, and the held-out ones."""
        order = np.random.default_rng(seed).permutation(self.size)[:count]
        return {
            "training": [self._pool[i] for i in order.tolist()],
            "validation": self._curve,
            "test": self.scored,
            "shared_cases": "the curve is drawn from some of the held-out cases, and nothing is selected on them",
        }

    def settings(self, path: str) -> dict[str, dict[str, Any]]:
        """Give the settings of training and scoring that take the datalist."""
        common = {"dataset_dir": str(self.source[0].resolve()), "datalist": path}
        return {"train": common, "score": common}

    def label_names(self) -> list[str]:
        """Take the names from dataset.json, or number the values that the labels hold."""
        folder, datalist = self.source
        listing = Path(datalist) if datalist else folder / "dataset.json"
        if listing.is_file():
            found = json.loads(listing.read_text()).get("labels", {})
            if found:
                named = {int(k): v for k, v in found.items()} if "0" in found else {int(v): k for k, v in found.items()}
                return [named[value] for value in sorted(named)]
        highest = max(int(np.asarray(nib.load(case["label"]).dataobj).max()) for case in self._pool)
        return ["background", *(f"label {value}" for value in range(1, highest + 1))]


class NoduleSplit:
    """Nodules to learn from and nodules to score, with all nodules of a patient on one side."""

    example = None

    def __init__(
        self,
        bundle: str,
        dataset_dir: str,
        settings: Mapping[str, Any],
        held_out: int,
        curve_cases: int,
        training_cases: int | None,
    ) -> None:
        self.dataset_dir, self.curve_cases = str(Path(dataset_dir).resolve()), curve_cases
        options = {name: settings[name] for name in ("table", "label_rule") if name in settings}
        options["task"] = bundle.rpartition("_")[2]
        every = find_nodules(dataset_dir, split="all", **options)["test"]
        test_fraction = min(0.5, held_out / len(every))
        parts = find_nodules(dataset_dir, val_fraction=0.0, test_fraction=test_fraction, **options)
        self.patients: dict[str, list[str]] = {}
        for nodule in parts["training"]:
            self.patients.setdefault(nodule["patient_id"], []).append(nodule["nodule_id"])
        self.scored = [nodule["nodule_id"] for nodule in parts["test"]]
        self.size = min(len(parts["training"]), training_cases or len(parts["training"]))
        self.pool, self.held_out = _describe_cases(parts["training"]), _describe_cases(parts["test"])

    def draw(self, count: int, seed: int) -> dict[str, Any]:
        """Give the split of a cell: whole patients, until there are enough nodules."""
        order = np.random.default_rng(seed).permutation(sorted(self.patients)).tolist()
        chosen: list[str] = []
        for patient in order:
            if len(chosen) >= count:
                break
            chosen += self.patients[patient]
        return {"split": "comparison", "training": chosen, "validation": [], "test": self.scored}

    def settings(self, path: str) -> dict[str, dict[str, Any]]:
        """Give the settings of training and scoring that take the split."""
        common = {"dataset_dir": self.dataset_dir, "split": path}
        watched = f"$vdt_workflows.take_part(@nodules, 'test')[:{self.curve_cases}]"
        return {"train": {**common, "validate::dataset::data": watched}, "score": common}


def hold_out(cases: Mapping[str, list[dict[str, str]]], number: int) -> tuple[list[dict], list[dict]]:
    """Separate the cases to learn from and the cases to score; test cases with labels are the first to be scored."""
    tests = [case for case in cases["test"] if "label" in case]
    labelled = [*cases["training"], *cases["validation"]]
    if tests:
        return labelled, tests[:number]
    order = np.random.default_rng(0).permutation(len(labelled))
    number = min(number, max(1, len(labelled) // 2))
    return [labelled[i] for i in sorted(order[number:])], [labelled[i] for i in sorted(order[:number])]


def _absolute(case: Mapping[str, str]) -> dict[str, str]:
    return {key: str(Path(path).resolve()) for key, path in case.items()}


def _describe_cases(cases: Sequence[Mapping[str, Any]]) -> str:
    """Say how many cases there are, and give the hash of their names."""
    names = sorted(str(case.get("nodule_id", Path(str(case["image"])).name)) for case in cases)
    return f"{len(names)} cases, sha256 of names {hashlib.sha256(chr(10).join(names).encode()).hexdigest()}"


# The cells ---------------------------------------------------------------------------------------------------------


def _make_cell(
    root: Path,
    bundle: str,
    row: Row,
    place: tuple[str, float, int],
    overlay: str,
    settings: Mapping[str, Any],
    schedule: tuple[int, int],
    data: Mapping[str, Mapping[str, Any]],
    example: Mapping[str, str] | None,
    threads: int,
) -> Cell:
    protocol, share, seed = place
    task = TASKS[bundle]
    prefix = f"{protocol}-" if overlay else ""
    folder = root / "cells" / row.folder / f"{prefix}share{share:g}-seed{seed}"
    models = folder / "models"
    overlays = (*([overlay] if overlay else []), *row.configs)
    steps, points = schedule
    weights = {"ckpt_path": str(models / task.weights), "args_file": str(models / "run.json")}
    start = {"init": row.init} | ({} if row.pretrained is None else {"pretrained": row.pretrained})
    train: dict[str, Any] = {"num_workers": 0, **settings, **start, "seed": seed}
    train |= {"epochs": points, task.steps: steps // points, "val_interval": 1, **task.train, **data["train"]}
    train |= {"ckpt_dir": str(models), "output_dir": str(folder / "eval")}
    if task is not TASKS["lidc_nodule_classification"]:
        train |= {"best_name": "model_best.pt", "last_name": task.weights}
    score = {"num_workers": 0, **settings, **task.score, **data["score"], **weights}
    score |= {"output_dir": str(folder / "scores")}
    stages = [
        Stage("training", ("configs/train.yaml", *overlays), train),
        Stage("scoring", ("configs/train.yaml", *overlays, "configs/evaluate.yaml"), score),
    ]
    if example is not None:
        own = {name: value for name, value in settings.items() if name.startswith("network_def")}
        shown = {"dataset_dir": example["image"], **own, **weights, "output_dir": str(folder / "example")}
        stages.append(Stage("example", ("configs/inference.yaml", *row.configs), shown))
    name = f"{prefix}{row.name}, {share:.0%} of the labels, seed {seed}"
    return Cell(name, str(folder), str(find_bundles() / bundle), tuple(stages), str(models / task.weights), threads)


def _check_settings(cell: Cell) -> None:
    """Refuse a misspelt setting before anything runs, as the bundle's command line does."""
    here = os.getcwd()
    try:
        os.chdir(cell.bundle)
        check_command_line(cell.stages[0].words())
    except ValueError as error:
        raise ValueError(f"{cell.name}: {error}") from None
    finally:
        os.chdir(here)


def _run(cells: Sequence[Cell], workers: int, ray: str | None, resources: Mapping[str, float] | None) -> None:
    if workers == 0 and ray is None:
        return
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = (visible.split(",") if visible else [str(i) for i in range(count)])[:count]
    finished = [cell for cell in cells if cell.result() is not None]
    bar = tqdm(total=len(cells), initial=len(finished), desc="cells", dynamic_ncols=True, disable=not cells)
    with bar:
        for cell in run_cells(cells, workers=workers, devices=devices, ray=ray, ray_resources=resources):
            if cell.result() is None:
                bar.write(f"failed: {cell.name}: {cell.error()}", file=sys.stderr)
            bar.update()


def _trace(root: Path, common: Mapping[str, Any], rows: Sequence[Row], cells: Iterable[Cell]) -> dict[str, Any]:
    """Say what the results come from: settings, files by their hashes, versions, machines and durations."""
    results = [result for cell in cells if (result := cell.result())]
    configs = sorted((find_bundles() / common["bundle"] / "configs").glob("*.yaml"))

    def all_of(name: str) -> list[Any]:
        return sorted({json.dumps(result[name]) for result in results})

    took = [stage for result in results for stage in result["stages"].values()]
    return {
        **common,
        "rows": [{**describe_row(row), "pretrained": row.pretrained, "note": row.note} for row in rows],
        "bundle_configs": {path.name: hash_file(path) for path in configs},
        "splits": {path.name: hash_file(path) for path in sorted((root / "data").glob("*.json"))},
        **{
            name: [json.loads(value) for value in all_of(name)] for name in ("versions", "machine", "commit", "threads")
        },
        "hours": round(sum(stage["seconds"] for stage in took) / 3600, 3),
        "cpu_hours": round(sum(stage["cpu_seconds"] for stage in took) / 3600, 3),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# Reading ------------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, Sequence) else [value]


def _read_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path}: neither YAML nor JSON ({str(error).splitlines()[0]})") from error


def _read_mapping(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = _read_file(Path(value), what) if value else {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: expected a mapping of config ids to values, got {value!r}")
    return dict(value)
