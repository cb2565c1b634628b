"""Shipped weights: whole, described, taken where no other file is named, and refused when missing or changed."""

import hashlib
import re
import shutil

import pytest
import torch

from networks import DepthFirst, ResNet3DClassifier, ResUNet3D, read_checkpoint
from tests.support.bundle_runs import BUNDLES, ROOT, parse
from vdt_workflows.cli import main
from vdt_workflows.training import shipped
from vdt_workflows.training.checkpoints import check_settings, read_provenance, save_weights
from vdt_workflows.training.initialisation import describe_weights, initialise
from vdt_workflows.training.shipped import find_weights, first_weights, list_weights, locate_weights

NARROW, TWIN, WIDE = "vdt_resnet3d18_w16", "twin_resnet2d18_w16", "vdt_resnet3d18_w64"
WITH_SHIPPED = [bundle for bundle in BUNDLES if "first_weights" in (bundle / "configs/train.yaml").read_text()]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The folder of the narrow encoder in an installation that has no other but the cards of the wide one."""
    shutil.copytree(find_weights(NARROW), tmp_path / NARROW)
    shutil.copytree(find_weights(WIDE), tmp_path / WIDE, ignore=shutil.ignore_patterns("model.pt"))
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path,))
    list_weights.cache_clear()
    yield tmp_path / NARROW
    list_weights.cache_clear()


@pytest.mark.parametrize("name", list_weights())
def test_every_shipped_folder_is_described_and_has_the_hashes_of_its_card(name):
    weights, folder = list_weights()[name], find_weights(name)
    assert {path.name for path in folder.iterdir()} == {"model.pt", "run.json", "card.md"}
    assert weights.sha256.keys() == {"model.pt", "run.json"}
    for file, wanted in weights.sha256.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == wanted
    assert (ROOT / "bundles" / weights.bundle).is_dir()
    assert f"SPDX-License-Identifier: {weights.license}\n" in weights.text
    assert weights.license in re.search('^license = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.M)[1].split()
    assert re.findall("^## (.*)", weights.text, re.M) == ["Data and terms", "Recipe", "Figures", "Limits"]
    assert re.search(r"\d\.\d+", weights.figure)[0] in weights.text.partition("## Figures")[2]
    check_settings(folder / "run.json", folder / "model.pt")
    assert read_provenance(folder / "model.pt")
    kernels = [tensor for tensor in read_checkpoint(folder / "model.pt").values() if tensor.dim() > 1]
    assert {tensor.dtype for tensor in kernels} == {torch.float16}


def test_what_the_wheel_takes_is_small():
    inside = (ROOT / "vdt_workflows" / "weights").rglob("*")
    assert sum(path.stat().st_size for path in inside if path.is_file()) < 30e6


def test_the_shipped_encoder_is_loaded_as_it_is_in_the_networks_precision_and_named_later(tmp_path):
    network = DepthFirst(ResUNet3D(2, base_channels=16, norm="batch"))
    path = first_weights("vdt", None, 16)
    initialise(network, "vdt", path)
    tensors, own = read_checkpoint(path), network.network.backbone.state_dict()
    assert all(torch.equal(value, tensors[f"backbone.{name}"].to(value.dtype)) for name, value in own.items())
    assert {value.dtype for value in own.values() if value.is_floating_point()} == {torch.float32}
    save_weights(network, tmp_path / "model.pt")
    found = read_provenance(tmp_path / "model.pt")["pretrained"]
    assert (found["shipped"], found["sha256"]) == (NARROW, list_weights()[NARROW].sha256["model.pt"])


def test_the_shipped_twin_is_inflated():
    network = DepthFirst(ResNet3DClassifier(18, 2, base_channels=16), restore=False)
    path = first_weights("i3d", None, 16)
    initialise(network, "i3d", path)
    flat = read_checkpoint(path)["backbone.layer1.0.conv1.weight"].float()
    torch.testing.assert_close(network.network.backbone.layer1[0].conv1.weight[:, :, 1], flat / 3)


@pytest.mark.parametrize("bundle", WITH_SHIPPED, ids=lambda path: path.name)
def test_a_bundle_takes_the_encoder_of_its_width_and_norm_and_notes_which(bundle):
    parser = parse(bundle, init="vdt", base_channels=16)
    assert parser.get_parsed_content("first_weights") == str(find_weights(NARROW) / "model.pt")
    assert parser.get_parsed_content("norm") == "batch"
    assert parser.get_parsed_content("started_from")["shipped"] == NARROW
    assert parse(bundle).get_parsed_content("first_weights") is None
    assert parse(bundle, init="vdt", pretrained="mine.pt").get_parsed_content("first_weights") == "mine.pt"


def test_four_bundles_take_shipped_encoders():
    assert len(WITH_SHIPPED) == 4
    assert describe_weights(None) is None


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("scratch", None, 64), None),
        (("kinetics", None, 16), None),  # whose absence `initialise` refuses
        (("vdt", "mine.pt", 24), "mine.pt"),
        (("vdt", NARROW, 24), NARROW),
        (("i3d", TWIN, 64), TWIN),
        *(((init, None, 16), TWIN) for init in ("i3d", "acs", "2.5d")),
        (("vdt", None, 64), WIDE),
    ],
)
def test_what_is_named_wins_and_the_kind_of_encoder_follows_the_initialisation(given, found):
    path = first_weights(*given)
    assert path == (str(find_weights(found) / "model.pt") if found in list_weights() else found)


@pytest.mark.parametrize(
    ("given", "there"),
    [
        (("vdt", None, 32), "depth 18 and base_channels 16 or depth 18 and base_channels 64"),
        (("vdt", None, 16, 34), "depth 18 and base_channels 16 or depth 18 and base_channels 64"),
        (("acs", None, 64), "depth 18 and base_channels 16"),
    ],
)
def test_a_width_or_depth_that_is_not_shipped_is_refused_with_those_that_are(given, there):
    with pytest.raises(ValueError, match=f"there is none of depth .*; set {there}, or give the path of a file"):
        first_weights(*given)


@pytest.mark.parametrize(("file", "at"), [("model.pt", 2_000_000), ("run.json", 20)])
def test_a_changed_byte_is_refused(copied, file, at):
    content = bytearray((copied / file).read_bytes())
    content[at] ^= 1
    (copied / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: has SHA-256 .*\.\.\., not .* it is damaged or was changed"):
        first_weights("vdt", None, 16)
    with pytest.raises(SystemExit, match="it is damaged or was changed"):
        main(["weights", NARROW])


def test_a_damaged_card_is_refused(copied):
    (copied / "card.md").write_text((copied / "card.md").read_text().replace("sha256:", "sha257:"))
    with pytest.raises(SystemExit, match=r"card\.md: not a whole card of weights .* install or check it out again"):
        main(["weights"])


def test_what_is_no_part_of_the_installation_is_said_with_where_it_is(copied, capsys):
    with pytest.raises(FileNotFoundError, match=rf"take the folder weights/{WIDE} of a clone .* as pretrained"):
        first_weights("vdt", None, 64)
    main(["weights"])
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[2], row[3]) for row in rows[1:]] == [(NARROW, "16", "4.3 MB"), (WIDE, "64", "not here")]
    main(["weights", WIDE])
    assert "SPDX-License-Identifier: CC-BY-NC-4.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"weights 'w8': there are none of this name; there are {NARROW}, {WIDE}$"):
        main(["weights", "w8"])


@pytest.mark.parametrize("pretrained", ["vdt_resnet3d18_w61", "mine"])
def test_a_word_that_is_neither_a_file_nor_shipped_is_refused_with_the_names(pretrained):
    with pytest.raises(ValueError, match=f"weights '{pretrained}': there are none of this name; there are .*{NARROW}"):
        first_weights("vdt", pretrained, 16)


def test_paths_are_no_names_of_weights_and_a_folder_of_a_shipped_name_does_not_hide_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    for path in ("mine", "folder/mine", "mine.pt", str(tmp_path / "other")):
        assert locate_weights(path) == path
    (tmp_path / NARROW).mkdir()
    assert locate_weights(NARROW) == str(find_weights(NARROW) / "model.pt")


def test_a_copy_of_the_packages_without_weights_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path,))
    list_weights.cache_clear()
    main(["weights"])
    assert "came without weights: install vdt-bundles" in capsys.readouterr().out
    assert first_weights("vdt", None, 16) is None
    list_weights.cache_clear()
