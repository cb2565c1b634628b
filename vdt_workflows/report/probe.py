"""What frozen features tell: a linear or nearest-neighbour probe, cross-validated by patient.

    vdt probe features.csv --target malignancy_mean --above 3
    vdt probe vdt.csv --target malignancy_mean --above 3 --against random.csv

No patient is on both sides, of the folds or of those inside them that choose the regularisation.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.errors import check_choice
from vdt_workflows.evaluation.classification import RESAMPLES, weighted_auc
from vdt_workflows.files import NUMBER, few, read_csv, read_number, write_csv
from vdt_workflows.progress import Bar, open_bar

logger = logging.getLogger(__name__)

STRENGTHS = np.logspace(-4, 1, 6)  # C of the logistic regression; those of the ridge are their inverse
NEIGHBOURS = (1, 3, 5, 9, 15, 25, 45)
INNER = 4  # folds, at most, by which one of them is chosen


def probe_features(
    *features: str,
    target: str,
    above: float | None = None,
    group: str = "patient_id",
    columns: str = "stage*",
    table: str | None = None,
    against: str | Sequence[str] = (),
    against_columns: str | None = None,
    method: str = "linear",
    folds: int = 5,
    labels: int | None = None,
    repeats: int = 10,
    seed: int = 0,
    output: str | None = None,
    predictions: str | None = None,
) -> dict[str, Any]:
    """Score what a linear model of frozen features tells of a target, on patients that it has not seen.

    A target of two values is told by a logistic regression and scored by AUC, other numbers by ridge regression and R2.
    Features are standardised. The strength of the regularisation is chosen in each fold by a cross-validation inside
    it, by patient too. Intervals of 95 % come from drawing patients with replacement, the same ones for all files; what
    another draw of training cases would change is not in them.

    Args:
        features: tables of `vdt embed`, or any CSV with a row for each case.
        target: column of what is to be told.
        above: makes two classes of numbers: above and below; cases that equal it are left out.
        group: column of the patients, who are never on both sides.
        columns: columns of the features, with * for any letters and commas between.
        table: another CSV that has the target, beside the first column of the features, which names the cases.
        against: tables, with commas between, whose mean score is subtracted, by paired draws of patients.
        against_columns: those of `against`, by default the same.
        method: linear or nearest (neighbours, whose number is chosen like the strength).
        folds: of the cross-validation.
        labels: how many cases of each training side are learned from, drawn at random; by default all.
        repeats: of that draw, whose scores are averaged.
        seed: of the folds and the draws.
        output: a CSV for the scores, a row for each table.
        predictions: a CSV for the prediction of each case, with its fold.

    Returns:
        `metric`, `cases`, `patients`, and `rows`: for each table its `score` with `low` and `high`, the score of each
        of the `folds`, and with `against` the `difference` with `difference_low` and `difference_high`.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if a column is missing, a feature is no number, a target has one value or more than two that are no
            numbers, there are fewer patients than folds (of each class), or the tables are not of the same cases.
    """
    check_choice("method", method, ("linear", "nearest"))
    rivals = [name.strip() for name in against.split(",")] if isinstance(against, str) else [*against]
    if not features or folds < 2:
        raise ValueError(f"give at least one table of features and two folds, got {len(features)} and {folds}")
    if labels is not None and repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    places = [os.path.realpath(path) for path in (output, predictions, table, *features, *rivals) if path]
    for name, path in (("output", output), ("predictions", predictions)):
        if path and places.count(os.path.realpath(path)) > 1:
            raise ValueError(f"{name} {path}: another table of this probe; name a file of its own")
    tables = [(name, columns) for name in features] + [(name, against_columns or columns) for name in rivals]
    cases, y, owners, classes = _read_target(tables[0][0], target, above, group, table)
    sides = _divide(y, owners, folds, seed, bool(classes))
    draws = _draw(owners, seed)
    given = {one: _read_features(Path(one[0]), one[1], cases, (target, group)) for one in tables}  # each once
    lists = [sides] if labels is None else [_draw_labels(sides, y, labels, seed + i) for i in range(repeats)]
    with closing(open_bar("folds fitted", len(given) * len(lists) * folds)) as bar:
        known = {
            one: np.array([_predict(x, y, owners, some, method, seed, bool(classes), bar) for some in lists])
            for one, x in given.items()
        }
    found = [known[one] for one in tables]  # (repeats, cases) of each
    scores = [np.mean([_score(y, row, draws, bool(classes)) for row in predicted], axis=0) for predicted in found]
    rows = []
    for i, name in enumerate(features):
        alone = [np.isin(np.arange(len(y)), test)[None] for _, test in sides]
        parts = [np.mean([_score(y, one, fold, bool(classes)) for one in found[i]]) for fold in alone]
        row: dict[str, Any] = {"features": Path(name).stem, "columns": columns, **_interval(scores[i])}
        if rivals:
            gap = _interval(scores[i] - np.mean(scores[len(features) :], axis=0))
            row |= {f"difference{'' if k == 'score' else f'_{k}'}": v for k, v in gap.items()}
        row["folds"] = [round(float(part), 4) for part in parts]
        rows.append(row)
        told = ["score", "low", "high", *(["difference", "difference_low", "difference_high"] if rivals else [])]
        logger.info("%s: %s", name, ", ".join(f"{k.replace('_', ' ')} {row[k]:.3f}" for k in told))
    if output:
        flat = [{**row, **{f"fold_{i}": s for i, s in enumerate(row["folds"])}} for row in rows]
        write_csv(output, flat, [k for k in flat[0] if k != "folds"])
    if predictions:
        fold_of = {int(i): k for k, (_, test) in enumerate(sides) for i in test}
        lines = [
            {"features": Path(name).stem, "case": case, group: owners[i], "fold": fold_of[i], target: float(y[i])}
            | {"prediction": f"{values[:, i].mean():.6g}"}
            for (name, _), values in zip(tables, found, strict=True)
            for i, case in enumerate(cases)
        ]
        write_csv(predictions, lines, [*lines[0]])
    counts: dict[str, Any] = {"classes": classes} if classes else {}
    counts |= {"cases": len(y), "patients": len({*owners}), "folds": folds}
    return {"metric": "AUC" if classes else "R2", **counts, "method": method, "rows": rows}


def _read_table(path: Path, wanted: Sequence[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """Read a table by its first column, which names the cases."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a table that vdt embed wrote")
    rows = read_csv(path, wanted, others=True)
    if not rows:
        raise ValueError(f"{path}: has no rows")
    key = next(iter(rows[0]))
    return key, _by_case(rows, key, f"{path}: {key}, its first column,")


