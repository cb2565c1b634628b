from __future__ import annotations

import re
from dataclasses import replace

import fire
import numpy as np
import pytest
import torch
from monai.transforms import LoadImaged

from tests.faults import __main__ as faults
from tests.faults import kinds
from tests.faults.damage import WAYS, damage, damage_kind, files
from tests.faults.kinds import KINDS
from tests.faults.outcomes import outcome, quiet, split_names
from tests.makers.volumes import write_volume
from tests.support.bundle_runs import ROOT
from vdt_transforms import LoadNaturalImage
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.training.checkpoints import ResumeRun, load_weights, save_weights

pytestmark = pytest.mark.faults
BY_NAME = {kind.name: kind for kind in KINDS}
QUICK = ("image", "NIfTI", "checkpoint")


def count(kind, folder, number=13):
    with quiet():
        return damage_kind(kind, folder / "files", number, seed=1)


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_are_read_or_refused_in_a_sentence_that_names_them(name, tmp_path):
    result = count(BY_NAME[name], tmp_path)
    assert result["unclear"] == result["lost"] == 0, result["details"]
    assert sum(result[name] for name in ("survived", "undetectable", "named", "refused")) == 13


def test_documented_commands_run(monkeypatch, capsys):
    text = (ROOT / "docs" / "faults.md").read_text() + faults.__doc__
    commands = re.findall(r"python -m tests\.faults ((?:files|kills)\b[^`\n]*?)(?:`|   |\n)", text)
    assert len(commands) >= 4
    monkeypatch.setattr("tests.faults.interruptions._kill_often", lambda *arguments: outcome("survived"))
    monkeypatch.setattr("tests.faults.kinds.KINDS", [BY_NAME["image"], BY_NAME["csv"]])
    for command in [*commands, "files --kinds image,csv"]:
        words = [word for word in command.split() if not word.endswith(".json") and word != "--json"]
        fire.Fire(faults.COMMANDS, [*words, *(["--number", "4"] if words[0] == "files" else [])])
    printed = capsys.readouterr().out
    assert "packaging" in printed
    assert "csv" in printed


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused():
    total = files(number=400, seed=2)["total"]
    assert total["unclear"] == total["lost"] == 0


def test_the_damage_depends_on_the_seed_alone_and_is_of_every_way():
    first, again, other = (
        [damage(bytes(range(200)), rng) for _ in range(60)] for rng in map(np.random.default_rng, (0, 0, 1))
    )
    assert first == again != other
    assert {how for how, _ in first} == set(WAYS)


def read_black(self, file):
    return torch.zeros(3, 40, 52, dtype=torch.uint8)


SABOTAGE = {  # what is planted, and the kind that must notice it in every file, or in some
    "pictures are black": ("image", "vdt_transforms.natural_images.LoadNaturalImage.__call__", read_black, "all"),
    "damaged pictures are read": ("image", "vdt_transforms.natural_images.LoadNaturalImage.__init__", None, "some"),
    "tables are empty": ("csv", "tests.faults.kinds.read_nodules", lambda folder: [], "all"),
    "positions are one": ("csv", "tests.faults.kinds.list_nodules", lambda *files: [{"nodules": []}], "all"),
    "a volume is another": ("NIfTI", "tests.faults.kinds.find_volumes", None, "all"),
    "checksums of weights are not looked at": ("checkpoint", "networks.checkpoints.zipfile.is_zipfile", None, "some"),
    "the cache takes any file": ("disk cache", "vdt_workflows.data.cache.has_mark", None, "some"),
    "a record may contradict": ("run.json", "tests.faults.kinds.check_settings", None, "some"),
    "lists are empty": ("json", "tests.faults.kinds.find_volumes", lambda folder: {"training": []}, "all"),
}


def lenient(self, grey=False, decode="strict"):
    self.grey, self.strict = False, False


def first_alone(folder, val_fraction):
    found = find_volumes(folder, val_fraction=val_fraction)
    return {part: [{**case, "image": case["label"]} for case in cases] for part, cases in found.items()}


