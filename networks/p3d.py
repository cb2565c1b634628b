"""P3D and MP3D: pseudo-3D residual networks that turn a short stack of slices into 2D feature maps."""

from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.classifier import LinearHead
from networks.resnet3d import Stage, Stride, check_choice, conv1x1x1, norm_layer

CONVERSIONS = ("center", "group")


def spatial_conv(in_channels: int, out_channels: int, stride: Stride = (1, 1, 1)) -> nn.Conv3d:
    """1 x 3 x 3 convolution: within each slice."""
    return nn.Conv3d(in_channels, out_channels, (1, 3, 3), stride, padding=(0, 1, 1), bias=False)


def depth_conv(in_channels: int, out_channels: int, stride: Stride = (1, 1, 1)) -> nn.Conv3d:
    """3 x 1 x 1 convolution: across slices."""
    return nn.Conv3d(in_channels, out_channels, (3, 1, 1), stride, padding=(1, 0, 0), bias=False)


class P3DBlock(nn.Module):
    """What both blocks share: how S (within slices) and T (across slices) are joined, by the letter of the block.

    A: T(S(x)). B: S(x) + T(x). C: S(x) + T(S(x)). Norm and ReLU follow each of them.
    """

    expansion = 1

    def __init__(self, letter: str, downsample: nn.Module | None) -> None:
        super().__init__()
        self.parallel = letter == "B"  # T reads what S reads
        self.residual = letter != "A"  # the result of S is added
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample


