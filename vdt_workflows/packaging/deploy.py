"""A bundle's inference in MONAI's own classes, as MONAI Deploy's operator reads it from a `.ts` file.

The operator runs `preprocessing`, `inferer` and `postprocessing` where nothing of these packages is installed. So each
of our classes that an `inference.yaml` names is written as the MONAI classes that do the same; what an inferer of ours
does with a window becomes part of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from networks import VolumeLesionDetector
from vdt_workflows.evaluation.inference import SlabInferer, check_flips

Transforms = list[dict[str, Any]]

IMAGE = {"keys": "image"}
CUBE = {  # ids of the config that the crop of `CropNodule` without a position is written with
    "crop": {"_target_": "CenterSpatialCrop", "roi_size": "@size"},
    "resample": {
        "_target_": "SpatialResample",
        "mode": "bilinear",
        "padding_mode": "border",
        "align_corners": False,
        "dtype": "$torch.float32",
    },
    "corner": "$lambda x, step: (torch.tensor(x.shape[1:]) - 1) / 2 - step * (@size - 1) / 2",
    "grid": "$lambda x, step: x.affine.matmul(torch.cat([torch.cat([torch.diag(step), @corner(x, step)[:, None]], 1),"
    " torch.eye(4)[3:]]).to(x.affine))",
    "cube": "$lambda x, step: @crop(x) if (step - 1).abs().max() < 1e-3"
    " else @resample(x, dst_affine=@grid(x, step), spatial_size=[@size] * 3)",
}


class Mirrored(nn.Module):
    """A segmentation network whose answer to a window is the mean over its mirror images, see `SlabInferer`."""

    def __init__(self, network: nn.Module, flips: Sequence[Sequence[int]], order: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.dims = [[axis + 2 for axis in axes] for axes in flips]
        self.register_buffer("order", torch.tensor(order), persistent=False)  # of classes in a mirror image

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> logits (N, classes, X, Y, Z)."""
        logits = self.network(x)
        for dims in self.dims:
            mirrored = self.network(x.flip(dims)).flip(dims)
            logits = logits + (mirrored.index_select(1, self.order) if 2 in dims else mirrored)
        return logits / (len(self.dims) + 1)


