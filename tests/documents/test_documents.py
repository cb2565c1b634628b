"""What README and docs/ say in code is run, and what they say as commands is resolved against scripts and configs."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from draw_vdt import draw_gallery, draw_vdt
from PIL import Image

import networks
import vdt_transforms
import vdt_workflows
from networks import ResNet3D
from tests.support.bundle_runs import BUNDLES, ROOT, TINY, history
from tests.support.documents import DOCUMENTS, blocks, commands, inline
from vdt_workflows.cli import COMMANDS, find_command
from vdt_workflows.overrides import check_command_line
from vdt_workflows.training.checkpoints import save_weights

# What marks an example with a test of its own, the last three in the files test_export.py.
LOOKED_AT = ("FlexibleUNet", "create_workflow", "MonaiAlgo", "torch.onnx.export", "custom_metadata_map", "IOMapping")
SHELL = ("pip", "hf", "tensorboard", "mkdocs", "export", "shift", "source", "python3.11", "curl", "unzip")


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


def the_example(word: str, page: str = "docs/how-to/python.md") -> str:
    (code,) = [code for code in blocks(ROOT / page, "python") if word in code]
    return code


def test_the_monai_network_of_the_example_has_the_loaded_encoder(workplace):
    names = run_small(the_example("FlexibleUNet"))
    loaded = torch.load(workplace / "encoder.pt", weights_only=True)
    assert torch.equal(names["unet"].encoder.layer4[1].conv2.weight, loaded["layer4.1.conv2.weight"])
    assert names["logits"].shape == (1, 14, 32, 64, 64)


@pytest.mark.slow
def test_the_bundle_of_the_example_gives_the_metric_of_its_history(workplace, capsys):
    run_small(the_example("create_workflow"))
    last = history(workplace / "bundles" / "bcv_multiorgan_segmentation")[-1]
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(last["val_mean_dice"]), abs=1e-6)


@pytest.mark.slow
def test_the_federated_sites_train_two_rounds_and_score_the_averaged_weights(workplace):
    names = run_small(the_example("MonaiAlgo", "docs/how-to/federated.md"))
    for site in "AB":
        assert len(history(workplace / site)) == 2
    kernel = "network.backbone.conv1.weight"
    a, b = (weights[kernel] for weights in names["local"])
    torch.testing.assert_close(names["weights"][kernel], (a + b) / 2)
    evaluated = names["site"].evaluator.network.state_dict()
    torch.testing.assert_close(evaluated[kernel], names["weights"][kernel])


@pytest.mark.slow
def test_the_client_of_the_example_trains_two_rounds_and_keeps_the_weights_it_sends(workplace):
    site = run_small(the_example("MonaiAlgo"))["site"]
    assert [row["epoch"] for row in history(workplace / "A")] == ["1", "2"]
    kept, sent = torch.load(workplace / "A" / "models" / "model_last.pt"), site.get_weights().weights
    assert all(torch.equal(kept[name], sent[name]) for name in kept)


# Commands


def command_blocks() -> list:
    found = []
    for path in [*DOCUMENTS, *sorted((ROOT / "docs").rglob("*.sh"))]:
        shown = [*blocks(path, "bash"), *inline(path)]
        texts = shown if path.suffix == ".md" else [path.read_text().split("pipefail")[1]]
        for number, text in enumerate(texts):
            found.append(pytest.param(text, id=f"{path.relative_to(ROOT)}-{number}"))
    return found


def script_of(words: list[str]) -> Path:
    """The file with the function that a command runs, or the folder of its package."""
    if words[0] == "python":
        return ROOT / (words[2].replace(".", "/") if words[1] == "-m" else words[1])
    name, _ = find_command(words[1:])
    return ROOT / "vdt_workflows" / f"{COMMANDS[name].module.replace('.', '/')}.py"


def options_of(script: Path) -> set[str]:
    """Names of the arguments of all functions of a script, of a package's modules, or of the benchmarks."""
    files = list(script.glob("*.py")) if script.is_dir() else [script]
    files += script.parent.glob("benchmarks/*.py") if script.name == "benchmark.py" else []
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    names = {a.arg for f in functions for a in (*f.args.args, *f.args.kwonlyargs)}
    if script.parent.name == "planning":  # whose commands take every setting of a bundle
        configs = [yaml.safe_load(file.read_text()) for file in ROOT.glob("bundles/*/configs/*.yaml")]
        names |= {name for config in configs for name in config}
    return names


def check_bundle_command(words: list[str], folder: Path | None, monkeypatch) -> None:
    """Resolve a `monai.bundle run` in its bundle, or where the text does not say which, in any that knows it all."""
    if packed := [word for word in words if word.endswith("/configs/inference.json")]:  # of an unpacked zip
        folder = ROOT / "bundles" / packed[0].partition("/")[0]
        words = ["configs/inference.yaml" if word == packed[0] else word for word in words]
    errors = []
    for bundle in [folder] if folder else BUNDLES:
        monkeypatch.chdir(bundle)
        files = words[words.index("--config_file") + 1]
        names = [files] if files.endswith(".yaml") and "[" not in files else ast.literal_eval(files)
        try:
            assert all(Path(name).is_file() for name in names), names
            given = [words[0], *words[1:]]
            if "--args_file" in given:  # it exists only after a training
                at = given.index("--args_file")
                del given[at : at + 2]
            check_command_line(given)
            return
        except (AssertionError, ValueError) as error:
            errors.append(f"{bundle.name}: {error}")
    pytest.fail("; ".join(errors))


