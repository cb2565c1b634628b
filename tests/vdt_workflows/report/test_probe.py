"""A probe finds a planted signal, nothing in noise, and never learns from a patient whom it scores."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from vdt_workflows.files import write_csv
from vdt_workflows.report.probe import _divide, _draw_labels, probe_features


def write_features(path, signal=0.0, cases=160, patients=80, seed=0, **changes):
    """A table of eight features, the first of which tells the class as `signal` deviations."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(cases) % 2
    values = np.random.default_rng(seed + 1).normal(size=(cases, 8))
    values[:, 0] += signal * kinds
    rows = [
        {"case": f"c{i:03d}", "patient_id": f"p{i // 2 % patients}", "malignant": kinds[i], "rating": 1 + 4 * kinds[i]}
        | {"age": f"{40 + 5 * values[i, 1] + rng.normal():.4f}", "name": ("benign", "malignant")[kinds[i]]}
        | {f"stage1_{j:03d}": f"{v:.6g}" for j, v in enumerate(values[i])}
        for i in range(cases)
    ]
    for name, value in changes.items():
        rows[3][name] = value
    write_csv(path, rows, [*rows[0]])
    return str(path)


def test_a_planted_signal_is_found_and_noise_is_level_with_chance(tmp_path):
    planted = write_features(tmp_path / "planted.csv", signal=2.0)
    noise = write_features(tmp_path / "noise.csv", seed=5)
    found = probe_features(planted, noise, target="malignant", against=noise, folds=3)
    first, second = found["rows"]
    assert (found["metric"], found["cases"], found["patients"]) == ("AUC", 160, 80)
    assert first["score"] == pytest.approx(0.92, abs=0.05)  # of two normal distributions 2 deviations apart
    assert first["low"] < first["score"] < first["high"]
    assert second["score"] == pytest.approx(0.5, abs=0.12)
    assert second["low"] < 0.5 < second["high"]
    assert first["difference"] == pytest.approx(first["score"] - second["score"], abs=1e-3)
    assert first["difference_low"] > 0.2
    assert second["difference"] == second["difference_low"] == second["difference_high"] == 0
    assert len(first["folds"]) == 3


@pytest.mark.parametrize(
    ("options", "metric", "least"),
    [
        ({"target": "age"}, "R2", 0.85),
        ({"target": "rating", "above": 3}, "AUC", 0.85),
        ({"target": "name"}, "AUC", 0.85),
        ({"target": "malignant", "method": "nearest"}, "AUC", 0.75),
        ({"target": "malignant", "columns": "stage1_000, age"}, "AUC", 0.85),
    ],
)
def test_numbers_two_classes_and_words_are_told(tmp_path, options, metric, least):
    found = probe_features(write_features(tmp_path / "f.csv", signal=2.0), folds=2, **options)
    assert found["metric"] == metric
    assert found["rows"][0]["score"] > least


def test_of_few_labels_the_mean_of_several_draws_is_given_and_no_patient_is_learned_from_and_scored(tmp_path):
    path = write_features(tmp_path / "f.csv", signal=2.0)
    full, some = (
        probe_features(path, target="malignant", folds=2, labels=labels, repeats=2)["rows"][0]["score"]
        for labels in (None, 30)
    )
    assert 0.6 < some < full
    owners, y = np.repeat(np.arange(40), 2), np.arange(80) % 2
    for train, test in _draw_labels(_divide(y, owners, 2, 0, True), y, 12, 0):
        assert (len(train), y[train].sum()) == (12, 6)
        assert not {*owners[train]} & {*owners[test]}
    with pytest.raises(ValueError, match="labels must be from 10 to"):
        probe_features(path, target="malignant", labels=160)


