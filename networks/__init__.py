"""3D networks that learn from 2D images, and what loads their weights.

Conventions, for every network of this package:

- Volumes are depth first: (N, C, D, H, W) = batch, channels, slices, rows, columns. `DepthFirst` maps MONAI's
  (N, C, X, Y, Z) to it at the network's edge: X is W, Y is H, Z is D.
- An image read as a volume is (N, 1, 3, H, W): one channel, three slices.
- Segmentation networks return logits, not probabilities, with the size of their input.
- Encoders return a list of maps, shallow to deep, with their channels in `.channels`.
- State-dict names are the published ones inside the encoder (torchvision's ResNet names).

- A stack of slices for P3D and the lesion detector is (N, D, H, W) or (N, 1, D, H, W), the key slice in the centre.
- Boxes are (x1, y1, x2, y2) in pixels of the input, counted from 0: x along W, y along H.

Names are imported when first used, so that `import networks` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from networks.checkpoints import read_checkpoint
    from networks.classifier import ResNet3DClassifier
    from networks.conversion import FlatConv3d, constrain, convert, expand
    from networks.depth_first import DepthFirst
    from networks.detector import LesionDetector
    from networks.genesis import GenesisUNet3D
    from networks.nodule_fcn import NoduleFCN
    from networks.p3d import P3D, P3DClassifier
    from networks.published_names import describe_encoder
    from networks.resnet2d import ResNet2D, ResNet2DClassifier
    from networks.resnet3d import ResNet3D
    from networks.unet3d import ResUNet3D
    from networks.volume_detector import VolumeLesionDetector
    from networks.weights import LoadReport, load_pretrained

_NAMES = {
    "checkpoints": ["read_checkpoint"],
    "classifier": ["ResNet3DClassifier"],
    "conversion": ["FlatConv3d", "constrain", "convert", "expand"],
    "depth_first": ["DepthFirst"],
    "detector": ["LesionDetector"],
    "genesis": ["GenesisUNet3D"],
    "nodule_fcn": ["NoduleFCN"],
    "p3d": ["P3D", "P3DClassifier"],
    "published_names": ["describe_encoder"],
    "resnet2d": ["ResNet2D", "ResNet2DClassifier"],
    "resnet3d": ["ResNet3D"],
    "unet3d": ["ResUNet3D"],
    "volume_detector": ["VolumeLesionDetector"],
    "weights": ["LoadReport", "load_pretrained"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["P3D", "GenesisUNet3D", "LesionDetector", "NoduleFCN", "ResNet2D", "ResNet2DClassifier", "ResNet3D"]
__all__ += ["P3DClassifier", "ResNet3DClassifier", "ResUNet3D", "VolumeLesionDetector"]
__all__ += ["DepthFirst", "FlatConv3d", "constrain", "convert", "expand"]
__all__ += ["LoadReport", "describe_encoder", "load_pretrained", "read_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)  # `scripts.networks` in a packaged bundle
