"""A run owns its folders: it locks them, says what it is, and overwrites no other run's results unless asked to."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import distributed

from vdt_workflows.data.fingerprint import describe_data, find_differences
from vdt_workflows.files import few, hash_file, hold, remove_unfinished, write_json
from vdt_workflows.progress import say
from vdt_workflows.training.processes import is_first_process

RECORD = ".vdt_run.json"
STATE = "resume.pt"
ELSEWHERE = {  # top-level ids of a config that are paths, which the data describe, or that change no number
    *("bundle_root", "dataset_dir", "train_dir", "val_dir", "datalist", "table", "split", "cache", "cache_dir"),
    *("ckpt_dir", "output_dir", "pretrained", "overwrite", "taken", "folders", "device", "num_workers", "rank"),
    *("began", "imports", "initialize", "run", "finalize", "settings", "recipe"),
}
LOADING = ("num_workers", "persistent_workers", "pin_memory")


@dataclass(eq=False)
class RunFolders:
    """The folders that a training writes to: locked, and known to be free, or the run's own.

    What a run is, is kept in a hidden file of both folders: its settings, all other values of its config, and its data
    (see `describe_data`). A run that was killed goes on if it is the same; a finished one is not repeated. Where
    MONAI Label trains, results are replaced, as its users expect.

    Args:
        ckpt_dir: folder of the weights.
        output_dir: folder of history, curves and state.
        settings: plain values that make the run what it is.
        data: lists of items by name, such as training and validation.
        pretrained: file of the first weights, whose content counts.
        overwrite: train anew where another run, or a finished one, has results.
    """

    ckpt_dir: str
    output_dir: str
    settings: Mapping[str, Any]
    data: Mapping[str, Sequence[Mapping[str, Any]]]
    pretrained: str | os.PathLike | None = None
    overwrite: bool | str = False
    record: dict[str, Any] = field(default_factory=dict, init=False)
    config: dict[str, Any] = field(default_factory=lambda: _current_config(), init=False)
    taken: bool = field(default=False, init=False)

    def take(self) -> None:
        """Lock the folders, once, and refuse those of others; of several processes the first does.

        Raises:
            BlockingIOError: naming the process that holds a folder.
            FileNotFoundError: if there is no file `pretrained`.
            ValueError: naming what differs, if a folder has results, or the state, of another run.
            SystemExit: with status 0, if this run is finished.
        """
        if self.taken:
            return
        answer: list[Any] = [None]
        if is_first_process():
            try:
                answer = [self._take()]
            except (ValueError, OSError) as error:
                answer = [error]
        if distributed.is_initialized():
            distributed.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        if answer[0]:
            if is_first_process():
                say(answer[0])  # whatever the log shows
            sys.exit(0)
        self.taken = True

    def finish(self) -> None:
        """Record that the run came to its end."""
        if self.record:
            self._write(finished=True)

    def _take(self) -> str:
        """Take the folders; the sentence to end with, if there is nothing to do."""
        places = list(dict.fromkeys((Path(self.ckpt_dir), Path(self.output_dir))))
        hold(*places)
        remove_unfinished(*places)
        found = {place: _read(place / RECORD) for place in places}
        kept = [record for record in found.values() if record]
        self.record = self._describe(kept[0] if kept else {})
        differ = next((d for record in kept if (d := self._find_differences(record))), [])
        state, weights = places[-1] / STATE, sorted(places[0].glob("model*.pt"))
        finished = bool(weights) and any(record["finished"] for record in kept)
        if "monailabel" in sys.modules or str(self.overwrite).lower() == "true":
            if differ or finished or not kept:
                state.unlink(missing_ok=True)
        elif not kept and (weights or state.is_file()):
            there = weights[0] if weights else state
            raise ValueError(f"{there}: of a run that left no record of what it is; {_remedy('replace it')}")
        elif differ and (finished or state.is_file()):
            what = "finished run" if finished else "run that can go on"
            where = " and ".join(str(place) for place in places if found[place])
            raise ValueError(f"{where}: there is a {what}, but {few(differ, 3)}; {_remedy('lose it and train anew')}")
        elif finished:
            return f"{weights[0]}: this run is finished; give --overwrite true to train it anew"
        self._write(finished=False)
        return ""

    def _write(self, finished: bool) -> None:
        for place in {self.ckpt_dir, self.output_dir}:
            write_json(Path(place) / RECORD, {**self.record, "finished": finished}, indent=None)

    def _describe(self, known: Mapping[str, Any]) -> dict[str, Any]:
        if self.pretrained and not os.path.isfile(self.pretrained):
            raise FileNotFoundError(f"{self.pretrained}: no such checkpoint file; give --pretrained the path of one")
        own = {**self.settings, "pretrained": hash_file(self.pretrained) if self.pretrained else None}
        others = {name: value for name, value in _leaves(self.config) if name not in own}
        data = known.get("data", {})
        described = {name: describe_data(items, data.get(name)) for name, items in self.data.items()}
        return json.loads(json.dumps({"settings": own, "config": others, "data": described}, default=str))

    def _find_differences(self, kept: Mapping[str, Any]) -> list[str]:
        differ = []
        for kind in ("settings", "config"):
            names = dict.fromkeys([*self.record[kind], *kept[kind]])
            pairs = ((name, kept[kind].get(name), self.record[kind].get(name)) for name in names)
            differ += [f"{name} was {_short(then)}, is {_short(now)}" for name, then, now in pairs if then != now]
        nothing: dict[str, Any] = {"count": 0, "list": "", "files": {}}
        for name in dict.fromkeys([*self.record["data"], *kept["data"]]):
            one, other = (record["data"].get(name, nothing) for record in (kept, self.record))
            differ += [f"{name} data: {difference}" for difference in find_differences(one, other)]
        return differ


def _remedy(what: str) -> str:
    return f"name another --ckpt_dir and --output_dir, or give --overwrite true to {what}"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
        if {"settings", "config", "data", "finished"} <= record.keys():
            return record
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path}: not the whole record of a run; delete it, and {_remedy('train anew')}")


def _current_config() -> dict[str, Any]:
    """Find the config that is being evaluated, with all overrides, since expressions of a config cannot refer to it."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(parser := frame.f_locals.get("self"), ConfigParser):
            return {name: value for name, value in parser.config.items() if name not in ELSEWHERE}
        frame = frame.f_back
    return {}


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Give the values of a nested config by their ids."""
    if isinstance(node, dict | list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in pairs:
            if key not in LOADING:
                yield from _leaves(child, f"{name}::{key}" if name else str(key))
    else:
        yield name, node
