"""Which cases of a comparison are learned from, and which are held out."""

import json

import pytest

from tests.makers.comparison import plan
from vdt_workflows.report.held_out import count_cases


def test_a_fraction_without_a_case_is_refused():
    assert [count_cases(share, 20) for share in (0.03, 0.1, 0.12, 1.0)] == [1, 2, 2, 20]
    with pytest.raises(ValueError, match=r"fraction 0\.02 of 20 labelled cases is none; take at least 0\.025"):
        count_cases(0.02, 20)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 5"):
        count_cases(5, 20)


def test_smaller_shares_are_part_of_larger_ones_and_held_out_cases_are_never_learned_from(volumes, tmp_path):
    plan(volumes, tmp_path, fractions=[0.25, 0.5, 1], curve_cases=1)
    lists = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "data").glob("*.json")}
    assert sorted(lists) == [f"share{s}-seed{k}" for s in ("0.25", "0.5", "1") for k in (0, 1)]
    tests = {json.dumps(cases["test"]) for cases in lists.values()}
    assert len(tests) == 1
    for seed in (0, 1):
        names = [[c["image"] for c in lists[f"share{s}-seed{seed}"]["training"]] for s in ("0.25", "0.5", "1")]
        assert [len(n) for n in names] == [1, 2, 4]
        assert names[0] == names[1][:1]
        assert names[1] == names[2][:2]
        assert not set(names[2]) & {case["image"] for case in json.loads(min(tests))}
    assert lists["share1-seed0"]["training"] != lists["share1-seed1"]["training"]
