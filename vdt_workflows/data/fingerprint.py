"""What a run's data are: their lists, the files that these name, and how two such descriptions differ."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vdt_workflows.files import few, hash_file, stamp_of

FILES = ("image", "label")  # keys of an item that may name a file, or a folder of slices
DETACHED = (".mhd", ".nhdr", ".hdr")  # headers whose voxels are in a file beside them
MOST_FILES, MOST_BYTES = 10_000, 20_000_000_000  # of which the content is hashed
Description = dict[str, Any]


def describe_data(items: Sequence[Mapping[str, Any]], known: Description | None = None) -> Description:
    """Describe a list of a data set so that a copy elsewhere is the same, and a changed file or item is not.

    Names count from the deepest folder that has all files. Contents are hashed once: a file of the same size and change
    times as in `known` is not read again. Of more files than `MOST_FILES` or `MOST_BYTES` no content is read; their
    sizes count, and their change times as long as they are in the same place.

    Args:
        items: dictionaries with `image` (a path) and `label` (a path or a value); of key slices the folder counts.
        known: what this gave before, of the same data or others.

    Returns:
        Plain values, for JSON and `find_differences`.
    """
    paths = sorted({path for item in items for key in FILES if isinstance(path := item.get(key), str)})
    top = os.path.commonpath([os.path.dirname(path) for path in (paths[0], paths[-1])]) if paths else ""
    listed = hashlib.sha256()
    for item in items:
        plain = {k: v[len(top) :] if k in FILES and isinstance(v, str) else v for k, v in item.items()}
        listed.update(json.dumps(plain, sort_keys=True, default=_plain).encode("utf-8", "surrogateescape"))
    slices = bool(items) and "slice_interval" in items[0]
    files = list(_find_files(sorted({os.path.dirname(path) for path in paths}) if slices else paths))
    names = [file[len(top) :] for file in files]
    before = (known or {}).get("files") or {}

    def digest(name: str, file: str, state: list[int]) -> list[Any]:
        same = before.get(name, [None])[:3] == state
        return [*state, before[name][3] if same else hash_file(file)]

    with ThreadPoolExecutor(16) as pool:
        states = list(pool.map(stamp_of, files))
        found: Description = {"count": len(items), "list": listed.hexdigest()}
        if len(files) <= MOST_FILES and sum(state[0] for state in states) <= MOST_BYTES:
            found["files"] = dict(zip(names, pool.map(digest, names, files, states), strict=True))
            return found
    place = os.stat(top)
    sizes = [[name, state[0]] for name, state in zip(names, states, strict=True)]
    times = [state[1:] for state in states]
    found |= {"sizes": _hash(sizes), "times": _hash(times), "place": [place.st_dev, place.st_ino]}
    return found


def find_differences(kept: Description, now: Description) -> list[str]:
    """Say in what two descriptions of one list differ; empty for the same data."""
    if kept["count"] != now["count"] and "files" not in now:
        return [f"{kept['count']} cases then, {now['count']} now"]
    if "files" in kept and "files" in now:
        then, there = ({name: state[3] for name, state in one["files"].items()} for one in (kept, now))
        kinds = {
            "no longer there": [name for name in then if name not in there],
            "new": [name for name in there if name not in then],
            "changed": [name for name in there if name in then and then[name] != there[name]],
        }
        differ = [f"{few([name.lstrip('/') for name in names], 3)} {kind}" for kind, names in kinds.items() if names]
        return differ or (["another order, or other labels"] if kept["list"] != now["list"] else [])
    if kept["list"] != now["list"]:
        return ["other files, another order, or other labels"]
    if kept.get("sizes") != now.get("sizes"):
        return ["files of another size"]
    if kept["place"] == now["place"] and kept["times"] != now["times"]:
        return ["files changed since"]
    return []


def _find_files(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        if os.path.isdir(path):
            yield from sorted(str(file) for file in Path(path).rglob("*") if file.is_file())
        elif path.lower().endswith(DETACHED):
            yield from sorted(str(file) for file in Path(path).parent.glob(f"{Path(path).stem}.*"))
        else:
            yield path


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogateescape")).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