class Shifted(nn.Module):
    """A segmentation network from whose logits a number is taken for each class."""

    def __init__(self, network: nn.Module, pull: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("pull", pull, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, X, Y, Z) -> logits (N, classes, X, Y, Z)."""
        return self.network(x) - self.pull


class Turned(nn.Module):
    """A classifier whose answer to a cube is the mean probability over its rotations, see `CubeInferer`."""

    def __init__(self, network: nn.Module, rotations: int) -> None:
        super().__init__()
        self.network = network
        self.rotations = rotations

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, X, X, X) -> the logarithm of the mean probabilities (N, classes)."""
        sides = [x]
        if self.rotations == 24:
            sides = [
                x,
                x.rot90(1, (2, 4)),
                x.rot90(2, (2, 4)),
                x.rot90(3, (2, 4)),
                x.rot90(1, (3, 4)),
                x.rot90(3, (3, 4)),
            ]
        total = self.network(x).softmax(1) * 0
        for side in sides:
            for k in range(4):
                total = total + self.network(side.rot90(k, (2, 3))).softmax(1)
        return (total / self.rotations).log()


class WholeVolume(nn.Module):
    """A volume detector as TorchScript takes it."""

    def __init__(self, detector: VolumeLesionDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor, interval: float) -> Tensor:
        """(1, 1, X, Y, Z) of slices `interval` mm apart -> boxes and scores (1, L, 7), see `VolumeLesionDetector`."""
        return self.detector.find(x[0, 0], interval)[None]


def complete_network(parser: ConfigParser) -> nn.Module:
    """Make a bundle's network, with what its inferer does to each window or cube inside."""
    network, inferer = parser.get_parsed_content("network_def"), _values(parser, "inferer")
    if "detector" in parser:
        detector = parser.get_parsed_content("detector").eval()
        detector.network = network
        return WholeVolume(detector)
    if flips := inferer.get("flips"):
        check_flips(flips, inferer.get("mirrored", (0, 1, 2)))
        order = list(range(int(parser.get_parsed_content("num_classes"))))
        for a, b in inferer.get("swap", ()):
            order[a], order[b] = order[b], order[a]
        network = Mirrored(network, flips, order)
    if inferer.get("class_weights", "none") != "none":
        pull = SlabInferer([1, 1, 1], class_weights=inferer["class_weights"]).pull
        assert pull is not None  # as there are weights
        network = Shifted(network, pull)
    if inferer.get("rotations", 1) != 1:
        network = Turned(network, inferer["rotations"])
    return network.eval()


def deploy_config(parser: ConfigParser) -> dict[str, Any]:
    """Write the config that the operator reads, out of that of a bundle's inference.

    Raises:
        ValueError: if a setting asks for what MONAI's classes do not do.
    """
    given = _values(parser, "inferer")
    inferer: dict[str, Any] | str = _inferer(given)
    logits = given.get("inversion") == "logits"
    out: dict[str, Any] = {"device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"}
    if "detector" in parser:
        out["imports"] = ["$import torchvision"]  # whose operators TorchScript finds once it is imported
        inferer = "$lambda inputs, network: network(inputs.as_tensor(), inputs.affine[:3, 2].norm().item())"
    for when in ("preprocessing", "postprocessing"):
        transforms = (step for entry in _values(parser, when)["transforms"] for step in _translate(entry, logits))
        out[when] = {"_target_": "Compose", "transforms": list(transforms)}
    if any("cube" in str(step.get("func")) for step in out["preprocessing"]["transforms"]):
        out |= {"size": parser.get_parsed_content("crop_size"), **CUBE}
    return {**out, "inferer": inferer}


def _inferer(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given["_target_"].rpartition(".")[2]
    if kind == "SlabInferer":
        if given.get("skip_below", "none") != "none":
            raise ValueError(f"skip_below {given['skip_below']}: MONAI's windows skip nothing; leave it out")
        kept = ("roi_size", "sw_batch_size", "overlap", "mode")
        return {"_target_": "SlidingWindowInferer", **{name: given[name] for name in kept if name in given}}
    if kind == "CubeInferer" and given.get("ensemble"):
        raise ValueError(f"ensemble {given['ensemble']}: a file has one network; export each by itself")
    return {"_target_": "SimpleInferer"}


def _translate(entry: Mapping[str, Any], logits: bool) -> Transforms:
    """Give the MONAI transforms that do what one of a bundle's does."""
    options = {name: value for name, value in entry.items() if name not in ("_target_", "_disabled_")}
    target = entry["_target_"]
    name = target.rpartition(".")[2]
    if entry.get("_disabled_") or name in ("SaveImaged", "SaveDicomSegd"):
        return []
    if name == "ConvertBoxModed":  # the last one of a detection
        return [dict(entry), {"_target_": "ConcatItemsd", "keys": ["box", "pred"], "name": "pred", "dim": 1}]
    if name in TRANSLATIONS:
        return TRANSLATIONS[name](options)
    if name == "RestoreGridd":
        argmax: dict[str, Any] = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
        invert: dict[str, Any] = {"_target_": "Invertd", "keys": "pred", "orig_keys": "image"}
        invert |= {"transform": "@preprocessing", "nearest_interp": not logits}
        return [invert, argmax] if logits else [argmax, invert]
    if target.startswith("vdt_"):
        raise ValueError(f"{target}: there is nothing in MONAI that is known to do the same")
    return [dict(entry)]


def _refuse(condition: str, sentence: str) -> Transforms:
    """Pass an image `x` on if a condition holds."""
    func = f"$lambda x: x if {condition} else (_ for _ in ()).throw(ValueError({sentence!r}))"
    return [{"_target_": "Lambdad", **IMAGE, "func": func}]


def _normalize(options: Mapping[str, Any]) -> Transforms:
    window, steps = options["window"], []
    if window != "none":
        low, high = options.get("ends") or window
        scale = {"a_min": window[0], "a_max": window[1], "b_min": low, "b_max": high, "clip": True}
        steps.append({"_target_": "ScaleIntensityRanged", **IMAGE, **scale})
    words = {"own": None, "none": 0.0}, {"own": None, "none": 1.0}
    mean, std = (
        of.get(value, value) if isinstance(value, str) else value
        for of, value in zip(words, (options["mean"], options["std"]), strict=True)
    )
    return [*steps, {"_target_": "NormalizeIntensityd", **IMAGE, "subtrahend": mean, "divisor": std}]


def _crop(options: Mapping[str, Any]) -> Transforms:
    spacing = options["spacing"]
    length = options["size"] * spacing
    enough = f"all(n * d > {length} - d - 1e-3 for n, d in zip(x.shape[1:], x.pixdim.tolist()))"
    refused = _refuse(enough, f"the image is smaller than the cube of {length:.4g} mm that the network takes")
    return [*refused, {"_target_": "Lambdad", **IMAGE, "func": f"$lambda x: @cube(x, {spacing} / x.pixdim)"}]


TRANSLATIONS: dict[str, Callable[[Mapping[str, Any]], Transforms]] = {
    "LoadImaged": lambda options: _refuse(
        "'original_affine' in x.meta", "the image has no affine, so that its voxel size is not known"
    ),
    "CheckFinited": lambda options: _refuse(
        "torch.isfinite(x).all()", "the image has NaN or infinite voxels; expected finite values"
    ),
    "CheckOverflowd": lambda options: (
        _refuse(
            "x.min() >= -32768 and x.max() <= 32767",
            "intensities of the image do not fit 16-bit signed integers, as HU do",
        )
        if options.get("modality", "CT") == "CT"
        else []
    ),
    "Spacingd": lambda options: [] if options["pixdim"] == "own" else [{"_target_": "Spacingd", **options}],
    "NormalizeWindowd": _normalize,
    "Lambda": lambda options: [  # unbatch_lesions
        {"_target_": "CopyItemsd", "keys": "pred", "names": "box"},
        {"_target_": "Lambdad", "keys": ["box", "pred"], "func": ["$lambda x: x[:, :6]", "$lambda x: x[:, 6:]"]},
    ],
    "CropNoduled": _crop,
}


def _values(parser: ConfigParser, id: str) -> dict[str, Any]:
    """Give a part of a config with the values of what it refers to; other expressions stay as they are written."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        if not (isinstance(value, str) and "@" in value):
            return value
        parser["_value_"] = value
        return parser.get_parsed_content("_value_")

    return plain(parser.get(id))
