"""Load the weights people have into the networks of this package, and say what happened to every tensor."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn

from networks.conversion import METHODS, check_method, to_3d
from networks.p3d import centre_weights
from networks.resnet3d import LAYERS

logger = logging.getLogger(__name__)

CONTAINERS = ("state_dict", "model", "network")
WRAPPERS = re.compile(r"^((module|_orig_mod|network)\.)+")  # DistributedDataParallel, torch.compile, DepthFirst
ENCODER = re.compile(r"^(backbone\.)?(conv1|bn1|conv1_custom|norm1|layer[1-4]|(down|up)_tr\d+)\.")
BARE = ("conv1.weight", "conv1_custom.weight", "down_tr64.ops.0.conv1.weight")  # first layers without a prefix
GROUP_TRANSFORMS = re.compile(r"^(backbone\.)?groupconv_[1-4]\.weight$")
# The last layer depends on the task: another number of classes leaves it random instead of refusing the file.
CLASSIFIERS = re.compile(r"(^|\.)(fc|conv_seg|seg_head\.3|cls_score|bbox_pred|final_conv)\.(weight|bias)$")
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


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did, by tensor name.

    Attributes:
        path: the file.
        matched: loaded as they are (a cast from half precision included).
        folded: stems whose RGB kernels were folded into one channel.
        inflated: 2D kernels that were made 3D.
        adapted: tensors that were changed otherwise so that they mean the same here, with what was done.
        centred: group transforms that the file does not have, and that were set to take the centre slice.
        skipped: tensors of the file that were not used, with the reason.
        left_random: tensors of the network that the file does not have; they keep their initial values.
    """

    path: str
    matched: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    centred: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_random: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.matched)} tensors matched, {len(self.folded)} folded,"
                 f" {len(self.skipped)} skipped, {len(self.left_random)} left random"]  # fmt: skip
        lines += [f"  folded to one channel: {name}" for name in self.folded]
        if self.inflated:
            lines.append(f"  made 3D ({len(self.inflated)}): {_few(self.inflated)}")
        lines += [f"  {what}: {name}" for name, what in self.adapted.items()]
        if self.centred:
            lines.append(f"  not in the file, set to the centre slice: {_few(self.centred)}")
        for reason in dict.fromkeys(self.skipped.values()):
            lines.append(f"  skipped, {reason}: {_few([k for k, v in self.skipped.items() if v == reason])}")
        if self.left_random:
            lines.append(f"  left random: {_few(self.left_random)}")
        return "\n".join(lines)


