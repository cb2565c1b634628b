"""Measure input pipelines, the network and whole-volume inference against what people would use instead.

    python scripts/benchmark.py input_pipeline --json input.json   images/s on one core, against torchvision
    python scripts/benchmark.py network --json network.json        training step and inference, against relatives
    python scripts/benchmark.py knobs --json knobs.json            channels-last, compile, fused, checkpointing
    python scripts/benchmark.py export --json export.json          ONNX Runtime, against PyTorch
    python scripts/benchmark.py inference --json inference.json    whole volumes, against MONAI's default inferer
    python scripts/benchmark.py volume_input --json volumes.json   training patches, against MONAI's data sets
    python scripts/benchmark.py stack_input --json stacks.json     nine-slice stacks/s, against a plain loop over files
    python scripts/benchmark.py evaluation --json scores.json      FROC curves and surface distances, against MONAI
    python scripts/benchmark.py startup --json startup.json        imports, and inference up to its first batch
    python scripts/benchmark.py all --json all.json

What is measured is stated with each number. Both sides run alternately in the same session, after a warm-up, with the
same number of threads; medians and quartiles are of the repeats; the result says where and with what it was measured.
"""

from __future__ import annotations

import json as json_format
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from benchmarks.evaluation import compare_evaluation
from benchmarks.networks import (
    EXPORTED,
    GROUPS,
    VARIANTS,
    compare_export,
    compare_knobs,
    compare_networks,
    network_side,
)
from benchmarks.stacks import stack_passes, write_scans
from benchmarks.startup import measure_startup
from benchmarks.timing import alternate, quartiles
from benchmarks.volumes import compare_inference, compare_volume_input, draw_growth, inference_side, volume_input_side
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vdt_transforms import MEAN, STD, ImageToVolumed, LoadNaturalImaged, RandResizedCropImaged, RandSliceShuffled
from vdt_workflows.data.images import collate_images, scan_class_folders
from vdt_workflows.data.sampling import SeededDataset
from vdt_workflows.preparation.images import prepare_images
from vdt_workflows.report.cells import find_commit

BATCH = 32  # images, in the input pipeline


def input_pipeline(
    images: int = 200,
    repeats: int = 5,
    size: int = 224,
    folder: str | None = None,
    workers: Sequence[int] = (1, 2),
    json: str | None = None,
) -> None:
    """Compare the images/s of one core, from JPEG files to float32 batches, with torchvision's usual chain.

    Theirs is ImageFolder, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize. Both sides draw, and then use
    the same boxes and flips, so that they do the same work and their pixels can be compared. Each side reads the
    pictures as they are, and as `prepare_images.py` writes them. The rates are by the processor's time, which other
    work on the machine hardly changes; those of loader processes are by the clock.

    Args:
        images: pictures to make (500 x 375, and as large as ImageNet's files), or at most to use of `folder`.
        repeats: timed passes of each side.
        size: rows and columns of the crop.
        folder: class folders of your own pictures, in place of made ones.
        workers: numbers of loader processes, whose images/s are measured from either kind of file.
        json: file for the result.
    """
    _report({"input_pipeline": _input_pipeline(images, repeats, size, folder, workers)}, json)


def network(
    groups: Sequence[str] = tuple(GROUPS),
    steps: int = 5,
    repeats: int = 2,
    device: str = "cpu",
    json: str | None = None,
) -> None:
    """Compare each network's training step, inference and peak memory with MONAI's and torchvision's nearest relatives.

    FLOP and parameters are counted. Every repeat of a side is a fresh process.

    Args:
        groups: some of "encoder" (depth strided, map for map of MONAI's shape), "pre-training", "organs",
            "nodule cube", "slices" and "detector".
        steps: timed steps of a process, after two to warm up.
        repeats: processes of each side.
        device: "cpu" (one thread) or "cuda".
        json: file for the result.
    """
    _report({"network": compare_networks(groups, steps, repeats, device)}, json)


