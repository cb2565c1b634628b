"""The pictures of a comparison: scores against labels and against steps, and one case as each row segments it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from vdt_transforms.checks import to_whole
from vdt_transforms.geometry import open_volume, read_voxels
from vdt_workflows.drawing import cut_planes, draw_planes, find_centre
from vdt_workflows.report.pages import COLOURS, percent
from vdt_workflows.report.statistics import NEAR

MARKS = "osD^"  # rows differ in more than their colours
DASHES = ("-", "--", ":", "-.")
PANEL = 140  # pixels of the longest edge of a plane


def draw_labels_needed(results: Mapping[str, Any], protocol: str) -> Figure | None:
    """Draw the mean score of each row against its labelled cases, with bars of one standard deviation.

    Args:
        results: what `compare` writes as results.json.
        protocol: whose rows are drawn.

    Returns:
        The figure; None if no cell has finished.
    """
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for entry in _summary_of(results, protocol):
        line = lines.setdefault(entry["row"], [])
        if entry["mean"] is not None:
            line.append((entry["labels"], entry["mean"], entry["sd"] or 0.0))
    labels = sorted({x for line in lines.values() for x, _, _ in line})
    if not labels:
        return None
    figure, (axes,) = _make_axes(1)
    for number, line in enumerate(lines.values()):
        x, y, sd = np.reshape(line, (-1, 3)).T
        shift = 1 + min(0.012, 0.05 / len(lines)) * (number - (len(lines) - 1) / 2)  # bars beside each other
        axes.errorbar(x * shift, y, sd, elinewidth=1.2, **_style(number))
    goal = next(entry["target"] for entry in results["efficiency"] if entry["protocol"] == protocol)
    axes.set(xscale="log", xlabel="labelled cases (logarithmic)", ylabel=results["metric"])
    axes.set_xticks(labels, [str(count) for count in labels])
    axes.xaxis.set_minor_locator(NullLocator())
    _finish(figure, [axes], [goal], list(lines))
    return figure


def draw_curves(results: Mapping[str, Any], protocol: str) -> Figure | None:
    """Draw the mean score of each row while training, in one chart for each share of the labels, at one scale.

    Args and result are those of `draw_labels_needed`.
    """
    summary = _summary_of(results, protocol)
    if not any(entry["curve"] for entry in summary):
        return None
    shares = sorted({entry["share"] for entry in summary})
    figure, charts = _make_axes(len(shares))
    goals: list[float | None] = []
    for axes, share in zip(charts, shares, strict=True):
        entries = [entry for entry in summary if entry["share"] == share]
        for number, entry in enumerate(entries):
            axes.plot(*np.reshape(entry["curve"], (-1, 2)).T, **_style(number))
        base = next(entry["curve"] for entry in entries if entry["row"] == results["reference"])
        goals.append(NEAR * base[-1][1] if base else None)
        axes.set_title(f"{percent(share)} of the labels: {entries[0]['labels']} cases", fontsize="medium")
        axes.set(xlabel="steps", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for axes in charts[::2]:
        axes.set_ylabel(results["metric"])
    _finish(figure, charts, goals, list(dict.fromkeys(entry["row"] for entry in summary)))
    return figure


def to_svg(figure: Figure) -> str:
    """Render a figure as SVG inside HTML: the same bytes for the same numbers, text as text, colours of the page."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "vdt"}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # names that each drawing gives again
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{number})")
    return text.replace("#000000", "currentColor")


def _summary_of(results: Mapping[str, Any], protocol: str) -> list[Mapping[str, Any]]:
    return [entry for entry in results["summary"] if entry["protocol"] == protocol]


def _make_axes(number: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(8.5, 0.4 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in grid[number:]:
        axes.remove()
    return figure, list(grid[:number])


def _style(number: int) -> dict[str, Any]:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "linestyle": dash}


def _finish(figure: Figure, charts: Sequence[Axes], goals: Sequence[float | None], rows: Sequence[str]) -> None:
    """Add the dashed lines of the goals, the grid, and the names of the rows, which are no mathematics."""
    for axes, goal in zip(charts, goals, strict=True):
        axes.grid(color="#808080", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if goal is not None:
            axes.axhline(goal, color="#808080", linestyle="--", linewidth=1)
    drawn = [charts[0].plot([], [], **_style(number))[0] for number in range(len(rows))]
    columns = max(1, min(len(rows), 90 // (8 + max(map(len, rows)))))
    legend = figure.legend(drawn, [str(i) for i in range(len(rows))], loc="outside lower center", ncols=columns)
    legend.set_frame_on(False)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(rows) // columns))
    for text, name in zip(legend.get_texts(), rows, strict=True):
        text.set(text=name, parse_math=False)


def draw_example(results: Mapping[str, Any]) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """Draw three planes of a held-out volume: as it is, labelled, and as each row segments it.

    Returns:
        What is shown, and (name, (rows, columns, 3) of uint8); nothing if no row has segmented the volume.
    """
    example = results["example"]
    found = {}
    for cell in results["cells"]:
        files = sorted((Path(cell["folder"]) / "example").glob("*_seg.nii.gz"))
        if files and cell["state"] == "finished":
            found[cell["row"], cell["protocol"]] = files[0], cell
    if example is None or not found:
        return "", []
    geometry = example.get("geometry", "refuse")
    image, label = (open_volume(example[kind], geometry) for kind in ("image", "label"))
    labels = to_whole(read_voxels(label))
    centre = find_centre(labels)
    planes = cut_planes(read_voxels(image), image.affine, centre)
    several = len({protocol for _, protocol in found}) > 1
    masks = {"image": None, "label": labels}
    for (row, protocol), (file, _) in found.items():
        masks[f"{row}, {protocol}" if several else row] = read_voxels(open_volume(file, geometry))
    pictures = []
    for name, mask in masks.items():
        areas = None if mask is None else cut_planes(mask, image.affine, centre)
        pictures.append((name, draw_planes(planes, areas, areas, panel=PANEL)))
    _, cell = next(iter(found.values()))
    text = f"{Path(example['image']).name}, the planes with most labelled voxels; seed {cell['seed']}"
    return f"{text}, {percent(cell['share'])} of the labels", pictures
