from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.transforms import RandGaussianNoised
from torch import nn

from networks import ResNet3D, ResNet3DClassifier, load_pretrained
from tests.support.folders import ROOT
from vdt_transforms import RandSliceShuffled
from vdt_workflows.data.sampling import SeededDataset, SeededSampler, SeedEpochs
from vdt_workflows.training.checkpoints import (
    LoadWeights,
    ResumeRun,
    SaveWeights,
    bare,
    load_weights,
    read_provenance,
    save_weights,
)
from vdt_workflows.training.runs import RememberRun, RunLog

# Processes of their own without the seconds of importing torch again. They are not forked from this one: where a test
# before has run autograd's threads, torch refuses to do so in a fork.
FORKS = multiprocessing.get_context("forkserver")


def same(a, b):
    """Whether two nested states hold the same values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# Weights


def classifier(num_classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return ResNet3DClassifier(18, num_classes, base_channels=4, **options)


PROVENANCE = {"data": "ten pictures", "mean": 114.495, "class_names": ["a", "b"], "nested": {"size": [1, 2], "n": None}}


def tensors(network):
    return dict(bare(network).state_dict())


def load_at_the_start(network, file):
    engine = Engine(lambda engine, batch: None)
    LoadWeights(network, file).attach(engine)
    engine.run([0])


@pytest.mark.parametrize("make", [classifier, lambda **options: ResNet3D(18, base_channels=4)])
@pytest.mark.parametrize("load", [load_weights, load_at_the_start])
def test_weights_come_back_bit_for_bit_with_their_provenance(tmp_path, make, load):
    file, network, other = tmp_path / "model.pt", make(), make(seed=1)
    save_weights(network, file, PROVENANCE)
    load(other, file)
    assert same(tensors(other), tensors(network))
    assert read_provenance(file) == PROVENANCE
    assert same(dict(torch.load(file, weights_only=True)), tensors(network))  # as every tool reads it


def test_provenance_does_not_stick_to_the_network_and_files_of_other_origin_have_none(tmp_path):
    network = classifier()
    save_weights(network, tmp_path / "a.pt", PROVENANCE)
    save_weights(network, tmp_path / "b.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pt")
    assert read_provenance(tmp_path / "b.pt") == read_provenance(tmp_path / "plain.pt") == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: ResNet3DClassifier(34, 3, base_channels=4), r"depth=18 \(here 34\)", id="depth"),
        pytest.param(lambda: classifier(strides=(1, 2, 2, 1)), r"strides=\[1, 2, 2, 2\] \(here \[1, 2", id="strides"),
        pytest.param(lambda: classifier(5), r"made by another architecture .*fc\.weight.* and 1 more", id="classes"),
        pytest.param(lambda: ResNet3DClassifier(18, 3, base_channels=8), "another architecture", id="width"),
        pytest.param(lambda: nn.Linear(2, 2), "another architecture", id="linear"),
    ],
)
def test_weights_of_another_architecture_are_refused_in_one_sentence(tmp_path, make, message):
    save_weights(classifier(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt: .*{message}") as error:
        load_weights(make(), tmp_path / "model.pt")
    assert "\n" not in str(error.value)


def test_a_file_of_other_origin_must_fill_the_whole_network(tmp_path):
    network, other = classifier(), classifier(seed=1)
    plain = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": plain}, tmp_path / "whole.pt")
    load_weights(other, tmp_path / "whole.pt")
    assert same(tensors(other), tensors(network))
    torch.save({k: v for k, v in plain.items() if "fc" not in k}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part\.pt: has no weights for .*fc\.weight"):
        load_weights(other, tmp_path / "part.pt")


VALUES = {  # what a weight of a damaged file, or of a failed training, may become
    "nan": ("backbone.conv1.weight", lambda t: t.fill_(float("nan"))),
    "inf": ("head.fc.bias", lambda t: t.index_fill_(0, torch.tensor(1), float("-inf"))),
    "absurd": ("backbone.layer1.0.conv1.weight", lambda t: t.flatten()[3:4].fill_(1e38)),
    "variance": ("backbone.bn1.running_var", lambda t: t[2:3].fill_(-1e-3)),
    "whole numbers": ("backbone.bn1.weight", lambda t: t.to(torch.int8)),
    "truth values": ("backbone.conv1.weight", lambda t: t > 0),
}


@pytest.mark.parametrize("load", [load_weights, load_pretrained, load_at_the_start])
@pytest.mark.parametrize("bare_dict", [False, True], ids=["written by save_weights", "of other origin"])
@pytest.mark.parametrize("name", VALUES)
def test_values_that_no_trained_network_has_are_refused_by_tensor_and_file(tmp_path, load, bare_dict, name):
    network, other = classifier(), classifier(seed=1)
    before = {name: value.clone() for name, value in tensors(other).items()}
    state, (key, change) = network.state_dict(), VALUES[name]
    changed = change(state[key])
    state[key] = changed if changed.dtype != torch.float32 else state[key]
    torch.save(dict(state) if bare_dict else state, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=rf"model\.pt: {key} (holds values from|is (int8|bool), the network has float32)"
    ):
        load(other, str(tmp_path / "model.pt"))
    assert same(tensors(other), before)


def test_weights_in_half_precision_and_large_variances_are_taken(tmp_path):
    network, other = classifier(), classifier(seed=1)
    network.backbone.bn1.running_var.fill_(1e12)
    torch.save(dict(network.state_dict()), tmp_path / "model.pt")
    load_weights(other, tmp_path / "model.pt")
    assert same(tensors(other), tensors(network))
    torch.save({k: v.half() for k, v in classifier().state_dict().items()}, tmp_path / "half.pt")
    load_weights(other, tmp_path / "half.pt")


def test_a_run_json_that_contradicts_its_checkpoint_is_refused(tmp_path, monkeypatch):
    network = classifier()
    model, record = tmp_path / "model.pt", tmp_path / "run.json"
    provenance = {"mean": 1.0, "patch_size": (8, 8), "class_names": ["@home", "b"], "init": "scratch"}
    save_weights(network, model, provenance)
    load_at_the_start(network, str(model))  # one alone
    engine = Engine(lambda engine, batch: None)
    engine.state.device = "cpu"
    settings = {name: value for name, value in provenance.items() if name != "init"}
    RememberRun(str(record), settings)(engine)
    load_at_the_start(network, str(model))
    content = record.read_text()
    record.write_text(content.replace('"mean": 1.0', '"mean": 100.0'))
    with pytest.raises(ValueError, match=r"run\.json: contradicts .*model\.pt, .* \(mean 100\.0, not 1\.0\); give the"):
        load_at_the_start(network, str(model))
    record.write_text(content[:-5])
    with pytest.raises(ValueError, match=r"run\.json: no settings of a run"):
        load_at_the_start(network, str(model))
    record.write_text(content)
    save_weights(torch.nn.Linear(2, 2), model, provenance)
    broken = torch.load(model, weights_only=True)
    broken["weight"][:] = float("nan")
    torch.save(broken, model)
    with pytest.raises(ValueError, match=r"^[^ ]*model\.pt: weight holds values from nan to nan, .* damaged"):
        load_at_the_start(network, str(model))  # what is wrong is not the sound run.json
    save_weights(network, model, provenance)
    other = tmp_path / "other.json"
    other.write_text('{"patch_size": [8, 9]}')
    monkeypatch.setattr("vdt_workflows.training.checkpoints.given_files", lambda: [other])
    with pytest.raises(ValueError, match=r"other\.json: contradicts .*\(patch_size \[8, 9\], not \[8, 8\]\)"):
        load_at_the_start(network, str(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epoch": 0}, "epoch 0, step 2"),
        ({"epoch": 3}, "epoch 3, step 2"),
        ({"iteration": "2"}, "not written by ResumeRun"),
        ({"objects": {"network": {"a.weight": torch.full((2,), float("nan"))}}}, "network: a.weight holds values"),
    ],
)
def test_a_state_of_a_run_with_values_that_cannot_be_is_refused(tmp_path, change, reason):
    state = {"settings": {}, "epoch": 1, "iteration": 2, "objects": {}, "scaler": {}} | change
    torch.save(state, tmp_path / "resume.pt")
    with pytest.raises(ValueError, match=rf"resume\.pt: not a whole state of a run \({reason}.*; delete it to start"):
        ResumeRun(str(tmp_path / "resume.pt"), {}).load(None)


def test_a_missing_or_damaged_file_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint file"):
        load_weights(classifier(), tmp_path / "none.pt")
    save_weights(classifier(), tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt: not a whole PyTorch checkpoint .*copy or download it again"):
        load_weights(classifier(), tmp_path / "cut.pt")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_network_is_taken_out_of_compile_and_distributed_data_parallel(tmp_path, parallel):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network, other = classifier(), classifier(seed=1)
        wrap = nn.parallel.DistributedDataParallel if parallel else partial(torch.compile, backend="eager")
        assert bare(wrap(network)) is bare(network) is network
        save_weights(wrap(network), tmp_path / "model.pt")
        load_weights(wrap(other), tmp_path / "model.pt")
    finally:
        torch.distributed.destroy_process_group()
    assert list(torch.load(tmp_path / "model.pt", weights_only=True)) == list(network.state_dict())
    assert same(tensors(other), tensors(network))


def test_the_best_weights_are_kept_and_the_best_score_is_remembered(tmp_path):
    network = nn.Linear(1, 1, bias=False)

    def evaluate(scores, best=None, writes=True):
        """Which epoch's weights are in the file."""
        save = SaveWeights(network, tmp_path / "best.pt", metric="score", writes=writes)
        if best is not None:
            save.load_state_dict(best)
        for number, score in enumerate(scores):
            nn.init.constant_(network.weight, number)
            engine = Engine(lambda engine, batch: None)
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e, score=score: e.state.metrics.update(score=score))
            save.attach(engine)
            engine.run([0])
        return int(torch.load(tmp_path / "best.pt", weights_only=True)["weight"]), save.state_dict()

    assert evaluate([0.1, 0.5, torch.tensor(0.5), 0.3]) == (1, {"best": 0.5})
    assert evaluate([0.0, 0.4], {"best": 0.5}) == (1, {"best": 0.5})  # nothing new in the file
    assert evaluate([0.0, 0.4, float("nan"), 0.6], {"best": 0.5}) == (3, {"best": 0.6})
    nan = float("nan")
    assert evaluate([nan, nan, 0.2, nan, 0.1]) == (2, {"best": 0.2})
    assert evaluate([nan, nan])[0] == 1  # the last, where no epoch has a score
    assert evaluate([0.9], writes=False) == (1, {"best": 0.9})


