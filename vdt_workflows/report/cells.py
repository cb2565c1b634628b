"""Runs of bundles in processes of their own: none is done twice, and one that fails does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import monai.bundle
import torch

from networks import read_checkpoint
from vdt_workflows.errors import root_cause
from vdt_workflows.files import read_json, remove_unfinished, write_atomic, write_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.naming import join_words
from vdt_workflows.parallel import follow_parent

SHORT_SPIN = ("GOMP_SPINCOUNT", "100000")  # threads that spin for ever while they wait take the cores of others
COMMAND = ("python", "-W", "ignore", "-m", "monai.bundle")
PRELOADED = ["vdt_workflows", "vdt_transforms", "networks", "monai.bundle", "monai.networks.nets", "monai.engines"]


@dataclass(frozen=True)
class Stage:
    """One run of a bundle.

    Attributes:
        name: of the stage.
        configs: config files, from the bundle's folder or absolute; later ones overlay earlier ones.
        settings: overrides by config id; `args_file` names a file of more.
    """

    name: str
    configs: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Give the words after `python -m monai.bundle` that do the same in the bundle's folder."""
        words = ["run", "--config_file", str(list(self.configs)), "--bundle_root", "."]
        for name, value in self.settings.items():
            words += [f"--{name}", value if isinstance(value, str) else repr(value)]
        return words


@dataclass(frozen=True)
class Cell:
    """Stages that fill one folder.

    Attributes:
        name: for messages.
        folder: absolute; gets `result.json` when all is done, or `error.txt`, beside `log.txt` and `commands.txt`.
        bundle: the bundle's folder, absolute.
        stages: in their order; a finished one is not run again.
        weights: the file of weights that the stages leave, for the record of its size.
        threads: of torch on the CPU; 0 leaves them as they are.
    """

    name: str
    folder: str
    bundle: str
    stages: tuple[Stage, ...]
    weights: str = ""
    threads: int = 0

    def result(self) -> dict[str, Any] | None:
        """Read `result.json`: what each stage took, and which versions ran; None before the end."""
        path = Path(self.folder) / "result.json"
        return read_json(path, "the command again without it") if path.is_file() else None

    def error(self) -> str | None:
        """Read the sentence of the error that the last try ended with, if it did."""
        path = Path(self.folder) / "error.txt"
        return path.read_text().strip() if path.is_file() else None


