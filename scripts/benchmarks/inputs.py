"""The benchmarks of training input: pictures of class folders, and stacks of nine slices."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.timing import alternate, quartiles, quartiles_of, ratio
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vdt_transforms import (
    MEAN,
    STD,
    ImageToVolumed,
    LoadNaturalImaged,
    RandResizedCropImaged,
    RandSliceShuffled,
    SliceStackReader,
    SliceStackReaderd,
)
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.images import collate_images, scan_class_folders
from vdt_workflows.data.sampling import SeededDataset
from vdt_workflows.preparation.images import prepare_images

BATCH = 32  # pictures
SERIES = ("000001_01_01", "000002_01_01")
DISTANCE, NEIGHBOURS = 2.5, 4  # mm between the slices of a stack, and how many lie on either side of the key slice


def compare_pipelines(
    images: int = 200, repeats: int = 5, size: int = 224, workers: Sequence[int] = (1, 2)
) -> dict[str, Any]:
    """Compare the images/s of one core, from JPEG files to float32 batches, with torchvision's usual chain.

    Theirs is ImageFolder, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize. Both pipelines draw, and then
    use the same boxes and flips, so that they do the same work and their pixels can be compared. Each reads the
    pictures as they are, and as `vdt prepare images` writes them. The rates are by the processor's time, which other
    work on the machine hardly changes; those of loader processes are by the clock.

    Args:
        images: pictures to make (500 x 375, and as large as ImageNet's files).
        repeats: timed passes of each pipeline.
        size: rows and columns of the crop.
        workers: numbers of loader processes, whose images/s are measured from either kind of file.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root, cache = Path(made, "raw"), Path(made, "prepared")
        make_pictures(root, images)
        start = time.process_time()
        prepare_images(str(root), str(cache), on_error="skip", workers=1)
        preparing = time.process_time() - start
        pairs = {"raw": PipelinePair(root, images, size, made), "prepared": PipelinePair(cache, images, size, made)}
        passes: dict[str, Callable[[], object]] = {}
        for kind, pair in pairs.items():
            passes |= {f"ours_{kind}": pair.run_ours, f"theirs_{kind}": pair.run_theirs}
        number = len(pairs["raw"].chosen)
        seconds = alternate(passes, repeats, time.process_time)
        rates = {name: [number / s for s in found] for name, found in seconds.items()}
        return {
            "settings": {"images": number, "size": size, "repeats": repeats, "batch": BATCH},
            "file_kB": {kind: pair.kilobytes() for kind, pair in pairs.items()},
            "images_per_second_of_a_core": quartiles_of(rates),
            "ours_raw_to_theirs_raw": ratio(rates["ours_raw"], rates["theirs_raw"]),
            "ours_prepared_to_theirs_raw": ratio(rates["ours_prepared"], rates["theirs_raw"]),
            "ours_prepared_to_theirs_prepared": ratio(rates["ours_prepared"], rates["theirs_prepared"]),
            "mean_absolute_difference_of_255": {kind: pair.difference for kind, pair in pairs.items()},
            "our_stages_ms": {kind: pair.time_stages() for kind, pair in pairs.items()},
            "preparing_ms_an_image": round(1000 * preparing / max(len(scan_class_folders(root, index_dir=made)), 1), 2),
            "images_per_second_by_the_clock": {
                f"{kind}, {count} workers": quartiles([pair.run_loader(count) for _ in range(min(repeats, 3))])
                for kind, pair in pairs.items()
                for count in workers
            },
        }


class PipelinePair:
    """Our pipeline and torchvision's over the same files, with the same boxes and flips."""

    def __init__(self, root: Path, images: int, size: int, index_dir: str) -> None:
        listed = scan_class_folders(root, index_dir=index_dir)
        self.chosen = listed.subset(np.random.default_rng(0).permutation(len(listed))[:images])
        crop = RandResizedCropImaged("image", size)
        to_volume: list[Callable] = [LoadNaturalImaged("image"), crop, ImageToVolumed("image")]
        self.ours = SeededDataset(self.chosen, [*to_volume, RandSliceShuffled("image")])
        self.theirs = TorchvisionChain(root, [sample["image"] for sample in self.chosen], size)
        self.collate = partial(collate_images, mean=MEAN, std=STD)
        in_rgb_order = SeededDataset(self.chosen, to_volume)
        differences = []
        for i in range(len(self.chosen)):
            volume = in_rgb_order[0, i]["image"][0]
            self.theirs.draws.append((crop.transform.box, crop.transform.flip))
            differences.append((volume - (STD * self.theirs[i][0] + MEAN)).abs().mean().item())
        self.difference = round(float(np.mean(differences)), 3)

    def run_ours(self) -> None:
        """Make each batch once."""
        self._make_batches(lambda i: self.ours[0, i], self.collate)

    def run_theirs(self) -> None:
        """Make each batch once, as torchvision does."""
        self._make_batches(self.theirs.__getitem__, default_collate)

    def _make_batches(self, sample: Callable[[int], Any], collate: Callable[[list], Any]) -> None:
        for start in range(0, len(self.chosen), BATCH):
            collate([sample(i) for i in range(start, min(start + BATCH, len(self.chosen)))])

    def run_loader(self, workers: int, passes: int = 4) -> float:
        """Images/s of loader processes, from the first batch on."""
        keys = [(number, i) for number in range(passes) for i in range(len(self.chosen))]
        loader: DataLoader = DataLoader(self.ours, BATCH, sampler=keys, num_workers=workers, collate_fn=self.collate)
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        done = sum(len(batch["label"]) for batch in batches)
        return done / (time.perf_counter() - start)

    def kilobytes(self) -> int:
        """Mean size of a file."""
        return round(float(np.mean([os.path.getsize(sample["image"]) for sample in self.chosen])) / 1000)

    def time_stages(self) -> dict[str, float]:
        """Mean processor time of each of our transforms over all samples, in ms."""
        samples = [dict(sample) for sample in self.chosen]
        stages = {}
        for transform in self.ours.transform.transforms:
            start = time.process_time()
            samples = [transform(sample) for sample in samples]
            stages[type(transform).__name__] = round(1000 * (time.process_time() - start) / len(samples), 3)
        return stages


class TorchvisionChain(Dataset):
    """ImageFolder with the usual training transforms, which draw as they do and then use the boxes of `draws`."""

    def __init__(self, root: Path, files: Sequence[str], size: int) -> None:
        self.draws: list[tuple[tuple[int, int, int, int], bool]] = []
        self.folder = ImageFolder(str(root), allow_empty=True)  # a prepared data set has a folder of records
        labels = dict(self.folder.samples)
        self.folder.samples = [(file, labels[file]) for file in files]
        self.crop = transforms.RandomResizedCrop(size)
        self.to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize([MEAN / 255] * 3, [STD / 255] * 3)]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.folder[index]
        self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        torch.rand(1)  # RandomHorizontalFlip's draw
        box, flip = self.draws[index]
        image = transforms.functional.resized_crop(image, *box, self.crop.size, self.crop.interpolation)
        if flip:
            image = transforms.functional.hflip(image)
        return self.to_tensor(image), label


