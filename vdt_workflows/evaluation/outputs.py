"""What inference writes: classes of images as JSON and CSV, lesions of volumes as JSON and markups of 3D Slicer."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import decollate_batch

from vdt_workflows.files import write_csv, write_json

logger = logging.getLogger(__name__)

MARKUPS = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


@dataclass(eq=False)
class SavePredictions:
    """Handler: write the most probable classes of each image as JSON and CSV.

    The batches need the images' paths under `path`, and the evaluator's output the logits under `pred`.

    Args:
        folder: where `predictions.json` and `predictions.csv` go.
        class_names: names by class index; the numbers are used where there are none.
        top: how many classes of each image.
    """

    folder: str
    class_names: Sequence[str] | None = None
    top: int = 5
    found: list[dict[str, Any]] = field(default_factory=list, init=False)

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _collect(self, engine: Engine) -> None:
        probabilities = torch.as_tensor(engine.state.output["pred"]).float().softmax(1)
        values, indices = probabilities.topk(min(self.top, probabilities.shape[1]))
        for path, ps, classes in zip(engine.state.batch["path"], values.tolist(), indices.tolist(), strict=True):
            names = [self.class_names[i] if self.class_names else str(i) for i in classes]
            top = [{"class": n, "index": i, "probability": p} for n, i, p in zip(names, classes, ps, strict=True)]
            self.found.append({"image": path, "top": top})

    def _write(self, engine: Engine) -> None:
        write_json(Path(self.folder, "predictions.json"), self.found)
        rows = [
            {"image": item["image"], "rank": rank, **guess, "probability": f"{guess['probability']:.6f}"}
            for item in self.found
            for rank, guess in enumerate(item["top"], 1)
        ]
        write_csv(Path(self.folder, "predictions.csv"), rows, ["image", "rank", "class", "index", "probability"])
        logger.info("%d images: predictions.json and predictions.csv in %s", len(self.found), self.folder)


def unbatch_lesions(data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Take an evaluator's batch of one volume apart: `image` without its batch axis, and the lesions beside it.

    MONAI Label does so itself; data without `pred` are returned as they are.
    """
    if "pred" not in data:
        return dict(data)
    return {**data, "image": decollate_batch(data["image"])[0], **data["pred"][0]}


@dataclass(eq=False)
class SaveLesions:
    """Handler: write the 3D boxes of each volume: `<name>_lesions.json`, and `<name>_lesions.mrk.json` for 3D Slicer.

    Called with a dictionary, it writes one volume's. The dictionary holds the volume (a `MetaTensor`) under `image` and
    what `networks.VolumeLesionDetector` gives under `box`, `label` and `label_scores`. Boxes are written in voxels of
    the file itself, however the volume was reoriented since, and in mm as centre, size and the direction of the edges,
    in RAS (NIfTI) and in LPS (DICOM).

    Args:
        output_dir: where the files go.
        label_names: by label.
    """

    output_dir: str
    label_names: Sequence[str] = ("lesion",)

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
        write_json(Path(self.output_dir, f"{name}_lesions.json"), content)
        markups = {"@schema": MARKUPS, "markups": [_markup(i, lesion) for i, lesion in enumerate(lesions, 1)]}
        write_json(Path(self.output_dir, f"{name}_lesions.mrk.json"), markups)
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
