"""Devices and processes of a run: one process alone, or one for each GPU, started by torchrun."""

from __future__ import annotations

from collections.abc import Sized

import torch
from torch import distributed, nn


def pick_device(local_rank: int) -> torch.device:
    """Give the GPU of this process, by its number on this machine; the CPU where CUDA is not available."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def join_processes(device: torch.device | str) -> None:
    """Join the processes that torchrun started, over nccl where CUDA is available and gloo elsewhere.

    In a process that has joined already it only sets the device.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def leave_processes() -> None:
    """Leave the processes that were joined, if any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def share_out(data: Sized, rank: int = 0, world_size: int = 1) -> range:
    """Give the indices that a process scores: every `world_size`-th one, so that none is scored twice.

    If there are fewer than processes, each process takes all of them: one without any would leave the others waiting
    for its metrics, and no mean changes.

    Raises:
        ValueError: if there is nothing to score.
    """
    if not len(data):
        raise ValueError("data is empty; expected at least one sample")
    return range(rank, len(data), world_size) if len(data) >= world_size else range(len(data))


def place(
    network: nn.Module, device: torch.device | str, channels_last: bool = False, sync_bn: bool = False
) -> nn.Module:
    """Move a network to a device.

    Args:
        network: any network.
        device: where it goes.
        channels_last: keep the channels of a voxel or pixel side by side in memory.
        sync_bn: take the statistics of batch normalisation over all processes; only where CUDA is available.
    """
    if sync_bn and torch.cuda.is_available():
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    volumes = any(parameter.dim() == 5 for parameter in network.parameters())
    last = torch.channels_last_3d if volumes else torch.channels_last
    return network.to(device).to(memory_format=last if channels_last else torch.preserve_format)
