"""The 2D twin of `ResNet3D`: what 2D pre-training trains, and conversions to 3D start from."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from networks.classifier import LinearHead
from networks.resnet3d import LAYERS, check_choice, init_weights, norm_layer


class ResNet2D(nn.Sequential):
    """Torchvision's ResNet without its head, at any width and with any norm: its own blocks, and its names.

    (N, C, H, W) -> the last map, (N, C', H / 32, W / 32). Weights start as those of `ResNet3D`: convolutions as Kaiming
    normal (fan-out), norms at 1 and 0. `networks.load_pretrained` reads its file as it reads torchvision's.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the image.
        base_channels: channels of the stem and of the first stage's blocks; torchvision's ResNet has 64.
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
        zero_init_residual: bool = False,
    ) -> None:
        from torchvision.models.resnet import BasicBlock, Bottleneck  # here, as its import is slow

        super().__init__()
        check_choice("depth", depth, LAYERS)
        block = BasicBlock if depth < 50 else Bottleneck
        make_norm = partial(norm_layer, norm, axes=2)
        self.conv1 = nn.Conv2d(in_channels, base_channels, 7, 2, padding=3, bias=False)
        self.bn1 = make_norm(base_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.channels = base_channels
        for index, blocks in enumerate(LAYERS[depth]):
            width, stride = base_channels * 2**index, 2 if index else 1
            out_channels = width * block.expansion
            downsample = None
            if self.channels != out_channels:
                convolution = nn.Conv2d(self.channels, out_channels, 1, stride, bias=False)
                downsample = nn.Sequential(convolution, make_norm(out_channels))
            first = block(self.channels, width, stride, downsample, norm_layer=make_norm)
            others = [block(out_channels, width, norm_layer=make_norm) for _ in range(blocks - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(first, *others))
            self.channels = out_channels
        init_weights(self, zero_init_residual)


class ResNet2DClassifier(nn.Module):
    """Classify images with a `ResNet2D`: names, arguments and errors as of `ResNet3DClassifier`.

    Further arguments go to `ResNet2D` (`base_channels`, `norm`, ...).
    """

    def __init__(self, depth: int, num_classes: int, *, dropout: float = 0.0, **encoder: Any) -> None:
        super().__init__()
        self.backbone = ResNet2D(depth, **encoder)
        self.head = LinearHead(self.backbone.channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or (N, 1, C, H, W) for images read as volumes of C slices -> logits (N, num_classes)."""
        if x.dim() == 5:
            x = x.squeeze(1)
        return self.head(self.backbone(x))
