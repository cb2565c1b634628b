from __future__ import annotations

import pickle
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.transforms import LoadImaged

import tests.faults.fault_suite as fault_suite
from vdt_workflows import errors
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.errors import explanation, out_of_memory
from vdt_workflows.files import claim
from vdt_workflows.training.checkpoints import ResumeRun, load_weights, save_weights
from vdt_workflows.training.runs import RunLog

SUITE = vars(fault_suite)
KINDS = {kind.name: kind for kind in SUITE["KINDS"]}


def check(result):
    assert result["unclear"] == result["lost"] == 0, result["details"]


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_a_sentence_that_names_them(name, tmp_path):
    with SUITE["_quiet"]():
        result = SUITE["damage_kind"](KINDS[name], tmp_path / "files", 13, seed=1)
    check(result)
    assert result["survived"] + result["refused"] == 13


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused():
    check({**SUITE["files"](number=800, seed=2)["total"], "details": []})


def test_the_damage_depends_on_the_seed_alone():
    first, again, other = (
        [SUITE["damage"](bytes(range(200)), rng) for _ in range(20)] for rng in map(np.random.default_rng, (0, 0, 1))
    )
    assert first == again != other
    assert len({how for how, _ in first}) > 5


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones():
    for name, result in SUITE["kills"](times=2).items():
        if name != "total":
            check(result)
            assert result["survived"] == 2


@pytest.mark.slow
def test_a_full_or_read_only_disk_is_told_in_a_sentence():
    assert SUITE["places"]()["total"] == {"survived": 0, "refused": 4, "unclear": 0, "lost": 0}


@pytest.mark.slow
def test_training_that_cannot_go_on_stops_with_advice():
    result = SUITE["training"]()
    assert "try a lower --learning_rate than" in result["loss of NaN"]["details"][0]
    assert "try --micro_batch with fewer samples" not in result["loss of NaN"]["details"][0]
    assert "out of memory" in result["too little memory"]["details"][0]
    assert result["total"]["refused"] == 2


def test_a_flipped_byte_in_a_compressed_volume_names_the_file(tmp_path):
    good, bad = tmp_path / "good.nii.gz", tmp_path / "bad.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 1000, (12, 12, 12)).astype(np.int16)
    for file in (good, bad):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
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


def test_a_folder_whose_claim_was_killed_can_be_claimed(tmp_path):
    (tmp_path / ".settings.json.ab12cd").write_text("{")
    claim(tmp_path, {"size": 1}, empty=True)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "other.txt").touch()
    with pytest.raises(FileExistsError, match="files that are not from this script"):
        claim(tmp_path, {"size": 1}, empty=True)


def run_losses(losses, tmp_path, scaler=None):
    """Run an engine whose losses are given, and give the number of the step at which it ended."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    engine = Engine(lambda engine, loss: {"loss": torch.tensor(loss)})
    engine.scaler = scaler
    RunLog(str(tmp_path), optimizer=optimizer).attach(engine)
    engine.run(losses, max_epochs=1)
    return engine.state.iteration


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_at_once_and_writes_nothing(tmp_path, loss):
    with pytest.raises(ValueError, match=rf"the loss is {loss:g} at step 3, in epoch 1 of 1; .*learning_rate than 0.5"):
        run_losses([1.0, 1.0, loss, 1.0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_with_a_gradient_scaler_a_few_such_steps_are_passed_over_and_many_are_not(tmp_path):
    scaler = SimpleNamespace(is_enabled=lambda: True)
    nan = float("nan")
    assert run_losses([1.0, nan, nan, *[1.0] * 30, *[nan] * 19], tmp_path, scaler) == 52
    with pytest.raises(ValueError, match="the loss is nan at step 21"):
        run_losses([1.0, *[nan] * 40], tmp_path, scaler)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_want_of_memory_is_told_with_the_settings_that_help(error):
    wrapped = RuntimeError("Failed to instantiate component")
    wrapped.__cause__ = error
    assert explanation(wrapped).startswith("out of memory (")
    said = out_of_memory(error, ["patch_size", "cache", "seed"])
    assert said.endswith("; try --patch_size with fewer voxels or --cache disk, or a device with more memory")


def test_a_loader_process_that_dies_is_told_with_the_setting_that_helps():
    # in a process of its own, since torch raises from a signal handler, wherever the process happens to be
    loader = torch.utils.data.DataLoader(SUITE["_Dies"](), 2, num_workers=1)
    status, output = SUITE["in_child"](lambda: list(loader), 60)
    assert status == 1
    assert "sentence: a loader process died, most likely for want of memory" in output
    assert output.strip().endswith("use fewer --num_workers, or 0")
    assert explanation(ConnectionResetError(104, "Connection reset by peer")) is None


def test_the_signal_of_a_dead_loader_may_arrive_while_its_error_is_explained(monkeypatch):
    dead, original = (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        errors.is_out_of_memory,
    )
    calls = []

    def interrupted(error):
        calls.append(error)
        if len(calls) == 1:
            raise dead
        return original(error)

    monkeypatch.setattr(errors, "is_out_of_memory", interrupted)
    assert explanation(EOFError()).startswith("a loader process died")
    assert calls[1] is dead


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_sentence():
    assert SUITE["processes"]()["total"] == {"survived": 0, "refused": 3, "unclear": 0, "lost": 0}


def test_a_librarys_own_file_that_cannot_be_written_is_named():
    error = RuntimeError("Failed to instantiate component")
    error.__cause__ = OSError(30, "Read-only file system", "/data/eval")
    assert explanation(error) == "/data/eval: Read-only file system; free space or choose a folder you may write"
    assert explanation(OSError(2, "No such file or directory", "/x")) is None


def test_an_error_nobody_foresaw_has_no_sentence():
    assert explanation(KeyError("x")) is None
    assert explanation(pickle.UnpicklingError("x")) is None
