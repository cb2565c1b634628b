"""The slice viewer of a report: NiiVue, taken from the installed ipyniivue, and volumes inside the page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vdt_workflows.drawing import colour, list_colours
from vdt_workflows.report.pages import to_base64

VOXELS = 4_000_000  # of a volume in the page, at most
COLOURS = [(0, 0, 0), *(colour(value) for value in range(1, 256))]  # by label value


@dataclass(frozen=True)
class Case:
    """A volume (X, Y, Z) of any numbers, a label map on its grid, its affine to RAS mm, and the labels' names."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    names: Sequence[str]


def find_viewer() -> Path:
    """Find the folder of ipyniivue, whose wheel ships NiiVue; called before the work of which it shows the results.

    Raises:
        ImportError: if it is not installed.
    """
    found = util.find_spec("ipyniivue")
    if found is None or found.origin is None:
        raise ImportError(
            "the slice viewer needs ipyniivue, which ships NiiVue: pip install 'ipyniivue>=2.4.4,<2.5'; without it"
            " there are vdt report --volumes 0, and vdt segment without --page"
        )
    return Path(found.origin).parent


def take_niivue() -> tuple[str, str]:
    """Give NiiVue as the text of a script that sets `window.Niivue`, and its licence.

    Raises:
        ImportError: if ipyniivue is not installed.
        ValueError: if its script is built in another way than that of the versions 2.4.
    """
    script = (find_viewer() / "static" / "widget.js").read_text(encoding="utf-8")
    made = re.findall(r'"Creating new Niivue instance"\);.{0,200}?=new ([\w$]+)\(', script)
    script, exports = re.subn(r"export\s*\{[^{}]*\};?\s*$", "", script)
    version = metadata.version("ipyniivue")
    if len(made) != 1 or exports != 1:
        raise ValueError(f"ipyniivue {version}: NiiVue is not found in its script; install ipyniivue>=2.4.4,<2.5")
    licence = "\n".join(
        file.read_text() for file in metadata.files("ipyniivue") or [] if "license" in file.name.lower()
    )
    script = f"(async () => {{\n{script}\nwindow.Niivue = {made[0]};\n}})();"
    return script.replace("</script", r"<\/script"), f"NiiVue, as in ipyniivue {version}\n\n{licence}"


def draw_boxes(shape: Sequence[int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Draw the edges of boxes (x1, y1, z1, x2, y2, z2 in voxels) into a mask, in every slice that they reach."""
    mask = np.zeros(tuple(shape), np.uint8)
    for box in boxes:
        low = np.clip(np.round(box[:3]).astype(int), 0, np.array(shape) - 1)
        high = np.clip(np.round(box[3:]).astype(int), low, np.array(shape) - 1)
        x, y, z = (slice(a, b + 1) for a, b in zip(low, high, strict=True))
        for corner in (low, high):
            mask[corner[0], y, z] = 1
            mask[x, corner[1], z] = 1
    return mask


def describe_viewer(cases: Sequence[Case]) -> dict[str, Any]:
    """Give what the template viewer.html shows: volumes and their labels in three planes that one can go through."""
    script, licence = take_niivue()
    shown = []
    for case in cases:
        step = 1  # every n-th voxel in each direction, so that a page can hold them
        while np.prod([-(-length // step) for length in case.image.shape]) > VOXELS:
            step += 1
        image, mask = (values[::step, ::step, ::step] for values in (case.image, case.mask))
        affine = case.affine @ np.diag([step, step, step, 1.0])
        low, high = np.percentile(image, [1, 99.5])
        scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255
        names = [*case.names, *map(str, range(len(case.names), int(mask.max()) + 1))]
        values = [int(value) for value in np.unique(mask) if value]
        shown.append(
            {
                "title": case.name + (f", every {step}th voxel" if step > 1 else ""),
                "names": ["", *names[1:]],
                "seen": [names[value] for value in values],
                "colours": list_colours(values),
                "image": _encode(scaled, affine),
                "mask": _encode(mask, affine),
            }
        )
    return {"cases": shown, "script": script, "licence": licence, "colours": COLOURS}


def _encode(values: np.ndarray, affine: np.ndarray) -> str:
    return to_base64(nib.Nifti1Image(values.astype(np.uint8), affine).to_bytes())
