"""The page of a comparison: what was found, the scores, and where they come from."""

import json
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from vdt_workflows.drawing import list_colours, to_png
from vdt_workflows.report.charts import draw_curves, draw_example, draw_labels_needed, to_svg
from vdt_workflows.report.pages import percent, render, signed, to_base64
from vdt_workflows.report.statistics import NEAR

LEAST_SEEDS = 3  # for a verdict


def write_page(results: Mapping[str, Any]) -> str:
    """Make the page from what `compare` writes as results.json."""
    cells, summary = results["cells"], results["summary"]
    rows = list(dict.fromkeys(entry["row"] for entry in summary))
    counts = [len(rows), len({cell["share"] for cell in cells}), len({cell["seed"] for cell in cells})]
    words = zip(counts, ("row{}", "share{} of the labels", "seed{}"), strict=True)
    example_text, pictures = draw_example(results)
    provenance = results["provenance"]
    labels = provenance["settings"].get("label_names", [])[1:]
    text = json.dumps(provenance, indent=1, ensure_ascii=False)
    return render(
        "comparison.html",
        **{name: results[name] for name in ("title", "metric", "held_out", "steps", "reference", "curve_cases")},
        size=", ".join(f"{count} {word.format('s' * (count > 1))}" for count, word in words),
        cells=cells,
        done=sum(cell["state"] == "finished" for cell in cells),
        findings=_find(results),
        rows=rows,
        protocols=[_describe_protocol(results, name) for name in dict.fromkeys(entry["protocol"] for entry in summary)],
        with_all=f"{results['reference']} with all {results['efficiency'][0]['all']}",
        near=NEAR,
        least_seeds=LEAST_SEEDS,
        example_text=example_text,
        pictures=[(name, to_base64(to_png(pixels))) for name, pixels in pictures],
        label_names=labels,
        label_colours=list_colours(range(1, len(labels) + 1)),
        waiting=sum(cell["state"] == "not run" for cell in cells),
        missing=[
            [cell["row"], percent(cell["share"]), cell["seed"], cell["protocol"], "failed", _shorten(cell["error"])]
            for cell in cells
            if cell["state"] == "failed"
        ],
        row_notes=[[r["name"], r["init"], (r["weights"] or "none")[:16], r["note"]] for r in provenance["rows"]],
        provenance_text=re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text),
    )


def _find(results: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Say of each row and protocol, with the fewest and with all labels, how it differs from the reference."""
    found: dict[tuple[str, str], list[str]] = {}
    shares = {entry["share"] for entry in results["summary"]}
    for entry in results["summary"]:
        difference = entry["difference"]
        if entry["share"] in (min(shares), max(shares)) and difference is not None:
            found.setdefault((entry["row"], entry["protocol"]), []).append(
                f"with {entry['labels']} labelled cases {signed(difference['mean'])}"
                f" ({signed(difference['low'])} to {signed(difference['high'])}), {judge(difference)}"
            )
    return [(row, protocol, texts) for (row, protocol), texts in found.items()]


def judge(difference: Mapping[str, Any]) -> str:
    """Judge a difference by its interval, which says little of other draws where seeds are very few."""
    seeds = len(difference["by_seed"])
    if seeds < LEAST_SEEDS:
        return f"not judged on {seeds} seed{'s' * (seeds > 1)}"
    if difference["low"] <= 0 <= difference["high"]:
        return "no clear difference"
    return "better" if difference["mean"] > 0 else "worse"


def _describe_protocol(results: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    summary = [
        {**entry, "bold": entry["difference"] is not None and judge(entry["difference"]) in ("better", "worse")}
        for entry in results["summary"]
        if entry["protocol"] == protocol
    ]
    entries = [entry for entry in results["efficiency"] if entry["protocol"] == protocol]
    charts = (draw_labels_needed(results, protocol), draw_curves(results, protocol))
    labels, curves = (None if chart is None else Markup(to_svg(chart)) for chart in charts)
    return {
        "name": protocol,
        "summary": summary,
        "labels_needed": [[entry["row"], _count_labels(entry)] for entry in entries],
        "labels_chart": labels,
        "curves_chart": curves,
    }


def _count_labels(entry: Mapping[str, Any]) -> str:
    if entry["target"] is None:
        return "no cell"
    if entry["labels"] is None:
        return "not reached"
    bound = "at most " if entry["upper_bound"] else ""
    again = "" if entry["stays"] else "; below it again with more"
    return f"{bound}{entry['labels']:.0f} ({percent(entry['labels'] / entry['all'])}){again}"


def _shorten(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
