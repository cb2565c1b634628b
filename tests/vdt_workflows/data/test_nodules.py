"""Finding nodules in both layouts, dividing their patients, and what wrong tables and splits get."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections import Counter

import numpy as np
import pytest

from tests.makers.nodules import (
    PUBLISHED_HEADING,
    make_list,
    nodule_id,
    own_row,
    write_nodules,
    write_published,
    write_published_split,
    write_table,
)
from vdt_workflows.data.nodule_tables import COLUMNS, PUBLISHED_TABLE
from vdt_workflows.data.nodules import PARTS, SaveSplit, divide_patients, find_nodules


@pytest.fixture
def folder(tmp_path):
    """A prepared folder of 40 patients, the volumes' files empty."""
    write_nodules(tmp_path / "data", empty=True, patients=40)
    return tmp_path / "data"


@pytest.fixture
def published(tmp_path):
    """The same nodules in the published layout."""
    write_published(tmp_path / "published", empty=True, patients=40)
    return tmp_path / "published"


def patients_of(part):
    return {nodule["patient_id"] for nodule in part}


def ids(parts):
    return {name: [nodule["nodule_id"] for nodule in part] for name, part in parts.items()}


def everything(parts):
    return [nodule for part in parts.values() for nodule in part]


def read_table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


PUBLISHED = [f"lidc{n['patient']}_{n['number']}" for n in make_list(patients=40)]


# What is found -----------------------------------------------------------------------------------------------------


def test_a_prepared_folder_gives_its_nodules_with_paths_and_classes(folder):
    parts = find_nodules(folder)
    assert list(parts) == list(PARTS)
    expected = {nodule_id(n): n["malignant"] for n in make_list(patients=40) if n["malignant"] is not None}
    assert {n["nodule_id"]: bool(n["label"]) for n in everything(parts)} == expected
    first = parts["training"][0]
    assert first["image"] == str(folder / "images" / f"{first['nodule_id']}.nii.gz")
    assert sorted(first) == ["diameter_mm", "image", "label", "malignancy_mode", "nodule_id", "patient_id"]


def test_the_published_layout_gives_the_same_classes_and_the_same_division(folder, published):
    own, other = find_nodules(folder), find_nodules(published)
    for name in PARTS:
        first, second = ([(n["patient_id"], n["label"]) for n in parts[name]] for parts in (own, other))
        assert first == second
    assert other["test"][0]["image"] == str(published / f"{other['test'][0]['nodule_id']}.npz")


@pytest.mark.parametrize("place", [".", "info", "elsewhere"])
def test_the_published_table_is_found_in_three_places(published, place):
    target = published / place / PUBLISHED_TABLE
    target.parent.mkdir(exist_ok=True)
    (published / "info" / PUBLISHED_TABLE).rename(target)
    parts = find_nodules(published, table=target if place == "elsewhere" else None)
    assert everything(parts)


def test_published_nodules_without_annotation_are_left_out(published):
    table = published / "info" / PUBLISHED_TABLE
    rows = read_table(table)
    rows[3]["remark"] = "no annotation"
    write_table(table, rows, PUBLISHED_HEADING)
    (published / f"{rows[3]['index']}.npz").unlink()
    found = everything(find_nodules(published, task="segmentation"))
    assert {n["nodule_id"] for n in found} == {row["index"] for row in rows} - {rows[3]["index"]}


def test_segmentation_uses_every_nodule_and_gives_masks(folder, published):
    for root, suffix in ((folder, ".nii.gz"), (published, ".npz")):
        found = everything(find_nodules(root, task="segmentation"))
        assert len(found) == len(make_list(patients=40))
        assert all(n["label"].endswith(suffix) for n in found)
    assert found[0]["label"] == found[0]["image"]


