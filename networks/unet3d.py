"""The U-Net that grows out of a ResNet3D encoder (the published "stdunet")."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.layers import PointwiseConv3d
from networks.resnet3d import ResNet3D, check_choice, check_classes, norm_layer


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU."""
    kind = PointwiseConv3d if kernel_size == 1 else nn.Conv3d
    conv = kind(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=norm_layer(norm, out_channels), relu=nn.ReLU(inplace=True)))


class UpStage(nn.Module):
    """Bring the deeper map to the skip's size and channels, and fuse the two."""

    def __init__(self, deep_channels: int, skip_channels: int, norm: str) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(deep_channels, skip_channels, 1, norm)
        self.fuse = nn.Sequential(
            conv_norm_relu(2 * skip_channels, skip_channels, 3, norm),
            conv_norm_relu(skip_channels, skip_channels, 3, norm),
        )

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """(N, C, D / 2, H / 2, W / 2) and (N, C', D, H, W) -> (N, C', D, H, W)."""
        less = self.reduce[0](deep)  # before the interpolation, of which it is independent: an eighth of the voxels
        up = F.interpolate(less, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.fuse(torch.cat([skip, self.reduce[2](self.reduce[1](up))], dim=1))


class Decoder(nn.Module):
    """One `UpStage` for each encoder map but the deepest; stage 0 is the finest and runs last."""

    def __init__(self, channels: list[int], norm: str) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict(
            {str(i): UpStage(channels[i + 1], channels[i], norm) for i in reversed(range(len(channels) - 1))}
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Encoder maps, shallow to deep -> decoder maps, fine to coarse; the first is as large as the encoder's."""
        maps = [features[-1]]
        for i, stage in enumerate(self.decoder.values()):
            maps.insert(0, stage(maps[0], features[len(features) - 2 - i]))
        return maps[:-1]


class FineStage(nn.Module):
    """Bring the finest map of a strided stem to the input's resolution, and see the input once more beside it."""

    def __init__(self, in_channels: int, image_channels: int, channels: int, stride: Sequence[int], norm: str) -> None:
        super().__init__()
        size = (stride[0], stride[1], stride[2])
        self.up = nn.ConvTranspose3d(in_channels, channels, size, size, bias=False)
        self.bn = norm_layer(norm, channels)
        self.fuse = conv_norm_relu(channels + image_channels, channels, 3, norm)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """(N, C, D / s, H / s, W / s) and (N, C', D, H, W) -> (N, channels, D, H, W)."""
        fine = F.relu(self.bn(self.up(x)))[:, :, : image.shape[2], : image.shape[3], : image.shape[4]]
        return self.fuse(torch.cat([fine, image], dim=1))


class SegmentationHead(nn.Module):
    """Two narrow convolutions or none, channel dropout, and a 1 x 1 x 1 classifier."""

    def __init__(
        self, in_channels: int, num_classes: int, width: int, dropout: float, norm: str, head_std: float | None
    ) -> None:
        super().__init__()
        widths = [(in_channels, width), (width, width)] if width else []
        self.convs = nn.Sequential(*(conv_norm_relu(before, after, 3, norm) for before, after in widths))
        self.dropout = nn.Dropout3d(dropout)
        self.conv_seg = PointwiseConv3d(width or in_channels, num_classes, 1)
        if head_std is not None:
            nn.init.normal_(self.conv_seg.weight, std=head_std)
            nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]  # there is a bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, num_classes, D, H, W)."""
        return self.conv_seg(self.dropout(self.convs(x)))


class ResUNet3D(nn.Module):
    """Segment volumes of any size with a `ResNet3D` encoder and a U-Net decoder.

    Logits have the input's size. Sizes that are not multiples of 16 work: each decoder stage interpolates to the size
    of its skip, which for multiples of 16 is the published factor of two.

    Source: arXiv 2201.01426; the "stdunet" neck and FCN head of `medseg/` in its published code. A checkpoint with the
    published names loads through `networks.load_pretrained`.

    Args:
        num_classes: number of logits, background included.
        depth: depth of the encoder.
        head_channels: width of the head's two convolutions, which work on the finest map; 0 leaves them out.
        dropout: probability of dropping a channel before the last convolution.
        norm: "batch", "group" or "instance", for every norm of encoder, decoder and head.
        stem: "unet" (published) or "strided" (half the resolution; logits are interpolated to the input's size).
        fine_channels: with a stem that strides, the width of a last stage at the input's resolution, which learns what
            interpolation would guess: a transposed convolution, and one that sees the input too; 0 leaves it out.
        head_std: the last convolution starts with this standard deviation and without bias, 0.01 as published; None is
            PyTorch's default start, from which the network leaves the background within tens of steps, not hundreds.
        deep_supervision: of how many coarser decoder maps, 0 to 3, logits are made too while training, for a loss that
            asks `take_side_logits` for them. `forward` gives the finest map's alone.
        depth_stride: False keeps the number of slices through the whole network, for thin stacks.
        encoder: every further argument goes to `ResNet3D` (`base_channels`, `in_channels`, `checkpointing`, ...).

    Raises:
        ValueError: if `num_classes` is below one, `deep_supervision` is not 0 to 3, there are `fine_channels` without a
            stem that strides, or as `ResNet3D` does.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 18,
        *,
        head_channels: int = 16,
        dropout: float = 0.1,
        norm: str = "batch",
        stem: str = "unet",
        fine_channels: int = 0,
        head_std: float | None = None,
        deep_supervision: int = 0,
        depth_stride: bool = True,
        **encoder: Any,
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        check_choice("deep_supervision", deep_supervision, range(4))
        self.backbone = ResNet3D(
            depth,
            norm=norm,
            stem=stem,
            depth_stride=depth_stride,
            out_indices=(0, 1, 2, 3),
            return_stem=True,
            **encoder,
        )
        channels, conv = self.backbone.channels, self.backbone.conv1
        self.neck = Decoder(channels, norm)
        if fine_channels and max(conv.stride) == 1:
            raise ValueError(f"fine_channels must be 0 for a stem that does not stride, got {fine_channels}")
        self.fine = (
            FineStage(channels[0], conv.in_channels, fine_channels, conv.stride, norm) if fine_channels else None
        )
        finest = fine_channels or channels[0]
        self.decode_head = SegmentationHead(finest, num_classes, head_channels, dropout, norm, head_std)
        self._coarser = 0 if fine_channels else 1  # the first map that is coarser than the logits
        coarser = channels[self._coarser : self._coarser + deep_supervision]
        self.side_heads = nn.ModuleList(PointwiseConv3d(width, num_classes, 1) for width in coarser)
        self._side_logits: Any = []
        self.register_load_state_dict_pre_hook(_leave_side_heads)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> logits (N, num_classes, D, H, W)."""
        maps = self.neck(self.backbone(x))
        if self.training and not torch.jit.is_scripting():
            coarser = maps[self._coarser :]
            self._side_logits = [head(map) for head, map in zip(self.side_heads, coarser, strict=False)]
        logits = self.decode_head(maps[0] if self.fine is None else self.fine(maps[0], x))
        if logits.shape[2:] != x.shape[2:]:
            logits = F.interpolate(logits, size=x.shape[2:], mode="trilinear", align_corners=False)
        return logits

    @torch.jit.unused
    def take_side_logits(self) -> list[Tensor]:
        """Give, once, what the last training step made of the coarser maps, fine to coarse, each of its map's size."""
        taken, self._side_logits = self._side_logits, []
        return taken


def _leave_side_heads(module: Any, state_dict: Any, prefix: str, *unused: Any) -> None:
    """Leave the heads of coarser maps as they are where a file has none, and out where the network has none."""
    own = module.side_heads.state_dict(prefix=f"{prefix}side_heads.")
    for name in [name for name in state_dict if name.startswith(f"{prefix}side_heads.") and name not in own]:
        del state_dict[name]
    for name, tensor in own.items():
        state_dict.setdefault(name, tensor)
