"""How many steps of a planned training fit a time on this machine: some are timed, on random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.bundle import ConfigParser

from vdt_workflows.locator import find_bundles
from vdt_workflows.planning.lines import BUNDLE
from vdt_workflows.training.timing import time_steps

SHARE = 0.8  # of the time, the rest being for loading, validation and files


def say_steps(settings: Mapping[str, Any], minutes: float, on_gpu: bool) -> str:
    """Time some steps as the bundle's configs make them of a plan, and say in a sentence how many fit `minutes` here.

    Args:
        settings: of a plan.
        minutes: of a training.
        on_gpu: whether it will be on this machine's GPU.
    """
    parser = ConfigParser()
    configs = find_bundles() / BUNDLE / "configs"
    parser.read_config([str(configs / name) for name in ("train.yaml", "short.yaml")])
    kept = {name: value for name, value in settings.items() if name in parser.get()}
    parser.update({**kept, "init": "scratch", "device": torch.device("cuda" if on_gpu else "cpu")})
    parts = (parser.get_parsed_content(name) for name in ("network", "optimizer", "supervised", "train::inferer"))
    network, optimizer, loss, inferer = parts
    size = settings["micro_batch"], 1, *settings["patch_size"]
    batch = {"image": torch.randn(size), "label": torch.randint(len(settings["label_names"]), size).float()}
    seconds = time_steps(network, optimizer, loss, inferer, [batch] * 50, amp=on_gpu, most=3.0)
    seconds *= -(-settings["batch_size"] // settings["micro_batch"])
    steps = int(SHARE * 60 * minutes / seconds)
    return (
        f"time: {minutes:g} minutes here are some {steps:,} steps, {seconds:.2g} s each; {1 - SHARE:.0%} of the time is"
        " for loading and validation"
    )
