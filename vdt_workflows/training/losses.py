"""Parts of losses that MONAI's do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.losses import DeepSupervisionLoss
from torch import Tensor, nn

from networks import DepthFirst, ResUNet3D


def class_weights(
    weights: Sequence[float] | str | None, num_classes: int | None = None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Make a loss's weights of the classes out of numbers, whole or not; "none" and None give None.

    Args:
        weights: one positive number for each class, or "none".
        num_classes: how many there must be; not checked if None.
        device: where the tensor goes.

    Raises:
        ValueError: if a weight is not a positive number, or there is not one for each class.
    """
    if weights is None or weights == "none":
        return None
    numbers = not isinstance(weights, str) and all(isinstance(w, int | float) and 0 < w < math.inf for w in weights)
    if not numbers or num_classes not in (None, len(weights)):
        wanted = "positive numbers" if num_classes is None else f"{num_classes} positive numbers, one for each class"
        raise ValueError(f"class_weights must be {wanted}, got {weights!r}")
    return torch.tensor([float(w) for w in weights], device=device)


@dataclass(eq=False)
class DeepSupervision:
    """A loss of a network's logits, and of those that a `ResUNet3D` makes of coarser maps while it trains.

    Each level weighs half of the finer one, and the weights add up to one, so that values keep their scale. Labels are
    brought to a coarser map by nearest neighbours. Where there are no such logits, it is the loss alone.

    Args:
        loss: of logits (N, classes, X, Y, Z) and labels (N, 1, X, Y, Z).
        network: not wrapped for several processes; alone or in `DepthFirst`, and any other network too.
    """

    loss: nn.Module
    network: nn.Module

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        """Logits (N, classes, X, Y, Z) and labels (N, 1, X, Y, Z) -> the loss."""
        turned = isinstance(self.network, DepthFirst)
        unet = self.network.network if isinstance(self.network, DepthFirst) else self.network
        side = unet.take_side_logits() if isinstance(unet, ResUNet3D) else []
        if not side:
            return self.loss(logits, label)
        levels = [logits, *(s.permute(0, 1, 4, 3, 2) if turned else s for s in side)]
        weights = [2 ** (len(side) - i) / (2 ** len(levels) - 1) for i in range(len(levels))]
        return DeepSupervisionLoss(self.loss, weights=weights)(levels, label.float())
