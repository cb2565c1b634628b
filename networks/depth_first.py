"""The one place where MONAI's axis order meets the networks' axis order."""

from torch import Tensor, nn


class DepthFirst(nn.Module):
    """Let a depth-first network take volumes in MONAI's order: (N, C, X, Y, Z) goes in as (N, C, Z, Y, X).

    X becomes width, Y height and Z depth; with `restore` the network's dense output is turned back the same way.
    Only for networks that return one tensor.

    Args:
        network: network of depth-first volumes (N, C, D, H, W).
        restore: whether the output is a volume to be turned back (segmentation) or not (classification).
    """

    def __init__(self, network: nn.Module, restore: bool = True) -> None:
        super().__init__()
        self.network = network
        self.restore = restore

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> (N, C', X, Y, Z), or the network's own output without `restore`."""
        y = self.network(x.permute(0, 1, 4, 3, 2))
        return y.permute(0, 1, 4, 3, 2) if self.restore else y
