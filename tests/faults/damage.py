"""Damage files in seeded ways, read each as the bundles and commands do, and compare the values with an oracle."""

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.outcomes import OUTCOMES, listening, quiet, report, split_names
from vdt_workflows.errors import explanation

WAYS = ("cut", "bit", "bytes", "zeros", "inserted", "removed", "repeated", "empty", "other", "start")


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a good one is made, what reads it, and what else says which values are right.

    Attributes:
        name: of the kind.
        make: writes good files into a folder, and gives those that are damaged, one at a time.
        read: reads the folder as the product does, and gives plain values, tensors or arrays.
        oracle: reads the folder without the product's code, in the same form, and raises where it finds fault. Where it
            reads other values than those of the whole file, the format does not tell that they are wrong.
        tolerance: greatest mean difference of numbers between the two.
        exact: whether every change of a value can be told, since the format has checksums.
        mends: whether reading writes damaged files again.
        several: whether the files are parts of one thing, of which one may be left out by name.
    """

    name: str
    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]
    oracle: Callable[[Path], Any]
    tolerance: float = 0.0
    exact: bool = False
    mends: bool = False
    several: bool = False


def files(number: int = 2000, seed: int = 0, kinds: Any = "", json: str | None = None) -> dict[str, Any]:
    """Damage files in seeded ways, one at a time, and read each as the bundles and commands do.

    Args:
        number: damaged files in all, shared out to the kinds.
        seed: of the damage.
        kinds: names of kinds, by commas, in place of all.
        json: file for the result.

    Raises:
        ValueError: naming an unknown kind.
    """
    from tests.faults.kinds import KINDS  # which names this module's classes

    names = split_names("kinds", kinds, [kind.name for kind in KINDS])
    chosen = [kind for kind in KINDS if kind.name in names]
    result = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for position, kind in enumerate(chosen):
            share = number // len(chosen) + (position < number % len(chosen))
            result[kind.name] = damage_kind(kind, Path(folder, kind.name), share, seed)
    return report("files", result, json)


def damage_kind(kind: Kind, folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Read `number` damaged files of one kind: how often which outcome, and the errors that are unclear.

    Survived are values as those of the whole file, which must be the oracle's. Undetectable are other values that the
    oracle reads as well, which finds no fault in the file. Named are the values of the other files, where the log says
    that this one was left out, by its name or its kind. Anything else that is read is silently wrong: lost.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, sum(kind.name.encode())])
    targets = kind.make(folder)
    whole = {file: file.read_bytes() for file in targets}
    right = kind.oracle(folder)
    expected = kind.read(folder)  # what is whole must be read
    if not agree(expected, right, kind.tolerance):
        row = dict.fromkeys(OUTCOMES, 0) | {"lost": number}
        return {**row, "details": [f"whole files of {kind.name} are read wrongly"]}
    counts: Counter[str] = Counter()
    details = []
    for i in range(number):
        file = targets[int(rng.integers(len(targets)))]
        how, damaged = damage(whole[file], rng)
        file.write_bytes(damaged)
        ended, why = _try(kind, folder, file, expected)
        counts[ended] += 1
        details += [f"{i}, {file.name}, {how}: {why}"] if ended in ("lost", "unclear") else []
        others = [] if kind.mends else [name for name in targets if name != file]
        if spoilt := [other.name for other in others if other.read_bytes() != whole[other]]:
            counts["lost"] += 1
            details.append(f"{i}, {file.name}, {how}: {spoilt} changed")
        file.write_bytes(whole[file])
    return {**{name: counts[name] for name in OUTCOMES}, "details": details[:10]}


def _try(kind: Kind, folder: Path, file: Path, expected: Any) -> tuple[str, str]:
    said: list[str] = []
    try:
        with listening(said):
            values = kind.read(folder)
    except Exception as error:
        sentence = explanation(error)
        names = {str(file), str(file.parent), file.name}
        clear = sentence is not None and "\n" not in sentence and any(name in sentence for name in names)
        return ("refused", "") if clear else ("unclear", f"{type(error).__name__}: {str(error)[:300]}")
    if agree(values, expected, kind.tolerance):
        return "survived", ""
    if kind.several and any("left out" in line and file.name in line for line in said):
        content = file.read_bytes()
        file.unlink()
        others = kind.oracle(folder)
        file.write_bytes(content)
        return ("named", "") if agree(values, others, kind.tolerance) else ("lost", "the other files' values are wrong")
    if kind.exact:
        return "lost", "other values were read, which checksums tell"
    try:
        theirs = kind.oracle(folder)
    except Exception as error:
        return "lost", f"other values were read, of a file with a fault: {type(error).__name__}: {str(error)[:200]}"
    return ("undetectable", "") if agree(values, theirs, kind.tolerance) else ("lost", "values of nowhere were read")


def agree(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two results of reading hold the same values, numbers to a mean difference."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(agree(value, other[name], tolerance) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(agree(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray | torch.Tensor) and isinstance(other, np.ndarray | torch.Tensor):
        one, other = (np.asarray(values, dtype=np.float64) for values in (one, other))
        if one.shape != other.shape or not one.size:
            return one.shape == other.shape
        if not tolerance:
            return np.array_equal(one, other, equal_nan=True)
        return bool(np.abs(one - other).mean() <= tolerance)
    return bool(one == other)


def damage(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage a file's content in one of the ways that disks, networks and people do."""
    data = bytearray(content)
    place = int(rng.integers(len(data)))
    length = int(rng.integers(1, max(2, len(data) // 4)))
    how = str(rng.choice(WAYS))
    if how == "cut":
        del data[place:]
    elif how == "bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        for at in rng.integers(len(data), size=int(rng.integers(2, 30))):
            data[int(at)] = int(rng.integers(256))
    elif how == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif how == "inserted":
        data[place:place] = rng.integers(256, size=length, dtype=np.uint8).tobytes()
    elif how == "removed":
        del data[place : place + length]
    elif how == "repeated":
        data[place:place] = data[place : place + length]
    elif how == "empty":
        data.clear()
    elif how == "other":
        data = bytearray(b"<html><body>404 not found</body></html>\n")
    else:  # the first bytes, where formats keep what matters
        for at in rng.integers(min(len(data), 352), size=3):
            data[int(at)] = int(rng.integers(256))
    return how, bytes(data)
