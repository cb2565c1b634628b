"""How the benchmarks time passes, run functions in processes of their own, and sum up the repeats."""

import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np


def alternate(
    passes: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each pass by name; they take turns at being first, and one untimed round comes before."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name in sorted(passes, reverse=repeat % 2 == 1):
            start = clock()
            passes[name]()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, rounded to a thousandth."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": round(float(median), 3), "q25": round(float(low), 3), "q75": round(float(high), 3)}


def quartiles_of(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles by name."""
    return {name: quartiles(found) for name, found in values.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, repeat by repeat."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its peak memory is its own, and give what it returns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory() -> int:
    """Peak resident memory of this process so far, in KiB."""
    return getrusage(RUSAGE_SELF).ru_maxrss
