"""What inference writes: volumes in NIfTI, classes of images as JSON and CSV, lesions as JSON and 3D Slicer markups."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import NibabelWriter, decollate_batch
from nibabel.affines import apply_affine

from vdt_transforms.geometry import to_nifti
from vdt_workflows.drawing import draw_planes, draw_sheet, to_png, write_colour_table
from vdt_workflows.evaluation.dicom_seg import writes_dicom
from vdt_workflows.evaluation.dicom_sr import FORMATS, Finding, save_report
from vdt_workflows.evaluation.segmentation import central_planes
from vdt_workflows.files import write_atomic, write_csv, write_json
from vdt_workflows.naming import result_name
from vdt_workflows.progress import RESULT

logger = logging.getLogger(__name__)

MARKUPS = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


class VolumeWriter(NibabelWriter):
    """MONAI writer of volumes as .nii.gz, whole or not at all, that keeps the place of the volume they were made from.

    Give it to `SaveImaged(writer="vdt_workflows.VolumeWriter")`. On the grid of a NIfTI file, as
    `vdt_transforms.RestoreGridd` leaves label and probability maps, the header gets both forms of that file, their
    codes and its unit, so that every program that opens both puts them at one place, whichever form it reads. MONAI's
    writer makes one form of the affine in mm.
    """

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options: Any) -> None:
        """Take over the affine, and the forms if the volume lies on the file's grid."""
        super().set_metadata(meta_dict, resample, **options)
        meta = meta_dict or {}
        on_grid = self.affine is not None and np.allclose(self.affine, np.asarray(meta.get("original_affine", np.nan)))
        self.forms = meta.get("forms") if on_grid else None

    def write(self, filename: str | PathLike, verbose: bool = False, **options: Any) -> None:
        """Write the file."""
        voxels = np.asarray(self.data_obj).astype(self.output_dtype, copy=False)
        voxels = voxels.reshape(*voxels.shape, *[1] * (3 - voxels.ndim))  # MONAI drops a last axis of one slice
        affine = np.eye(4) if self.affine is None else np.asarray(self.affine, np.float64)
        write_atomic(filename, to_nifti(voxels, affine, forms=self.forms))


@dataclass(eq=False)
class ReportVolumes:
    """Handler: measure the labels of each segmented volume in ml, and draw them.

    Volumes are those of the voxels of the label map that is written, whatever its spacing and direction. `labels.ctbl`
    has the labels' names and colours for 3D Slicer.

    Args:
        folder: where the files go.
        label_names: by label value, the background first.
        statistics: whether to write `statistics.csv`, a row for each volume and label, those not found too.
        previews: whether to draw `<name>_seg.png` of each volume: three planes where most is labelled.
    """

    folder: str
    label_names: Sequence[str]
    statistics: bool = False
    previews: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator whose postprocessing brings `pred` to the grid of the file."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _measure(self, engine: Engine) -> None:
        for item in engine.state.output:
            name, pred = result_name(item["image"].meta["filename_or_obj"]), item["pred"]
            labels = np.asarray(pred.as_tensor().cpu()[0]).round().astype(np.uint8)
            number = len(self.label_names)  # plane by plane, since bincount makes eight bytes of each voxel
            counts = np.sum([np.bincount(plane.ravel(), minlength=number) for plane in labels], axis=0)
            voxel = abs(np.linalg.det(np.asarray(pred.affine, float)[:3, :3])) / 1000  # ml
            found: dict[int, str] = {}
            for value, label in enumerate(self.label_names[1:], 1):
                ml, voxels = float(counts[value] * voxel), int(counts[value])
                measured = {"volume": name, "value": value, "label": label, "voxels": voxels, "ml": f"{ml:.6g}"}
                self.rows.append(measured)
                found |= {value: f"{label}: {ml:.3g} ml"} if voxels else {}
            logger.info("%s: %s", name, ", ".join(found.values()) or "nothing is labelled", extra=RESULT)
            if self.previews:
                image, planes, _ = central_planes(item["image"], labels, labels)
                row = draw_planes(image, planes, planes, window=(0, 255), panel=400)
                title = f"{name}, where most is labelled" if found else f"{name}, nothing is labelled"
                write_atomic(Path(self.folder, f"{name}_seg.png"), to_png(draw_sheet([row], title, found, columns=1)))

    def _write(self, engine: Engine) -> None:
        write_atomic(Path(self.folder, "labels.ctbl"), write_colour_table(self.label_names).encode())
        table = Path(self.folder, "statistics.csv")
        if self.statistics:
            write_csv(table, self.rows, ["volume", "value", "label", "voxels", "ml"])
        elif table.is_file():
            table.unlink()
            logger.warning("%s: removed, it was of label maps that are replaced now; --statistics for a new one", table)


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
        output_format: "json", or "dicom_sr" for a Structured Report too, of DICOM series (see `save_report`).

    Raises:
        ImportError: if highdicom is missing, which "dicom_sr" needs.
        ValueError: if the format is neither.
    """

    output_dir: str
    label_names: Sequence[str] = ("lesion",)
    output_format: str = "json"

    def __post_init__(self) -> None:
        self.reports = writes_dicom(self.output_format, FORMATS)

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
        name = result_name(source)
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
        if self.reports:
            corners = apply_affine(affine, np.reshape(np.asarray(data["box"], float), (-1, 2, 3)))
            save_report(
                [
                    Finding(f"{lesion['label']} {i}", lesion["label"], lesion["score"], places)
                    for i, (lesion, places) in enumerate(zip(lesions, corners, strict=True), 1)
                ],
                source,
                self.output_dir,
            )
        logger.info("%s: %d lesions", source, len(lesions), extra=RESULT)


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
