"""Scores of cubes, averaged over rotations and over networks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from vdt_workflows.training.checkpoints import load_weights


class CubeInferer(Inferer):
    """Classify cubes by the mean of the probabilities that one or more networks give to their rotations.

    Args:
        rotations: 1 (as they are), 4 (quarter turns about Z) or 24 (all by quarter turns).
        ensemble: files of weights that take part beside the network's own, such as those of the other folds.
        network: a network that these files fit, copied for each; needed for them alone.

    Raises:
        ValueError: if `rotations` is another number, or a file does not fit (see `load_weights`).
    """

    def __init__(
        self, rotations: int = 1, ensemble: Sequence[str | os.PathLike] = (), network: nn.Module | None = None
    ) -> None:
        super().__init__()
        if rotations not in (1, 4, 24):
            raise ValueError(f"rotations must be 1, 4 or 24, got {rotations!r}")
        if isinstance(ensemble, str) or (ensemble and network is None):
            raise ValueError(f"ensemble must be a list of files, with a network that they fit, got {ensemble!r}")
        self.rotations = rotations
        self.others = [copy.deepcopy(network).eval() for _ in ensemble]  # type: ignore[union-attr]  # checked above
        for other, path in zip(self.others, ensemble, strict=True):
            load_weights(other, path)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """(N, C, X, X, X) -> logits (N, classes); of several answers the logarithm of their mean probability."""
        networks = [network, *(other.to(inputs.device) for other in self.others)]
        if len(networks) == self.rotations == 1:
            return network(inputs, *args, **kwargs)
        sides = [inputs]
        if self.rotations == 24:
            sides = [inputs.rot90(k, (2, 4)) for k in range(4)] + [inputs.rot90(k, (3, 4)) for k in (1, 3)]
        turned = [side.rot90(k, (2, 3)) for side in sides for k in range(min(self.rotations, 4))]
        found = [each(cube, *args, **kwargs).float().softmax(1) for each in networks for cube in turned]
        return torch.stack(found).mean(0).log()
