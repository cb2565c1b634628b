"""The U-Net of Models Genesis, for the comparison with its published weights."""

from collections import OrderedDict

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.resnet3d import check_classes

LEVELS = (64, 128, 256, 512)  # channels of each level's output, and the published names of the levels


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(OrderedDict(conv1=conv, bn1=nn.BatchNorm3d(out_channels), relu=nn.ReLU()))


def _down(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    layers = nn.Sequential(_convolution(in_channels, middle), _convolution(middle, out_channels))
    return nn.Sequential(OrderedDict(ops=layers))


class _Up(nn.Module):
    """Double the size, put the skip beside it, two convolutions."""

    def __init__(self, deep: int, skip: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(deep, deep, 2, stride=2)
        self.ops = nn.Sequential(_convolution(deep + skip, skip), _convolution(skip, skip))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, C, D, H, W) and (N, C', 2 D, 2 H, 2 W) -> (N, C', 2 D, 2 H, 2 W)."""
        return self.ops(torch.cat([self.up_conv(x), skip], 1))


class GenesisUNet3D(nn.Module):
    """Segment volumes with the U-Net that Models Genesis pre-trains.

    The last layer gives logits, where the published one ends in a sigmoid (which a softmax loss then saw once more),
    and batch norms use their running statistics in evaluation, where the published ones never do. Sizes that are not
    multiples of 8 are filled up at the end of each axis by repeating the border, and the logits cut back.

    Source: arXiv 1908.06912 and its published code; state-dict names are the published ones. Its weights have a licence
    of their own, for research.

    Args:
        num_classes: number of logits, background included.
        base_channels: channels of the first level's output, 64 in the published weights.

    Raises:
        ValueError: if `num_classes` is below one or `base_channels` is odd.
    """

    def __init__(self, num_classes: int, *, base_channels: int = 64) -> None:
        super().__init__()
        check_classes(num_classes)
        if base_channels < 2 or base_channels % 2:
            raise ValueError(f"base_channels must be even, got {base_channels}")
        a, b, c, d = (base_channels * level // LEVELS[0] for level in LEVELS)
        self.down_tr64 = _down(1, a // 2, a)
        self.down_tr128 = _down(a, a, b)
        self.down_tr256 = _down(b, b, c)
        self.down_tr512 = _down(c, c, d)
        self.up_tr256 = _Up(d, c)
        self.up_tr128 = _Up(c, b)
        self.up_tr64 = _Up(b, a)
        self.out_tr = nn.ModuleDict({"final_conv": nn.Conv3d(a, num_classes, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> logits (N, num_classes, D, H, W)."""
        size = x.shape[2:]
        d, h, w = [(8 - length % 8) % 8 for length in size]
        if d + h + w > 0:
            x = F.pad(x, [0, w, 0, h, 0, d], mode="replicate")
        first = self.down_tr64(x)
        second = self.down_tr128(F.max_pool3d(first, 2))
        third = self.down_tr256(F.max_pool3d(second, 2))
        deep = self.down_tr512(F.max_pool3d(third, 2))
        fused = self.up_tr64(self.up_tr128(self.up_tr256(deep, third), second), first)
        return self.out_tr["final_conv"](fused)[:, :, : size[0], : size[1], : size[2]]
