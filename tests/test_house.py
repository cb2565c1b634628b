"""The order of the house: who imports whom, how large a room may be, and what each needs."""

from __future__ import annotations

from pathlib import Path

import count


def test_the_budget_is_counted_from_the_files_that_git_tracks(capsys):
    count.print_budget()
    printed = capsys.readouterr().out
    lines = count.count_lines()
    assert lines["tests/test_house.py"] == len(Path(__file__).read_text().splitlines())
    rooms = count.sum_rooms(lines)
    assert {"networks", "vdt_transforms", "vdt_workflows/data", "scripts", "tests"} <= rooms.keys()
    assert sum(rooms.values()) == sum(number for path, number in lines.items() if path.endswith(".py"))
    assert f"of {count.BUDGETS['tests']:>6,}  tests" in printed
