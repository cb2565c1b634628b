"""The cases of an evaluation, none of which its weights were trained on."""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdt_workflows.files import few, hash_file
from vdt_workflows.training import ownership
from vdt_workflows.training.shipped import RECORD

logger = logging.getLogger(__name__)


def take_cases(cases: Mapping[str, Sequence[dict]], part: str, ckpt_path: str | os.PathLike) -> list[dict]:
    """Give the cases of a part to score; those of validation and test were held out from the training of the weights.

    What the weights were trained on is read from the records beside them. A case of the same file name is one of these
    if its content is the same, or, where contents were not recorded, its path; else the log tells it. Cases that the
    data set itself lists for training too, which `find_volumes` tells, are its own affair.

    Args:
        cases: of `find_volumes`.
        part: training, validation or test.
        ckpt_path: the weights.

    Raises:
        ValueError: if there is no such part, or the weights were trained on cases of it.
    """
    if part not in cases:
        raise ValueError(f"part must be {', '.join(cases)}, got {part!r}")
    chosen = list(cases[part])
    shared = {case["image"] for case in cases["training"]}
    trained: list[str] = []
    unknown: list[str] = []
    known = _find_trained(Path(ckpt_path).parent)
    for case in chosen if part != "training" else []:
        path, name = os.path.realpath(case["image"]), os.path.basename(case["image"])
        if case["image"] in shared or name not in known:
            continue
        places, hashes = known[name]
        same = hash_file(path) in hashes if hashes and os.path.isfile(path) else path in places
        (trained if same else unknown if not hashes else []).append(name)
    if trained:
        raise ValueError(
            f"{few(trained, 3)}: {part} cases here, and {ckpt_path} was trained on them; score the split of its"
            " training, or --part training"
        )
    if unknown:
        logger.warning("%s: %s was trained on cases of such names; they count as others", few(unknown, 3), ckpt_path)
    return chosen


def _find_trained(folder: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Paths and SHA-256 of what the weights in a folder were trained on, by file name."""
    found: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    run, record = _read(folder / RECORD), _read(folder / ownership.RECORD)
    for path in run.get("_run_", {}).get("training") or []:
        found[os.path.basename(str(path))][0].add(os.path.realpath(str(path)))
    for name, state in (record.get("data", {}).get("training", {}).get("files") or {}).items():
        if (name := os.path.basename(name)) in found:
            found[name][1].add(state[3])
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # weights without a record, or one that whoever resumes the run is told of
        return {}
    return content if isinstance(content, dict) else {}
