"""How a fault may end, what is run under faults, and processes that may be killed."""

import io
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pydicom
import torch
from PIL import Image

from tests.support.bundle_runs import ROOT
from vdt_workflows.errors import explanation, root_cause
from vdt_workflows.files import write_json

BUNDLE = ROOT / "bundles" / "imagenet_vdt_pretraining"
OUTCOMES = ("survived", "undetectable", "named", "refused", "unclear", "lost")
TINY = {"epochs": 3, "image_size": 16, "base_channels": 4, "batch_size": 4, "num_workers": 0, "learning_rate": 0.01}


def split_names(option: str, given: Any, known: list[str]) -> list[str]:
    """Read names by commas, which fire may have made a tuple; all known ones if none are given.

    Raises:
        ValueError: naming the unknown one and those there are.
    """
    words = given.split(",") if isinstance(given, str) else list(given)
    names = [word.strip() for word in words if word.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{option} has {name!r}; there are {', '.join(known)}")
    return names or known


def outcome(name: str, *details: str, **more: Any) -> dict[str, Any]:
    """Give the row of one fault."""
    return {**dict.fromkeys(OUTCOMES, 0), name: 1, **more, "details": list(details)}


def outcome_of_child(status: int, output: str) -> dict[str, Any]:
    """Give the row of a process that `in_child` ran: lost if it hung until it was killed."""
    if status == -signal.SIGKILL:
        return outcome("lost", "it hung")
    said = last_sentence(output)
    return outcome("survived" if not status else "refused" if said.startswith("sentence") else "unclear", said)


def report(part: str, result: dict[str, dict[str, Any]], file: str | None) -> dict[str, Any]:
    """Print the rows of a part of the suite as a table, write them if asked to, and return them with their sum."""
    total = {name: sum(row[name] for row in result.values()) for name in OUTCOMES}
    print(f"{part:24}" + "".join(f"{name:>13}" for name in OUTCOMES))
    for name, row in {**result, "all": {**total, "details": []}}.items():
        print(f"{name:24}" + "".join(f"{row[column]:>13}" for column in OUTCOMES))
        for line in row["details"]:
            print(f"    {line}")
    if file is not None:
        write_json(file, {part: result, "total": total})
    return {"total": total, **result}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log and the warnings of a thousand broken files off the screen, and the user's cache as it is."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    kept = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if kept is not None:
                os.environ["XDG_CACHE_HOME"] = kept
            logging.disable(before)


@contextmanager
def listening(said: list[str]) -> Iterator[None]:
    """Collect what these packages log, which stays off the screen."""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("networks", "vdt_transforms", "vdt_workflows")]
    before, kept = logging.root.manager.disable, [(logger.level, logger.propagate) for logger in loggers]
    logging.disable(logging.NOTSET)
    logging.root.disabled, root = True, logging.root.disabled
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.disabled = root
        for logger, (level, propagate) in zip(loggers, kept, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


# What is run under faults


def draw_picture(seed: int, rows: int = 40, columns: int = 52) -> Image.Image:
    """Draw a smooth colour picture."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC)


def make_classes(folder: Path, number: int = 6, rows: int = 40, columns: int = 52) -> Path:
    """Write pictures of two classes, for training and validation."""
    for part, count in (("train", number), ("val", 2)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                draw_picture(i, rows, columns).save(folder / part / label / f"{i}.jpg")
    return folder


def train(images: Path, folder: Path, **more: Any) -> None:
    """Train the smallest classifier there is, into a folder."""
    logging.disable(logging.CRITICAL)
    monai.bundle.run(
        config_file=str(BUNDLE / "configs" / "train.yaml"),
        bundle_root=str(BUNDLE),
        dataset_dir=str(images),
        ckpt_dir=str(folder / "models"),
        output_dir=str(folder / "eval"),
        logging_file=False,
        **{**TINY, **more},
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights that `train` left in a folder."""
    return torch.load(folder / "models" / "model.pt", weights_only=True)


# Processes


def in_child(
    function: Callable[[], Any], limit: float | None = None, after: Path | None = None, end: int = signal.SIGKILL
) -> tuple[int, str]:
    """Run a function in a forked process, which needs no imports; kill it `limit` seconds after a file is there.

    Returns:
        The exit status, -9 if it was killed, and what it wrote and raised: the sentence alone, or a traceback.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # whatever stood there, such as pytest's
            status = 0
            try:
                try:
                    function()
                except BaseException as error:
                    status = int(not isinstance(error, SystemExit) or bool(error.code))
                    _print_error(error)
            except BaseException as error:  # torch raises that of a dead loader wherever its signal arrives
                status = 1
                _print_error(error)
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
        deadline = None if limit is None or after is not None else time.monotonic() + limit
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if after is not None and limit is not None and after.is_file():
                deadline, after = time.monotonic() + limit, None
            if deadline is not None and time.monotonic() > deadline:
                os.kill(child, end)
                deadline = None
            time.sleep(0.002)
        output.seek(0)
        return os.waitstatus_to_exitcode(done[1]), output.read()


def _print_error(error: BaseException) -> None:
    sentence = explanation(error)
    print(f"\n{'sentence' if sentence else 'traceback'}: {sentence or repr(root_cause(error))}", flush=True)


def last_sentence(output: str) -> str:
    """Give the error that a child printed last, or nothing."""
    lines = [line for line in output.splitlines() if line.startswith(("sentence: ", "traceback: "))]
    return lines[-1] if lines else ""
