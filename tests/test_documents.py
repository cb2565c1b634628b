"""What README and docs/ say in code is run, and what they say as commands is resolved against scripts and configs."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_runs import ROOT, TINY
from PIL import Image

from networks import ResNet3D
from vdt_workflows import save_weights

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

LOOKED_AT = ("FlexibleUNet", "create_workflow", "MonaiAlgo")  # what marks an example with a test of its own


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def code_blocks() -> list:
    return [
        pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}")
        for path in DOCUMENTS
        for number, code in enumerate(blocks(path, "python"))
        if not any(word in code for word in LOOKED_AT)
    ]


@pytest.fixture
def workplace(tmp_path, volumes, monkeypatch):
    """A folder with what the examples name: a picture, an encoder, volumes at two sites, and the bundles."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    torch.manual_seed(1)
    save_weights(ResNet3D(18), tmp_path / "encoder.pt")
    for name in ("VOLUMES", "SITE_A", "SITE_B"):
        (tmp_path / name).symlink_to(volumes)
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles", ignore=shutil.ignore_patterns("models", "eval"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_small(code: str) -> dict:
    """Run an example with the settings that make a segmentation small."""
    tiny = {**TINY["bcv_multiorgan_segmentation"], "logging_file": False}
    code = code.replace('"epochs": 5}', f"**{tiny}}}")
    del tiny["logging_file"]  # which MonaiAlgo sets itself
    code = code.replace('"val_interval": 1}', f"**{tiny}}}")
    names: dict = {}
    exec(compile(code, "example", "exec"), names)
    return names


@pytest.mark.parametrize("code", code_blocks())
def test_every_python_example_runs(workplace, code):
    run_small(code)


def the_example(word: str) -> str:
    (code,) = [code for code in blocks(ROOT / "README.md", "python") if word in code]
    return code


def test_the_monai_network_of_the_example_has_the_loaded_encoder(workplace):
    names = run_small(the_example("FlexibleUNet"))
    loaded = torch.load(workplace / "encoder.pt", weights_only=True)
    assert torch.equal(names["unet"].encoder.layer4[1].conv2.weight, loaded["layer4.1.conv2.weight"])
    assert names["logits"].shape == (1, 14, 32, 64, 64)


@pytest.mark.slow
def test_the_bundle_of_the_example_gives_the_metric_of_its_history(workplace, capsys):
    run_small(the_example("create_workflow"))
    with (workplace / "bundles/bcv_multiorgan_segmentation/eval/history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(last["val_mean_dice"]), abs=1e-6)


@pytest.mark.slow
def test_the_federated_sites_train_two_rounds_and_score_the_averaged_weights(workplace):
    names = run_small(the_example("MonaiAlgo"))
    for site in "AB":
        with (workplace / site / "eval" / "history.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 2
    kernel = "network.backbone.conv1.weight"
    a, b = (weights[kernel] for weights in names["local"])
    torch.testing.assert_close(names["weights"][kernel], (a + b) / 2)
    evaluated = names["site"].evaluator.network.state_dict()
    torch.testing.assert_close(evaluated[kernel], names["weights"][kernel])
