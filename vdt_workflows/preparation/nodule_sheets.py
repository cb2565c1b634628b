"""Picture sheets of prepared nodules, each in three planes with what its readers drew."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vdt_workflows.drawing import AXIS_OF_PLANE, Plane, cut_planes, draw_planes, draw_sheet, draw_tile, to_png
from vdt_workflows.files import write_atomic
from vdt_workflows.parallel import run_parallel

ROWS, COLUMNS = 5, 3  # nodules on a sheet
WINDOW = (-1024.0, 400.0)  # HU
SCALE_BAR = 10  # mm
PANEL = 180  # pixels


def take_views(image: np.ndarray, label: np.ndarray, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Cut the central axial, coronal and sagittal plane of a nodule's cubes (X, Y, Z) of 1 mm in RAS.

    Returns:
        "image" (3, rows, columns) in HU, and "masks" (1 + readers, 3, rows, columns): the consensus, then each reader.
        Their orientation is that of `drawing.cut_planes`.
    """
    cubes = np.stack([label, *masks])
    views = [np.stack([plane.values for plane in cut_planes(cube, np.eye(4))], axis=-3) for cube in (image, cubes)]
    return {"image": views[0], "masks": views[1]}


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
    tiles, readers = [], 0
    for row in rows:
        name, diameter = row["nodule_id"], float(row["diameter_mm"])
        with np.load(root / "scans" / f"{name.rpartition('_')[0]}.npz") as views:
            image, masks = views[f"{name}.image"], views[f"{name}.masks"]
        readers = max(readers, len(masks) - 1)
        title = f"{name}    {diameter:.0f} mm    malignancy {row['malignancy_votes']}"
        tiles.append(draw_tile(_draw_nodule(image, masks, diameter), title))
    legend = {1: "consensus (shade)", **{i + 1: f"reader {i} (line)" for i in range(1, readers + 1)}}
    picture = draw_sheet(tiles, f"axial, coronal, sagittal; bar: {SCALE_BAR} mm", legend, columns=COLUMNS)
    write_atomic(root / f"sheet_{number:03d}.png", to_png(picture))


def _draw_nodule(image: np.ndarray, masks: np.ndarray, diameter: float) -> np.ndarray:
    """Draw the middle of the views, as far as the nodule's diameter to each side, but at least 14 mm."""
    length = image.shape[-1]
    half = min(length // 2, max(14, round(diameter)))
    inner = slice(length // 2 - half, length // 2 + half)
    numbered = (masks > 0) * np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None, None]
    planes, labels = (
        [Plane(name, views[..., i, inner, inner], (1.0, 1.0)) for i, name in enumerate(AXIS_OF_PLANE)]
        for views in (image, numbered)
    )
    consensus, readers = ([p._replace(values=p.values[part]) for p in labels] for part in (0, slice(1, None)))
    return draw_planes(planes, consensus, readers, window=WINDOW, panel=PANEL, bar=SCALE_BAR)
