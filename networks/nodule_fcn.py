"""The fully convolutional network that segments nodules at the full resolution of a small cube."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.resnet3d import ResNet3D, check_classes, conv3x3x3, norm_layer
from networks.unet3d import conv_norm_relu


class NoduleHead(nn.Module):
    """Fuse the deepest map with the second stage's and the stem's, then classify each voxel."""

    def __init__(self, channels: list[int], num_classes: int, norm: str) -> None:
        super().__init__()
        stem, middle, deep = channels
        self.conv1 = conv_norm_relu(middle + deep, deep, 1, norm)
        self.conv2 = conv_norm_relu(stem + deep, deep, 1, norm)
        self.seg_head = nn.Sequential(
            conv3x3x3(deep, middle), norm_layer(norm, middle), nn.ReLU(inplace=True), nn.Conv3d(middle, num_classes, 1)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps of the stem, of stage 2 and of stage 4 -> logits with the size of the stem's map."""
        stem, middle, deep = features
        x = self.conv1(torch.cat([middle, F.interpolate(deep, size=middle.shape[2:], mode="nearest")], dim=1))
        x = self.conv2(torch.cat([stem, F.interpolate(x, size=stem.shape[2:], mode="nearest")], dim=1))
        return self.seg_head(x)


class NoduleFCN(nn.Module):
    """Segment small cubes, such as a lung nodule's, with a `ResNet3D` that keeps the full resolution in its stem.

    The stem neither strides nor pools and the stages stride by 1, 2, 1, 2, so that the deepest map is a quarter of the
    input on each axis. The head takes the stem and the stages 2 and 4, and interpolates by nearest neighbours. Any size
    works. The published head also holds a `conv3` and a `conv_seg` that nothing uses; they are not built, and
    `networks.load_pretrained` reports them as skipped.

    Source: arXiv 2201.01426; the LIDC configs and FCN head of `medseg/` in its published code.

    Args:
        num_classes: number of logits, background included.
        depth: depth of the encoder.
        norm: "batch", "group" or "instance", for every norm of encoder and head.
        encoder: every further argument goes to `ResNet3D` (`base_channels`, `in_channels`, `checkpointing`, ...).

    Raises:
        ValueError: if `num_classes` is below one, or as `ResNet3D` does.
    """

    def __init__(self, num_classes: int = 2, depth: int = 18, *, norm: str = "batch", **encoder: Any) -> None:
        super().__init__()
        check_classes(num_classes)
        self.backbone = ResNet3D(
            depth,
            norm=norm,
            stem="flat",
            depth_stride=True,
            strides=(1, 2, 1, 2),
            out_indices=(1, 3),
            return_stem=True,
            **encoder,
        )
        self.decode_head = NoduleHead(self.backbone.channels, num_classes, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, num_classes, D, H, W)."""
        return self.decode_head(self.backbone(x))
