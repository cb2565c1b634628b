"""Where a downstream network's first weights come from: one knob, `--init`."""

from __future__ import annotations

import os

from torch import nn

from networks import load_pretrained

INITIALISATIONS = ("scratch", "vdt", "imagenet", "coco")


def initialise(
    network: nn.Module, init: str = "scratch", pretrained: str | os.PathLike | None = None, *, stem: str = "sum"
) -> nn.Module:
    """Give `network` its first weights and return it.

    Args:
        network: a network of `networks`, also inside `DepthFirst`.
        init: "scratch" keeps the random weights; "vdt" takes the encoder in `pretrained`, which pre-training writes as
            `models/encoder.pt` (any file that `networks.load_pretrained` reads will do); "imagenet" and "coco" load a
            file in the same way, and say for the record what it was trained on.
        pretrained: path of the weights; needed by every `init` but "scratch".
        stem: how a stem for RGB is folded (see `networks.load_pretrained`).

    Raises:
        ValueError: if `init` is unknown, or `pretrained` is missing or given for nothing; and as `load_pretrained`.
    """
    if init not in INITIALISATIONS:
        raise ValueError(f"init must be one of {INITIALISATIONS}, got {init!r}")
    if init == "scratch":
        if pretrained is not None:
            raise ValueError(f"init 'scratch' ignores pretrained={str(pretrained)!r}; did you mean init 'vdt'?")
        return network
    if pretrained is None:
        raise ValueError(f"init {init!r} needs pretrained, the path of a weights file such as models/encoder.pt")
    load_pretrained(network, pretrained, stem=stem)
    return network
