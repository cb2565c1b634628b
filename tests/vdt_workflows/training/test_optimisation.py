from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from networks import DepthFirst, ResUNet3D
from vdt_workflows.training.optimisation import AverageWeights, ValidateEpochs, polynomial_rate, rates_by_layer


def test_rate_falls_from_one_to_the_floor_and_stays_there():
    rates = [polynomial_rate(step, total=100, floor=0.01) for step in range(121)]
    assert rates[0] == 1
    assert rates[100] == rates[120] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(0.99 * 0.5**0.9 + 0.01)


def test_rate_rises_over_the_warm_up():
    assert [polynomial_rate(step, total=10**9, warmup=4) for step in range(6)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1], abs=1e-6
    )


def test_without_floor_it_is_torchs_polynomial():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=0.9)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * polynomial_rate(step, total=50))
        optimizer.step()
        scheduler.step()


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="total must be at least 1, got 0"):
        polynomial_rate(0, total=0)


@pytest.mark.parametrize(
    ("interval", "epochs", "due"), [(2, 5, [2, 4, 5]), (5, 1, [1]), (3, 6, [3, 6]), (1, 2, [1, 2])]
)
def test_every_interval_and_the_last_epoch_are_validated_once(interval, epochs, due):
    network, data = torch.nn.Linear(1, 1), [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}]
    seen = []
    evaluator = SupervisedEvaluator("cpu", data, network)
    evaluator.run = lambda epoch: seen.append(epoch)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    handlers = [ValidateEpochs(interval, evaluator)]
    SupervisedTrainer(
        "cpu", epochs, data, network, optimizer, torch.nn.functional.mse_loss, train_handlers=handlers
    ).run()
    assert seen == due


def train_average(decay, epochs=2, resumed=None):
    """Train one weight, whose value is noted behind each step, and give the handler and the values."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    data = [{"image": torch.randn(4, 1), "label": torch.ones(4, 1)} for _ in range(3)]
    handler, values = AverageWeights(network, decay), [network[0].weight.item()]
    if resumed:
        handler.load_state_dict(resumed)
    optimizer = torch.optim.SGD(network.parameters(), 0.3)
    note = lambda engine: values.append(network[0].weight.item())  # noqa: E731
    trainer = SupervisedTrainer("cpu", epochs, data, network, optimizer, torch.nn.functional.mse_loss)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    handler.attach(trainer)
    trainer.run()
    return handler, values


def test_the_average_follows_closely_at_first_and_then_by_the_decay():
    handler, values = train_average(0.3)
    average = values[0]
    for step, value in enumerate(values[1:], 1):
        average += max(0.7, 9 / (10 + step)) * (value - average)
    assert handler.network[0].weight.item() == pytest.approx(average, abs=1e-6)
    assert handler.network[0].weight.item() != values[-1]
    assert handler.network[1].num_batches_tracked == 6
    assert not handler.network.training


def test_a_resumed_average_goes_on_where_it_was():
    whole, _ = train_average(0.3)
    kept = whole.state_dict()
    assert kept["steps"] == 6
    again = AverageWeights(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)), 0.3)
    again.load_state_dict(kept)
    assert torch.equal(again.network[0].weight, whole.network[0].weight)
    assert train_average(0.3, resumed=kept)[0].steps == 12


def test_without_a_decay_the_trained_network_itself_is_validated():
    handler, values = train_average(0.0)
    assert handler.network[0].weight.item() == values[-1]
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1, got 1"):
        AverageWeights(handler.network, 1.0)


def test_encoder_learns_slower_from_stage_to_stage_and_the_log_shows_the_rate_of_the_rest():
    network = DepthFirst(ResUNet3D(2, 18, base_channels=2))
    groups = rates_by_layer(network, 0.1, encoder_rate=0.5, layer_decay=0.5)
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    own = {name: rates[id(weight)] for name, weight in network.named_parameters()}  # each is in a group
    backbone = "network.backbone."
    expected = {
        "conv1": 0.003125,
        "bn1": 0.003125,
        "layer1": 0.00625,
        "layer2": 0.0125,
        "layer3": 0.025,
        "layer4": 0.05,
    }
    assert {
        name.removeprefix(backbone).split(".")[0]: rate for name, rate in own.items() if backbone in name
    } == expected
    assert {rate for name, rate in own.items() if backbone not in name} == {0.1}
    assert groups[0]["lr"] == 0.1
    assert sum(len(group["params"]) for group in groups) == len(own)


def test_equal_rates_are_one_group_in_the_order_of_the_network():
    network = ResUNet3D(2, 18, base_channels=2)
    (group,) = rates_by_layer(network, 0.1)
    assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))


def test_rates_of_an_encoder_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="must be 1, as Linear has no backbone"):
        rates_by_layer(torch.nn.Linear(2, 2), 0.1, encoder_rate=0.5)
    with pytest.raises(ValueError, match="must not be negative, got -1 and 1"):
        rates_by_layer(torch.nn.Linear(2, 2), 0.1, encoder_rate=-1)