def _by_case(rows: Sequence[dict[str, str]], key: str, where: str) -> dict[str, dict[str, str]]:
    """Give the rows by the column that names the cases, each of which has one."""
    named = {row[key]: row for row in rows}
    if len(named) < len(rows):
        raise ValueError(f"{where} names a case twice; expected one row a case")
    return named


def _read_target(
    path: str, target: str, above: float | None, group: str, table: str | None
) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Read whom each case is of and what is to be told: 0 and 1 of two classes, or numbers."""
    key, rows = _read_table(Path(path), [group] if table else [group, target])
    known = rows
    if table:
        known = _by_case(read_csv(Path(table), [key, target], others=True), key, f"{table}: {key}")
    values = {case: known.get(case, {}).get(target, "").strip() for case in rows}
    empty = [case for case, value in values.items() if not value]
    if alone := [case for case in rows if not rows[case][group].strip()]:
        raise ValueError(f"{path}: {group} of {few(alone)} is empty; expected whose each case is")
    values = {case: value for case, value in values.items() if value}
    place = str(table or path)
    numbers = {c: read_number(v, target, place, -math.inf) if NUMBER.fullmatch(v) else v for c, v in values.items()}
    texts = [v for v in numbers.values() if isinstance(v, str)]
    if not texts:  # 1 and 1.0 are one class
        values = {c: str(int(v) if float(v).is_integer() else v) for c, v in numbers.items()}
    if above is not None:
        if texts:
            raise ValueError(f"{place}: {target} is {texts[0]!r}; above {above:g} needs numbers")
        equal = [case for case, value in numbers.items() if value == above]
        values = {c: f"{'above' if v > above else 'below'} {above:g}" for c, v in numbers.items() if v != above}  # type: ignore[operator]  # numbers, as checked
        empty += equal
    if empty:
        logger.warning("%s: %d cases without a value of %s are left out (%s)", place, len(empty), target, few(empty, 3))
    cases = [*values]
    owners = np.array([rows[case][group].strip() for case in cases])
    kinds = sorted({*values.values()}, reverse=above is not None)  # "below" before "above"
    if above is None and not texts and len({*numbers.values()}) == 2:
        kinds = sorted(kinds, key=float)
    if len(kinds) < 2:
        raise ValueError(f"{place}: {target} is {few(kinds) or 'empty'} in all cases; expected two classes, or numbers")
    if len(kinds) == 2:
        return cases, np.array([kinds.index(values[case]) for case in cases]), owners, kinds
    if texts:
        raise ValueError(f"{place}: {target} has {len(kinds)} values, as {few(kinds, 3)}; expected two, or numbers")
    return cases, np.array([float(values[case]) for case in cases]), owners, []


def _read_features(path: Path, columns: str, cases: Sequence[str], barred: Sequence[str]) -> np.ndarray:
    """Read the features of the cases, in their order; the answer and whose a case is are none."""
    key, rows = _read_table(path, ())
    if absent := [case for case in cases if case not in rows]:
        raise ValueError(f"{path}: lacks {len(absent)} of the cases, such as {few(absent, 3)}; expected the same ones")
    patterns = [pattern.strip() for pattern in columns.split(",")]
    heading = [*next(iter(rows.values()))]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in heading):
            raise ValueError(f"{path}: has no column {pattern}; it has {few(heading, 8)}")
    used = [name for name in heading if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if known := [name for name in used if name in (key, *barred)]:
        raise ValueError(f"{path}: columns {columns!r} match {few(known)}, which tell answer or case; name others")
    return np.array([[read_number(rows[c][n], n, f"{path}, {c}", -math.inf) for n in used] for c in cases])


def _divide(
    y: np.ndarray, owners: np.ndarray, folds: int, seed: int, classes: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide cases by patient into training and test sides, with both classes on each."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    few_owners = min(len({*owners[y == c]}) for c in (0, 1)) if classes else len({*owners})
    if few_owners < folds:
        what = "patients of one class" if classes else "patients"
        raise ValueError(f"{few_owners} {what} are too few for {folds} folds; give fewer --folds or more cases")
    kind = StratifiedGroupKFold if classes else GroupKFold
    sides = [*kind(folds, shuffle=True, random_state=seed).split(owners, y, owners)]
    if classes and any(len({*y[side]}) < 2 for pair in sides for side in pair):
        raise ValueError(f"a class has too few patients for {folds} folds; give fewer --folds or another --seed")
    return sides


def _draw_labels(
    sides: Sequence[tuple[np.ndarray, np.ndarray]], y: np.ndarray, labels: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keep some cases of each training side, of two classes in their shares."""
    from sklearn.model_selection import train_test_split

    fewest = min(len(train) for train, _ in sides)
    if not 10 <= labels < fewest:
        raise ValueError(f"labels must be from 10 to {fewest - 1}, fewer than a training side has, got {labels}")
    kinds = y if len(np.unique(y)) == 2 else np.zeros(len(y))
    return [
        (train_test_split(train, train_size=labels, stratify=kinds[train], random_state=seed)[0], test)
        for train, test in sides
    ]


