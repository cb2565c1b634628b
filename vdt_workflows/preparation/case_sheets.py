"""Picture sheets of labelled volumes: three slices of each case with its labels, several cases a page.

Shown as radiologists do: the patient's right on the left of axial and coronal pictures, the front on the left of
sagittal ones, the head on top; a millimetre is as long in all three.
"""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 300  # pixels, each way
GAP = 6
TITLE = 24
TILE = (3 * PANEL + 4 * GAP, TITLE + PANEL + GAP)
COLUMNS, ROWS = 2, 5
PAPER, TEXT, FAINT, ALARM = (18, 18, 20), (235, 235, 235), (150, 150, 155), (255, 120, 100)
OPACITY = 0.3  # of a label's inside; its contour is solid


def colour(value: int) -> tuple[int, int, int]:
    """Give label values colours; neighbouring values have hues far apart, and blue is light enough to be seen."""
    hue = (0.02 + 0.382 * (value - 1)) % 1
    saturation = (0.95 - 0.35 * (value % 2)) * (0.6 if 0.58 < hue < 0.78 else 1)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def central_slices(volume: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> list[tuple[Any, ...]]:
    """Cut a volume through the centre of its foreground, or its own where there is none.

    Args:
        volume: (X, Y, Z), in any orientation.
        labels: the same shape.
        affine: voxel to world, mm.

    Returns:
        The axial, coronal and sagittal slice: the volume's, the labels', and the height and width of a pixel in mm.
    """
    orientation = nib.io_orientation(affine)
    size = np.empty(3)
    size[orientation[:, 0].astype(int)] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    volume, labels = (nib.apply_orientation(array, orientation) for array in (volume, labels))  # RAS, a view
    foreground = labels > 0
    slices = []
    for axis in (2, 1, 0):
        others = tuple(a for a in range(3) if a != axis)
        weights = foreground.sum(axis=others)
        length = len(weights)
        place = round(float((weights * np.arange(length)).sum() / weights.sum())) if weights.any() else length // 2
        # Rows from the head or the front, columns from the right or the front.
        cut = [np.flip(np.moveaxis(array, axis, 0)[place]).T for array in (volume, labels)]  # take() copies it all
        slices.append((*cut, size[others[1]], size[others[0]]))
    return slices


def draw_case(
    title: str,
    details: str,
    slices: Sequence[tuple[Any, ...]],
    window: tuple[float, float] | None = None,
) -> bytes:
    """Draw the three slices of a case in a row.

    Args:
        title: the case.
        details: a few words beside it.
        slices: from `central_slices`.
        window: intensities shown black and white; by default the middle 98 % of those in the slices.

    Returns:
        A PNG file.
    """
    if window is None:
        low, high = np.percentile(np.concatenate([values.ravel() for values, *_ in slices]), [1, 99])
        window = (float(low), float(max(high, low + 1e-6)))
    tile = _tile(title, details)
    scale = min(PANEL / max(values.shape[0] * height, values.shape[1] * width) for values, _, height, width in slices)
    for number, ((values, labels, height, width), mark) in enumerate(zip(slices, "RRA", strict=True)):
        shape = (max(1, round(values.shape[1] * width * scale)), max(1, round(values.shape[0] * height * scale)))
        picture = _overlay(values, labels, shape, window)
        left = GAP + number * (PANEL + GAP)
        tile.paste(picture, (left + (PANEL - shape[0]) // 2, TITLE + (PANEL - shape[1]) // 2))
        place = (left + 3, TITLE + PANEL // 2)
        ImageDraw.Draw(tile).text(place, mark, TEXT, _font(13), anchor="lm", stroke_width=1, stroke_fill=PAPER)
    return _png(tile)


def draw_fault(title: str, sentence: str) -> bytes:
    """Draw, in a case's place, why it was left out. Returns a PNG file."""
    tile = _tile(title, "left out")
    lines = textwrap.wrap(sentence, 95, break_on_hyphens=False)
    ImageDraw.Draw(tile).multiline_text((3 * GAP, TITLE + 3 * GAP), "\n".join(lines), ALARM, _font(15), spacing=6)
    return _png(tile)


def draw_pages(title: str, names: Sequence[str], tiles: Sequence[bytes]) -> list[bytes]:
    """Lay the cases out on pages, under a legend of the labels.

    Args:
        title: heading of each page.
        names: by label value, the background first.
        tiles: from `draw_case` and `draw_fault`.

    Returns:
        PNG files.
    """
    columns = min(COLUMNS, len(tiles))
    width = columns * TILE[0]
    pages = [tiles[i : i + columns * ROWS] for i in range(0, len(tiles), columns * ROWS)]
    drawn = []
    for number, page in enumerate(pages, 1):
        legend = _legend(f"{title}, page {number} of {len(pages)}", names, width)
        sheet = Image.new("RGB", (width, legend.height + -(-len(page) // columns) * TILE[1] + GAP), PAPER)
        sheet.paste(legend, (0, 0))
        for place, tile in enumerate(page):
            row, column = divmod(place, columns)
            with Image.open(io.BytesIO(tile)) as picture:
                sheet.paste(picture, (column * TILE[0], legend.height + row * TILE[1]))
        drawn.append(_png(sheet))
    return drawn


def _overlay(
    values: np.ndarray, labels: np.ndarray, shape: tuple[int, int], window: tuple[float, float]
) -> Image.Image:
    low, high = window
    grey = np.clip((np.asarray(values, np.float32) - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    base = np.asarray(Image.fromarray(grey).resize(shape, Image.Resampling.BICUBIC), np.float32)
    wide = Image.fromarray(np.asarray(labels, np.int32)).resize(shape, Image.Resampling.NEAREST)
    shown = np.asarray(wide)
    outer = np.pad(shown, 1, mode="edge")
    middle = slice(1, -1)
    neighbours = (outer[:-2, middle], outer[2:, middle], outer[middle, :-2], outer[middle, 2:])
    edge = np.any([shown != other for other in neighbours], axis=0)
    opacity = np.where(shown > 0, np.where(edge, 1.0, OPACITY), 0.0)[..., None]
    present, places = np.unique(shown, return_inverse=True)
    colours = np.array([colour(int(value)) for value in present], np.float32)[places.reshape(shown.shape)]
    return Image.fromarray((base[..., None] * (1 - opacity) + colours * opacity).astype(np.uint8))


def _tile(title: str, details: str) -> Image.Image:
    tile = Image.new("RGB", TILE, PAPER)
    draw = ImageDraw.Draw(tile)
    draw.text((GAP, TITLE // 2), title, TEXT, _font(16), anchor="lm")
    draw.text((GAP + draw.textlength(title, _font(16)) + 14, TITLE // 2), details, FAINT, _font(13), anchor="lm")
    return tile


def _legend(title: str, names: Sequence[str], width: int) -> Image.Image:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], 2.0 * GAP, 40
    for value, name in enumerate(names[1:], 1):
        length = 22 + draw.textlength(name, _font(15)) + 18
        if x + length > width and x > 2 * GAP:
            x, y = 2.0 * GAP, y + 24
        places.append((x, y, value, name))
        x += length
    legend = Image.new("RGB", (width, y + 34), PAPER)
    draw = ImageDraw.Draw(legend)
    draw.text((2 * GAP, 20), title, TEXT, _font(18), anchor="lm")
    for left, top, value, name in places:
        draw.rounded_rectangle((left, top + 5, left + 14, top + 19), 3, colour(value))
        draw.text((left + 22, top + 12), name, TEXT, _font(15), anchor="lm")
    return legend


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
