"""The key slices of a prepared DeepLesion data set, as items for the transforms, and batches of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdt_workflows.errors import check_choice
from vdt_workflows.files import read_json

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
Item = dict[str, Any]


def find_key_slices(dataset_dir: str | os.PathLike, *, noisy: str = "ignore") -> dict[str, list[Item]]:
    """List the key slices in `deeplesion.json`, which `vdt prepare deeplesion` writes, by split.

    Args:
        dataset_dir: its folder.
        noisy: what to do with lesions that DeepLesion marks as possibly noisy. "ignore" does not train on them, and in
            scoring a detection of one is neither a true nor a false positive; "drop" takes them for no lesions, and
            drops slices that have no other, as 3DCE and MULAN do; "keep" takes them for lesions, as the published code
            does.

    Returns:
        For `training`, `validation` and `test` items with `image` (path), `slice_interval` (mm), `box` (L, 4) and
        `label` (L,) to train on, and `truth`, the ground truth for scoring (arguments of `evaluation.KeySlice`).

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is not such a file, or `noisy` is unknown.
    """
    check_choice("noisy", noisy, ("ignore", "drop", "keep"))
    path = Path(dataset_dir) / "deeplesion.json"
    content = read_json(path, "the folder that vdt prepare deeplesion writes")
    try:
        found = {split: [_item(path.parent, entry, noisy) for entry in content[split]] for split in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a file of vdt prepare deeplesion ({type(error).__name__}: {error}); make it again"
        ) from error
    if noisy == "drop":
        found = {split: [item for item in items if len(item["truth"]["lesions"])] for split, items in found.items()}
    found["training"] = [item for item in found["training"] if len(item["box"])]
    logger.info("%s: %s key slices", path, ", ".join(f"{len(items)} {split}" for split, items in found.items()))
    return found


def _item(root: Path, entry: Mapping[str, Any], noisy: str) -> Item:
    doubtful = np.asarray(entry["noisy"], bool)
    trained = np.ones_like(doubtful) if noisy == "keep" else ~doubtful
    scored = trained if noisy == "drop" else np.ones_like(doubtful)
    boxes = np.asarray(entry["boxes"], np.float32).reshape(-1, 4)
    interval = entry["slice_interval"]
    if not (np.isfinite(boxes).all() and (boxes[:, :2] < boxes[:, 2:]).all() and 0 < interval < 100):
        raise ValueError(f"{entry['image']}: boxes {boxes.tolist()}, slice_interval {interval} mm")
    if {*entry["noisy"]} - {0, 1} or not len(boxes) == len(doubtful) == len(entry["types"]) == len(entry["diameters"]):
        raise ValueError(f"{entry['image']}: noisy {entry['noisy']}, for {len(boxes)} boxes")
    return {
        "image": str(root / entry["image"]),
        "slice_interval": interval,
        "box": boxes[trained],
        "label": np.ones(int(trained.sum()), np.int64),
        "truth": {
            "lesions": boxes[scored],
            "ignored": (doubtful & ~trained)[scored],
            "types": np.asarray(entry["types"], int)[scored],
            "diameters": np.array(entry["diameters"], float)[scored],  # None becomes NaN
            "slice_interval": interval,
            "patient": entry["patient"],
            "name": entry["image"],
        },
    }


def collate_key_slices(items: Sequence[Item]) -> dict[str, Any]:
    """Put key slices together for `prepare_key_slices`: stacks as one tensor, or a list where sizes differ.

    Returns:
        `image`, the stacks; `label`, for each a dictionary of `boxes` and `labels` to train on, `scale` and `truth`.
    """
    stacks = [torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items]
    same = len({stack.shape for stack in stacks}) == 1
    return {
        "image": torch.stack(stacks) if same else stacks,
        "label": [
            {
                "boxes": torch.as_tensor(item["box"]).float().reshape(-1, 4),
                "labels": torch.as_tensor(item["label"]).long().reshape(-1),
                "scale": item["scale"],
                "truth": item["truth"],
            }
            for item in items
        ],
    }


def prepare_key_slices(
    batch: Mapping[str, Any], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Any, Any, tuple, dict]:
    """Move a batch to the device and hand the targets to the network too: `prepare_batch` of MONAI's trainer.

    Returns:
        Stacks, labels, the further arguments of the network (the boxes to train on) and its keyword arguments.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, non_blocking=non_blocking)

    images = batch["image"]
    images = move(images) if isinstance(images, Tensor) else [move(image) for image in images]
    targets = [{name: move(label[name]) for name in ("boxes", "labels")} for label in batch["label"]]
    return images, batch["label"], (targets,), {}


def add_losses(losses: Mapping[str, Tensor], labels: Any = None) -> Tensor:
    """Add up what the detector returns in training: the `loss_function` of MONAI's trainer."""
    return torch.stack(list(losses.values())).sum()
