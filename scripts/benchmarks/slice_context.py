"""Measure what the lesion detector takes from neighbouring slices: nine slices against the centre slice nine times.

    python scripts/benchmarks/slice_context.py lesion_context

makes, for each seed, 200 small CT volumes of a lung with one ball and three vessels, which look alike in the slice
through the ball's centre, and prepares them as `vdt prepare deeplesion --volumes` does. Both arms are runs of the
deeplesion_lesion_detection bundle that differ in `distance` alone; their last weights are scored on held-out volumes.
Leaves `table.csv` and `table.md`; a run that was interrupted goes on where it stopped.
"""

import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vdt_workflows.cli import run_function
from vdt_workflows.files import claim, write_atomic, write_csv
from vdt_workflows.preparation.deeplesion import prepare_deeplesion
from vdt_workflows.report.cells import run_bundle

logger = logging.getLogger(__name__)

DETECTION = "deeplesion_lesion_detection"
ARMS = {"nine slices": 2.5, "centre slice repeated": 0}  # and mm between the slices of a stack
RATES = ("0.5", "1", "2")
SIZE, SLICES = 128, 11
SPACING = (0.8, 0.8, 2.5)
STEPS = {"batch_size": 4, "micro_batch": 4, "learning_rate": 0.02, "warmup_steps": 50, "num_workers": 0}
NETWORK = {"depth": "18ba", "conversion": "center", "base_channels": 8, "pyramid_channels": 32, "head_channels": 64}


def lesion_context(output_dir: str, seeds: int = 3, volumes: int = 200, epochs: int = 4) -> dict[str, Any]:
    """Train and score both arms for each seed, and write the comparison.

    Args:
        output_dir: folder for the data, the runs and the tables.
        seeds: number of seeds; each draws volumes of its own, their split, weights and order.
        volumes: of a seed, each with one key slice: 65 % to learn from, 10 % for validation, 25 % to be scored.
        epochs: of a run.

    Returns:
        For each arm the sensitivities at half a false positive per image, seed by seed, and the table's path.

    Raises:
        ValueError: if `output_dir` holds results of other settings.
    """
    root = Path(str(output_dir)).resolve()
    claim(root, {"volumes": volumes, "epochs": epochs, **STEPS})
    shared = {**NETWORK, **STEPS, "sizes": [SIZE], "size": SIZE, "epochs": epochs, "val_interval": epochs}
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        dataset = make_scans(root / f"data{seed}", volumes, seed)
        for arm, distance in ARMS.items():
            folder = root / f"distance{distance:g}-seed{seed}"
            own: dict[str, Any] = {"dataset_dir": str(dataset), "ckpt_dir": str(folder / "models")}
            own["output_dir"] = str(folder / "eval")
            if not (folder / "eval" / "scores.json").is_file():
                logger.info("seed %d, %s", seed, arm)
                settings = {**shared, **own, "distance": distance, "seed": seed}
                run_bundle(DETECTION, ["train"], settings)
                own |= {"args_file": str(folder / "models" / "run.json"), "intervals": 0, "num_workers": 0}
                own["ckpt_path"] = str(folder / "models" / "model_last.pt")
                run_bundle(DETECTION, ["train", "evaluate"], own)
            found[arm].append(json.loads((folder / "eval" / "scores.json").read_text())["lenient"])
    _write_table(root, found)
    logger.info("%s", (root / "table.md").read_text())
    return {**{arm: [s["sensitivity_at_0.5"] for s in found[arm]] for arm in ARMS}, "table": str(root / "table.md")}


def make_scans(root: Path, volumes: int, seed: int) -> Path:
    """Write scans as NIfTI volumes with masks and make a data set of them, unless that is done; return its folder."""
    dataset = root / "deeplesion"
    if not (dataset / "deeplesion.json").is_file():
        raw = root / "volumes"
        raw.mkdir(parents=True, exist_ok=True)
        for number in range(volumes):
            arrays = draw_scan(np.random.default_rng([seed, number]))
            for kind, array in zip(("image", "label"), arrays, strict=True):
                affine = np.diag([*np.multiply(SPACING, -1), 1.0])  # LPI
                nib.save(nib.Nifti1Image(array, affine), raw / f"scan{number:03d}_{kind}.nii")
        prepare_deeplesion(str(dataset), volumes=str(raw), split_by=(0.65, 0.1, 0.25), seed=seed)
    return dataset


def draw_scan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """HU (int16) of a lung with a ball and three vessels, and the ball's mask (uint8); (X, Y, Z) in LPI.

    Every slice shows a vessel as a disc, slightly shifted from the last. The slice through the ball's centre shows it
    as a disc too, its radius and density drawn as the vessels' are: only other slices tell them apart.
    """
    x, y, z = np.indices((SIZE, SIZE, SLICES), dtype=np.float32)
    z -= SLICES // 2
    hu = rng.normal(-800, 40, x.shape).astype(np.float32)
    mask = np.zeros(x.shape, np.uint8)
    places: list[np.ndarray] = []
    while len(places) < 4:
        place = rng.uniform(16, SIZE - 16, 2)
        if all(np.hypot(*(place - other)) > 28 for other in places):
            places.append(place)
    for i, (px, py) in enumerate(places):
        radius, bright = rng.uniform(4, 6.5), rng.uniform(0, 80)  # mm, HU
        shift = rng.uniform(-0.5, 0.5, 2) * (i > 0)  # px from slice to slice
        across = np.hypot(x - px - shift[0] * z, y - py - shift[1] * z) * SPACING[0]
        distance = across if i else np.hypot(across, z * SPACING[2])
        hu += np.clip((radius - distance) / SPACING[0] + 0.5, 0, 1) * (bright + 800)
        if i == 0:
            mask[distance < radius] = 1
    return hu.round().astype(np.int16), mask


def _write_table(root: Path, found: dict[str, list[dict[str, float]]]) -> None:
    rows: list[dict[str, Any]] = []
    table = [f"| sensitivity at | {' | '.join(RATES)} false positives per image | 0.5, seed by seed |"]
    table.append("|---" * (len(RATES) + 2) + "|")
    for arm, scores in found.items():
        values = np.array([[s[f"sensitivity_at_{rate}"] for rate in RATES] for s in scores])
        for seed, line in enumerate(values):
            at = {f"at_{rate}": f"{value:.4f}" for rate, value in zip(RATES, line, strict=True)}
            rows.append({"side": arm, "seed": seed, **at})
        means = [f"{v.mean():.3f} ± {v.std(ddof=1) if len(v) > 1 else 0:.3f}" for v in values.T]
        table.append(f"| {arm} | {' | '.join(means)} | {', '.join(f'{v:.3f}' for v in values[:, 0])} |")
    write_csv(root / "table.csv", rows, list(rows[0]))
    write_atomic(root / "table.md", ("\n".join(table) + "\n").encode())


if __name__ == "__main__":
    run_function(lesion_context)
