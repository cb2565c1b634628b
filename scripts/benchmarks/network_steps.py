"""The benchmarks of the networks, against their nearest relatives, with knobs turned, and exported.

Each network is timed in a process of its own, so that its peak memory is its own. What a step asks for is counted by
PyTorch's `FlopCounterMode`, and set against the rate of a large matrix product in the same process.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.timing import alternate, peak_memory, quartiles, run_alone
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNet, FlexibleUNet, resnet18
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18 as resnet18_2d
from torchvision.models import resnet50 as resnet50_2d
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.video import r3d_18

from networks import P3D, LesionDetector, NoduleFCN, ResNet3DClassifier, ResUNet3D
from networks.layers import StemConv3d
from vdt_workflows.errors import check_choice
from vdt_workflows.packaging.detector_graph import DetectorGraph

CLASSES = 1000
VARIANTS = ("plain", "channels last", "compiled", "fused optimiser", "checkpointing", "3D stem")


@dataclass(frozen=True)
class Entry:
    """A network, and the size of the input that it is timed with."""

    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    detects: bool = False


_IMAGE, _PATCH, _PATCHES, _CUBE = (2, 1, 3, 224, 224), (1, 1, 32, 96, 96), (2, 1, 32, 96, 96), (1, 1, 48, 48, 48)
_ENCODER = partial(
    resnet18, spatial_dims=3, n_input_channels=1, num_classes=CLASSES, conv1_t_stride=2, bias_downsample=False
)
_BOXES = {"num_classes": 2, "min_size": 256, "max_size": 256, "box_score_thresh": 0.0}
_DETECTOR = partial(fasterrcnn_resnet50_fpn, weights=None, weights_backbone=None, **_BOXES)
# The first of each is ours; the others are what a user would take from MONAI or torchvision for the same input.
GROUPS: dict[str, dict[str, Entry]] = {
    "encoder": {
        "ResNet3D-18 classifier": Entry(partial(ResNet3DClassifier, 18, CLASSES, depth_stride=True), _PATCHES),
        "MONAI resnet18": Entry(_ENCODER, _PATCHES),
    },
    "pre-training": {
        "ResNet3D-18 classifier": Entry(partial(ResNet3DClassifier, 18, CLASSES), _IMAGE),
        "torchvision resnet18, 2D": Entry(partial(resnet18_2d, num_classes=CLASSES), (2, 3, 224, 224)),
        "torchvision r3d_18, video": Entry(partial(r3d_18, num_classes=CLASSES), (2, 3, 3, 224, 224)),
    },
    "organs": {
        "ResUNet3D-18": Entry(partial(ResUNet3D, 14), _PATCH),
        "ResUNet3D-18, strided stem": Entry(partial(ResUNet3D, 14, stem="strided"), _PATCH),
        "MONAI FlexibleUNet, resnet18": Entry(partial(FlexibleUNet, 1, 14, "resnet18", spatial_dims=3), _PATCH),
    },
    "nodule cube": {
        "NoduleFCN-18": Entry(NoduleFCN, _CUBE),
        "MONAI BasicUNet": Entry(partial(BasicUNet, 3, 1, 2), _CUBE),
    },
    "slices": {
        "P3D-63": Entry(partial(P3D, 63), (1, 9, 256, 256)),
        "MP3D-63": Entry(partial(P3D, 63, conversion="group"), (1, 9, 256, 256)),
        "torchvision resnet50, 2D": Entry(resnet50_2d, (1, 3, 256, 256)),
    },
    "detector": {
        "LesionDetector-63": Entry(LesionDetector, (1, 9, 256, 256), detects=True),
        "torchvision fasterrcnn_resnet50_fpn, 2D": Entry(_DETECTOR, (1, 3, 256, 256), detects=True),
    },
}
EXPORTED = {  # our networks that torch.export takes, and the size they are exported and timed with
    "ResUNet3D-18": Entry(partial(ResUNet3D, 14), (1, 1, 64, 64, 64)),
    "NoduleFCN-18": Entry(NoduleFCN, _CUBE),
    "ResNet3D-18 classifier": Entry(partial(ResNet3DClassifier, 18, 2, depth_stride=True), _CUBE),
    "P3D-63": Entry(partial(P3D, 63), (1, 9, 128, 128)),
    "LesionDetector-63": Entry(LesionDetector, (1, 9, 256, 256)),
}


def compare_networks(
    groups: Sequence[str] = tuple(GROUPS), steps: int = 5, repeats: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    """Compare each network's training step, inference and peak memory with MONAI's and torchvision's nearest relatives.

    FLOP and parameters are counted. Every repeat is a fresh process, and the networks of a group take turns.

    Args:
        groups: some of "encoder" (depth strided, map for map of MONAI's shape), "pre-training", "organs",
            "nodule cube", "slices" and "detector".
        steps: timed steps of a process, after two to warm up.
        repeats: processes of each network.
        device: "cpu" (one thread) or "cuda".

    Raises:
        ValueError: if a group is unknown.
    """
    for group in groups:
        check_choice("groups", group, tuple(GROUPS))
    turns = {f"{group}: {name}": (group, name, "plain") for group in groups for name in GROUPS[group]}
    return _measure(turns, steps, repeats, device)


def compare_knobs(
    groups: Sequence[str] = ("pre-training", "organs"),
    variants: Sequence[str] = VARIANTS,
    steps: int = 5,
    repeats: int = 2,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure what channels-last, `torch.compile`, a fused optimiser and checkpointing do to a training step.

    Args:
        groups: whose first network is measured, as in `network`.
        variants: some of "plain", "channels last", "compiled", "fused optimiser", "checkpointing" and "3D stem", which
            differs for three slices alone.
        steps: timed steps of a process, after two to warm up.
        repeats: processes of each variant.
        device: "cpu" (one thread) or "cuda".

    Raises:
        ValueError: if a group or a variant is unknown.
    """
    turns = {}
    for group, variant in product(groups, variants):
        check_choice("groups", group, tuple(GROUPS))
        check_choice("variants", variant, VARIANTS)
        first = next(iter(GROUPS[group]))
        turns[f"{group}: {first}: {variant}"] = group, first, variant
    return _measure(turns, steps, repeats, device)


def _measure(turns: Mapping[str, tuple[str, str, str]], steps: int, repeats: int, device: str) -> dict[str, Any]:
    """Time each (group, network, variant) in turn, as often as `repeats` says, and sum up by name."""
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in turns}
    for _, (label, turn) in product(range(repeats), turns.items()):
        runs[label].append(run_alone(time_network, *turn, steps, device))
    kind = "resident memory of the process" if device == "cpu" else "memory of torch's CUDA allocator"
    settings = {
        "steps": steps,
        "repeats": repeats,
        "device": device,
        "peak_MB_is": f"peak {kind} in training, less what it held before the network was built",
        "share_of_matmul_is": "three times the forward's FLOP a step, against a float32 matrix product of 2048 cubed",
    }
    found = {label: _summary(runs[label], GROUPS[group][name].shape) for label, (group, name, _) in turns.items()}
    return {"settings": settings, **found}


