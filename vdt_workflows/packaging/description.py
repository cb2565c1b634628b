"""What a packaged bundle says of itself: its metadata, its README, and what it needs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdt_workflows.files import hash_file, read_json
from vdt_workflows.naming import plain


def describe(metadata: dict[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt the metadata to a run's settings: labels, channels, and the network's input."""
    taken = metadata["network_data_format"]["inputs"]["image"]
    given = metadata["network_data_format"]["outputs"]["pred"]
    names = plain(settings.get("label_names") or settings.get("class_names"))
    if names and names != [*given["channel_def"].values()]:
        metadata["pred_classes"] = f"logits of the {len(names)} classes"
        if "label_names" in settings:
            metadata["task"] = f"Segmentation: {', '.join(names[1:])}"
    if names:
        given.update(num_channels=len(names), channel_def={str(i): name for i, name in enumerate(names)})
    if "crop_size" in settings:
        taken["spatial_shape"] = [settings["crop_size"]] * 3
    if "image_size" in settings:
        taken["spatial_shape"] = [3, settings["image_size"], settings["image_size"]]
    if "slices" in settings:
        taken["spatial_shape"] = [settings["slices"], *taken["spatial_shape"][1:]]
    scaling = [id for id in ("window", "mean", "std", "value_range") if id in settings]
    if any(settings[id] != defaults.get(id) for id in scaling):
        taken["value_range"] = []  # not that of the defaults
    if settings.get("mean") == "own":
        taken["format"] = "magnitude"
    if (modality := plain(settings.get("modality", "unknown"))) != "unknown":
        taken["modality"] = modality
    return metadata


def rename(metadata: dict[str, Any], bundle: str, name: str) -> None:
    """Let the metadata of a bundle show another name, whose last word says the task as the bundle's does.

    Raises:
        ValueError: if it does not, or is no name of a folder.
    """
    ending = f"_{bundle.rpartition('_')[2]}"
    if not re.fullmatch(rf"[a-z][a-z0-9_]*{ending}", name):
        raise ValueError(f"--name {name}: expected small letters, digits and _, ending in {ending} as {bundle} does")
    metadata["name"] = name[:1].upper() + name[1:].replace("_", " ")


def merge(metadata: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace values of the metadata, inside its objects too."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(metadata.get(key), dict):
            merge(metadata[key], value)
        else:
            metadata[key] = value


def read_scores(path: Path, weights: str) -> dict[str, float]:
    """Take the figures out of an evaluation's `scores.json`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has none, a Dice or an AUC is not from 0 to 1, or they are of a checkpoint that is there and
            holds other weights.
    """
    meant = "the scores.json that evaluation wrote"
    content = read_object(path, meant)
    found = {name: value for name, value in content.items() if isinstance(value, int | float)}
    if not found:
        raise ValueError(f"{path}: no figures in it; give {meant}")
    for name, value in found.items():
        if re.search("dice|auc", name) and not 0 <= value <= 1:
            raise ValueError(f"{path}: {name} is {value:g}; expected 0 to 1, give {meant}")
    run = content.get("_run_")
    scored = run.get("checkpoint") if isinstance(run, Mapping) else None
    if isinstance(scored, str) and os.path.isfile(scored) and hash_file(scored) != hash_file(weights):
        raise ValueError(
            f"{path}: the scores of {scored}, which holds other weights than {weights}; give {meant} of these"
        )
    return found


def read_object(path: Path, meant: str) -> dict[str, Any]:
    """Read a JSON file that holds an object; `meant` says which one to give."""
    content = read_json(path, meant)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; give {meant}")
    return content


def list_packages(metadata: Mapping[str, Any]) -> str:
    """List what the metadata require, one a line, as pip takes it."""
    versions = {"torch": "pytorch_version", "monai": "monai_version", "numpy": "numpy_version"}
    listed = {name: metadata[key] for name, key in versions.items()} | metadata["required_packages_version"]
    return "".join(f"{name}=={version}\n" for name, version in listed.items())


def write_readme(bundle: Path, has_weights: bool, url: str | None, name: str = "", title: str = "") -> str:
    """Write the zip's README: how to use it as it lies, then the bundle's own, with JSON for YAML.

    Args:
        bundle: the folder.
        has_weights: whether weights belong to the zip.
        url: where they lie, if not in it.
        name: of the zip's folder, that of the bundle by default.
        title: of a zip with a name of its own.
    """
    own, _, rest = (bundle / "docs" / "README.md").read_text().partition("\n")
    rest = re.sub(r"(configs/\w+)\.yaml", r"\1.json", rest)
    name = name or bundle.name
    if title:
        own, rest = (
            f"# {title}",
            f"\nIts configs, and the page from here on, are those of the bundle {bundle.name}.\n{rest}",
        )
    example = re.search(r"configs/inference\.json.*?(--dataset_dir .*?)\n```", rest, re.DOTALL)
    data = " ".join(example[1].replace("\\\n", " ").split()) if example else "--dataset_dir DATA"
    weights = "Its weights are `models/model.pt`; the settings that belong to them are the configs' defaults."
    if url:
        weights = (
            f"Its weights lie elsewhere; `python -m monai.bundle download_large_files --bundle_path {name}` fetches and"
            " checks them."
        )
    if not has_weights:
        weights = "It has no weights: train it, or put a `model.pt` into `models/`."
    return f"""{own}

This is a package of the bundle. It holds its code (`scripts/`) and works from any folder; the commands further below
are given from within it; the command `vdt`, which prepares data among others, comes with the package vdt-bundles alone.
{weights}

```bash
pip install -r {name}/docs/requirements.txt
python -m monai.bundle run --config_file {name}/configs/inference.json --bundle_root {name} \\
    {data}
```

```python
import monai

network = monai.bundle.load("{name}", bundle_dir=".", workflow_type="inference")
```
{rest}"""
