"""Write a bundle's network as one file that tells what it is: TorchScript for MONAI Deploy, or ONNX.

    vdt export bcv_multiorgan_segmentation --weights hippocampus_mr_w16 -o hippocampus.ts
    vdt export lits_liver_segmentation --weights bundles/lits_liver_segmentation/models/model.pt -o liver.onnx

Both have the metadata of the bundle and the settings of the weights: spacing, window, mean, patch, labels, axes. A
`.ts` file also has the whole inference in MONAI's own classes, so that MONAI Deploy's bundle operator runs it alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from monai.utils import optional_import
from torch import nn

from networks import LesionDetector
from vdt_workflows.files import hash_file
from vdt_workflows.locator import find_bundles
from vdt_workflows.naming import plain
from vdt_workflows.packaging.deploy import complete_network, deploy_config
from vdt_workflows.packaging.description import describe, merge, read_object, rename
from vdt_workflows.packaging.detector_graph import DetectorGraph
from vdt_workflows.packaging.package import read_run, to_json
from vdt_workflows.training.checkpoints import check_settings, load_weights
from vdt_workflows.training.shipped import RECORD, list_weights, locate_weights

AXES = ("batch", "channel", "width", "height", "depth")  # of MONAI's order: X, Y, Z
COLUMNS = ("x1", "y1", "x2", "y2", "score", "label")  # of a row of the detector
SETTINGS = (  # that belong to what the network takes and gives, as far as a bundle has them
    *("label_names", "class_names", "spacing", "window", "mean", "std", "value_range", "patch_size", "crop_size"),
    *("size", "slices", "distance", "overlap", "blending", "inversion", "largest_component", "flips", "rotations"),
    *("class_weights", "threshold", "least_score", "grey", "image_size", "modality"),
)


def export_bundle(
    bundle: str,
    output: str,
    weights: str,
    run: str | None = None,
    name: str | None = None,
    metadata: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a trained network as TorchScript or ONNX, with what it takes and gives in the file.

    Args:
        bundle: a folder of `bundles/`.
        output: the file, ending in .ts or .onnx. MONAI Deploy finds nothing in a `.ts` that gets another name later.
        weights: a `model.pt` that training wrote, or the name of shipped weights.
        run: the `run.json` of that training; by default the one beside the weights.
        name: that the metadata show, that of the bundle by default; it ends as that does.
        metadata: a JSON file whose values replace those of the metadata: authors, version and its changelog, ...
        settings: --NAME VALUE for any setting of the bundle's inference, such as inversion or flips.

    Returns:
        The file, its size in MB, and its SHA-256.

    Raises:
        FileNotFoundError: if there is no such bundle or file.
        ValueError: if the weights do not fit the settings, or the file cannot hold what a setting asks for.
        ImportError: if ONNX's packages, the extra "export", are not installed.
    """
    source = find_bundles() / bundle
    config_file = source / "configs" / "inference.yaml"
    if not config_file.is_file():
        known = sorted(path.parent.name for path in find_bundles().glob("*/configs"))
        raise FileNotFoundError(f"{bundle}: no such bundle; there are {', '.join(known)}")
    kind = Path(output).suffix
    if kind not in (".ts", ".onnx"):
        raise ValueError(f"output {output}: must end in .ts or .onnx")
    shipped = list_weights().get(weights)
    path = Path(locate_weights(weights))
    run_file = Path(run) if run else path.parent / RECORD
    taken, _ = read_run(run_file)
    check_settings(run_file, path)
    defaults = ConfigParser.load_config_file(str(config_file))
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise ValueError(f"--{unknown[0]}: no setting of {bundle}'s inference")
    parser = ConfigParser({**defaults, **taken, **settings, "device": "cpu"})
    load_weights(parser.get_parsed_content("network_def"), path)
    meta = describe(json.loads((source / "configs" / "metadata.json").read_text()), {**taken, **settings}, defaults)
    if name:
        rename(meta, bundle, name)
    if shipped:
        merge(meta, {**shipped.metadata, "license": shipped.license})
    if metadata:
        merge(meta, read_object(Path(metadata), "--metadata, an object as metadata.json"))
    meta["settings"] = {id: plain(parser.get_parsed_content(id)) for id in SETTINGS if id in defaults}
    meta["weights_sha256"] = hash_file(path)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        made = Path(folder, target.name)  # which TorchScript names what is inside after
        if kind == ".ts":
            write_script(complete_network(parser), made, meta, deploy_config(parser))
        elif "detector" in parser:
            write_detector(parser.get_parsed_content("network_def").eval(), made, meta)
        else:
            write_onnx(complete_network(parser), made, meta)
        os.replace(made, target)
    return {"file": str(target), "MB": round(target.stat().st_size / 1e6, 1), "sha256": hash_file(target)}


def write_script(network: nn.Module, path: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    """Write TorchScript with `metadata.json` and, for MONAI Deploy, `inference.json` inside.

    The operator gives each of `probabilities` the name of the first class, and does not know `object`; as `tuples` both
    come through as the numbers they are.
    """
    for form in metadata["network_data_format"]["outputs"].values():
        form["type"] = "image" if form["type"] == "image" else "tuples"
    files = {"inference.json": to_json(config)}
    script = torch.jit.script(network)
    save_net_with_metadata(script, str(path), include_config_vals=False, meta_values=metadata, more_extra_files=files)


def write_onnx(network: nn.Module, path: Path, metadata: dict[str, Any]) -> None:
    """Write ONNX whose input `image` and output `pred` have axes with names, and the metadata in `metadata_props`.

    Raises:
        ImportError: if ONNX's packages are not installed.
    """
    channels = metadata["network_data_format"]["inputs"]["image"]["num_channels"]
    example = torch.zeros(2, channels, 64, 72, 80)  # sizes that differ, and leave two voxels everywhere
    names = {i: name for i, name in enumerate(AXES) if name != "channel"}
    _write(network, example, path, {**metadata, "axes": AXES}, dynamic_shapes=(names,))


def write_detector(network: LesionDetector, path: Path, metadata: dict[str, Any]) -> None:
    """Write a key-slice detector as ONNX: one stack of slices of a fixed size, and the rows of `LesionDetector`.

    Raises:
        ImportError: if ONNX's packages are not installed.
    """
    slices, size = metadata["settings"]["slices"], metadata["settings"]["size"]
    if not size:
        raise ValueError(f"size {size}: ONNX's detector takes stacks of one size; give the longer side of a slice")
    metadata = {**metadata, "axes": ["batch", "slice", "width", "height"], "columns": COLUMNS}
    _write(DetectorGraph(network), torch.zeros(1, slices, size, size), path, metadata)


def _write(network: nn.Module, example: torch.Tensor, path: Path, metadata: dict[str, Any], **options: Any) -> None:
    if not optional_import("onnxscript")[1]:
        raise ImportError("ONNX needs onnxscript, which is not installed; pip install 'vdt-bundles[export]'")
    options = {"input_names": ["image"], "output_names": ["pred"], "dynamo": True, "verbose": False, **options}
    program: Any = torch.onnx.export(network, (example,), **options)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    program.model.metadata_props.update(texts)
    program.save(str(path), external_data=False)
