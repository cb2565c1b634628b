from __future__ import annotations

import multiprocessing

import pytest
import torch
from monai.losses import DiceCELoss
from torch import distributed

from vdt_workflows.training.losses import SharedCrossEntropyLoss, SharedDiceCELoss

FORK = multiprocessing.get_context("fork")
OPTIONS = {
    "organs": {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True},
    "weights": {
        **{"softmax": True, "to_onehot_y": True, "batch": True, "squared_pred": True, "lambda_dice": 0.5},
        **{"weight": torch.tensor([0.2, 1.0, 3.0]), "smooth_nr": 1.0, "smooth_dr": 2.0},
    },
    "each sample": {"softmax": True, "to_onehot_y": True, "weight": torch.tensor([0.2, 1.0, 3.0])},
    "cross-entropy": {"label_smoothing": 0.0, "weight": torch.tensor([0.2, 1.0, 3.0])},
}


def draw():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 6, 7, generator=generator), torch.randint(3, (4, 1, 5, 6, 7), generator=generator)


def measure(logits, labels, options, dice=DiceCELoss, cross_entropy=torch.nn.CrossEntropyLoss):
    if "softmax" in options:
        return dice(**options)(logits, labels)
    return cross_entropy(**options)(logits, labels[:, 0])


def work(rank, store, options, pipe):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    logits, labels = draw()
    share = logits[rank::2].clone().requires_grad_()
    loss = measure(share, labels[rank::2], options, SharedDiceCELoss, SharedCrossEntropyLoss)
    loss.backward()
    pipe.send((loss.item(), share.grad / 2))  # as DistributedDataParallel takes the mean of gradients
    pipe.recv()


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path, name):
    logits, labels = draw()
    logits.requires_grad_()
    measure(logits, labels, OPTIONS[name]).backward()
    pipes = [FORK.Pipe() for _ in range(2)]
    started = [
        FORK.Process(target=work, args=(rank, str(tmp_path / "store"), OPTIONS[name], theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in started:
        process.start()
    grads = [ours.recv()[1] for ours, _ in pipes]
    for ours, _ in pipes:
        ours.send("end")
    for process in started:
        process.join()
    for rank, grad in enumerate(grads):
        torch.testing.assert_close(grad, logits.grad[rank::2], atol=1e-7, rtol=1e-5)


def test_in_one_process_the_loss_is_that_of_monai():
    logits, labels = draw()
    options = OPTIONS["weights"]
    assert SharedDiceCELoss(**options)(logits, labels) == DiceCELoss(**options)(logits, labels)
