from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from vdt_workflows.training.optimisation import ValidateEpochs, polynomial_rate


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
