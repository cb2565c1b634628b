"""The 3D ResNet that VDT pre-training and every transfer task share."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from math import gcd
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.checkpoints import record_architecture
from networks.layers import InstanceNorm, PointwiseConv3d, StemConv3d

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STEMS = ("strided", "unet", "flat")
NORMS = ("batch", "group", "instance")
Stride = tuple[int, int, int]


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse an argument whose value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_classes(num_classes: int) -> None:
    """Refuse a number of classes below one."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def norm_layer(norm: str, channels: int, axes: int = 3) -> nn.Module:
    """Build the norm called `norm` for `channels` feature maps of three or two axes.

    Group norm has 32 groups as published, or fewer where a group would have less than two channels.
    """
    check_choice("norm", norm, NORMS)
    if norm == "batch":
        return nn.BatchNorm3d(channels) if axes == 3 else nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(gcd(64, channels) // 2 or 1, channels)
    return InstanceNorm(channels, channels)


def conv3x3x3(in_channels: int, out_channels: int, stride: Stride = (1, 1, 1)) -> nn.Conv3d:
    """3 x 3 x 3 convolution that keeps the size at stride 1."""
    return nn.Conv3d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def conv1x1x1(in_channels: int, out_channels: int, stride: Stride = (1, 1, 1)) -> nn.Conv3d:
    """Pointwise convolution."""
    return PointwiseConv3d(in_channels, out_channels, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions beside a shortcut (depths 18 and 34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: Stride, norm: str, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3x3(in_channels, width, stride)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = conv3x3x3(width, width)
        self.bn2 = norm_layer(norm, width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, width, D', H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """1, 3, 1 convolutions beside a shortcut (depths 50, 101, 152); the stride sits on the 3 x 3 x 3 one."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: Stride, norm: str, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv1x1x1(in_channels, width)
        self.bn1 = norm_layer(norm, width)
        self.conv2 = conv3x3x3(width, width, stride)
        self.bn2 = norm_layer(norm, width)
        self.conv3 = conv1x1x1(width, width * self.expansion)
        self.bn3 = norm_layer(norm, width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, 4 * width, D', H', W')."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class Stage(nn.Sequential):
    """The blocks of one stage; optionally recomputed in the backward pass instead of stored."""

    def __init__(self, *blocks: nn.Module, checkpointing: bool) -> None:
        super().__init__(*blocks)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C', D', H', W')."""
        if self.checkpointing and self.training:
            return self._recomputed(x)
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _recomputed(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which counts each batch once by itself, and takes no context
            return checkpoint(super().forward, x, use_reentrant=False)
        contexts = lambda: (nullcontext(), self._statistics_left_alone())  # noqa: E731  (checkpoint wants a callable)
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)

    @contextmanager
    def _statistics_left_alone(self) -> Iterator[None]:
        """Keep the second forward pass from counting the batch in the running statistics once more."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm3d) and m.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.sub_(1)


class ZeroPadShortcut(nn.Module):
    """Shortcut type A: every stride-th voxel, and zeros for the channels that the block adds.

    It has no weights. The published segmentation code detaches its result from the graph, so that no gradient passes
    through these shortcuts; here the gradient flows.
    """

    def __init__(self, added_channels: int, stride: Stride) -> None:
        super().__init__()
        self.added_channels = added_channels
        self.subsample = nn.AvgPool3d(1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C + added_channels, D', H', W')."""
        return F.pad(self.subsample(x), [0, 0, 0, 0, 0, 0, 0, self.added_channels])


def _make_stage(
    block: type[BasicBlock | Bottleneck], blocks: int, channels: int, width: int, stride: Stride, norm: str, kind: str
) -> list[nn.Module]:
    """Build the blocks of a stage, the first of which strides and takes `channels`; its shortcut is of that kind."""
    out_channels = width * block.expansion
    downsample: nn.Module | None = None
    if kind == "A" and (channels != out_channels or max(stride) > 1):
        downsample = ZeroPadShortcut(out_channels - channels, stride)
    elif channels != out_channels or max(stride) > 1:
        downsample = nn.Sequential(conv1x1x1(channels, out_channels, stride), norm_layer(norm, out_channels))
    others = [block(out_channels, width, (1, 1, 1), norm, None) for _ in range(blocks - 1)]
    return [block(channels, width, stride, norm, downsample), *others]


def init_weights(network: nn.Module, zero_init_residual: bool) -> None:
    """Start convolutions as Kaiming normal (fan-out) and, if asked, the last norm of every block at zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        last = getattr(module, "bn3", getattr(module, "bn2", None))
        if zero_init_residual and last is not None:
            nn.init.zeros_(last.weight)


def find_strides(strides: Sequence[int | Sequence[int]], stem: str, depth_stride: bool) -> list[Stride]:
    """Give the strides of the stem's convolution, its max-pool and the four stages (see `ResNet3D`)."""
    six = [*((2 if stem == "strided" else 1, 1 if stem == "flat" else 2) if len(strides) == 4 else ()), *strides]
    found = [((s if depth_stride else 1), s, s) if isinstance(s, int) else tuple(s) for s in six]
    if len(six) != 6 or any(len(s) != 3 or min(s) < 1 for s in found) or (stem == "flat" and max(found[1]) > 1):
        raise ValueError(
            f"strides must be four positive integers, or six of numbers or triples (1 for the max-pool that stem 'flat'"
            f" lacks), got {tuple(strides)}"
        )
    return found


class ResNet3D(nn.Module):
    """3D ResNet encoder whose weights serve any number of slices: 3 (an image), 32 or 48 (a CT patch).

    Pre-training never strides the depth axis (`depth_stride=False`), so three slices go in and three come out; transfer
    may. Strides are not weights: a checkpoint fits whatever strides, stem or input size are chosen.

    State-dict names are torchvision's. Weights start as Kaiming normal (fan-out), norms at 1 and 0. (The published
    pre-training meant the same, but its rule matched 2D convolutions only.)

    Source: arXiv 2201.01426; `mmcls/models/backbones/resnet3d.py` of its published code.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the input volume; 1 for CT, MR and for an image read as slices.
        base_channels: channels of the stem and of the first stage's blocks.
        depth_stride: whether strides act on the depth axis as well as on height and width.
        stem: "strided" (7 x 7 x 7 convolution of stride 2, then max-pool), "unet" (convolution of stride 1, then
            max-pool) or "flat" (convolution of stride 1, no max-pool).
        strides: stride of each stage; or six, of the stem's convolution, its max-pool and each stage, in place of those
            of `stem`. Each is a number, or three for depth, height and width that `depth_stride` leaves alone.
        shortcut: "B" (1 x 1 x 1 convolution and norm) or "A" (subsampling and zeros) where a block changes the shape.
        norm: "batch", "group" or "instance", for every norm of the network.
        out_indices: the stages (0 to 3) whose maps are returned; later stages than the last one are not built.
        return_stem: also return the stem's map, before its max-pool, as the first one.
        frozen_stages: -1 trains everything, 0 freezes the stem, k also freezes the first k stages (their batch norms
            then use the stored statistics).
        norm_eval: batch norms use, and do not update, the stored statistics while training.
        zero_init_residual: the last norm of every block starts at zero, as published; without, training starts sooner.
        checkpointing: recompute each stage in the backward pass, which saves memory for about a third more time.

    Attributes:
        channels: channels of each returned map.
        reductions: by how much each returned map is smaller than the input, as (depth, height, width).

    Raises:
        ValueError: if an argument is not one of the values above.
    """

    def __init__(
        self,
        depth: int,
        *,
        in_channels: int = 1,
        base_channels: int = 64,
        depth_stride: bool = False,
        stem: str = "strided",
        strides: Sequence[int | Sequence[int]] = (1, 2, 2, 2),
        shortcut: str = "B",
        norm: str = "batch",
        out_indices: Sequence[int] = (3,),
        return_stem: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        zero_init_residual: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choice("depth", depth, LAYERS)
        check_choice("stem", stem, STEMS)
        check_choice("shortcut", shortcut, ("A", "B"))
        if not out_indices or not set(out_indices) <= {0, 1, 2, 3}:
            raise ValueError(f"out_indices must name stages 0 to 3, got {tuple(out_indices)}")
        if not -1 <= frozen_stages <= 4:
            raise ValueError(f"frozen_stages must be -1 (none) to 4, got {frozen_stages}")
        self.out_indices = sorted(out_indices)
        self.return_stem = return_stem
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        stem_stride, pool_stride, *stage_strides = every = find_strides(strides, stem, depth_stride)
        self.conv1 = StemConv3d(in_channels, base_channels, stem_stride)
        self.bn1 = norm_layer(norm, base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "flat" else nn.MaxPool3d(3, pool_stride, padding=1)

        block = BasicBlock if depth < 50 else Bottleneck
        channels = [base_channels]
        stages: list[nn.Module] = []
        for index, blocks in enumerate(LAYERS[depth]):
            width = base_channels * 2**index
            layers = _make_stage(block, blocks, channels[-1], width, stage_strides[index], norm, shortcut)
            built = index <= self.out_indices[-1]
            stages.append(Stage(*layers, checkpointing=checkpointing) if built else nn.Identity())
            channels.append(width * block.expansion)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        returned = [0] * return_stem + [index + 1 for index in self.out_indices]
        totals = [list(accumulate(axis, mul)) for axis in zip(*every, strict=True)]
        self.channels = [channels[i] for i in returned]
        self.reductions = [tuple(axis[i + (i > 0)] for axis in totals) for i in returned]  # behind the pool's at 1
        init_weights(self, zero_init_residual)
        self.train()
        self.architecture: dict[str, Any] = dict(
            depth=depth,
            depth_stride=depth_stride,
            stem=stem,
            strides=[s if isinstance(s, int) else list(s) for s in strides],
            shortcut=shortcut,
            norm=norm,
        )
        record_architecture(self)

    def train(self, mode: bool = True) -> "ResNet3D":
        """Set training mode, leaving frozen stages and, with `norm_eval`, batch norms in evaluation mode."""
        super().train(mode)
        frozen = [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4]
        for module in frozen[: self.frozen_stages + 2] if self.frozen_stages >= 0 else []:
            module.eval().requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, D, H, W), or (N, D, H, W) for one channel -> the asked maps [(N, C', D', H', W')], shallow to deep."""
        if x.dim() == 4:
            x = x.unsqueeze(1)
        x = self.relu(self.bn1(self.conv1(x)))
        features = [x] if self.return_stem else []
        x = self.layer1(self.maxpool(x))
        if 0 in self.out_indices:
            features.append(x)
        x = self.layer2(x)
        if 1 in self.out_indices:
            features.append(x)
        x = self.layer3(x)
        if 2 in self.out_indices:
            features.append(x)
        x = self.layer4(x)
        if 3 in self.out_indices:
            features.append(x)
        return features