def check_command(words: list[str], folder: Path | None, monkeypatch) -> Path | None:
    if words[0] == "cd":
        inside = ROOT / "bundles" / Path(words[1]).name
        assert words[1] == "$1" or inside.is_dir(), words
        return inside if inside.is_dir() else None
    if "monai.bundle" in words:
        rest = words[words.index("monai.bundle") + 1 :]
        if rest[0] == "run":
            packaged = [re.fullmatch(r"(\w+)/(configs/\w+)\.json", word) for word in rest]
            for at, found in enumerate(packaged):  # of an unpacked zip, whose JSON is made of the bundle's YAML
                folder = ROOT / "bundles" / found[1] if found else folder
                rest[at] = f"{found[2]}.yaml" if found else rest[at]
            check_bundle_command([word for word in rest if word != "$@"], folder, monkeypatch)
        else:
            assert rest[0] in ("ckpt_export", "onnx_export", "verify_metadata", "verify_net_in_out"), rest
    elif words[1:3] == ["-m", "venv"]:
        assert re.fullmatch(r"python3(\.\d+)?", words[0]), words
    elif words[0] in ("python", "vdt"):
        script = script_of(words)
        assert script.exists(), words
        unknown = {w[2:].partition("=")[0] for w in words if w.startswith("--")} - options_of(script)
        assert not unknown, (words, unknown)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert Path(words[0]).name in SHELL or "=" in words[0], words
    return folder


@pytest.mark.parametrize("text", command_blocks())
def test_every_command_names_scripts_options_and_settings_that_exist(text, monkeypatch):
    folder = None
    for line in commands(text):
        folder = check_command(shlex.split(line, comments=True), folder, monkeypatch)


def test_a_command_with_a_misspelt_setting_or_option_is_found(monkeypatch):
    config = ["monai.bundle", "run", "--config_file", "configs/train.yaml"]
    with pytest.raises(pytest.fail.Exception, match="epoch: no such setting"):
        check_command(["python", "-m", *config, "--epoch", "3"], None, monkeypatch)
    with pytest.raises(AssertionError, match="volume"):
        check_command(["vdt", "report", "RUN", "--volume", "3"], None, monkeypatch)


# Pages


def test_every_link_between_the_documents_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).is_file(), f"{path.name}: {target}"  # a site shows no folder


def test_no_page_has_more_than_2500_words():
    for path in DOCUMENTS:
        words = re.sub(r"[|`#*]", " ", path.read_text()).split()
        assert sum(bool(re.search(r"\w", word)) for word in words) <= 2500, path.name


def test_every_page_is_reached_from_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"([\w/-]+\.md)$", text.partition("\nnav:")[2], re.MULTILINE))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in DOCUMENTS[1:]}


def test_a_bundle_links_to_no_file_since_its_page_is_read_in_the_repository_the_site_and_the_zip():
    for bundle in BUNDLES:
        for target in re.findall(r"\]\(([^)\s]+)", (bundle / "docs" / "README.md").read_text()):
            assert target.startswith(("http", "#")), (bundle.name, target)


def test_every_bundle_has_a_page_and_a_model_card():
    for bundle in BUNDLES:
        assert f"bundles/{bundle.name}/docs/README.md" in (ROOT / "docs/bundles" / f"{bundle.name}.md").read_text()
        card = (bundle / "docs" / "README.md").read_text().partition("## Model card")[2].partition("\n## ")[0]
        for row in ("intended use", "not for", "of the code", "of the data", "of the weights", "memory and time"):
            assert row in card, (bundle.name, row)


def test_the_citation_and_the_changelog_have_the_version_of_the_package():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_picture_of_the_idea_shows_three_slices_in_every_stage(tmp_path):
    shapes = draw_vdt(str(tmp_path / "vdt.png"), size=64)
    assert [shape[0] for shape in shapes["an image"]] == [3] * 5
    assert np.ptp(np.asarray(Image.open(tmp_path / "vdt.png").convert("L"))[:200, 300:]) > 100


def test_the_gallery_shows_each_public_transform_once_or_says_that_it_is_not_to_be_seen(tmp_path):
    text, hidden = (ROOT / "docs/gallery.md").read_text().split("## Not to be seen")
    public = {name for name in vdt_transforms.__all__ if isinstance(getattr(vdt_transforms, name), type)}
    twins = {name for name in public if name.endswith("d") and name[:-1] in public} - {"Spacingd"}
    shown, listed = re.findall(r"^\*\*(\w+)\*\*", text, re.MULTILINE), re.findall(r"`(\w+)`", hidden)
    assert sorted([*shown, *listed]) == sorted([*(public - twins), "Spacingd"])
    assert re.findall(r"gallery/(\w+)\.png", text) == shown
    draw_gallery(str(tmp_path))
    assert {path.stem for path in tmp_path.glob("*.png")} == {*shown}
    for path in tmp_path.glob("*.png"):  # whose pictures, compression aside, are those of the page
        with Image.open(path) as drawn, Image.open(ROOT / "docs/pictures/gallery" / path.name) as kept:
            difference = np.abs(np.asarray(drawn.convert("L"), float) - np.asarray(kept.convert("L"), float))
        assert difference.mean() < 2, path.name
    assert sum(path.stat().st_size for path in (ROOT / "docs/pictures/gallery").iterdir()) < 400_000


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]  # --quiet forgives all
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for page, package in {"networks": networks, "transforms": vdt_transforms, "workflows": vdt_workflows}.items():
        shown = re.findall(r'id="[\w.]+\.(\w+)"', (tmp_path / "reference" / f"{page}.html").read_text())
        shown += re.findall(r"`(\w+)`", (ROOT / "docs" / "reference" / f"{page}.md").read_text())
        assert {*package.__all__} <= {*shown}, page
