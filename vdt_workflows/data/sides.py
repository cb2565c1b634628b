"""Labels of the left and of the right side, told by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
ONE_SIDED = re.compile(r"ventric|atri|heart|cardiac|myocard|coronar|aort|lobe")  # not mirror images of one another
PAIRED = re.compile(r"lateral")  # ventricles, of the brain


def find_pairs(names: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Find labels whose names differ in the side alone, and those that name a side without their counterpart.

    Chambers and vessels of the heart and lobes of the lung are told by their shape, and no mirror images of others.

    Args:
        names: of the labels by value, the background first.

    Returns:
        The pairs of values, and the names that are alone.
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
