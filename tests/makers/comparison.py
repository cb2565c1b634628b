"""Comparisons with cells that are finished by hand."""

import json
from pathlib import Path
from typing import Any

from vdt_workflows.report.matrix import compare

TINY = {"base_channels": 4, "patch_size": [16, 16, 16], "spacing": "own", "window": "none", "pairs": []}
TINY |= {"mean": "own", "std": "own", "overlap": 0.25, "learning_rate": 0.1, "stem": "strided"}


def plan(volumes: Path, folder: Path, rows: Any = "scratch", **more: Any) -> dict[str, Any]:
    """Write the plan and the report alone, to `folder` / out."""
    options = {"settings": TINY, "fractions": [0.5, 1], "seeds": 2, "steps": 4, "points": 2, "held_out": 2}
    return compare(rows, str(volumes), str(folder / "out"), workers=0, **{**options, **more})


def finish(folder: Path, scores: dict[str, float], curve: list[tuple[int, float]]) -> None:
    """Write what a finished segmentation cell leaves."""
    for name in ("eval", "scores"):
        (folder / name).mkdir(parents=True)
    lines = ["case,organ,dice", *(f"{case},a,{score}" for case, score in scores.items())]
    (folder / "scores" / "cases.csv").write_text("\n".join(lines) + "\n")
    lines = ["epoch,step,val_mean_dice", *(f"{i},{step},{s}" for i, (step, s) in enumerate(curve, 1))]
    (folder / "eval" / "history.csv").write_text("\n".join(lines) + "\n")
    took = {"training": {"seconds": 3.0, "cpu_seconds": 2.0}, "scoring": {"seconds": 1.0, "cpu_seconds": 1.0}}
    result = {"stages": took, "parameters": 1_500_000, "versions": {"torch": "2"}, "machine": "m", "commit": None}
    (folder / "result.json").write_text(json.dumps({**result, "threads": 1}))
