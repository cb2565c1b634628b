"""The page that tells what a comparison found: one file, without scripts or anything from a network."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vdt_workflows.report.comparison_results import NEAR

LEAST_SEEDS = 3  # for a verdict

Line = list[tuple[float, float, float]]  # x, y and half the length of an error bar

# Okabe and Ito's colours, which most colour-blind people tell apart, darker on white and lighter on black.
COLOURS = ("#0060a0", "#b84a00", "#00745a", "#a3387a", "#7a6a00", "#2a7fb8", "#555555", "#a01010")
LIGHTER = ("#6cb8f0", "#ff9a4d", "#3fd0a5", "#f08cc8", "#e6d84a", "#9ad4ff", "#bbbbbb", "#ff8080")
LABELS = colormaps["tab10"].colors  # by label value, from 1
DASHES = ("", "6 3", "2 3", "8 3 2 3")

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --paper: #fff; --line: #d5d5d5; --band: #f4f5f7;
LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e9e9; --soft: #a9a9a9; --paper: #16181b; --line: #3a3e44;
--band: #20242a; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--paper);
color: var(--ink); font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
p, ul { max-width: 46rem; margin: .5rem 0 }
.lead { font-size: 1.05rem }
.soft, figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .8rem .3rem .3rem; text-align: left; border-bottom: 1px solid var(--line);
vertical-align: top }
thead th { font-weight: 600; border-bottom: 2px solid var(--line) }
tbody th { font-weight: 500 }
th.group { background: var(--band); font-weight: 600 }
td.n, th.n { text-align: right; white-space: nowrap }
td.text { min-width: 14rem }
.clear { font-weight: 700 }
figure { margin: .8rem 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem 1.5rem }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem }
.pictures img { width: 11rem; height: auto; image-rendering: pixelated; display: block; border-radius: 3px }
svg { width: 100%; height: auto; max-width: 40rem; display: block; overflow: visible }
svg text { fill: var(--ink); font-size: 12px }
svg .axis { stroke: var(--soft) } svg .grid { stroke: var(--line) } svg .goal { stroke: var(--soft) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; max-width: none }
.legend svg { width: 2.4rem; display: inline-block; vertical-align: middle; margin-right: .5rem }
.legend i { display: inline-block; width: .9rem; height: .9rem; border-radius: 2px; margin-right: .4rem;
vertical-align: -.1rem; print-color-adjust: exact; -webkit-print-color-adjust: exact }
pre { overflow-x: auto; background: var(--band); padding: .8rem; font-size: .82rem; border-radius: 4px }
code { font-size: .9em; overflow-wrap: anywhere }
@media print { :root { font-size: 9.5pt; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #f2f2f2;
LIGHT } body { max-width: none; padding: 0 } figure, tbody, .pictures { break-inside: avoid }
h2, h3, .legend, p.soft, summary { break-after: avoid } .scroll { overflow: visible } pre { white-space: pre-wrap }
details::details-content { content-visibility: visible; display: block } }
"""


