"""The benchmarks of the networks; `benchmark.py` is their command line.

Each network is timed in a process of its own, so that its peak memory is its own. What a step asks for is counted by
PyTorch's `FlopCounterMode`, and set against the rate of a large matrix product in the same process.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from benchmarks.timing import alternate, quartiles, run_side
from monai.networks.nets import BasicUNet, FlexibleUNet, resnet18
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18 as resnet18_2d
from torchvision.models import resnet50 as resnet50_2d
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.video import r3d_18

from networks import P3D, LesionDetector, NoduleFCN, ResNet3DClassifier, ResUNet3D
from networks.resnet3d import StemConv3d

CLASSES = 1000
STAGES = ("layer1", "layer2", "layer3", "layer4")
VARIANTS = ("plain", "channels last", "compiled", "fused optimiser", "checkpointing", "3D stem")


@dataclass(frozen=True)
class Side:
    """A network and the size of the input it is timed with."""

    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    detects: bool = False


_IMAGE, _PATCH, _CUBE = (2, 1, 3, 224, 224), (1, 1, 32, 96, 96), (1, 1, 48, 48, 48)
# The first of each is ours; the others are what a user would take from MONAI or torchvision for the same input.
GROUPS: dict[str, dict[str, Side]] = {
    "encoder": {
        "ResNet3D-18 classifier": Side(partial(ResNet3DClassifier, 18, CLASSES, depth_stride=True), (2, *_PATCH[1:])),
        "MONAI resnet18": Side(
            partial(
                resnet18,
                spatial_dims=3,
                n_input_channels=1,
                num_classes=CLASSES,
                conv1_t_stride=2,
                bias_downsample=False,
            ),
            (2, *_PATCH[1:]),
        ),
    },
    "pre-training": {
        "ResNet3D-18 classifier": Side(partial(ResNet3DClassifier, 18, CLASSES), _IMAGE),
        "torchvision resnet18, 2D": Side(partial(resnet18_2d, num_classes=CLASSES), (2, 3, 224, 224)),
        "torchvision r3d_18, video": Side(partial(r3d_18, num_classes=CLASSES), (2, 3, 3, 224, 224)),
    },
    "organs": {
        "ResUNet3D-18": Side(partial(ResUNet3D, 14), _PATCH),
        "ResUNet3D-18, strided stem": Side(partial(ResUNet3D, 14, stem="strided"), _PATCH),
        "MONAI FlexibleUNet, resnet18": Side(partial(FlexibleUNet, 1, 14, "resnet18", spatial_dims=3), _PATCH),
    },
    "nodule cube": {
        "NoduleFCN-18": Side(NoduleFCN, _CUBE),
        "MONAI BasicUNet": Side(partial(BasicUNet, 3, 1, 2), _CUBE),
    },
    "slices": {
        "P3D-63": Side(partial(P3D, 63), (1, 9, 256, 256)),
        "MP3D-63": Side(partial(P3D, 63, conversion="group"), (1, 9, 256, 256)),
        "torchvision resnet50, 2D": Side(resnet50_2d, (1, 3, 256, 256)),
    },
    "detector": {
        "LesionDetector-63": Side(LesionDetector, (1, 9, 256, 256), detects=True),
        "torchvision fasterrcnn_resnet50_fpn, 2D": Side(
            partial(
                fasterrcnn_resnet50_fpn,
                weights=None,
                weights_backbone=None,
                num_classes=2,
                min_size=256,
                max_size=256,
                box_score_thresh=0.0,
            ),
            (1, 3, 256, 256),
            detects=True,
        ),
    },
}
EXPORTED = {  # our networks that torch.export takes, and the size they are exported and timed with
    "ResUNet3D-18": Side(partial(ResUNet3D, 14), (1, 1, 64, 64, 64)),
    "NoduleFCN-18": Side(NoduleFCN, _CUBE),
    "ResNet3D-18 classifier": Side(partial(ResNet3DClassifier, 18, 2, depth_stride=True), _CUBE),
    "P3D-63": Side(partial(P3D, 63), (1, 9, 128, 128)),
}


def compare_networks(groups: Sequence[str], steps: int, repeats: int, device: str) -> dict[str, Any]:
    """Measure our networks and their relatives, each group's sides in turn.

    Raises:
        ValueError: if a group is unknown.
    """
    _check("group", groups, GROUPS)
    result: dict[str, Any] = {"settings": _settings(steps, repeats, device)}
    for group in groups:
        runs = _take_turns(group, [(side, "plain") for side in GROUPS[group]], steps, repeats, device)
        result |= {f"{group}: {side}": _summary(found, GROUPS[group][side].shape) for (side, _), found in runs.items()}
        maps = [found[0]["maps"] for found in runs.values()]
        if group == "encoder" and not (maps[0] and maps[0] == maps[1]):
            raise RuntimeError(f"the encoders' maps differ in shape, so their times do not compare: {maps}")
    return result


def _check(kind: str, given: Sequence[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"there is no {kind} {', '.join(unknown)}; there are {', '.join(known)}")


def compare_knobs(
    groups: Sequence[str], variants: Sequence[str], steps: int, repeats: int, device: str
) -> dict[str, Any]:
    """Measure what each knob does to the training step of our networks, one at a time.

    Raises:
        ValueError: if a group or a variant is unknown.
    """
    _check("group", groups, GROUPS)
    _check("variant", variants, VARIANTS)
    result: dict[str, Any] = {"settings": _settings(steps, repeats, device)}
    for group in groups:
        side = next(iter(GROUPS[group]))
        runs = _take_turns(group, [(side, variant) for variant in variants], steps, repeats, device)
        shape = GROUPS[group][side].shape
        result |= {f"{group}: {side}: {variant}": _summary(found, shape) for (_, variant), found in runs.items()}
    return result


def _take_turns(
    group: str, cells: Sequence[tuple[str, str]], steps: int, repeats: int, device: str
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Run each side and variant in turn, as often as `repeats` says."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for cell, found in runs.items():
            found.append(run_side("network_side", group, *cell, steps, device))
    return runs


def _settings(steps: int, repeats: int, device: str) -> dict[str, Any]:
    kind = "resident memory of the process" if device == "cpu" else "memory of torch's CUDA allocator"
    return {
        "steps": steps,
        "repeats": repeats,
        "device": device,
        "peak_MB_is": f"peak {kind} in training, less what it held before the network was built",
        "share_of_matmul_is": "three times the forward's FLOP a step, against a float32 matrix product of 2048 cubed",
    }


def _summary(runs: Sequence[dict[str, Any]], shape: Sequence[int]) -> dict[str, Any]:
    first = runs[0]
    training = [s for run in runs for s in run["training"]]
    return {
        "input": list(shape),
        "parameters_M": first["parameters_M"],
        "forward_GFLOP": first["forward_GFLOP"],
        "training_step_s": quartiles(training),
        "inference_s": quartiles([s for run in runs for s in run["inference"]]),
        "samples_per_s_in_training": round(shape[0] / float(np.median(training)), 2),
        "peak_MB": round(float(np.median([run["MB"] for run in runs]))),
        "share_of_matmul": round(float(np.median([run["share_of_matmul"] for run in runs])), 2),
        "first_step_s": round(float(np.median([run["first_step_s"] for run in runs])), 1),
    }


def network_side(group: str, side_name: str, variant: str, steps: int, device: str) -> None:
    """Time one network in this process and print the result as a line of JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda = device != "cpu"
    side = GROUPS[group][side_name]
    before = 0 if cuda else getrusage(RUSAGE_SELF).ru_maxrss
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    network = side.build(**({"checkpointing": True} if variant == "checkpointing" else {}))
    if variant == "3D stem":
        for layer in network.modules():
            if isinstance(layer, StemConv3d):
                layer.__class__ = nn.Conv3d  # type: ignore[assignment]  # its parent, with the same fields
    maps: list[list[int]] = []
    for name, stage in network.named_modules():
        if name.split(".")[-1] in STAGES and variant == "plain":  # torch.compile would compile anew for each list
            stage.register_forward_hook(lambda layer, x, out: maps.append(list(out.shape)))
    layout = torch.channels_last_3d if variant == "channels last" else torch.preserve_format
    network = network.to(device, memory_format=layout).train()
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=variant == "fused optimiser")
    arguments = _arguments(side, device)
    run: Any = torch.compile(network) if variant == "compiled" else network

    def timed(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def step() -> None:
        optimizer.zero_grad()
        _loss(run(*arguments)).backward()
        optimizer.step()

    first = timed(step)
    shapes = maps[: len(STAGES)]
    timed(step)  # a second one, since a compiled network may be compiled anew
    training = [timed(step) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024
    network.eval()
    with torch.inference_mode():
        timed(lambda: run(arguments[0]))
        inference = [timed(lambda: run(arguments[0])) for _ in range(steps)]
    flops = count_flops(side)  # not before, since what it takes would count as held by the process
    result = {
        "training": training,
        "inference": inference,
        "first_step_s": first,
        "MB": peak,
        "maps": shapes,
        "parameters_M": round(sum(p.numel() for p in parameters) / 1e6, 2),
        "forward_GFLOP": round(flops / 1e9, 1),
        "share_of_matmul": 3 * flops / float(np.median(training)) / _matmul_rate(device),
    }
    print(json.dumps(result))


def count_flops(side: Side) -> int:
    """Floating-point operations of a forward pass in evaluation, by torch's counter."""
    device = "cpu" if side.detects else "meta"  # where nothing is computed; a detector chooses among its boxes
    network = side.build().to(device).eval()
    arguments = _arguments(side, device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(arguments[0])
    return int(counter.get_total_flops())


def _arguments(side: Side, device: str) -> list[Any]:
    images = torch.randn(side.shape, device=device)
    if not side.detects:
        return [images]
    boxes = torch.tensor([[60.0, 70, 100, 105], [150, 40, 170, 66]], device=device)
    targets = [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64, device=device)} for _ in images]
    return [list(images), targets]


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict):
        return torch.stack(list(output.values())).sum()
    tensors = [output] if isinstance(output, Tensor) else list(output)
    return torch.stack([t.square().mean() for t in tensors]).sum()


