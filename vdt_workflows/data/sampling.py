"""Datasets and a sampler whose every random draw is a function of (seed, pass over the data, sample index).

The state of worker processes does not survive a restart, so nothing here depends on it: a run that is killed and
resumed sees the same samples, in the same order, with the same augmentation, for any number of workers and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.transforms import Compose, Randomizable
from torch.utils.data import Sampler, get_worker_info

from vdt_transforms import ImageDecodeError
from vdt_workflows.errors import check_choice
from vdt_workflows.parallel import follow_parent

Key = tuple[int, int]


def mix_seed(*numbers: int) -> int:
    """Mix numbers into one 32-bit seed; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededSampler(Sampler[Key]):
    """Yield (pass, index) keys of one epoch, in an order that depends on the seed and the epoch alone.

    Consecutive epochs continue one endless shuffled stream, so that no sample comes twice before all came once. Each
    process takes every `num_replicas`-th key of it: the processes' batches together are those of one process. At the
    end of an epoch the first keys of the next are added where needed for all processes to get the same number.

    With `classes`, each class is drawn equally often: each has an endless shuffled stream of its own, and a pass over
    the data mixes equal parts of the streams. The keys then carry the passes over the class, so that a sample that
    comes often is augmented differently each time.

    Args:
        data: what is sampled; only its length is used.
        samples: keys of one epoch over all processes; the length of `data` by default.
        seed: seed of the order.
        rank: number of this process.
        num_replicas: number of processes.
        classes: class of each sample, to draw all classes equally often.

    Raises:
        ValueError: if there is nothing to sample.
    """

    def __init__(
        self,
        data: Sized,
        *,
        samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        if not len(data):
            raise ValueError("data is empty; expected at least one sample")
        self.size = len(data)
        self.members = None
        if classes is not None:
            self.members = [np.flatnonzero(np.asarray(classes) == c) for c in np.unique(classes)]
            self.size = -(-self.size // len(self.members)) * len(self.members)  # each class as often as the others
        self.samples = self.size if samples is None else samples
        self.seed, self.rank, self.num_replicas = seed, rank, num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose keys come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // self.num_replicas)

    def __iter__(self) -> Iterator[Key]:
        start = self.epoch * self.samples + self.rank
        passes: dict[int, np.ndarray] = {}
        for step in range(len(self)):
            number, place = divmod(start + step * self.num_replicas, self.size)
            if number not in passes:
                passes = {number: self._keys(number)}
            yield tuple(passes[number][place].tolist())

    def _keys(self, number: int) -> np.ndarray:
        """Give the keys of one pass over the data, in their order."""
        if self.members is None:
            return np.stack((np.full(self.size, number), self._permutation(self.size, number)), axis=1)
        each = self.size // len(self.members)
        keys = []
        for label, members in enumerate(self.members):
            places = np.arange(number * each, (number + 1) * each)  # of the class's stream
            for turn in np.unique(places // len(members)):
                within = places[places // len(members) == turn] % len(members)
                order = members[self._permutation(len(members), int(turn), label)]
                keys.append(np.stack((np.full(len(within), turn), order[within]), axis=1))
        return np.concatenate(keys)[self._permutation(self.size, number)]

    def _permutation(self, size: int, *numbers: int) -> np.ndarray:
        return np.random.default_rng(mix_seed(self.seed, *numbers)).permutation(size)


class SharedState:
    """One random state for all transforms of a dataset, seeded anew for each sample.

    `Compose.set_random_state` makes a new state for each random transform, at 0.2 ms apiece more than a small picture
    takes to decode; seeding a state that is there takes a hundredth of that.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.state = np.random.RandomState()
        self.follows = False

    def seed_for(self, key: Key | int, transform: Callable) -> int:
        """Let `transform` draw what belongs to a (pass, index) key, or to an index of pass 0; return the index."""
        if get_worker_info() is not None and not self.follows:  # torch's own look for the main process takes seconds
            self.follows = True
            follow_parent()
        number, index = key if isinstance(key, tuple) else (0, key)
        self._share(transform)  # every time, as MONAI's workers seed each transform apart when they start
        self.state.seed(mix_seed(self.seed, number, index))
        return index

    def _share(self, transform: Callable) -> None:
        if isinstance(transform, Compose):
            transform.R = self.state
            for inner in transform.transforms:
                self._share(inner)
        elif isinstance(transform, Randomizable):
            transform.set_random_state(state=self.state)


class SeededDataset(Dataset):
    """`monai.data.Dataset` that seeds its transform for each (pass, index) key of a `SeededSampler`.

    Args:
        data: sequence of dictionaries.
        transform: transform or list of transforms for one dictionary.
        seed: seed of the draws.
        on_error: "raise" stops at an image that does not decode; "skip" gives `{"skipped": reason}` in its place, for
            `collate_images` to leave out and `SkippedImages` to count.
    """

    def __init__(
        self, data: Sequence, transform: Callable | Sequence[Callable], *, seed: int = 0, on_error: str = "raise"
    ) -> None:
        check_choice("on_error", on_error, ("raise", "skip"))
        super().__init__(data, transform if isinstance(transform, Compose) else Compose(transform))
        self.random = SharedState(seed)
        self.on_error = on_error

    def __getitem__(self, key: Key | int) -> Any:
        index = self.random.seed_for(key, self.transform)
        try:
            return super().__getitem__(index)
        except RuntimeError as error:
            reason = without_wrapping(error)
            if self.on_error == "skip" and isinstance(reason, ImageDecodeError):
                return {"skipped": str(reason)}
            raise reason from None


def without_wrapping(error: BaseException) -> BaseException:
    """Find what went wrong below MONAI's "applying transform" errors, which hide the sentence that helps."""
    while error.__cause__ is not None and str(error).startswith("applying transform"):
        error = error.__cause__
    return error


@dataclass(eq=False)
class SeedEpochs:
    """Handler: at the start of each epoch, set the sampler's epoch and seed torch (dropout) for it.

    Args:
        sampler: the training data's sampler.
        seed: seed of the run; each process adds its rank.
        rank: number of this process.
    """

    sampler: SeededSampler
    seed: int = 0
    rank: int = 0

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that starts."""
        self.sampler.set_epoch(engine.state.epoch - 1)
        torch.manual_seed(mix_seed(self.seed, engine.state.epoch, self.rank))
