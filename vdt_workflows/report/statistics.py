"""Scores of a matrix of runs: what its cells left, paired statistics over them, and the tables of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.evaluation.classification import weighted_auc
from vdt_workflows.files import read_csv, read_json, read_number, write_atomic, write_csv
from vdt_workflows.report.cells import Cell

NEAR = 0.9  # of the reference's final score: the target of the curves
Key = tuple[str, str, float, int]  # protocol, row, share, seed


@dataclass(frozen=True)
class CaseTable:
    """What several runs, one for each seed, made of the same cases.

    Attributes:
        values: (seeds, cases). The score of a case, such as its Dice, where NaN leaves it out; or, with `labels`, the
            predicted probability of class 1.
        labels: (cases,) of 0 and 1, or None. With them a run's score is the area under its ROC curve.
    """

    values: np.ndarray
    labels: np.ndarray | None = None

    def scores(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Score each run: the mean over cases, or the area under the ROC curve, in which ties count half.

        Args:
            weights: (samples, cases), how often each case counts; each once by default.

        Returns:
            (samples, seeds); NaN where no case counts, or no case of one of the classes.
        """
        weights = np.ones((1, self.values.shape[1])) if weights is None else np.asarray(weights, float)
        if self.labels is not None:
            return np.stack([weighted_auc(self.labels, scores, weights) for scores in self.values], axis=1)
        known = np.isfinite(self.values)
        with np.errstate(invalid="ignore"):
            return weights @ np.where(known, self.values, 0).T / (weights @ known.T)


def paired_difference(
    ours: CaseTable, theirs: CaseTable, *, level: float = 0.95, samples: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """Estimate how much higher `ours` scores than `theirs`, with a percentile interval by paired bootstrap.

    Each sample draws seeds and, independently, cases, both with replacement and the same for both rows. It keeps what
    the rows share (a hard case, a lucky draw of labelled cases) out of the interval. A bootstrap over very few seeds
    makes the interval too narrow: with three, it is a lower bound.

    Args:
        ours: one row, (seeds, cases).
        theirs: the other, with the same seeds and cases in the same order.
        level: share of the bootstrap differences inside the interval.
        samples: number of bootstrap samples.
        seed: seed of the draws.

    Returns:
        `mean` over seeds, `low` and `high` ends of the interval, and `by_seed`, the difference of each.

    Raises:
        ValueError: if the two differ in shape or labels, or are empty.
    """
    a, b = ours.values, theirs.values
    labels = [None if table.labels is None else table.labels.tolist() for table in (ours, theirs)]
    if a.shape != b.shape or labels[0] != labels[1] or not a.size:
        raise ValueError(f"both rows need the same seeds and cases, at least one of each, got {a.shape} and {b.shape}")
    by_seed = (ours.scores() - theirs.scores())[0]
    seeds, cases = a.shape
    rng = np.random.default_rng(seed)
    drawn_cases = rng.multinomial(cases, np.full(cases, 1 / cases), samples)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), samples)
    differences = (drawn_seeds * (ours.scores(drawn_cases) - theirs.scores(drawn_cases))).sum(1) / seeds
    low, high = np.nanpercentile(differences, [50 * (1 - level), 50 * (1 + level)])
    return {"mean": float(by_seed.mean()), "low": float(low), "high": float(high), "by_seed": by_seed.tolist()}


