"""The 2D twin of `ResNet3D`: what 2D pre-training trains, and conversions to 3D start from."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from networks.classifier import LinearHead
from networks.resnet3d import ResNet3D

_FLAT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm3d: nn.BatchNorm2d,
    nn.InstanceNorm3d: nn.InstanceNorm2d,
}


def _to_2d(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv3d):
        kernel, stride, padding, dilation = (
            int(size[-1]) for size in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        flat = nn.Conv2d(layer.in_channels, layer.out_channels, kernel, stride, padding, dilation, bias=False)
        nn.init.kaiming_normal_(flat.weight, mode="fan_out", nonlinearity="relu")
        return flat
    if isinstance(layer, nn.MaxPool3d):
        return nn.MaxPool2d(3, layer.stride[-1], padding=1)  # type: ignore[index]  # three strides, as ResNet3D gives
    layer.__class__ = _FLAT.get(type(layer), type(layer))  # the same fields, for one axis less
    for name, child in layer.named_children():
        setattr(layer, name, _to_2d(child))
    return layer


class ResNet2D(nn.Sequential):
    """Torchvision's ResNet without its head, at any width: the layers of a `ResNet3D`, each in 2D.

    (N, C, H, W) -> the last map, (N, C', H / 32, W / 32).

    State-dict names are torchvision's, so that `networks.load_pretrained` reads its file as it reads torchvision's.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the image.
        base_channels: channels of the stem and of the first stage's blocks; torchvision has 64.
        norm: "batch", "group" or "instance", for every norm of the network.
        zero_init_residual: the last norm of every block starts at zero.

    Attributes:
        channels: channels of the last map.

    Raises:
        ValueError: if an argument is not one of the values above.
    """

    def __init__(
        self,
        depth: int,
        *,
        in_channels: int = 3,
        base_channels: int = 64,
        norm: str = "batch",
        zero_init_residual: bool = True,
    ) -> None:
        twin = ResNet3D(
            depth,
            in_channels=in_channels,
            base_channels=base_channels,
            norm=norm,
            zero_init_residual=zero_init_residual,
        )
        super().__init__(OrderedDict((name, _to_2d(layer)) for name, layer in twin.named_children()))
        self.channels = twin.channels[-1]


class ResNet2DClassifier(nn.Module):
    """Classify images with a `ResNet2D`; names as in `ResNet3DClassifier`.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of logits.
        dropout: probability of dropping a pooled feature before the linear layer.
        encoder: every further argument goes to `ResNet2D` (`base_channels`, `norm`, ...).

    Raises:
        ValueError: if `num_classes` is below one, or as `ResNet2D` does.
    """

    def __init__(self, depth: int, num_classes: int, *, dropout: float = 0.0, **encoder: Any) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.backbone = ResNet2D(depth, **encoder)
        self.head = LinearHead(self.backbone.channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or (N, 1, C, H, W) for images read as volumes of C slices -> logits (N, num_classes)."""
        if x.dim() == 5:
            x = x.squeeze(1)
        return self.head(self.backbone(x))
