"""Records of a run: its history and curves, and its settings and scores for later stages."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from vdt_workflows.drawing import make_figure, to_png
from vdt_workflows.files import write_atomic, write_csv, write_json
from vdt_workflows.naming import join_words, list_results, literal
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)
Row = dict[str, float]


@dataclass(eq=False)
class RememberRun:
    """Handler: write the settings that later stages of a run must share, as a file for MONAI's `--args_file`.

    Evaluation and inference take it (`--args_file models/run.json`), so that they build the same network and prepare
    data in the same way. The entry `_run_` records how the run was started; no stage reads it. Of several processes the
    first one writes.

    Args:
        path: the file, beside the checkpoint.
        settings: plain values by config id.
        notes: further plain values for the record (protocol, data, seed, ...).
        results: folder in which the files of each volume of the settings' `volumes` are listed at the end, as
            `results` of the file, which is then for people and other programs: texts are as they are. Else they are
            written so that MONAI takes none for an expression (`naming.literal`).
    """

    path: str
    settings: Mapping[str, Any]
    notes: Mapping[str, Any] | None = None
    results: str | None = None

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, self)
        if self.results is not None:
            engine.add_event_handler(Events.COMPLETED, self, self.results)

    def __call__(self, engine: Engine, results: str | None = None) -> None:
        """Write the file, with what lies in the folder of results."""
        if not is_first_process():
            return
        import monai  # the version alone is wanted, and monai is loaded whenever an engine runs

        record = {
            "command": join_words(sys.argv),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "monai": monai.__version__,
            "device": str(engine.state.device),
            **(self.notes or {}),
        }
        found = {} if results is None else {"results": list_results(self.settings["volumes"], results)}
        written = {**self.settings, **found, "_run_": record}
        write_json(self.path, literal(written) if self.results is None else written, indent=2)


PATIENCE = 20  # steps


@dataclass(eq=False)
class RunLog:
    """Handler: one line of text, one row of `history.csv` and one more point of `curves.png` for each epoch.

    A loss of NaN or infinity stops the run, before anything is written: at once, or with a gradient scaler, which skips
    such steps, after `PATIENCE` of them in a row. On CUDA losses are checked every `PATIENCE` steps and at the end of
    an epoch.

    Attach it to the trainer after the validation handler.

    Args:
        folder: where the two files go.
        validator: the evaluator whose metrics belong to the epoch.
        optimizer: whose learning rate is recorded.
        title: heading of the picture.
        writes: whether this process writes and logs; by default the first one (rank 0).

    Raises:
        ValueError: in training, if the loss is no longer a number.
    """

    folder: str
    validator: Engine | None = None
    optimizer: torch.optim.Optimizer | None = None
    title: str = ""
    writes: bool | None = None
    rows: list[Row] = field(default_factory=list, init=False)
    _bad: torch.Tensor | int = field(default=0, init=False)  # steps without a finite loss, one after the other

    def __post_init__(self) -> None:
        self.writes = is_first_process() if self.writes is None else self.writes

    def attach(self, engine: Engine) -> None:
        """Register with the trainer, and with its validator for the metrics."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)
        if self.validator is not None:
            self.validator.add_event_handler(Events.COMPLETED, self._take_scores)

    def state_dict(self) -> dict[str, list[Row]]:
        """Give the rows so far, for `ResumeRun`."""
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, list[Row]]) -> None:
        """Take the rows of the killed run back."""
        self.rows = list(state["rows"])

    def _begin(self, engine: Engine) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._steps, self._start = 0, time.perf_counter()
        self._scores: Row = {}
        self._lr = self._rate()

    def _rate(self) -> float | None:
        return None if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def _count(self, engine: Engine) -> None:
        output = engine.state.output
        loss = (output[0] if isinstance(output, list) else output)["loss"]
        loss = torch.as_tensor(loss).detach()
        self._loss = self._loss + loss
        self._steps += 1
        self._bad = torch.where(torch.isfinite(loss), 0, self._bad + 1)
        state = engine.state
        if loss.device.type == "cpu" or self._steps % PATIENCE == 0 or state.iteration % (state.epoch_length or 1) == 0:
            self._stop_without_numbers(engine, float(loss))

    def _stop_without_numbers(self, engine: Engine, loss: float) -> None:
        scaler = getattr(engine, "scaler", None)
        scales = scaler is not None and scaler.is_enabled()
        if self._bad < (PATIENCE if scales else 1):
            return
        rate = self._rate()
        lower = f" than {rate:.3g}" if rate is not None else ""
        mixed = " or, of mixed precision, --amp False" if getattr(engine, "amp", False) else ""
        raise ValueError(
            f"the loss is {loss:g} at step {engine.state.iteration}, in epoch {engine.state.epoch} of"
            f" {engine.state.max_epochs}; try a lower --learning_rate{lower}{mixed}."
            " What was written after the last whole epoch stays as it was"
        )

    def _take_scores(self, evaluator: Engine) -> None:
        for name, value in evaluator.state.metrics.items():
            values = torch.as_tensor(value).flatten().tolist()
            names = [name] if len(values) == 1 else [f"{name}_{i}" for i in range(1, len(values) + 1)]
            self._scores.update(zip(names, values, strict=True))

    def _write(self, engine: Engine) -> None:
        row: Row = {"epoch": engine.state.epoch, "step": engine.state.iteration}
        losses = idist.all_reduce(torch.as_tensor([float(self._loss), self._steps], device=idist.device()))
        row["train_loss"] = float(losses[0] / losses[1])
        if self._lr is not None:
            row["lr"] = self._lr
        row.update(self._scores)
        row["seconds"] = round(time.perf_counter() - self._start, 2)
        self.rows.append(row)
        if not self.writes:
            return
        shown = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("epoch", "step"))
        logger.info("epoch %d/%d, step %d: %s", row["epoch"], engine.state.max_epochs, row["step"], shown)
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        write_csv(Path(self.folder, "history.csv"), self.rows, names)
        write_atomic(Path(self.folder, "curves.png"), draw_curves(self.rows, self.title))