@pytest.mark.parametrize(
    ("votes", "rule", "label"),
    [
        ([1], "mode", 0),
        ([2, 2, 5], "mode", 0),
        ([4, 4, 1], "mode", 1),
        ([5], "mode", 1),
        ([3, 3, 5], "mode", None),
        ([2, 2, 5], "mean", 1),  # 3.0
        ([2, 2, 4], "mean", 0),
        ([3, 3], "mean", 1),
    ],
)
def test_label_rules_name_the_class_of_a_nodule(tmp_path, votes, rule, label):
    nodules = make_list(patients=30)
    nodules.append({"patient": 99, "number": 1, "malignant": None, "votes": votes})
    write_nodules(tmp_path, nodules, empty=True)
    found = {n["nodule_id"]: n["label"] for n in everything(find_nodules(tmp_path, label_rule=rule))}
    assert found.get("LIDC-IDRI-0099_1_01") == label


# By patient --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"folds": 5, "fold": 3}, {"val_fraction": 0.0}, {"label_rule": "mean"}])
@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_on_two_sides(folder, options, seed):
    parts = find_nodules(folder, seed=seed, **options)
    patients = [patients_of(part) for part in parts.values()]
    assert sum(map(len, patients)) == len(set.union(*patients))
    assert bool(parts["validation"]) == (options.get("val_fraction") != 0.0)


def test_parts_have_their_shares_of_both_classes():
    nodules = [n | {"patient_id": str(n["patient"]), "malignancy_mode": n["votes"][0]} for n in make_list(300, 8)]
    for seed in range(5):
        sides = divide_patients(nodules, val_fraction=0.1, test_fraction=0.25, seed=seed)
        for stratum in (-1, 0, 1):
            counted = Counter(sides[n["patient_id"]] for n in nodules if np.sign(n["malignancy_mode"] - 3) == stratum)
            for name, share in (("training", 0.65), ("validation", 0.1), ("test", 0.25)):
                assert counted[name] / counted.total() == pytest.approx(share, abs=0.01), (seed, stratum, name)


def test_every_nodule_is_tested_in_one_fold(folder):
    folds = [find_nodules(folder, folds=4, fold=i) for i in range(4)]
    tested = [n["nodule_id"] for parts in folds for n in parts["test"]]
    assert sorted(tested) == sorted(n["nodule_id"] for n in everything(find_nodules(folder)))
    sizes = [len(parts["test"]) for parts in folds]
    assert max(sizes) - min(sizes) <= 3
    assert all(len(parts["validation"]) < len(parts["training"]) / 3 for parts in folds)


def test_the_division_depends_on_the_seed_alone(folder):
    before = ids(find_nodules(folder, seed=1))
    write_table(folder / "nodules.csv", read_table(folder / "nodules.csv")[::-1])
    after = ids(find_nodules(folder, seed=1))
    assert {name: set(part) for name, part in before.items()} == {name: set(part) for name, part in after.items()}
    assert before != ids(find_nodules(folder, seed=2))


def test_tasks_and_rules_put_a_patient_on_the_same_side(folder):
    sides = {n["patient_id"]: name for name, part in find_nodules(folder, task="segmentation").items() for n in part}
    for rule in ("mode", "mean"):
        for name, part in find_nodules(folder, label_rule=rule).items():
            assert {sides[patient] for patient in patients_of(part)} == {name}


def test_all_puts_every_nodule_into_test(folder):
    parts = find_nodules(folder, split="all")
    assert (len(parts["training"]), len(parts["validation"])) == (0, 0)
    assert len(parts["test"]) == len(everything(find_nodules(folder)))


# By a list ---------------------------------------------------------------------------------------------------------


def test_the_split_of_a_run_comes_back_from_its_file(folder, tmp_path):
    parts = find_nodules(folder, seed=5)
    SaveSplit(str(tmp_path / "split.json"), parts, {"seed": 5})(None)
    assert find_nodules(folder, split=tmp_path / "split.json") == parts
    content = json.loads((tmp_path / "split.json").read_text())
    assert content["seed"] == 5
    assert content["counts"]["test"].startswith(f"test {len(parts['test'])} nodules (")


