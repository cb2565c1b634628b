"""The split, the scores and the table of the race of equal computing time."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from benchmarks import race as module
from benchmarks.race import COLUMNS, OURS, race, score_files, split_cases, summarise
from benchmarks.race_monai import choose_strides
from monai.bundle import ConfigParser

from vdt_workflows.files import write_csv
from vdt_workflows.locator import find_bundles

NAMES = ["background", "a", "b"]


def write(folder, name, values, spacing=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8), np.diag([spacing, 1, 1, 1])), folder / f"{name}.nii.gz")


def bar(*ends):
    """A row of voxels, of which label 1 has the first ones and label 2 those from the sixth on."""
    values = np.zeros((10, 2, 2))
    values[: ends[0]] = 1
    values[5 : 5 + ends[1]] = 2
    return values


def test_scores_are_of_each_label_that_a_case_has(tmp_path):
    write(tmp_path / "true", "one", bar(4, 2))
    write(tmp_path / "true", "two", bar(4, 0))
    write(tmp_path / "found", "one", bar(2, 4))
    write(tmp_path / "found", "two", bar(0, 3))
    assert score_files(tmp_path / "found", tmp_path / "true", NAMES) == [
        {"case": "one", "label": "a", "dice": 0.66667, "volume_ratio": 0.5},
        {"case": "one", "label": "b", "dice": 0.66667, "volume_ratio": 2.0},
        {"case": "two", "label": "a", "dice": 0.0, "volume_ratio": 0.0},
    ]


def test_a_file_on_another_grid_is_refused(tmp_path):
    write(tmp_path / "true", "one", bar(4, 2))
    write(tmp_path / "found", "one", bar(4, 2), spacing=2)
    with pytest.raises(ValueError, match=r"found/one\.nii\.gz: its grid is not that of"):
        score_files(tmp_path / "found", tmp_path / "true", NAMES)


def test_the_split_is_drawn_once_and_its_parts_share_no_case(tmp_path):
    for kind in ("images", "labels"):
        for number in range(9):
            write(tmp_path / "data" / kind, f"c{number}", bar(1, 1))
    parts = split_cases(tmp_path / "data", tmp_path / "out", 2, 3)
    cases = {part: sorted(path.name for path in (folder / "images").iterdir()) for part, folder in parts.items()}
    assert {part: len(names) for part, names in cases.items()} == {"test": 3, "validation": 2, "training": 2}
    assert len({name for names in cases.values() for name in names}) == 7
    split_cases(tmp_path / "data", tmp_path / "out", 2, 3)
    assert sorted(path.name for path in (parts["test"] / "labels").iterdir()) == cases["test"]
    with pytest.raises(ValueError, match="has 9 cases, 10 are needed"):
        split_cases(tmp_path / "data", tmp_path / "out", 2, 6)


def test_what_is_chosen_by_scores_is_scored_on_validation_cases_in_a_folder_of_its_own(tmp_path, monkeypatch):
    for kind in ("images", "labels"):
        for number in range(7):
            write(tmp_path / "data" / kind, f"c{number}", bar(1, 1))

    def copy(parts, folder, settings, minutes, seed, names):
        for path in (parts["scored"] / "labels").iterdir():
            (folder / "labels").mkdir(parents=True, exist_ok=True)
            (folder / "labels" / path.name).write_bytes(path.read_bytes())
        return {"steps": 1, "cpu_seconds": 1}

    monkeypatch.setattr(module, "run_ours", copy)
    given = {"label_names": NAMES, "seeds": [0], "contestants": ["vdt"], "training": 2, "test": 3}
    for part, cases in (("test", 3), ("validation", 2)):
        assert race(str(tmp_path / "data"), str(tmp_path / part), scored=part, **given)["6 min, vdt"]["dice"] == 1
        scored = {line.split(",")[3] for line in (tmp_path / part / "race.csv").read_text().splitlines()[1:]}
        assert scored == {p.name.split(".")[0] for p in (tmp_path / part / part / "labels").iterdir()}
        assert len(scored) == cases
    with pytest.raises(ValueError, match="has runs that were scored on validation cases; name another output_dir"):
        race(str(tmp_path / "data"), str(tmp_path / "validation"), **given)
    (tmp_path / "validation" / "scored.json").unlink()
    with pytest.raises(ValueError, match="has runs that were scored on unknown cases; name another output_dir"):
        race(str(tmp_path / "data"), str(tmp_path / "validation"), scored="validation", **given)
    with pytest.raises(ValueError, match="the rate of monai is chosen on the validation cases"):
        race(str(tmp_path / "data"), str(tmp_path / "new"), scored="validation", **{**given, "contestants": ["monai"]})


def test_differences_are_paired_over_cases_and_common_seeds(tmp_path):
    for who, seeds, more in (("vdt", (0, 1), 0.1), ("monai", (0,), 0.0)):
        for seed in seeds:
            known = {"minutes": 6, "contestant": who, "seed": seed, "volume_ratio": 1.0}
            cases = [{"case": f"c{i}", "label": label, "dice": 0.2 * i + more} for i in range(4) for label in "ab"]
            folder = tmp_path / f"6_{who}_{seed}"
            folder.mkdir()
            write_csv(folder / "scores.csv", [{**known, **case} for case in cases], COLUMNS)
    found = summarise(tmp_path)
    assert found["6 min, vdt"] == {"dice": 0.4, "seeds": [0.4, 0.4], "volumes": 1.0}
    assert found["6 min, vdt - monai"] == {"mean": 0.1, "low": 0.1, "high": 0.1, "seeds": 1}
    assert len((tmp_path / "race.csv").read_text().splitlines()) == 1 + 3 * 8


def test_monais_network_strides_across_thick_slices_last():
    assert choose_strides([1, 1, 1], [32, 48, 32]) == [(2, 2, 2)] * 4
    assert choose_strides([1.5, 1.5, 10], [96, 112, 10]) == [(2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1)]


def test_each_ingredient_that_is_left_out_is_the_one_of_its_name():
    parser = ConfigParser(
        ConfigParser.load_config_file(find_bundles() / "bcv_multiorgan_segmentation/configs/train.yaml")
    )
    steps = parser["train::random_transforms"]
    changed = {who: [int(id.split("::")[2]) for id in known if "::" in id] for who, known in OURS.items()}
    assert {who: {steps[i]["_target_"] for i in places} for who, places in changed.items() if places} == {
        "no_intensities": {step["_target_"] for step in steps if step["keys"] == "image"},
    }
    assert all(name in parser for known in OURS.values() for name in known)
