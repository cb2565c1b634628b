"""A training fitted to a time: what a step and a validation take here, and how many of each there is time for."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import decollate_batch
from torch import distributed, nn

from vdt_workflows.files import write_json
from vdt_workflows.training.checkpoints import bare
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)

WARM_UP, LEAST = 3, 5  # steps that are not timed, and that are
EPOCH = 1.0  # seconds that the end of an epoch takes: weights, state and curves
EVALUATION = 15.0  # seconds until a later evaluation begins
MARGIN = 0.95  # of the time, since machines are not equally fast all the time
MOST_VALIDATIONS = 20


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
) -> dict[str, Any]:
    """Time some steps and one validation case, and give the epochs, steps and validations that fit the time.

    The steps leave no trace: weights, optimiser and random state are put back. The numbers are recorded, and a run that
    goes on takes them from there, so that it ends as it would have without the interruption.

    Args:
        minutes: of the whole run, with an evaluation of `held_out` cases after it.
        record: JSON file of the numbers.
        began: when the time began, in seconds since 1970; 0 is now.
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

    Returns:
        `epochs`, `steps_per_epoch` and `val_interval`, and what they were found from.

    Raises:
        ValueError: if there is no time for one short epoch.
    """
    path = Path(record)
    made_from = json.loads(json.dumps({**made_from, "minutes": minutes}, default=str))
    if path.is_file() and (kept := json.loads(path.read_text()))["made_from"] == made_from:
        logger.info("%s: steps as they were fitted before", path)
        return kept
    left = 60 * minutes - (time.time() - began if began else 0)
    step = accumulation * time_steps(network, optimizer, loss, inferer, loader, amp=amp, most=max(3.0, 0.03 * left))
    case = time_case(bare(network), validation, validation_inferer, postprocessing, amp=amp)
    left = 60 * minutes - (time.time() - began if began else 0)
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
    validations = min(max(int(0.15 * usable / validation), 1), MOST_VALIDATIONS)
    steps = int((usable - validations * validation) / step)
    interval = max(1, min(int(usable / 60), 10) // validations)  # epochs without one keep the state of the run
    epochs = validations * interval
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
) -> float:
    """Give the seconds of a training step with its share of the loading, over `most` seconds or all of the loader."""
    kept = copy.deepcopy((bare(network).state_dict(), optimizer.state_dict()))
    device = next(network.parameters()).device
    network.train()
    start, count = time.perf_counter(), 0
    with torch.random.fork_rng():
        for number, batch in enumerate(loader):
            with torch.autocast(device.type, enabled=amp):
                value = loss(inferer(batch["image"].to(device), network), batch["label"].to(device))
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(value)  # waits for the GPU
            count = number + 1 - WARM_UP
            if count == 0:
                start = time.perf_counter()
            elif count >= LEAST and time.perf_counter() - start > most:
                break
    bare(network).load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    return (time.perf_counter() - start) / max(count, 1)


@torch.no_grad()
def time_case(
    network: nn.Module,
    cases: Iterable[Any],
    inferer: Callable[..., Any],
    postprocessing: Callable[[Any], Any],
    *,
    amp: bool,
) -> float:
    """Give the seconds of one case's inference and postprocessing."""
    device = next(network.parameters()).device
    network.eval()
    batch = next(iter(cases))
    start = time.perf_counter()
    with torch.autocast(device.type, enabled=amp):
        batch["pred"] = inferer(batch["image"].to(device), network)
    for item in decollate_batch(batch):
        postprocessing(item)
    return time.perf_counter() - start
