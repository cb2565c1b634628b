"""How the benchmarks time passes, start sides in processes of their own, and tell of the spread."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def alternate(
    passes: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each pass; the sides take turns at being first, and one untimed round comes before."""
    seconds: dict[str, list[float]] = {side: [] for side in passes}
    for repeat in range(repeats + 1):
        for side in sorted(passes, reverse=repeat % 2 == 1):
            start = clock()
            passes[side]()
            if repeat:
                seconds[side].append(clock() - start)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, rounded to a thousandth."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(median), 3), "q25": round(float(low), 3), "q75": round(float(high), 3)}


def run_side(command: str, *arguments: Any) -> dict[str, Any]:
    """Run a command of `benchmark.py` in a process of its own; give what it prints as its last line, which is JSON."""
    words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("benchmark.py")), command]
    done = subprocess.run([*words, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