def write_page(results: Mapping[str, Any]) -> str:
    """Make the page from what `compare.py` writes as results.json."""
    rows = list(dict.fromkeys(s["row"] for s in results["summary"]))
    protocols = list(dict.fromkeys(s["protocol"] for s in results["summary"]))
    parts = [_head(results, rows)]
    for protocol in protocols:
        own = [s for s in results["summary"] if s["protocol"] == protocol]
        several = f" ({escape(protocol)} protocol)" if len(protocols) > 1 else ""
        parts += [
            f"<section><h2>Scores{several}</h2>{_table(results, own)}</section>",
            f"<section><h2>Labels needed{several}</h2>{_labels_needed(results, own, rows, protocol)}</section>",
            f"<section><h2>Scores while training{several}</h2>{_curves(results, own, rows)}</section>",
        ]
    parts += [_examples(results), _troubles(results), _method(results), _provenance(results)]
    style = STYLE.replace("LIGHT", _variables(COLOURS)).replace("DARK", _variables(LIGHTER))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(results['title'])}</title><style>{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


# Text and tables ----------------------------------------------------------------------------------------------------


def _head(results: Mapping[str, Any], rows: Sequence[str]) -> str:
    cells = results["cells"]
    done = sum(c["state"] == "finished" for c in cells)
    shares = len({c["share"] for c in cells})
    seeds = len({c["seed"] for c in cells})
    size = f"{len(rows)} rows, {shares} share{'s' * (shares > 1)} of the labels, {seeds} seed{'s' * (seeds > 1)}"
    missing = "" if done == len(cells) else f" <strong>Missing cells: {len(cells) - done}</strong>, see below."
    findings = "".join(f"<li>{line}</li>" for line in _findings(results))
    return (
        f'<header><h1>{escape(results["title"])}</h1><p class="lead">{size}; {done} of {len(cells)} cells finished.'
        f"{missing} Score: {escape(results['metric'])} on {escape(results['held_out'])}, after the last of"
        f" {results['steps']} steps.</p></header><section><h2>What was found</h2><p>Against"
        f" {escape(results['reference'])}, with the fewest and with all labels; in brackets {_percent(0.95)} intervals"
        f" of the difference:</p><ul>{findings}</ul></section>"
    )


def _findings(results: Mapping[str, Any]) -> list[str]:
    """Say of each row, with the fewest and with all labels, whether its difference can be told from zero."""
    lines: dict[str, list[str]] = {}
    summary = results["summary"]
    several = len({entry["protocol"] for entry in summary}) > 1
    shares = {entry["share"] for entry in summary}
    for entry in summary:
        difference = entry["difference"]
        if entry["share"] not in (min(shares), max(shares)) or difference is None:
            continue
        name = f"<b>{escape(entry['row'])}</b>" + (f" ({escape(entry['protocol'])} protocol)" if several else "")
        lines.setdefault(name, []).append(
            f"with {entry['labels']} labelled cases {_signed(difference['mean'])}"
            f" ({_signed(difference['low'])} to {_signed(difference['high'])}), {_judge(difference)}"
        )
    found = [f"{name}: {'; '.join(texts)}." for name, texts in lines.items()]
    return found or ["Nothing to compare yet."]


def _judge(difference: Mapping[str, Any]) -> str:
    """Judge a difference by its interval, which says little of other draws where seeds are very few."""
    seeds = len(difference["by_seed"])
    if seeds < LEAST_SEEDS:
        return f"not judged on {seeds} seed{'s' * (seeds > 1)}"
    if difference["low"] <= 0 <= difference["high"]:
        return "not told apart"
    return "better" if difference["mean"] > 0 else "worse"


def _table(results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> str:
    reference = escape(results["reference"])
    heads = [
        "row",
        "mean ± sd",
        f"minus {reference}",
        "95&nbsp;% interval",
        "seed by seed",
        "steps to 90&nbsp;%",
        "size",
    ]
    head = "".join(f'<th scope="col"{"" if i == 0 else _N}>{name}</th>' for i, name in enumerate(heads))
    body = []
    for share in sorted({s["share"] for s in summary}):
        own = [s for s in summary if s["share"] == share]
        title = f"{_percent(share)} of the labels: {own[0]['labels']} cases"
        lines = [f'<tr><th class="group" scope="rowgroup" colspan="{len(heads)}">{title}</th></tr>']
        for entry in own:
            difference = entry["difference"]
            cells = [_spread(entry), "", "", "", _reached(entry), _size(entry["parameters"])]
            if difference is not None:
                apart = ' class="clear"' if _judge(difference) in ("better", "worse") else ""
                cells[1] = f"<span{apart}>{_signed(difference['mean'])}</span>"
                cells[2] = f"{_signed(difference['low'])} to {_signed(difference['high'])}"
                cells[3] = ", ".join(_signed(d) for d in difference["by_seed"])
            texts = "".join(f"<td{_N}>{cell}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(entry["row"])}</th>{texts}</tr>')
        body.append(f"<tbody>{''.join(lines)}</tbody>")
    caption = (
        f"{escape(_capital(results['metric']))} over the held-out cases, mean and standard deviation over seeds. Bold:"
        f" the interval of {LEAST_SEEDS} seeds or more leaves zero out. Steps to 90&nbsp;%: of what"
        f" {reference} has in the end with the same labels."
    )
    return _wrap(caption, head, "".join(body))


_N = ' class="n"'
_TEXT = ' class="text"'


def _wrap(caption: str, head: str, body: str) -> str:
    """Put the parts of a table together; a narrow window scrolls it sideways under its caption."""
    table = f"<table><thead><tr>{head}</tr></thead>{body}</table>"
    return f'<p class="soft">{caption}</p><div class="scroll">{table}</div>'


def _labels_needed(
    results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], rows: Sequence[str], protocol: str
) -> str:
    lines: list[tuple[str, Line]] = []
    for row in rows:
        own = [s for s in summary if s["row"] == row and s["mean"] is not None]
        lines.append((row, [(s["labels"], s["mean"], s["sd"] or 0.0) for s in own]))
    entries = [e for e in results["efficiency"] if e["protocol"] == protocol]
    goal = entries[0]["target"]
    items = []
    for entry in entries:
        if goal is None:
            text = "no cell"
        elif entry["labels"] is None:
            text = "not reached"
        else:
            bound = "at most " if entry["upper_bound"] else ""
            again = "" if entry["stays"] else "; below it again with more"
            text = f"{bound}{entry['labels']:.0f} ({_percent(entry['labels'] / entry['all'])}){again}"
        items.append(f'<tr><th scope="row">{escape(entry["row"])}</th><td{_N}>{text}</td></tr>')
    with_all = f"{escape(results['reference'])} with all {entries[0]['all']}"
    caption = f"Labelled cases that a row needs for the mean score of {with_all}, on the line between the shares."
    heads = f'<th scope="col">row</th><th scope="col"{_N}>labelled cases</th>'
    chart = draw_chart(lines, "labelled cases (logarithmic)", results["metric"], logarithmic=True, goal=goal)
    return (
        f"{_legend(rows)}<figure>{chart}<figcaption>Mean over seeds; bars are one standard deviation. Dashed:"
        f" {with_all}.</figcaption></figure>{_wrap(caption, heads, f'<tbody>{chr(10).join(items)}</tbody>')}"
    )


def _curves(results: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> str:
    scores = [score for s in summary for _, score in s["curve"]]
    limits = (min(scores), max(scores)) if scores else None
    figures = []
    for share in sorted({s["share"] for s in summary}):
        own = {s["row"]: s for s in summary if s["share"] == share}
        lines = [(row, [(step, score, 0.0) for step, score in own[row]["curve"]]) for row in rows]
        base = own[results["reference"]]["curve"]
        goal = NEAR * base[-1][1] if base else None
        chart = draw_chart(lines, "steps", results["metric"], goal=goal, limits=limits, width=420)
        labels = own[rows[0]]["labels"]
        figures.append(f"<figure><h3>{_percent(share)} of the labels: {labels} cases</h3>{chart}</figure>")
    note = (
        f'<p class="soft">Mean over seeds, on {results["curve_cases"]} of the held-out cases. Dashed:'
        f" {_percent(NEAR)} of what {escape(results['reference'])} has in the end.</p>"
    )
    return f'{_legend(rows)}<div class="charts">{"".join(figures)}</div>{note}'


def _troubles(results: Mapping[str, Any]) -> str:
    bad = [c for c in results["cells"] if c["state"] == "failed"]
    waiting = sum(c["state"] == "not run" for c in results["cells"])
    note = f"<p>{waiting} cells have not been run.</p>" if waiting else ""
    if not bad:
        return f"<section><h2>Missing cells</h2>{note}</section>" if waiting else ""
    lines = "".join(
        f'<tr><th scope="row">{escape(c["row"])}</th><td{_N}>{_percent(c["share"])}</td><td{_N}>{c["seed"]}</td>'
        f"<td>{escape(c['protocol'])}</td><td>{c['state']}</td><td{_TEXT}>{escape(_short(c['error'] or ''))}</td></tr>"
        for c in bad
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("row", "labels", "seed", "protocol", "state", "error"))
    caption = "The same command tries them again; each cell's log.txt says more."
    return f"<section><h2>Missing cells</h2>{note}{_wrap(caption, heads, f'<tbody>{lines}</tbody>')}</section>"


def _method(results: Mapping[str, Any]) -> str:
    return (
        "<section><h2>How the numbers were made</h2><ul>"
        "<li>All rows of a share and a seed learn from the same cases in the same order, with the same augmentation"
        " draws and the same number of steps. A smaller share is part of each larger one.</li>"
        "<li>The held-out cases are the same for all cells and select nothing: the weights of the last step are"
        " scored.</li>"
        "<li>Differences are paired. Their interval is a percentile interval of a bootstrap whose samples draw seeds"
        " and, apart from them, held-out cases, with replacement and the same for both rows. With fewer than about"
        " five seeds it is too narrow; it is not corrected for the number of comparisons.</li>"
        "<li>Numbers between two shares, or two steps, are read off the straight line between them.</li></ul></section>"
    )


def _provenance(results: Mapping[str, Any]) -> str:
    text = json.dumps(results["provenance"], indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)  # a plain list is a line
    return (
        f"<section><h2>Provenance</h2>{_row_notes(results)}<details><summary>Settings, weights, data and versions"
        f"</summary><pre>{escape(text)}</pre></details></section>"
    )


def _row_notes(results: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(r["name"])}</th><td>{escape(r["init"])}</td>'
        f"<td><code>{(r['weights'] or 'none')[:16]}</code></td><td{_TEXT}>{escape(r['note'])}</td></tr>"
        for r in results["provenance"]["rows"]
    )
    heads = "".join(f'<th scope="col">{n}</th>' for n in ("row", "initialisation", "sha256 of the weights", "note"))
    return _wrap("The rows.", heads, f"<tbody>{lines}</tbody>")


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def _signed(value: float) -> str:
    text = f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
    return text if float(text[1:]) else text[1:]


def _spread(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "no cell"
    return f"{entry['mean']:.3f}" + ("" if entry["sd"] is None else f" ± {entry['sd']:.3f}")


def _reached(entry: Mapping[str, Any]) -> str:
    if not entry["curve"]:
        return ""
    if entry["steps_to_90"] is None:
        return "not reached"
    return f"{'≤ ' * (entry['steps_to_90'] == entry['first_point'])}{entry['steps_to_90']:.0f}"


def _size(parameters: int | None) -> str:
    return "" if not parameters else f"{parameters / 1e6:.2f} M"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# Pictures -----------------------------------------------------------------------------------------------------------


def draw_chart(
    lines: Sequence[tuple[str, Line]],
    x_label: str,
    y_label: str,
    *,
    logarithmic: bool = False,
    goal: float | None = None,
    limits: tuple[float, float] | None = None,
    width: int = 640,
    height: int = 300,
) -> str:
    """Draw lines with error bars as SVG, whose colours are the page's variables.

    Args:
        lines: (name, points) in the order of the rows.
        x_label: of the axis.
        y_label: of the axis.
        logarithmic: of the horizontal axis.
        goal: height of a dashed line.
        limits: what the vertical axis covers at the least, so that charts can be compared.
        width: of the drawing.
        height: of the drawing.
    """
    points = [p for _, line in lines for p in line]
    if not points:
        return "<p>No cell yet.</p>"
    left, right, top, bottom = 48, 12, 10, 42
    heights = [y + sign * e for _, y, e in points for sign in (1, -1)] + ([] if goal is None else [goal])
    heights += limits or ()
    ticks = MaxNLocator(5).tick_values(min(heights), max(heights) + 1e-6)
    low, high = float(ticks[0]), float(ticks[-1])
    places = sorted({x for x, _, _ in points})
    scale = math.log if logarithmic else float
    first, last = scale(places[0]), scale(places[-1])
    if not logarithmic:
        first = 0.0
    span = (last - first) or 1.0

    def across(x: float) -> float:
        return left + 10 + (scale(x) - first) / span * (width - left - right - 20)

    def up(y: float) -> float:
        return top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for tick in ticks:
        y = up(float(tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.{_digits(ticks)}f}</text>')
    shown: list[float] = []
    for x in places:
        if shown and across(x) - across(shown[-1]) < 28:
            continue
        shown.append(x)
        parts.append(f'<text x="{across(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    y = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if goal is not None:
        y = up(goal)
        parts.append(
            f'<line class="goal" stroke-dasharray="5 4" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for number, (name, line) in enumerate(lines):
        if line:
            shift = 3 * (number - (len(lines) - 1) / 2) if any(e for _, _, e in line) else 0
            parts.append(
                _draw_line(number, name, [(across(x) + shift, up(y), up(y + e), up(y - e)) for x, y, e in line])
            )
    names = ", ".join(name for name, line in lines if line)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}:'
        f' {escape(names)}">{"".join(parts)}</svg>'
    )


def _draw_line(number: int, name: str, points: Sequence[tuple[float, float, float, float]]) -> str:
    colour, dash = f"var(--c{number % len(COLOURS)})", DASHES[number // len(COLOURS) % len(DASHES)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    bars = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>' for x, _, a, b in points if abs(a - b) > 0.2
    )
    marks = "".join(_mark(number, x, y) for x, y, _, _ in points)
    return (
        f'<g stroke="{colour}" fill="{colour}"><title>{escape(name)}</title><polyline points="{path}" fill="none"'
        f' stroke-width="2" stroke-dasharray="{dash}"/><g stroke-width="1.3">{bars}</g><g stroke="none">{marks}</g></g>'
    )


def _mark(number: int, x: float, y: float) -> str:
    """Draw a circle, square, triangle or diamond, so that colour is not all that tells rows apart."""
    kind, r = number % 4, 4.2
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    shapes: dict[int, list[tuple[float, float]]] = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -r - 1), (r + 1, r), (-r - 1, r)],
        3: [(0, -r - 1.5), (r + 1.5, 0), (0, r + 1.5), (-r - 1.5, 0)],
    }
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shapes[kind])}"/>'


