"""Make demo_data/, the real pictures and volumes of the demo and the gallery, from two public data sets.

    vdt prepare volumes HIPPOCAMPUS PREPARED --test_fraction 0.2308 --val_fraction 0.1 --modality MR
    python scripts/make_demo_data.py PREPARED CLOTHING demo_data

HIPPOCAMPUS is Task04 of the Medical Segmentation Decathlon; its 60 test cases are those that `hippocampus_mr_w16` was
not trained on, and every second of them is taken. CLOTHING is the clothing data set, with train/ and validation/.
"""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from vdt_workflows.cli import run_function
from vdt_workflows.files import write_json

LABELS = {"0": "background", "1": "anterior", "2": "posterior"}
PHOTOGRAPHS = {"train": ("train", 48), "val": ("validation", 12)}  # the source's folder, and how many of each class


def make_demo_data(prepared: str, clothing: str, output_dir: str, learned: int = 10) -> dict[str, Any]:
    """Write the photographs at 64 pixels and the volumes in 8 bits.

    Args:
        prepared: folder of `vdt prepare volumes`.
        clothing: folder of class folders in train/ and validation/.
        output_dir: gets photographs/ and hippocampus/.
        learned: volumes to learn from; the others are for the test.

    Returns:
        How many volumes and photographs there are.
    """
    root, names = Path(output_dir), []
    for case in json.loads(Path(prepared, "dataset.json").read_text())["test"][::2]:
        names.append(Path(case["image"]).name)
        for kind in ("image", "label"):
            source = nib.load(Path(prepared, case[kind]))
            values = np.asarray(source.dataobj, np.float32)
            if kind == "image":  # MR has no unit
                values = (values - values.min()) * (255 / np.ptp(values))
            target = root / "hippocampus" / f"{kind}s" / names[-1]
            target.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values.round().astype(np.uint8), source.affine), target)
    cases = [{"image": f"images/{name}", "label": f"labels/{name}"} for name in names]
    parts = {"training": cases[::3][:learned], "test": [case for case in cases if case not in cases[::3][:learned]]}
    listing = {"name": "hippocampus", "modality": {"0": "MR"}, "labels": LABELS, **parts}
    write_json(root / "hippocampus" / "dataset.json", listing)
    for part, (folder, number) in PHOTOGRAPHS.items():
        for group in sorted(Path(clothing, folder).iterdir()):
            for path in sorted(group.iterdir())[:number]:
                picture = Image.open(path).convert("RGB")
                picture.thumbnail((64, 64), Image.Resampling.LANCZOS)
                target = root / "photographs" / part / group.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target, quality=85)
    return {"volumes": len(names), "photographs": len([*root.glob("photographs/*/*/*")])}


if __name__ == "__main__":
    run_function(make_demo_data)
