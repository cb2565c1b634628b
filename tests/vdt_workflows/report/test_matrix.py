"""The comparison of initialisations: its options, and whole matrices of tiny runs."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml

from networks import ResNet3D
from tests.makers.comparison import TINY, plan
from tests.support.bundle_runs import ROOT
from tests.support.bundle_runs import rows as read_csv
from tests.vdt_workflows.planning.test_plan import LIVER
from vdt_workflows.planning.plan import make_plan, write_plan
from vdt_workflows.report.matrix import compare, find_task
from vdt_workflows.training.checkpoints import save_weights

# Two rows of this and two seeds: four cells.
MATRIX = {
    "settings": TINY,
    "fractions": [0.5],
    "seeds": 2,
    "steps": 2,
    "points": 2,
    "held_out": 2,
    "pictures": False,
}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"settings": {**TINY, "learning_rat": 1}}, "--learning_rat.*did you mean --learning_rate"),
        ({"settings": "none.yaml"}, r"settings none\.yaml: no such file"),
        ({"protocols": "papre"}, "protocols of bcv_.* must be among recommended, paper, short, got 'papre'"),
        ({"bundle": "bcv"}, "bundle must be 'bcv_multiorgan_segmentation', .*got 'bcv'"),
        ({"steps": 5}, "steps must be a multiple of points"),
        ({"fractions": 0.05}, r"fraction 0\.05 of 4 labelled cases is none"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(volumes, tmp_path, options, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        plan(volumes, tmp_path, **options)
    assert not list(tmp_path.glob("out/cells/*/*"))


def test_every_segmentation_is_compared_by_its_dice_and_draws_an_example_but_of_cubes():
    scans, cubes = find_task("lits_liver_segmentation"), find_task("lidc_nodule_segmentation")
    assert (scans.metric, scans.example, cubes.metric, cubes.example) == ("val_mean_dice", True, "val_mean_dice", False)
    assert find_task("lidc_nodule_classification").metric == "val_auc"


def test_a_folder_of_other_settings_is_refused_but_may_grow(volumes, tmp_path):
    encoder = tmp_path / "encoder.pt"
    encoder.write_bytes(b"weights")  # which nothing reads
    plan(volumes, tmp_path)
    plan(volumes, tmp_path, f"scratch,vdt={encoder}", fractions=[0.25, 1], seeds=3)
    with pytest.raises(ValueError, match="holds results made with steps 4, not 8"):
        plan(volumes, tmp_path, steps=8)
    encoder.write_bytes(b"other weights")
    with pytest.raises(ValueError, match=r"vdt holds results made with weights '.*', not '"):
        plan(volumes, tmp_path, f"scratch,vdt={encoder}")


def test_a_row_may_bring_another_network_and_settings(volumes, tmp_path):
    peer = tmp_path / "unet.yaml"
    peer.write_text("network_def: {_target_: monai.networks.nets.UNet}\n")
    rows = [{"name": "UNet, MONAI", "init": "scratch", "configs": str(peer), "settings": {"momentum": 0.5}}]
    plan(volumes, tmp_path, rows, seeds=1, fractions=1, protocols="recommended,paper,short")
    folder = tmp_path / "out" / "cells" / "UNet-MONAI"
    assert json.loads((folder / "settings.json").read_text())["settings"] == {"momentum": 0.5}
    found = read_csv(tmp_path / "out" / "results.csv")
    assert [(r["protocol"], r["state"]) for r in found] == [(p, "not run") for p in ("recommended", "paper", "short")]


def test_the_settings_of_the_study_are_settings_of_the_bundle(volumes, tmp_path):
    study = ROOT / "docs" / "study"
    plan(volumes, tmp_path, str(study / "rows.yaml"), settings=str(study / "settings.yaml"), fractions=1, seeds=1)


@pytest.mark.parametrize("bundle", ["bcv_multiorgan_segmentation", "lits_liver_segmentation"])
def test_a_plan_is_the_settings_of_a_comparison_without_its_words(volumes, tmp_path, bundle):
    write_plan(make_plan(LIVER, None), tmp_path / "plan.json")
    plan(volumes, tmp_path, settings=str(tmp_path / "plan.json"), fractions=1, seeds=1, bundle=bundle)
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (kept["stem"], kept["strides"][0]) == ("strided", [2, 2, 2])
    assert "_plan_" not in kept


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
    """Two rows and two seeds, done without a break."""
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
    while not list(tmp_path.glob("cells/*/*/result.json")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(random.uniform(0, 0.5))  # two more may finish meanwhile, not all
    process.kill()
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/*/result.json")}
    assert 1 <= len(written) < 4
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
    folder = matrix[1] / "cells" / "vdt" / "share0.5-seed1"
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
    words = words_of(volumes, folder, rows, fractions=1, seeds=1, steps=1, points=1, pictures=True)
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 1
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


def test_nodules_of_one_class_alone_are_not_scored(nodules, tmp_path):
    with pytest.raises(ValueError, match="curve_cases: the 1 nodules that it names are of one class, take more"):
        compare(
            "scratch", str(nodules), str(tmp_path), "lidc_nodule_classification", {}, 1, 1, held_out=8, curve_cases=1
        )


@slow
def test_nodules_are_compared_by_the_area_under_the_curve(nodules, tmp_path):
    settings = {"base_channels": 4, "crop_size": 16, "jitter": 2, "batch_size": 4}
    schedule = {"steps": 2, "points": 1, "held_out": 8}
    compare("scratch", str(nodules), str(tmp_path), "lidc_nodule_classification", settings, 1, 1, **schedule)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["state"] for cell in results["cells"]] == ["finished"], results["cells"]
    assert 0 <= results["summary"][0]["mean"] <= 1
    split = json.loads((tmp_path / "data" / "share1-seed0.json").read_text())
    assert not set(split["training"]) & set(split["test"])
