"""The comparison of initialisations: its plan, its report, and whole matrices of tiny runs."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from networks import ResNet3D
from tests.support.bundle_runs import ROOT
from vdt_workflows.report.comparison_page import draw_chart
from vdt_workflows.report.matrix import choose_reference, compare, count_cases, merge_settings, read_rows
from vdt_workflows.training.checkpoints import save_weights

TINY = {"base_channels": 4, "patch_size": [16, 16, 16], "spacing": "own", "window": "none", "pairs": []}
TINY |= {"mean": "own", "std": "own", "overlap": 0.25, "learning_rate": 0.1, "stem": "strided"}
# Two rows of this, two shares of the labels and two seeds: eight cells.
MATRIX = {
    "settings": TINY,
    "fractions": [0.5, 1],
    "seeds": 2,
    "steps": 2,
    "points": 2,
    "held_out": 2,
    "pictures": False,
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file that stands for weights where nothing reads them."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pt"
    path.write_bytes(b"weights")
    return path


def finish(folder: Path, scores: dict[str, float], curve: list[tuple[int, float]]) -> None:
    """Write what a finished segmentation cell leaves."""
    for name in ("eval", "scores"):
        (folder / name).mkdir(parents=True)
    lines = ["case,organ,dice", *(f"{case},a,{score}" for case, score in scores.items())]
    (folder / "scores" / "cases.csv").write_text("\n".join(lines) + "\n")
    lines = ["epoch,step,val_mean_dice", *(f"{i},{step},{s}" for i, (step, s) in enumerate(curve, 1))]
    (folder / "eval" / "history.csv").write_text("\n".join(lines) + "\n")
    took = {"training": {"seconds": 3.0, "cpu_seconds": 2.0}, "scoring": {"seconds": 1.0, "cpu_seconds": 1.0}}
    result = {"stages": took, "parameters": 1_500_000, "versions": {"torch": "2"}, "machine": "m", "commit": None}
    (folder / "result.json").write_text(json.dumps({**result, "threads": 1}))


def plan(volumes, tmp_path, rows="scratch", **more):
    """Write the plan and the report alone."""
    options = {"settings": TINY, "fractions": [0.5, 1], "seeds": 2, "steps": 4, "points": 2, "held_out": 2}
    return compare(rows, str(volumes), str(tmp_path / "out"), workers=0, **{**options, **more})


# The plan ----------------------------------------------------------------------------------------------------------


def test_words_and_a_file_give_the_same_rows(tmp_path, encoder, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(encoder.parent))
    file = tmp_path / "rows.yaml"
    file.write_text("- name: scratch\n- {name: vdt, pretrained: '${WEIGHTS}/encoder.pt'}\n")
    words, listed = read_rows(f"scratch,vdt={encoder}"), read_rows(str(file))
    assert words == listed
    assert [(row.name, row.init, row.pretrained) for row in words] == [
        ("scratch", "scratch", None),
        ("vdt", "vdt", str(encoder)),
    ]
    file.write_text(json.dumps({"rows": [{"name": "scratch"}, {"name": "vdt", "pretrained": str(encoder)}]}))
    assert read_rows(str(file)) == words


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        ("scratch,genesys=x.pt", ValueError, r"row 'genesys': init must be one of scratch, vdt, .*got 'genesys'"),
        ("scratch,vdt=none.pt", FileNotFoundError, r"row 'vdt': pretrained .*none\.pt: no such file"),
        ("scratch,scratch", ValueError, "'scratch' names two rows"),
        ("none.yaml", FileNotFoundError, r"rows none\.yaml: no such file"),
        (
            [{"name": "a", "init": "scratch", "pretraind": "x"}],
            ValueError,
            "'pretraind' is unknown; did you mean pretr",
        ),
        ([{"name": "a", "init": "scratch", "configs": "x.yaml"}], FileNotFoundError, r"config .*x\.yaml: no such file"),
        ([{"init": "scratch"}], ValueError, "is no row; expected a mapping with name, init"),
        ("", ValueError, "is no row"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows, error, sentence):
    with pytest.raises(error, match=sentence):
        read_rows(rows)


def test_a_fraction_without_a_case_is_refused():
    assert [count_cases(share, 20) for share in (0.03, 0.1, 0.12, 1.0)] == [1, 2, 2, 20]
    with pytest.raises(ValueError, match=r"fraction 0\.02 of 20 labelled cases is none; take at least 0\.025"):
        count_cases(0.02, 20)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 5"):
        count_cases(5, 20)


def test_the_reference_is_scratch_or_the_first_row():
    rows = read_rows([{"name": "a", "init": "scratch"}, "scratch"])
    assert choose_reference(rows, "") == "scratch"
    assert choose_reference(rows[:1], "") == "a"
    with pytest.raises(ValueError, match="reference must be one of the rows a, scratch, got 'b'"):
        choose_reference(rows, "b")


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
    assert [c["image"] for c in lists["share1-seed0"]["training"]] != [
        c["image"] for c in lists["share1-seed1"]["training"]
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"settings": {**TINY, "learning_rat": 1}}, "--learning_rat.*did you mean --learning_rate"),
        ({"settings": "none.yaml"}, r"settings none\.yaml: no such file"),
        ({"protocols": "papre"}, "protocols of bcv_.* must be among recommended, paper, short, got 'papre'"),
        ({"bundle": "bcv"}, "bundle must be one of bcv_multiorgan_segmentation, .*got 'bcv'"),
        ({"steps": 5}, "steps must be a multiple of points"),
        ({"fractions": 0.05}, r"fraction 0\.05 of 4 labelled cases is none"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(volumes, tmp_path, options, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        plan(volumes, tmp_path, **options)
    assert not list(tmp_path.glob("out/cells/*/*"))


def test_a_folder_of_other_settings_is_refused_but_may_grow(volumes, tmp_path, encoder):
    plan(volumes, tmp_path)
    plan(volumes, tmp_path, f"scratch,vdt={encoder}", fractions=[0.25, 1], seeds=3)
    with pytest.raises(ValueError, match="holds results made with steps 4, not 8"):
        plan(volumes, tmp_path, steps=8)
    encoder.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"vdt holds results made with weights '.*', not '"):
        plan(volumes, tmp_path, f"scratch,vdt={encoder}")


def test_settings_of_a_network_do_not_reach_a_row_that_replaces_it(tmp_path):
    whole, part = tmp_path / "whole.yaml", ROOT / "bundles" / "bcv_multiorgan_segmentation" / "configs" / "genesis.yaml"
    whole.write_text("network_def: {_target_: monai.networks.nets.UNet}\n")
    own = {"network_def::channels": [4]}
    shared = {"network_def#network#stem": "flat", "network_def::restore": False, "seed": 1}
    rows = [{"name": str(i), "init": "scratch", "configs": c} for i, c in enumerate(([str(whole)], [str(part)], []))]
    rows[0]["settings"] = own
    found = [merge_settings(shared, row) for row in read_rows(rows)]
    assert found == [{"seed": 1, **own}, {"network_def::restore": False, "seed": 1}, shared]


def test_a_row_may_bring_another_network_and_settings(volumes, tmp_path):
    peer = tmp_path / "unet.yaml"
    peer.write_text("network_def: {_target_: monai.networks.nets.UNet}\n")
    rows = [{"name": "UNet, MONAI", "init": "scratch", "configs": str(peer), "settings": {"momentum": 0.5}}]
    plan(volumes, tmp_path, rows, seeds=1, fractions=1, protocols="recommended,paper,short")
    folder = tmp_path / "out" / "cells" / "UNet-MONAI"
    assert json.loads((folder / "settings.json").read_text())["settings"] == {"momentum": 0.5}
    with (tmp_path / "out" / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(r["protocol"], r["state"]) for r in found] == [(p, "not run") for p in ("recommended", "paper", "short")]


# The report --------------------------------------------------------------------------------------------------------


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
    rows = [{"name": name, "init": "scratch"} for name in ("scratch", "<better>", "worse")]
    plan(volumes, folder, rows, seeds=3)
    root = folder / "out"
    for seed in (0, 1, 2):
        low, high = {"a": 0.2, "b": 0.4 + 0.1 * seed}, {"a": 0.5, "b": 0.7 + 0.1 * seed}
        for row, share, scores in (
            ("scratch", "0.5", low),
            ("scratch", "1", high),
            ("better", "0.5", {case: value + 0.2 for case, value in low.items()}),
            ("better", "1", {case: value + 0.2 for case, value in high.items()}),
        ):
            mean = float(np.mean(list(scores.values())))
            cell = root / "cells" / row / f"share{share}-seed{seed}"
            finish(cell, scores, [(2, mean / 2), (4, mean)])
    example = root / "cells" / "better" / "share1-seed0" / "example"
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
    better = found["<better>", 0.5]
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
    assert found["<better>", 1.0]["steps_to_90"] == pytest.approx(2 + 2 * (0.585 - 0.425) / 0.425)
    labels = {e["row"]: e for e in report[2]["efficiency"]}
    assert labels["scratch"]["labels"] == 4
    # better: .55 with 2 cases, .85 with 4; .65 is a third of the way
    assert labels["<better>"]["labels"] == pytest.approx(2 + 2 / 3)
    assert labels["worse"]["labels"] is None
    assert [labels[row]["stays"] for row in ("scratch", "<better>", "worse")] == [True, True, False]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(report):
    root, _, _ = report
    text = (root / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 3  # image, label, the one prediction
    assert re.findall(r'<i style="background: #\w+"></i>([^<]*)', text) == ["label 1", "label 2"]
    assert "&lt;better&gt;" in text
    assert "<better>" not in text
    assert "weights &lt;x&gt; &amp; do not fit" in text
    assert "with 2 labelled cases +0.200 (+0.200 to +0.200), better; with 4 labelled cases +0.200" in text
    assert "12 of 18 cells finished" in text
    assert "not reached" in text
    for section in (
        "Scores",
        "Labels needed",
        "Scores while training",
        "One held-out case",
        "Missing cells",
        "Provenance",
    ):
        assert f"<h2>{section}</h2>" in text


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


def test_charts_of_the_same_limits_have_the_same_axis():
    low, high = [("a", [(1, 0.2, 0.0), (2, 0.3, 0.0)])], [("a", [(1, 0.7, 0.0), (2, 0.8, 0.0)])]
    ticks = [re.findall(r'end">([\d.]+)<', draw_chart(line, "x", "y", limits=(0.2, 0.8))) for line in (low, high)]
    assert ticks[0] == ticks[1]
    assert ticks[0] == [f"{0.15 * i:.2f}" for i in range(1, 7)]  # steps of .15 need two decimals
    assert ticks[0] != re.findall(r'end">([\d.]+)<', draw_chart(low, "x", "y"))


def test_a_chart_keeps_its_points_inside_and_says_what_it_shows():
    chart = draw_chart(
        [("a & b", [(2, 0.1, 0.05), (20, 0.4, 0.0)]), ("c", [])], "labels", "Dice", logarithmic=True, goal=0.3
    )
    Page(chart)
    assert 'aria-label="Dice against labels: a &amp; b"' in chart
    circles = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert len(circles) == 2
    assert all(48 < x < 640 and 0 < y < 260 for x, y in circles)
    assert circles[0][1] > circles[1][1]
    assert draw_chart([("a", [])], "x", "y") == "<p>No cell yet.</p>"


def test_the_settings_of_the_study_are_settings_of_the_bundle(volumes, tmp_path):
    rows = yaml.safe_load((ROOT / "docs" / "study" / "rows.yaml").read_text())
    assert {"scratch", "vdt", "i3d", "acs", "2.5d"} <= {row.get("init", row["name"]) for row in rows}
    plan(volumes, tmp_path, settings=str(ROOT / "docs" / "study" / "settings.yaml"), fractions=1, seeds=1)


# Whole matrices of tiny runs ---------------------------------------------------------------------------------------

slow = pytest.mark.slow  # each cell is some seconds of a process of its own


def words_of(volumes, folder, rows, **more):
    options = {
        "rows": str(rows),
        "dataset_dir": str(volumes),
        "output_dir": str(folder),
        **MATRIX,
        "workers": 2,
        **more,
    }
    command = [sys.executable, "-W", "ignore", "-m", "vdt_workflows.cli", "compare"]
    for name, value in options.items():
        command += [f"--{name}", value if isinstance(value, str) else repr(value)]
    return command


def numbers(folder):
    """Give the results without what a clock or a folder changes."""
    results = json.loads((folder / "results.json").read_text())
    for cell in results["cells"]:
        for name in ("seconds", "cpu_seconds", "folder"):
            del cell[name]
    del results["provenance"]
    return results


@pytest.fixture(scope="module")
def matrix(volumes, tmp_path_factory):
    """Two rows, two shares and two seeds, done without a break."""
    folder = tmp_path_factory.mktemp("matrix")
    save_weights(ResNet3D(18, base_channels=4), folder / "encoder.pt")
    rows = folder / "rows.yaml"
    rows.write_text("- name: scratch\n- {name: vdt, pretrained: encoder.pt}\n")
    subprocess.run(words_of(volumes, folder / "out", rows), check=True)
    return rows, folder / "out"


@slow
def test_a_matrix_killed_at_any_moment_goes_on_and_gives_the_same(volumes, matrix, tmp_path):
    rows, whole = matrix
    process = subprocess.Popen(words_of(volumes, tmp_path, rows), start_new_session=True)
    rng = random.Random()
    after = rng.randint(1, 4)
    while len(list(tmp_path.glob("cells/*/*/result.json"))) < after and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.5))  # two more may finish meanwhile, not all
    process.kill()
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*/result.json")}
    assert after <= len(written) < 8, f"killed after {after} cells"
    subprocess.run(words_of(volumes, tmp_path, rows), check=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert numbers(tmp_path) == numbers(whole)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*/*.json")}
    compare(str(rows), str(volumes), str(tmp_path), **MATRIX)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*/*.json")} == done


@slow
def test_a_ray_cluster_gives_the_same(volumes, matrix, tmp_path):
    ray = pytest.importorskip("ray")
    rows, whole = matrix
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        compare(str(rows), str(volumes), str(tmp_path), ray="local", ray_resources={"num_cpus": 1}, **MATRIX)
    finally:
        ray.shutdown()
    assert numbers(tmp_path) == numbers(whole)


@slow
def test_a_cell_is_what_its_commands_say(matrix, tmp_path):
    folder = matrix[1] / "cells" / "vdt" / "share1-seed1"
    lines = (folder / "commands.txt").read_text().replace(str(folder), str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = lines.replace("python -W", f"{sys.executable} -W")
    subprocess.run(["bash", "-e"], input=script, text=True, env=environment, check=True)
    assert (tmp_path / "scores" / "cases.csv").read_text() == (folder / "scores" / "cases.csv").read_text()
    weights = [torch.load(f / "models" / "model_last.pt") for f in (folder, tmp_path)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def overlays_of_the_docs(folder):
    """Write the networks that docs/compare.md shows, and give their paths by class."""
    blocks = re.findall(r"```yaml\n(network_def:.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.DOTALL)
    paths = {yaml.safe_load(block)["network_def"]["_target_"].rpartition(".")[2]: block for block in blocks}
    for name, block in paths.items():
        (folder / f"{name}.yaml").write_text(block)
    return {name: str(folder / f"{name}.yaml") for name in paths}


@slow
def test_other_networks_are_rows_and_a_failing_cell_stops_no_other(volumes, tmp_path):
    wrong = tmp_path / "encoder.pt"
    torch.save({"conv1.weight": torch.zeros(8, 1, 7, 7, 7)}, wrong)
    small = {
        "UNet": {"network_def::channels": [4, 8], "network_def::strides": [2], "network_def::num_res_units": 0},
        "SegResNet": {
            "network_def::init_filters": 8,
            "network_def::blocks_down": [1, 1],
            "network_def::blocks_up": [1],
        },
        "SwinUNETR": {"network_def::feature_size": 12, "patch_size": [64, 64, 64]},  # 32 leave one voxel at its deepest
    }
    peers = overlays_of_the_docs(tmp_path)
    assert peers.keys() == small.keys()
    entries = [{"name": "vdt", "pretrained": str(wrong)}, {"name": "twin", "init": "scratch"}, {"name": "scratch"}]
    entries += [{"name": n, "init": "scratch", "configs": peers[n], "settings": s} for n, s in small.items()]
    rows = tmp_path / "rows.yaml"
    rows.write_text(yaml.safe_dump(entries))
    folder = tmp_path / "out"
    words = words_of(volumes, folder, rows, fractions=1, seeds=1, pictures=True)
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert re.search(r"failed: vdt, 100% of the labels, seed 0: ValueError: .*encoder\.pt", done.stderr)
    results = numbers(folder)
    assert [cell["error"] for cell in results["cells"][1:]] == [None] * 5
    assert [cell["state"] for cell in results["cells"]] == ["failed", *["finished"] * 5]
    assert str(wrong) in results["cells"][0]["error"]
    found = {s["row"]: s for s in results["summary"]}
    assert found["twin"]["difference"]["by_seed"] == [0.0]  # same start, cases, order and draws: the same to the bit
    assert found["twin"]["curve"] == found["scratch"]["curve"]
    assert len({s["parameters"] for s in results["summary"]}) == 5  # None of vdt, the twins', and one of each peer
    assert (folder / "report.html").read_text().count("<img") == 7  # image, label and five predictions


@slow
def test_nodules_are_compared_by_the_area_under_the_curve(nodules, tmp_path):
    settings = {"base_channels": 4, "crop_size": 16, "jitter": 2, "batch_size": 4}
    compare(
        "scratch",
        str(nodules),
        str(tmp_path),
        "lidc_nodule_classification",
        settings,
        1,
        1,
        steps=2,
        points=1,
        held_out=8,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["state"] for cell in results["cells"]] == ["finished"], results["cells"]
    assert 0 <= results["summary"][0]["mean"] <= 1
    split = json.loads((tmp_path / "data" / "share1-seed0.json").read_text())
    assert not set(split["training"]) & set(split["test"])