def make_pictures(root: Path, number: int) -> None:
    """Make JPEG files whose spectrum falls with frequency as a photograph's, so that they cost as much to decode."""
    rows, columns = 375, 500
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    frequency[0, 0] = 1.0

    def layer(fall: float) -> np.ndarray:
        noise = np.fft.rfft2(rng.normal(size=(rows, columns)))
        picture = np.fft.irfft2(noise / frequency**fall, s=(rows, columns))
        return picture / picture.std()

    for i in range(number):
        light = layer(1.35)  # gives about 110 kB at quality 95, the mean of ImageNet's files
        colours = [118 + 55 * (light + 0.4 * layer(1.55)) for _ in range(3)]
        file = root / f"class_{i % 2}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(colours, axis=-1).clip(0, 255).astype(np.uint8)).save(file, quality=95)


def compare_stacks(slices: int = 30, intervals: Sequence[float] = (1, 2, 5), repeats: int = 5) -> dict[str, Any]:
    """Compare the nine-slice stacks/s of one core, from 16-bit PNG files to HU, with a plain loop over the places.

    Args:
        slices: of each of two series to make (512 x 512, and as large as a CT's files).
        intervals: mm between the slices.
        repeats: timed passes of each way to read them.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        kilobytes = write_scans(Path(made), slices)
        result: dict[str, Any] = {"settings": {"slices": slices, "file_kB": round(kilobytes), "repeats": repeats}}
        for interval in intervals:
            passes = stack_passes(Path(made), slices, interval)
            pairs = [zip(passes["plain loop"](), passes[way](), strict=True) for way in ("shuffled", "disk cache")]
            difference = max(float(np.abs(a - b).max()) for pair in pairs for a, b in pair)
            stacks = sum(1 for _ in passes["plain loop"]())
            seconds = alternate({way: partial(_exhaust, run) for way, run in passes.items()}, repeats)
            rates = {way: [stacks / s for s in times] for way, times in seconds.items()}
            plain = rates["plain loop"]
            result[f"stacks_per_second_at_{interval:g}_mm"] = quartiles_of(rates)
            result[f"ratio_to_plain_loop_at_{interval:g}_mm"] = {
                way: ratio(found, plain) for way, found in rates.items() if found is not plain
            }
            result[f"largest_difference_in_HU_at_{interval:g}_mm"] = round(difference, 5)
        return result


def _exhaust(stacks: Callable[[], Iterator[np.ndarray]]) -> None:
    for _ in stacks():
        pass


def write_scans(folder: Path, slices: int, size: int = 512, seed: int = 0) -> float:
    """Write two series of 16-bit PNG slices that are as hard to decode as a CT's; return a file's mean kB."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((size, size)) / size - 0.5
    body = np.hypot(x, 1.3 * y) < 0.45
    sizes = []
    for series in SERIES:
        (folder / series).mkdir(parents=True)
        for number in range(1, slices + 1):
            waves = sum(
                np.sin(2 * np.pi * (rng.uniform(2, 8) * x + rng.uniform(2, 8) * y) + number / 5) for _ in range(3)
            )
            hu = np.where(body, 100 * waves + rng.normal(0, 12, x.shape), -1000 + rng.normal(0, 4, x.shape))
            path = folder / series / f"{number:03d}.png"
            Image.fromarray((hu.clip(-1024, 3071).round() + 32768).astype(np.uint16)).save(path)
            sizes.append(path.stat().st_size)
    return float(np.mean(sizes)) / 1000


