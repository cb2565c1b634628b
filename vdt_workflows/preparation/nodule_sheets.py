"""Picture sheets of prepared nodules, each in three planes with what its readers drew; used by prepare_lidc.py."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vdt_workflows.files import write_atomic
from vdt_workflows.parallel import run_parallel

ROWS, COLUMNS = 5, 3  # nodules on a sheet
PLANES = ("axial", "coronal", "sagittal")
READERS = ("#ff5050", "#40b0ff", "#50d050", "#ffb000", "#c080ff", "#00d0d0", "#ff80c0", "#a0a0a0")
CONSENSUS = "white"
SCALE_BAR = 10  # mm
PANEL, GAP, TITLE = 1.6, 0.25, 0.3  # inches


def take_views(image: np.ndarray, label: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Take the central axial, coronal and sagittal slice of a nodule's cubes (X, Y, Z), rows from above.

    Patients are seen as radiologists do: their right is on the left, their front is above, or to the left.

    Returns:
        "image" (3, rows, columns) in HU, and "masks" (1 + readers, 3, rows, columns): the consensus, then each reader.
    """

    def views(cube: np.ndarray) -> np.ndarray:
        x, y, z = (n // 2 for n in cube.shape)
        return np.stack([cube[::-1, ::-1, z].T, cube[::-1, y, ::-1].T, cube[x, ::-1, ::-1].T])

    return {"image": views(image), "masks": np.stack([views(mask) for mask in (label, *masks)])}


def draw_sheets(root: Path, rows: Sequence[dict[str, Any]], workers: int | None) -> None:
    """Draw all nodules of the table, in its order, as sheet_001.png and so on, in place of the sheets there were."""
    size = ROWS * COLUMNS
    sheets = [(i // size + 1, rows[i : i + size]) for i in range(0, len(rows), size)]
    for file in root.glob("sheet_*.png"):
        file.unlink()
    for _ in run_parallel(partial(_draw_sheet, root), sheets, workers=workers, label="sheets"):
        pass


def _draw_sheet(root: Path, sheet: tuple[int, Sequence[dict[str, Any]]]) -> None:
    number, rows = sheet
    width, height = COLUMNS * (3 * PANEL + GAP) + GAP, -(-len(rows) // COLUMNS) * (PANEL + TITLE) + 2 * TITLE
    figure = Figure(figsize=(width, height), facecolor="black")
    readers = 0
    for place, row in enumerate(rows):
        name, diameter = row["nodule_id"], float(row["diameter_mm"])
        with np.load(root / "scans" / f"{name.rpartition('_')[0]}.npz") as views:
            image, masks = views[f"{name}.image"], views[f"{name}.masks"]
        readers = max(readers, len(masks) - 1)
        left = GAP + place % COLUMNS * (3 * PANEL + GAP)
        bottom = height - (place // COLUMNS + 1) * (PANEL + TITLE) - TITLE
        half = min(image.shape[1] / 2, max(14.0, diameter))
        for plane in range(3):
            inches = np.array([left + plane * PANEL, bottom, PANEL - 0.04, PANEL - 0.04])
            axes = figure.add_axes(tuple(inches / (width, height, width, height)))
            _draw_view(axes, image[plane], masks[:, plane], half)
        title = f"{name}    {diameter:.0f} mm    malignancy {row['malignancy_votes']}"
        figure.text(left / width, (bottom + PANEL + 0.04) / height, title, color="white", fontsize=9)
    handles = [Line2D([], [], color=CONSENSUS, lw=3, alpha=0.6, label="consensus")]
    handles += [Line2D([], [], color=READERS[i % len(READERS)], label=f"reader {i + 1}") for i in range(readers)]
    handles.append(Line2D([], [], color="white", lw=1.5, label=f"bar: {SCALE_BAR} mm"))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), labelcolor="white", frameon=False)
    figure.text(GAP / width, 1 - 0.7 * TITLE / height, ", ".join(PLANES), color="white", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="black", metadata={"Software": None})
    write_atomic(root / f"sheet_{number:03d}.png", buffer.getvalue())


def _draw_view(axes: Axes, image: np.ndarray, masks: np.ndarray, half: float) -> None:
    axes.imshow(image, cmap="gray", vmin=-1024, vmax=400, interpolation="bilinear")
    for number, mask in enumerate(masks):
        if mask.any() and number == 0:
            axes.contour(mask, levels=[0.5], colors=CONSENSUS, linewidths=3, alpha=0.6)
        elif mask.any():
            axes.contour(mask, levels=[0.5], colors=READERS[(number - 1) % len(READERS)], linewidths=0.9)
    middle = (image.shape[0] - 1) / 2
    axes.set(xlim=(middle - half, middle + half), ylim=(middle + half, middle - half))
    end = middle + 0.9 * half
    axes.plot([end - SCALE_BAR, end], [end, end], color="white", lw=1.5)
    axes.axis("off")
