"""Measure input pipelines, networks and whole-volume inference against what people would use instead.

    python scripts/benchmark.py                                    the list of benchmarks
    python scripts/benchmark.py input_pipeline --json input.json   one of them

What is measured is stated with each number. All implementations run alternately in the same session, after a warm-up,
with the same number of threads; medians and quartiles are of the repeats; the result says where and with what it was
measured.
"""

import inspect
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fire
import torch
from benchmarks.evaluation import compare_evaluation
from benchmarks.gpu import measure_gpu
from benchmarks.inputs import compare_pipelines, compare_stacks
from benchmarks.network_steps import compare_export, compare_knobs, compare_networks
from benchmarks.race import race
from benchmarks.scale import measure_many_images
from benchmarks.startup import measure_startup
from benchmarks.volumes import compare_inference, compare_volume_input

from vdt_workflows.files import write_json
from vdt_workflows.report.cells import find_commit

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "input_pipeline": compare_pipelines,
    "network": compare_networks,
    "knobs": compare_knobs,
    "export": compare_export,
    "inference": compare_inference,
    "volume_input": compare_volume_input,
    "stack_input": compare_stacks,
    "many_images": measure_many_images,
    "startup": measure_startup,
    "evaluation": compare_evaluation,
    "gpu": measure_gpu,
    "race": race,
}


def make_command(name: str) -> Callable[..., None]:
    """Give a benchmark as a command that also takes `json`, and prints and writes what the function returns."""
    function = BENCHMARKS[name]
    signature = inspect.signature(function)
    option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None)

    def command(*args: Any, json: str | None = None, **settings: Any) -> None:
        report(name, function(*args, **settings), json)

    command.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what fire reads
        parameters=[*signature.parameters.values(), option], return_annotation=None
    )
    command.__doc__ = (inspect.getdoc(function) or "").replace("\nArgs:\n", "\nArgs:\n    json: file for the result.\n")
    return command


def report(name: str, found: dict[str, Any], file: str | None) -> None:
    """Print a result and the machine it is of, and write them as JSON if a file is named."""
    packages = ("torch", "torchvision", "monai", "pillow", "simplejpeg", "numpy")
    machine = {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": 1,  # torch's, of each implementation; Pillow and simplejpeg have no threads of their own
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": find_commit(),
    }
    result = {"machine": machine, name: found}
    for heading, part in result.items():
        print(f"\n{heading}")
        for key, value in part.items():
            print(f"  {key:34} {_format(value)}")
    if file is not None:
        write_json(file, result)


def _format(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    if "median" in value:
        return f"{value['median']} ({value['q25']} .. {value['q75']})"
    return "   ".join(f"{key} {_format(part)}" for key, part in value.items())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    fire.Fire({name: make_command(name) for name in BENCHMARKS})
