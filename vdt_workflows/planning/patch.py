"""Fit a patch and a network of strided stages to cases of a size, and to the memory of a device.

Sizes are voxels and spacings mm, as X, Y, Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

Axes = list[int]
LEAST = 4  # voxels that striding leaves of an axis
CPU_VOXELS = 48**3  # of a patch: a step of two takes a third of a second on one core
SHARE = 0.7  # of a device's memory that is planned for


def choose_stem(median: Axes, memory: float | None) -> tuple[str, str]:
    """Keep the full resolution inside on a GPU, or where a strided stem leaves next to nothing: thin in two axes.

    On a CPU half of it and a light stage at full resolution had 0.866 Dice on 20 validation hippocampi after six
    minutes of a core (2,300 steps), and the full resolution 0.862 (850 steps).
    """
    if memory is not None or sorted(median)[1] < 6 * LEAST:
        return "unet", ", the full resolution inside"
    return "strided", ", half the resolution inside, on a CPU"


def choose_patch(
    median: Axes, spacing: Sequence[float], stem: str, width: int, classes: int, memory: float | None
) -> Axes:
    """Shrink a patch of the cases' size until it fits, first the axis that is longest in mm; empty if none does.

    On a CPU it is no longer than a case, where that has many voxels, so that the crops of small ones differ.
    """
    patch = [round_size(n, up=memory is not None or n < 6 * LEAST) for n in median]
    while not fits(patch, 2, stem, width, classes, memory):
        lengths = [n * mm if n > 32 else 0 for n, mm in zip(patch, spacing, strict=True)]
        if not any(lengths):
            return []
        axis = int(np.argmax(lengths))
        patch[axis] = round_size(patch[axis] - 8, up=False)
    return patch


def round_size(size: int, up: bool = True) -> int:
    """Round to a size that can be halved some times: a multiple of 16, of 8 below 64, of 4 below 24, of 2 below 12."""
    unit = 16 if size >= 64 else 8 if size >= 24 else 4 if size >= 12 else 2
    return max(unit, -(-size // unit) * unit if up else size // unit * unit)


def fits(patch: Axes, batch: int, stem: str, width: int, classes: int, memory: float | None) -> bool:
    """Whether a step's activations and the network fit a GPU with mixed precision, or a CPU's patience."""
    if memory is None:
        return prod(patch) <= CPU_VOXELS * (1 if stem == "strided" else 0.5) * 1.1
    network = 2500 * width**2 * 4 * 16  # parameters: weights, gradients and the optimiser's two moments
    halves = count_activations(stem, width, classes) * prod(patch) * batch * 2
    return network + 1.5 * halves + 0.8e9 <= SHARE * memory * 1e9  # half as much again for gradients, and CUDA's own


def count_activations(stem: str, width: int, classes: int) -> float:
    """Count the numbers that a ResUNet3D-18 keeps for its backward pass, for each voxel of the patch.

    Norms and convolutions keep their inputs; the head has 16 channels, and the loss three maps of all classes.
    """
    sizes = [1 / 8 if stem == "strided" else 1.0]
    sizes += [sizes[0] / (1 if stem == "flat" else 8) / 8**level for level in range(4)]
    channels = [width, width, 2 * width, 4 * width, 8 * width]
    count = sizes[0] * (2 * width + 80 + 2 * classes) + 3 * classes
    count += sum(10 * c * size for c, size in zip(channels[1:], sizes[1:], strict=True))
    return count + sum((channels[i + 1] + 8 * channels[i]) * sizes[i] for i in range(4))


def choose_strides(patch: Axes, spacing: Sequence[float], stem: str) -> list[Axes]:
    """Halve each axis while it is fine, even and long enough: at stem, max-pool and the last three stages.

    An axis waits while its voxels are twice as long as the shortest (nnU-Net's rule), so that thick slices are kept
    until the others are as coarse.
    """
    size, mm = list(patch), [float(s) for s in spacing]
    strides = []
    for place in ("stem", "pool", "stage1", "stage2", "stage3", "stage4"):
        step = [1, 1, 1]
        if not (place == "stage1" or (place == "stem" and stem != "strided") or (place == "pool" and stem == "flat")):
            ready = [n % 2 == 0 and n >= 2 * LEAST for n in size]
            finest = min((m for m, r in zip(mm, ready, strict=True) if r), default=0.0)
            step = [2 if r and m < 2 * finest else 1 for m, r in zip(mm, ready, strict=True)]
        size = [n // s for n, s in zip(size, step, strict=True)]
        mm = [m * s for m, s in zip(mm, step, strict=True)]
        strides.append(step)
    return strides
