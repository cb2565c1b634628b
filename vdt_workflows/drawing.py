"""Orthogonal planes of volumes, label overlays, picture sheets with captions and legends, and PNG files.

All pictures of volumes keep one convention, that of radiology: the patient's right is on the left of axial and coronal
planes, the front is on top of axial planes and on the left of sagittal ones, the head is on top of coronal and sagittal
ones. Pixels are square, all planes of a row have one scale, and letters at the edges name the sides of the patient.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdt_workflows.errors import in_one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Voxel = Sequence[int]

PAPER, TEXT, FAINT = (18, 18, 20), (235, 235, 235), (150, 150, 155)
PANEL = 280  # pixels of the longest edge of a row's planes
MARGIN = 16  # pixels around each plane, for the letters
CAPTION = 24  # pixels
GAP = 6
OPACITY = 0.3  # of shades
AXIS_OF_PLANE = {"axial": 2, "coronal": 1, "sagittal": 0}  # right-left, front-back and head-foot are 0, 1 and 2
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom


class Plane(NamedTuple):
    """A plane of a volume, as it is shown.

    Attributes:
        name: "axial", "coronal" or "sagittal".
        values: (..., rows, columns), the top left pixel first.
        size: height and width of a pixel, mm.
    """

    name: str
    values: np.ndarray
    size: tuple[float, float]


def cut_planes(volume: np.ndarray, affine: np.ndarray, centre: Voxel | None = None) -> list[Plane]:
    """Cut the axial, the coronal and the sagittal plane through a voxel, along the axes of the volume.

    An oblique volume is not resampled: each of its axes counts as the axis of the body that is nearest.

    Args:
        volume: (X, Y, Z) or (..., X, Y, Z), stored in any orientation.
        affine: (4, 4), voxel to RAS in mm.
        centre: index of the voxel as X, Y, Z; the middle of the volume by default.
    """
    volume, affine = np.asanyarray(volume), np.asarray(affine, float)
    directions = nib.io_orientation(affine)
    order = np.argsort(directions[:, 0])  # the axes of the volume that run right-left, front-back, head-foot
    ascending = directions[order, 1] > 0  # to the right, the front, the head
    size = np.linalg.norm(affine[:3, :3], axis=0)[order]
    length = np.take(volume.shape[-3:], order)
    place = length - 1 - length // 2
    if centre is not None:
        own = np.take(centre, order)
        place = np.where(ascending, length - 1 - own, own)
    first = volume.ndim - 3
    turned = tuple(int(first + axis) for axis in order)
    flipped = tuple(first + axis for axis in range(3) if ascending[axis])  # from the right, the front, the head on
    shown = np.flip(volume.transpose(*range(first), *turned), flipped)
    planes = []
    for name, axis in AXIS_OF_PLANE.items():
        cut = np.moveaxis(shown, axis - 3, 0)[place[axis]].swapaxes(-1, -2).copy()  # a view would keep the whole volume
        width, height = np.delete(size, axis)
        planes.append(Plane(name, cut, (float(height), float(width))))
    return planes


def find_centre(labels: np.ndarray) -> tuple[int, ...] | None:
    """Find the voxel whose three planes show the most labelled voxels, the middle one of equals.

    Args:
        labels: (X, Y, Z), the background 0.

    Returns:
        The index as X, Y, Z; None where nothing is labelled.
    """
    foreground = np.asarray(labels) > 0
    counts = [np.count_nonzero(foreground, axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    if not counts[0].any():
        return None
    fullest = [np.flatnonzero(count == count.max()) for count in counts]
    return tuple(int(places[len(places) // 2]) for places in fullest)


def colour(value: int) -> tuple[int, int, int]:
    """Give label values colours; neighbouring values have hues far apart, and blue is light enough to be seen."""
    hue = (0.02 + 0.382 * (value - 1)) % 1
    saturation = (0.95 - 0.35 * (value % 2)) * (0.6 if 0.58 < hue < 0.78 else 1)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def list_colours(values: Iterable[int]) -> list[str]:
    """Give the colours of label values as HTML writes them."""
    return ["#{:02x}{:02x}{:02x}".format(*colour(value)) for value in values]


def write_colour_table(names: Sequence[str]) -> str:
    """Write the colours of labels, by value from 0, as a colour table of 3D Slicer (.ctbl), the background transparent.

    White space in names becomes underscores, since columns are separated by it.
    """
    rows = [f"{v} {'_'.join(n.split()) or v} {' '.join(map(str, colour(v)))} 255" for v, n in enumerate(names) if v]
    background = [f"0 {'_'.join(names[0].split()) or 0} 0 0 0 0"] if names else []
    return "\n".join(["# Color table file", f"# {len(names)} values", *background, *rows, ""])


_PALETTE = np.array([colour(value) for value in range(256)], np.float32)


def to_grey(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Bring values to 0 to 255 (uint8), black at the window's lower end and below, white at its upper end and above."""
    low, high = window
    return np.clip((np.asarray(values, np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def overlay(
    grey: np.ndarray, shade: np.ndarray | None = None, outlines: Sequence[np.ndarray] = (), opacity: float = OPACITY
) -> np.ndarray:
    """Lay label maps over a grey picture, each label in its `colour`.

    Args:
        grey: (rows, columns) of uint8.
        shade: (rows, columns), a label map of which whole areas are shaded.
        outlines: (rows, columns) each, label maps of which the edges are drawn, later ones over earlier ones.
        opacity: of the shades, 0 to 1.

    Returns:
        (rows, columns, 3) of uint8.
    """
    from skimage.segmentation import find_boundaries  # a third of a second that only a run that draws pays

    picture = np.repeat(np.asarray(grey, np.float32)[..., None], 3, axis=-1)
    if shade is not None:
        inside = shade > 0
        picture[inside] += opacity * (_PALETTE[shade[inside].astype(int) % 256] - picture[inside])
    for labels in outlines:
        edge = find_boundaries(labels, connectivity=1, mode="inner")
        picture[edge] = _PALETTE[labels[edge].astype(int) % 256]
    return picture.round().astype(np.uint8)


def draw_planes(
    planes: Sequence[Plane],
    shade: Sequence[Plane] | None = None,
    outlines: Sequence[Plane] | None = None,
    *,
    window: tuple[float, float] | None = None,
    panel: int = PANEL,
    bar: float | None = None,
) -> np.ndarray:
    """Draw planes in a row, at one scale and with letters at their edges, and label maps over them.

    The planes of a volume and those of its label maps come from `cut_planes` with one centre.

    Args:
        planes: of the volume, their values (rows, columns).
        shade: of a label map that is shaded.
        outlines: of a label map that is outlined, or of several on one grid, their values (N, rows, columns).
        window: values shown black and white; the middle 98 % of those in the planes by default.
        panel: pixels of the longest edge.
        bar: length of a scale bar in the last plane, mm.

    Returns:
        (rows, columns, 3) of uint8.
    """
    if window is None:
        low, high = np.percentile(np.concatenate([plane.values.ravel() for plane in planes]), [1, 99])
        window = (float(low), float(max(high, low + 1e-6)))
    extents = [np.multiply(plane.values.shape, plane.size) for plane in planes]
    scale = panel / np.max(extents)
    side = panel + 2 * MARGIN
    row = Image.new("RGB", (len(planes) * side, side), PAPER)
    draw = ImageDraw.Draw(row)
    for number, (plane, extent) in enumerate(zip(planes, extents, strict=True)):
        height, width = (max(1, round(float(edge) * scale)) for edge in extent)
        grey = Image.fromarray(to_grey(plane.values, window)).resize((width, height), Image.Resampling.BICUBIC)
        areas = None if shade is None else _enlarge(shade[number].values, height, width)
        lines = () if outlines is None else _enlarge(outlines[number].values, height, width).reshape(-1, height, width)
        left, top = number * side + (side - width) // 2, (side - height) // 2
        row.paste(Image.fromarray(overlay(np.asarray(grey), areas, [*lines])), (left, top))
        x, y, gap = left + width / 2, top + height / 2, MARGIN / 2
        places = ((left - gap, y), (left + width + gap, y), (x, top - gap), (x, top + height + gap))
        for letter, place in zip(EDGES[plane.name], places, strict=True):
            draw.text(place, letter, TEXT, get_font(12), anchor="mm")
    if bar is not None:
        right, bottom = left + width - 6, top + height - 6
        draw.line((right - bar * scale, bottom, right, bottom), TEXT, 2)
    return np.asarray(row)


def _enlarge(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat the nearest labels."""
    rows, columns = (
        ((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip((height, width), labels.shape[-2:], strict=True)
    )
    return labels[..., rows[:, None], columns]


@cache
def get_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font of matplotlib, which has the letters of most European languages; Pillow's own has no umlauts."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def draw_tile(picture: np.ndarray, title: str, details: str = "") -> np.ndarray:
    """Put a title, and fainter details beside it, above a picture (rows, columns, 3)."""
    height, width = picture.shape[:2]
    tile, title = Image.new("RGB", (width, height + CAPTION), PAPER), in_one_line(title)
    draw, font = ImageDraw.Draw(tile), get_font(15)
    draw.text((GAP, CAPTION // 2), title, TEXT, font, anchor="lm")
    place = (3 * GAP + draw.textlength(title, font), CAPTION // 2)
    draw.text(place, details, FAINT, get_font(13), anchor="lm")
    tile.paste(Image.fromarray(picture), (0, CAPTION))
    return np.asarray(tile)


def draw_sheet(
    tiles: Sequence[np.ndarray], title: str, legend: Mapping[int, str] | None = None, *, columns: int = 2
) -> np.ndarray:
    """Lay pictures (rows, columns, 3) out in rows, under a title and a legend that names the colours of labels."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    columns = min(columns, len(tiles))
    head = _draw_head(title, legend or {}, columns * width)
    sheet = Image.new("RGB", (columns * width, head.height + -(-len(tiles) // columns) * height + GAP), PAPER)
    sheet.paste(head, (0, 0))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(Image.fromarray(tile), (column * width, head.height + row * height))
    return np.asarray(sheet)


def _draw_head(title: str, legend: Mapping[int, str], width: int) -> Image.Image:
    font, legend, title = get_font(15), {v: in_one_line(name) for v, name in legend.items()}, in_one_line(title)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places: list[tuple[float, int]] = []
    left, top = 2.0 * GAP, 40
    for name in legend.values():
        length = 22 + measure.textlength(name, font) + 18
        if left + length > width and left > 2 * GAP:
            left, top = 2.0 * GAP, top + 24
        places.append((left, top))
        left += length
    head = Image.new("RGB", (width, (top + 34) if legend else 40), PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((2 * GAP, 20), title, TEXT, get_font(18), anchor="lm")
    for (left, top), (value, name) in zip(places, legend.items(), strict=True):
        draw.rounded_rectangle((left, top + 5, left + 14, top + 19), 3, colour(value))
        draw.text((left + 22, top + 12), name, TEXT, font, anchor="lm")
    return head


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Make a matplotlib figure of so many inches, and its axes, an array of them where there are several."""
    from matplotlib.figure import Figure  # half a second that only a run that draws pays

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def to_png(picture: np.ndarray | Figure, dpi: float | None = None) -> bytes:
    """Give a picture (rows, columns, 3) or (rows, columns) of uint8, or a matplotlib figure, as a PNG file."""
    png = io.BytesIO()
    if isinstance(picture, np.ndarray):
        Image.fromarray(picture).save(png, "PNG", compress_level=4)
    else:
        picture.savefig(png, format="png", dpi=dpi or "figure")
    return png.getvalue()


def read_png(content: bytes) -> np.ndarray:
    """Read a PNG file that `to_png` made: (rows, columns, 3) of uint8."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))
