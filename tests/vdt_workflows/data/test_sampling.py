import traceback
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.transforms import Compose, Lambdad, RandFlipd

from tests.makers.pictures import write_picture
from tests.support.augmented import RandCount, augmentation, images, loaded, same
from vdt_transforms import ImageDecodeError, LoadNaturalImaged
from vdt_workflows.data.images import collate_images
from vdt_workflows.data.sampling import SeededDataset, SeededSampler, SeedEpochs, mix_seed


def epoch_of(number, size, **options):
    sampler = SeededSampler(range(size), **options)
    sampler.set_epoch(number)
    return list(sampler)


def test_mixed_seeds_fit_numpy_and_differ():
    seeds = {mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert mix_seed(1, 2) == mix_seed(1, 2) != mix_seed(2, 1)


# SeededSampler


@pytest.mark.parametrize("size", [1, 2, 13])
def test_each_pass_is_a_permutation_and_no_two_are_alike(size):
    epochs = [epoch_of(number, size) for number in range(4)]
    for number, keys in enumerate(epochs):
        assert [p for p, _ in keys] == [number] * size
        assert sorted(i for _, i in keys) == list(range(size))
    if size > 2:
        assert len({tuple(i for _, i in keys) for keys in epochs}) == 4


@pytest.mark.parametrize("samples", [1, 4, 9, 10, 11, 25, 40])
def test_no_sample_comes_twice_before_all_came_once_whatever_the_length_of_an_epoch(samples):
    stream = list(chain.from_iterable(epoch_of(number, 10, samples=samples) for number in range(12)))
    assert len(stream) == 12 * samples
    for start in range(0, len(stream) - 9, 10):
        assert sorted(i for _, i in stream[start : start + 10]) == list(range(10))
    counts = Counter(i for _, i in stream)
    assert max(counts.values()) - min(counts[i] for i in range(10)) <= 1
    assert len(set(stream)) == len(stream)


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    assert epoch_of(3, 20, seed=5) == epoch_of(3, 20, seed=5)
    assert epoch_of(3, 20, seed=5) != epoch_of(3, 20, seed=6)
    sampler = SeededSampler(range(20), seed=5)
    for number in (0, 7, 3):
        sampler.set_epoch(number)
        assert list(sampler) == list(sampler) == epoch_of(number, 20, seed=5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "samples"), [(12, None), (13, None), (7, 12), (5, 11), (3, None), (10, 1)])
def test_the_processes_shares_interleave_to_the_batches_of_one_process(size, samples, world_size):
    for number in range(3):
        one, following = (epoch_of(n, size, samples=samples) for n in (number, number + 1))
        options = [{"samples": samples, "rank": rank, "num_replicas": world_size} for rank in range(world_size)]
        shares = [epoch_of(number, size, **option) for option in options]
        together = list(chain.from_iterable(zip(*shares, strict=True)))
        assert together[: len(one)] == one
        opened = together[len(one) :]  # by the next epoch, where it is long enough
        assert opened[: len(following)] == following[: len(opened)]
        assert {len(SeededSampler(range(size), **option)) for option in options} == {len(shares[0])}


@pytest.mark.parametrize("counts", [(8, 8), (3, 10), (11, 4), (5, 2, 9)])
def test_with_classes_each_is_drawn_equally_often_and_no_key_twice(counts):
    classes = np.repeat(range(len(counts)), counts)
    sampler = SeededSampler(range(len(classes)), classes=classes.tolist())
    keys = []
    for epoch in range(12):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(set(Counter(classes[index] for _, index in drawn).values())) == 1
        keys += drawn
    assert len(set(keys)) == len(keys)
    for label, count in enumerate(counts):
        times = Counter(index for _, index in keys if classes[index] == label)
        assert len(times) == count
        assert max(times.values()) - min(times.values()) <= 1


def test_with_classes_the_processes_share_one_mixed_order():
    classes = [0] * 3 + [1] * 9
    one, two = (
        [list(SeededSampler(range(12), classes=classes, rank=rank, num_replicas=n)) for rank in range(n)]
        for n in (1, 2)
    )
    assert [key for pair in zip(*two, strict=True) for key in pair] == one[0]
    assert {classes[index] for _, index in two[0]} == {0, 1}
    assert one[0] != list(SeededSampler(range(12), classes=classes, seed=1))


def test_nothing_to_sample_is_an_error():
    with pytest.raises(ValueError, match="data is empty; expected at least one sample"):
        SeededSampler([])


# SeededDataset