# ResumeRun

EPOCHS, STEPS = 4, 3


class StopError(Exception):
    """What goes wrong in the middle of a run."""


class Run:
    """A small training in a folder, with everything that remembers; started anew it goes on by itself."""

    def __init__(self, folder, epochs=EPOCHS, width=4, stop_at=None, wrap=lambda network: network):
        torch.manual_seed(0)
        self.folder = folder
        convolution = [nn.Conv3d(1, width, 3, padding=1), nn.BatchNorm3d(width), nn.ReLU()]
        self.network = wrap(nn.Sequential(*convolution, nn.Dropout(0.3), nn.Flatten(), nn.Linear(width * 48, 3)))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.validator = Engine(lambda engine, batch: None)
        self.validator.add_event_handler(Events.EPOCH_COMPLETED, self.score)
        self.log = RunLog(folder, self.validator, self.optimizer)
        self.best = SaveWeights(self.network, folder / "best.pt", metric="score")
        self.best.attach(self.validator)
        self.stop_at = stop_at
        images = np.random.default_rng(0).normal(size=(7, 1, 3, 4, 4)).astype(np.float32)
        data = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
        dataset = SeededDataset(data, [RandGaussianNoised("image", prob=0.5), RandSliceShuffled("image")])
        sampler = SeededSampler(dataset, samples=2 * STEPS)
        objects = {"network": self.network, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.resume = ResumeRun(folder / "resume.pt", {**objects, "log": self.log, "best": self.best})
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=epochs,
            train_data_loader=DataLoader(dataset, batch_size=2, sampler=sampler),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.CrossEntropyLoss(),
            decollate=False,
        )
        SeedEpochs(sampler).attach(self.trainer)
        self.trainer.add_event_handler(Events.ITERATION_STARTED, self.check_stop)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self.scheduler.step())
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self.validator.run([0]))
        self.log.attach(self.trainer)
        SaveWeights(self.network, folder / "model.pt").attach(self.trainer)
        self.resume.attach(self.trainer)

    def score(self, engine):
        """A score that goes up and down."""
        engine.state.metrics["score"] = -bare(self.network)[0].weight.mean().item()

    def check_stop(self, engine):
        if engine.state.iteration == self.stop_at:
            raise StopError

    def run(self):
        self.trainer.run()
        return self

    def rows(self):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in self.log.rows]

    def result(self):
        states = (bare(self.network).state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict())
        return [dict(state) for state in states] + [self.rows(), self.best.state_dict(), self.files()]

    def files(self):
        return {name: dict(torch.load(self.folder / name, weights_only=True)) for name in ("best.pt", "model.pt")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A function that makes folders; runs in them draw no pictures."""
    monkeypatch.setattr("vdt_workflows.training.runs.draw_curves", lambda rows, title: b"")

    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def stop(folder, at, **options):
    """Break a run in an iteration, and give the state that it leaves."""
    with pytest.raises(StopError):
        Run(folder, stop_at=at, **options).run()
    state = folder / "resume.pt"
    return state.read_bytes() if state.exists() else None


@pytest.mark.parametrize("stop_at", [1, STEPS + 1, 2 * STEPS + 2, EPOCHS * STEPS])
def test_a_run_that_stopped_goes_on_and_ends_bit_for_bit_like_one_that_did_not(folder, stop_at):
    whole, where = Run(folder("whole")).run(), folder("stopped")
    assert bool(stop(where, stop_at)) == (stop_at > STEPS)
    resumed = Run(where).run()
    assert resumed.trainer.state.epoch == EPOCHS
    assert resumed.trainer.state.iteration == EPOCHS * STEPS
    assert same(resumed.result(), whole.result())
    assert [row["epoch"] for row in resumed.rows()] == [1, 2, 3, 4]
    with (where / "history.csv").open() as rows:
        assert [row["epoch"] for row in csv.DictReader(rows)] == ["1", "2", "3", "4"]


def test_a_finished_run_leaves_no_state_and_the_next_one_starts_afresh(folder):
    where = folder("run")
    first = Run(where).run().result()
    assert sorted(os.listdir(where)) == ["best.pt", "curves.png", "history.csv", "model.pt"]
    assert same(Run(where).run().result(), first)


def test_a_run_killed_between_its_last_epoch_and_its_end_only_finishes(folder, monkeypatch):
    where = folder("run")
    monkeypatch.setattr(ResumeRun, "finish", lambda self, engine: None)
    first = Run(where).run()
    assert (where / "resume.pt").exists()
    monkeypatch.undo()
    again = Run(where, stop_at=EPOCHS * STEPS + 1).run()
    assert not (where / "resume.pt").exists()
    assert same(again.result(), first.result())


def plain(network):
    return network


@pytest.mark.filterwarnings("ignore:Dynamo detected")  # about MONAI's MetaTensor
@pytest.mark.parametrize("wrap", [plain, partial(torch.compile, backend="eager")], ids=["plain", "compiled"])
def test_a_run_that_stops_after_every_epoch_ends_alike_in_and_out_of_compile(folder, wrap):
    whole, where = Run(folder("whole")).run(), folder("stopped")
    for number, wrapping in enumerate((plain, wrap, wrap), 1):
        stop(where, number * STEPS + 1, wrap=wrapping)
    assert same(Run(where).run().result(), whole.result())


def test_the_scaler_of_mixed_precision_goes_on(tmp_path):
    scales = []
    for scale in (8.0, 1.0):
        engine = Engine(lambda engine, batch: None)
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        resume = ResumeRun(tmp_path / "resume.pt", {"network": nn.Linear(1, 1)})
        engine.add_event_handler(Events.STARTED, resume.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, resume.save)
        engine.run([0], max_epochs=1)
        scales.append(engine.scaler.get_scale())
    assert scales == [8.0, 8.0]


@pytest.mark.parametrize("content", [0.0, 0.01, 0.5, 0.99, {"weight": torch.zeros(1)}, torch.zeros(1)], ids=str)
def test_a_damaged_state_or_another_file_is_refused_with_what_to_do(folder, content):
    where = folder("run")
    if isinstance(content, float):
        whole = stop(where, STEPS + 1)
        (where / "resume.pt").write_bytes(whole[: int(content * len(whole))])
    else:
        torch.save(content, where / "resume.pt")
    with pytest.raises(ValueError, match=r"resume\.pt: not a whole state of a run .*; delete it to start afresh"):
        Run(where).run()


def test_processes_that_do_not_write_still_resume(tmp_path):
    def process(writes, rank_epochs):
        network = nn.Linear(1, 1)
        resume = ResumeRun(tmp_path / "resume.pt", {"network": network}, writes=writes)
        engine = Engine(lambda engine, batch: None)
        resume.attach(engine)
        engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda engine: engine.terminate("skip_completed"))
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: rank_epochs.append(engine.state.epoch))
        engine.run([0], max_epochs=3)
        return network.state_dict()

    epochs = []
    process(False, epochs)
    assert os.listdir(tmp_path) == []
    written = process(True, epochs)
    assert same(dict(process(False, epochs)), dict(written))
    assert epochs[-1] == 2
    assert os.listdir(tmp_path) == ["resume.pt"]


# A process that is killed


def train_until_killed(folder, width):
    torch.set_num_threads(1)
    Run(folder, epochs=5, width=width).run()


def start(folder, width):
    FORKS.set_forkserver_preload([__name__])
    process = FORKS.Process(target=train_until_killed, args=(folder, width))
    with patch.dict(os.environ, PYTHONPATH=str(ROOT)):  # where the server, which starts with the first, finds this file
        process.start()
    return process


def wait_for_a_write(process, folder):
    """Wait until a file in the folder is begun, so that a kill falls into its writing."""

    def times():
        with os.scandir(folder) as files:
            return {file.name: file.stat().st_mtime_ns for file in files}

    with suppress(FileNotFoundError):  # a file was renamed while being looked at
        before = times()
        while process.is_alive() and times() == before:
            pass


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not_and_leaves_no_half_file(folder):
    width = 4000  # files of some megabytes, which take a while to write
    whole, where = folder("whole"), folder("killed")
    start(folder("first"), 4).join()  # starts the server, which takes the seconds of importing torch
    begin = time.monotonic()
    process = start(whole, width)
    process.join()
    duration = time.monotonic() - begin
    assert process.exitcode == 0
    rng, kills = random.Random(0), 0
    while process.exitcode == 0 or kills < 10:
        process = start(where, width)
        process.join(rng.uniform(0.1, 0.9) * duration)
        if kills % 2:
            wait_for_a_write(process, where)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        for file in where.glob("*.pt"):  # the names of temporary files begin with a dot
            torch.load(file, weights_only=True)
    process = start(where, width)
    process.join()
    assert process.exitcode == 0
    for name in ("model.pt", "best.pt"):
        assert same(*(dict(torch.load(place / name, weights_only=True)) for place in (whole, where)))
    histories = []
    for place in (whole, where):
        with (place / "history.csv").open() as rows:
            histories.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(rows)])
    assert histories[0] == histories[1]
    assert not (where / "resume.pt").exists()
