"""DeepLesion's annotations: read from its table, or from COCO-style files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdt_transforms.slice_stacks import SLICE_NAME
from vdt_workflows.files import read_csv, read_number

SPLITS = {1: "training", 2: "validation", 3: "test"}
COCO_FILES = {"train": "training", "val": "validation", "test": "test"}
SERIES_NAME = re.compile(r"^(\d+)_(\d+)_(\d+)$")  # patient, study, series
COLUMNS = (
    *("File_name", "Patient_index", "Study_index", "Series_ID", "Key_slice_index", "Measurement_coordinates"),
    *("Bounding_boxes", "Lesion_diameters_Pixel_", "Normalized_lesion_location", "Coarse_lesion_type"),
    *("Possibly_noisy", "Slice_range", "Spacing_mm_px_", "Image_size", "DICOM_windows", "Patient_gender"),
    *("Patient_age", "Train_Val_Test"),
)
Lesion = dict[str, Any]


def read_table(path: Path) -> Iterator[Lesion]:
    """Read `DL_info.csv`: one lesion a row, boxes and axes in 1-based pixels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, and the columns or the row that are wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected DL_info.csv, or give annotations")
    for number, row in enumerate(read_csv(path, COLUMNS, others=True), 2):
        try:
            yield _from_row(row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: {error}; expected a row of DL_info.csv") from error


def _from_row(row: dict[str, str]) -> Lesion:
    def numbers(name: str, count: int, low: float = -1e5, high: float = 1e5, whole: bool = False) -> list[float]:
        parts = row[name].replace(",", " ").split()
        values = [read_number(part, name, "a value", low, high, whole=whole) for part in parts]
        if len(values) != count:
            raise ValueError(f"{name} is {row[name]!r}, not {count} numbers")
        return values

    series, _, file = row["File_name"].rpartition("_")
    if SERIES_NAME.match(series) is None or SLICE_NAME.match(file) is None:
        raise ValueError(f"File_name is {row['File_name']!r}, not like 000001_01_01_109.png")
    box = [value - 1 for value in numbers("Bounding_boxes", 4)]
    spacing = numbers("Spacing_mm_px_", 3)
    (split,) = numbers("Train_Val_Test", 1, 1, 3, whole=True)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"Bounding_boxes is {row['Bounding_boxes']!r}, not x1 < x2 and y1 < y2")
    return {
        "series": series,
        "slice": int(file[:-4]),
        "patient": series.split("_")[0],
        "box": box,
        "axes": [value - 1 for value in numbers("Measurement_coordinates", 8)],
        "diameter": numbers("Lesion_diameters_Pixel_", 2)[0] * spacing[0],
        "type": int(*numbers("Coarse_lesion_type", 1, -1, 8, whole=True)),
        "noisy": int(*numbers("Possibly_noisy", 1, 0, 1, whole=True)),
        "location": numbers("Normalized_lesion_location", 3),
        "spacing": spacing[0],
        "slice_interval": spacing[2],
        "size": [int(value) for value in numbers("Image_size", 2, 1, whole=True)],
        "window": numbers("DICOM_windows", 2),
        "split": SPLITS[int(split)],
    }


def read_coco(path: Path) -> Iterator[Lesion]:
    """Read COCO-style files: one, or a folder's `deeplesion_train.json`, `deeplesion_val.json`, `deeplesion_test.json`.

    Their `area` is not read (it is x times height in the published files). They have neither type nor diameter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and what is wrong in it.
    """
    files = sorted(path.glob("deeplesion_*.json")) if path.is_dir() else [path]
    files = [file for file in files if file.stem.rpartition("_")[2] in COCO_FILES]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: no such file; expected deeplesion_train.json, _val.json and _test.json")
    for file in files:
        try:
            content = json.loads(file.read_text())
            images = {image["id"]: image for image in content["images"]}
            for lesion in content["annotations"]:
                yield _from_coco(images[lesion["image_id"]], lesion, COCO_FILES[file.stem.rpartition("_")[2]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not such a COCO-style file ({type(error).__name__}: {error})") from error


def _from_coco(image: dict[str, Any], lesion: dict[str, Any], split: str) -> Lesion:
    series, _, file = image["file_name"].rpartition("/")
    x, y, width, height = lesion["bbox"]
    return {
        "series": series,
        "slice": int(file[:-4]),
        "patient": series.split("_")[0],
        "box": [x, y, x + width, y + height],
        "axes": None,
        "diameter": None,
        "type": -1,
        "noisy": int(lesion.get("noisy", 0)),
        "location": [None, None, image.get("z_position")],
        "spacing": image["spacing"],
        "slice_interval": float(image["slice_intv"]),
        "size": [image["width"], image["height"]],
        "window": image.get("windows"),
        "split": split,
    }
