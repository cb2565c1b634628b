"""Draw what the transforms do to a photograph and to a volume, by their own code.

    python scripts/draw_vdt.py docs/pictures

writes `vdt.png`, a picture, the volume of three slices that it is read as, the same volume with its slices shuffled,
and how the depth goes through a ResNet3D: three slices in pre-training, as many as there are in transfer. In `gallery/`
it draws each transform that can be seen, on the photographs and the MR of demo_data/, for docs/gallery.md.
"""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from monai.transforms import LoadImaged
from PIL import Image

import vdt_transforms as vt
from networks import ResNet3D
from vdt_workflows.cli import run_function
from vdt_workflows.drawing import PAPER, cut_planes, draw_planes, draw_sheet, draw_tile, find_centre, to_png
from vdt_workflows.files import write_atomic

DATA = Path(__file__).resolve().parents[1] / "demo_data"
PHOTOGRAPH = "photographs/train/hat/"  # of which the first is shown
SCAN = "hippocampus_034.nii.gz"
Panel = tuple[str, np.ndarray]  # caption, and (rows, columns) or (rows, columns, 3) of uint8


def draw_vdt(output: str, size: int = 96, image: str = "") -> dict[str, list[list[int]]]:
    """Write the picture, and return the shapes of the maps that it shows.

    Args:
        output: the PNG.
        size: pixels of the CT patch's side.
        image: file of the picture; a photograph of the demo by default.

    Raises:
        ValueError: if the size is below 32 pixels.
    """
    if size < 32:
        raise ValueError(f"size must be 32 or more, got {size}")
    pixels = np.asarray(vt.LoadNaturalImage()(image or _photograph()))
    volume = vt.ImageToVolume()(pixels)
    shuffled = vt.RandSliceShuffle(prob=1.0).set_random_state(1)(volume)
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


