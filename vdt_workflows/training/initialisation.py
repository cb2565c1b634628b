"""Where a downstream network's first weights come from, and what of them is trained: one knob, `--init`."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from networks import P3D, GenesisUNet3D, ResNet3D, constrain, load_pretrained, read_checkpoint
from networks.published_names import describe_encoder
from vdt_workflows.errors import check_choice
from vdt_workflows.files import hash_file
from vdt_workflows.training.checkpoints import read_provenance
from vdt_workflows.training.shipped import Weights, list_weights, name_of

# What each takes from `pretrained`.
INITIALISATIONS = {
    "scratch": "nothing",
    "vdt": "the encoder that pre-training writes as models/encoder.pt (of configs/p3d.yaml for lesion detection)",
    "i3d": "a 2D ResNet, such as torchvision's, its kernels inflated along depth",
    "acs": "a 2D ResNet, its kernels spread over three views, which is all that is trained",
    "2.5d": "a 2D ResNet, its kernels kept flat, which is all that is trained",
    "kinetics": "a video ResNet of 3D-ResNets-PyTorch or torchvision",
    "medicalnet": "a MedicalNet ResNet",
    "genesis": "a Models Genesis U-Net",
    "imagenet": "a detector's backbone trained on ImageNet",
    "coco": "a detector, or its backbone, trained on COCO",
}
CONVERTED = ("i3d", "acs", "2.5d")
FLAT = ("acs", "2.5d")


def initialise(
    network: nn.Module, init: str = "scratch", pretrained: str | os.PathLike | None = None, *, stem: str = "sum"
) -> nn.Module:
    """Give `network` its first weights and return it.

    Every `init` but "acs" and "2.5d" trains the network as it is. Those two put flat kernels in the place of its
    convolutions, encoder and decoder alike (see `networks.constrain`); the state dict stays that of the native network,
    so that `models/model.pt` is read by evaluation and inference without knowing.

    Whatever `save_weights` writes of it later, or of its encoder, says where they came from (see `describe_weights`).

    Args:
        network: a network of `networks`, also inside `DepthFirst`.
        init: one of `INITIALISATIONS`. "scratch" keeps the random weights; "vdt", "kinetics", "medicalnet", "imagenet"
            and "coco" load a 3D file as it is, and say for the record what it was trained on; "i3d", "acs" and "2.5d"
            convert a 2D one; "genesis" fills a `GenesisUNet3D`.
        pretrained: path of the weights, such as `first_weights` finds; needed by every `init` but "scratch".
        stem: how a stem for RGB is folded (see `networks.load_pretrained`).

    Raises:
        ValueError: if `init` is unknown or not for this network, or `pretrained` is missing or given for nothing; and
            as `load_pretrained`.
    """
    check_choice("init", init, tuple(INITIALISATIONS))
    if init == "scratch":
        if pretrained is not None:
            raise ValueError(f"init 'scratch' ignores pretrained={str(pretrained)!r}; did you mean init 'vdt'?")
        return network
    if pretrained is None:
        raise ValueError(
            f"init {init!r} needs pretrained, the path of a weights file such as models/encoder.pt:"
            f" {INITIALISATIONS[init]}"
        )
    _check_network(network, init)
    if any(isinstance(m, P3D) for m in network.modules()) and describe_encoder(read_checkpoint(pretrained)):
        raise ValueError(
            f"{pretrained}: holds a ResNet, whose kernels fit no layer of a P3D; pre-train a P3D with configs/p3d.yaml"
            " of imagenet_vdt_pretraining, or give a P3D backbone or detector"
        )
    load_pretrained(network, pretrained, stem=stem, conversion=init if init in CONVERTED else None)
    if init in FLAT:
        constrain(network, init)
    origin: Any = {"init": init, "pretrained": describe_weights(pretrained)}
    for name, part in network.named_modules():
        if part is network or name.endswith("backbone"):  # the encoder may be saved alone
            part.origin = origin
    return network


def pick_norm(init: str, pretrained: str | os.PathLike | None, scratch: str = "instance") -> str:
    """Give the norm that a network needs for its first weights: that of the file, or `scratch` without one."""
    if init == "scratch" or pretrained is None or not os.path.isfile(pretrained):
        return scratch
    tensors = read_checkpoint(pretrained)
    written = [part["architecture"] for part in getattr(tensors, "_metadata", {}).values() if "architecture" in part]
    return next((a["norm"] for a in written if "norm" in a), None) or describe_encoder(tensors).get("norm", "batch")


def describe_weights(path: str | os.PathLike | None) -> dict[str, Any] | None:
    """Say which file of weights this is, as plain values for a record: name, SHA-256, and its own provenance.

    The provenance is empty for files that these packages did not write, such as other people's published weights. Those
    that are shipped have `shipped`, their name, too; without a file there is nothing to say.
    """
    if path is None:
        return None
    sha256 = hash_file(path)
    shipped = {"shipped": name} if (name := name_of(sha256)) else {}
    return {"file": os.path.basename(path), "sha256": sha256, **shipped, "provenance": read_provenance(path)}


def find_origins(path: str | os.PathLike) -> list[Weights]:
    """List the shipped weights that a file is or started from, whose data and terms hold for it too."""
    hashes, provenance = [hash_file(path)], read_provenance(path)
    while started := provenance.get("pretrained"):
        hashes.append(started["sha256"])
        provenance = started["provenance"]
    return [list_weights()[name] for name in map(name_of, hashes) if name]


def _check_network(network: nn.Module, init: str) -> None:
    """Refuse an `init` whose weights no layer of the network can take."""
    name = type(network).__name__ if not hasattr(network, "network") else type(network.network).__name__
    encoder = next((m for m in network.modules() if isinstance(m, ResNet3D)), None)
    genesis = any(isinstance(m, GenesisUNet3D) for m in network.modules())
    if genesis != (init == "genesis"):
        raise ValueError(
            f"init {init!r} needs another network than {name}: "
            + (
                "genesis.yaml makes one for 'genesis' alone; leave it out"
                if genesis
                else "segmentation bundles take it from configs/genesis.yaml, the others have none"
            )
        )
    if init in (*CONVERTED, "kinetics", "medicalnet") and encoder is None:
        raise ValueError(
            f"init {init!r} fills a ResNet3D, which {name} does not have; use 'scratch', 'vdt', 'imagenet' or 'coco'"
        )
    if init == "medicalnet" and encoder is not None:
        architecture: Any = encoder.architecture
        depth, shortcut = architecture["depth"], architecture["shortcut"]
        wanted = "A" if depth in (18, 34) else "B"
        if shortcut != wanted:
            raise ValueError(
                f"init 'medicalnet' with depth {depth} needs shortcut {wanted!r}, got {shortcut!r};"
                f" {'add configs/medicalnet.yaml to' if wanted == 'A' else 'leave configs/medicalnet.yaml out of'}"
                " the config files of training, and of evaluation and inference"
            )