PLANTED = {
    "damaged pictures are read": lenient,
    "a volume is another": first_alone,
    "checksums of weights are not looked at": lambda path: False,
    "the cache takes any file": lambda path, mark: path.is_file(),
    "a record may contradict": lambda record, weights: None,
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_planted_sabotage_is_found(name, tmp_path, monkeypatch):
    kind, place, planted, extent = SABOTAGE[name]
    monkeypatch.setattr(place, planted or PLANTED[name])
    result = count(BY_NAME[kind], tmp_path, 13 if extent == "all" else 25)
    assert result["lost"] == 13 if extent == "all" else result["lost"] + result["unclear"] > 0


def test_an_error_without_a_sentence_is_found(tmp_path):
    def strict(folder):
        return [np.load(file)["voxel"].transpose() / 255 * 1424 - 1024 for file in sorted(folder.glob("*.npz"))]

    assert count(replace(BY_NAME["npz"], read=strict), tmp_path)["unclear"] > 5


def test_whole_pictures_are_read_as_they_were_drawn(tmp_path):
    kinds._make_pictures(tmp_path)
    for name, (picture, _) in kinds._draw().items():
        drawn = np.asarray(picture.convert("RGB"), float).transpose(2, 0, 1)
        image = LoadNaturalImage()(tmp_path / name).numpy()
        drawn = np.rot90(drawn, -1, (1, 2)) if name == "turned.jpg" else drawn
        assert np.abs(image - drawn).mean() < 12, name


def test_names_may_come_as_fire_makes_them_and_unknown_ones_are_named(tmp_path):
    assert split_names("what", ("a", "b"), ["a", "b", "c"]) == split_names("what", "a,b", ["a", "b", "c"]) == ["a", "b"]
    assert split_names("what", "", ["a"]) == ["a"]
    with pytest.raises(ValueError, match="what has 'd'; there are a, b"):
        split_names("what", "a,d", ["a", "b"])


def test_a_flipped_byte_in_a_compressed_volume_names_the_file(tmp_path):
    good, bad = tmp_path / "good.nii.gz", tmp_path / "bad.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 1000, (12, 12, 12)).astype(np.int16)
    for file in (good, bad):
        write_volume(file, voxels, dtype=np.int16)
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 0x10
    bad.write_bytes(data)
    case = {"image": str(good), "label": str(bad)}
    with pytest.raises(ValueError, match=r"bad\.nii\.gz: cut short or damaged \(.*\); copy or download it again"):
        SeededCacheDataset([case], [LoadImaged(["image", "label"])], progress=False)


def test_a_flipped_byte_in_a_checkpoint_is_refused_and_changes_no_weight(tmp_path):
    """Every byte of every tensor is covered: torch.load alone would take them all."""
    network = torch.nn.Linear(3, 2)
    save_weights(network, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    weights = network.weight.detach().numpy().tobytes()
    start = whole.index(weights)
    before = network.weight.detach().clone()
    for place in range(start, start + len(weights)):
        data = bytearray(whole)
        data[place] ^= 0x01
        (tmp_path / "model.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.pt: not a whole .* \(the checksum of .*data/0 differs\)"):
            load_weights(network, tmp_path / "model.pt")
    assert torch.equal(network.weight, before)
    (tmp_path / "model.pt").write_bytes(whole)
    load_weights(network, tmp_path / "model.pt")


def test_a_flipped_byte_in_the_state_of_a_run_is_refused(tmp_path):
    state = {"settings": {}, "epoch": 1, "iteration": 2, "objects": {"network": torch.arange(9.0)}, "scaler": {}}
    torch.save(state, tmp_path / "resume.pt")
    data = bytearray((tmp_path / "resume.pt").read_bytes())
    data[data.index(torch.arange(9.0).numpy().tobytes()) + 7] ^= 0x40
    (tmp_path / "resume.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"resume\.pt: not a whole state of a run \(.*checksum .* delete it to start"):
        ResumeRun(str(tmp_path / "resume.pt"), {}).load(None)
