"""Volumes that are decoded, checked and resampled once, and of which patches are drawn many times."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, RandomizableTrait, Transform
from torch import distributed

from vdt_transforms.slice_stacks import SLICE_NAME
from vdt_workflows.data.headers import check_checksum
from vdt_workflows.data.sampling import Key, SharedState, without_wrapping
from vdt_workflows.errors import check_choice
from vdt_workflows.files import has_mark, mark_of, read_mark, save_atomic, stamp_of, write_json
from vdt_workflows.parallel import free_memory, local_share
from vdt_workflows.progress import track

logger = logging.getLogger(__name__)
MOST = 0.6  # of the free memory that samples may take


class SeededCacheDataset(Dataset):
    """Prepare each sample once, and seed what is random for each (pass, index) key of a `SeededSampler`.

    What comes before the first random transform is done once for each sample. The first random transform, usually a
    crop, gets the kept sample itself and must not write into it; what it returns is copied.

    The "memory" cache alone is `monai.data.CacheDataset(copy_cache=False)` with these seeds, copies and sentences.
    `PersistentDataset` reads a whole volume from disk for each patch, which the "disk" cache does not.

    Args:
        data: sequence of dictionaries.
        transform: transform or list of transforms.
        seed: seed of the draws.
        cache: "memory" keeps the prepared samples, and their size is logged. It becomes "disk" where there is a
            `cache_dir` and the samples would not fit the memory that is free, or several processes of this machine are
            to share them. "disk" writes them to `cache_dir`, where later runs and other
            processes of the machine find them, and maps them into memory, so that a crop reads little more than itself;
            "none" prepares a sample each time it is asked for. The first two take 4 bytes for each float32 voxel of an
            image and 1 for each uint8 voxel of a label.
        cache_dir: folder of the "disk" cache. A file there belongs to the sample's own files (path, size and times of
            change; all slices of its folder) and to the transforms, and is never used for others. Its hash is kept
            beside it: what is damaged or was changed is named and made again. Nothing is deleted: remove the folder
            yourself.
        num_workers: threads that prepare the samples at the start.
        on_error: "raise" stops at a sample that cannot be prepared; "skip" names it, leaves it out and goes on. With
            the "none" cache each sample is then prepared once more, at the start, to know.
        progress: whether to show a bar while preparing.

    Raises:
        ValueError: if `cache` or `on_error` is unknown, `cache_dir` is missing, or no sample can be prepared; and what
            the transforms raise for a sample.
    """

    def __init__(
        self,
        data: Sequence,
        transform: Callable | Sequence[Callable],
        *,
        seed: int = 0,
        cache: str = "memory",
        cache_dir: str | os.PathLike | None = None,
        num_workers: int = 0,
        on_error: str = "raise",
        progress: bool = True,
    ) -> None:
        check_choice("cache", cache, ("memory", "disk", "none"))
        check_choice("on_error", on_error, ("raise", "skip"))
        if cache == "disk" and cache_dir is None:
            raise ValueError("cache 'disk' needs cache_dir, a folder for the prepared samples")
        super().__init__(data, transform if isinstance(transform, Compose) else Compose(transform))
        self.data: Sequence = data
        self.random = SharedState(seed)
        first = self.transform.get_index_of_first(
            lambda t: isinstance(t, RandomizableTrait) or not isinstance(t, Transform)
        )
        self.fixed = len(self.transform.transforms) if first is None else first
        self.recipe = ""
        if cache != "none" and cache_dir is not None:
            self.recipe = str(pickle_hashing(self.transform.transforms[: self.fixed]))
        self.cache = cache
        self.cache_dir = cache_dir
        self.kept: list[Any] = []
        self.sizes: list[int] = []  # bytes of what is kept in memory
        self.room = MOST * free_memory()
        self.stamps: dict[Path, list[int]] = {}  # of the files of the "disk" cache
        self.folders: dict[str, Any] = {}
        if cache != "none" or on_error == "skip":
            self._prepare_all(num_workers, on_error, progress)

    def _prepare_all(self, num_workers: int, on_error: str, progress: bool) -> None:
        rank, ranks = local_share()
        if self.cache == "memory" and self.cache_dir is not None and ranks > 1:
            self.cache = "disk"  # whose files the processes map: one copy in memory for all of them
        label = "prepared" if progress else ""
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            if self.cache == "disk" and ranks > 1 and distributed.is_initialized():
                list(pool.map(partial(self._try, "skip"), self.data[rank::ranks]))  # faults are told below, by all
                distributed.barrier()
            outcomes = list(track(pool.map(partial(self._try, on_error), self.data), len(self.data), label))
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        for fault in faults:
            logger.warning("%s; the case is left out", fault)
        if len(faults) == len(outcomes):
            raise ValueError(f"none of the {len(outcomes)} samples can be used, see above" if faults else "no samples")
        if faults:
            logger.warning("%d of %d samples are left out", len(faults), len(outcomes))
        usable = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
        self.data = [self.data[i] for i in usable]
        self.kept = [outcomes[i] for i in usable]
        if self.cache == "disk":  # some may be in memory from before it proved too small
            self.kept = [
                k if isinstance(k, Path) else self._keep(i, k) for i, k in zip(self.data, self.kept, strict=True)
            ]
            self.sizes = [path.stat().st_size for path in self.kept]
        if self.sizes and rank == 0:
            where = "in memory" if self.cache == "memory" else f"on disk, in {self.cache_dir}"
            logger.info("%d samples are kept %s, %.2g GB", len(self.kept), where, sum(self.sizes) / 1e9)

    def _try(self, on_error: str, item: Any) -> Any:
        try:
            return self._keep(item)
        except (ValueError, OSError) as error:
            if on_error == "raise":
                raise
            return error

    def _weigh(self, prepared: Any) -> None:
        """Count a sample that is kept in memory; turn to the disk if all of them would take more than there is."""
        tensors = [value for value in prepared.values() if isinstance(value, torch.Tensor)]
        self.sizes.append(sum(tensor.nbytes for tensor in tensors))
        total = sum(self.sizes) / len(self.sizes) * len(self.data)
        if total > self.room and self.cache_dir is not None and self.cache == "memory":
            self.cache = "disk"
            few = "%.2g GB of samples do not fit the %.2g GB of memory for them; they go to disk, in %s"
            logger.warning(few, total / 1e9, self.room / 1e9, self.cache_dir)

    def _keep(self, item: Any, prepared: Any = None) -> Any:
        """Prepare a sample and give what is kept of it: itself, the name of its file, or nothing."""
        if self.cache != "disk":
            _check_files(item)
            prepared = self._prepare(item)
            if self.cache == "memory":
                self._weigh(prepared)
            if self.cache != "disk":
                return prepared if self.cache == "memory" else None
        path = Path(self.cache_dir or "", f"{self._identity(item)}.pt")
        record = path.with_suffix(".json")
        if not has_mark(path, read_mark(record)):
            if path.is_file():
                logger.warning("%s: damaged, or changed since it was written; it is made again", path)
            _check_files(item)
            save_atomic(_to_plain(self._prepare(item) if prepared is None else prepared), path)
            write_json(record, mark_of(path))
        self.stamps[path] = stamp_of(path)
        return path

    def _prepare(self, item: Any) -> Any:
        try:
            return self.transform(item, end=self.fixed, threading=True) if self.fixed else item
        except RuntimeError as error:
            raise _name_file(without_wrapping(error), item) from None

    def _identity(self, item: Any) -> str:
        """Name a sample by its files as they are now, and by the transforms that prepare it."""
        parts: dict[str, Any] = {"item": item, "transforms": self.recipe}
        for key, value in item.items():
            if isinstance(value, str) and os.path.exists(value):
                parts[str(key)] = [os.path.abspath(value), self._stamp(value)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _stamp(self, path: str) -> Any:
        """Stamp of a file, or of all files of a folder; so of a numbered slice, read with its neighbours."""
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if folder != path and not SLICE_NAME.match(os.path.basename(path)):
            return stamp_of(path)
        if folder not in self.folders:
            self.folders[folder] = {entry.name: stamp_of(entry) for entry in os.scandir(folder) if entry.is_file()}
        return self.folders[folder]

    def __getitem__(self, key: Key | int) -> Any:
        index = self.random.seed_for(key, self.transform)
        if self.cache == "memory":
            prepared = self.kept[index]
        elif self.cache == "disk":
            path = self.kept[index]
            if (stamp := stamp_of(path)) != self.stamps[path]:
                if not has_mark(path, read_mark(path.with_suffix(".json"))):  # as it has, if another process wrote it
                    raise ValueError(f"{path}: changed while in use; start again, and what is damaged is made again")
                self.stamps[path] = stamp
            # A private map: what is written to it changes neither the file nor another map.
            prepared = _from_plain(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        else:
            prepared = self._prepare(self.data[index])
        steps = len(self.transform.transforms)
        if self.fixed == steps:
            return dict(prepared)
        try:
            drawn = self.transform(prepared, start=self.fixed, end=self.fixed + 1)
            drawn = _without_sharing(drawn, prepared)
            return self.transform(drawn, start=self.fixed + 1) if self.fixed + 1 < steps else drawn
        except RuntimeError as error:
            raise without_wrapping(error) from None


def _files(item: Any) -> list[str]:
    values = item.values() if isinstance(item, Mapping) else ()
    return [value for value in values if isinstance(value, str) and os.path.isfile(value)]


def _check_files(item: Any) -> None:
    for file in _files(item):
        check_checksum(file)


def _name_file(error: BaseException, item: Any) -> BaseException:
    """Name the volume that cannot be read, where a decompressor's or a reader's error does not."""
    files = _files(item)
    if isinstance(error, MemoryError) or any(file in str(error) for file in files):
        return error
    for file in files:
        try:
            np.asanyarray(nib.load(file).dataobj)
        except Exception as reason:  # broken bytes raise whatever they lead to
            what = f"damaged or cut short ({type(reason).__name__}: {reason})"
            return ValueError(f"{file}: {what}; copy or download it again")
    return error


def _storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def _without_sharing(drawn: Any, prepared: dict) -> Any:
    """Copy what a transform returned as a view of a kept sample, so that later ones may write into it."""
    if isinstance(drawn, list):
        return [_without_sharing(part, prepared) for part in drawn]
    kept = {_storage(value) for value in prepared.values()} - {None}
    return {key: value.clone() if _storage(value) in kept else value for key, value in drawn.items()}


def _to_plain(value: Any) -> Any:
    """Take apart what a file that is read with `weights_only` cannot hold."""
    if isinstance(value, MetaTensor):
        meta, done = _to_plain(dict(value.meta)), _to_plain(value.applied_operations)
        return {"_volume_": value.as_tensor().contiguous(), "_affine_": value.affine, "_meta_": meta, "_done_": done}
    if isinstance(value, np.ndarray):
        return _to_plain(value.tolist()) if value.dtype.kind in "OSU" else torch.as_tensor(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):  # MONAI's of coordinate systems are strings too, which Python 3.11.2 pickles otherwise
        return _to_plain(value.value)
    if isinstance(value, dict):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | torch.Size):
        return [_to_plain(v) for v in value]
    return value if isinstance(value, torch.Tensor | bool | int | float | str | None) else str(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict) and "_volume_" in value:
        done = _from_plain(value["_done_"])
        return MetaTensor(value["_volume_"], value["_affine_"], _from_plain(value["_meta_"]), applied_operations=done)
    if isinstance(value, dict):
        return {k: _from_plain(v) for k, v in value.items()}
    return [_from_plain(v) for v in value] if isinstance(value, list) else value
