"""What a comparison found: the scores of its cells, their statistics, and the tables that `compare.py` leaves."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.files import write_atomic
from vdt_workflows.report.cells import Cell
from vdt_workflows.report.statistics import CaseTable, first_reach, paired_difference

NEAR = 0.9  # of the reference's final score: what is asked of the curves
Key = tuple[str, str, float, int]  # protocol, row, share, seed


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
    curve = [(int(r["step"]), float(r[metric])) for r in _read_csv(folder / "eval" / "history.csv") if r.get(metric)]
    parameters = json.loads((folder / "result.json").read_text()).get("parameters", 0)
    nodules = folder / "scores" / "predictions.csv"
    if nodules.is_file():
        rows = _read_csv(nodules)
        return Scored(
            {r["nodule_id"]: float(r["score"]) for r in rows},
            {r["nodule_id"]: int(r["label"]) for r in rows},
            curve,
            parameters,
        )
    organs: dict[str, list[float]] = {}
    for row in _read_csv(folder / "scores" / "cases.csv"):
        organs.setdefault(row["case"], []).append(float(row["dice"] or "nan"))
    cases = {case: float(np.nanmean(v)) if np.isfinite(v).any() else math.nan for case, v in organs.items()}
    return Scored(cases, None, curve, parameters)


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
    protocols, rows, shares, seeds = (list(dict.fromkeys(key[i] for key in cells)) for i in range(4))

    def table(protocol: str, row: str, share: float, chosen: Sequence[int]) -> CaseTable:
        runs = [found[protocol, row, share, seed] for seed in chosen]
        names = sorted(runs[0].cases)
        values = np.array([[run.cases[name] for name in names] for run in runs])
        return CaseTable(values, None if runs[0].labels is None else np.array([runs[0].labels[n] for n in names]))

    def finished(protocol: str, row: str, share: float) -> list[int]:
        return [seed for seed in seeds if (protocol, row, share, seed) in found]

    summary: list[dict[str, Any]] = []
    for protocol in protocols:
        for share in sorted(shares):
            base = finished(protocol, reference, share)
            goal = _mean_curve([found[protocol, reference, share, seed].curve for seed in base])
            target = NEAR * goal[-1][1] if goal else None
            for row in rows:
                own = finished(protocol, row, share)
                scores = table(protocol, row, share, own).scores()[0] if own else np.array([])
                curve = _mean_curve([found[protocol, row, share, seed].curve for seed in own])
                reached = None if target is None or not curve else first_reach(*zip(*curve, strict=True), target)
                both = [seed for seed in own if seed in base] if row != reference else []
                difference = None
                if both:
                    pair = [table(protocol, name, share, both) for name in (row, reference)]
                    difference = asdict(paired_difference(pair[0], pair[1], samples=samples))
                summary.append(
                    {
                        **{"protocol": protocol, "row": row, "share": share, "labels": counts[share]},
                        "mean": float(scores.mean()) if len(scores) else None,
                        "sd": float(scores.std(ddof=1)) if len(scores) > 1 else None,
                        "by_seed": dict(zip(map(str, own), scores.tolist(), strict=True)),
                        "difference": difference,
                        "curve": curve,
                        "steps_to_90": reached,
                        "first_point": curve[0][0] if curve else None,
                        "parameters": found[protocol, row, share, own[0]].parameters if own else None,
                    }
                )
    entries = []
    for key, cell in cells.items():
        protocol, row, share, seed = key
        result, error = cell.result(), cell.error()
        state = "finished" if result else "failed" if error else "not run"
        score = float(table(protocol, row, share, [seed]).scores()[0, 0]) if result else None
        took = (
            {name: sum(s[name] for s in result["stages"].values()) for name in ("seconds", "cpu_seconds")}
            if result
            else {}
        )
        entries.append(
            {
                **{"protocol": protocol, "row": row, "share": share, "labels": counts[share], "seed": seed},
                **{"state": state, "score": score, "error": error if state == "failed" else None},
                **{"curve": found[key].curve if result else []},
                **{name: round(took[name], 1) if took else None for name in ("seconds", "cpu_seconds")},
                "folder": cell.folder,
            }
        )
    cases = [
        {"protocol": key[0], "row": key[1], "share": key[2], "seed": key[3], "case": case, "value": value}
        for key, run in found.items()
        for case, value in sorted(run.cases.items())
    ]
    efficiency = _find_efficiency(summary, protocols, rows, reference)
    return {"reference": reference, "cells": entries, "summary": summary, "efficiency": efficiency, "cases": cases}


def _find_efficiency(
    summary: Sequence[Mapping[str, Any]], protocols: Sequence[str], rows: Sequence[str], reference: str
) -> list[dict[str, Any]]:
    """Say how many labels each row needs for the score that the reference has with all, on the line between shares."""
    found = []
    for protocol in protocols:
        lines = {
            row: [s for s in summary if (s["protocol"], s["row"]) == (protocol, row) and s["mean"] is not None]
            for row in rows
        }
        largest = max(s["labels"] for s in summary)
        goal = next((s["mean"] for s in lines[reference] if s["labels"] == largest), None)
        for row in rows:
            points = [(s["labels"], s["mean"]) for s in lines[row]]
            labels = [n for n, _ in points]
            reached = None if goal is None or not points else first_reach(*zip(*points, strict=True), goal)
            found.append(
                {
                    **{"protocol": protocol, "row": row, "target": goal, "all": largest, "labels": reached},
                    "upper_bound": reached is not None and reached == labels[0],
                    "stays": reached is not None and all(m >= goal for n, m in points if n >= reached),
                }
            )
    return found


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Mean over seeds at the steps that all of them have."""
    if not curves:
        return []
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set(by_step[0]).intersection(*by_step))
    return [(step, float(np.mean([curve[step] for curve in by_step]))) for step in steps]


def write_tables(root: Path, results: Mapping[str, Any]) -> None:
    """Write `results.csv` (a line a cell), `cases.csv` (a line a case of a cell) and `results.json` (all but cases)."""
    hidden = ("curve", "folder")
    names = [name for name in results["cells"][0] if name not in hidden]
    write_atomic(root / "results.csv", _as_csv(names, results["cells"]))
    write_atomic(root / "cases.csv", _as_csv(["protocol", "row", "share", "seed", "case", "value"], results["cases"]))
    content = {name: value for name, value in results.items() if name != "cases"}
    write_atomic(root / "results.json", json.dumps(content, indent=1, allow_nan=False).encode())


def _as_csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    shown: Callable[[Any], Any] = lambda v: round(v, 6) if isinstance(v, float) else v  # noqa: E731
    writer.writerows([{name: shown(value) for name, value in row.items()} for row in rows])
    return text.getvalue().encode()


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))