def _legend(rows: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 40 14" aria-hidden="true">{_draw_line(i, row, [(2, 7, 7, 7), (38, 7, 7, 7)])}</svg>'
        f"{escape(row)}</li>"
        for i, row in enumerate(rows)
    )
    return f'<ul class="legend">{items}</ul>'


def _digits(ticks: Sequence[float]) -> int:
    """Count the decimals that show every tick as it is."""
    return next(n for n in range(9) if n == 8 or all(abs(round(float(t), n) - float(t)) < 1e-9 for t in ticks))


def draw_example(results: Mapping[str, Any]) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """Draw the slice of the held-out volume with most labels: as it is, labelled, and as each row segments it.

    Returns:
        What is shown, and (name, (rows, columns, 3) of uint8); nothing if no row has segmented the volume.
    """
    found = {}
    for cell in results["cells"]:
        files = sorted((Path(cell["folder"]) / "example").glob("*_seg.nii.gz"))
        if files and cell["state"] == "finished":
            found[cell["row"], cell["protocol"]] = files[0], cell
    example = results["example"]
    if example is None or not found:
        return "", []
    image, label = (np.asarray(nib.load(example[name]).dataobj) for name in ("image", "label"))
    place = int(np.argmax((label > 0).sum(axis=(0, 1))))
    several = len({protocol for _, protocol in found}) > 1
    pictures = [("image", _colour(image, None, place)), ("label", _colour(image, label, place))]
    for (row, protocol), (file, _) in found.items():
        name = f"{row}, {protocol}" if several else row
        pictures.append((name, _colour(image, np.asarray(nib.load(file).dataobj), place)))
    cell = next(iter(found.values()))[1]
    text = f"{Path(example['image']).name}, slice {place + 1} of {image.shape[2]}; seed {cell['seed']}"
    return f"{text}, {_percent(cell['share'])} of the labels", pictures


