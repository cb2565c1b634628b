"""Labels of the left and of the right side, told by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

LEFT = {"left": "right", "l": "r", "lt": "rt", "lv": "rv", "la": "ra"}
SIDES = LEFT | {right: left for left, right in LEFT.items()}
SIDE = re.compile(r"(left|right|(?<![a-z])(?:l|r|lt|rt|lv|rv|la|ra)(?![a-z0-9]))")
ONE_SIDED = re.compile(  # not mirror images of one another: chambers and vessels of the heart, lobes of the lung
    r"ventric|atri|heart|cardiac|myocard|coronar|aort|lobe|(?<![a-z])[lr][va](?![a-z0-9])"
)
PAIRED = re.compile(r"lateral")  # ventricles, of the brain


def find_pairs(names: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """Find labels whose names differ in the side alone, and those that name a side and have no mirror image.

    The left and the right ventricle, or upper lobe, are of different shapes: neither is the mirror image of the other,
    and a network that learns from flipped volumes cannot tell them by their side.

    Args:
        names: of the labels by value, the background first.

    Returns:
        The pairs of values, and the names without a mirror image among the labels.
    """
    by_name = {name.lower(): value for value, name in enumerate(names)}
    pairs, lonely = [], []
    for value, name in enumerate(names):
        low = name.lower()
        words = SIDE.split(low)
        if len(words) == 1:
            continue
        other = by_name.get("".join(SIDES.get(word, word) for word in words))
        if ONE_SIDED.search(low) and not PAIRED.search(low):
            if other is not None:  # one alone is told by its shape
                lonely.append(name)
        elif other is None:
            lonely.append(name)
        elif value < other:
            pairs.append([value, other])
    return pairs, lonely
