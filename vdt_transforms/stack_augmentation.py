"""What is done at random to stacks of CT slices (see `slice_stacks`) and to the boxes in them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from monai.apps.detection.transforms.box_ops import resize_boxes
from monai.config import KeysCollection
from monai.transforms import RandomizableTransform
from monai.utils import ensure_tuple
from torch import Tensor

from vdt_transforms.dictionary import RandArrayPerKey


class RandFlipSlices(RandomizableTransform):
    """Reverse the order of the slices at random: head and feet change places. (slices, X, Y) -> the same.

    Args:
        prob: probability of the flip.
    """

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__(prob)

    def __call__(self, img: Tensor | np.ndarray, randomize: bool = True) -> Tensor | np.ndarray:
        """Flip `img`; `randomize=False` applies the last draw again."""
        if randomize:
            self.randomize(None)
        if not self._do_transform:
            return img
        return img.flip(0) if isinstance(img, Tensor) else np.flip(img, 0)


class RandFlipSlicesd(RandArrayPerKey):
    """Dictionary version of `RandFlipSlices`: one draw serves all keys."""

    array = RandFlipSlices


class RandResizeStack(RandomizableTransform):
    """Resize a stack and its boxes so that the longer side is one of `sizes`, drawn at random.

    (slices, X, Y) -> (slices, X', Y'); the aspect ratio is kept up to rounding, and boxes (L, 4) are multiplied by the
    exact ratio of the sides. Bilinear without antialiasing, as published.

    Args:
        sizes: lengths of the longer side in pixels; one of them makes the resize fixed, 0 keeps the image's own.
    """

    def __init__(self, sizes: Sequence[int] | int) -> None:
        super().__init__(prob=1.0)
        self.sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        if not self.sizes or min(self.sizes) < 0:
            raise ValueError(f"sizes must be numbers of pixels, 0 or more, got {sizes}")
        self.size = self.sizes[0]

    def randomize(self, data: object = None) -> None:
        """Draw `size`."""
        self.size = self.sizes[self.R.randint(len(self.sizes))] if len(self.sizes) > 1 else self.sizes[0]

    def __call__(self, img: Tensor | np.ndarray, randomize: bool = True) -> Tensor:
        """Resize `img`; `randomize=False` applies the last draw again."""
        if randomize:
            self.randomize()
        image = torch.as_tensor(img).as_subclass(Tensor)
        sides = self.resized(tuple(image.shape[-2:]))
        if sides == tuple(image.shape[-2:]):
            return image
        return F.interpolate(image[None], sides, mode="bilinear", align_corners=False)[0]

    def resized(self, sides: tuple[int, ...]) -> tuple[int, int]:
        """Give the sides (X', Y') that the last draw makes of `sides` (X, Y)."""
        x, y = (int(side * (self.size or max(sides)) / max(sides) + 0.5) for side in sides)
        return max(x, 1), max(y, 1)


class RandResizeStackd(RandArrayPerKey):
    """Dictionary version of `RandResizeStack`: one draw serves all stacks and their boxes.

    Args:
        keys: of the stacks, which have the same sides.
        args, options: see `RandResizeStack`, and `allow_missing_keys`.
        box_keys: of the boxes that move with them; a missing one is passed over.
        scale_key: where the ratios new / old of both sides are put, as an array (2,), to bring detections back.
    """

    array = RandResizeStack

    def __init__(
        self,
        keys: KeysCollection,
        *args: Any,
        box_keys: KeysCollection = "box",
        scale_key: str = "scale",
        **options: Any,
    ) -> None:
        super().__init__(keys, *args, **options)
        self.box_keys = ensure_tuple(box_keys)
        self.scale_key = scale_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize the stack of each key, and the boxes."""
        d = dict(data)
        first = self.first_key(d)
        if first == ():
            return d
        old = tuple(d[first].shape[-2:])
        d = super().__call__(d)
        new = self.transform.resized(old)
        d |= {key: resize_boxes(d[key], old, new) for key in self.box_keys if key in d}
        d[self.scale_key] = np.array(new) / np.array(old)
        return d