def load_whole(path: str | os.PathLike) -> Any:
    """Do what `torch.load` does on the CPU, without running code, and compare the checksums that it passes over.

    A file written by torch.save is a zip, whose checksums `torch.load` does not look at: a changed byte would be
    another weight. Files of before PyTorch 1.6 have no checksums; what was saved with checksums turned off
    (`torch.serialization.set_crc32_options`) is taken for damaged.

    Raises:
        BadZipFile: naming the part of the file whose checksum differs.
        Exception: whatever reading a damaged file raises.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)


def describe_damage(error: Exception) -> str:
    """Say in a few words what `load_whole` met: a checksum, or the kind of an error whose text nobody would read."""
    return str(error) if isinstance(error, zipfile.BadZipFile) else f"{type(error).__name__} while reading"


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, on the CPU, without running code from it.

    Takes a bare dictionary of tensors, or one inside `state_dict`, `model` or `network`; a state dict's
    metadata is kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file needs pickled code, is no checkpoint, is cut off, or holds no tensors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        content = load_whole(path)
    except Exception as error:  # a damaged pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"{path}: refused, because reading it would run code stored in the file (pickled objects);"
                " load it where you trust it, and save its state dict alone with torch.save"
            ) from error
        raise ValueError(
            f"{path}: not a whole PyTorch checkpoint ({describe_damage(error)});"
            " expected a file written by torch.save, so copy or download it again"
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = OrderedDict((name, value) for name, value in entries if isinstance(value, Tensor))
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; expected a state dict, bare or under one of {CONTAINERS}")
    tensors._metadata = getattr(content, "_metadata", {})  # type: ignore[attr-defined]  # as torch keeps it
    return tensors


def load_pretrained(
    network: nn.Module, path: str | os.PathLike, *, stem: str = "sum", conversion: str | None = None
) -> LoadReport:
    """Start `network` from the weights in `path`, whatever of the usual ways they were saved in.

    Understands the published names, bare or behind `module.` and `backbone.`, half precision, classifier heads, stems
    for RGB, 2D ResNets of torchvision and timm (`conversion`), video ResNets of 3D-ResNets-PyTorch and torchvision,
    MedicalNet and MONAI's ResNets, Models Genesis, detectors of MMDetection 1.x and 2.x, and networks wrapped in
    `DepthFirst`, `DistributedDataParallel` or `torch.compile`. Strides may differ between file and network, since they
    are not weights. The encoder must match as a whole, but for the group transform of MP3D: where the file has none it
    is set to take the centre slice, which is what the network without it does.

    Args:
        network: a network of this package; its tensors are overwritten in place, or not at all if an error is raised.
        path: the checkpoint file.
        stem: how three input kernels become one: "sum" answers to a grey volume as the RGB network answered to the
            grey image repeated three times; "mean" answers a third of it (the published README says averaged, the
            published tool sums).
        conversion: how the kernels of a 2D network become 3D: "i3d", "acs" or "2.5d" (see `networks.convert`); None
            takes a 3D network's file. Kernels that are 3D in the file are taken as they are.

    Returns:
        The report, which is also logged.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; ValueError also if `stem` or `conversion` is unknown, the
            file's kernels are 2D without a conversion or 3D with one, the encoder is not fully matched, or a tensor
            other than the last layer has another shape.
    """
    if stem not in ("sum", "mean"):
        raise ValueError(f"stem must be 'sum' or 'mean', got {stem!r}")
    if conversion is not None:
        check_method(conversion)
    names = {WRAPPERS.sub("", name): name for name in network.state_dict()}
    target = {WRAPPERS.sub("", name): tensor for name, tensor in network.state_dict().items()}
    source = dict(_native(name, tensor, target) for name, tensor in read_checkpoint(path).items())
    report = LoadReport(os.fspath(path))
    _check_dimension(report.path, source, conversion)
    _merge_biases(source, target, report)
    new: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in source.items():
        if name not in target:
            if STATISTICS.search(name) and STATISTICS.sub(".weight", name) in target:
                report.skipped[name] = "the network's norm keeps no running statistics"
            elif ENCODER.match(name) and not _stage_unbuilt(name, target):
                problems.append(f"{name} is in the file only")
            elif name not in report.skipped:
                report.skipped[name] = f"{type(network).__name__} has no such layer"
            continue
        wanted = target[name].shape
        inflate = conversion is not None and tensor.dim() == 4 and len(wanted) == 5 and bool(ENCODER.match(name))
        fitted = to_3d(tensor.float(), conversion) if inflate and conversion is not None else tensor
        fold = name.endswith("conv1.weight") and tensor.shape[1] > 1 and _is_rgb_stem(fitted.shape, wanted)
        if fold:
            fitted = fitted.float().sum(1, keepdim=True) / (1 if stem == "sum" else fitted.shape[1])
        pad = name.endswith("conv1.weight") and _is_thinner(fitted.shape, wanted)
        if pad:
            thickness = (wanted[2] - fitted.shape[2]) // 2
            fitted = F.pad(fitted, [0, 0, 0, 0, thickness, thickness])
        if fitted.shape == wanted:
            new[name] = fitted
            if fold:
                report.folded.append(name)
            if inflate:
                report.inflated.append(name)
            if pad:
                report.adapted[name] = f"filled up with zeros from {tensor.shape[2]} to {wanted[2]} taps along depth"
            if not (fold or inflate or pad or name in report.adapted):
                report.matched.append(name)
        elif CLASSIFIERS.search(name):
            report.skipped[name] = f"shape {_shape(tensor)} for other classes, the network has {_shape(target[name])}"
        else:
            problems.append(f"{name} is {_shape(tensor)} in the file, {_shape(target[name])} in the network")
    for name in [n for n in target if GROUP_TRANSFORMS.match(n) and n not in source]:
        new[name] = centre_weights(*target[name].shape[:2])
        report.centred.append(name)
    missing = [name for name in target if name not in new and not name.endswith("num_batches_tracked")]
    report.left_random.extend(name for name in missing if not ENCODER.match(name))
    problems += [f"{name} is in the network only" for name in missing if ENCODER.match(name) and name not in source]
    if problems:
        raise ValueError(
            f"{path}: does not fit {type(network).__name__}, {len(problems)} tensors differ: {_few(problems)}."
            f" Build the network with the depth, base_channels, shortcut and norm of the file{_told(source, target)}"
        )
    left = network.load_state_dict({names[name]: tensor for name, tensor in new.items()}, strict=False)
    assert not left.unexpected_keys
    logger.info("%s", report)
    return report


def describe_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tell from the names and shapes of a ResNet's tensors which one it is, in 2D or 3D.

    Args:
        tensors: with the names of `ResNet3D`, bare or behind `backbone.` and wrappers.

    Returns:
        `depth`, `base_channels`, `in_channels`, `shortcut` and `norm` ("batch" or "group", which has the tensors of
        "instance" too), as arguments of `ResNet3D`; empty if these are not the tensors of one of its depths.
    """
    named = {WRAPPERS.sub("", name).removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    stem = named.get("conv1.weight")
    blocks = [{n.split(".")[1] for n in named if n.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    kind = "layer1.0.conv3.weight" in named
    found = [d for d, counts in LAYERS.items() if counts == tuple(map(len, blocks)) and (d >= 50) == kind]
    if stem is None or not found:
        return {}
    return {
        "depth": found[0],
        "base_channels": stem.shape[0],
        "in_channels": stem.shape[1],
        "shortcut": "B" if "layer2.0.downsample.0.weight" in named else "A",
        "norm": "batch" if "bn1.running_mean" in named else "group",
    }


def native_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a file the names they have in a bare `ResNet3D`, those of its encoder at least."""
    return dict(_native(name, tensor, {BARE[0]: None}) for name, tensor in tensors.items())


def _told(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """Say which ResNet the file is, where it is another one than the network."""
    theirs, ours = describe_encoder(source), describe_encoder(target)
    differ = [
        f"{k} {theirs[k]!r}, here {ours[k]!r}" for k in theirs if ours and k != "in_channels" and theirs[k] != ours[k]
    ]
    return f" ({'; '.join(differ)})" if differ else ""


def _check_dimension(path: str, source: Mapping[str, Tensor], conversion: str | None) -> None:
    """Refuse 2D kernels where nothing says how they become 3D, and 3D ones where something does."""
    stem = next((source[n] for n in (f"backbone.{BARE[0]}", BARE[0]) if n in source), None)
    if stem is None:
        return
    if stem.dim() == 4 and conversion is None:
        raise ValueError(
            f"{path}: is a 2D network's file (its stem is {_shape(stem)}); say how its kernels become 3D, init"
            f" {', '.join(map(repr, METHODS))}"
        )
    if stem.dim() == 5 and conversion is not None:
        raise ValueError(
            f"{path}: is a 3D network's file (its stem is {_shape(stem)}), but {conversion!r} converts 2D ones, such as"
            " torchvision's; start from it with init 'vdt'"
        )


def _merge_biases(source: dict[str, Tensor], target: Mapping[str, Tensor], report: LoadReport) -> None:
    """Take the biases of MONAI's shortcuts into the running means of the norms behind them, which is the same."""
    for name in [n for n in source if n.endswith("downsample.0.bias") and n not in target]:
        mean = name.replace("downsample.0.bias", "downsample.1.running_mean")
        if mean in source and mean in target:
            bias = source.pop(name)
            source[mean] = source[mean] - bias
            report.adapted[mean] = "less the bias of the convolution before it"


def _native(name: str, tensor: Tensor, target: Mapping[str, Any]) -> tuple[str, Tensor]:
    """Give a tensor of a file the name, and the order of classes, that the network has for it, if it has it."""
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


def _is_rgb_stem(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a kernel is for several input channels where one is wanted; it may be thinner along depth as well."""
    return len(shape) == len(wanted) and wanted[1] == 1 and shape[0] == wanted[0] and shape[-2:] == wanted[-2:]


def _is_thinner(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a 3D kernel is the wanted one, but for an even number of taps missing along depth."""
    same = len(shape) == len(wanted) == 5 and (*shape[:2], *shape[3:]) == (*wanted[:2], *wanted[3:])
    return same and shape[2] < wanted[2] and (wanted[2] - shape[2]) % 2 == 0


def _stage_unbuilt(name: str, target: Mapping[str, Any]) -> bool:
    """Whether the network leaves out the whole stage that the tensor belongs to."""
    stage = re.match(r"^((backbone\.)?layer[1-4])\.", name)
    return stage is not None and not any(key.startswith(stage[1] + ".") for key in target)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _few(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
