"""The statistics and the page of comparisons whose scores are known."""

import html
import itertools
import json
import re
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest

from tests.makers.comparison import finish, plan
from vdt_workflows.drawing import colour
from vdt_workflows.report.charts import draw_curves, draw_example, draw_labels_needed, to_svg

NAME = r"<b>better</b> $\alpha$"  # of a row; neither markup nor mathematics


class Page(HTMLParser):
    """Check that tags close in order, and collect what refers to elsewhere."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline", "polygon")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]
        assert tag != "img" or dict(attrs).get("alt")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(volumes, tmp_path_factory):
    """Scratch and two twins of it with known scores, of which one lacks a cell and one failed one."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"name": name, "init": "scratch"} for name in ("scratch", NAME, "worse")]
    plan(volumes, folder, rows, seeds=3)
    root = folder / "out"
    for seed, (share, base), (row, more) in itertools.product(
        range(3), (("0.5", 0.2), ("1", 0.5)), (("scratch", 0), ("b-better-b-alpha", 0.2))
    ):
        mean = base + 0.1 + 0.05 * seed + more
        scores = {"a": mean - 0.05, "b": mean + 0.05}
        finish(root / "cells" / row / f"share{share}-seed{seed}", scores, [(2, mean / 2), (4, mean)])
    example = root / "cells" / "b-better-b-alpha" / "share1-seed0" / "example"
    example.mkdir()
    nib.save(nib.Nifti1Image(np.ones((20, 22, 15), np.uint8), np.eye(4)), example / "case_seg.nii.gz")
    failed = root / "cells" / "worse" / "share1-seed0"
    failed.mkdir(parents=True)
    (failed / "error.txt").write_text("ValueError: weights <x> & do not fit")
    outcome = plan(volumes, folder, rows, seeds=3)
    return root, outcome, json.loads((root / "results.json").read_text())


def test_the_summary_holds_means_spreads_and_paired_differences(report):
    _, outcome, results = report
    assert outcome | {"report": ""} == {"report": "", "cells": 18, "finished": 12, "failed": 1, "not run": 5}
    found = {(s["row"], s["share"]): s for s in results["summary"]}
    # scratch with half: means .3, .35 and .4 of its three seeds
    assert found["scratch", 0.5]["mean"] == pytest.approx(0.35)
    assert found["scratch", 0.5]["sd"] == pytest.approx(0.05)
    assert found["scratch", 0.5]["difference"] is None
    better = found[NAME, 0.5]
    for name in ("mean", "low", "high"):
        assert better["difference"][name] == pytest.approx(0.2)
    assert better["difference"]["by_seed"] == pytest.approx([0.2, 0.2, 0.2])
    assert better["parameters"] == 1_500_000
    assert found["worse", 1.0]["mean"] is None


def test_steps_and_labels_are_read_off_straight_lines(report):
    found = {(s["row"], s["share"]): s for s in report[2]["summary"]}
    # scratch goes from half of its final score at step 2 to all at step 4: 90 % at 3.6
    assert found["scratch", 1.0]["steps_to_90"] == pytest.approx(3.6)
    # better with all: .425 at step 2, .85 at step 4; 90 % of .65 is .585
    assert found[NAME, 1.0]["steps_to_90"] == pytest.approx(2 + 2 * (0.585 - 0.425) / 0.425)
    labels = {e["row"]: e for e in report[2]["efficiency"]}
    assert labels["scratch"]["labels"] == 4
    # better: .55 with 2 cases, .85 with 4; .65 is a third of the way
    assert labels[NAME]["labels"] == pytest.approx(2 + 2 / 3)
    assert labels["worse"]["labels"] is None
    assert [labels[row]["stays"] for row in ("scratch", NAME, "worse")] == [True, True, False]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(report):
    root, _, _ = report
    text = (root / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 3  # image, label, the one prediction
    assert re.findall(r'<i style="background: #\w+"></i>([^<]*)', text) == ["label 1", "label 2"]
    assert text.count(html.escape(NAME, quote=False)) == 11  # in text, tables, charts and the picture
    assert NAME not in text
    assert "weights &lt;x&gt; &amp; do not fit" in text
    assert "with 2 labelled cases +0.200 (+0.200 to +0.200), better; with 4 labelled cases +0.200" in text
    assert "12 of 18 cells finished" in text
    assert "not reached" in text
    sections = ("Scores", "Labels needed", "Scores while training", "One held-out case", "Missing cells", "Provenance")
    assert all(f"<h2>{section}</h2>" in text for section in sections)


def test_the_held_out_case_is_drawn_with_the_patients_right_on_the_left(report):
    text, pictures = draw_example(report[2])
    assert [name for name, _ in pictures] == ["image", "label", NAME]
    assert re.fullmatch(r"case\d\.nii\.gz, the planes with most labelled voxels; seed 0, 100\s% of the labels", text)
    label = dict(pictures)["label"]
    axial = label[:, : label.shape[1] // 3].astype(int)
    first, second = (np.argwhere(np.abs(axial - colour(value)).sum(-1) == 0).mean(0) for value in (1, 2))
    assert first[0] > second[0] + 20  # the first ball lies behind the second, and the back is at the bottom
    assert first[1] < second[1] - 20  # and to its right


def test_one_seed_is_not_judged_and_a_score_that_falls_again_is_said(volumes, tmp_path):
    rows = [{"name": name, "init": "scratch"} for name in ("scratch", "falling")]
    for row, share, score in (("scratch", 0.5, 0.3), ("scratch", 1, 0.5), ("falling", 0.5, 0.6), ("falling", 1, 0.4)):
        folder = tmp_path / "out" / "cells" / row / f"share{share}-seed0"
        finish(folder, {"a": score, "b": score + 0.1}, [(4, 0.5)])
    plan(volumes, tmp_path, rows, seeds=1)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "with 2 labelled cases +0.300 (+0.300 to +0.300), not judged on 1 seed;" in text
    assert 'class="clear"' not in text
    assert "at most 2 (50\N{NO-BREAK SPACE}%); below it again with more" in text


def test_a_chart_has_a_line_for_each_row_and_the_goal_of_the_reference(report):
    *lines, goal = draw_labels_needed(report[2], "recommended").axes[0].get_lines()[: 3 + 1]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.35, 0.65])
    np.testing.assert_allclose(lines[1].get_ydata(), [0.55, 0.85])
    assert len(lines[2].get_ydata()) == 0
    np.testing.assert_allclose(goal.get_ydata(), 0.65)


def test_the_charts_of_all_shares_have_one_scale(report):
    few, every = draw_curves(report[2], "recommended").axes
    assert few.get_ylim() == every.get_ylim()
    np.testing.assert_allclose(few.get_lines()[0].get_xydata(), [(2, 0.175), (4, 0.35)])
    np.testing.assert_allclose(every.get_lines()[1].get_xydata(), [(2, 0.425), (4, 0.85)])


def test_the_same_numbers_give_the_same_chart_whose_names_are_text(report):
    first, second = (to_svg(draw_curves(report[2], "recommended")) for _ in range(2))
    assert first == second
    Page(first)
    for text in (NAME, "steps", "mean Dice"):
        assert f">{html.escape(text, quote=False)}<" in first
