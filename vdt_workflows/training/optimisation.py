"""What the published detection recipe does to gradients and learning rate, and MONAI's trainer does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR


def _steps_now(engine: Any) -> bool:
    """Whether the trainer's optimiser steps in this iteration, or only adds up gradients."""
    place = (engine.state.iteration - 1) % engine.state.epoch_length + 1
    return place % engine.accumulation_steps == 0 or place == engine.state.epoch_length


class ClipGradients:
    """Handler: scale the gradients down to a norm, before each step of the optimiser.

    With mixed precision they are unscaled first. With gradient accumulation the sum over the micro batches is clipped.

    Args:
        parameters: whose gradients; taken together.
        max_norm: Euclidean norm.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        self.parameters = list(parameters)
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Clip, if the trainer is about to step."""
        if not _steps_now(engine):
            return
        if engine.amp and engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_norm)


class StepSchedule:
    """Handler: step a learning rate schedule after each step of the optimiser, whatever is accumulated for it.

    Args:
        scheduler: any of torch's.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Step, if the optimiser did."""
        if _steps_now(engine):
            self.scheduler.step()


def warm_up(
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    warmup_steps: int = 500,
    drops: Sequence[float] | None = None,
    factor: float = 0.1,
) -> ChainedScheduler:
    """Schedule the learning rate by steps: a linear rise from a third of it, then drops, or a cosine to zero.

    Args:
        optimizer: whose rate.
        steps: of the whole training.
        warmup_steps: of the rise; 0 has none.
        drops: parts of the training, from 0 to 1, after which the rate is multiplied by `factor`; none for the cosine.
        factor: of a drop.
    """
    rise = LinearLR(optimizer, 1 / 3, total_iters=max(1, min(warmup_steps, steps))) if warmup_steps else None
    after: Any
    if drops is None:
        after = CosineAnnealingLR(optimizer, steps)
    else:
        after = MultiStepLR(optimizer, [math.ceil(part * steps) for part in drops], factor)
    return ChainedScheduler([rise, after] if rise else [after], optimizer)
