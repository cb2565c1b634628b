"""Picture sheets of labelled volumes: three planes of each case with its labels, several cases a page."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vdt_workflows.drawing import (
    GAP,
    MARGIN,
    PANEL,
    PAPER,
    Plane,
    draw_planes,
    draw_sheet,
    draw_tile,
    get_font,
    read_png,
    to_png,
)

COLUMNS, ROWS = 2, 5
ALARM = (255, 120, 100)


def draw_case(
    title: str,
    details: str,
    planes: Sequence[Plane],
    labels: Sequence[Plane],
    window: tuple[float, float] | None = None,
) -> bytes:
    """Draw the three planes of a case in a row.

    Args:
        title: the case.
        details: a few words beside it.
        planes: of the volume, from `drawing.cut_planes`.
        labels: those of its label map.
        window: intensities shown black and white; by default the middle 98 % of those in the planes.

    Returns:
        A PNG file.
    """
    return to_png(draw_tile(draw_planes(planes, labels, labels, window=window), title, details))


def draw_fault(title: str, sentence: str) -> bytes:
    """Draw, in a case's place, why it was left out. Returns a PNG file."""
    side = PANEL + 2 * MARGIN
    picture = Image.new("RGB", (3 * side, side), PAPER)
    lines = textwrap.wrap(sentence, 95, break_on_hyphens=False)
    ImageDraw.Draw(picture).multiline_text((3 * GAP, 3 * GAP), "\n".join(lines), ALARM, get_font(15), spacing=6)
    return to_png(draw_tile(np.asarray(picture), title, "left out"))


def draw_pages(title: str, names: Sequence[str], tiles: Sequence[bytes]) -> list[bytes]:
    """Lay the cases out on pages, under a legend of the labels.

    Args:
        title: heading of each page.
        names: by label value, the background first.
        tiles: from `draw_case` and `draw_fault`.

    Returns:
        PNG files.
    """
    legend = dict(enumerate(names[1:], 1))
    pages = [tiles[i : i + COLUMNS * ROWS] for i in range(0, len(tiles), COLUMNS * ROWS)]
    drawn = []
    for number, page in enumerate(pages, 1):
        pictures = [read_png(tile) for tile in page]
        drawn.append(to_png(draw_sheet(pictures, f"{title}, page {number} of {len(pages)}", legend, columns=COLUMNS)))
    return drawn
