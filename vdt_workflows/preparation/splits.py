"""Divide cases into training, validation and test: as published, as recommended, or as a fold of a cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from vdt_workflows.data.volumes import draw
from vdt_workflows.preparation.public_sets import DataSet

T = TypeVar("T")
Lists = dict[str, list[T]]


def split_published(data_set: DataSet) -> Lists[int]:
    """Give the split of the VDT paper's code, as it is."""
    return {name: list(numbers) for name, numbers in data_set.published.items()}


def split_recommended(data_set: DataSet, val_fraction: float, seed: int) -> Lists[int]:
    """Give the published test cases, and validation cases apart from them.

    Where the published validation cases are apart from the test, they are kept; else a share of the training cases is
    drawn by seed.
    """
    lists = split_published(data_set)
    if data_set.shared_cases:
        lists["training"], lists["validation"] = draw(lists["training"], val_fraction, seed)
    return lists


def split_fold(cases: Sequence[T], folds: int, fold: int, val_fraction: float, seed: int) -> Lists[T]:
    """Give one fold of a seeded cross-validation: the fold is the test, and a share of the others validates.

    Over all folds each case is tested once, and never by a run that saw it, be it for selection.

    Raises:
        ValueError: if there is no such fold, or there are too few cases.
    """
    if not 2 <= folds <= len(cases):
        raise ValueError(f"folds must be 2 to {len(cases)}, the number of cases, got {folds}")
    if not 0 <= fold < folds:
        raise ValueError(f"fold must be 0 to {folds - 1}, got {fold}")
    order = np.random.default_rng(seed).permutation(len(cases))
    tested = set(np.array_split(order, folds)[fold].tolist())
    rest = [case for i, case in enumerate(cases) if i not in tested]
    training, validation = draw(rest, val_fraction, seed, fold)
    return {"training": training, "validation": validation, "test": [c for i, c in enumerate(cases) if i in tested]}
