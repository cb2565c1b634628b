"""The network that is pre-trained: a ResNet3D with a linear head."""

from typing import Any

from torch import Tensor, nn

from networks.resnet3d import ResNet3D, check_classes


class LinearHead(nn.Module):
    """Global average pool over all places, then one linear layer."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        check_classes(num_classes)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W), or (N, C, H, W) -> (N, num_classes)."""
        return self.fc(self.dropout(x.mean(dim=list(range(2, x.dim())))))


class ResNet3DClassifier(nn.Module):
    """Classify volumes, or images read as volumes, with a `ResNet3D`.

    Names are the published ones: `backbone.*` as in `ResNet3D`, and `head.fc.*`.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of logits.
        dropout: probability of dropping a pooled feature before the linear layer.
        encoder: every further argument goes to `ResNet3D` (`depth_stride`, `base_channels`, `norm`, ...).

    Raises:
        ValueError: if `num_classes` is below one, or as `ResNet3D` does.
    """

    def __init__(self, depth: int, num_classes: int, *, dropout: float = 0.0, **encoder: Any) -> None:
        super().__init__()
        self.backbone = ResNet3D(depth, out_indices=(3,), **encoder)
        self.head = LinearHead(self.backbone.channels[-1], num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W), or (N, D, H, W) for one channel -> logits (N, num_classes)."""
        return self.head(self.backbone(x)[-1])