def first_reach(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Say where a curve of straight lines first reaches a target.

    Args:
        points: (place, score), where places are steps or numbers of labels, rising.
        target: the score to be reached.

    Returns:
        The place; the first one if the curve starts at the target or above, which is then an upper bound; None if the
        curve stays below.
    """
    for i, (place, score) in enumerate(points):
        if score >= target:
            if i == 0:
                return float(place)
            before, lower = points[i - 1]
            return float(before + (target - lower) / (score - lower) * (place - before))
    return None


@dataclass(frozen=True)
class Scored:
    """What a finished cell left.

    Attributes:
        cases: the score of each held-out case, or its predicted probability.
        labels: the class of each case, where the score is an area under the curve.
        curve: (step, score) while training.
        parameters: how many numbers its weights hold.
    """

    cases: dict[str, float]
    labels: dict[str, int] | None
    curve: list[tuple[int, float]]
    parameters: int


def read_cell(cell: Cell, metric: str) -> Scored:
    """Read the tables that a cell's bundle wrote."""
    folder = Path(cell.folder)
    history = read_csv(folder / "eval" / "history.csv", ["step"], others=True)
    curve = [(int(row["step"]), _read_score(row, metric, folder)) for row in history if row.get(metric)]
    parameters = read_json(folder / "result.json").get("parameters", 0)
    nodules = folder / "scores" / "predictions.csv"
    if nodules.is_file():
        rows = read_csv(nodules, ["nodule_id", "label", "score"], others=True)
        labels = {row["nodule_id"]: int(read_number(row["label"], "label", str(nodules), 0, 1)) for row in rows}
        scores = {row["nodule_id"]: _read_score(row, "score", nodules) for row in rows}
        return Scored(scores, labels, curve, parameters)
    organs: dict[str, list[float]] = {}
    for row in read_csv(folder / "scores" / "cases.csv", ["case", "dice"], others=True):
        organs.setdefault(row["case"], []).append(_read_score(row, "dice", folder))
    cases = {case: float(np.nanmean(v)) if np.isfinite(v).any() else math.nan for case, v in organs.items()}
    return Scored(cases, None, curve, parameters)


def _read_score(row: Mapping[str, str], column: str, place: Path) -> float:
    """Read a score from 0 to 1, or NaN where there is none."""
    return math.nan if row[column] in ("", "nan") else read_number(row[column], column, str(place), 0, 1)


def collect(
    cells: Mapping[Key, Cell], counts: Mapping[float, int], metric: str, reference: str, samples: int = 4000
) -> dict[str, Any]:
    """Read all cells and work out the statistics.

    Args:
        cells: by protocol, row, share of the labels and seed.
        counts: labelled cases of each share.
        metric: column of history.csv.
        reference: row that the others are compared with.
        samples: of the bootstrap.

    Returns:
        `cells`, `summary` (a row for each protocol, share and row), `efficiency` (labels that a row needs to equal the
        reference with all) and `cases` (their scores); plain values, fit for JSON.
    """
    found = {key: read_cell(cell, metric) for key, cell in cells.items() if cell.result() is not None}
    groups: dict[tuple[str, str, float], dict[int, Scored]] = {}  # the finished cells by seed
    for protocol, row, share, seed in sorted(cells, key=lambda key: key[2]):
        group = groups.setdefault((protocol, row, share), {})
        if (protocol, row, share, seed) in found:
            group[seed] = found[protocol, row, share, seed]
    protocols = {name: i for i, name in enumerate(dict.fromkeys(key[0] for key in cells))}
    summary = [
        {
            **{"protocol": protocol, "row": row, "share": share, "labels": counts[share]},
            **_summarise(runs, None if row == reference else groups[protocol, reference, share], samples),
            **_follow(runs, groups[protocol, reference, share]),
        }
        for (protocol, row, share), runs in sorted(groups.items(), key=lambda item: protocols[item[0][0]])
    ]
    entries, cases = [], []
    for key, cell in cells.items():
        protocol, row, share, seed = key
        run, result, error = found.get(key), cell.result(), cell.error()
        state = "finished" if result else "failed" if error else "not run"
        place = {"protocol": protocol, "row": row, "share": share, "labels": counts[share], "seed": seed}
        entry = {**place, "state": state, "score": float(_tabulate([run]).scores()[0, 0]) if run else None}
        entry |= {"error": error if state == "failed" else None, "curve": run.curve if run else []}
        for name in ("seconds", "cpu_seconds"):
            entry[name] = round(sum(s[name] for s in result["stages"].values()), 1) if result else None
        entries.append({**entry, "folder": cell.folder})
        cases += [{**place, "case": case, "value": run.cases[case]} for case in sorted(run.cases)] if run else []
    efficiency = [entry for name in protocols for entry in _find_efficiency(summary, name, reference)]
    return {"reference": reference, "cells": entries, "summary": summary, "efficiency": efficiency, "cases": cases}


def _tabulate(runs: Sequence[Scored]) -> CaseTable:
    names, labels = sorted(runs[0].cases), runs[0].labels
    values = np.array([[run.cases[name] for name in names] for run in runs])
    return CaseTable(values, None if labels is None else np.array([labels[name] for name in names]))


def _summarise(runs: Mapping[int, Scored], base: Mapping[int, Scored] | None, samples: int) -> dict[str, Any]:
    """Score a row over its seeds, and against the reference over the seeds that both have finished."""
    scores = _tabulate(list(runs.values())).scores()[0] if runs else np.array([])
    difference = None
    if base and (both := [seed for seed in runs if seed in base]):
        ours, theirs = (_tabulate([group[seed] for seed in both]) for group in (runs, base))
        difference = paired_difference(ours, theirs, samples=samples)
    return {
        "mean": float(scores.mean()) if len(scores) else None,
        "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "by_seed": dict(zip(map(str, runs), scores.tolist(), strict=True)),
        "difference": difference,
    }


def _follow(runs: Mapping[int, Scored], base: Mapping[int, Scored]) -> dict[str, Any]:
    """Give the mean curve of a row, and the steps to `NEAR` of what the reference has in the end."""
    curve, goal = (_mean_curve([run.curve for run in group.values()]) for group in (runs, base))
    return {
        "curve": curve,
        "steps_to_90": first_reach(curve, NEAR * goal[-1][1]) if goal else None,
        "first_point": curve[0][0] if curve else None,
        "parameters": next(iter(runs.values())).parameters if runs else None,
    }


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Mean over seeds at the steps that all of them have."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set(by_step[0]).intersection(*by_step)) if by_step else []
    return [(step, float(np.mean([curve[step] for curve in by_step]))) for step in steps]


def _find_efficiency(summary: Sequence[Mapping[str, Any]], protocol: str, reference: str) -> list[dict[str, Any]]:
    """Say how many labels each row needs for the score that the reference has with all, on the line between shares."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in summary:
        if entry["protocol"] == protocol:
            line = lines.setdefault(entry["row"], [])
            line += [] if entry["mean"] is None else [(entry["labels"], entry["mean"])]
    largest = max(entry["labels"] for entry in summary)
    goal = dict(lines[reference]).get(largest)
    found = []
    for row, points in lines.items():
        reached = None if goal is None else first_reach(points, goal)
        entry = {"protocol": protocol, "row": row, "target": goal, "all": largest, "labels": reached}
        entry["upper_bound"] = reached is not None and reached == points[0][0]
        entry["stays"] = reached is not None and all(mean >= (goal or 0) for n, mean in points if n >= reached)
        found.append(entry)
    return found


def write_tables(root: Path, results: Mapping[str, Any]) -> None:
    """Write `results.csv` (a line a cell), `cases.csv` (a line a case of a cell) and `results.json` (all but cases)."""
    columns = [name for name in results["cells"][0] if name not in ("curve", "folder")]
    write_csv(root / "results.csv", map(_round, results["cells"]), columns)
    columns = ["protocol", "row", "share", "seed", "case", "value"]
    write_csv(root / "cases.csv", map(_round, results["cases"]), columns)
    content = {name: value for name, value in results.items() if name != "cases"}
    write_atomic(root / "results.json", json.dumps(content, indent=1, allow_nan=False).encode())


def _round(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
