"""The slice viewer of a report: NiiVue, taken from the installed ipyniivue, and volumes inside the page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import nibabel as nib
import numpy as np

COLOURS = ("e6194b", "3cb44b", "ffe119", "4363d8", "f58231", "911eb4", "46f0f0", "f032e6", "bcf60c", "fabebe", "008080",
           "e6beff", "9a6324", "fffac8", "800000", "aaffc3")  # fmt: skip
VOXELS = 4_000_000  # of a volume in the page, at most


@dataclass(frozen=True)
class Case:
    """A volume (X, Y, Z) of any numbers, a label map on its grid, its affine to RAS mm, and the labels' names."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    names: Sequence[str]


def take_niivue() -> tuple[str, str]:
    """Give NiiVue as the text of a script that sets `window.Niivue`, and its licence.

    Raises:
        ImportError: if ipyniivue, whose wheel ships it, is missing.
        ValueError: if its script is built in another way than that of the versions 2.4.
    """
    found = util.find_spec("ipyniivue")
    if found is None or found.origin is None:
        raise ImportError(
            "the slice viewer needs ipyniivue, which ships NiiVue; install it with: pip install ipyniivue (the extra"
            " [report] has it), or give --volumes 0"
        )
    script = (Path(found.origin).parent / "static" / "widget.js").read_text(encoding="utf-8")
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


def thin(case: Case) -> tuple[Case, int]:
    """Take every n-th voxel of a volume in each direction that has them, and give n."""
    step = 1
    while np.prod([-(-length // step) for length in case.image.shape]) > VOXELS:
        step += 1
    taken = (slice(None, None, step),) * 3
    affine = case.affine @ np.diag([step, step, step, 1.0])
    return Case(case.name, case.image[taken], case.mask[taken], affine, case.names), step


def draw_boxes(shape: Sequence[int], boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Draw the edges of boxes (x1, y1, z1, x2, y2, z2 in voxels) into a mask, in every slice that they reach."""
    mask = np.zeros(tuple(shape), np.uint8)
    for box in boxes:
        low = np.clip(np.round(box[:3]).astype(int), 0, np.array(shape) - 1)
        high = np.clip(np.round(box[3:]).astype(int), low, np.array(shape) - 1)
        x, y, z = (slice(a, b + 1) for a, b in zip(low, high, strict=True))
        for side in (low, high):
            mask[side[0], y, z] = 1
            mask[x, side[1], z] = 1
    return mask


def make_viewer(cases: Sequence[Case]) -> str:
    """Give the part of a page that shows volumes and their labels in three planes and lets one go through them."""
    script, licence = take_niivue()
    parts, options, notes = [], [], []
    for number, whole in enumerate(cases):
        case, step = thin(whole)
        low, high = np.percentile(case.image, [1, 99.5])
        scaled = np.clip((case.image - low) / max(high - low, 1e-6), 0, 1) * 255
        for kind, values in (("image", scaled), ("mask", case.mask)):
            image = nib.Nifti1Image(values.astype(np.uint8), case.affine)
            content = base64.b64encode(image.to_bytes()).decode()
            parts.append(f'<script type="text/plain" id="{kind}-{number}">{content}</script>')
        thinned = f", every {step}th voxel" if step > 1 else ""
        names = [*case.names, *map(str, range(len(case.names), int(case.mask.max()) + 1))]
        names = html.escape("\n".join(["", *names[1:]]), quote=True)
        options.append(f'<option value="{number}" data-names="{names}">{html.escape(case.name + thinned)}</option>')
        notes.append(_legend(case, number))
    return VIEWER.format(
        options="".join(options),
        legends="".join(notes),
        parts="\n".join(parts),
        colours=str(["000000", *COLOURS]).replace("'", '"'),
        niivue=script,
        licence=html.escape(licence),
    )


def _legend(case: Case, number: int) -> str:
    seen = [int(value) for value in np.unique(case.mask) if value]
    names = [case.names[value] if value < len(case.names) else str(value) for value in seen]
    items = [
        f'<span><i style="background:#{COLOURS[(value - 1) % len(COLOURS)]}"></i>{html.escape(name)}</span>'
        for value, name in zip(seen, names, strict=True)
    ]
    return f'<p class="legend" id="legend-{number}" hidden>{" ".join(items) or "nothing was found"}</p>'


VIEWER = """
<p><label>Volume <select id="case">{options}</select></label>
<label>Opacity <input id="opacity" type="range" min="0" max="1" step="0.05" value="0.5"></label>
<output id="place"></output></p>
{legends}
<div id="viewer"><canvas id="niivue" tabindex="0" aria-label="Three slices through the volume"></canvas></div>
<p>Scroll over a slice, or press the up and down arrows, to go through the volume; click to go to a place.</p>
{parts}
<script>{niivue}</script>
<script type="module">
const colours = {colours};
const at = (name) => document.getElementById(name);
const bytes = (name) => Uint8Array.from(atob(at(name).textContent), (c) => c.charCodeAt(0)).buffer;
while (!window.Niivue) await new Promise((done) => setTimeout(done, 20));
const viewer = new window.Niivue({{ dragAndDropEnabled: false, crosshairColor: [1, 1, 1, 0.6], loadingText: "",
  multiplanarShowRender: 0, crosshairWidth: 0.2, isNearestInterpolation: true }});
viewer.onLocationChange = (place) => {{ at("place").textContent = place.string; }};
await viewer.attachToCanvas(at("niivue"));
viewer.setSliceType(viewer.sliceTypeMultiplanar);
const table = () => {{
  const rgb = (i) => colours[i === 0 ? 0 : (i - 1) % (colours.length - 1) + 1].match(/../g).map((x) => parseInt(x, 16));
  const names = at("case").selectedOptions[0].dataset.names.split("\\n");
  const all = [...names.keys()].map(rgb);
  return {{ R: all.map((c) => c[0]), G: all.map((c) => c[1]), B: all.map((c) => c[2]), labels: names }};
}};
async function show(number) {{
  for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
  await viewer.loadFromArrayBuffer(bytes(`image-${{number}}`), "image.nii");
  await viewer.loadFromArrayBuffer(bytes(`mask-${{number}}`), "mask.nii");
  viewer.volumes[1].setColormapLabel(table());
  viewer.setOpacity(1, Number(at("opacity").value));
  for (const legend of document.querySelectorAll(".legend")) legend.hidden = legend.id !== `legend-${{number}}`;
  viewer.updateGLVolume();
  viewer.createOnLocationChange();
  document.body.dataset.shown = number;
}}
at("case").addEventListener("change", (event) => show(event.target.value));
at("opacity").addEventListener("input", (event) => viewer.setOpacity(1, Number(event.target.value)));
at("niivue").addEventListener("keydown", (event) => {{
  const step = {{ ArrowUp: 1, ArrowDown: -1 }}[event.key];
  if (step) {{ event.preventDefault(); viewer.moveCrosshairInVox(0, 0, step); }}
}});
window.reportViewer = viewer;
await show(0);
</script>
<details><summary>Licence of the viewer</summary><pre>{licence}</pre></details>
"""
