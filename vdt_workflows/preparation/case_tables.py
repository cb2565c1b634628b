"""What a preparation found, as a table of all cases and as a few lines for people."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def write_table(records: Sequence[Record], names: Sequence[str]) -> bytes:
    """Make a CSV file with a row for each case.

    Args:
        records: from `prepare_cases`.
        names: label names by value, the background first.
    """
    columns = ["shape", "spacing", "orientation", "dtype"]
    text = io.StringIO()
    writer = csv.writer(text)
    head = ["case", *columns, "least", "greatest", *(f"{name} (ml)" for name in names[1:]), "notes", "fault"]
    writer.writerow(head)
    for record in records:
        if "fault" in record:
            writer.writerow([record["case"], *[""] * (len(head) - 2), record["fault"]])
            continue
        cells = [" ".join(map(str, v)) if isinstance(v, list) else v for v in (record[c] for c in columns)]
        volumes = [record["ml"].get(str(value), 0) for value in range(1, len(names))]
        ends = [f"{value:g}" for value in record["range"]]
        writer.writerow([record["case"], *cells, *ends, *volumes, "; ".join(record["notes"]), ""])
    return text.getvalue().encode()


def describe(records: Sequence[Record], lists: Mapping[str, Sequence[str]], names: Sequence[str]) -> str:
    """Sum up all cases in a few lines: geometry, intensities, and the volume of each label."""
    good = [record for record in records if "fault" not in record]
    sizes = [_span([record["shape"][axis] for record in good], "{:d}") for axis in range(3)]
    spacings = [_span([record["spacing"][axis] for record in good], "{:.3g}") for axis in range(3)]
    ends = [[record["range"][i] for record in good] for i in range(2)]
    orientations = Counter(record["orientation"] for record in good).most_common()
    notes = Counter(note.split(", the other")[0] for record in good for note in record["notes"])
    lines = [
        f"cases        {len(good)} prepared, {len(records) - len(good)} left out",
        f"lists        {', '.join(f'{len(cases)} {name}' for name, cases in lists.items())}",
        f"shape        {' x '.join(sizes)}",
        f"spacing      {' x '.join(spacings)} mm",
        f"orientation  {', '.join(f'{count} {codes}' for codes, count in orientations)}",
        f"intensities  {_span(ends[0], '{:g}')} at the least, {_span(ends[1], '{:g}')} at the greatest",
        *(f"note         {count} {'case' if count == 1 else 'cases'}: {note}" for note, count in notes.items()),
        "",
        f"{'label':<28}{'cases':>6}{'median':>10}{'least':>10}{'greatest':>10}  ml",
    ]
    for value, name in enumerate(names[1:], 1):
        volumes = [record["ml"][str(value)] for record in good if str(value) in record["ml"]]
        ends_ml = "".join(f"{v:>10.3g}" for v in (np.median(volumes), min(volumes), max(volumes))) if volumes else ""
        lines.append(f"{value:>3} {name:<24}{len(volumes):>6}{ends_ml}")
    return "\n".join(lines) + "\n"


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
