from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms import LoadImaged

from tests.faults.damage import KINDS, WAYS, damage, damage_kind, files
from tests.faults.outcomes import quiet
from tests.makers.volumes import write_volume
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.training.checkpoints import ResumeRun, load_weights, save_weights

pytestmark = pytest.mark.faults
BY_NAME = {kind.name: kind for kind in KINDS}
QUICK = ("image", "NIfTI", "checkpoint")


def count(kind, folder, number=13):
    with quiet():
        return damage_kind(kind, folder / "files", number, seed=1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in BY_NAME]
)
def test_damaged_files_are_read_or_refused_in_a_sentence_that_names_them(name, tmp_path):
    result = count(BY_NAME[name], tmp_path)
    assert result["unclear"] == result["lost"] == 0, result["details"]
    assert result["survived"] + result["changed"] + result["refused"] == 13


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused():
    total = files(number=800, seed=2)["total"]
    assert total["unclear"] == total["lost"] == 0


def test_the_damage_depends_on_the_seed_alone_and_is_of_every_way():
    first, again, other = (
        [damage(bytes(range(200)), rng) for _ in range(60)] for rng in map(np.random.default_rng, (0, 0, 1))
    )
    assert first == again != other
    assert {how for how, _ in first} == set(WAYS)


def test_a_reader_that_gives_other_values_or_none_of_our_sentences_is_found(tmp_path):
    kind = replace(BY_NAME["npz"], read=lambda folder: [file.read_bytes() for file in sorted(folder.iterdir())])
    assert count(kind, tmp_path / "lenient")["lost"] == 13

    def strict(folder):
        for file in folder.iterdir():
            np.load(file)["voxel"]

    assert count(replace(kind, read=strict), tmp_path / "strict")["unclear"] > 5


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
        ResumeRun(str(tmp_path / "resume.pt"), {}, {}).load(None)
