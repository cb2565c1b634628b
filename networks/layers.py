"""Layers that PyTorch lacks, or has in a form that costs more."""

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, group_norm, nn


class InstanceNorm(nn.GroupNorm):
    """Instance norm of maps of any size; torch's own refuses those of one voxel, which small patches may end in."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape; a map of one voxel becomes the bias."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PointwiseConv3d(nn.Conv3d):
    """A 1 x 1 x 1 convolution whose output has the memory format of its input.

    On one thread of a CPU, PyTorch takes another implementation for such kernels, which puts channels first: all that
    follows is slower, and the next convolution copies. A product of matrices is the same, in place.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D', H', W')."""
        if x.is_cpu and max(self.stride) == 1 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
        return self._conv_forward(x, self.weight, self.bias)


class StemConv3d(nn.Conv3d):
    """The stem's 7 x 7 x 7 convolution, which costs less to train with up to three slices, such as an image's.

    Of the kernel's seven planes, three slices meet three in turn: 12 of 21 products are with padding. A 2D convolution
    whose kernels are those planes is the same sum without them. Inference keeps the ordinary form, which is as fast.
    """

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__(in_channels, channels, 7, stride, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D', H', W')."""
        number = x.shape[2]
        if not self.training or self.stride[0] != 1 or number > 3:
            return self._conv_forward(x, self.weight, self.bias)
        planes = [self.weight[:, :, 3 - i : 3 - i + number] for i in range(number)]
        kernels = torch.stack(planes, 1).flatten(2, 3).flatten(0, 1)  # (C' * slices out, C * slices in, 7, 7)
        y = F.conv2d(x.flatten(1, 2), kernels, None, self.stride[1:], padding=3)
        return y.unflatten(1, (self.out_channels, number))