class P3DBasicBlock(P3DBlock):
    """Two units of S and T beside a shortcut (depths "18ba" and "34ba")."""

    def __init__(self, in_channels: int, width: int, stride: Stride, letter: str, downsample: nn.Module | None) -> None:
        super().__init__(letter, downsample)
        self.conv1 = spatial_conv(in_channels, width, stride)
        self.norm_1 = norm_layer("group", width)
        self.conv2 = depth_conv(in_channels, width, stride) if self.parallel else depth_conv(width, width)
        self.norm_2 = norm_layer("group", width)
        self.conv3 = spatial_conv(width, width)
        self.norm_3 = norm_layer("group", width)
        self.conv4 = depth_conv(width, width)
        self.norm_4 = norm_layer("group", width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, width, D, H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        s = self.relu(self.norm_1(self.conv1(x)))
        t = self.relu(self.norm_2(self.conv2(x if self.parallel else s)))
        y = s + t if self.residual else t
        s = self.relu(self.norm_3(self.conv3(y)))
        t = self.relu(self.norm_4(self.conv4(y if self.parallel else s)))
        return self.relu((s + t if self.residual else t) + identity)


class P3DBottleneck(P3DBlock):
    """Pointwise, S and T, pointwise, beside a shortcut; the stride sits on the first pointwise convolution."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: Stride, letter: str, downsample: nn.Module | None) -> None:
        super().__init__(letter, downsample)
        self.conv1 = conv1x1x1(in_channels, width, stride)
        self.norm_1 = norm_layer("group", width)
        self.conv2 = spatial_conv(width, width)
        self.norm_2 = norm_layer("group", width)
        self.conv3 = depth_conv(width, width)
        self.norm_3 = norm_layer("group", width)
        self.conv4 = conv1x1x1(width, width * self.expansion)
        self.norm_4 = norm_layer("group", width * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, 4 * width, D, H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.norm_1(self.conv1(x)))
        s = self.relu(self.norm_2(self.conv2(x)))
        t = self.relu(self.norm_3(self.conv3(x if self.parallel else s)))
        x = self.norm_4(self.conv4(s + t if self.residual else t))
        return self.relu(x + identity)


LAYERS: dict[int | str, tuple[type[P3DBasicBlock] | type[P3DBottleneck], tuple[int, int, int, int]]] = {
    18: (P3DBottleneck, (2, 2, 2, 2)),
    63: (P3DBottleneck, (3, 4, 6, 3)),
    131: (P3DBottleneck, (3, 4, 23, 3)),
    199: (P3DBottleneck, (3, 8, 36, 3)),
    "18ba": (P3DBasicBlock, (2, 2, 2, 2)),
    "34ba": (P3DBasicBlock, (3, 4, 6, 3)),
}


def centre_weights(channels: int, slices: int) -> Tensor:
    """Weights of a group transform that takes the centre slice: one-hot, (channels, slices, 1, 1)."""
    weights = torch.zeros(channels, slices, 1, 1)
    weights[:, slices // 2] = 1
    return weights


class GroupTransform(nn.Conv2d):
    """Weigh and add the slices of each channel: out[c] = sum over d of W[c, d] x[c, d].

    A grouped pointwise convolution that starts as the centre slice alone. (The published one starts at random,
    uniform in +-1 / sqrt(slices), also where the rest of the network comes from a checkpoint.)
    """

    def __init__(self, channels: int, slices: int) -> None:
        super().__init__(channels * slices, channels, 1, groups=channels, bias=False)
        with torch.no_grad():
            self.weight.copy_(centre_weights(channels, slices))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C, H, W)."""
        return F.conv2d(x.flatten(1, 2), self.weight, groups=self.groups)


class CentreSlice(nn.Module):
    """Take the centre slice, index D // 2."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C, H, W)."""
        return x[:, :, x.shape[2] // 2]


class P3D(nn.Module):
    """Pseudo-3D residual network of a stack of slices, whose four maps are 2D: those of the key slice in the centre.

    Each 3 x 3 x 3 convolution of a residual network is split into 1 x 3 x 3 (S) and 3 x 1 x 1 (T), joined in three ways
    that take turns from block to block. The stem sees each slice by itself; strides never act on depth.

    With `conversion="center"` it is P3D: max-pools after the first three stages shrink the depth (9, 5, 3, 1), and each
    map is the centre slice of a stage. With `conversion="group"` it is MP3D: the depth stays, and each map is a learnt
    weighted sum of the slices (the group transform). The two share all weights but those sums.

    State-dict names are the published ones. Convolutions start as Xavier uniform, norms at 1 and 0, the group transform
    as the centre slice.

    Source: arXiv 2012.08770; `mmdet/models/backbones/p3d.py` and `modified_p3d.py` of its published code.

    Args:
        depth: 18, 63, 131 or 199 (bottleneck blocks), "18ba" or "34ba" (basic blocks).
        conversion: "center" (P3D, at least 9 slices) or "group" (MP3D, any number).
        slices: number of slices of the input; the published networks have 9.
        in_channels: channels of the input volume.
        base_channels: channels of the stem and of the first stage's blocks.
        checkpointing: recompute each stage in the backward pass, which saves memory for about a third more time.

    Attributes:
        channels: channels of each returned map.
        reductions: by how much each returned map is smaller than the input, as (height, width).

    Raises:
        ValueError: if an argument is not one of the values above.
    """

    def __init__(
        self,
        depth: int | str,
        *,
        conversion: str = "center",
        slices: int = 9,
        in_channels: int = 1,
        base_channels: int = 64,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choice("depth", depth, LAYERS)
        check_choice("conversion", conversion, CONVERSIONS)
        if slices < 1 or (conversion == "center" and slices < 9):
            least = "9 with conversion 'center', whose pools shrink the depth" if conversion == "center" else "1"
            raise ValueError(f"slices must be at least {least}; got {slices}")
        block, blocks = LAYERS[depth]
        pools = conversion == "center"
        self.slices = slices
        self.conv1_custom = nn.Conv3d(in_channels, base_channels, (1, 7, 7), (1, 2, 2), padding=(0, 3, 3), bias=False)
        self.norm1 = norm_layer("group", base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3) if pools else 3, (1, 2, 2), padding=(0, 1, 1) if pools else 1)

        channels, letters = [base_channels], cycle("ABC")
        stages: list[nn.Module] = []
        for index, number in enumerate(blocks):
            width, stride = base_channels * 2**index, (1, 2, 2) if index else (1, 1, 1)
            before, after = channels[-1], width * block.expansion
            downsample = None
            if before != after:
                downsample = nn.Sequential(conv1x1x1(before, after, stride), norm_layer("group", after))
            layers = [block(before, width, stride, next(letters), downsample)]
            layers += [block(after, width, (1, 1, 1), next(letters), None) for _ in range(number - 1)]
            stages.append(Stage(*layers, checkpointing=checkpointing))
            channels.append(after)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.MaxPool3d((3, 1, 1), (2, 1, 1), padding=(1, 0, 0)) if pools else nn.Identity()
        self.last_pool = nn.MaxPool3d((3, 1, 1), stride=1) if pools else nn.Identity()

        self.channels = channels[1:]
        self.reductions = [(4, 4), (8, 8), (16, 16), (32, 32)]
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight)
        converters = [CentreSlice() if pools else GroupTransform(c, slices) for c in self.channels]
        self.groupconv_1, self.groupconv_2, self.groupconv_3, self.groupconv_4 = converters

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, D, H, W), or (N, D, H, W) for one channel -> [(N, C', H', W')] of the four stages, shallow to deep."""
        if x.dim() == 4:
            x = x.unsqueeze(1)
        if x.shape[2] != self.slices:
            raise ValueError(f"the network was built for {self.slices} slices, got an input of {x.shape[2]}")
        x = self.maxpool(self.relu(self.norm1(self.conv1_custom(x))))
        x1 = self.pool(self.layer1(x))
        x2 = self.pool(self.layer2(x1))
        x3 = self.last_pool(self.layer3(x2))
        x4 = self.layer4(x3)
        return [self.groupconv_1(x1), self.groupconv_2(x2), self.groupconv_3(x3), self.groupconv_4(x4)]


class P3DClassifier(nn.Module):
    """Classify images read as volumes with an MP3D, whose encoder then starts a lesion detector.

    The group transforms stay at the centre slice, since an image has other slices than a stack of CT.

    Args:
        depth: see `P3D`.
        num_classes: number of logits.
        slices: of the input, 3 for an image.
        dropout: probability of dropping a pooled feature before the linear layer.
        encoder: every further argument goes to `P3D`.

    Raises:
        ValueError: if `num_classes` is below one, or as `P3D` does.
    """

    def __init__(
        self, depth: int | str, num_classes: int, *, slices: int = 3, dropout: float = 0.0, **encoder: Any
    ) -> None:
        super().__init__()
        self.backbone = P3D(depth, conversion="group", slices=slices, **encoder)
        for module in self.backbone.modules():
            if isinstance(module, GroupTransform):
                module.requires_grad_(False)
        self.head = LinearHead(self.backbone.channels[-1], num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> logits (N, num_classes)."""
        return self.head(self.backbone(x)[-1])
