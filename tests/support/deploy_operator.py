"""Run a `.ts` file as MONAI Deploy's bundle operator does, where our packages cannot be imported.

    python tests/support/deploy_operator.py MODEL.ts IMAGES OUTPUT

IMAGES is an npz file with, for each volume, `NAME` (X, Y, Z) and `NAME.affine` (voxel to RAS in mm); OUTPUT gets the
operator's answer to each. The operator is the App SDK's own where DEPLOY_SDK names a folder that its wheel was unpacked
in, with Holoscan and the Triton client, which it only imports, replaced by empty classes. Elsewhere it is
`OwnOperator`, written to the same sequence of calls. It stands alone: a file that is run, not imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("networks", "vdt_transforms", "vdt_workflows", "scripts")
EMPTY = ("holoscan", "tritonclient")


class Absent(importlib.abc.MetaPathFinder):
    """Nothing of ours is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name}: is not on this machine")


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of which each name is a class that takes everything and does nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in EMPTY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        made: dict[str, type] = {}

        def give(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return made.setdefault(name, type(name, (), {"__init__": lambda self, *words, **options: None}))

        module.__getattr__ = give  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def sdk_operator(folder: Path, model: Path) -> tuple[Any, type]:
    """Make the App SDK's operator, and give its class of images."""
    import monai

    sys.meta_path.insert(0, Empty())
    monai.__path__.append(str(folder / "monai"))
    operators = types.ModuleType("monai.deploy.operators")  # whose own __init__ imports every operator there is
    operators.__path__ = [str(folder / "monai" / "deploy" / "operators")]
    sys.modules[operators.__name__] = operators
    from monai.deploy.core import AppContext, Image, IOType
    from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator

    context = AppContext({"model": str(model), "input": ".", "output": ".", "workdir": "."})
    ports = [[IOMapping(name, Image, IOType.IN_MEMORY)] for name in ("image", "pred")]
    return MonaiBundleInferenceOperator(
        None, app_context=context, input_mapping=ports[0], output_mapping=ports[1]
    ), Image


class OwnImage:
    """An array (D, H, W) and what is known of it."""

    def __init__(self, data: np.ndarray, metadata: dict[str, Any]) -> None:
        self.data, self.known = data, metadata

    def asnumpy(self) -> np.ndarray:
        return self.data


class OwnOperator:
    """The operator's sequence: files of the archive, config, transforms without readers and writers, output by type."""

    def __init__(self, model: Path) -> None:
        import torch
        from monai.bundle import ConfigParser

        self.parser = ConfigParser()
        with zipfile.ZipFile(model) as archive, tempfile.TemporaryDirectory() as folder:
            inside = f"{model.stem}/extra"  # named as the file is, so that a file that was renamed has none
            self.parser.read_meta(f=json.loads(archive.read(f"{inside}/metadata.json")))
            archive.extract(f"{inside}/inference.json", folder)
            self.parser.read_config([Path(folder, inside, "inference.json")])
        self.parser.parse()
        self.device = self.parser.get_parsed_content("device")
        self.inferer = self.parser.get_parsed_content("inferer")
        form = self.parser["_meta_"]["network_data_format"]
        self.inputs, self.outputs = form["inputs"], form["outputs"]
        self.preprocessing, self.postprocessing = (self.compose(f"{when}processing") for when in ("pre", "post"))
        self.network = torch.jit.load(model, map_location=self.device).eval()

    def compose(self, id: str) -> Any:
        found = self.parser.get_parsed_content(id)
        kept = [t for t in found.transforms if not any(w in type(t).__name__ for w in ("LoadImage", "SaveImage"))]
        found.transforms = tuple(kept)
        return found

    def compute(self, receiver: Any, sender: Any, context: Any) -> None:
        import torch
        from monai.data import MetaTensor
        from monai.utils import ensure_tuple

        with torch.no_grad():
            ((taken, _),) = self.inputs.items()
            image = receiver.receive(taken)
            affine = np.asarray(image.known["nifti_affine_transform"])
            values = np.swapaxes(image.asnumpy(), 0, 2)
            known = {**image.known, "original_affine": affine, "affine": affine.copy()}
            known |= {"spatial_shape": np.asarray(values.shape), "original_channel_dim": "no_channel"}
            data = self.preprocessing({taken: MetaTensor.ensure_torch_and_prune_meta(values, known)})
            answer = self.inferer(inputs=data[taken][None].to(self.device), network=self.network)
            ((given, form),) = self.outputs.items()
            found = self.postprocessing({given: ensure_tuple(answer)[0], **data})[given]
        kind = form["type"]
        if kind == "image":
            labels = np.swapaxes(np.squeeze(np.asarray(found.cpu()), 0), 0, 2).astype(np.uint8)
            sender.emit(OwnImage(labels, data[taken].meta), given)
        elif kind in ("series", "tuples"):
            sender.emit(np.asarray(found), given)
        else:
            raise ValueError(f"{kind}: a type of output that the operator does not send as it is")


class Port:
    """What the operator receives an image from and sends its answer to."""

    def __init__(self, image: Any) -> None:
        self.image, self.answer = image, None

    def receive(self, name: str) -> Any:
        return self.image

    def get(self, name: str) -> None:
        return None

    def emit(self, answer: Any, name: str) -> None:
        self.answer = answer


def main(model: str, images: str, output: str) -> None:
    """Answer for each volume of a file, as the operator's output: labels (X, Y, Z), or numbers."""
    sys.meta_path.insert(0, Absent())
    sdk = os.environ.get("DEPLOY_SDK")
    operator, kind = sdk_operator(Path(sdk), Path(model)) if sdk else (OwnOperator(Path(model)), OwnImage)
    given, answers = np.load(images), {}
    for name in (name for name in given.files if not name.endswith(".affine")):
        affine = given[f"{name}.affine"]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        known = dict(zip(("row_pixel_spacing", "col_pixel_spacing", "depth_pixel_spacing"), spacing, strict=True))
        port = Port(kind(np.swapaxes(given[name], 0, 2), {**known, "nifti_affine_transform": affine, "space": "RAS"}))
        operator.compute(port, port, None)
        answer: Any = port.answer
        answers[name] = np.swapaxes(answer.asnumpy(), 0, 2) if hasattr(answer, "asnumpy") else answer
    np.savez(output, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