def run_bundle(bundle: str, configs: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Run a bundle's configs as a user would, in a process of its own that shows its progress.

    Raises:
        ChildProcessError: if the run fails.
    """
    stage = Stage("", tuple(f"configs/{name}.yaml" for name in configs), settings)
    command = [sys.executable, *COMMAND[1:], *stage.words()]
    os.environ.setdefault(*SHORT_SPIN)
    if subprocess.run(command, cwd=find_bundles() / bundle, check=False).returncode:
        raise ChildProcessError(f"the run of bundles/{bundle} failed; its own message is above")


def run_cells(
    cells: Sequence[Cell],
    *,
    workers: int = 1,
    devices: Sequence[str] = (),
    ray: str | None = None,
    ray_resources: Mapping[str, float] | None = None,
) -> Iterator[Cell]:
    """Run the cells that have no result yet, and yield each when it has ended, well or not (see `Cell.error`).

    Args:
        cells: in the order in which they begin.
        workers: how many run at once on this machine.
        devices: values of CUDA_VISIBLE_DEVICES, which the workers take in turn; without any, the environment's stays.
        ray: run on a Ray cluster at this address instead ("auto", "ray://host:10001"; "local" starts one here). Its
            machines must see the cells' folders, the bundles and the data under the same paths.
        ray_resources: what a cell asks of the cluster, such as {"num_cpus": 4, "num_gpus": 1}; one CPU by default.

    Raises:
        ImportError: if `ray` is asked for and not installed.
    """
    waiting = [cell for cell in cells if cell.result() is None]
    if ray is not None:
        yield from _run_on_ray(waiting, ray, ray_resources or {"num_cpus": 1})
        return
    free = list(range(workers))
    running: dict[Any, tuple[Any, Cell, int]] = {}  # by sentinel
    try:
        while waiting or running:
            while waiting and free:
                slot = free.pop(0)
                cell = waiting.pop(0)
                process = _start(cell, devices[slot % len(devices)] if devices else None)
                running[process.sentinel] = (process, cell, slot)
            for sentinel in wait(list(running)):
                process, cell, slot = running.pop(sentinel)
                _finish(process, cell)
                free.append(slot)
                yield cell
    finally:
        for process, _, _ in running.values():
            process.kill()
            process.join()


def _run_on_ray(cells: Sequence[Cell], address: str, resources: Mapping[str, float]) -> Iterator[Cell]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray is not installed; pip install 'vdt-bundles[ray]', or leave the option out") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="warning")
    try:
        task = ray.remote(max_retries=0)(_run_apart).options(**resources)
        running = {task.remote(cell): cell for cell in cells}
        while running:
            (reference,), _ = ray.wait(list(running))
            cell = running.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:  # the machine or its worker is gone
                line = str(error).strip().partition("\n")[0]
                write_atomic(Path(cell.folder) / "error.txt", f"Ray: {line}".encode())
            yield cell
    finally:
        if started:
            ray.shutdown()


def _run_apart(cell: Cell) -> None:
    """Run a cell in a process of its own on a machine of the cluster, and wait for it."""
    _finish(_start(cell, os.environ.get("CUDA_VISIBLE_DEVICES")), cell)


def _start(cell: Cell, device: str | None) -> Any:
    os.environ.setdefault(*SHORT_SPIN)
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    context.set_forkserver_preload(PRELOADED)  # imports cost seconds: once, not for each cell
    process = context.Process(target=run_cell, args=(cell, device), name=cell.name)
    process.start()
    return process


def _finish(process: Any, cell: Cell) -> None:
    process.join()
    if cell.result() is None and cell.error() is None:
        sentence = f"the process ended with code {process.exitcode}"
        if process.exitcode is not None and process.exitcode < 0:
            sentence = f"the process was killed (signal {-process.exitcode}), perhaps for lack of memory"
        write_atomic(Path(cell.folder) / "error.txt", sentence.encode())


def run_cell(cell: Cell, device: str | None = None) -> None:
    """Run what is missing of a cell in this process, which ends with this.

    Raises:
        SystemExit: if a stage fails; `error.txt` says how, and `log.txt` all of it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    follow_parent()
    folder = Path(cell.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    remove_unfinished(folder, folder / "stages")
    with (folder / "log.txt").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    commands = [join_words([*COMMAND, *stage.words()]) for stage in cell.stages]
    write_atomic(folder / "commands.txt", "\n".join([f"cd {join_words([cell.bundle])}", *commands, ""]).encode())
    try:
        for stage in cell.stages:
            _run_stage(cell, stage)
        write_json(folder / "result.json", _describe(cell))
    except BaseException as error:
        traceback.print_exc()
        cause = root_cause(error)  # MONAI wraps errors in others that say less
        line = (str(cause).strip().splitlines() or [""])[-1].strip()
        write_atomic(folder / "error.txt", f"{type(cause).__name__}: {line}".encode())
        sys.stderr.flush()
        sys.exit(1)


def _run_stage(cell: Cell, stage: Stage) -> None:
    record = Path(cell.folder) / "stages" / f"{stage.name}.json"
    if record.is_file():
        return
    if cell.threads:
        torch.set_num_threads(cell.threads)
    os.chdir(cell.bundle)
    sys.argv = ["monai.bundle", *stage.words()]  # what run.json records
    start, busy = time.perf_counter(), time.process_time()
    try:
        monai.bundle.run(config_file=list(stage.configs), bundle_root=".", **stage.settings)
    except SystemExit as end:
        if end.code:
            raise  # else a training that was finished when its cell was killed
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    write_json(record, {name: round(value, 2) for name, value in took.items()}, indent=None)


def find_commit() -> str | None:
    """Ask git for the commit of this code, with "-dirty" if it was changed since; None outside of a clone."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None


def _describe(cell: Cell) -> dict[str, Any]:
    stages = Path(cell.folder) / "stages"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    state = read_checkpoint(cell.weights) if cell.weights else {}
    return {
        "parameters": sum(value.numel() for value in state.values() if value.is_floating_point()),
        "commit": find_commit(),
        "stages": {s.name: read_json(stages / f"{s.name}.json") for s in cell.stages},
        "machine": f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "monai": monai.__version__},
        "threads": cell.threads,
    }