def _matmul_rate(device: str, size: int = 2048, repeats: int = 3) -> float:
    a = torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def compare_export(names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure networks in PyTorch and in ONNX Runtime, with one thread, and how far they differ.

    Raises:
        ValueError: if a network is unknown.
    """
    _check("network", names, EXPORTED)
    import onnxruntime  # of the extra "export"

    torch.set_num_threads(1)
    result: dict[str, Any] = {"settings": {"repeats": repeats, "onnxruntime": onnxruntime.__version__}}
    for name in names:
        side = EXPORTED[name]
        torch.manual_seed(0)
        network, x = side.build().eval(), torch.randn(side.shape)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = str(Path(folder, "model.onnx"))
            program = torch.export.export(network, (x,))
            torch.onnx.export(program, (), f=file, dynamo=True, external_data=False, verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(file, options)
            feed = {session.get_inputs()[0].name: x.numpy()}
            output = network(x)
            tensors = [output] if isinstance(output, Tensor) else list(output)
            differences = [
                float(np.abs(ours.numpy() - theirs).max())
                for ours, theirs in zip(tensors, session.run(None, feed), strict=True)
            ]
            seconds = alternate({"eager": partial(network, x), "onnx": partial(session.run, None, feed)}, repeats)
            result[name] = {
                "input": list(side.shape),
                "PyTorch_s": quartiles(seconds["eager"]),
                "ONNX_Runtime_s": quartiles(seconds["onnx"]),
                "largest_difference": float(f"{max(differences):.2g}"),
                "file_MB": round(Path(file).stat().st_size / 1e6),
            }
    return result
