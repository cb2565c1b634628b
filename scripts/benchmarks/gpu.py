"""What a GPU does with the networks, beside MONAI's nearest relatives: steps a second, FLOP utilisation, memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.inputs import compare_pipelines
from benchmarks.timing import peak_memory
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DynUNet, resnet18
from pretrain_gpu import PEAK, synchronize
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from networks import DepthFirst, ResNet3DClassifier, ResUNet3D
from vdt_workflows.evaluation.inference import SlabInferer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _dynunet() -> nn.Module:
    filters, five = (32, 64, 128, 256, 320), 5
    return DynUNet(3, 1, 14, [3] * five, [1, 2, 2, 2, 2], [2] * (five - 1), filters=filters)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "pre-training, 224 pixels": (
        lambda: ResNet3DClassifier(18, 1000, zero_init_residual=True),
        lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=1000),
        (64, 1, 3, 224, 224),
    ),
    "U-Net, 32 x 256 x 256": (lambda: ResUNet3D(14, 18), _dynunet, (2, 1, 32, 256, 256)),
}


STEPS = ("bfloat16 last", "bfloat16", "float16 last", "bfloat16 last compiled")


def measure_gpu(minutes: float = 8, size: float = 1.0, output: str | None = None) -> dict[str, Any]:
    """Measure training steps beside MONAI's networks, a CT from end to end, a process of several, and the input.

    Args:
        minutes: stop starting new measurements after that.
        size: scales rows, columns, slices and batch, for a trial on a CPU.
        output: JSON that is written as measurements come in.
    """
    began = time.time()
    found: dict[str, Any] = {}
    for name, measure in _list_measurements(size).items():
        if time.time() - began > minutes * 60:
            break
        try:
            result: Any = measure()
        except Exception as error:  # one that cannot run is a result too
            result = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found[name] = result
        print(name, result, flush=True)
        if output:
            Path(output).write_text(json.dumps(found, indent=1))
    return found


def _list_measurements(size: float) -> dict[str, Callable[[], Any]]:
    """Give the measurements by name, the most important first."""
    listed: dict[str, Callable[[], Any]] = {}
    shapes = {case: _scale(shape, size) for case, (_, _, shape) in CASES.items()}
    for case, (ours, theirs, _) in CASES.items():
        for name, build in (("ours", ours), ("MONAI", theirs)):
            listed[f"{case}, {name}, {STEPS[0]}"] = partial(_time_steps, build, shapes[case], STEPS[0])
    side, slices = max(round(512 * size) // 32 * 32, 64), max(round(600 * size), 32)
    for name, inferer in (("ours", SlabInferer), ("MONAI", SlidingWindowInferer)):
        listed[f"CT of {side} x {side} x {slices}, {name}"] = partial(_segment, inferer, side, slices)
    listed["input of the pre-training"] = partial(_feed, max(round(2000 * size), 40), max(round(224 * size), 32))
    first = next(iter(CASES))
    listed[f"{first}, one process of DistributedDataParallel"] = partial(_time_shared, CASES[first][0], shapes[first])
    for case, (ours, theirs, _) in CASES.items():
        for name, build in (("ours", ours), ("MONAI", theirs)):
            for options in STEPS[1:]:
                listed[f"{case}, {name}, {options}"] = partial(_time_steps, build, shapes[case], options)
    return listed


def _scale(shape: tuple[int, ...], size: float) -> tuple[int, ...]:
    batch, side = max(round(shape[0] * size), 1), max(round(shape[-1] * size) // 32 * 32, 32)
    return (batch, 1, shape[2], side, side)


def _segment(inferer: Callable[..., Any], side: int, slices: int) -> dict[str, float]:
    """Segment a volume of the host with the U-Net of full width, fourteen classes; labels end on the host."""
    device = _device()
    network = DepthFirst(ResUNet3D(14, 18)).to(device).eval()
    volume = torch.randn(1, 1, side, side, slices)
    roi = min(side, 256), min(side, 256), 32
    segment = inferer(roi_size=roi, overlap=0.25, sw_batch_size=1)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        network(torch.randn(1, 1, *roi, device=device))
        before, start = peak_memory(), time.time()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = segment(volume.to(device), network)
        (found.argmax(1) if inferer is SlidingWindowInferer else found).cpu()
    return {
        "seconds": round(time.time() - start, 1),
        "host MB": (peak_memory() - before) // 1024,
        "device GiB": _device_memory(device),
    }


def _feed(images: int, side: int) -> dict[str, Any]:
    """Give the images/s of loader processes by the clock, to be set beside the steps' volumes/s."""
    count = os.cpu_count() or 1
    return compare_pipelines(images, 1, side, workers=[max(count - 1, 1)])["images_per_second_by_the_clock"]


def _time_shared(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Time steps with gradients that are summed over processes, of which there is one."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            last = torch.channels_last_3d  # before the gradients get their buckets
            wrapped = DistributedDataParallel(build().to(_device()).to(memory_format=last))
            return _time_steps(lambda: wrapped, shape, STEPS[0])
        finally:
            distributed.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_memory(device: torch.device) -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else 0.0


def _time_steps(build: Callable[[], nn.Module], shape: tuple[int, ...], options: str) -> dict[str, float]:
    device = _device()
    dtype = options.split()[0]
    order = torch.channels_last_3d if "last" in options else torch.contiguous_format
    network = build().to(device).to(memory_format=order)
    x = torch.randn(shape, device=device).contiguous(memory_format=order)
    with FlopCounterMode(display=False) as counter:
        network(x[:1].repeat(2, 1, 1, 1, 1)).square().mean().backward()
    flop = counter.get_total_flops() / 2
    model: Callable[..., torch.Tensor] = torch.compile(network) if "compiled" in options else network
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(13):
        start = time.time()
        optimizer.zero_grad()
        with torch.autocast(device.type, DTYPES[dtype]):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        synchronize(device)
        times.append(time.time() - start)
    seconds = sorted(times[3:])[5]
    speed = shape[0] / seconds
    return {
        "step ms": round(seconds * 1e3, 1),
        "volumes/s": round(speed, 1),
        "GFLOP/volume": round(flop / 1e9, 1),
        "MFU": round(flop * speed / PEAK, 3),
        "peak GiB": _device_memory(device),
    }
