"""Checkpoint files: how they are read, and the architecture that they carry beside the tensors."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = ("state_dict", "model", "network")
LARGEST = 1e8  # magnitude of a weight; variances may reach its square
# What every ResNet3D is today; files of versions in which it was an argument may hold another value.
FORMER = {"dilations": [1, 1, 1, 1]}


def load_whole(path: str | os.PathLike) -> Any:
    """Do what `torch.load` does on the CPU, without running code, and verify the checksums too.

    A file written by torch.save is a zip, whose checksums `torch.load` ignores: a changed byte would be another weight.
    Files of before PyTorch 1.6 have no checksums; what was saved with checksums turned off
    (`torch.serialization.set_crc32_options`) is taken for damaged.

    Raises:
        BadZipFile: naming the part of the file whose checksum differs.
        Exception: whatever reading a damaged file raises.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)


def describe_damage(error: Exception) -> str:
    """Describe an error of `load_whole` in a few words: the checksum that differs, or the type of the error."""
    return str(error) if isinstance(error, zipfile.BadZipFile) else f"{type(error).__name__} while reading"


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, on the CPU, without running code from it.

    Takes a bare dictionary of tensors, or one inside `state_dict`, `model` or `network`; a state dict's
    metadata is kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file needs pickled code, is no checkpoint, is cut off, holds no tensors, or one with values
            that no network has: NaN, infinite, of a magnitude above `LARGEST`, or a negative variance.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        content = load_whole(path)
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"{path}: refused, because reading it would run code stored in the file (pickled objects);"
                " load it where you trust it, and save its state dict alone with torch.save"
            ) from error
        raise ValueError(
            f"{path}: not a whole PyTorch checkpoint ({describe_damage(error)});"
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
    check_values(path, tensors)
    tensors._metadata = getattr(content, "_metadata", {})  # type: ignore[attr-defined]  # as torch keeps it
    return tensors


def check_values(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that no trained network has: NaN, infinite, above `LARGEST`, or a negative variance.

    Raises:
        ValueError: naming the file and the tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        is_variance = name.endswith("running_var")
        low, high = (value.item() for value in torch.aminmax(tensor.float()))  # NaN if any is
        most = LARGEST**2 if is_variance else LARGEST
        if not (0 if is_variance else -most) <= low <= high <= most:
            raise ValueError(
                f"{path}: {name} holds values from {low:g} to {high:g}, which no trained network has; the file is"
                " damaged or its training failed, take another one"
            )


def check_types(path: str | os.PathLike, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse whole numbers and truth values where the network has floating-point ones, which torch would convert.

    Raises:
        ValueError: naming the file, the tensor and both types.
    """
    for name, tensor in tensors.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            theirs, ours = (str(t.dtype).removeprefix("torch.") for t in (tensor, own[name]))
            raise ValueError(f"{path}: {name} is {theirs}, the network has {ours}; save the trained weights")


def record_architecture(network: nn.Module) -> None:
    """Let a network's state dict carry what the shapes of its tensors do not tell, and compare it on loading.

    The values of the dictionary `network.architecture` are written into the state dict's metadata. Loading a state dict
    whole raises a ValueError if they differ; one without metadata, such as a published checkpoint, loads as it is.
    """
    network.register_state_dict_post_hook(_write_architecture)
    network.register_load_state_dict_pre_hook(_check_architecture)


def _write_architecture(module: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata["architecture"] = module.architecture


def _check_architecture(
    module: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *unused: Any
) -> None:
    written = local_metadata.get("architecture", {})
    own = {**FORMER, **module.architecture}
    differ = [f"{k}={written[k]!r} (here {v!r})" for k, v in own.items() if written.get(k, v) != v]
    if differ:
        raise ValueError(
            f"the checkpoint was made by a ResNet3D with {', '.join(differ)}; build the network with the same"
            " arguments, or start from its encoder with networks.load_pretrained, which allows other strides"
        )
