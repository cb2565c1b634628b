"""A bundle as a folder that Hugging Face's hub takes as it is.

    vdt package bcv_multiorgan_segmentation --weights hippocampus_mr_w16 --hub OWNER/NAME

Beside the files of the zip it has the model card with its front matter, the weights as safetensors for readers other
than MONAI, and `SHA256SUMS`. The bundle itself loads `models/model.pt`, as MONAI does.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from networks import read_checkpoint
from vdt_workflows.training.shipped import Weights

SCHEMA = "https://project-monai.github.io/schema/meta_schema_hf_20250321.json"
CODE_LICENSE = "apache-2.0"
SUMS, CARD = "SHA256SUMS", "README.md"
TASKS = {  # by a bundle's last word, the hub's name for the task, and the metric
    "segmentation": ("image-segmentation", "dice"),
    "classification": ("image-classification", "roc_auc"),
    "detection": ("object-detection", "froc"),
    "pretraining": ("image-feature-extraction", "accuracy"),
}


def make_hub_files(
    repo: str,
    name: str,
    files: Mapping[str, bytes],
    metadata: Mapping[str, Any],
    weights: str | None,
    origins: Sequence[Weights],
) -> dict[str, bytes]:
    """Add to the files of a zip what the hub asks for.

    Args:
        repo: of the hub, as OWNER/NAME.
        name: of the package.
        files: of the zip, by path.
        metadata: of the package, which get the hub's schema and the address.
        weights: the `model.pt` in it, if there is one.
        origins: shipped weights that the package's own rest on, the nearest first.

    Raises:
        ValueError: if the repository is no OWNER/NAME, or the weights are to lie elsewhere.
        ImportError: if safetensors is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(repo)):
        raise ValueError(f"--hub {repo}: expected a repository of the hub, as OWNER/{name}")
    if "large_files.yml" in files:
        raise ValueError("--weights_url: the hub's folder holds the weights themselves; leave it out")
    out = dict(files)
    meta = {**metadata, "schema": SCHEMA, "huggingface_url": f"https://huggingface.co/{repo}"}
    out["configs/metadata.json"] = (json.dumps(meta, indent=4) + "\n").encode()
    if weights:
        out["models/model.safetensors"] = to_safetensors(weights)
    out[CARD] = write_card(repo, name, files["docs/README.md"].decode(), meta, origins).encode()
    sums = (f"{hashlib.sha256(out[path]).hexdigest()}  {path}\n" for path in sorted(out))
    return {**out, SUMS: "".join(sums).encode()}


def to_safetensors(model: str) -> bytes:
    """Give the state dict of a checkpoint in the format of safetensors, with the same names and types."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "--hub writes the weights as safetensors too, which is not installed; pip install safetensors (the extra"
            " [hub] has it)"
        ) from error
    return save({key: value.clone().contiguous() for key, value in read_checkpoint(model).items()}, {"format": "pt"})


def write_card(repo: str, name: str, readme: str, metadata: Mapping[str, Any], origins: Sequence[Weights]) -> str:
    """Write the model card: front matter, how to fetch it, the card of shipped weights, and the README."""
    image = metadata["network_data_format"]["inputs"]["image"]
    task, metric = TASKS[name.rpartition("_")[2]]
    front = {
        "library_name": "monai",
        "license": origins[0].license.lower() if origins else CODE_LICENSE,
        "pipeline_tag": task,
        "tags": ["monai", "medical", "3d", *([image["modality"].lower()] if "modality" in image else [])],
        "datasets": sorted({data for origin in origins for data in origin.datasets}),
        "metrics": [metric],
    }
    title, _, rest = readme.partition("\n")
    for origin in origins:
        text = origin.text.partition("\n---\n")[2].partition("\n# ")[2]  # without front matter, from its name on
        rest += "\n## The weights " + re.sub(r"^## ", "### ", text, flags=re.MULTILINE)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

{title}

```bash
python -m monai.bundle download --name {name} --source huggingface_hub --repo {repo} --bundle_dir .
```

`models/model.safetensors` holds the tensors of `models/model.pt` for other readers; `sha256sum -c {SUMS}` checks all.
{rest}"""


def write_folder(folder: Path, files: Mapping[str, bytes], overwrite: bool) -> str:
    """Write a folder whole or not at all, and return its path.

    Raises:
        FileExistsError: if one with other content is there, unless this function wrote it and `overwrite` is on.
    """
    if folder.exists():
        ours = (folder / SUMS).is_file()
        if ours and (folder / SUMS).read_bytes() == files[SUMS]:
            return str(folder)
        if not (ours and overwrite):
            raise FileExistsError(f"{folder}: is there with other content; {'give --overwrite' if ours else 'move it'}")
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path, content in files.items():
        (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / path).write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return str(folder)