def _colour(image: np.ndarray, label: np.ndarray | None, place: int) -> np.ndarray:
    """Draw a slice with the second axis upwards and with the label's colours over it."""
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image[:, :, place].astype(float) - low) / max(high - low, 1e-6), 0, 1)
    pixels = np.repeat(grey[..., None] * 255, 3, axis=2)
    if label is not None:
        colours = np.array(LABELS) * 255
        values = label[:, :, place].astype(int)
        pixels[values > 0] = 0.45 * pixels[values > 0] + 0.55 * colours[(values[values > 0] - 1) % len(LABELS)]
    return pixels.transpose(1, 0, 2)[::-1].round().astype(np.uint8)


def _examples(results: Mapping[str, Any]) -> str:
    text, pictures = draw_example(results)
    if not pictures:
        return ""
    figures = "".join(_picture(name, pixels) for name, pixels in pictures)
    labels = results["provenance"]["settings"].get("label_names", [])[1:]
    items = "".join(
        f'<li><i style="background: {to_hex(LABELS[i % len(LABELS)])}"></i>{escape(str(name))}</li>'
        for i, name in enumerate(labels)
    )
    legend = f'<ul class="legend">{items}</ul>' if items else ""
    return (
        f'<section><h2>One held-out case</h2><p class="soft">{escape(text)}.</p>{legend}<div class="pictures">'
        f"{figures}</div></section>"
    )


def _picture(name: str, pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    what = {"image": "the image alone", "label": "the image with its label"}.get(name, f"the prediction of {name}")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(what)}"><figcaption>{escape(name)}</figcaption>'
        "</figure>"
    )
