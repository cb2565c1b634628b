"""The benchmark of what passes before work begins, each figure of a process that has imported what comes before."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from benchmarks.timing import quartiles_of

from networks import DepthFirst, ResUNet3D
from vdt_workflows.training.checkpoints import save_weights

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "bcv_multiorgan_segmentation"
ALL_NAMES = """
import {package}
for name in set({package}.__all__) - {{"LesionDetector", "VolumeLesionDetector"}}:
    getattr({package}, name)
"""
FIRST_BATCH = """
class Reached(BaseException):
    pass
def stop(self, engine, batch):
    raise Reached
monai.engines.SupervisedEvaluator._iteration = stop
try:
    monai.bundle.run(config_file={config!r}, bundle_root={bundle!r}, dataset_dir={volume!r}, ckpt_path={weights!r},
                     output_dir={output!r}, logging_file=False)
    raise SystemExit("no batch was reached")
except Reached:
    pass
"""
# What is measured, and what was imported before: the statements of either.
IMPORTS = {
    "torch": ("", "import torch"),
    "monai, after torch": ("import torch", "import monai"),
    "networks, after torch": ("import torch", "import networks"),
    "networks with all names, after torch": ("import torch", ALL_NAMES.format(package="networks")),
    "networks with all names, after torch and monai": ("import torch, monai", ALL_NAMES.format(package="networks")),
    "vdt_workflows, after torch and monai": ("import torch, monai", "import vdt_workflows"),
    "vdt_workflows with all names, after torch and monai": (
        "import torch, monai",
        ALL_NAMES.format(package="vdt_workflows"),
    ),
    "vdt_transforms, after torch and monai": ("import torch, monai", "import vdt_transforms"),
}


def measure_startup(repeats: int = 5) -> dict[str, Any]:
    """Measure how long the packages take to import, and `monai.bundle.run` to reach the first batch of an inference.

    Args:
        repeats: processes of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = {**IMPORTS, "first batch of BCV inference, after torch and monai": _first_batch(Path(folder))}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
        for repeat in range(repeats + 1):
            for name, (before, statements) in measured.items():
                found = time_statements(before, statements)
                if repeat:  # the first fills the file cache
                    runs[name].append(found)
    return {
        "settings": {"repeats": repeats, "processes": "fresh ones, threads 1, files in the file cache"},
        "seconds_of_a_core": quartiles_of({name: [cpu for cpu, _ in found] for name, found in runs.items()}),
        "seconds_by_the_clock": quartiles_of({name: [clock for _, clock in found] for name, found in runs.items()}),
    }


def _first_batch(folder: Path) -> tuple[str, str]:
    volume, weights = folder / "volume.nii.gz", folder / "model.pt"
    voxels = np.random.default_rng(0).integers(-900, 300, (40, 40, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.8, -0.8, 3.0, 1.0])), volume)
    save_weights(DepthFirst(ResUNet3D(num_classes=14, norm="instance")), weights)
    names = {"config": BUNDLE / "configs" / "inference.yaml", "bundle": BUNDLE, "volume": volume, "weights": weights}
    files = {name: str(path) for name, path in {**names, "output": folder / "eval"}.items()}
    return "import torch, monai", FIRST_BATCH.format(**files)


def time_statements(before: str, statements: str) -> tuple[float, float]:
    """Run `before`, then `statements`, in a new Python: the processor's and the clock's seconds of the latter.

    Raises:
        RuntimeError: with the end of what the process wrote, if it fails.
    """
    lines = ["import sys, time", before, "_start = time.process_time(), time.perf_counter()", statements]
    lines += ["_end = time.process_time(), time.perf_counter()", "print(_end[0] - _start[0], _end[1] - _start[1])"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{json.dumps(statements)} failed: {done.stderr[-1000:]}")
    cpu, clock = done.stdout.split()[-2:]
    return float(cpu), float(clock)
