"""Devices and processes of a run: one process alone, or one for each GPU, started by torchrun."""

import contextlib
import ctypes
from collections.abc import Sized

import torch
from torch import distributed, nn

from vdt_workflows.parallel import follow_parent


def pick_device(local_rank: int) -> torch.device:
    """Give the GPU of this process, by its number on this machine; the CPU where CUDA is not available."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def join_processes(device: torch.device | str) -> None:
    """Join the processes that torchrun started, over nccl where CUDA is available and gloo elsewhere.

    In a process that has joined already it only sets the device. A process that torchrun started ends with it, also
    where it is killed and can end none.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        if distributed.is_torchelastic_launched():
            follow_parent()
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def is_first_process() -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def leave_processes() -> None:
    """Leave the processes that were joined, if any."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def share_batch(batch_size: int, world_size: int = 1, micro_batch: int | None = None) -> tuple[int, int]:
    """Share a batch out to processes, and each one's share to micro batches of equal size.

    Args:
        batch_size: samples of one step of the optimiser.
        world_size: number of processes.
        micro_batch: samples that a process holds at once, at most; all by default.

    Returns:
        Samples of a micro batch of one process, and how many micro batches a step has.

    Raises:
        ValueError: naming the nearest right values, if the batch cannot be shared out evenly.
    """
    if min(batch_size, world_size, micro_batch or 1) < 1:
        raise ValueError(f"batch_size and micro_batch must be at least 1, got {batch_size} and {micro_batch}")
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        near = [n * world_size for n in (share, share + 1) if n]
        fewer = max(n for n in range(1, world_size) if batch_size % n == 0)
        raise ValueError(
            f"a batch of {batch_size} cannot be shared by {world_size} processes; give --batch_size"
            f" {' or '.join(map(str, near))}, or start {fewer} process{'es' if fewer > 1 else ''}"
        )
    if micro_batch is None or share <= micro_batch:
        return share, 1
    if share % micro_batch:
        lower = max(n for n in range(1, micro_batch) if share % n == 0)
        upper = min(n for n in range(micro_batch, share + 1) if share % n == 0)
        step = micro_batch * world_size
        raise ValueError(
            f"{share} samples of each process cannot be shared by micro batches of {micro_batch}; give --micro_batch"
            f" {lower} or {upper}, or --batch_size {batch_size // step * step} or {(batch_size // step + 1) * step}"
        )
    return micro_batch, share // micro_batch


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
    """Move a network that is to be trained to a device.

    On the CPU, glibc then keeps the memory that a step frees for the next one, as torch does on CUDA: giving it back
    and taking it anew is a sixth of the CPU time of a step of ResUNet3D with two patches of 16 x 112 x 112.

    Args:
        network: any network.
        device: where it goes.
        channels_last: keep the channels of a voxel or pixel side by side in memory.
        sync_bn: take the statistics of batch normalisation over all processes; only where CUDA is available.
    """
    if sync_bn and torch.cuda.is_available():
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if torch.device(device).type == "cpu":
        with contextlib.suppress(OSError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    volumes = any(parameter.dim() == 5 for parameter in network.parameters())
    last = torch.channels_last_3d if volumes else torch.channels_last
    return network.to(device).to(memory_format=last if channels_last else torch.preserve_format)
