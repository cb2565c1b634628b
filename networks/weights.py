"""Load the weights people have into the networks of this package, and say what happened to every tensor."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CONTAINERS = ("state_dict", "model", "network")
WRAPPERS = re.compile(r"^((module|_orig_mod|network)\.)+")  # DistributedDataParallel, torch.compile, DepthFirst
ENCODER = re.compile(r"^(backbone\.)?(conv1|bn1|layer[1-4])\.")
# The last layer depends on the task: another number of classes leaves it random instead of refusing the file.
CLASSIFIERS = re.compile(r"(^|\.)(fc|conv_seg|seg_head\.3)\.(weight|bias)$")
STATISTICS = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
# Published names on the left; this package's on the right.
PUBLISHED = (
    (re.compile(r"^neck\.decoder\.(\d)\.upsample\.interp_upsample\.1\."), r"neck.decoder.\1.reduce."),
    (re.compile(r"^neck\.decoder\.(\d)\.conv_block\.convs\."), r"neck.decoder.\1.fuse."),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did, by tensor name.

    Attributes:
        path: the file.
        matched: loaded as they are (a cast from half precision included).
        folded: stems whose RGB kernels were folded into one channel.
        skipped: tensors of the file that were not used, with the reason.
        left_random: tensors of the network that the file does not have; they keep their initial values.
    """

    path: str
    matched: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_random: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.matched)} tensors matched, {len(self.folded)} folded,"
                 f" {len(self.skipped)} skipped, {len(self.left_random)} left random"]  # fmt: skip
        lines += [f"  folded to one channel: {name}" for name in self.folded]
        for reason in dict.fromkeys(self.skipped.values()):
            lines.append(f"  skipped, {reason}: {_few([k for k, v in self.skipped.items() if v == reason])}")
        if self.left_random:
            lines.append(f"  left random: {_few(self.left_random)}")
        return "\n".join(lines)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, on the CPU, without running code from it.

    Takes a bare dictionary of tensors, or one inside `state_dict`, `model` or `network`; a state dict's
    metadata is kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file needs pickled code, is no checkpoint, is cut off, or holds no tensors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"{path}: refused, because reading it would run code stored in the file (pickled objects);"
                " load it where you trust it, and save its state dict alone with torch.save"
            ) from error
        raise ValueError(
            f"{path}: not a whole PyTorch checkpoint ({type(error).__name__} while reading);"
            " expected a file written by torch.save, so copy or download it again"
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = OrderedDict((name, value) for name, value in entries if isinstance(value, Tensor))
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; expected a state dict, bare or under one of {CONTAINERS}")
    tensors._metadata = getattr(content, "_metadata", {})  # type: ignore[attr-defined]  # as torch keeps it
    return tensors


def load_pretrained(network: nn.Module, path: str | os.PathLike, *, stem: str = "sum") -> LoadReport:
    """Start `network` from the weights in `path`, whatever of the usual ways they were saved in.

    Understands the published names, bare or behind `module.` and `backbone.`, half precision, classifier heads, stems
    for RGB, and networks wrapped in `DepthFirst`, `DistributedDataParallel` or `torch.compile`. Strides may differ
    between file and network, since they are not weights. The encoder must match as a whole.

    Args:
        network: a network of this package; its tensors are overwritten in place, or not at all if an error is raised.
        path: the checkpoint file.
        stem: how three input kernels become one: "sum" answers to a grey volume as the RGB network answered to the
            grey image repeated three times; "mean" answers a third of it (the published README says averaged, the
            published tool sums).

    Returns:
        The report, which is also logged.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; ValueError also if `stem` is unknown, the encoder is not
            fully matched, or a tensor other than the last layer has another shape.
    """
    if stem not in ("sum", "mean"):
        raise ValueError(f"stem must be 'sum' or 'mean', got {stem!r}")
    target = {WRAPPERS.sub("", name): tensor for name, tensor in network.state_dict(keep_vars=True).items()}
    source = {_native_name(name, target): tensor for name, tensor in read_checkpoint(path).items()}
    report = LoadReport(os.fspath(path))
    new: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in source.items():
        if name not in target:
            if STATISTICS.search(name) and STATISTICS.sub(".weight", name) in target:
                report.skipped[name] = "the network's norm keeps no running statistics"
            elif ENCODER.match(name) and not _stage_unbuilt(name, target):
                problems.append(f"{name} is in the file only")
            else:
                report.skipped[name] = f"{type(network).__name__} has no such layer"
        elif tensor.shape == target[name].shape:
            new[name] = tensor
            report.matched.append(name)
        elif name.endswith("conv1.weight") and _is_rgb_stem(tensor, target[name]):
            new[name] = tensor.float().sum(1, keepdim=True) / (1 if stem == "sum" else tensor.shape[1])
            report.folded.append(name)
        elif CLASSIFIERS.search(name):
            report.skipped[name] = f"shape {_shape(tensor)} for other classes, the network has {_shape(target[name])}"
        else:
            problems.append(f"{name} is {_shape(tensor)} in the file, {_shape(target[name])} in the network")
    missing = [name for name in target if name not in new and not name.endswith("num_batches_tracked")]
    report.left_random.extend(name for name in missing if not ENCODER.match(name))
    problems += [f"{name} is in the network only" for name in missing if ENCODER.match(name) and name not in source]
    if problems:
        raise ValueError(
            f"{path}: does not fit {type(network).__name__}, {len(problems)} tensors differ: {_few(problems)}."
            " Build the network with the depth, base_channels, shortcut and norm of the file"
        )
    with torch.no_grad():
        for name, tensor in new.items():
            target[name].copy_(tensor)
    logger.info("%s", report)
    return report


def _native_name(name: str, target: Mapping[str, Any]) -> str:
    """Give a tensor of a file the name that the network has for it, if the network has it."""
    name = WRAPPERS.sub("", name)
    for pattern, replacement in PUBLISHED:
        name = pattern.sub(replacement, name)
    if "conv1.weight" in target:  # the network is a bare encoder
        return name.removeprefix("backbone.")
    return f"backbone.{name}" if ENCODER.match(name) and not name.startswith("backbone.") else name


def _is_rgb_stem(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether the tensor is the wanted one-channel stem, but for several input channels."""
    return wanted.dim() == tensor.dim() and wanted.shape[1] == 1 and tensor[:, :1].shape == wanted.shape


def _stage_unbuilt(name: str, target: Mapping[str, Any]) -> bool:
    """Whether the network leaves out the whole stage that the tensor belongs to."""
    stage = re.match(r"^((backbone\.)?layer[1-4])\.", name)
    return stage is not None and not any(key.startswith(stage[1] + ".") for key in target)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _few(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
