"""A training fitted to a time: what a step and a validation take here, and how many of each there is time for."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from torch import distributed, nn

from vdt_workflows.errors import check_choice
from vdt_workflows.files import write_json
from vdt_workflows.progress import open_bar
from vdt_workflows.training.checkpoints import bare
from vdt_workflows.training.optimisation import polynomial_rate
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)

WARM_UP, LEAST = 3, 5  # steps that are not timed, and that are
EPOCH = 1.0  # seconds that the end of an epoch takes: weights, state and curves
EVALUATION = 15.0  # seconds until a later evaluation begins
MARGIN = 0.95  # of the time, since machines are not equally fast all the time
VALIDATING = 0.05  # of the time, at most; one validation there is always
MOST_VALIDATIONS = 20
SHORTEST, LOOKS = 10.0, 20  # seconds of an epoch; of a longer time a 20th, since less than an epoch stays unused
CLOCKS = {"wall": time.time, "cpu": time.process_time}  # seconds since 1970, or of this process


def fit_to_time(
    minutes: float,
    record: str,
    *,
    began: float = 0.0,
    made_from: Mapping[str, Any],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., torch.Tensor],
    inferer: Callable[..., torch.Tensor],
    loader: Iterable[Any],
    accumulation: int = 1,
    validation: Sequence[Any],
    validation_inferer: Callable[..., Any],
    postprocessing: Callable[[Any], Any],
    held_out: int = 0,
    amp: bool = False,
    clock: str = "wall",
) -> dict[str, Any]:
    """Time some steps and one validation case, and give the epochs, steps and validations that fit the time.

    The steps leave no trace: weights, optimiser and random state are put back. The numbers are recorded, and a run that
    goes on takes them from there, so that it ends as it would have without the interruption.

    Args:
        minutes: of the whole run, with an evaluation of `held_out` cases after it.
        record: JSON file of the numbers.
        began: when the time began, in seconds since 1970; 0 is now. On the clock `cpu` the process began it.
        made_from: plain values on which the numbers depend; a record of others is not taken.
        network: as the trainer has it.
        optimizer: of the network.
        loss: of logits and labels.
        inferer: of the trainer.
        loader: batches as the trainer gets them, some hundreds.
        accumulation: batches of a step.
        validation: loader of single cases.
        validation_inferer: what segments a case.
        postprocessing: what follows for each case.
        held_out: cases that are evaluated afterwards.
        amp: whether precision is mixed.
        clock: "wall", or "cpu" for the time that this process computes, whatever else the machine does; for comparisons
            of methods, with `num_workers` 0, since processes of their own are not counted.

    Returns:
        `epochs`, `steps_per_epoch` and `val_interval`, and what they were found from.

    Raises:
        ValueError: if there is no time for one short epoch, or no such clock.
    """
    check_choice("clock", clock, tuple(CLOCKS))
    path = Path(record)
    made_from = json.loads(json.dumps({**made_from, "minutes": minutes, "clock": clock}, default=str))
    if path.is_file() and (kept := json.loads(path.read_text()))["made_from"] == made_from:
        logger.info("%s: steps as they were fitted before", path)
        return kept
    now = CLOCKS[clock]
    began = 0.0 if clock == "cpu" else began or now()
    left = 60 * minutes - (now() - began)
    step = accumulation * time_steps(
        network, optimizer, loss, inferer, loader, amp=amp, most=max(3.0, 0.03 * left), now=now
    )
    case = time_case(bare(network), validation, validation_inferer, postprocessing, amp=amp, now=now)
    left = 60 * minutes - (now() - began)
    numbers = share_time(left, step, case, len(validation), held_out)
    shared = [{"seconds_per_step": step, "seconds_per_case": case, "seconds_left": left, **numbers}]
    if distributed.is_initialized():
        distributed.broadcast_object_list(shared)
    fitted = {**shared[0], "made_from": made_from}
    if is_first_process():
        write_json(path, fitted)
    logger.info(
        "%.3g s a step and %.3g s a case: %d epochs of %d steps fit the %.1f of %g minutes that are left",
        *(fitted[k] for k in ("seconds_per_step", "seconds_per_case", "epochs", "steps_per_epoch")),
        left / 60,
        minutes,
    )
    return fitted


def share_time(left: float, step: float, case: float, cases: int, held_out: int) -> dict[str, int]:
    """Divide a time between steps, validations and a last evaluation.

    Args:
        left: seconds.
        step: seconds of a step.
        case: seconds of a validation case.
        cases: of the validation.
        held_out: of the evaluation, whose cases are read anew and measured more: twice the time.

    Raises:
        ValueError: if there is no time for ten steps and a validation.
    """
    reserve = EVALUATION + 2 * case * held_out if held_out else 0.0
    validation = cases * case + EPOCH
    usable = MARGIN * left - reserve
    if usable < validation + 10 * step:
        needed = (validation + 10 * step + reserve - MARGIN * left) / 60 / MARGIN
        raise ValueError(
            f"minutes: too few for ten steps and a validation here, at least {needed + 0.1:.1f} more are needed"
        )
    validations = min(max(int(VALIDATING * usable / validation), 1), MOST_VALIDATIONS)
    interval = max(1, -(-min(int(usable / SHORTEST), LOOKS) // validations))  # ends at which the pace is seen
    epochs = validations * interval
    steps = int((usable - validations * cases * case - epochs * EPOCH) / step)
    return {"epochs": epochs, "steps_per_epoch": max(steps // epochs, 1), "val_interval": interval}


def time_steps(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., torch.Tensor],
    inferer: Callable[..., torch.Tensor],
    loader: Iterable[Any],
    *,
    amp: bool,
    most: float,
    now: Callable[[], float] = time.time,
) -> float:
    """Give the seconds of a training step with its share of the loading, over `most` seconds or all of the loader.

    Where steps are so slow that the first ones take three times as long, as few as one are timed.
    """
    kept = copy.deepcopy((bare(network).state_dict(), optimizer.state_dict()))
    device = next(network.parameters()).device
    network.train()
    start, count = now(), 0
    began = start
    with torch.random.fork_rng(), closing(open_bar("timing some steps")):
        for number, batch in enumerate(loader):
            with torch.autocast(device.type, enabled=amp):
                value = loss(inferer(batch["image"].to(device), network), batch["label"].to(device))
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(value.detach())  # waits for the GPU
            count = number + 1 - WARM_UP
            if count == 0:
                start = now()
            elif (count >= LEAST and now() - start > most) or (count > 0 and now() - began > 3 * most):
                break
    bare(network).load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return (now() - start) / max(count, 1)


@torch.no_grad()
def time_case(
    network: nn.Module,
    cases: Iterable[Any],
    inferer: Callable[..., Any],
    postprocessing: Callable[[Any], Any],
    *,
    amp: bool,
    now: Callable[[], float] = time.time,
) -> float:
    """Give the seconds of one case's inference and postprocessing."""
    device = next(network.parameters()).device
    network.eval()
    batch = next(iter(cases))
    start = now()
    with closing(open_bar("timing a validation case")):
        with torch.autocast(device.type, enabled=amp):
            batch["pred"] = inferer(batch["image"].to(device), network)
        for item in decollate_batch(batch):
            postprocessing(item)
    return now() - start


