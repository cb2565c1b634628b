"""Steps of a training that MONAI's trainer does not have: clipping, learning rate schedules, the last validation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
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


def rates_by_layer(
    network: nn.Module, learning_rate: float, encoder_rate: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group a network's parameters for an optimiser, so that a pre-trained encoder moves less than what is new.

    The first group, whose rate the log shows, is the decoder and head. In the encoder the deepest stage has
    `learning_rate * encoder_rate`, and each shallower one `layer_decay` times the rate of the next; the stem is the
    last of these. MONAI's `generate_param_groups` takes groups that are listed one by one.

    Args:
        network: one whose encoder is called `backbone`; it may be wrapped.
        learning_rate: of decoder and head.
        encoder_rate: factor in the encoder; 0 keeps its weights, while batch norms still follow the data.
        layer_decay: factor from each stage to the shallower one.

    Returns:
        Groups with `params` and `lr`; one group if no rate differs, as `network.parameters()` would give.

    Raises:
        ValueError: if a factor is negative, or one is not 1 and the network has no encoder of that name.
    """
    if encoder_rate < 0 or layer_decay < 0:
        raise ValueError(f"encoder_rate and layer_decay must not be negative, got {encoder_rate} and {layer_decay}")
    rates: dict[float, list[nn.Parameter]] = {learning_rate: []}
    found = False
    for name, weight in network.named_parameters():
        _, encoder, inside = name.rpartition("backbone.")
        found |= bool(encoder)
        stage = int(inside[5]) if inside.startswith("layer") else 0
        rate = learning_rate * encoder_rate * layer_decay ** (4 - stage) if encoder else learning_rate
        rates.setdefault(rate, []).append(weight)
    if not found and (encoder_rate, layer_decay) != (1, 1):
        raise ValueError(f"encoder_rate and layer_decay must be 1, as {type(network).__name__} has no backbone")
    return [{"params": weights, "lr": rate} for rate, weights in rates.items()]


class AverageWeights:
    """Handler: keep an exponential average of a network's weights over the optimiser's steps.

    After t steps the average moves by max(1 - decay, 9 / (10 + t)) of its distance to the weights, so that it follows
    them closely at first. Running statistics of batch norms are averaged too; counters are copied.

    Args:
        network: the network that is trained, not wrapped for several processes.
        decay: share of the old average in the new one; 0 takes no average.

    Attributes:
        network: what is validated and saved: the average, or without one the trained network itself.

    Raises:
        ValueError: if `decay` is not at least 0 and below 1.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.trained = network
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False) if decay else network
        self.steps = 0

    def attach(self, engine: Engine) -> None:
        """Register with a MONAI trainer."""
        if self.decay:
            engine.add_event_handler(Events.STARTED, self._begin)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _begin(self, engine: Engine) -> None:
        """Start from the weights of the first step, unless a killed run goes on."""
        if not self.steps:
            self._move(1.0)

    def __call__(self, engine: Any) -> None:
        """Move the average, if the optimiser stepped."""
        if _steps_now(engine):
            self.steps += 1
            self._move(max(1 - self.decay, 9 / (10 + self.steps)))

    @torch.no_grad()
    def _move(self, share: float) -> None:
        own, theirs = (itertools.chain(n.parameters(), n.buffers()) for n in (self.network, self.trained))
        for average, weight in zip(own, theirs, strict=True):
            if average.is_floating_point():
                average.lerp_(weight, share)
            else:
                average.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """Give the average and the number of steps, for `ResumeRun`."""
        return {"steps": self.steps, "network": self.network.state_dict() if self.decay else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average of the killed run back."""
        self.steps = state["steps"]
        if self.decay:
            self.network.load_state_dict(state["network"])


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
