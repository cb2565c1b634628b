"""The learning rate of the segmentation recipes, step by step."""

from __future__ import annotations


def polynomial_rate(step: int, *, total: int, power: float = 0.9, floor: float = 0.0, warmup: int = 0) -> float:
    """Give the factor of a learning rate after `step` steps: (1 - floor) (1 - step / total)^power + floor.

    It is meant for `torch.optim.lr_scheduler.LambdaLR`, as `functools.partial(polynomial_rate, total=...)`;
    `PolynomialLR` has neither a floor nor a warm-up.

    Args:
        step: steps done so far.
        total: steps of the whole run.
        power: 0.9 in the published recipes.
        floor: the factor that is left at the end; the published recipes end at a rate of 1e-6.
        warmup: steps over which the rate rises linearly, besides.

    Raises:
        ValueError: if `total` is below one.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1, got {total}")
    factor = (1 - floor) * (1 - min(step / total, 1)) ** power + floor
    return factor * min(1.0, (step + 1) / warmup) if warmup > 0 else factor
