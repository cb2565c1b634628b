"""Parts of losses that MONAI's do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks import one_hot
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

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


class SharedDiceCELoss(DiceCELoss):
    """MONAI's `DiceCELoss` for several processes: sums over the batch are taken over the batches of all of them.

    These are the sums of a Dice over the batch, and of the weights of the classes in the cross-entropy. With them the
    processes step as one process that has the whole batch. In one process it is MONAI's. Over the micro batches of
    accumulated gradients no sum is taken: there the Dice is the mean of theirs.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, ...) and labels (N, 1, ...) -> the loss."""
        if not _is_shared():
            return super().forward(input, target)
        dice = self._dice(input, target) if self.dice.batch else self.dice(input, target)
        cross_entropy = _share_weights(self.ce(input, target), self.cross_entropy.weight, target)
        return self.lambda_dice * dice + self.lambda_ce * cross_entropy

    def _dice(self, input: Tensor, target: Tensor) -> Tensor:
        labels = one_hot(target, num_classes=input.shape[1])
        predicted, axes = input.softmax(1), [0, *range(2, input.dim())]
        power = 2 if self.dice.squared_pred else 1
        sums = torch.stack([part.sum(axes) for part in (predicted * labels, predicted**power, labels)])
        both, here, there = all_reduce(sums[:, 0 if self.dice.include_background else 1 :])
        dice = 1 - (2 * both + self.dice.smooth_nr) / (here + there + self.dice.smooth_dr)
        if self.dice.class_weight is not None:
            dice = dice * self.dice.class_weight
        return dice.mean()


class SharedCrossEntropyLoss(nn.CrossEntropyLoss):
    """PyTorch's `CrossEntropyLoss` for several processes: a mean weighted by class is that over the batches of all."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, ...) and labels (N, ...) -> the loss."""
        loss = super().forward(input, target)
        return _share_weights(loss, self.weight, target) if _is_shared() else loss


def _is_shared() -> bool:
    return distributed.is_initialized() and distributed.get_world_size() > 1


def _share_weights(loss: Tensor, weight: Tensor | None, target: Tensor) -> Tensor:
    """Scale this process's mean, weighted by the classes that are there, to its part in that over all processes."""
    if weight is None:
        return loss
    own = weight[target.long()].sum()
    total = own.clone()
    distributed.all_reduce(total)
    return loss * own * distributed.get_world_size() / total


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
