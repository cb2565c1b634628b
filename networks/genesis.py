"""The U-Net of Models Genesis, for the comparison with its published weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

LEVELS = (64, 128, 256, 512)  # channels of each level's output, and the published names of the levels


class _ConvBlock(nn.Module):
    """3 x 3 x 3 convolution with bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D, H, W)."""
        return F.relu(self.bn1(self.conv1(x)))


class _Down(nn.Module):
    """Two convolutions."""

    def __init__(self, in_channels: int, middle: int, out_channels: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(_ConvBlock(in_channels, middle), _ConvBlock(middle, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D, H, W)."""
        return self.ops(x)


class _Up(nn.Module):
    """Double the size, put the skip beside it, two convolutions."""

    def __init__(self, deep: int, skip: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(deep, deep, 2, stride=2)
        self.ops = nn.Sequential(_ConvBlock(deep + skip, skip), _ConvBlock(skip, skip))

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
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if base_channels < 2 or base_channels % 2:
            raise ValueError(f"base_channels must be even, got {base_channels}")
        a, b, c, d = (base_channels * level // LEVELS[0] for level in LEVELS)
        self.down_tr64 = _Down(1, a // 2, a)
        self.down_tr128 = _Down(a, a, b)
        self.down_tr256 = _Down(b, b, c)
        self.down_tr512 = _Down(c, c, d)
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