def test_r2_of_numbers_is_that_of_the_predictions(tmp_path):
    path = write_features(tmp_path / "f.csv")
    out = tmp_path / "p.csv"
    found = probe_features(path, target="age", predictions=str(out), output=str(tmp_path / "scores.csv"), folds=3)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    y, p = (np.array([float(row[name]) for row in rows]) for name in ("age", "prediction"))
    assert found["rows"][0]["score"] == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-4)
    folds = {row["patient_id"]: {r["fold"] for r in rows if r["patient_id"] == row["patient_id"]} for row in rows}
    assert all(len(numbers) == 1 for numbers in folds.values())
    assert "fold_2" in (tmp_path / "scores.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("classes", [True, False])
def test_no_patient_is_on_both_sides_and_every_case_is_scored_once(classes):
    rng = np.random.default_rng(0)
    owners = np.array([f"p{n}" for n in rng.integers(0, 40, 150)])
    y = (rng.random(150) < 0.3).astype(int)
    sides = _divide(y, owners, 5, 0, classes)
    assert sorted(i for _, test in sides for i in test) == list(range(150))
    assert not any({*owners[train]} & {*owners[test]} for train, test in sides)


def test_the_target_may_stand_in_another_table_and_lack_for_some(tmp_path, caplog):
    path = write_features(tmp_path / "f.csv", signal=2.0)
    rows = [{"case": f"c{i:03d}", "relapse": "" if i == 7 else i % 2} for i in range(159)]
    write_csv(tmp_path / "t.csv", rows, ["case", "relapse"])
    found = probe_features(path, target="relapse", table=str(tmp_path / "t.csv"), folds=2)
    assert found["cases"] == 158
    assert "2 cases without a value of relapse are left out (c007, c159)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"target": "grade"}, "missing 'grade'"),
        ({}, {"target": "rating", "above": 9}, "below 9 in all cases"),
        ({}, {"target": "case"}, "160 values"),
        ({}, {"target": "name", "above": 3}, "above 3 needs numbers"),
        ({}, {"target": "malignant", "columns": "layer*"}, r"has no column layer\*"),
        ({"stage1_004": "nan"}, {"target": "malignant"}, "c003: stage1_004 is 'nan'"),
        ({"case": "c002"}, {"target": "malignant"}, "names a case twice"),
        ({"patient_id": ""}, {"target": "malignant"}, "patient_id of c003 is empty"),
        ({}, {"target": "malignant", "folds": 1}, "two folds"),
        ({}, {"target": "malignant", "method": "forest"}, "method must be"),
        ({}, {"target": "malignant", "against": "less.csv"}, "lacks 120 of the cases"),
        ({}, {"target": "malignant", "columns": "stage*,mal*"}, r"columns 'stage\*,mal\*' match malignant, which tell"),
        ({}, {"target": "malignant", "columns": "*"}, "match case, patient_id, malignant, which tell answer or case"),
        ({}, {"target": "malignant", "labels": 40, "repeats": 0}, "repeats must be 1 or more, got 0"),
        ({}, {"target": "malignant", "output": "f.csv"}, r"output f\.csv: another table of this probe"),
        ({}, {"target": "malignant", "output": "s.csv", "predictions": "./s.csv"}, "another table of this probe"),
        ({}, {"target": "relapse", "table": "twice.csv"}, r"twice\.csv: case names a case twice"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_a_sentence(tmp_path, monkeypatch, changes, options, sentence):
    monkeypatch.chdir(tmp_path)
    write_features(tmp_path / "less.csv", cases=40)
    write_csv(tmp_path / "twice.csv", [{"case": "c001", "relapse": i} for i in (0, 1)], ["case", "relapse"])
    path = write_features(tmp_path / "f.csv", **changes)
    content = (tmp_path / "f.csv").read_bytes()
    with pytest.raises(ValueError, match=sentence):
        probe_features(path, **options)
    assert (tmp_path / "f.csv").read_bytes() == content


def test_numbers_and_patients_are_told_whatever_their_spelling(tmp_path):
    plain = probe_features(write_features(tmp_path / "f.csv", signal=2.0), target="malignant", folds=2)
    other = write_features(tmp_path / "g.csv", signal=2.0, malignant="1.0", patient_id="p1 ")
    found = probe_features(other, target="malignant", folds=2)
    assert found["classes"] == ["0", "1"]
    assert {**found, "rows": None} == {**plain, "rows": None}


def test_fewer_patients_than_folds_are_refused(tmp_path):
    path = write_features(tmp_path / "f.csv", cases=16, patients=4)
    with pytest.raises(ValueError, match="4 patients are too few for 5 folds"):
        probe_features(path, target="age")
    with pytest.raises(ValueError, match="4 patients of one class are too few for 5 folds"):
        probe_features(path, target="malignant")