def stack_passes(folder: Path, slices: int, interval: float) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """Ways to read the stacks around all inner slices of two series, `interval` mm apart; each yields (9, X, Y) in HU.

    In "shuffled", key slices of the two series take turns, so that none finds what the last one read. In "in order"
    each series is read through. The cache is filled here. What it keeps and the plain loop gives are of "shuffled".
    """
    reach = math.ceil(NEIGHBOURS * DISTANCE / interval)
    numbers = range(1 + reach, slices + 1 - reach)
    in_order = [folder / series / f"{number:03d}.png" for series in SERIES for number in numbers]
    shuffled = [path for pair in zip(*np.split(np.array(in_order), 2), strict=True) for path in pair]
    items = [{"image": str(path), "slice_interval": interval} for path in shuffled]
    cached = SeededCacheDataset(
        items, [SliceStackReaderd("image")], cache="disk", cache_dir=folder / f"cache{interval:g}", progress=False
    )

    def ours(paths: Sequence[Path]) -> Iterator[np.ndarray]:
        reader = SliceStackReader()
        return (np.asarray(reader(path, interval)) for path in paths)

    return {
        "plain loop": lambda: (plain_stack(path, interval) for path in shuffled),
        "shuffled": lambda: ours(shuffled),
        "in order": lambda: ours(in_order),
        "disk cache": lambda: (np.array(cached[i]["image"]) for i in range(len(items))),
    }


def plain_stack(path: Path, interval: float) -> np.ndarray:
    """Read for each of the nine places the file at it, or the two around it, and interpolate; (9, X, Y) in HU."""

    def read(number: int) -> np.ndarray:
        with Image.open(path.with_name(f"{number:03d}.png")) as image:
            return np.asarray(image).astype(np.float32) - 32768

    planes = []
    for place in range(-NEIGHBOURS, NEIGHBOURS + 1):
        wanted = int(path.stem) + place * DISTANCE / interval
        low = math.floor(wanted)
        part = np.float32(wanted - low)
        planes.append((1 - part) * read(low) + part * read(low + 1) if part else read(low))
    return np.stack(planes).transpose(0, 2, 1)