@dataclass
class PacedRate:
    """`polynomial_rate` as an object, so that its `total` may change, which `LambdaLR` keeps in its state."""

    total: int
    floor: float = 0.0
    warmup: int = 0

    def __call__(self, step: int) -> float:
        """Give the factor of the learning rate after `step` steps."""
        return polynomial_rate(min(step, self.total), total=self.total, floor=self.floor, warmup=self.warmup)


@dataclass(eq=False)
class KeepPace:
    """Handler: after each epoch, fit the number of epochs anew to what is left of the time, and the rate's schedule.

    A machine that was busy when the steps were timed is not so for all of the run. Attach it to the trainer, last. A
    run that was killed keeps the number of epochs that it had, since its clock stood still.

    Args:
        timing: of `fit_to_time`.
        rate: of the learning rate's schedule.
        interval: epochs from one validation to the next; a run ends with one.
        held_out: cases that are evaluated afterwards.
        clock: as of `fit_to_time`.
    """

    timing: Mapping[str, Any]
    rate: PacedRate
    interval: int = 1
    held_out: int = 0
    clock: str = "wall"
    ends: float | None = field(default=None, init=False)
    looks: deque[float] = field(default_factory=lambda: deque(maxlen=4), init=False)  # at the clock, at ends of epochs

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        """Set the end of the time; of a run that goes on take the epochs that it had."""
        if engine.state.epoch:
            engine.state.max_epochs = max(round(self.rate.total / self.timing["steps_per_epoch"]), engine.state.epoch)
            return
        reserve = EVALUATION + 2 * self.timing["seconds_per_case"] * self.held_out if self.held_out else 0.0
        self.looks.append(CLOCKS[self.clock]())
        self.ends = self.looks[0] + 0.98 * self.timing["seconds_left"] - reserve

    def __call__(self, engine: Engine) -> None:
        """Give the epochs for which there is time at the pace of the last three."""
        if self.ends is None:
            return
        self.looks.append(CLOCKS[self.clock]())
        each = (self.looks[-1] - self.looks[0]) / (len(self.looks) - 1)
        more = int((self.ends - self.looks[-1]) / max(each, 1e-6))
        validated = engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs
        shared = [max(more, 0 if validated else 1)]
        if distributed.is_initialized():
            distributed.broadcast_object_list(shared)
        engine.state.max_epochs = engine.state.epoch + shared[0]
        self.rate.total = engine.state.max_epochs * self.timing["steps_per_epoch"]
