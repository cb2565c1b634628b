"""Draw the variable dimension transform by its own code.

    python scripts/draw_vdt.py docs/pictures/vdt.png

shows a picture, the volume of three slices that it is read as, the same volume with its slices shuffled, and how the
depth goes through a ResNet3D: three slices in pre-training, as many as there are in transfer.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from networks import ResNet3D
from vdt_transforms import ImageToVolume, LoadNaturalImage, RandSliceShuffle
from vdt_workflows.cli import run_function
from vdt_workflows.drawing import to_png
from vdt_workflows.files import write_atomic


def draw_vdt(output: str, size: int = 96, image: str = "") -> dict[str, list[list[int]]]:
    """Write the picture, and return the shapes of the maps that it shows.

    Args:
        output: the PNG.
        size: pixels of the made picture's side.
        image: file of a picture to show in its place.

    Raises:
        ValueError: if the size is below 32 pixels.
    """
    if size < 32:
        raise ValueError(f"size must be 32 or more, got {size}")
    pixels = np.asarray(LoadNaturalImage()(image)) if image else make_picture(size)
    volume = ImageToVolume()(pixels)
    shuffled = RandSliceShuffle(prob=1.0).set_random_state(1)(volume)
    shapes = {}
    with torch.no_grad():
        for name, depth_stride, x in (
            ("an image", False, torch.as_tensor(volume)[None]),
            ("a CT patch", True, torch.zeros(1, 1, 32, size, size)),
        ):
            network = ResNet3D(18, base_channels=4, depth_stride=depth_stride, out_indices=(0, 1, 2, 3)).eval()
            shapes[name] = [list(x.shape[2:]), *(list(y.shape[2:]) for y in network(x.float()))]
    figure = Figure(figsize=(10, 5.6), layout=ConstrainedLayoutEngine(h_pad=0.12))
    axes = figure.subplots(2, 4)
    axes[0, 0].imshow(np.moveaxis(pixels, 0, -1).astype(np.uint8))
    axes[0, 0].set_title("image (3, H, W)")
    for row, (values, name) in enumerate(((volume, "slice"), (shuffled, "shuffled"))):
        for index, slice_ in enumerate(np.asarray(values)[0]):
            axes[row, index + 1].imshow(slice_, cmap="gray", vmin=0, vmax=255)
            axes[row, index + 1].set_title(f"{name} {index + 1} of (1, 3, H, W)", fontsize=9)
    depths = {name: " → ".join(str(shape[0]) for shape in listed) for name, listed in shapes.items()}
    text = "\n".join(f"{name}: depth {depth}" for name, depth in depths.items())
    axes[1, 0].text(0, 0.5, f"the same 3D kernels\n\n{text}", va="center", fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    write_atomic(output, to_png(figure))
    return shapes


def make_picture(size: int) -> np.ndarray:
    """Make a picture (3, size, size) of an orange disc before a blue-green ground."""
    y, x = np.mgrid[:size, :size] / size
    disc = (x - 0.55) ** 2 + (y - 0.45) ** 2 < 0.08
    ground = np.stack([40 + 60 * x, 90 + 120 * y, 160 - 80 * x])
    return np.where(disc, np.array([235.0, 140.0, 40.0])[:, None, None] * (1 - 0.4 * y), ground).astype(np.float32)


if __name__ == "__main__":
    run_function(draw_vdt)
