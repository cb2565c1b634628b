"""Labels of the left and of the right side, by their names or by where they lie."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vdt_workflows.preparation.fingerprint import Fingerprint

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
ONE_SIDED = re.compile(r"ventric|atri|heart|cardiac|myocard|coronar|aort|lobe")  # not mirror images of one another
PAIRED = re.compile(r"lateral")  # ventricles, of the brain


def find_pairs(names: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Find labels whose names differ in the side alone, and those that name a side without their counterpart.

    Chambers and vessels of the heart and lobes of the lung are told by their shape, and no mirror images of others.
    """
    by_name = {name.lower(): value for value, name in enumerate(names)}
    pairs, lonely = [], []
    for value, name in enumerate(names):
        low = name.lower()
        words = re.split(r"(left|right|(?<![a-z])(?:l|r|lt|rt)(?![a-z0-9]))", low)
        if len(words) == 1 or (ONE_SIDED.search(low) and not PAIRED.search(low)):
            continue
        other = by_name.get("".join(SIDES.get(word, word) for word in words))
        if other is None:
            lonely.append(name)
        elif value < other:
            pairs.append([value, other])
    return pairs, lonely


def find_mirrored(data: Fingerprint) -> tuple[int, int] | None:
    """Find two labels, named by numbers alone, that lie on two sides of most cases and are of one size."""
    values = range(1, len(data.labels))
    for a, b in ((a, b) for a in values for b in values if a < b):
        both = [c for c in data.cases if {str(a), str(b)} <= c["voxels"].keys()]
        if not both or not 0.6 < np.median(data.sizes(a)) / np.median(data.sizes(b)) < 1.7:
            continue
        x = np.array([[c["middle"][str(v)] for v in (a, b)] for c in both])
        apart = np.sign(x[:, 0] - 0.5) != np.sign(x[:, 1] - 0.5)
        if np.mean(apart & (abs(x - 0.5).min(1) > 0.05) & (abs(x.sum(1) - 1) < 0.1)) > 0.9:
            return a, b
    return None