def _summary(runs: Sequence[dict[str, Any]], shape: Sequence[int]) -> dict[str, Any]:
    training = [s for run in runs for s in run["training"]]
    middle = {name: float(np.median([run[name] for run in runs])) for name in ("MB", "share_of_matmul", "first_step_s")}
    return {
        "input": list(shape),
        "parameters_M": runs[0]["parameters_M"],
        "forward_GFLOP": runs[0]["forward_GFLOP"],
        "training_step_s": quartiles(training),
        "inference_s": quartiles([s for run in runs for s in run["inference"]]),
        "samples_per_s_in_training": round(shape[0] / float(np.median(training)), 2),
        "peak_MB": round(middle["MB"]),
        "share_of_matmul": round(middle["share_of_matmul"], 2),
        "first_step_s": round(middle["first_step_s"], 1),
    }


def time_network(group: str, name: str, variant: str, steps: int, device: str) -> dict[str, Any]:
    """Time one network in this process: its steps in s, its peak memory in MB, its FLOP and parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuda = device != "cpu"
    entry = GROUPS[group][name]
    before = 0 if cuda else peak_memory()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    network = entry.build(**({"checkpointing": True} if variant == "checkpointing" else {}))
    if variant == "3D stem":
        for layer in network.modules():
            if isinstance(layer, StemConv3d):
                layer.__class__ = nn.Conv3d  # type: ignore[assignment]  # its parent, with the same fields
    network = network.to(device).train()
    if variant == "channels last":
        network = network.to(memory_format=torch.channels_last_3d)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=variant == "fused optimiser")
    arguments = _arguments(entry, device)
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
    timed(step)  # a second one, since a compiled network may be compiled anew
    training = [timed(step) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else (peak_memory() - before) / 1024
    network.eval()
    with torch.inference_mode():
        timed(lambda: run(arguments[0]))
        inference = [timed(lambda: run(arguments[0])) for _ in range(steps)]
    flops = count_flops(entry)  # not before, since what it takes would count as held by the process
    return {
        "training": training,
        "inference": inference,
        "first_step_s": first,
        "MB": peak,
        "parameters_M": round(sum(p.numel() for p in parameters) / 1e6, 2),
        "forward_GFLOP": round(flops / 1e9, 1),
        "share_of_matmul": 3 * flops / float(np.median(training)) / _matmul_rate(device),
    }


def count_flops(entry: Entry) -> int:
    """Floating-point operations of a forward pass in evaluation, by torch's counter."""
    device = "cpu" if entry.detects else "meta"  # where nothing is computed; a detector chooses among its boxes
    network = entry.build().to(device).eval()
    arguments = _arguments(entry, device)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(arguments[0])
    return int(counter.get_total_flops())