def _predict(
    x: np.ndarray,
    y: np.ndarray,
    owners: np.ndarray,
    sides: Sequence[tuple[np.ndarray, np.ndarray]],
    method: str,
    seed: int,
    classes: bool,
    bar: Bar,
) -> np.ndarray:
    """Predict each case by a model of the other folds, which the bar counts."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    predicted = np.zeros(len(y))
    for train, test in sides:
        inner = _divide(y[train], owners[train], min(INNER, len(sides) - 1) if len(sides) > 2 else 2, seed, classes)
        if method == "nearest":
            most = min(len(part) for part, _ in inner)
            model = KNeighborsClassifier(weights="distance") if classes else KNeighborsRegressor(weights="distance")
            grid: dict[str, Any] = {"model__n_neighbors": [n for n in NEIGHBOURS if n <= most]}
        else:
            model = LogisticRegression(max_iter=5000) if classes else Ridge()
            grid = {"model__C": STRENGTHS} if classes else {"model__alpha": 1 / STRENGTHS}
        scoring = "roc_auc" if classes else "neg_mean_squared_error"
        search = GridSearchCV(
            Pipeline([("scale", StandardScaler()), ("model", model)]), grid, scoring=scoring, cv=inner
        )
        search.fit(x[train], y[train])
        predicted[test] = search.predict_proba(x[test])[:, 1] if classes else search.predict(x[test])
        bar.step()
    return predicted


def _draw(owners: np.ndarray, seed: int) -> np.ndarray:
    """Give how often each case counts: once in the first row, and by drawn patients in the others."""
    names, owner = np.unique(owners, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    return np.concatenate([np.ones((1, len(owners)), int), draws[:, owner]])


def _score(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: bool) -> np.ndarray:
    """Score the predictions for each row of weights: AUC, or R2."""
    if classes:
        return weighted_auc(y, predicted, weights)
    middle = (weights @ y / weights.sum(1))[:, None]
    spread = (weights * (y - middle) ** 2).sum(1)
    return 1 - weights @ (y - predicted) ** 2 / np.where(spread > 0, spread, np.nan)


def _interval(scores: np.ndarray) -> dict[str, float]:
    """Give the score, which is the first, and the interval of those of the draws."""
    low, high = np.nanpercentile(scores[1:], [2.5, 97.5])
    return {"score": round(float(scores[0]), 4), "low": round(float(low), 4), "high": round(float(high), 4)}
