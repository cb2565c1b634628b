"""Weights as files, and runs that resume from their last whole epoch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import Tensor, nn

from networks import load_pretrained, read_checkpoint
from networks.checkpoints import check_types, check_values, describe_damage, load_whole
from vdt_workflows.files import save_atomic
from vdt_workflows.naming import plain
from vdt_workflows.overrides import given_files
from vdt_workflows.training.ownership import RunFolders
from vdt_workflows.training.processes import is_first_process

logger = logging.getLogger(__name__)


def bare(network: nn.Module) -> nn.Module:
    """Take a network out of `DistributedDataParallel` and `torch.compile`."""
    inner: Any = network
    while isinstance(inner, nn.parallel.DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def save_weights(network: nn.Module, path: str | os.PathLike, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a network's state dict, bare, as every tool reads it.

    The state dict's own metadata holds plain values beside the tensors: each encoder's architecture, and `provenance`
    (what it was trained on, and how), with what `initialise` noted on the network.
    """
    state = bare(network).state_dict()
    noted = {**getattr(bare(network), "origin", {}), **(provenance or {})}
    state._metadata[""]["provenance"] = noted  # type: ignore[attr-defined]  # torch sets it on each
    save_atomic(state, path)


def read_provenance(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save_weights` wrote beside the tensors; empty for files of other origin."""
    return getattr(read_checkpoint(path), "_metadata", {}).get("", {}).get("provenance", {})


def load_weights(network: nn.Module, path: str | os.PathLike) -> None:
    """Load a whole network strictly: a file of `save_weights`, or a published checkpoint of the same network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be used (see `networks.read_checkpoint`), was made by another architecture, or
            has whole numbers for weights.
    """
    state = read_checkpoint(path)
    check_types(path, state, bare(network).state_dict())
    hint = "build the network as in training, for instance with --args_file and the run.json beside the checkpoint"
    if getattr(state, "_metadata", None):
        try:
            bare(network).load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:]]
            raise ValueError(
                f"{path}: made by another architecture ({len(state)} tensors; {reasons[0]}"
                f" {f'and {len(reasons) - 1} more' if len(reasons) > 1 else ''}); {hint}"
            ) from None
        return
    report = load_pretrained(bare(network), path)
    missing = [name for name in report.left_random if not name.startswith("side_heads.")]  # which serve training alone
    if missing:
        raise ValueError(f"{path}: has no weights for {missing[0]} and maybe others; {hint}")


def check_settings(record: Path, weights: str | os.PathLike) -> None:
    """Refuse a `run.json` that contradicts what its checkpoint says of its own training; one alone is taken as it is.

    Raises:
        ValueError: naming both files and the settings that differ, or if `record` is no JSON, or as `read_checkpoint`.
    """
    if not record.is_file():
        return
    own = json.loads(json.dumps(read_provenance(weights), default=str))
    try:
        settings = plain(json.loads(record.read_bytes()))
        differ = [f"{k} {settings[k]!r}, not {v!r}" for k, v in own.items() if settings.get(k, v) != v]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{record}: no settings of a run ({error}); give the run.json that training wrote") from error
    if differ:
        raise ValueError(
            f"{record}: contradicts {weights}, which was trained otherwise ({'; '.join(differ)}); give the run.json"
            " that was written with it, and settings that shall differ on the command line"
        )


@dataclass(eq=False)
class LoadWeights:
    """Handler: load a whole network when the engine starts (see `load_weights`).

    The `run.json` beside the file, and the `--args_file` of the process, must not contradict it (see `check_settings`).
    """

    network: nn.Module
    path: str

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load the weights."""
        for record in {Path(self.path).parent / "run.json", *given_files()}:
            check_settings(record, self.path)
        load_weights(self.network, self.path)
        logger.info("%s: loaded", self.path)


@dataclass(eq=False)
class SaveWeights:
    """Handler: write a network's weights whenever the engine completes an epoch, or when its metric is the best yet.

    Attach it to the trainer (every epoch) or, with `metric`, to the evaluator.

    Args:
        network: the network; for its encoder alone give `@network.backbone`.
        path: the file to write.
        metric: name of an engine's metric; the file is written when it is higher than ever before, and always as
            long as it was NaN, such as an AUC of one class alone.
        provenance: plain values to store in the file.
        writes: whether this process writes; by default the first one (rank 0).
    """

    network: nn.Module
    path: str
    _: KW_ONLY
    metric: str | None = None
    provenance: Mapping[str, Any] | None = None
    writes: bool | None = None
    best: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.writes = is_first_process() if self.writes is None else self.writes

    def attach(self, engine: Engine) -> None:
        """Register with the trainer or the evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the weights if they are to be kept."""
        if self.metric is not None:
            score = float(engine.state.metrics[self.metric])
            if not (self.best is None or math.isnan(self.best) or score > self.best):
                return
            self.best = score
            logger.info("%s: best %s so far, %.4f", self.path, self.metric, score)
        if self.writes:
            save_weights(self.network, self.path, self.provenance)

    def state_dict(self) -> dict[str, float | None]:
        """Give the best score, for `ResumeRun`."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Take the best score back."""
        self.best = state["best"]


class ResumeRun:
    """Handler: keep what a killed run needs to go on from its last whole epoch, and go on.

    Attach it to the trainer, last of the handlers, so that what it writes includes what the others did. The file is
    removed when the run is finished. That it is this run's is what `RunFolders` sees to: in the configs before anything
    is built, and here for those who call the trainer themselves.

    Args:
        path: file for the state, in the run's output folder.
        objects: what has a `state_dict`: network, optimizer, scheduler, handlers that remember.
        folders: what owns the run's folders, and is told of its end.
        writes: whether this process writes, by default the first one (rank 0); all processes read.

    Raises:
        ValueError: naming the file, when the run starts and the file is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        objects: Mapping[str, Any],
        *,
        folders: RunFolders | None = None,
        writes: bool | None = None,
    ) -> None:
        self.path = Path(path)
        self.objects = dict(objects)
        self.folders = folders
        self.writes = is_first_process() if writes is None else writes

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.STARTED, self.load)
        if self.writes:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
            engine.add_event_handler(Events.COMPLETED, self.finish)

    def load(self, engine: Engine) -> None:
        """Go on from the file, if there is one."""
        if self.folders is not None:
            self.folders.take()
        if not self.path.is_file():
            return
        kept = self._read()
        objects = {name: bare(item) for name, item in self.objects.items()}
        Checkpoint.load_objects(to_load=objects, checkpoint=kept["objects"])
        if getattr(engine, "scaler", None) is not None and kept["scaler"]:
            engine.scaler.load_state_dict(kept["scaler"])
        engine.state.epoch, engine.state.iteration = kept["epoch"], kept["iteration"]
        logger.info("%s: resumed after epoch %d of %d", self.path, kept["epoch"], engine.state.max_epochs)

    def _read(self) -> dict[str, Any]:
        try:
            kept = load_whole(self.path)
            kept = kept if isinstance(kept, dict) else {}
            kinds = {"epoch": int, "iteration": int, "objects": dict, "scaler": dict}
            if all(isinstance(kept.get(name), kind) for name, kind in kinds.items()):
                if not 0 < kept["epoch"] <= kept["iteration"]:
                    raise ValueError(f"epoch {kept['epoch']}, step {kept['iteration']}")
                for name, state in kept["objects"].items():
                    check_values(name, {key: value for key, value in state.items() if isinstance(value, Tensor)})
                return kept
            reason = "not written by ResumeRun"
        except Exception as error:  # a damaged pickle may raise anything
            reason = str(error) if isinstance(error, ValueError) else describe_damage(error)
        raise ValueError(f"{self.path}: not a whole state of a run ({reason}); delete it to start afresh")

    def save(self, engine: Engine) -> None:
        """Write the state of the run after a whole epoch."""
        scaler = getattr(engine, "scaler", None)
        content = {
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "objects": {name: bare(item).state_dict() for name, item in self.objects.items()},
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        save_atomic(content, self.path)

    def finish(self, engine: Engine) -> None:
        """Record that the run came to its end, and remove the file."""
        if self.folders is not None:
            self.folders.finish()
        self.path.unlink(missing_ok=True)
