"""Features of volumes from a frozen encoder, as a table: what a probe, a search or a clustering begins with.

    vdt embed VOLUMES --output features.csv
    vdt embed NODULES --output features.csv --weights encoder.pt --size 64 --spacing 0.5

In Python, `embed(load_encoder("encoder.pt"), volumes)` gives the features of a tensor (N, 1, D, H, W).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks import ResNet2D, ResNet3D, describe_encoder, load_pretrained, read_checkpoint
from networks.published_names import WRAPPERS
from vdt_workflows.data.headers import check_checksum
from vdt_workflows.data.nodule_tables import list_nodules, read_nodules
from vdt_workflows.data.sampling import without_wrapping
from vdt_workflows.data.volume_files import case_name, patient_of
from vdt_workflows.data.volumes import list_volumes
from vdt_workflows.errors import check_choice
from vdt_workflows.files import write_csv, write_json
from vdt_workflows.naming import result_name
from vdt_workflows.progress import track
from vdt_workflows.training.initialisation import describe_weights, pick_norm
from vdt_workflows.training.shipped import locate_weights

logger = logging.getLogger(__name__)

CHEST = {"window": (-1024.0, 400.0), "mean": -471.16, "std": 430.0}  # HU; 99 and 77 of 0..255, as of the LIDC bundles
OWN = {"window": "none", "mean": "own", "std": "own"}
SHIPPED = "vdt_resnet3d18_w16"
SLICES = 64  # that a 2D network takes at once


class PooledEncoder(nn.Module):
    """The means of an encoder's four maps over all their places: (N, 1, D, H, W) -> (N, features).

    Every value of a map counts the same, whatever the size of the volume, so that crops and whole scans are alike. A 2D
    network is given the slices one by one, each with its two neighbours as colours, or thrice where it has one; its
    features are averaged over the slices.

    Args:
        network: a `ResNet3D` that returns four maps, or a `ResNet2D`.
        colours: what a `ResNet2D` of three channels takes as colours, "neighbours" or "repeat" (the slice itself).

    Attributes:
        names: of the features: `stage1_000` and so on.
    """

    def __init__(self, network: ResNet3D | ResNet2D, colours: str = "neighbours") -> None:
        super().__init__()
        check_choice("colours", colours, ("neighbours", "repeat"))
        self.network = network
        self.colours = colours
        self.eval()
        with torch.inference_mode():
            maps = self._pool(torch.zeros(1, 1, 8, 32, 32))
        self.names = [f"stage{i}_{j:03d}" for i, part in enumerate(maps, 1) for j in range(part.shape[1])]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> (N, features)."""
        return torch.cat(self._pool(x), 1)

    def _pool(self, x: Tensor) -> list[Tensor]:
        if isinstance(self.network, ResNet3D):
            return [part.mean((2, 3, 4)) for part in self.network(x)]
        depth = torch.arange(x.shape[2], device=x.device)
        shifts = (0,) if self.network.conv1.in_channels == 1 else (0, 0, 0) if self.colours == "repeat" else (-1, 0, 1)
        images = torch.stack([x[:, 0, (depth + s).clamp(0, len(depth) - 1)] for s in shifts], 2).flatten(0, 1)
        pooled = [torch.cat(parts) for parts in zip(*map(self._pool_images, images.split(SLICES)), strict=True)]
        return [part.unflatten(0, (len(x), len(depth))).mean(1) for part in pooled]

    def _pool_images(self, images: Tensor) -> list[Tensor]:
        pooled = []
        for name, layer in self.network.named_children():
            images = layer(images)
            pooled += [images.mean((2, 3))] if name.startswith("layer") else []
        return pooled


