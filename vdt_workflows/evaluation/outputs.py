"""Classify the images a user points at, and write the answers as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from vdt_workflows.data.folder_index import is_image
from vdt_workflows.files import write_atomic

logger = logging.getLogger(__name__)


def list_images(source: str | os.PathLike) -> list[dict[str, str]]:
    """List the images to classify: one file, or all image files below a folder, as `image` and `path`.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder holds no image file.
    """
    path = Path(source)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names if is_image(name))
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; expected an image or a folder of images")
    if not files:
        raise ValueError(f"{path}: no image file in it or below it")
    return [{"image": str(file), "path": str(file)} for file in files]


class SavePredictions:
    """Handler: write the most probable classes of each image as JSON and CSV.

    The batches need the images' paths under `path`, and the evaluator's output the logits under `pred`.

    Args:
        folder: where `predictions.json` and `predictions.csv` go.
        class_names: names by class index; the numbers are used where there are none.
        top: how many classes of each image.
    """

    def __init__(self, folder: str, class_names: list[str] | None = None, top: int = 5) -> None:
        self.folder = Path(folder)
        self.class_names = class_names
        self.top = top
        self.found: list[dict[str, Any]] = []

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
        write_atomic(self.folder / "predictions.json", json.dumps(self.found, indent=2).encode())
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["image", "rank", "class", "index", "probability"])
        for item in self.found:
            for rank, guess in enumerate(item["top"], 1):
                writer.writerow([item["image"], rank, guess["class"], guess["index"], f"{guess['probability']:.6f}"])
        write_atomic(self.folder / "predictions.csv", text.getvalue().encode())
        logger.info("%d images: predictions.json and predictions.csv in %s", len(self.found), self.folder)
