"""Put what a run left into one HTML page that opens without a network.

    vdt report bundles/bcv_multiorgan_segmentation

The page has curves, scores, pictures, settings, the environment, where the weights come from, and a viewer of the
volumes with their masks or boxes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import LoadImage

from vdt_transforms.geometry import open_volume, read_voxels
from vdt_transforms.readers import VolumeReader
from vdt_workflows.files import read_json, read_lines, write_atomic
from vdt_workflows.naming import bare_name, plain
from vdt_workflows.report.pages import render, to_base64
from vdt_workflows.report.viewer import Case, describe_viewer, draw_boxes

Table = tuple[str, list[str], list[list[str]]]  # its heading, the names of its columns, its rows
FOLDERS = (".", "eval", "models")  # of a run, where its files may lie
PICTURES = {
    "curves.png": "Loss and scores, epoch by epoch",
    "scores.png": "Scores, case by case",
    "examples.png": "The worst, the median and the best case",
    "froc.png": "Sensitivity against false positives an image",
    "roc.png": "Sensitivity against false alarms",
}


def report_run(run: str, output: str | None = None, volumes: int = 3) -> dict[str, Any]:
    """Write the page of a run.

    Args:
        run: folder of the run: a bundle, or any folder with its results in it, in its eval/ and models/.
        output: the page, report.html in the folder by default.
        volumes: how many segmented or searched volumes the page's viewer shows; 0 leaves the viewer out.

    Returns:
        The page, its size in MB, and how many pictures and volumes it has.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if nothing in it is of a run.
        ImportError: if there are volumes to be shown and ipyniivue is missing.
    """
    root = Path(run)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected one with the results of a run")
    files = {path.name: path for folder in reversed(FOLDERS) for path in sorted((root / folder).glob("*"))}
    run_record, inference, scores = (_read_json(files.get(f"{name}.json")) for name in ("run", "inference", "scores"))
    records = {"run.json": run_record, "inference.json": inference, "scores.json": scores}
    tables = {name: path for name, path in files.items() if path.suffix == ".csv"}
    course = {"": tables.pop("history.csv")} if "history.csv" in tables else {}
    pictures = [(files[name], text) for name, text in PICTURES.items() if name in files]
    pictures += [(path, name) for name, path in files.items() if path.suffix == ".png" and name not in PICTURES]
    cases = find_cases(files, volumes)
    sections = [
        _section("Scores", _make_tables({"": scores})),
        _section("Course", _read_tables(course)),
        {**_section("Pictures"), "pictures": [(to_base64(path.read_bytes()), text) for path, text in pictures]},
        {**_section("Volumes"), "viewer": describe_viewer(cases) if cases else None},
        _section("Cases", _read_tables(tables)),
        _section("Settings", _make_tables({"": run_record or inference})),
        _section("How it was made", _make_tables({name: record.get("_run_", {}) for name, record in records.items()})),
    ]
    sections = [part for part in sections if any(part[kind] for kind in ("tables", "pictures", "viewer"))]
    if not sections:
        raise ValueError(
            f"{root}: nothing of a run in it; expected history.csv, scores.json, run.json or inference.json in it,"
            " in eval/ or in models/"
        )
    versions = {name: metadata.version(name) for name in ("vdt-bundles", "torch", "monai", "numpy", "nibabel")}
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    here = {"written": written, "machine": platform.platform(), **versions}
    sections.append(_section("This page", _make_tables({"": here})))
    target = Path(output) if output else root / "report.html"
    page = render("run.html", title=f"Run {root.resolve().name}", sections=sections)
    write_atomic(target, page.encode())
    return {"page": str(target), "mb": round(len(page) / 1e6, 2), "pictures": len(pictures), "volumes": len(cases)}


def find_cases(files: dict[str, Path], number: int) -> list[Case]:
    """Load the first volumes of a run that were segmented or searched, with their masks, or boxes drawn as masks."""
    cases: list[Case] = []
    record = _read_json(files.get("inference.json"))
    geometry = record.get("geometry", "refuse")
    load = LoadImage(VolumeReader(geometry=geometry))
    for source in record.get("volumes", []):
        names = record.get("results", {}).get(source, [f"{bare_name(source)}_seg.nii.gz"])
        mask = next((files[name] for name in names if name in files and name.endswith(".nii.gz")), None)
        if len(cases) < number and mask is not None and Path(source).exists():
            label_names = record.get("label_names", [])
            labels, title = open_volume(mask, geometry), mask.name.removesuffix("_seg.nii.gz")
            image = load(source)
            if not np.allclose(image.affine.numpy(), labels.affine, atol=1e-3):
                raise ValueError(f"{mask}: lies on another grid than {source}; run the inference again")
            cases.append(Case(title, image.numpy(), read_voxels(labels), labels.affine, label_names))
    for name, path in files.items():
        if name.endswith("_lesions.json") and len(cases) < number:
            found = _read_json(path)
            if Path(found["image"]).exists():
                image = load(found["image"])
                boxes = draw_boxes(image.shape, [lesion["box_voxel"] for lesion in found["lesions"]])
                title = f"{path.name.removesuffix('_lesions.json')}: {len(found['lesions'])} boxes"
                cases.append(Case(title, image.numpy(), boxes, image.affine.numpy(), ["background", "box"]))
    return cases


def _section(title: str, tables: list[Table] | None = None) -> dict[str, Any]:
    return {"title": title, "tables": tables or [], "pictures": [], "viewer": None}


def _make_tables(records: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Make a table of names and values of each record that has any."""
    tables: list[Table] = []
    for heading, record in records.items():
        shown = {name: value for name, value in record.items() if name not in ("_run_", "volumes")}
        if shown:
            tables.append((heading, ["name", "value"], [[name, _shorten(value)] for name, value in _flatten(shown)]))
    return tables


def _read_tables(files: Mapping[str, Path]) -> list[Table]:
    tables = [(heading, *read_lines(path)) for heading, path in files.items()]
    return [(heading, head, [list(map(_shorten, row)) for row in rows]) for heading, head, rows in tables if rows]


def _read_json(path: Path | None) -> dict[str, Any]:
    content = read_json(path) if path is not None else {}
    return plain(content) if isinstance(content, dict) else {}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        flat += _flatten(value, f"{prefix}{name} / ") if nested else [(prefix + name, value)]
    return flat


def _shorten(value: Any) -> str:
    """Write a number, or the text of one, with six digits, and everything else as it is."""
    try:
        return f"{float(value):.6g}" if isinstance(value, str | float) else str(value)
    except ValueError:
        return str(value)
