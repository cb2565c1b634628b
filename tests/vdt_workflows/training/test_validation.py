from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from vdt_workflows.training.validation import ValidateEpochs


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
