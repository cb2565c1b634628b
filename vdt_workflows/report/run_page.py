"""Put what a run left into one HTML page that opens without a network.

    vdt report bundles/bcv_multiorgan_segmentation

writes bundles/bcv_multiorgan_segmentation/report.html: curves, scores, pictures, settings, the environment, where the
weights come from, and a viewer of the volumes with their masks or boxes.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage

from vdt_workflows.files import write_atomic
from vdt_workflows.report.viewer import Case, draw_boxes, make_viewer

FOLDERS = (".", "eval", "models")  # of a run, where its files may lie
PICTURES = {
    "curves.png": "Loss and scores, epoch by epoch",
    "scores.png": "Scores, case by case",
    "examples.png": "The worst, the median and the best case",
    "froc.png": "Sensitivity against false positives an image",
    "roc.png": "Sensitivity against false alarms",
}
TABLE_ROWS = 200  # of a table in the page, at most


def report_run(run: str, output: str | None = None, volumes: int = 3) -> dict[str, Any]:
    """Write the page of a run.

    Args:
        run: folder of the run: a bundle, or any folder with its results in it, in its eval/ and models/.
        output: the page, report.html in the folder by default.
        volumes: how many segmented or searched volumes can be looked at in the page; 0 leaves the viewer out.

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
    sections = [("Scores", _scores(files)), ("Course", _history(files))]
    pictures = [(files[name], text) for name, text in PICTURES.items() if name in files]
    pictures += [(path, name) for name, path in files.items() if path.suffix == ".png" and name not in PICTURES]
    sections.append(("Pictures", "".join(_picture(path, text) for path, text in pictures)))
    cases = find_cases(files, volumes)
    sections.append(("Volumes", make_viewer(cases) if cases else ""))
    sections += [("Cases", _cases(files)), ("Settings", _settings(files)), ("How it was made", _provenance(files))]
    sections = [(title, body) for title, body in sections if body]
    if not sections:
        raise ValueError(
            f"{root}: nothing of a run in it; expected history.csv, scores.json, run.json or inference.json in it,"
            " in eval/ or in models/"
        )
    sections.append(("This page", _environment()))
    target = Path(output) if output else root / "report.html"
    page = make_page(f"Run {root.resolve().name}", sections)
    write_atomic(target, page.encode())
    return {"page": str(target), "mb": round(len(page) / 1e6, 2), "pictures": len(pictures), "volumes": len(cases)}


def find_cases(files: dict[str, Path], number: int) -> list[Case]:
    """Load the first volumes of a run that were segmented or searched, with their masks, or boxes drawn as masks."""
    cases: list[Case] = []
    record = _read_json(files.get("inference.json"))
    load = LoadImage(reader="vdt_transforms.VolumeReader", image_only=True)
    for source in record.get("volumes", []):
        mask = files.get(f"{_bare(source)}_seg.nii.gz")
        if len(cases) < number and mask is not None and Path(source).exists():
            names = record.get("label_names", [])
            labels = nib.load(mask)
            image = load(source)
            if not np.allclose(image.affine.numpy(), labels.affine, atol=1e-3):
                raise ValueError(f"{mask}: lies on another grid than {source}; run the inference again")
            cases.append(Case(_bare(source), image.numpy(), np.asarray(labels.dataobj), labels.affine, names))
    for name, path in files.items():
        if name.endswith("_lesions.json") and len(cases) < number:
            found = _read_json(path)
            if Path(found["image"]).exists():
                image = load(found["image"])
                boxes = draw_boxes(image.shape, [lesion["box_voxel"] for lesion in found["lesions"]])
                title = f"{_bare(found['image'])}: {len(found['lesions'])} boxes"
                cases.append(Case(title, image.numpy(), boxes, image.affine.numpy(), ["background", "box"]))
    return cases


def make_page(title: str, sections: list[tuple[str, str]]) -> str:
    """Give the whole page of sections, each a heading and its HTML."""
    links = " ".join(f'<a href="#s{number}">{html.escape(name)}</a>' for number, (name, _) in enumerate(sections))
    body = "\n".join(
        f'<section id="s{number}"><h2>{html.escape(name)}</h2>{content}</section>'
        for number, (name, content) in enumerate(sections)
    )
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{name}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def make_table(rows: list[list[Any]], head: list[str]) -> str:
    """Give an HTML table."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_short(value))}</td>" for value in row) + "</tr>"
        for row in rows[:TABLE_ROWS]
    )
    more = f"<p>{len(rows) - TABLE_ROWS} more rows are in the file.</p>" if len(rows) > TABLE_ROWS else ""
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>{more}'


def _scores(files: dict[str, Path]) -> str:
    scores = _read_json(files.get("scores.json"))
    rows = [[name, value] for name, value in _flat(scores) if not name.startswith("_run_")]
    return make_table(rows, ["score", "value"]) if rows else ""


def _history(files: dict[str, Path]) -> str:
    if "history.csv" not in files:
        return ""
    rows = _read_csv(files["history.csv"])
    return make_table([list(row.values()) for row in rows], list(rows[0])) if rows else ""


def _cases(files: dict[str, Path]) -> str:
    found = [(name, _read_csv(path)) for name, path in files.items() if path.suffix == ".csv" and name != "history.csv"]
    return "".join(
        f"<h3>{html.escape(name)}</h3>{make_table([list(row.values()) for row in rows], list(rows[0]))}"
        for name, rows in found
        if rows
    )


def _settings(files: dict[str, Path]) -> str:
    settings = _read_json(files.get("run.json")) or _read_json(files.get("inference.json"))
    rows = [[name, value] for name, value in settings.items() if name not in ("_run_", "volumes")]
    return make_table(rows, ["setting", "value"]) if rows else ""


def _provenance(files: dict[str, Path]) -> str:
    parts = []
    for name in ("run.json", "inference.json", "scores.json"):
        record = _read_json(files.get(name)).get("_run_", {})
        if record:
            parts.append(f"<h3>{name}</h3>{make_table([[k, v] for k, v in record.items()], ['what', 'value'])}")
    return "".join(parts)


def _environment() -> str:
    rows = [["written", datetime.now(timezone.utc).isoformat(timespec="seconds")], ["machine", platform.platform()]]
    rows += [[name, metadata.version(name)] for name in ("vdt-bundles", "torch", "monai", "numpy", "nibabel")]
    return make_table(rows, ["what", "value"])


def _picture(path: Path, text: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(text)
    image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run the step that writes it again") from error
    return content if isinstance(content, dict) else {}


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name} / ") if isinstance(value, dict) and value else [(prefix + name, value)]
    return flat


def _short(value: Any) -> str:
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return f"{number:.6g}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bare(path: str) -> str:
    name = Path(path).name
    for ending in (".gz", ".nii"):
        name = name.removesuffix(ending)
    return name


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
nav a{margin-right:1rem}h2{border-bottom:1px solid #d0d7de;margin-top:2.5rem}
table{border-collapse:collapse;font-size:.9rem}td,th{border:1px solid #d0d7de;padding:.2rem .6rem;text-align:left;
overflow-wrap:anywhere}th{background:#f6f8fa}.wide{overflow:auto;max-height:30rem}
figure{margin:1rem 0}img{max-width:100%;height:auto}figcaption{color:#57606a}
#viewer{height:32rem;background:#000}#niivue{width:100%;height:100%;outline-offset:2px}pre{white-space:pre-wrap}
.legend i{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 .8em}#place{font-variant-numeric:tabular-nums}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th{background:#161b22}a{color:#58a6ff}
td,th,h2{border-color:#30363d}figcaption{color:#8b949e}img{background:#fff}}
"""
