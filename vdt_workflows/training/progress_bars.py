"""The bar of an engine: steps of a training with loss and score, or batches of an evaluation or an inference."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from ignite.engine import Engine, Events

from vdt_workflows.progress import REDRAW, Bar, open_bar


@dataclass(eq=False)
class ShowProgress:
    """Handler: a bar of a training's steps, or of the batches of an evaluation or an inference.

    On a terminal, or with the other signs of a command.

    Args:
        label: what is done to the batches of an evaluation or an inference.
        validator: evaluator of a training, whose key score is shown, beside the loss and the epoch.
    """

    label: str = ""
    validator: Engine | None = None
    _bar: Bar | None = field(default=None, init=False)
    _loss: str = field(default="", init=False)
    _score: str = field(default="", init=False)
    _read: float = field(default=0.0, init=False)  # when the loss was

    def attach(self, engine: Engine) -> None:
        """Register with a trainer, or with an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        if self.validator is not None:
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._validate)
            self.validator.add_event_handler(Events.COMPLETED, self._take_score)

    def _begin(self, engine: Engine) -> None:
        state = engine.state
        label = f"epoch {state.epoch} of {state.max_epochs}, step" if self.validator is not None else self.label
        if self._bar is None:
            steps = (state.epoch_length or 0) * (state.max_epochs or 1)
            self._bar = open_bar(label, steps, done=state.iteration, divisible=self.validator is None)
        self._bar.label = label

    def _step(self, engine: Engine) -> None:
        if self._bar is None:  # another handler's engine
            return
        output = engine.state.output
        output = output[0] if isinstance(output, list) and output else output
        if self.validator is not None and isinstance(output, dict) and time.monotonic() > self._read + REDRAW:
            self._read = time.monotonic()
            self._loss = f"loss {float(torch.as_tensor(output['loss']).detach()):.3g}"  # which waits for a GPU
            self._bar.note = f"{self._loss}{self._score}"
        self._bar.step()

    def _end(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._end(engine)
        raise error  # ignite leaves that to those who listen

    def _validate(self, engine: Engine) -> None:
        cases = engine.state.epoch_length or 1
        if self._bar is not None:
            self._bar.note = f"{self._loss}, validated {(engine.state.iteration - 1) % cases + 1} of {cases}"

    def _take_score(self, engine: Engine) -> None:
        name = engine.state.key_metric_name
        if self._bar is not None and name:
            self._score = f", {name.removeprefix('val_').replace('_', ' ')} {float(engine.state.metrics[name]):.3f}"
            self._bar.note = f"{self._loss}{self._score}"