@pytest.mark.parametrize("workers", [1, 2])
def test_draws_do_not_depend_on_the_number_of_workers_nor_on_torchs_seed(workers):
    """MONAI's loader seeds the transforms of each worker anew."""
    expected = loaded(SeededDataset(images(), augmentation()))
    assert same(loaded(SeededDataset(images(), augmentation()), workers, seed=1), expected)


def test_draws_depend_on_the_seed_the_pass_and_the_index():
    drawn = []
    for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0)):
        rows = loaded(SeededDataset(images(), augmentation(), seed=seed), epoch=epoch)
        drawn += [row[1] for row in rows.values()]
    assert len(set(drawn)) == len(drawn) == 24


def test_draws_do_not_depend_on_what_was_drawn_before():
    dataset = SeededDataset(images(), augmentation())
    expected = dataset[2, 4]
    for key in ((0, 0), (2, 3), (5, 4)):
        dataset[key]
    again, fresh = dataset[2, 4], SeededDataset(images(), augmentation())[2, 4]
    for other in (again, fresh):
        assert torch.equal(other["image"], expected["image"])
        assert other["drawn"] == expected["drawn"]
    assert torch.equal(dataset[4]["image"], dataset[0, 4]["image"])  # a plain index is one of pass 0


def test_the_draws_of_one_sample_go_on_from_one_transform_to_the_next():
    """Two like transforms that were seeded alike would draw alike."""
    dataset = SeededDataset([{"image": 0}], [RandCount(), Lambdad("drawn", lambda x: x), RandCount()])
    first = SeededDataset([{"image": 0}], RandCount())[0]
    assert dataset[0]["drawn"] != first["drawn"]


def test_draws_with_persistent_workers_follow_the_epoch():
    dataset = SeededDataset(images(), augmentation())
    sampler = SeededSampler(dataset)
    loader = DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        drawn = [number for batch in loader for number in batch["drawn"].tolist()]
        assert drawn == [row[1] for row in loaded(dataset, epoch=epoch).values()]


# Errors


@pytest.fixture
def pictures(tmp_path):
    for name in "ac":
        write_picture(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    return [{"image": str(tmp_path / f"{name}.png"), "label": i} for i, name in enumerate("abc")]


def fail(value):
    raise ValueError("the sentence that helps")


def test_a_picture_that_does_not_decode_raises_its_own_sentence(pictures):
    dataset = SeededDataset(pictures, Compose([Compose([LoadNaturalImaged("image")]), RandFlipd("image")]))
    with pytest.raises(ImageDecodeError, match=r"^cannot read the image .*b\.png: its content is no picture"):
        dataset[0, 1]


def test_with_skip_the_reason_takes_the_pictures_place(pictures):
    dataset = SeededDataset(pictures, [LoadNaturalImaged("image")], on_error="skip")
    assert set(dataset[0, 1]) == {"skipped"}
    assert dataset[0, 1]["skipped"].startswith(f"cannot read the image {pictures[1]['image']}: ")
    (batch,) = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=collate_images)
    assert batch["label"].tolist() == [0, 2]
    assert batch["skipped"] == [dataset[0, 1]["skipped"]]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_other_errors_are_raised_as_they_are_whatever_on_error_says(on_error):
    dataset = SeededDataset(images(), [Compose([Lambdad("image", fail)]), RandCount()], on_error=on_error)
    with pytest.raises(ValueError, match=r"^the sentence that helps$"):
        dataset[0, 0]


def test_an_error_in_a_worker_still_shows_the_sentence():
    loader = DataLoader(SeededDataset(images(), Lambdad("image", fail)), batch_size=2, num_workers=1)
    with pytest.raises(ValueError, match="the sentence that helps") as error:
        list(loader)
    traceback.clear_frames(error.tb)  # lets go of the worker, which the garbage collector would wait 5 s for


def test_an_unknown_on_error_is_refused():
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        SeededDataset([], [], on_error="ignore")


# SeedEpochs


def run_with(seed, rank=0, first=0):
    """The sampler's epoch and a torch draw in each of three epochs, the first `first` of them passed over."""
    sampler, seen = SeededSampler(range(4)), []
    engine = Engine(lambda engine, batch: seen.append((sampler.epoch, torch.rand(()).item())))
    SeedEpochs(sampler, seed, rank).attach(engine)
    if first:
        engine.load_state_dict({"epoch": first, "max_epochs": 3, "epoch_length": 1})
    engine.run([0], max_epochs=3)
    return seen


def test_each_epoch_is_counted_from_0_and_seeds_torch():
    seen = run_with(seed=0)
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert len({value for _, value in seen}) == 3
    torch.manual_seed(123)
    assert run_with(seed=0) == seen
    assert run_with(seed=0, first=2) == seen[2:]
    assert run_with(seed=1) != seen
    assert run_with(seed=0, rank=1) != seen
