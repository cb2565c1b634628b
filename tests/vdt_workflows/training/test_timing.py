"""A training that is fitted to a time."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from vdt_workflows.training.timing import (
    CLOCKS,
    EVALUATION,
    MARGIN,
    KeepPace,
    PacedRate,
    fit_to_time,
    share_time,
    time_steps,
)


@pytest.mark.parametrize(
    ("left", "step", "case", "cases", "held_out", "epochs", "interval"),
    [
        (1800, 0.3, 0.2, 20, 60, 32, 2),
        (180, 0.3, 0.05, 31, 52, 16, 8),
        (3600, 1.0, 30.0, 10, 0, 20, 20),  # one validation takes five minutes: the last epoch alone has one
        (60, 3.0, 1.0, 2, 0, 5, 5),
    ],
)
def test_steps_and_validations_fill_the_time_and_not_more(left, step, case, cases, held_out, epochs, interval):
    found = share_time(left, step, case, cases, held_out)
    assert (found["epochs"], found["val_interval"]) == (epochs, interval)
    validations = epochs // interval
    taken = epochs * (found["steps_per_epoch"] * step + 1) + validations * cases * case
    taken += (EVALUATION + 2 * case * held_out) if held_out else 0
    assert MARGIN * left - (epochs + 1) * step <= taken <= MARGIN * left
    assert validations * cases * case <= max(0.05 * left, cases * case)


def test_a_time_too_short_is_refused_with_the_time_that_is_missing():
    with pytest.raises(ValueError, match=r"too few for ten steps and a validation here, at least 0\.7 more are needed"):
        share_time(1, 3.0, 1.0, 2, 0)


def fit(folder, network, optimizer, minutes=0.5, clock="wall", **more):
    batch = {"image": torch.ones(2, 1, 4, 4, 4), "label": torch.zeros(2, 1, 4, 4, 4)}
    return fit_to_time(
        minutes,
        str(folder / "time.json"),
        made_from={"batch": 2, **more},
        network=network,
        optimizer=optimizer,
        loss=lambda logits, labels: (logits - labels).square().mean(),
        inferer=lambda x, net: net(x),
        loader=[batch] * 10,
        validation=[{key: value[:1] for key, value in batch.items()}],
        validation_inferer=lambda x, net: net(x),
        postprocessing=lambda item: item,
        clock=clock,
    )


def test_timing_leaves_no_trace_and_its_numbers_are_taken_again(tmp_path):
    network = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.BatchNorm3d(1), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    before, state, random = copy.deepcopy((network.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    found = fit(tmp_path, network, optimizer)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert optimizer.state_dict() == state
    assert torch.equal(torch.get_rng_state(), random)
    assert found["epochs"] * found["steps_per_epoch"] * found["seconds_per_step"] < 30
    record = tmp_path / "time.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "epochs": 77}))
    assert fit(tmp_path, network, optimizer)["epochs"] == 77
    assert fit(tmp_path, network, optimizer, minutes=1)["epochs"] != 77  # another time, or another step, is measured
    record.write_text(json.dumps({**json.loads(record.read_text()), "epochs": 77}))
    assert fit(tmp_path, network, optimizer, minutes=1, patch=[8, 8, 8])["epochs"] != 77


def test_the_clock_of_the_process_counts_from_its_start_and_another_is_refused(tmp_path, monkeypatch):
    network = nn.Conv3d(1, 1, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    monkeypatch.setitem(CLOCKS, "cpu", itertools.count(100.0, 0.5).__next__)  # half a second from look to look
    found = fit(tmp_path, network, optimizer, minutes=10, clock="cpu")
    assert 480 < found["seconds_left"] < 500
    assert found["seconds_per_case"] == 0.5
    with pytest.raises(ValueError, match="clock must be 'wall' or 'cpu', got 'sun'"):
        fit(tmp_path, network, optimizer, clock="sun")


def run_in_time(seconds_of, timing, rate, monkeypatch, resumed_after=0, **more):
    """Run epochs that take `seconds_of(epoch)` on a clock of their own; give the time and the epochs."""
    clock = [1000.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: clock[0])
    engine = Engine(lambda engine, batch: None)

    @engine.on(Events.EPOCH_COMPLETED)
    def pass_time(engine):
        clock[0] += seconds_of(engine.state.epoch)

    if resumed_after:  # as ResumeRun does, which is attached before

        @engine.on(Events.STARTED)
        def resume(engine):
            engine.state.epoch, engine.state.iteration = resumed_after, resumed_after * timing["steps_per_epoch"]

    KeepPace(timing, rate, **more).attach(engine)
    engine.run([0] * timing["steps_per_epoch"], max_epochs=timing["epochs"])
    return clock[0] - 1000, engine.state.epoch


TIMING = {"seconds_left": 600.0, "seconds_per_case": 1.0, "epochs": 10, "steps_per_epoch": 5, "val_interval": 1}


@pytest.mark.parametrize("seconds", [lambda epoch: 20.0, lambda epoch: 60.0 if epoch < 4 else 15.0, lambda epoch: 90.0])
@pytest.mark.parametrize("held_out", [0, 50])
def test_a_run_fills_its_time_though_the_machine_is_faster_or_slower_than_it_was(monkeypatch, seconds, held_out):
    rate = PacedRate(50)
    taken, epochs = run_in_time(seconds, TIMING, rate, monkeypatch, held_out=held_out)
    time = 0.98 * 600 - (EVALUATION + 100 if held_out else 0)
    assert time - seconds(99) < taken <= time
    assert rate.total == 5 * epochs
    assert rate(rate.total) == 0
    assert rate(rate.total - 1) > 0


def test_a_run_ends_with_a_validation_and_a_killed_one_keeps_its_epochs(monkeypatch):
    slower = lambda epoch: 30.0 if epoch < 4 else 400.0  # noqa: E731
    _, epochs = run_in_time(slower, TIMING, PacedRate(50), monkeypatch, interval=3)
    assert epochs == 5  # which the validation knows for the last; after the fourth there was no time left
    taken, epochs = run_in_time(lambda epoch: 500.0, TIMING, PacedRate(65), monkeypatch, resumed_after=11)
    assert (taken, epochs) == (1000, 13)


@pytest.mark.parametrize(("seconds", "timed"), [(1.0, 6), (20.0, 1)])
def test_slow_steps_are_timed_less_often(seconds, timed):
    network, clock, seen = nn.Conv3d(1, 1, 1), [0.0], []

    def forward(x, net):
        clock[0] += seconds
        seen.append(1)
        return net(x)

    batch = {"image": torch.ones(1, 1, 2, 2, 2), "label": torch.zeros(1, 1, 2, 2, 2)}
    found = time_steps(
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        lambda logits, labels: (logits - labels).square().mean(),
        forward,
        [batch] * 50,
        amp=False,
        most=5.0,
        now=lambda: clock[0],
    )
    assert (found, len(seen)) == (seconds, 3 + timed)
