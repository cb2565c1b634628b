"""How a fault may end, what is run under faults, and processes that may be killed."""

from __future__ import annotations

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
OUTCOMES = ("survived", "changed", "refused", "unclear", "lost")
TINY = {"epochs": 3, "image_size": 16, "base_channels": 4, "batch_size": 4, "num_workers": 0, "learning_rate": 0.01}


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
    print(f"{part:24}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for name, row in {**result, "all": {**total, "details": []}}.items():
        print(f"{name:24}" + "".join(f"{row[column]:>10}" for column in OUTCOMES))
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


def in_child(function: Callable[[], Any], limit: float | None = None) -> tuple[int, str]:
    """Run a function in a forked process, which needs no imports; kill -9 after `limit` seconds.

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
                    status = 1
                    _print_error(error)
            except BaseException as error:  # torch raises that of a dead loader wherever its signal arrives
                status = 1
                _print_error(error)
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
        deadline = None if limit is None else time.monotonic() + limit
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if deadline is not None and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
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
