"""Kill processes, take disk and memory away, and count what becomes of it."""

import json as json_format
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from networks.checkpoints import load_whole
from tests.faults import outcomes
from tests.faults.outcomes import (
    BUNDLE,
    OUTCOMES,
    in_child,
    last_sentence,
    make_classes,
    outcome_of_child,
    quiet,
    read_weights,
    report,
    split_names,
    train,
)
from tests.support.bundle_runs import ROOT
from vdt_transforms import LoadNaturalImage
from vdt_workflows.data.images import find_images
from vdt_workflows.files import read_csv
from vdt_workflows.packaging.package import package_bundle
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.images import prepare_images

Job = tuple[Callable[[Path], Any], Callable[[Path], dict[str, Any]]]


# Kills


def kills(
    times: int = 20,
    seed: int = 0,
    what: Any = "training,preparation,packaging",
    after: str = "",
    json: str | None = None,
) -> dict[str, Any]:
    """Kill at random moments (-9, every second time -15), give the command again, and compare with an undisturbed run.

    A killed training must end with the same weights and history, a killed preparation with the same files and a killed
    packaging with the same zip, bit for bit. After the kill no file under a final name may be cut short, what was
    finished may not be done again, and after the second run nothing unfinished may be left.

    Args:
        times: kills of each kind.
        seed: of the moments.
        what: the kinds, by commas.
        after: a file of the output, such as eval/resume.pt: kill as soon as it is there.
        json: file for the result.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    result = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for name in split_names("what", what, ["training", "preparation", "packaging"]):
            root = Path(folder, name)
            root.mkdir()
            result[name] = _kill_often(*_find_job(name, root), root, times, rng, after)
    return report("kills", result, json)


def _find_job(name: str, root: Path) -> Job:
    """What is killed, as a function of its output folder, and what of that folder must be the same again."""
    if name == "packaging":
        return lambda folder: package_bundle(BUNDLE.name, output_dir=str(folder)), lambda folder: _read(folder, "zip")
    if name == "training":
        images = make_classes(root / "images")
        find_images(images)
        return lambda folder: train(images, folder), _read_training
    if name == "preparation":
        images = make_classes(root / "images", 60, 300, 400)
        return lambda folder: prepare_images(str(images), str(folder), 128, workers=2), lambda f: _read(f, "jpg")
    raise ValueError(name)


def _read_training(folder: Path) -> dict[str, Any]:
    """Weights, and the rows of the history but for the times they took."""
    rows = read_csv(folder / "eval" / "history.csv", ["epoch"], others=True)
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return {"history": history, **{name: value.tolist() for name, value in read_weights(folder).items()}}


def _finished(folder: Path) -> dict[str, Any]:
    """What a run that goes on must not do again: epochs of a training, and pictures that are recorded as finished."""
    done: dict[str, Any] = {}
    state, history = folder / "eval" / "resume.pt", folder / "eval" / "history.csv"
    if state.is_file():
        epochs = torch.load(state, weights_only=True)["epoch"]
        done["seconds"] = [row["seconds"] for row in read_csv(history, ["seconds"], others=True)[:epochs]]
    for record in folder.rglob(".vdt_records/**/*.json"):
        place = folder / record.parent.relative_to(next(folder.rglob(".vdt_records")))
        done |= {str(file): file.stat().st_ino for file in place.glob("*.jpg")}
    return done


def _done_again(folder: Path, before: dict[str, Any]) -> list[str]:
    epochs = before.pop("seconds", [])
    after = (
        [row["seconds"] for row in read_csv(folder / "eval" / "history.csv", ["seconds"], others=True)]
        if epochs
        else []
    )
    again = ["epochs that were finished were trained again"] if after[: len(epochs)] != epochs else []
    return again + [f"{name} was written again" for name, inode in before.items() if Path(name).stat().st_ino != inode]


def cut_short(folder: Path) -> list[str]:
    """Name the files under final names that are not whole."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".jpg": LoadNaturalImage(),
        ".pt": load_whole,
        ".json": lambda file: json_format.loads(file.read_text()),
        ".zip": lambda file: zipfile.ZipFile(file).testzip(),
        ".png": lambda file: Image.open(file).verify(),
        ".csv": lambda file: file.read_bytes().endswith(b"\n") or 1 / 0,
    }
    bad = []
    for file in folder.rglob("*") if folder.is_dir() else ():
        if file.suffix in readers and file.is_file():
            try:
                readers[file.suffix](file)
            except Exception as error:  # broken bytes raise whatever they lead to
                bad.append(f"{file.name} is cut short ({type(error).__name__})")
    return bad


