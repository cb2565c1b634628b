"""Turn the weights people have into a file of a native 3D encoder, or of MONAI's, tensor by tensor.

    vdt convert --source resnet18.pth --output encoder.pt --init i3d

The file written is what every bundle takes by --init vdt --pretrained encoder.pt. With --target monai it is what
`monai.networks.nets.resnet18(pretrained="encoder.pt", spatial_dims=3, n_input_channels=1, feed_forward=False, ...)`
takes.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

from networks import LoadReport, ResNet3D, describe_encoder, load_pretrained, read_checkpoint
from networks.conversion import METHODS
from networks.published_names import rename_encoder
from vdt_workflows.errors import check_choice
from vdt_workflows.files import save_atomic, write_json
from vdt_workflows.training.checkpoints import save_weights

TARGETS = ("native", "monai")
MONAI: dict[str, Any] = {  # what MONAI's networks must be called with to be the written one
    "spatial_dims": 3,
    "n_input_channels": 1,
    "conv1_t_size": 7,
    "conv1_t_stride": 2,
    "feed_forward": False,
    "bias_downsample": False,
}
LOSSY = (
    "MONAI's ResNet strides the slice axis in its stem, its max-pool and three stages, as networks of this package with"
    " depth_stride=True do; an encoder trained without (VDT pre-training) keeps its weights, not its answers, and needs"
    " fine-tuning there. Other stems and strides (the U-Net's) do not exist there"
)


def convert_weights(
    source: str,
    output: str,
    *,
    init: str | None = None,
    stem: str = "sum",
    target: str = "native",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a file of weights.

    Args:
        source: an encoder, alone or within a classifier or a segmentation network: of this package, MedicalNet, MONAI's
            ResNet or a video ResNet; or a 2D ResNet of torchvision, timm or the pre-training bundle.
        output: the file to write; a report lies beside it, its suffix replaced by .json.
        init: how 2D kernels become 3D: i3d, acs or 2.5d.
        stem: how an RGB stem becomes one for grey volumes: sum or mean (see `networks.load_pretrained`).
        target: native (this package) or monai (`monai.networks.nets.resnet*`).
        overwrite: replace an existing output.

    Returns:
        The output, the architecture, how many tensors were copied, summed, inflated, changed otherwise or dropped, and
        what is lost, if anything.

    Raises:
        ValueError: if an argument is not one of these values, or the source does not hold such a network.
        FileNotFoundError: if there is no such source.
        FileExistsError: if the output exists.
    """
    check_choice("target", target, TARGETS)
    if init is not None and init not in METHODS:
        raise ValueError(f"init must be one of {METHODS}, or left out for a 3D source, got {init!r}")
    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already; name another output, or add --overwrite")
    tensors = rename_encoder(read_checkpoint(source))
    architecture = describe_encoder(tensors)
    if not architecture:
        raise ValueError(
            f"{source}: holds no ResNet of 18, 34, 50, 101 or 152 layers; its first tensor is {next(iter(tensors))}"
        )
    if target == "monai" and architecture["norm"] != "batch":
        raise ValueError(f"{source}: has no running statistics; target 'monai' takes networks with batch norm alone")
    network = ResNet3D(**{**architecture, "in_channels": 1})
    record = _record(load_pretrained(network, source, stem=stem, conversion=init))
    if target == "native":
        save_weights(network, output, {"source": Path(source).name, "init": init, "stem": stem})
    else:
        save_atomic(OrderedDict(network.state_dict().items()), output)
    return _write_report(output, source, architecture, record, target)


def _record(report: LoadReport) -> dict[str, str]:
    """Say for each tensor what became of it."""
    summed = dict.fromkeys(report.folded, "summed over the channels of its input")
    record = dict.fromkeys(report.matched, "copied")
    for changes in (summed, dict.fromkeys(report.inflated, "inflated"), report.adapted):
        for name, what in changes.items():
            record[name] = f"{record[name]}, {what}" if name in record else what
    return record | {name: f"dropped, {why}" for name, why in report.skipped.items()}


def _write_report(
    output: str, source: str, architecture: dict[str, Any], record: dict[str, str], target: str
) -> dict[str, Any]:
    kinds = ("copied", "summed", "inflated", "dropped")
    result: dict[str, Any] = {"output": output, "source": source, "target": target, "architecture": architecture}
    result |= {kind: sum(kind in what for what in record.values()) for kind in kinds}
    result["changed"] = sum(not any(kind in what for kind in kinds) for what in record.values())
    result["lost"] = [LOSSY] if target == "monai" else []
    if target == "monai":
        width = architecture["base_channels"]
        result["call"] = {**MONAI, "shortcut_type": architecture["shortcut"]}
        if width != 64:  # resnet18 and its like have no other width, the class ResNet has
            result["call"]["block_inplanes"] = [width * 2**stage for stage in range(4)]
    write_json(Path(output).with_suffix(".json"), {**result, "tensors": record})
    return result
