"""Planes of volumes, overlays and charts, as PNG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_png(figure: Figure, dpi: float | None = None) -> bytes:
    """Render a matplotlib figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi or "figure")
    return png.getvalue()
