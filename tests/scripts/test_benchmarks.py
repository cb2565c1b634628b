"""Each benchmark that the documents name is run once, on next to nothing, and what it compares must still agree."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import benchmark
import benchmarks.network_steps
import benchmarks.startup as benchmark_startup
import benchmarks.volumes
import fire
import pytest

from tests.support.bundle_runs import ROOT
from tests.support.documents import DOCUMENTS, inline

SHORT = {
    "input_pipeline": {"images": 4, "repeats": 1, "size": 32, "workers": [1]},
    "network": {"groups": ["encoder"], "steps": 1, "repeats": 1},
    "knobs": {"groups": ["encoder"], "variants": ["plain", "checkpointing"], "steps": 1, "repeats": 1},
    "export": {"names": ["ResNet3D-18 classifier"], "repeats": 1},
    "inference": {"slices": [14], "size": 64, "classes": 2},
    "volume_input": {"cases": 1, "shape": [32, 32, 16], "patches": 1},
    "many_images": {"images": 200, "classes": 2, "loaders": 1},
    "stack_input": {"slices": 12, "intervals": [5], "repeats": 1},
    "gpu": {"minutes": 0.001, "size": 0.01},
    "evaluation": {"images": 20, "boxes": 5, "shape": [96, 96, 60], "spacing": [4, 4, 6], "repeats": 1},
}
DOCUMENTED = {
    shlex.split(line)[2]: line
    for path in DOCUMENTS
    for line in inline(path)
    if line.startswith("python scripts/benchmark.py")
}


def differences(result):
    """All numbers of a result that say how far apart the implementations are."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from differences(value)
        elif "differ" in name:
            yield value


def test_a_command_takes_what_the_function_takes_and_a_file(capsys, tmp_path, monkeypatch):
    def measure(repeats: int = 5):
        """Measure.

        Args:
            repeats: passes.
        """
        return {"seconds": {"median": repeats, "q25": 1, "q75": 2}}

    monkeypatch.setitem(benchmark.BENCHMARKS, "tiny", measure)
    command = benchmark.make_command("tiny")
    fire.Fire({"tiny": command}, command=["tiny", "--repeats", "3", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text())["tiny"] == measure(3)
    assert "3 (1 .. 2)" in capsys.readouterr().out
    assert "json: file for the result" in command.__doc__


def test_every_documented_benchmark_is_run_here():
    assert DOCUMENTED.keys() == {*SHORT, "startup"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_documented_benchmark_runs_and_what_it_compares_agrees(name, tmp_path, monkeypatch):
    words = shlex.split(DOCUMENTED[name])[1:]
    words += [text for key, value in SHORT[name].items() for text in (f"--{key}", repr(value))]
    words += ["--json", str(tmp_path / "result.json")]
    if name == "network":  # as documented, with a process for each network; the others in this one
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-W", "ignore", *words]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        for module in (benchmarks.network_steps, benchmarks.volumes):
            monkeypatch.setattr(module, "run_alone", lambda function, *arguments: function(*arguments))
        fire.Fire({name: benchmark.make_command(name)}, command=words[1:])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result[name]
    assert all(abs(value) < 1e-3 for value in differences(result)), result


@pytest.mark.slow
def test_the_benchmark_of_the_start_times_imports_and_reaches_a_first_batch(monkeypatch):
    monkeypatch.setattr(benchmark_startup, "IMPORTS", {"numpy": ("", "import numpy")})  # of eight, in processes each
    seconds = benchmark_startup.measure_startup(1)["seconds_by_the_clock"]
    assert len(seconds) == 2
    assert all(part["median"] > 0 for part in seconds.values())
