"""Load the weights people have into the networks of this package, and say what happened to every tensor."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Size, Tensor, nn

from networks.checkpoints import check_types, read_checkpoint
from networks.conversion import METHODS, to_3d
from networks.p3d import centre_weights
from networks.published_names import (
    BARE,
    CLASSIFIERS,
    ENCODER,
    GROUP_TRANSFORMS,
    STATISTICS,
    WRAPPERS,
    describe_encoder,
    in_unbuilt_stage,
    rename,
)
from networks.resnet3d import check_choice

logger = logging.getLogger(__name__)


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
        FileNotFoundError, ValueError: as `read_checkpoint`; ValueError also if `stem` or `conversion` is unknown, a
            tensor is of whole numbers where the network has floating-point ones, the file's kernels are 2D without a
            conversion or 3D with one, the encoder is not fully matched, or a tensor other than the last layer has
            another shape.
    """
    check_choice("stem", stem, ("sum", "mean"))
    check_choice("conversion", conversion, (None, *METHODS))
    own = network.state_dict()
    names = {WRAPPERS.sub("", name): name for name in own}
    target = {name: own[names[name]] for name in names}
    source = dict(rename(name, tensor, target) for name, tensor in read_checkpoint(path).items())
    check_types(path, source, target)
    report = LoadReport(os.fspath(path))
    _check_dimension(report.path, source, conversion)
    _merge_biases(source, target, report)
    new: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in list(source.items()):
        if GROUP_TRANSFORMS.match(name) and name in target and tensor.shape != target[name].shape:
            report.skipped[name] = f"for {tensor.shape[1]} slices, the network has {target[name].shape[1]}"
            del source[name]
            continue
        if name not in target:
            if STATISTICS.search(name) and STATISTICS.sub(".weight", name) in target:
                raise ValueError(
                    f"{path}: has batch norms ({name}), which a norm without running statistics cannot stand for;"
                    " build the network with norm 'batch'"
                )
            elif ENCODER.match(name) and not in_unbuilt_stage(name, target):
                problems.append(f"{name} is in the file only")
            else:
                report.skipped[name] = f"{type(network).__name__} has no such layer"
            continue
        fitted = _fit(name, tensor, target[name].shape, stem, conversion, report)
        if fitted.shape == target[name].shape:
            new[name] = fitted
            if fitted is tensor and name not in report.adapted:
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
        theirs, ours = describe_encoder(source), describe_encoder(target)
        kinds = [k for k in theirs if ours and k != "in_channels" and theirs[k] != ours[k]]
        differ = [f"{k} {theirs[k]!r}, here {ours[k]!r}" for k in kinds]
        raise ValueError(
            f"{path}: does not fit {type(network).__name__}, {len(problems)} tensors differ: {_few(problems)}."
            " Build the network with the depth, base_channels, shortcut and norm of the file"
            + (f" ({'; '.join(differ)})" if differ else "")
        )
    left = network.load_state_dict({names[name]: tensor for name, tensor in new.items()}, strict=False)
    assert not left.unexpected_keys
    logger.info("%s", report)
    return report


def _fit(name: str, tensor: Tensor, wanted: Size, stem: str, conversion: str | None, report: LoadReport) -> Tensor:
    """Inflate a 2D kernel, fold an RGB stem and fill up a thin one, where that gives the wanted shape."""
    if conversion is not None and tensor.dim() == 4 and len(wanted) == 5 and ENCODER.match(name):
        tensor = to_3d(tensor.float(), conversion)
        report.inflated.append(name)
    if not name.endswith("conv1.weight") or tensor.dim() != len(wanted):
        return tensor
    outputs, inputs, *taps = tensor.shape
    if inputs > 1 and wanted[1] == 1 and outputs == wanted[0] and taps[-2:] == list(wanted[-2:]):
        tensor = tensor.float().sum(1, keepdim=True) / (1 if stem == "sum" else inputs)
        report.folded.append(name)
    lacking = wanted[2] - taps[0] if len(wanted) == 5 else 0
    if lacking > 0 and lacking % 2 == 0 and (*tensor.shape[:2], *taps[1:]) == (*wanted[:2], *wanted[3:]):
        tensor = F.pad(tensor, [0, 0, 0, 0, lacking // 2, lacking // 2])
        report.adapted[name] = f"filled up with zeros from {taps[0]} to {wanted[2]} taps along depth"
    return tensor


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


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _few(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
