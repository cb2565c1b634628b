"""Parts of losses that MONAI's do not have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.losses import DiceCELoss
from monai.networks import one_hot
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce


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


class SharedDiceCELoss(DiceCELoss):
    """MONAI's `DiceCELoss` for several processes: sums over the batch are taken over the batches of all of them.

    These are the sums of a Dice over the batch, and of the weights of the classes in the cross-entropy. With them the
    processes step as one process that has the whole batch. In one process it is MONAI's. Over the micro batches of
    accumulated gradients no sum is taken: there the Dice is the mean of theirs.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, ...) and labels (N, 1, ...) -> the loss."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1 or not self.dice.batch:
            return super().forward(input, target)
        labels = one_hot(target, num_classes=input.shape[1])
        predicted, axes = input.softmax(1), [0, *range(2, input.dim())]
        power = 2 if self.dice.squared_pred else 1
        sums = torch.stack([part.sum(axes) for part in (predicted * labels, predicted**power, labels)])
        both, here, there = all_reduce(sums[:, 0 if self.dice.include_background else 1 :])
        dice = 1 - (2 * both + self.dice.smooth_nr) / (here + there + self.dice.smooth_dr)
        if self.dice.class_weight is not None:
            dice = dice * self.dice.class_weight
        cross_entropy = self.ce(input, target)
        if (weight := self.cross_entropy.weight) is not None:  # a mean weighted by the classes that are there
            own = weight[target.long()].sum()
            total = own.clone()
            distributed.all_reduce(total)
            cross_entropy = cross_entropy * own * distributed.get_world_size() / total
        return self.lambda_dice * dice.mean() + self.lambda_ce * cross_entropy
