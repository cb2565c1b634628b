"""Names of tensors: what other tools call them, what they are called here, and what they say about the network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from networks.resnet3d import LAYERS

WRAPPERS = re.compile(r"^((module|_orig_mod|network)\.)+")  # DistributedDataParallel, torch.compile, DepthFirst
ENCODER = re.compile(r"^(backbone\.)?(conv1|bn1|conv1_custom|norm1|layer[1-4]|(down|up)_tr\d+)\.")
BARE = ("conv1.weight", "conv1_custom.weight", "down_tr64.ops.0.conv1.weight")  # first layers without a prefix
GROUP_TRANSFORMS = re.compile(r"^(backbone\.)?groupconv_[1-4]\.weight$")
# The last layer depends on the task: another number of classes leaves it random instead of refusing the file.
CLASSIFIERS = re.compile(
    r"(^|\.)(fc|conv_seg|side_heads\.\d|seg_head\.3|cls_score|bbox_pred|final_conv)\.(weight|bias)$"
)
STATISTICS = re.compile(r"\.(running_mean|running_var|num_batches_tracked)$")
# Published names on the left; this package's on the right.
PUBLISHED = (
    (re.compile(r"^stem\.0\."), "conv1."),  # torchvision's video ResNets
    (re.compile(r"^stem\.1\."), "bn1."),
    (re.compile(r"^(layer\d\.\d+)\.conv(\d)\.0\."), r"\1.conv\2."),
    (re.compile(r"^(layer\d\.\d+)\.conv(\d)\.1\."), r"\1.bn\2."),
    (re.compile(r"^neck\.decoder\.(\d)\.upsample\.interp_upsample\.1\."), r"neck.decoder.\1.reduce."),
    (re.compile(r"^neck\.decoder\.(\d)\.conv_block\.convs\."), r"neck.decoder.\1.fuse."),
    (re.compile(r"^neck\.lateral_convs\.(\d)\.conv\."), r"neck.inner_blocks.\1.0."),
    (re.compile(r"^neck\.fpn_convs\.(\d)\.conv\."), r"neck.layer_blocks.\1.0."),
    (re.compile(r"^rpn_head\.rpn_conv\."), "rpn.head.conv.0.0."),
    (re.compile(r"^rpn_head\.rpn_cls\."), "rpn.head.cls_logits."),
    (re.compile(r"^rpn_head\.rpn_reg\."), "rpn.head.bbox_pred."),
    (re.compile(r"^(roi_head\.)?bbox_head\.shared_fcs\.0\."), "roi_heads.box_head.fc6."),
    (re.compile(r"^(roi_head\.)?bbox_head\.shared_fcs\.1\."), "roi_heads.box_head.fc7."),
    (re.compile(r"^(roi_head\.)?bbox_head\.fc_cls\."), "roi_heads.box_predictor.cls_score."),
    (re.compile(r"^(roi_head\.)?bbox_head\.fc_reg\."), "roi_heads.box_predictor.bbox_pred."),
)


def rename(name: str, tensor: Tensor, target: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Give a tensor of a file the name, and the order of classes, that it has in a network with the names of `target`.

    A tensor that the network does not have comes back under its own name, without the prefixes of wrappers.
    """
    name = WRAPPERS.sub("", name)
    if name.startswith("roi_head.bbox_head.fc_cls."):  # MMDetection 2.x has the background last
        tensor = tensor.roll(1, 0)
    elif name.startswith("roi_head.bbox_head.fc_reg."):  # and no boxes for it
        tensor = torch.cat([torch.zeros_like(tensor[:4]), tensor])
    for pattern, replacement in PUBLISHED:
        name = pattern.sub(replacement, name)
    if any(first in target for first in BARE):  # the network is a bare encoder
        return name.removeprefix("backbone."), tensor
    inside = ENCODER.match(name) or GROUP_TRANSFORMS.match(name)
    return (f"backbone.{name}" if inside and not name.startswith("backbone.") else name), tensor


def rename_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a file the names they have in a bare `ResNet3D`, those of its encoder at least."""
    return dict(rename(name, tensor, {BARE[0]: None}) for name, tensor in tensors.items())


def in_unbuilt_stage(name: str, target: Mapping[str, Any]) -> bool:
    """Whether the network leaves out the whole stage that a tensor belongs to."""
    stage = re.match(r"^((backbone\.)?layer[1-4])\.", name)
    return stage is not None and not any(key.startswith(stage[1] + ".") for key in target)


def describe_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Say which ResNet, in 2D or 3D, has tensors of these names and shapes.

    Args:
        tensors: with the names of `ResNet3D`, bare or behind `backbone.` and wrappers.

    Returns:
        `depth`, `base_channels`, `in_channels`, `shortcut` and `norm` ("batch" or "group", which has the tensors of
        "instance" too), as arguments of `ResNet3D`; empty if these are not the tensors of one of its depths.
    """
    named = {WRAPPERS.sub("", name).removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    stem = named.get("conv1.weight")
    blocks = [{n.split(".")[1] for n in named if n.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in named
    found = [d for d, counts in LAYERS.items() if counts == tuple(map(len, blocks)) and (d >= 50) == bottleneck]
    if stem is None or not found:
        return {}
    return {
        "depth": found[0],
        "base_channels": stem.shape[0],
        "in_channels": stem.shape[1],
        "shortcut": "B" if "layer2.0.downsample.0.weight" in named else "A",
        "norm": "batch" if "bn1.running_mean" in named else "group",
    }
