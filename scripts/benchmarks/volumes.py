"""The benchmarks of whole-volume inference and of training patches, each implementation in a process of its own."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.timing import peak_memory, run_alone
from matplotlib.figure import Figure
from monai.data import CacheDataset, Dataset
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByLabelClassesd,
    ScaleIntensityRanged,
    SpatialPadd,
)
from monai.utils import ensure_tuple_rep

from networks import DepthFirst, ResUNet3D
from vdt_transforms import Spacingd
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.drawing import to_png
from vdt_workflows.errors import check_choice
from vdt_workflows.evaluation.inference import SlabInferer
from vdt_workflows.files import write_atomic
from vdt_workflows.parallel import free_memory

ROI, OVERLAP = (256, 256, 32), (0.5, 0.5, 0.625)  # the published windows, at strides of 128, 128 and 12
CLOSE = 1e-4  # logits that differ by less may be ordered either way by rounding
INFERERS = ("ours", "theirs", "loop")
NETWORKS = {  # each of so many channels of logits
    "convolution": lambda classes: torch.nn.Conv3d(1, classes, 3, padding=1),
    "ResUNet3D-18, width 16, strided stem": lambda classes: ResUNet3D(classes, base_channels=16, stem="strided"),
}
INPUTS = ("each epoch", "CacheDataset", "memory", "disk")


def compare_inference(
    slices: Sequence[int] = (150, 300, 600),
    size: int = 512,
    classes: int = 14,
    mode: str = "constant",
    overlap: float | Sequence[float] = OVERLAP,
    network: str = "convolution",
    plot: str | None = None,
) -> dict[str, Any]:
    """Compare `SlabInferer` with MONAI's `SlidingWindowInferer` and a plain loop: seconds, memory, and equal labels.

    Args:
        slices: of the volumes.
        size: rows and columns of the volumes.
        classes: channels of the logits.
        mode: "constant" or "gaussian" windows.
        overlap: of the windows, as a fraction.
        network: "convolution", so that mainly the stitching is measured, or "ResUNet3D-18, width 16, strided stem".
        plot: file for a picture of time and memory against the slices.
    """
    check_choice("network", network, tuple(NETWORKS))
    settings = {"roi_size": ROI, "overlap": overlap, "mode": mode}
    rows = {}
    for depth in slices:
        with tempfile.TemporaryDirectory() as folder:
            given = (size, depth, classes, network, settings, folder)
            needed = 4.6e-9 * size**2 * depth * (classes + 1)  # GB of all logits, the volume and some more
            enough = needed < 0.9e-9 * free_memory()
            found = {who: run_alone(segment_volume, who, *given) for who in INFERERS if who == "ours" or enough}
            labels = {file.stem: np.load(file) for file in Path(folder).glob("*.npy")}
        if enough:
            found |= _compare_labels(labels["ours"], labels["theirs"], labels["clear"])
        else:
            found["others"] = f"not run, they would need {needed:.0f} GB of memory"
        rows[f"{size} x {size} x {depth}"] = found
    if plot is not None:
        draw_growth(rows, Path(plot), network)
    return {
        "settings": {"classes": classes, **settings, "network": network, "threads": 1},
        "MB_is": "peak resident memory of the process in inference, less what it held with the input volume, after the"
        " network had seen one window",
        **rows,
    }


def _compare_labels(ours: np.ndarray, theirs: np.ndarray, clear: np.ndarray) -> dict[str, Any]:
    present = np.unique(theirs)
    return {
        "labels_that_differ_where_logits_do_by_1e-4": int((np.not_equal(ours, theirs) & clear).sum()),
        "share_of_such_voxels": round(float(clear.mean()), 6),
        "classes_present": len(present),
        "least_dice_between_the_two": round(min(_dice(ours, theirs, value) for value in present), 6),
    }


def draw_growth(result: Mapping[str, Mapping[str, Any]], path: Path, network: str) -> None:
    """Draw seconds and memory of each implementation against the number of slices."""
    rows = {int(name.split()[-1]): row for name, row in result.items()}
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    labels = {"ours": "SlabInferer", "theirs": "MONAI's SlidingWindowInferer", "loop": "a plain loop"}
    for axes, (key, unit) in zip(figure.subplots(1, 2), (("seconds", "seconds"), ("MB", "MB")), strict=True):
        for who, label in labels.items():
            seen = {depth: row[who][key] for depth, row in rows.items() if who in row}
            axes.plot(list(seen), list(seen.values()), marker="o", label=label)
        axes.set(xlabel="slices", ylabel=unit, xticks=list(rows), ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_title("time")
    figure.axes[1].set_title("peak memory beyond the input")
    figure.axes[0].legend()
    figure.suptitle(f"{next(iter(result)).rpartition(' x ')[0]} x slices; {network}, one thread")
    write_atomic(path, to_png(figure, dpi=120))


def _dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    first, second = a == value, b == value
    return 2 * float((first & second).sum()) / max(float(first.sum() + second.sum()), 1.0)


def segment_volume(
    who: str, size: int, slices: int, classes: int, kind: str, settings: Mapping[str, Any], folder: str
) -> dict[str, float]:
    """Segment one volume in this process; give seconds, of the CPU too, and MB, and leave the labels in `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = DepthFirst(NETWORKS[kind](classes)).eval().requires_grad_(False)
    volume = torch.empty(1, 1, size, size, slices)
    for index in range(slices):  # smooth in the plane, so that classes have areas
        coarse = torch.randn(1, 1, size // 16, size // 16)
        volume[0, 0, :, :, index] = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")[0, 0]
    with torch.inference_mode():
        network(volume[..., : ROI[0], : ROI[1], : ROI[2]])
        before = peak_memory()
        start, cpu = time.perf_counter(), time.process_time()
        if who == "ours":
            labels = SlabInferer(**settings)(volume, network)[0, 0]
            seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
        else:
            loop = partial(add_windows, mode=settings["mode"], overlap=settings["overlap"])
            segment = SlidingWindowInferer(**settings) if who == "theirs" else loop
            logits = segment(volume, network)
            labels = torch.empty(logits.shape[2:], dtype=torch.uint8)
            for index in range(slices):  # a plain argmax would take as much memory again
                labels[:, :, index] = logits[0, ..., index].argmax(0)
            seconds, cpu, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
            if who == "theirs":
                best = [logits[0, ..., i].topk(2, 0).values for i in range(slices)]
                np.save(Path(folder, "clear.npy"), torch.stack([b[0] - b[1] > CLOSE for b in best], -1).numpy())
    np.save(Path(folder, f"{who}.npy"), labels.numpy())
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "MB": round((peak - before) / 1024)}


def add_windows(
    volume: torch.Tensor, network: torch.nn.Module, mode: str, overlap: float | Sequence[float]
) -> torch.Tensor:
    """Do what one would write first: add each window's logits to the volume's, count, and divide."""
    roi = [min(a, b) for a, b in zip(ROI, volume.shape[2:], strict=True)]
    steps = [max(int(a * (1 - b)), 1) for a, b in zip(roi, ensure_tuple_rep(overlap, 3), strict=True)]
    weights = compute_importance_map(tuple(roi), mode=mode, sigma_scale=0.125)
    total, count = None, torch.zeros(volume.shape[2:])
    for window in dense_patch_slices(volume.shape[2:], roi, steps):
        logits = network(volume[(slice(None), slice(None), *window)])
        if total is None:
            total = torch.zeros(1, logits.shape[1], *volume.shape[2:])
        total[(slice(None), slice(None), *window)] += logits * weights
        count[window] += weights
    assert total is not None  # there is a window
    return total.div_(count)


def compare_volume_input(cases: int = 4, shape: Sequence[int] = (400, 400, 120), patches: int = 40) -> dict[str, Any]:
    """Compare an epoch of training patches: volumes read each time, MONAI's `CacheDataset`, ours in memory and on disk.

    Args:
        cases: volumes to make (14 classes, int16, gzip).
        shape: voxels of a volume.
        patches: of an epoch.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_cases(Path(folder), cases, shape)
        found = {who: run_alone(draw_patches, who, folder, patches) for who in INPUTS}
    return {
        "settings": {"cases": cases, "voxels": list(shape), "patches": patches, "patch": [128, 128, 32], "threads": 1},
        "MB_is": "peak resident memory of the process, less what it held before the data set was made",
        **found,
    }


def _write_cases(folder: Path, cases: int, shape: Sequence[int]) -> None:
    affine = np.diag([-0.75, -0.75, 2.5, 1.0])
    rng = np.random.default_rng(0)
    for number in range(cases):
        image = rng.normal(0, 60, shape).astype(np.int16)
        label = np.zeros(shape, np.uint8)
        for value in range(1, 14):
            corner = [int(rng.integers(0, n - n // 6)) for n in shape]
            box = tuple(slice(c, c + n // 6) for c, n in zip(corner, shape, strict=True))
            label[box], image[box] = value, image[box] + 20 * value
        nib.save(nib.Nifti1Image(image, affine), folder / f"img{number}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"label{number}.nii.gz")


def draw_patches(who: str, folder: str, patches: int) -> dict[str, float]:
    """Make one kind of data set in this process and draw an epoch of patches; give seconds and MB."""
    torch.set_num_threads(1)
    keys = ["image", "label"]
    images = sorted(Path(folder).glob("img*.nii.gz"))
    data = [{"image": str(i), "label": str(i.with_name(i.name.replace("img", "label")))} for i in images]
    transform = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, "RAS", labels=None),
            Spacingd(keys, (0.8, 0.8, 3.0), mode=["bilinear", "nearest"], dtype=np.float32),
            ScaleIntensityRanged("image", -958, 327, -958, 327, clip=True),
            NormalizeIntensityd("image", 83, 137),
            SpatialPadd(keys, (128, 128, 32)),
            EnsureTyped(keys, dtype=[torch.float32, torch.uint8]),
            ClassesToIndicesd("label", num_classes=14, max_samples_per_class=5000),
            RandCropByLabelClassesd(
                keys, "label", (128, 128, 32), num_classes=14, indices_key="label_cls_indices", warn=False
            ),
        ]
    )
    before = peak_memory()
    start = time.perf_counter()
    dataset: Any
    if who == "each epoch":
        dataset = Dataset(data, transform)
    elif who == "CacheDataset":
        dataset = CacheDataset(data, transform, progress=False, num_workers=1)
    else:
        dataset = SeededCacheDataset(data, transform, cache=who, cache_dir=Path(folder, "cache"), progress=False)
    built = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(patches):
        dataset[number % len(data)]
    seconds = time.perf_counter() - start
    peak = peak_memory() - before
    rates = {"build_s": round(built, 2), "epoch_s": round(seconds, 2), "patches_per_s": round(patches / seconds, 2)}
    return {**rates, "MB": round(peak / 1024)}
