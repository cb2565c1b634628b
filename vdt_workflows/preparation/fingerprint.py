"""What a data set of labelled volumes is like: its grids, its intensities inside the labels, its labels' sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vdt_workflows.data.volumes import find_volumes

POINTS = (np.arange(200) + 0.5) / 200  # quantiles that stand for a case's intensities, each case's alike
FILE = "fingerprint.json"


@dataclass(frozen=True)
class Fingerprint:
    """The cases that a network learns from.

    Attributes:
        labels: names by label value, the background first.
        modality: as the data say, such as "CT", "MR" or "unknown".
        cases: what `measure_case` found of each.
    """

    labels: Sequence[str]
    modality: str
    cases: Sequence[Mapping[str, Any]]

    def array(self, name: str) -> np.ndarray:
        """Give `spacing`, `shape`, `crop` or `quantiles` of all cases, one a row."""
        return np.array([case[name] for case in self.cases if len(case[name])], np.float64)

    def sizes(self, value: int) -> np.ndarray:
        """Give the voxels of a label in the cases that have it."""
        return np.array([case["voxels"][str(value)] for case in self.cases if str(value) in case["voxels"]], np.int64)


def measure_case(
    voxels: np.ndarray, labels: np.ndarray, affine: np.ndarray, spacing: Sequence[float]
) -> dict[str, Any]:
    """Measure one case, with axes turned to X, Y, Z (right, anterior, superior) as the bundles do.

    Args:
        voxels: intensities as they are stored (X, Y, Z).
        labels: label values on the same grid.
        affine: 4 x 4, voxel to world.
        spacing: mm along the axes of the array.

    Returns:
        `spacing` (mm), `shape` (voxels), `crop` (the extent of what is not the least intensity), `voxels` and `middle`
        by label value (their number, and their mean place from left, 0, to right, 1), and `quantiles` of the stored
        intensities inside the labels.
    """
    turned = nib.io_orientation(affine)
    order = np.argsort(turned[:, 0])
    inside = voxels != voxels.min()
    extents = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in order]
    side = int(order[0])
    profile = np.stack(
        [np.bincount(part.ravel(), minlength=int(labels.max()) + 1) for part in np.moveaxis(labels, side, 0)]
    )
    places = (np.arange(len(profile)) + 0.5) / len(profile)
    totals = profile.sum(0)
    middles = places[:: int(turned[side, 1])] @ profile / np.maximum(totals, 1)
    found = [value for value in np.flatnonzero(totals).tolist() if value]
    foreground = voxels[labels > 0]
    return {
        "spacing": [round(float(spacing[axis]), 5) for axis in order],
        "shape": [voxels.shape[axis] for axis in order],
        "crop": [int(e[-1] - e[0]) + 1 if len(e) else voxels.shape[a] for e, a in zip(extents, order, strict=True)],
        "voxels": {str(value): int(totals[value]) for value in found},
        "middle": {str(value): round(float(middles[value]), 3) for value in found},
        "quantiles": [float(f"{q:.6g}") for q in np.quantile(foreground, POINTS)] if found else [],
    }


def find_mirrored(data: Fingerprint) -> tuple[int, int] | None:
    """Find two labels, named by numbers alone, that lie on two sides of most cases and are of one size."""
    values = range(1, len(data.labels))
    for a, b in ((a, b) for a in values for b in values if a < b):
        both = [c for c in data.cases if {str(a), str(b)} <= c["voxels"].keys()]
        if not both or not 0.6 < np.median(data.sizes(a)) / np.median(data.sizes(b)) < 1.7:
            continue
        x = np.array([[c["middle"][str(v)] for v in (a, b)] for c in both])
        apart = np.sign(x[:, 0] - 0.5) != np.sign(x[:, 1] - 0.5)
        if np.mean(apart & (abs(x - 0.5).min(1) > 0.05) & (abs(x.sum(1) - 1) < 0.1)) > 0.9:
            return a, b
    return None


def read_fingerprint(dataset_dir: Path, datalist: str | None = None) -> Fingerprint:
    """Read what `vdt prepare` measured, of the training and validation cases alone.

    Raises:
        FileNotFoundError: if the folder was not prepared.
        ValueError: if it was prepared by an earlier version, or a case is not in it.
    """
    path = dataset_dir / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; vdt prepare DATA OUTPUT writes it, and gives its folder")
    content = json.loads(path.read_text())
    listed = find_volumes(dataset_dir, datalist=datalist)
    names = dict.fromkeys(Path(c["image"]).name.partition(".nii")[0] for c in listed["training"] + listed["validation"])
    missing = [name for name in names if name not in content["cases"]]
    if missing:
        raise ValueError(f"{path}: does not know case {missing[0]}; prepare the data again")
    return Fingerprint(content["labels"], content["modality"], [content["cases"][name] for name in names])
