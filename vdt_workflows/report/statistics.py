"""Paired statistics of runs that were scored on the same cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.labels is None:
                known = np.isfinite(self.values)
                return weights @ np.where(known, self.values, 0).T / (weights @ known.T)
            positive, negative = self.labels == 1, self.labels == 0
            high, low = self.values[:, positive, None], self.values[:, None, negative]
            wins = (high > low) + 0.5 * (high == low)  # (seeds, positives, negatives)
            a, b = weights[:, positive], weights[:, negative]
            return np.einsum("bp,spn,bn->bs", a, wins, b, optimize=True) / (a.sum(1) * b.sum(1))[:, None]


@dataclass(frozen=True)
class Difference:
    """A difference between two rows of a comparison.

    Attributes:
        mean: over seeds.
        low, high: ends of the interval.
        by_seed: the difference of each seed.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def paired_difference(
    ours: CaseTable, theirs: CaseTable, *, level: float = 0.95, samples: int = 4000, seed: int = 0
) -> Difference:
    """Estimate how much higher `ours` scores than `theirs`, with a percentile interval by paired bootstrap.

    Each sample draws seeds and, apart from them, cases, both with replacement and the same for both sides. It keeps
    what the sides share (a hard case, a lucky draw of labelled cases) out of the interval. A bootstrap over very few
    seeds makes the interval too narrow: with three, take it for the least there is.

    Args:
        ours: one row, (seeds, cases).
        theirs: the other, with the same seeds and cases in the same order.
        level: share of the bootstrap differences inside the interval.
        samples: number of bootstrap samples.
        seed: seed of the draws.

    Raises:
        ValueError: if the two differ in shape or labels, or are empty.
    """
    a, b = ours.values, theirs.values
    same = (ours.labels is None) == (theirs.labels is None) and np.array_equal(ours.labels, theirs.labels)  # type: ignore[arg-type]
    if a.shape != b.shape or not same or not a.size:
        raise ValueError(f"both sides need the same seeds and cases, at least one of each, got {a.shape} and {b.shape}")
    by_seed = (ours.scores() - theirs.scores())[0]
    seeds, cases = a.shape
    rng = np.random.default_rng(seed)
    drawn_cases = rng.multinomial(cases, np.full(cases, 1 / cases), samples)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), samples)
    differences = (drawn_seeds * (ours.scores(drawn_cases) - theirs.scores(drawn_cases))).sum(1) / seeds
    low, high = np.nanpercentile(differences, [50 * (1 - level), 50 * (1 + level)])
    return Difference(float(by_seed.mean()), float(low), float(high), tuple(by_seed.tolist()))


def first_reach(places: Sequence[float], scores: Sequence[float], target: float) -> float | None:
    """Say where a curve of straight lines first reaches a target.

    Args:
        places: steps or numbers of labels, rising.
        scores: the curve at them.
        target: what is to be reached.

    Returns:
        The place; the first one if the curve starts at the target or above, which is then an upper bound; None if the
        curve stays below.
    """
    for i, score in enumerate(scores):
        if score >= target:
            if i == 0:
                return float(places[0])
            share = (target - scores[i - 1]) / (score - scores[i - 1])
            return float(places[i - 1] + share * (places[i] - places[i - 1]))
    return None