def knobs(
    groups: Sequence[str] = ("pre-training", "organs"),
    variants: Sequence[str] = VARIANTS,
    steps: int = 5,
    repeats: int = 2,
    device: str = "cpu",
    json: str | None = None,
) -> None:
    """Measure what channels-last, `torch.compile`, a fused optimiser and checkpointing do to a training step.

    Args:
        groups: whose first network is measured, as in `network`.
        variants: some of "plain", "channels last", "compiled", "fused optimiser", "checkpointing" and "3D stem", which
            differs for three slices alone.
        steps: timed steps of a process, after two to warm up.
        repeats: processes of each variant.
        device: "cpu" (one thread) or "cuda".
        json: file for the result.
    """
    _report({"knobs": compare_knobs(groups, variants, steps, repeats, device)}, json)


def export(names: Sequence[str] = tuple(EXPORTED), repeats: int = 5, json: str | None = None) -> None:
    """Compare the networks in ONNX Runtime with PyTorch, one thread each.

    Args:
        names: some of "ResUNet3D-18", "NoduleFCN-18", "ResNet3D-18 classifier" and "P3D-63".
        repeats: timed passes of each side.
        json: file for the result.
    """
    _report({"export": compare_export(names, repeats)}, json)


def inference(
    slices: Sequence[int] = (150, 300, 600),
    size: int = 512,
    classes: int = 14,
    mode: str = "constant",
    plot: str | None = None,
    json: str | None = None,
) -> None:
    """Compare `SlabInferer` with MONAI's `SlidingWindowInferer` and a plain loop: seconds, memory, and equal labels.

    Args:
        slices: of the volumes.
        size: rows and columns of the volumes.
        classes: channels of the logits.
        mode: "constant" or "gaussian" windows.
        plot: file for a picture of time and memory against the slices.
        json: file for the result.
    """
    result = compare_inference(slices, size, classes, mode)
    _report({"inference": result}, json)
    if plot is not None:
        draw_growth(result, Path(plot))


def volume_input(
    cases: int = 4, shape: Sequence[int] = (400, 400, 120), patches: int = 40, json: str | None = None
) -> None:
    """Compare an epoch of training patches: volumes read each time, MONAI's `CacheDataset`, ours in memory and on disk.

    Args:
        cases: volumes to make (14 classes, int16, gzip).
        shape: voxels of a volume.
        patches: of an epoch.
        json: file for the result.
    """
    _report({"volume_input": compare_volume_input(cases, shape, patches)}, json)


def stack_input(
    slices: int = 30, intervals: Sequence[float] = (1, 2, 5), repeats: int = 5, json: str | None = None
) -> None:
    """Compare the nine-slice stacks/s of one core, from 16-bit PNG files to HU, with a plain loop over the places.

    Args:
        slices: of each of two series to make (512 x 512, and as large as a CT's files).
        intervals: mm between the slices.
        repeats: timed passes of each side.
        json: file for the result.
    """
    _report({"stack_input": _stack_input(slices, intervals, repeats)}, json)


def evaluation(
    images: int = 4831,
    boxes: int = 100,
    shape: Sequence[int] = (512, 512, 300),
    spacing: Sequence[float] = (0.8, 0.8, 1.5),
    strays: int = 3,
    repeats: int = 3,
    json: str | None = None,
) -> None:
    """Compare FROC curves with a plain loop, and the surface distances of 13 organs with MONAI's two functions.

    Seconds are of the processor. The surfaces are measured twice: of organs in one piece, and of a prediction of which
    some organs have a part in the corner of the volume.

    Args:
        images: key slices, as many as the test part of DeepLesion has.
        boxes: detections of a slice.
        shape: voxels of the label maps.
        spacing: of the label maps, in mm.
        strays: organs with such a part.
        repeats: timed passes of each side.
        json: file for the result.
    """
    _report({"evaluation": compare_evaluation(images, boxes, shape, spacing, strays, repeats)}, json)


def startup(repeats: int = 5, json: str | None = None) -> None:
    """Measure how long the packages take to import, and `monai.bundle run` to reach the first batch of an inference.

    Args:
        repeats: processes of each.
        json: file for the result.
    """
    _report({"startup": measure_startup(repeats)}, json)