def _read(folder: Path, suffix: str) -> dict[str, bytes]:
    """Read all files of a kind; hidden ones are not under a final name."""
    files = [file for file in folder.rglob(f"*.{suffix}") if not file.name.startswith(".")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _kill_often(
    run: Callable[[Path], Any],
    read: Callable[[Path], dict[str, Any]],
    root: Path,
    times: int,
    rng: np.random.Generator,
    after: str,
) -> dict[str, Any]:
    start = time.monotonic()
    status, output = in_child(lambda: run(root / "undisturbed"))
    whole = time.monotonic() - start
    expected = {} if status else read(root / "undisturbed")
    if not expected:
        raise RuntimeError(f"the undisturbed run failed: {last_sentence(output)}")
    counts: Counter[str] = Counter(dict.fromkeys((*OUTCOMES, "killed"), 0))
    details = []
    for i in range(times):
        folder = root / f"killed{i}"
        limit = 0.0 if after else float(rng.uniform(0.01, whole))
        end = signal.SIGTERM if i % 2 else signal.SIGKILL
        status, _ = in_child(lambda folder=folder: run(folder), limit, folder / after if after else None, end)
        counts["killed"] += status == -end
        time.sleep(1.2)  # processes that follow it notice within a second
        wrong, before = cut_short(folder), _finished(folder)
        status, output = in_child(lambda folder=folder: run(folder))
        if status == 0:
            wrong += [] if read(folder) == expected else ["another result"]
            wrong += _done_again(folder, before)
            wrong += [f"{file.name} is left over" for file in folder.rglob("*.part")]
        said = last_sentence(output)
        ended = (
            "lost" if wrong else "survived" if status == 0 else "refused" if said.startswith("sentence") else "unclear"
        )
        counts[ended] += 1
        details += [f"{i}: {'; '.join(wrong) or said}"] if ended != "survived" else []
        shutil.rmtree(folder)
    return {**counts, "seconds_undisturbed": round(whole, 2), "details": details}


# Places


def places(json: str | None = None) -> dict[str, Any]:
    """Prepare and train onto a disk that is full, and one that is read-only.

    With the right to mount, a small tmpfs; else a limit on the size of a file stands for the full disk.
    """
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        images = make_classes(Path(folder, "images"), 12, 300, 400)
        find_images(images)
        jobs = {
            "preparation": lambda target: prepare_images(str(images), str(target), 128, workers=1),
            "training": lambda target: train(images, target),
        }
        for kind in ("full disk", "read-only disk"):
            for job, run in jobs.items():
                result[f"{kind}, {job}"] = _run_in_place(kind, run, Path(folder, f"{kind} {job}"))
    return report("places", result, json)


def _run_in_place(kind: str, run: Callable[[Path], Any], place: Path) -> dict[str, Any]:
    place.mkdir()
    options = "size=96k" if kind == "full disk" else "size=96k,ro"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    if not mounted and kind == "read-only disk":
        place = Path("/proc/read-only")  # where nobody can write

    def run_limited() -> None:
        if not mounted and kind == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        run(place / "out")

    try:
        row = outcome_of_child(*in_child(run_limited))
        bad = cut_short(place)
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=False)
    return outcomes.outcome("lost", *bad) if bad else row


# Processes that die


class KillsItsLoader(Dataset):
    """Eight samples, of which the sixth kills the process that asks for it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return kill_itself(index) if index == 5 else index


def kill_itself(number: int) -> int:
    """Kill the process that runs this."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def processes(seconds: float = 300, json: str | None = None) -> dict[str, Any]:
    """Kill a preparing process, a loader process, and one of two ranks; nothing may wait for ever.

    Args:
        seconds: until a run counts as hanging.
        json: file for the result.
    """
    jobs = {
        "preparing process": lambda: list(run_parallel(kill_itself, [1, 2], workers=2)),
        "loader": lambda: list(DataLoader(KillsItsLoader(), 2, num_workers=1)),
    }
    with tempfile.TemporaryDirectory() as folder, quiet():
        result = {name: outcome_of_child(*in_child(job, seconds)) for name, job in jobs.items()}
        result["rank of two"] = _kill_rank(Path(folder), seconds)
    return report("processes", result, json)


def _kill_rank(folder: Path, seconds: float) -> dict[str, Any]:
    images = make_classes(folder / "images")
    configs = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "multi_gpu_train")]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    words += ["--config_file", str(configs), "--bundle_root", str(BUNDLE), "--dataset_dir", str(images)]
    words += ["--ckpt_dir", str(folder / "models"), "--output_dir", str(folder / "eval")]
    settings = {**outcomes.TINY, "epochs": 40}
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with (folder / "log").open("w") as log:
        main = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        while not (folder / "eval" / "resume.pt").is_file() and main.poll() is None:
            if time.monotonic() - start > seconds:
                break
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-P", str(main.pid)], capture_output=True, text=True, check=False)
        ranks = [int(word) for word in found.stdout.split()]
        if main.poll() is None and ranks:
            os.kill(ranks[-1], signal.SIGKILL)
        killed = time.monotonic()
        try:
            status = main.wait(seconds)
        except subprocess.TimeoutExpired:
            for process in (*ranks, main.pid):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return outcomes.outcome("lost", "it hung")
    if not (folder / "eval" / "resume.pt").is_file():
        return outcomes.outcome("lost", "no state to go on from")
    named = any(word in (folder / "log").read_text() for word in ("SIGKILL", "exitcode"))
    after = f"ended {time.monotonic() - killed:.0f} s after the kill, torchrun names the rank; the run can go on"
    return outcomes.outcome("refused", after) if status and named else outcomes.outcome("unclear", "no rank is named")


# Training that cannot go on


def training(json: str | None = None) -> dict[str, Any]:
    """Train with a rate that makes the loss no number, and with too little memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, quiet():
        images, diverged = make_classes(Path(folder, "images")), Path(folder, "nan")
        find_images(images)
        row = outcome_of_child(*in_child(lambda: train(images, diverged, learning_rate=1e30)))
        if (diverged / "models" / "model.pt").is_file():
            weights = [value for value in read_weights(diverged).values() if value.is_floating_point()]
            if not all(value.isfinite().all() for value in weights):
                row = outcomes.outcome("lost", "weights of NaN were written")

        def train_in_little_memory() -> None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limit = size + 1_000_000_000  # enough for threads and modules, so that a tensor is what finds no room
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            train(images, Path(folder, "memory"), base_channels=1024)  # 34 GB, whatever this process has to reuse

        result = {
            "loss of NaN": row,
            "too little memory": outcome_of_child(*in_child(train_in_little_memory)),
        }
    return report("training", result, json)