def draw_curves(rows: list[Row], title: str = "") -> bytes:
    """Draw losses on the left and scores on the right, against the epoch, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in rows for name in row))
    losses = [name for name in names if name.endswith("loss")]
    scores = [name for name in names if name not in {*losses, "epoch", "step", "lr", "seconds"}]
    figure, both = make_figure(10, 4, columns=2)
    for axes, lines, label in zip(both, (losses, scores), ("loss", "score"), strict=True):
        for name in lines:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name} {points[-1][1]:.4g}")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    figure.suptitle(title, parse_math=False)
    return to_png(figure)


@dataclass(eq=False)
class SaveScores:
    """Handler: write an evaluator's metrics, with what they were measured on, as JSON, in the first process.

    Args:
        path: the file.
        notes: plain values for the record (checkpoint, data, protocol, ...).
    """

    path: str
    notes: Mapping[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the scores."""
        if not is_first_process():
            return
        scores = {name: torch.as_tensor(value).tolist() for name, value in engine.state.metrics.items()}
        logger.info("%s", ", ".join(f"{name} {value}" for name, value in scores.items()))
        write_json(self.path, {**scores, "_run_": self.notes or {}}, indent=2)


@dataclass(eq=False)
class Attach:
    """Handler that attaches another one, which the config builds under an id of its own so that others can refer to it.

    MONAI's `check_properties` wants each entry of a list of handlers to be a component, not a reference.
    """

    handler: Any

    def attach(self, engine: Engine) -> None:
        """Attach the handler itself."""
        self.handler.attach(engine)


@dataclass(eq=False)
class SkippedImages:
    """Handler: name each image that was left out because it does not decode, once, and count them at the end.

    Args:
        path: text file that lists them, one reason a line; written only if there are any.
    """

    path: str
    reasons: dict[str, None] = field(default_factory=dict, init=False)

    def attach(self, engine: Engine) -> None:
        """Register with a trainer or an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._report)

    def _collect(self, engine: Engine) -> None:
        for reason in engine.state.batch["skipped"]:
            if reason not in self.reasons:
                logger.warning("left out: %s", reason)
                self.reasons[reason] = None

    def _report(self, engine: Engine) -> None:
        if self.reasons:
            logger.warning("%d images left out so far, listed in %s", len(self.reasons), self.path)
            write_atomic(self.path, ("\n".join(self.reasons) + "\n").encode())