def all_benchmarks(json: str | None = None) -> None:
    """Run all with their default settings.

    Args:
        json: file for the result.
    """
    results = {
        "input_pipeline": _input_pipeline(200, 5, 224, None, (1, 2)),
        "network": compare_networks(tuple(GROUPS), 5, 2, "cpu"),
        "knobs": compare_knobs(("pre-training", "organs"), VARIANTS, 5, 2, "cpu"),
    }
    results["inference"] = compare_inference((150, 300, 600), 512, 14, "constant")
    results["volume_input"] = compare_volume_input(4, (400, 400, 120), 40)
    results["stack_input"] = _stack_input(30, (1, 2, 5), 5)
    results["startup"] = measure_startup(5)
    results["evaluation"] = compare_evaluation(4831, 100, (512, 512, 300), (0.8, 0.8, 1.5), 3, 3)
    _report(results, json)


def _input_pipeline(images: int, repeats: int, size: int, folder: str | None, workers: Sequence[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root, cache = Path(folder or f"{made}/raw"), Path(made, "prepared")
        if folder is None:
            _make_pictures(root, images)
        start = time.process_time()
        prepare_images(str(root), str(cache), on_error="skip", workers=1)
        preparing = time.process_time() - start
        sides = {"raw": PipelineSide(root, images, size, made), "prepared": PipelineSide(cache, images, size, made)}
        passes: dict[str, Callable[[], object]] = {}
        for kind, side in sides.items():
            passes |= {f"ours_{kind}": side.run_ours, f"theirs_{kind}": side.run_theirs}
        rates = {
            name: [len(side.chosen) / s for s in seconds]
            for name, seconds in alternate(passes, repeats, time.process_time).items()
        }

        def ratio(ours: str, theirs: str) -> dict[str, float]:
            return quartiles([a / b for a, b in zip(rates[f"ours_{ours}"], rates[f"theirs_{theirs}"], strict=True)])

        return {
            "settings": {"images": len(side.chosen), "size": size, "repeats": repeats, "batch": BATCH},
            "file_kB": {kind: side.kilobytes() for kind, side in sides.items()},
            "images_per_second_of_a_core": {name: quartiles(values) for name, values in rates.items()},
            "ours_raw_to_theirs_raw": ratio("raw", "raw"),
            "ours_prepared_to_theirs_raw": ratio("prepared", "raw"),
            "ours_prepared_to_theirs_prepared": ratio("prepared", "prepared"),
            "mean_absolute_difference_of_255": {kind: side.difference for kind, side in sides.items()},
            "our_stages_ms": {kind: _stages(side.ours, len(side.chosen)) for kind, side in sides.items()},
            "preparing_ms_an_image": round(1000 * preparing / max(len(scan_class_folders(root, index_dir=made)), 1), 2),
            "images_per_second_by_the_clock": {
                f"{kind}, {number} workers": quartiles([side.run_loader(number) for _ in range(min(repeats, 3))])
                for kind, side in sides.items()
                for number in workers
            },
        }


class PipelineSide:
    """Both pipelines over the same files, with the same boxes and flips."""

    def __init__(self, root: Path, images: int, size: int, index_dir: str) -> None:
        listed = scan_class_folders(root, index_dir=index_dir)
        self.chosen = listed.subset(np.random.default_rng(0).permutation(len(listed))[:images])
        to_volume = [LoadNaturalImaged("image"), RandResizedCropImaged("image", size)]
        to_volume.append(ImageToVolumed("image"))
        self.ours = SeededDataset(self.chosen, [*to_volume, RandSliceShuffled("image")])
        self.theirs = TorchvisionChain(root, [sample["image"] for sample in self.chosen], size)
        self.collate = partial(collate_images, mean=MEAN, std=STD)
        in_rgb_order = SeededDataset(self.chosen, to_volume)
        differences = []
        for i in range(len(self.chosen)):
            volume = in_rgb_order[0, i]["image"][0]
            self.theirs.draws.append((to_volume[1].crop.box, to_volume[1].crop.flip))
            differences.append((volume - (STD * self.theirs[i][0] + MEAN)).abs().mean().item())
        self.difference = round(float(np.mean(differences)), 3)

    def run_ours(self) -> None:
        """Make each batch once."""
        _batches(lambda i: self.ours[0, i], len(self.chosen), self.collate)

    def run_theirs(self) -> None:
        """Make each batch once, as torchvision does."""
        _batches(lambda i: self.theirs[i], len(self.chosen), default_collate)

    def run_loader(self, workers: int, passes: int = 4) -> float:
        """Images/s of loader processes, from the first batch on."""
        keys = [(number, i) for number in range(passes) for i in range(len(self.chosen))]
        loader = DataLoader(self.ours, BATCH, sampler=keys, num_workers=workers, collate_fn=self.collate)
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        done = sum(len(batch["label"]) for batch in batches)
        return done / (time.perf_counter() - start)

    def kilobytes(self) -> int:
        """Mean size of a file."""
        return round(np.mean([os.path.getsize(sample["image"]) for sample in self.chosen]) / 1000)


class VisibleFolder(ImageFolder):
    """ImageFolder that takes no hidden folder for a class, as the records of a prepared data set."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Give the class names, and their labels by name."""
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith("."))
        return names, {name: label for label, name in enumerate(names)}


def _stack_input(slices: int, intervals: Sequence[float], repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        kilobytes = write_scans(Path(made), slices)
        result: dict[str, Any] = {"settings": {"slices": slices, "file_kB": round(kilobytes), "repeats": repeats}}
        for interval in intervals:
            passes = stack_passes(Path(made), slices, interval)
            pairs = [zip(passes["plain loop"](), passes[side](), strict=True) for side in ("shuffled", "disk cache")]
            difference = max(float(np.abs(a - b).max()) for pair in pairs for a, b in pair)
            stacks = sum(1 for _ in passes["plain loop"]())
            seconds = alternate({side: partial(_exhaust, run) for side, run in passes.items()}, repeats)
            rates = {side: [stacks / s for s in times] for side, times in seconds.items()}
            result[f"stacks_per_second_at_{interval:g}_mm"] = {side: quartiles(r) for side, r in rates.items()}
            result[f"ratio_to_plain_loop_at_{interval:g}_mm"] = {
                side: quartiles([a / b for a, b in zip(r, rates["plain loop"], strict=True)])
                for side, r in rates.items()
                if side != "plain loop"
            }
            result[f"largest_difference_in_HU_at_{interval:g}_mm"] = round(difference, 5)
        return result


def _exhaust(stacks: Callable[[], Iterator[np.ndarray]]) -> None:
    for _ in stacks():
        pass


class TorchvisionChain(Dataset):
    """ImageFolder with the usual training transforms, which draw as they do and then use the boxes of `draws`."""

    def __init__(self, root: Path, files: Sequence[str], size: int) -> None:
        self.draws: list[tuple[tuple[int, int, int, int], bool]] = []
        self.folder = VisibleFolder(str(root))
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


def _make_pictures(root: Path, number: int) -> None:
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


def _batches(sample: Callable[[int], Any], number: int, collate: Callable[[list], Any]) -> None:
    for start in range(0, number, BATCH):
        collate([sample(i) for i in range(start, min(start + BATCH, number))])


def _stages(dataset: SeededDataset, number: int) -> dict[str, float]:
    """Mean processor time of each transform over all samples, in ms."""
    samples = [dict(dataset.data[i]) for i in range(number)]
    stages = {}
    for transform in dataset.transform.transforms:
        start = time.process_time()
        samples = [transform(sample) for sample in samples]
        stages[type(transform).__name__] = round(1000 * (time.process_time() - start) / number, 3)
    return stages


def _report(results: dict[str, Any], file: str | None) -> None:
    packages = ("torch", "torchvision", "monai", "pillow", "simplejpeg", "numpy")
    result = {
        "machine": {
            "cpu": _cpu_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": 1,  # torch's, on either side; Pillow and simplejpeg have no threads of their own
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
            "commit": find_commit(),
        },
        **results,
    }
    for name, part in result.items():
        print(f"\n{name}")
        for key, value in part.items():
            print(f"  {key:34} {_cell(value)}")
    if file is not None:
        Path(file).write_text(json_format.dumps(result, indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['median']} ({value['q25']} .. {value['q75']})"
    return "   ".join(f"{key} {_cell(part)}" for key, part in value.items())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    commands = {"input_pipeline": input_pipeline, "network": network, "knobs": knobs, "inference": inference}
    commands["export"] = export
    sides = {"network_side": network_side, "inference_side": inference_side, "volume_input_side": volume_input_side}
    commands |= {"volume_input": volume_input, "stack_input": stack_input, "evaluation": evaluation, "startup": startup}
    fire.Fire({**commands, "all": all_benchmarks, **sides})
