"""What weights were trained on is not scored as held out."""

from __future__ import annotations

import json
import shutil

import pytest

from vdt_workflows.data.fingerprint import describe_data
from vdt_workflows.training.held_out import take_cases


@pytest.fixture
def run(tmp_path):
    """Five files, and a run that was trained on the first two."""
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"case{number}.nii.gz" for number in range(5)]
    for number, file in enumerate(files):
        file.write_text(f"content {number}")
    (tmp_path / "models").mkdir()
    trained = [{"image": str(file)} for file in files[:2]]
    record = {"_run_": {"training": [str(file) for file in files[:2]]}}
    (tmp_path / "models" / "run.json").write_text(json.dumps(record))
    (tmp_path / "models" / ".vdt_run.json").write_text(json.dumps({"data": {"training": describe_data(trained)}}))
    return files, tmp_path / "models" / "model.pt"


def split(files, training, test):
    lists = {"training": training, "validation": [], "test": test}
    return {part: [{"image": str(files[number])} for number in numbers] for part, numbers in lists.items()}


def test_cases_that_were_trained_on_are_refused_but_as_training_cases(run):
    files, weights = run
    assert take_cases(split(files, [0, 1], [2, 3]), "test", weights) == [{"image": str(f)} for f in files[2:4]]
    with pytest.raises(ValueError, match=r"case1\.nii\.gz: test cases here, and .*model\.pt was trained on them"):
        take_cases(split(files, [0, 2], [1, 3]), "test", weights)
    assert len(take_cases(split(files, [0, 1], [2]), "training", weights)) == 2


def test_a_copy_elsewhere_is_the_same_case_and_another_of_its_name_is_not(run, tmp_path):
    files, weights = run
    for number, file in enumerate(files):
        copy = tmp_path / "elsewhere" / file.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy) if number else copy.write_text("of another hospital")
    copies = [tmp_path / "elsewhere" / file.name for file in files]
    assert take_cases(split(copies, [2], [0]), "test", weights) == [{"image": str(copies[0])}]
    with pytest.raises(ValueError, match="case1"):
        take_cases(split(copies, [2], [0, 1]), "test", weights)


def test_without_recorded_contents_the_path_tells_and_a_name_is_mentioned(run, tmp_path, caplog):
    files, weights = run
    (weights.parent / ".vdt_run.json").unlink()
    with pytest.raises(ValueError, match="case0"):
        take_cases(split(files, [2], [0]), "test", weights)
    assert not caplog.records
    other = tmp_path / "other" / "case0.nii.gz"
    assert len(take_cases({"training": [], "test": [{"image": str(other)}]}, "test", weights)) == 1
    assert "case0.nii.gz: " in caplog.text
    assert "was trained on cases of such names; they count as others" in caplog.text


def test_what_the_data_set_lists_twice_itself_and_weights_without_a_record_are_taken(run):
    files, weights = run
    assert len(take_cases(split(files, [0], [0]), "test", weights)) == 1  # find_volumes asks for the reason
    for name in ("run.json", ".vdt_run.json"):
        (weights.parent / name).unlink()
    assert len(take_cases(split(files, [2], [0, 1]), "test", weights)) == 2


def test_a_part_that_there_is_none_of_is_refused(run):
    files, weights = run
    with pytest.raises(ValueError, match="part must be training, validation, test, got 'tests'"):
        take_cases(split(files, [0], [1]), "tests", weights)
