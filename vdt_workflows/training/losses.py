"""Parts of losses that MONAI's do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def class_weights(
    weights: Sequence[float] | None, num_classes: int | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Make a loss's weights of the classes out of numbers, whole or not; None stays None.

    Args:
        weights: one positive number for each class.
        num_classes: how many there must be; not checked if None.
        device: where the tensor goes.

    Raises:
        ValueError: if a weight is not a positive number, or there is not one for each class.
    """
    if weights is None:
        return None
    numbers = not isinstance(weights, str) and all(isinstance(w, int | float) and 0 < w < math.inf for w in weights)
    if not numbers or num_classes not in (None, len(weights)):
        wanted = "positive numbers" if num_classes is None else f"{num_classes} positive numbers, one for each class"
        raise ValueError(f"class_weights must be {wanted}, got {weights!r}")
    return torch.tensor([float(w) for w in weights], device=device)