def draw_gallery(output_dir: str) -> dict[str, int]:
    """Write a picture of each transform that can be seen, under its name.

    Args:
        output_dir: folder of the PNG files.

    Returns:
        How many pictures there are, and their bytes.
    """
    pictures = {**_draw_images(), **_draw_volumes(), **_draw_stacks()}
    sizes = []
    for name, panels in pictures.items():
        factor = max(1, round(150 / max(pixels.shape[0] for _, pixels in panels)))  # each pixel a square
        shown = [pixels.repeat(factor, 0).repeat(factor, 1) for _, pixels in panels]
        height, width = (max(pixels.shape[axis] for pixels in shown) for axis in (0, 1))
        tiles = []
        for (title, _), pixels in zip(panels, shown, strict=True):
            tile = np.full((height, max(width, 140) + 8, 3), PAPER, np.uint8)
            tile[: pixels.shape[0], 6 : 6 + pixels.shape[1]] = pixels
            tiles.append(draw_tile(tile, title))
        png = io.BytesIO()
        sheet = Image.fromarray(draw_sheet(tiles, name, columns=len(tiles)))
        sheet.quantize(48, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
        write_atomic(Path(output_dir, f"{name}.png"), png.getvalue())
        sizes.append(len(png.getvalue()))
    return {"pictures": len(sizes), "bytes": sum(sizes)}


def draw_pictures(output_dir: str) -> dict[str, int]:
    """Draw all pictures of the documents that show transforms.

    Args:
        output_dir: gets vdt.png, and the folder gallery.

    Returns:
        How many pictures of the gallery there are, and their bytes.
    """
    draw_vdt(str(Path(output_dir, "vdt.png")))
    return draw_gallery(str(Path(output_dir, "gallery")))


def _photograph() -> str:
    return str(min((DATA / PHOTOGRAPH).iterdir()))


def _draw_images() -> dict[str, list[Panel]]:
    """Panels of what happens to a photograph, (3, H, W), and to the volume that it is read as, (1, 3, H, W)."""
    photo = np.asarray(vt.LoadNaturalImage()(_photograph()))
    volume = vt.ImageToVolume()(photo)
    many = vt.InterpolateSlices(5)(volume)
    crop = vt.RandResizedCropImage(64, area=(0.2, 0.8)).set_random_state(0)
    scan = _load_scan()["image"][0].numpy()
    neighbours = np.stack([_lay(scan[:, :, z]) for z in (18, 20, 22)])[None]
    whole = ("image", _colours(photo))
    return {
        "LoadNaturalImage": [whole, ("grey=True", _colours(vt.LoadNaturalImage(grey=True)(_photograph())))],
        "RandResizedCropImage": [whole, *((f"draw {i + 1}", _colours(crop(photo))) for i in range(3))],
        "ResizeCenterCropImage": [
            whole,
            ("56 of 64 pixels", _colours(vt.ResizeCenterCropImage(56, short_side=64)(photo))),
        ],
        "ImageToVolume": [whole, *_slices(volume)],
        "VolumeToImage": [*_slices(neighbours), ("read as colours", _colours(vt.VolumeToImage()(neighbours)))],
        "RandSliceShuffle": _slices(vt.RandSliceShuffle().set_random_state(1)(volume)),
        "InterpolateSlices": _slices(many),
        "RandSliceDrift": _slices(vt.RandSliceDrift(shift=0.08, angle=12).set_random_state(3)(many)),
    }


def _draw_volumes() -> dict[str, list[Panel]]:
    """Panels of what happens to a volume and its labels, (1, X, Y, Z)."""
    case = _load_scan()
    image, label = case["image"], case["label"]
    both: dict[str, Any] = {"keys": ["image", "label"]}
    modes = {"mode": ["bilinear", "nearest"]}
    before = ("before", _planes(image, label))
    coarse = vt.Spacingd(**both, pixdim=(3.0, 3.0, 3.0), **modes)(case)
    turned = vt.RandRotateScaled(**both, **modes, prob=1.0).set_random_state(5)(case)
    turn = vt.RandRotateScale(rotation=3.14, prob=1.0)
    around: dict[str, Any] = {"label_key": "label", "spatial_size": (24, 24, 24), "num_classes": 3, "num_samples": 3}
    crops = vt.RandTurnedCropd(**both, **modes, turn=turn, **around).set_random_state(4)(case)
    mirrored = vt.RandFlipLeftRightd(**both, label_keys="label", prob=1.0)(case)
    slab = vt.RandSlabd(**both, label_key="label", slices=12).set_random_state(0)(case)
    place = image.affine.numpy() @ [*find_centre(label[0].numpy()), 1]  # type: ignore[misc]  # it has labels
    cut: dict[Any, Any] = {
        key: vt.CropNodule(24, mode=mode, fill=0)(case[key], place[:3])
        for key, mode in zip(case, modes["mode"], strict=False)
    }
    cube = vt.RandRotateCubed(**both).set_random_state(1)(cut)
    first, last = vt.ForegroundSlices()(label).tolist()
    ends = [(f"slice {z}", _planes(image, label, at=z)) for z in (first, last)]
    clipped = vt.NormalizeWindow((60, 160), mean="own", std="own")(image)
    return {
        "NormalizeWindow": [
            ("before", _planes(image)),
            ("60 to 160 clipped, own mean and deviation", _planes(clipped)),
        ],
        "Spacingd": [before, ("3 x 3 x 3 mm", _planes(coarse["image"], coarse["label"]))],
        "RestoreGrid": [
            ("labels at 3 mm", _planes(coarse["image"], coarse["label"])),
            ("on the grid of the file", _planes(image, vt.RestoreGrid()(coarse["label"], image))),
        ],
        "RandRotateScale": [before, ("after", _planes(turned["image"], turned["label"]))],
        "RandTurnedCropd": [(f"crop {n}", _planes(crop["image"], crop["label"])) for n, crop in enumerate(crops, 1)],
        "RandFlipLeftRightd": [
            before,
            ("voxels mirrored", _planes(mirrored["image"], mirrored["label"], affine=image.affine)),
        ],
        "ForegroundSlices": ends,
        "RandSlab": [before, ("12 slices", _planes(slab["image"], slab["label"]))],
        "CropNodule": [before, ("24 voxels of 1 mm", _planes(cut["image"], cut["label"]))],
        "RandRotateCube": [
            ("cube", _planes(cut["image"], cut["label"])),
            ("voxels turned", _planes(cube["image"], cube["label"], affine=cut["image"].affine)),
        ],
    }


def _draw_stacks() -> dict[str, list[Panel]]:
    """Panels of what happens to stacks of slices, (slices, X, Y)."""
    scan = _load_scan()["image"][0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        for z in range(scan.shape[2]):
            hu = _lay(scan[:, :, z]).astype(np.uint16) + 32768
            Image.fromarray(hu).save(Path(folder, f"{scan.shape[2] - z:03d}.png"))
        stack = vt.SliceStackReader(slices=5, distance=2.5)(Path(folder, "016.png"), 1.0).numpy()
    flipped = vt.RandFlipSlices(prob=1.0)(stack)
    small = [vt.RandResizeStack(size)(stack)[2].numpy() for size in (24, 36, 72)]
    return {
        "SliceStackReader": [(f"{2.5 * i:+.1f} mm" if i else "key slice", _grey(s.T)) for i, s in enumerate(stack, -2)],
        "RandFlipSlices": [(f"slice {i}", _grey(np.asarray(s).T)) for i, s in enumerate(flipped, 1)],
        "RandResizeStack": [(f"longer side {max(s.shape)}", _grey(s.T)) for s in small],
    }


def _lay(axial: np.ndarray) -> np.ndarray:
    """Turn a plane (X, Y) in RAS to rows and columns, front on top and the right on the left, and brighten it."""
    return axial.T[::-1, ::-1] * 2.0


def _load_scan() -> dict[Any, Any]:
    paths = {kind: str(DATA / "hippocampus" / f"{kind}s" / SCAN) for kind in ("image", "label")}
    return LoadImaged(["image", "label"], reader=vt.VolumeReader(), ensure_channel_first=True)(paths)


def _slices(volume: Any) -> list[Panel]:
    return [(f"slice {i}", _grey(values)) for i, values in enumerate(np.asarray(volume)[0], 1)]


def _grey(values: Any) -> np.ndarray:
    return np.repeat(np.asarray(values).clip(0, 255).astype(np.uint8)[..., None], 3, -1)


def _colours(image: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(image).clip(0, 255).astype(np.uint8), 0, -1)


def _planes(image: Any, label: Any = None, at: int | None = None, affine: Any = None) -> np.ndarray:
    """Draw the three planes through the labels, or through a slice along Z, as the affine or another has them."""
    labels = image * 0 if label is None else label
    centre = find_centre(labels[0].numpy())
    if centre is not None and at is not None:
        centre = (*centre[:2], at)
    affine = (image.affine if affine is None else affine).numpy()
    shade = None if label is None else cut_planes(label[0].numpy(), affine, centre)
    return draw_planes(cut_planes(image[0].numpy(), affine, centre), shade, panel=112)


if __name__ == "__main__":
    run_function(draw_pictures)