def load_encoder(
    weights: str | os.PathLike = SHIPPED,
    *,
    norm: str = "file",
    untrained: int | None = None,
    depth_stride: bool = True,
    colours: str = "neighbours",
) -> PooledEncoder:
    """Make the network that a file of weights is of, frozen, and load it.

    Args:
        weights: a name that `vdt weights` lists, what the pre-training writes, in 3D or 2D, or any file of a ResNet
            that `networks.load_pretrained` reads.
        norm: "file" takes the one that the file names or shows; "batch", "group" or "instance" where it does not say
            which: files without their architecture cannot tell group from instance norm.
        untrained: a seed: the same network with weights drawn at random, what trained ones are compared with.
        depth_stride: whether a 3D network strides along the depth too, as when it is fine-tuned.
        colours: see `PooledEncoder`.

    Raises:
        FileNotFoundError, ValueError: if the file cannot be used (see `networks.read_checkpoint` and
            `networks.load_pretrained`), or is not of a ResNet; ValueError if an argument is none of these.
    """
    check_choice("norm", norm, ("file", "batch", "group", "instance"))
    weights = locate_weights(weights)
    tensors = read_checkpoint(weights)
    found = describe_encoder(tensors)
    if not found:
        raise ValueError(f"{weights}: not the weights of a ResNet; expected an encoder, in 3D or 2D")
    named = {WRAPPERS.sub("", name).removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    chosen = pick_norm("vdt", weights) if norm == "file" else norm
    size = {"base_channels": found["base_channels"], "norm": chosen}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(untrained or 0)
        network: ResNet3D | ResNet2D
        if named["conv1.weight"].dim() == 4:
            network = ResNet2D(found["depth"], in_channels=found["in_channels"], **size)
        else:
            shape = {"depth_stride": depth_stride, "shortcut": found["shortcut"]}
            network = ResNet3D(found["depth"], out_indices=(0, 1, 2, 3), **shape, **size)
    if untrained is None and isinstance(network, ResNet3D):
        load_pretrained(network, weights)
    elif untrained is None:
        own = network.state_dict()
        if differ := [name for name in own if named.get(name, own[name]).shape != own[name].shape]:
            raise ValueError(f"{weights}: {differ[0]} has another shape than that of a ResNet of its depth and width")
        if absent := [n for n in own if n not in named and not n.endswith("num_batches_tracked")]:
            raise ValueError(f"{weights}: lacks {len(absent)} tensors of its encoder, such as {absent[0]}")
        network.load_state_dict({name: named.get(name, own[name]) for name in own})
    return PooledEncoder(network, colours).eval().requires_grad_(False)


def embed(encoder: nn.Module, volumes: Tensor, *, batch_size: int = 8, device: str | torch.device = "cpu") -> Tensor:
    """Give the features of volumes of one size, without gradients.

    Args:
        encoder: what `load_encoder` gives, or any module that maps (N, 1, D, H, W) to (N, features).
        volumes: (N, 1, D, H, W), depth first, normalised as in training; or one (D, H, W).
        batch_size: volumes at once.
        device: where it is done.

    Returns:
        (N, features), on the CPU.

    Raises:
        ValueError: if the shape is another, or a feature is not finite, as where the volumes hold NaN.
    """
    x = volumes[None, None] if volumes.dim() == 3 else volumes
    if x.dim() != 5 or x.shape[1] != 1 or not x.numel():
        raise ValueError(f"volumes must have the shape (N, 1, D, H, W) or (D, H, W), got {tuple(volumes.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    encoder = encoder.to(device).eval()
    with torch.inference_mode():
        features = torch.cat([encoder(part.float().to(device)).cpu() for part in x.split(batch_size)])
    if not features.isfinite().all():
        raise ValueError("the features of some volumes are not finite; the volumes or the weights hold NaN or infinity")
    return features


def embed_volumes(
    volumes: str,
    output: str,
    *,
    weights: str = SHIPPED,
    size: int | None = None,
    spacing: float | Sequence[float] | None = None,
    window: Sequence[float] | str | None = None,
    mean: Any = None,  # a number or a word
    std: Any = None,
    positions: str = "none",
    norm: str = "file",
    untrained: int | None = None,
    depth_stride: bool = True,
    colours: str = "neighbours",
    batch_size: int = 8,
    device: str = "auto",
    geometry: str = "refuse",
    irregular: str = "refuse",
    on_error: str = "raise",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the features that a frozen encoder gives to volumes or nodules: a row each, beside what is known of them.

    The features are the means of the four maps (`stage1_000` to `stage4_127`, for a width of 16). How they were made
    is written beside the table, as JSON.

    Args:
        volumes: a volume file, a folder of volumes or of DICOM series; or a folder of nodules with its nodules.csv, of
            which patient, ratings and diameter go into the table.
        output: the table, a CSV.
        weights: file of the encoder, 3D or 2D, or a name that `vdt weights` lists.
        size: voxels of a cube about the centre or each position, after resampling; by default 48 for nodules, and the
            whole volume else.
        spacing: voxel size in mm, one or three as X, Y, Z; by default 1 for cubes, and for volumes that of each.
        window: HU or other intensity that values are clipped to, or none; by default [-1024,400] for nodules.
        mean: what is subtracted after clipping, or own (of each volume) or none; by default -471.16 HU for nodules and
            own else.
        std: what the rest is divided by; by default 430 HU for nodules and own else.
        positions: a CSV or mask of the nodules in one scan, see the nodule classification.
        norm: file, or batch, group or instance where the file does not tell.
        untrained: a seed, for random weights in the place of the file's.
        depth_stride: whether a 3D network strides along the depth too.
        colours: neighbours or repeat: what a 2D network takes as colours of a slice.
        batch_size: cubes at once; volumes are taken one by one.
        device: cpu, cuda or auto.
        geometry: refuse files whose header contradicts itself, or take their sform or qform.
        irregular: refuse or accept DICOM series with missing or uneven slices.
        on_error: raise, or skip: leave out volumes that cannot be used, name and count them.
        overwrite: whether an output of the same name is replaced.

    Returns:
        `rows`, `features` and `left_out` (how many), and `output`.

    Raises:
        FileExistsError: if there is an output already.
        FileNotFoundError, ValueError: if volumes or weights cannot be used, or an argument is none of the above.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if Path(output).suffix.lower() == ".json":
        raise ValueError(
            f"output {output}: expected a name as features.csv; the settings are written beside it, as .json"
        )
    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"{output}: exists; give another --output, or --overwrite")
    nodules = positions != "none" or Path(volumes, "nodules.csv").is_file()
    usual = CHEST if nodules else OWN
    given = {"window": window, "mean": mean, "std": std}
    scale: dict[str, Any] = {name: usual[name] if value is None else value for name, value in given.items()}
    size = 48 if size is None and nodules else size
    step: Any = spacing if spacing is not None else 1.0 if size else "own"
    prepare = _make_transform(size, step, scale, geometry, irregular)
    weights = locate_weights(weights)
    encoder = load_encoder(weights, norm=norm, untrained=untrained, depth_stride=depth_stride, colours=colours)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    items = _list_items(volumes, positions, nodules, geometry=geometry, irregular=irregular, on_error=on_error)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    waiting: list[tuple[dict[str, Any], Tensor]] = []

    def flush() -> None:
        found = embed(encoder, torch.stack([volume for _, volume in waiting]), batch_size=batch_size, device=device)
        values = [[f"{value:.7g}" for value in row.tolist()] for row in found]
        rows.extend(
            {**n, **dict(zip(encoder.names, v, strict=True))} for (n, _), v in zip(waiting, values, strict=True)
        )
        waiting.clear()

    for known, volume in _prepare(track(items, len(items), "embedded"), prepare, on_error, left_out):
        waiting.append((known, volume))
        if len(waiting) == (batch_size if size else 1):
            flush()
    if waiting:
        flush()
    if not rows:
        raise ValueError(f"{volumes}: none of the {len(items)} volumes can be used, see above")
    columns = [name for name in rows[0] if name not in {*encoder.names}]
    write_csv(output, rows, [*columns, *encoder.names])
    settings = {"size": size, "spacing": step, **scale, "depth_stride": depth_stride, "colours": colours}
    origin = {"weights": describe_weights(weights), "untrained": untrained, "norm": norm}
    write_json(Path(output).with_suffix(".json"), {**settings, **origin, "volumes": volumes, "left_out": left_out})
    return {"output": output, "rows": len(rows), "features": len(encoder.names), "left_out": len(left_out)}


def _make_transform(size: int | None, spacing: Any, scale: Mapping[str, Any], geometry: str, irregular: str) -> Any:
    """Read, orient, cut or resample, and normalise, as the bundles do."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

    from vdt_transforms import CheckFinited, CheckOverflowd, CropNoduled, NoduleReader, NormalizeWindowd, Spacingd

    if size is not None and (isinstance(scale["window"], str) or isinstance(spacing, str | Sequence)):
        raise ValueError("size needs a window, whose lower end fills what lies outside, and one spacing in mm")
    cut = Spacingd("image", spacing, mode="bilinear")
    if size is not None:
        cut = CropNoduled("image", size, spacing, fill=float(scale["window"][0]))
    reader = NoduleReader(geometry=geometry, irregular=irregular)
    steps = [LoadImaged("image", reader=reader), EnsureChannelFirstd("image"), CheckFinited("image")]
    steps += [] if scale["mean"] == "own" else [CheckOverflowd("image")]
    steps += [Orientationd("image", axcodes="RAS", labels=None), cut, NormalizeWindowd("image", **scale)]
    return Compose(steps)


def _list_items(volumes: str, positions: str, nodules: bool, *, on_error: str, **options: str) -> list[dict[str, Any]]:
    """List what is read, each `image` beside what is `known` of it."""
    if positions != "none":
        return [{**scan, "known": {}} for scan in list_nodules(volumes, positions, **options)]
    if not nodules:
        listed = list_volumes(volumes, on_error=on_error, **options)
        names = [(result_name(case["image"]), patient_of(case), case["image"]) for case in listed]
        return [  # a patient that the name does not tell is one of its own
            {"image": image, "known": {"volume": name, "patient_id": name if os.path.isabs(patient) else patient}}
            for name, patient, image in names
        ]
    keys = ("nodule_id", "patient_id", "malignancy_mode", "malignancy_mean", "diameter_mm")
    return [{"image": n["image"], "known": {k: n[k] for k in keys}} for n in read_nodules(Path(volumes))]


def _prepare(
    items: Iterator[dict[str, Any]], transform: Any, on_error: str, left_out: list[str]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Give what is known of each volume or cube, and its voxels (1, D, H, W)."""
    for item in items:
        try:
            if os.path.isfile(item["image"]):
                check_checksum(item["image"])
            prepared = transform(item)
        except (RuntimeError, ValueError, OSError) as wrapped:
            error = without_wrapping(wrapped)
            if on_error == "raise" or not isinstance(error, ValueError | OSError):
                raise error from None
            logger.warning("%s; the volume is left out", error)
            left_out.append(case_name(Path(item["image"])))
            continue
        for one in prepared if isinstance(prepared, list) else [prepared]:
            known = {**one["known"], **({"nodule_id": one["nodule_id"]} if "nodule_id" in one else {})}
            yield known, one["image"].as_tensor().permute(0, 3, 2, 1)
