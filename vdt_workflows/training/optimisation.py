"""Steps of a training that MONAI's trainer does not have: clipping, learning rate schedules, the last validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import ValidationHandler
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
        parameters: the parameters.
        max_norm: largest Euclidean norm of all their gradients together.
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


@dataclass(eq=False)
class StepSchedule:
    """Handler: step a learning rate schedule after each step of the optimiser, also with gradient accumulation.

    Args:
        scheduler: any of torch's.
    """

    scheduler: LRScheduler

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
    milestones: Sequence[float] | None = None,
    factor: float = 0.1,
) -> ChainedScheduler:
    """Schedule the learning rate by steps: a linear rise from a third of it, then steps down, or a cosine to zero.

    Args:
        optimizer: the optimiser.
        steps: steps of the whole training.
        warmup_steps: steps of the rise; 0 for none.
        milestones: parts of the training, from 0 to 1, after which the rate is multiplied by `factor`; none for the
            cosine.
        factor: factor at each milestone.
    """
    schedules: list[LRScheduler] = []
    if warmup_steps:
        schedules.append(LinearLR(optimizer, 1 / 3, total_iters=max(1, min(warmup_steps, steps))))
    if milestones is None:
        schedules.append(CosineAnnealingLR(optimizer, steps))
    else:
        schedules.append(MultiStepLR(optimizer, [math.ceil(part * steps) for part in milestones], factor))
    return ChainedScheduler(schedules, optimizer)


def polynomial_rate(step: int, *, total: int, power: float = 0.9, floor: float = 0.0, warmup: int = 0) -> float:
    """Give the factor of a learning rate after `step` steps: (1 - floor) (1 - step / total)^power + floor.

    It is meant for `torch.optim.lr_scheduler.LambdaLR`, as `functools.partial(polynomial_rate, total=...)`;
    `PolynomialLR` has neither a floor nor a warm-up.

    Args:
        step: steps done so far.
        total: steps of the whole run.
        power: 0.9 in the published recipes.
        floor: the factor that is left at the end; the published recipes end at a rate of 1e-6.
        warmup: steps of a linear rise, which multiplies the factor.

    Raises:
        ValueError: if `total` is below one.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    factor = (1 - floor) * (1 - min(step / total, 1)) ** power + floor
    return factor * min(1.0, (step + 1) / warmup) if warmup > 0 else factor


class ValidateEpochs(ValidationHandler):
    """Handler: MONAI's, and the last epoch is validated whatever the interval, so that no run ends without a score.

    Args:
        interval: epochs from one validation to the next.
        validator: the evaluator.
    """

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""

        def is_due(trainer: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == trainer.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=is_due), self)