def test_a_split_with_a_patient_on_two_sides_is_refused_by_name(folder, tmp_path):
    parts = ids(find_nodules(folder))
    patient = next(p for p, times in Counter(n[:14] for n in parts["training"]).items() if times > 1)
    moved = next(n for n in parts["training"] if n.startswith(patient))
    parts["training"].remove(moved)
    parts["test"].append(moved)
    (tmp_path / "split.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match=rf"1 patients are in both training and test: {patient};"):
        find_nodules(folder, split=tmp_path / "split.json")


def test_a_published_split_is_read_with_a_warning_of_its_leaks_and_repeats(published, tmp_path, caplog):
    train, test = PUBLISHED[:-20], PUBLISHED[-20:]
    test[0], train[-1] = train[-1], test[0]
    repeated = [*test, test[3], test[3], test[5]]
    csv_path = write_published_split(tmp_path / "s.csv", [f"{n}.npz" for n in train], [f"{n}.npz" for n in repeated])
    with caplog.at_level(logging.WARNING):
        parts = find_nodules(published, split=csv_path, task="segmentation")
    assert [n["nodule_id"] for n in parts["test"]] == test
    assert sorted(n["nodule_id"] for part in PARTS[:2] for n in parts[part]) == sorted(train)
    assert not patients_of(parts["training"]) & patients_of(parts["validation"])
    shared = {n.split("_")[0] for n in train} & {n.split("_")[0] for n in test}
    leaking = sum(n.split("_")[0] in shared for n in test)
    assert f"{len(shared)} patients are on both sides, and {leaking} of the 20 test nodules" in caplog.text
    counted = f"each nodule counts once: {test[3]} (3 times), {test[5]}"
    assert f"3 of the 23 test entries repeat others, {counted}" in caplog.text


def test_the_published_split_trains_on_all_of_train_without_validation(published, tmp_path):
    csv_path = write_published_split(tmp_path / "s.csv", PUBLISHED[:-20], PUBLISHED[-20:])
    parts = find_nodules(published, split=csv_path, task="segmentation", val_fraction=0.0)
    assert ids(parts) == {"training": PUBLISHED[:-20], "validation": [], "test": PUBLISHED[-20:]}


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "detection"}, "task must be 'classification' or 'segmentation', got 'detection'"),
        ({"label_rule": "median"}, "label_rule must be 'mode' or 'mean', got 'median'"),
        ({"split": "nodule"}, "split must be 'patient', 'all', or the path"),
        ({"split": "nothing.csv"}, "split nothing.csv: no such file"),
        ({"split": "nothing.json"}, "nothing.json: no such file"),
        ({"val_fraction": 1.0}, "val_fraction must be from 0 to below 1, got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"folds": 1}, "folds must be 0 or at least 2"),
        ({"folds": 5, "fold": 5}, "got folds=5 and fold=5"),
        ({"folds": 41}, "40 patients are too few: none is left for fold"),
        ({"folds": 5, "split": "all"}, "folds=5 needs split 'patient', got split 'all'"),
        ({"table": "other.csv"}, "table other.csv: .*nodules.csv already says"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(folder, options, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        find_nodules(folder, **options)
    assert "\n" not in str(caught.value)


def change(**values):
    return lambda rows: [rows[0] | values, *rows[1:]]


@pytest.mark.parametrize(
    ("spoil", "columns", "sentence"),
    [
        (lambda rows: [*rows, rows[2]], COLUMNS, r"LIDC-IDRI-000\d_1_0\d listed more than once; expected one row"),
        (lambda rows: [], COLUMNS, "lists no nodules"),
        (change(malignancy_mode="6"), COLUMNS, "line 2: malignancy_mode is '6'; expected a whole number from 1 to 5"),
        (change(malignancy_mode="2.5"), COLUMNS, "line 2: malignancy_mode is '2.5'; expected a whole number"),
        (change(malignancy_mean="high"), COLUMNS, "line 2: malignancy_mean is 'high'; expected a number from 1 to 5"),
        (change(diameter_mm="-1"), COLUMNS, "line 2: diameter_mm is '-1'; expected a number from 0 to 1000"),
        (change(diameter_mm="inf"), COLUMNS, "line 2: diameter_mm is 'inf'; expected a number from 0 to 1000"),
        (change(diameter_mm="1_0"), COLUMNS, "line 2: diameter_mm is '1_0'; expected a number from 0 to 1000"),
        (change(diameter_mm=" "), COLUMNS, "line 2: diameter_mm is ''; expected a number from 0 to 1000"),
        (change(patient_id=""), COLUMNS, "line 2: patient_id is empty"),
        (change(image="images/gone.nii.gz"), COLUMNS, r"1 of the files it lists are missing: .*gone\.nii\.gz"),
        (change(), COLUMNS[1:], "wrong columns, missing 'nodule_id'"),
        (change(), (*COLUMNS, "remark"), "wrong columns, unknown 'remark'"),
        (change(), (*COLUMNS[1:], "nodule"), "unknown 'nodule'; is 'nodule' meant to be 'nodule_id'"),
        (change(), (*COLUMNS, "readers"), "wrong columns, repeated 'readers'"),
    ],
)
def test_a_spoilt_table_is_named_in_one_sentence(folder, spoil, columns, sentence):
    rows = read_table(folder / "nodules.csv")
    write_table(folder / "nodules.csv", [{"remark": "", "nodule": "", **row} for row in spoil(rows)], columns)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        find_nodules(folder)
    assert "nodules.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no nodules\.csv in it, and no lidc_nodule_info_new"):
        find_nodules(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"dataset_dir .*: no such folder"):
        find_nodules(tmp_path / "absent")


def test_a_part_without_one_class_is_refused(tmp_path):
    nodules = [{"patient": i, "number": 1, "malignant": False, "votes": [1]} for i in range(20)]
    nodules.append({"patient": 20, "number": 1, "malignant": True, "votes": [5]})
    write_nodules(tmp_path, nodules, empty=True)
    with pytest.raises(ValueError, match="none of its 3 nodules with a label is malignant, and both classes are"):
        find_nodules(tmp_path)
    assert len(find_nodules(tmp_path, task="segmentation")["test"]) == 3


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.json", '{"training": ["a"], "validation": [], "test": []}', "lists 1 nodules that .* not have: a; its"),
        ("s.json", '{"training": ["a"], "validation": ["a"], "test": []}', "a listed more than once"),
        ("s.json", "[]", r"not the split\.json of a run"),
        ("s.csv", ",training,test\n0,a,b\n", "its columns are .*; expected an unnamed index, train and test"),
    ],
)
def test_a_wrong_split_is_refused(folder, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        find_nodules(folder, split=tmp_path / name)


def test_a_published_split_with_a_nodule_on_both_sides_is_refused(published, tmp_path):
    csv_path = write_published_split(tmp_path / "s.csv", PUBLISHED, PUBLISHED[:1])
    with pytest.raises(ValueError, match="lidc0_1 listed in both train and test"):
        find_nodules(published, split=csv_path, task="segmentation")


def test_own_row_and_the_tables_columns_agree():
    assert tuple(own_row(make_list(1)[0])) == COLUMNS


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_in_monai_label_nodules_that_are_not_there_are_left_to_the_server(tmp_path, monkeypatch, task):
    with pytest.raises(FileNotFoundError):
        find_nodules(tmp_path / "none", task=task)
    monkeypatch.setitem(sys.modules, "monailabel", object())
    nodules = find_nodules(tmp_path / "none", task=task)
    assert nodules == {"training": [], "validation": [], "test": []}
    SaveSplit(str(tmp_path / "split.json"), nodules)(None)
    assert not (tmp_path / "split.json").exists()
