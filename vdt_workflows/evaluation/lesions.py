"""Write the lesions of a volume as JSON and as markups of 3D Slicer."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.data import decollate_batch
from pydicom.misc import is_dicom

from vdt_transforms.slice_folders import list_slices
from vdt_transforms.slice_stacks import read_slice
from vdt_workflows.files import write_atomic

logger = logging.getLogger(__name__)

MARKUPS = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def list_scans(source: str | os.PathLike) -> list[dict[str, str]]:
    """List the CT volumes to search: a file, a folder of NIfTI files, of one DICOM series, or of numbered PNG slices.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder holds nothing of the kind, or its PNG slices have a hole.
    """
    path = Path(source)
    if path.is_file():
        return [{"image": str(path)}]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a CT volume or a folder of them")
    if slices := list_slices(path):
        read_slice(slices[0])
        return [{"image": str(path)}]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    volumes = [file for file in files if file.name.endswith((".nii", ".nii.gz", ".nrrd", ".mha"))]
    if volumes:
        return [{"image": str(file)} for file in volumes]
    if any(is_dicom(file) for file in files[:3]):
        return [{"image": str(path)}]
    raise ValueError(f"{path}: no volume in it; expected NIfTI files, one DICOM series, or slices such as 001.png")


def unbatch_lesions(data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Take an evaluator's batch of one volume apart: `image` without its batch axis, and the lesions beside it.

    MONAI Label does so itself; data without `pred` are returned as they are.
    """
    if "pred" not in data:
        return dict(data)
    return {**data, "image": decollate_batch(data["image"])[0], **data["pred"][0]}


class SaveLesions:
    """Handler: write the 3D boxes of each volume: `<name>_lesions.json`, and `<name>_lesions.mrk.json` for 3D Slicer.

    Called with a dictionary, it writes one volume's. The dictionary holds the volume (a `MetaTensor`) under `image` and
    what `networks.VolumeLesionDetector` gives under `box`, `label` and `label_scores`. Boxes are written in voxels of
    the file itself, whatever way the volume was turned since, and in mm as centre, size and the direction of the edges,
    in RAS (NIfTI) and in LPS (DICOM).

    Args:
        output_dir: where the files go.
        label_names: by label.
    """

    def __init__(self, output_dir: str, label_names: list[str] | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.label_names = label_names or ["lesion"]

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator whose postprocessing begins with `unbatch_lesions`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        self({"image": engine.state.output["image"], **engine.state.output["pred"][0]})

    def __call__(self, data: Mapping[Hashable, Any]) -> None:
        """Write the lesions of `data`."""
        image = data["image"]
        affine = np.asarray(image.affine, float)
        own = np.asarray(image.meta.get("original_affine", affine), float)
        source = str(image.meta["filename_or_obj"])
        lesions = [
            _lesion(np.asarray(box, float), float(score), self.label_names[int(label)], affine, own)
            for box, score, label in zip(data["box"], data["label_scores"], data["label"], strict=True)
        ]
        name = Path(source).name
        for ending in (".gz", ".nii", ".nrrd", ".dcm"):
            name = name.removesuffix(ending)
        content = {
            "image": source,
            "conventions": {
                "box_voxel": "x1, y1, z1, x2, y2, z2 in voxels of the file, a voxel's centre at its index",
                "center_ras_mm": "x to the right, y to the front, z to the head",
                "center_lps_mm": "x to the left, y to the back, z to the head",
                "size_mm": "along the three directions",
                "directions_ras": "unit vectors, one a row",
            },
            "lesions": lesions,
        }
        write_atomic(self.output_dir / f"{name}_lesions.json", json.dumps(content, indent=2).encode())
        markups = {"@schema": MARKUPS, "markups": [_markup(i, lesion) for i, lesion in enumerate(lesions, 1)]}
        write_atomic(self.output_dir / f"{name}_lesions.mrk.json", json.dumps(markups, indent=2).encode())
        logger.info("%s: %d lesions", source, len(lesions))


def _lesion(box: np.ndarray, score: float, label: str, affine: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    corners = np.stack([np.append(box[:3], 1), np.append(box[3:], 1)])
    voxels = (corners @ (np.linalg.inv(own) @ affine).T)[:, :3]
    centre = (corners.mean(0) @ affine.T)[:3]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return {
        "label": label,
        "score": round(score, 6),
        "box_voxel": np.concatenate([voxels.min(0), voxels.max(0)]).round(3).tolist(),
        "center_ras_mm": centre.round(3).tolist(),
        "center_lps_mm": (RAS_TO_LPS @ centre).round(3).tolist(),
        "size_mm": ((box[3:] - box[:3]) * spacing).round(3).tolist(),
        "directions_ras": (affine[:3, :3] / spacing).T.round(6).tolist(),
    }


def _markup(number: int, lesion: Mapping[str, Any]) -> dict[str, Any]:
    directions = RAS_TO_LPS @ np.asarray(lesion["directions_ras"]).T
    if np.linalg.det(directions) < 0:  # Slicer wants a right-handed box; turning one edge around gives the same one
        directions[:, 2] *= -1
    return {
        "type": "ROI",
        "roiType": "Box",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "center": lesion["center_lps_mm"],
        "orientation": directions.ravel().round(6).tolist(),
        "size": lesion["size_mm"],
        "locked": False,
        "display": {"visibility": True, "opacity": 1.0, "fillVisibility": False},
        "controlPoints": [
            {
                "id": "1",
                "label": f"{lesion['label']} {number} ({lesion['score']:.2f})",
                "position": lesion["center_lps_mm"],
                "positionStatus": "defined",
            }
        ],
    }