def _arguments(entry: Entry, device: str) -> list[Any]:
    images = torch.randn(entry.shape, device=device)
    if not entry.detects:
        return [images]
    boxes = torch.tensor([[60.0, 70, 100, 105], [150, 40, 170, 66]], device=device)
    targets = [{"boxes": boxes, "labels": torch.ones(2, dtype=torch.int64, device=device)} for _ in images]
    return [list(images), targets]


def _loss(output: Any) -> Tensor:
    if isinstance(output, dict):
        return torch.stack(list(output.values())).sum()
    return torch.stack([tensor.square().mean() for tensor in _as_list(output)]).sum()


def _as_list(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _matmul_rate(device: str, size: int = 2048, repeats: int = 3) -> float:
    a = torch.randn(size, size, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def _run_session(session: Any, x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(answer) for answer in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def compare_export(
    names: Sequence[str] = tuple(EXPORTED), repeats: int = 5, volume: Sequence[int] = ()
) -> dict[str, Any]:
    """Compare TorchScript and ONNX Runtime with PyTorch in CPU seconds, one thread each, and how far answers differ.

    Args:
        names: some of "ResUNet3D-18", "NoduleFCN-18", "ResNet3D-18 classifier", "P3D-63" and "LesionDetector-63", of
            which the scores are compared, since rows change places where they are nearly equal.
        repeats: timed passes of each.
        volume: voxels of a volume that is segmented whole, by windows of the input's size that overlap by half, in
            place of one input; for the two networks that segment.

    Raises:
        ValueError: if a network is unknown, or does not segment the volume.
    """
    for name in names:
        check_choice("names", name, tuple(EXPORTED)[:2] if volume else tuple(EXPORTED))
    import onnxruntime  # of the extra "export"

    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    result: dict[str, Any] = {"settings": {"repeats": repeats, "onnxruntime": onnxruntime.__version__}}
    for name in names:
        torch.manual_seed(0)
        network, x = EXPORTED[name].build().eval(), torch.randn(EXPORTED[name].shape)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            file = Path(folder, "model.onnx")
            graph = DetectorGraph(network) if isinstance(network, LesionDetector) else network
            program = torch.export.export(graph, (x,))
            torch.onnx.export(program, (), f=str(file), dynamo=True, external_data=False, verbose=False)
            session = onnxruntime.InferenceSession(str(file), options)
            run = partial(_run_session, session)
            kept = np.s_[..., 4] if graph is not network else np.s_[...]  # a detector's rows change places
            outputs = zip(_as_list(network(x)), run(x), strict=True)
            difference = max(float((ours - theirs).abs()[kept].max()) for ours, theirs in outputs)
            calls: dict[str, Callable[..., Any]] = {"eager": network, "script": torch.jit.script(network), "onnx": run}
            ways: dict[str, Callable[[], Any]] = {way: partial(call, x) for way, call in calls.items()}
            if volume:
                whole, size = torch.randn(1, 1, *volume), EXPORTED[name].shape[2:]
                ways = {
                    way: partial(sliding_window_inference, whole, size, 1, call, overlap=0.5)
                    for way, call in calls.items()
                }
            seconds = alternate(ways, repeats, time.process_time)  # of one thread, also on a machine that others use
            result[name] = {
                "input": [1, 1, *volume] if volume else list(x.shape),
                "PyTorch_s": quartiles(seconds["eager"]),
                "TorchScript_s": quartiles(seconds["script"]),
                "ONNX_Runtime_s": quartiles(seconds["onnx"]),
                "largest_difference": float(f"{difference:.2g}"),
                "file_MB": round(file.stat().st_size / 1e6),
            }
    return result
