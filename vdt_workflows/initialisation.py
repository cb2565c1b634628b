"""Where a downstream network's first weights come from: one knob, `--init`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from networks import load_pretrained
from vdt_workflows.checkpoints import read_provenance

INITIALISATIONS = ("scratch", "vdt", "imagenet", "coco")


def initialise(
    network: nn.Module, init: str = "scratch", pretrained: str | os.PathLike | None = None, *, stem: str = "sum"
) -> nn.Module:
    """Give `network` its first weights and return it.

    Whatever `save_weights` writes of it later, or of its encoder, says where they came from (see `describe_weights`).

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
    origin = {"init": init, "pretrained": describe_weights(pretrained)}
    for name, part in network.named_modules():
        if part is network or name.endswith("backbone"):  # the encoder may be saved alone
            part.origin = origin
    return network


def describe_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Say which file of weights this is, as plain values for a record: name, SHA-256, and its own provenance.

    The provenance is empty for files that these packages did not write, such as other people's published weights.
    """
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return {"file": os.path.basename(path), "sha256": digest, "provenance": read_provenance(path)}
