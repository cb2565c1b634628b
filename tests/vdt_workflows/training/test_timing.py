"""A training that is fitted to a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from vdt_workflows.training.timing import EVALUATION, MARGIN, fit_to_time, share_time


@pytest.mark.parametrize(
    ("left", "step", "case", "cases", "held_out", "epochs", "interval"),
    [
        (1800, 0.3, 0.2, 20, 60, 20, 1),
        (180, 0.3, 0.05, 31, 52, 8, 1),
        (3600, 1.0, 30.0, 10, 0, 10, 10),  # one validation takes five minutes: the last epoch alone has one
        (60, 3.0, 1.0, 2, 0, 2, 1),
    ],
)
def test_steps_and_validations_fill_the_time_and_not_more(left, step, case, cases, held_out, epochs, interval):
    found = share_time(left, step, case, cases, held_out)
    assert (found["epochs"], found["val_interval"]) == (epochs, interval)
    validations = epochs // interval
    taken = epochs * found["steps_per_epoch"] * step + validations * (cases * case + 1)
    taken += (EVALUATION + 2 * case * held_out) if held_out else 0
    assert MARGIN * left - (epochs + 1) * step <= taken <= MARGIN * left
    assert validations * cases * case <= max(0.15 * left, cases * case)


def test_a_time_too_short_is_refused_with_the_time_that_is_missing():
    with pytest.raises(ValueError, match=r"too few for ten steps and a validation here, at least 0\.7 more are needed"):
        share_time(1, 3.0, 1.0, 2, 0)


def fit(folder, network, optimizer, minutes=0.5, **more):
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
