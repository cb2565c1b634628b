"""Damage files, kill processes and take the disk away, and count what becomes of it.

    python tests/faults/fault_suite.py files --number 2000 --json files.json  images, volumes, tables, checkpoints
    python tests/faults/fault_suite.py kills --times 20 --json kills.json  kill -9 in training, preparation, packaging
    python tests/faults/fault_suite.py places --json places.json  full disk, read-only disk
    python tests/faults/fault_suite.py processes --json processes.json  a loader process and a rank that die
    python tests/faults/fault_suite.py training --json training.json  a loss of NaN, and too little memory

Each case ends as *survived* (the result is whole), *refused* (one sentence that names the file or the setting),
*unclear* (an error without such a sentence; must be 0) or *lost* (a result that was there is gone or wrong; must be 0).
"""

from __future__ import annotations

import io
import json as json_format
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import monai.bundle
import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.transforms import LoadImaged
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from torch.utils.data import DataLoader

from networks import ResNet3DClassifier, load_pretrained
from vdt_transforms import LoadNaturalImage, NoduleReader, SeriesReader
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.images import find_images
from vdt_workflows.data.nodule_positions import list_nodules
from vdt_workflows.data.nodule_tables import COLUMNS
from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.dicom import find_series
from vdt_workflows.files import write_atomic
from vdt_workflows.overrides import explanation
from vdt_workflows.packaging.package import package_bundle
from vdt_workflows.preparation.image_cache import CacheRules, cache_images
from vdt_workflows.training.checkpoints import ResumeRun, load_weights, save_weights

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "imagenet_vdt_pretraining"
OUTCOMES = ("survived", "refused", "unclear", "lost")
TINY = {"epochs": 3, "image_size": 16, "base_channels": 4, "batch_size": 4, "num_workers": 0, "learning_rate": 0.01}


# Damaged files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a good one is made, and what reads it."""

    name: str
    make: Callable[[Path], list[Path]]  # gives the files that are damaged, one at a time
    read: Callable[[Path], Any]  # of the folder


def files(number: int = 2000, seed: int = 0, kinds: str = "", json: str | None = None) -> dict[str, Any]:
    """Damage files in seeded ways, one at a time, and read each as the bundles and scripts do.

    Args:
        number: damaged files in all, shared out to the kinds.
        seed: of the damage.
        kinds: names of kinds, by commas, in place of all.
        json: file for the result.
    """
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds.split(",")]
    result = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for position, kind in enumerate(chosen):
            share = number // len(chosen) + (position < number % len(chosen))
            result[kind.name] = damage_kind(kind, Path(folder, kind.name), share, seed)
    return _report("files", result, json)


def damage_kind(kind: Kind, folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Read `number` damaged files of one kind: how often which outcome, and the errors that are unclear."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, sum(kind.name.encode())])
    targets = kind.make(folder)
    kind.read(folder)  # what is whole must be read
    whole = {file: file.read_bytes() for file in targets}
    counts: Counter[str] = Counter()
    unclear = []
    for i in range(number):
        file = targets[int(rng.integers(len(targets)))]
        how, damaged = damage(whole[file], rng)
        file.write_bytes(damaged)
        try:
            kind.read(folder)
            counts["survived"] += 1
        except Exception as error:
            sentence = explanation(error)
            names = {str(file), str(file.parent), file.name}
            clear = sentence is not None and "\n" not in sentence and any(name in sentence for name in names)
            counts["refused" if clear else "unclear"] += 1
            if not clear:
                unclear.append(f"{i}, {file.name}, {how}: {type(error).__name__}: {str(error)[:300]}")
        counts["lost"] += any(other.read_bytes() != content for other, content in whole.items() if other != file)
        file.write_bytes(whole[file])
    return {**{outcome: counts[outcome] for outcome in OUTCOMES}, "details": unclear[:10]}


def damage(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Damage a file's content in one of the ways that disks, networks and people do."""
    data = bytearray(content)
    place = int(rng.integers(len(data)))
    length = int(rng.integers(1, max(2, len(data) // 4)))
    how = str(
        rng.choice(["cut", "bit", "bytes", "zeros", "inserted", "removed", "repeated", "empty", "other", "start"])
    )
    if how == "cut":
        del data[place:]
    elif how == "bit":
        data[place] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        for at in rng.integers(len(data), size=int(rng.integers(2, 30))):
            data[int(at)] = int(rng.integers(256))
    elif how == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif how == "inserted":
        data[place:place] = rng.integers(256, size=length, dtype=np.uint8).tobytes()
    elif how == "removed":
        del data[place : place + length]
    elif how == "repeated":
        data[place:place] = data[place : place + length]
    elif how == "empty":
        data.clear()
    elif how == "other":
        data = bytearray(b"<html><body>404 not found</body></html>\n")
    else:  # the first bytes, where formats keep what matters
        for at in rng.integers(min(len(data), 352), size=3):
            data[int(at)] = int(rng.integers(256))
    return how, bytes(data)


def _picture(seed: int, rows: int = 40, columns: int = 52) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC)


def _make_pictures(folder: Path) -> list[Path]:
    made = []
    for kind, options in (("jpg", {}), ("png", {}), ("tif", {"compression": "tiff_lzw"}), ("webp", {}), ("gif", {})):
        made.append(folder / f"a.{kind}")
        _picture(1).save(made[-1], **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture, options in (
        ("turned.jpg", _picture(2), {"exif": exif}),
        ("cmyk.jpg", _picture(3).convert("CMYK"), {}),
        ("palette.png", _picture(4).convert("P"), {}),
        ("progressive.jpg", _picture(5), {"progressive": True}),
    ):
        made.append(folder / name)
        picture.save(made[-1], **options)
    return made


def _read_pictures(folder: Path) -> None:
    load = LoadNaturalImage()
    for file in sorted(folder.iterdir()):
        load(file)


def _make_index(folder: Path) -> list[Path]:
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(3):
            _picture(i).save(folder / name / f"{i}.jpg")
    find_images(folder)
    return [folder / ".vdt_index.npz"]


def _read_index(folder: Path) -> None:
    if len(find_images(folder)["train"]) != 4:
        raise AssertionError("the index gave another list")


def _make_volumes(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    made = []
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
        for i, suffix in enumerate((".nii", ".nii.gz")):
            voxels = rng.integers(0, 3, (9, 10, 11)).astype(np.uint8 if kind == "labels" else np.int16)
            made.append(folder / kind / f"case{i}{suffix}")
            nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])), made[-1])
    return made


def _read_volumes(folder: Path) -> None:
    found = find_volumes(folder, val_fraction=0.5)
    data = [case for part in ("training", "validation") for case in found[part]]
    transform = [LoadImaged(["image", "label"], ensure_channel_first=True)]
    SeededCacheDataset(data, transform, cache="memory", progress=False)


def _make_series(folder: Path) -> list[Path]:
    made = []
    for i in range(4):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"1.2.826.0.1.3.{i + 1}"
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.Modality = "1.2.826.0.1.1", "1.2.826.0.1.2", "CT"
        dataset.PatientID, dataset.InstanceNumber = "P1", i + 1
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 2.5 * i], [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [0.7, 0.7], 2.5
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 8, 9, 1
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PhotometricInterpretation, dataset.RescaleSlope, dataset.RescaleIntercept = "MONOCHROME2", 1, -1024
        dataset.PixelData = np.full((8, 9), 1000 + i, np.uint16).tobytes()
        made.append(folder / f"{i}.dcm")
        dataset.save_as(made[-1], enforce_file_format=True)
    return made


def _read_series(folder: Path) -> None:
    for series in find_series(folder, modalities=("CT", "MR")).series:
        series.check()
    LoadImaged("image", reader=SeriesReader)({"image": str(folder)})


def _make_cube(folder: Path) -> list[Path]:
    cube = (np.arange(512) % 256).astype(np.uint8).reshape(8, 8, 8)
    np.savez(folder / "lidc1_1.npz", voxel=cube, answer1=cube)
    np.savez_compressed(folder / "lidc2_1.npz", voxel=cube, answer1=cube)
    return sorted(folder.glob("*.npz"))


def _read_cube(folder: Path) -> None:
    load = LoadImaged("image", reader=NoduleReader)
    for item in list_nodules(folder):
        load(item)


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return ResNet3DClassifier(18, 3, base_channels=4)


def _make_checkpoints(folder: Path) -> list[Path]:
    save_weights(_network(), folder / "model.pt", {"depth": 18})
    state = {"settings": {}, "epoch": 1, "iteration": 2, "objects": {}, "scaler": {}}
    torch.save(state, folder / "resume.pt")
    return [folder / "model.pt", folder / "resume.pt"]


def _read_checkpoints(folder: Path) -> None:
    for load in (load_weights, load_pretrained):
        network = ResNet3DClassifier(18, 3, base_channels=4)
        load(network, folder / "model.pt")
        expected = _network().state_dict()
        if not all(torch.equal(expected[name], value) for name, value in network.state_dict().items()):
            raise AssertionError("other weights were read")
    state = ResumeRun(str(folder / "resume.pt"), {}, {})._read()
    if state != {"settings": {}, "epoch": 1, "iteration": 2, "objects": {}, "scaler": {}}:
        raise AssertionError("another state was read")


def _make_tables(folder: Path) -> list[Path]:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    rows = [",".join(COLUMNS)]
    for i in range(12):
        values = dict.fromkeys(COLUMNS, "1") | {"nodule_id": f"n{i}", "patient_id": f"p{i}", "diameter_mm": "8.5"}
        values |= {"image": f"images/n{i}.nii.gz", "label": f"labels/n{i}.nii.gz"}
        values |= {"malignancy": str(1 + 4 * (i % 2)), "malignancy_mode": str(1 + 4 * (i % 2))}
        values |= {"malignancy_mean": str(1 + 4 * (i % 2))}
        rows.append(",".join(values[column] for column in COLUMNS))
        for kind in ("images", "labels"):
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), folder / kind / f"n{i}.nii.gz")
    (folder / "nodules.csv").write_text("\n".join(rows) + "\n")
    (folder / "positions.csv").write_text("nodule_id,x_mm,y_mm,z_mm\na,1,2,3\nb,4,5,6\n")
    return [folder / "nodules.csv", folder / "positions.csv"]


def _read_tables(folder: Path) -> None:
    find_nodules(folder)
    list_nodules(folder / "images" / "n0.nii.gz", folder / "positions.csv")


def _make_json(folder: Path) -> list[Path]:
    _make_volumes(folder)
    cases = [{"image": f"images/case{i}{s}", "label": f"labels/case{i}{s}"} for i, s in enumerate((".nii", ".nii.gz"))]
    content = {"name": "x", "labels": {"0": "background", "1": "a"}, "training": cases[:1], "validation": cases[1:]}
    (folder / "dataset.json").write_text(json_format.dumps(content, indent=1))
    return [folder / "dataset.json"]


def _read_json(folder: Path) -> None:
    find_volumes(folder)


KINDS = (
    Kind("image", _make_pictures, _read_pictures),
    Kind("image index", _make_index, _read_index),
    Kind("NIfTI", _make_volumes, _read_volumes),
    Kind("DICOM", _make_series, _read_series),
    Kind("npz", _make_cube, _read_cube),
    Kind("checkpoint", _make_checkpoints, _read_checkpoints),
    Kind("csv", _make_tables, _read_tables),
    Kind("json", _make_json, _read_json),
)


# Processes -----------------------------------------------------------------------------------------------------------


def in_child(function: Callable[[], Any], limit: float | None = None) -> tuple[int, str]:
    """Run a function in a forked process, which needs no imports; kill -9 after `limit` seconds.

    Returns:
        The exit status, -9 if it was killed, and what it wrote and raised: the sentence alone, or a traceback.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # whatever stood there, such as pytest's
            status = 0
            try:
                try:
                    function()
                except BaseException as error:
                    status = 1
                    _tell(error)
            except BaseException as error:  # torch raises that of a dead loader wherever its signal arrives
                _tell(error)
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
        deadline = None if limit is None else time.monotonic() + limit
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if deadline is not None and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                deadline = None
            time.sleep(0.002)
        output.seek(0)
        return os.waitstatus_to_exitcode(done[1]), output.read()


def _tell(error: BaseException) -> None:
    sentence = explanation(error)
    print(f"\n{'sentence' if sentence else 'traceback'}: {sentence or repr(error)}", flush=True)


def _sentence(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(("sentence: ", "traceback: "))]
    return lines[-1] if lines else ""


def _make_classes(folder: Path, number: int = 6, rows: int = 40, columns: int = 52) -> Path:
    for part, count in (("train", number), ("val", 2)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                _picture(i, rows, columns).save(folder / part / label / f"{i}.jpg")
    return folder


def _train(images: Path, folder: Path, **more: Any) -> None:
    logging.disable(logging.CRITICAL)
    monai.bundle.run(
        config_file=str(BUNDLE / "configs" / "train.yaml"),
        bundle_root=str(BUNDLE),
        dataset_dir=str(images),
        ckpt_dir=str(folder / "models"),
        output_dir=str(folder / "eval"),
        logging_file=False,
        **{**TINY, **more},
    )


def _same_weights(one: Path, other: Path) -> bool:
    a, b = (torch.load(path / "models" / "model.pt", weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _same_files(one: Path, other: Path) -> bool:
    def content(folder: Path) -> dict[str, bytes]:
        found = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.suffix == ".jpg"}

    return content(one) == content(other) and bool(content(one))


def kills(
    times: int = 20, seed: int = 0, what: str = "training,preparation", json: str | None = None
) -> dict[str, Any]:
    """Kill -9 at random moments, give the same command again, and compare with a run that nothing disturbed.

    A killed training must end with the same weights, bit for bit; a killed preparation with the same files. After a
    kill every file under a final name must be whole.

    Args:
        times: kills of each kind.
        seed: of the moments.
        what: `training`, `preparation` and, where the script that packages bundles is there, `packaging`, by commas.
        json: file for the result.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    result = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for name in what.split(","):
            root = Path(folder, name)
            root.mkdir()
            run, same = _job(name, root)
            result[name] = _kill_often(run, same, root, times, rng)
    return _report("kills", result, json)


def _job(name: str, root: Path) -> tuple[Callable[[Path], Any], Callable[[Path, Path], bool]]:
    """What is killed, as a function of its output folder, and how two outputs are compared."""
    if name == "training":
        images = _make_classes(root / "images")
        find_images(images)
        return lambda folder: _train(images, folder), _same_weights
    if name == "preparation":
        images = _make_classes(root / "images", 60, 300, 400)
        return lambda folder: cache_images(images, folder, CacheRules(128), workers=2), _same_files
    if name != "packaging":
        raise ValueError(f"what must be training, preparation or packaging, got {name!r}")

    def same(one: Path, other: Path) -> bool:
        a, b = (sorted((f.name, f.read_bytes()) for f in folder.glob("*.zip")) for folder in (one, other))
        return a == b and bool(a)

    return lambda folder: package_bundle(BUNDLE.name, output_dir=str(folder)), same


def _kill_often(
    run: Callable[[Path], Any],
    same: Callable[[Path, Path], bool],
    root: Path,
    times: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    start = time.monotonic()
    status, output = in_child(lambda: run(root / "undisturbed"))
    whole = time.monotonic() - start
    if status:
        raise RuntimeError(f"the undisturbed run failed: {_sentence(output)}")
    counts: Counter[str] = Counter(dict.fromkeys((*OUTCOMES, "killed"), 0))
    details = []
    for i in range(times):
        folder = root / f"killed{i}"
        status, _ = in_child(lambda folder=folder: run(folder), limit=float(rng.uniform(0.02, whole)))
        counts["killed"] += status == -signal.SIGKILL
        time.sleep(1.2)  # processes that follow it notice within a second
        status, output = in_child(lambda folder=folder: run(folder))
        if status == 0 and same(root / "undisturbed", folder):
            counts["survived"] += 1
        else:
            outcome = "lost" if status == 0 else "refused" if _sentence(output).startswith("sentence") else "unclear"
            counts[outcome] += 1
            details.append(f"{i}: {_sentence(output) or 'another result'}")
        shutil.rmtree(folder)
    return {**counts, "seconds_undisturbed": round(whole, 2), "details": details}


# Places --------------------------------------------------------------------------------------------------------------


def places(json: str | None = None) -> dict[str, Any]:
    """Prepare and train onto a disk that is full, and one that is read-only.

    With the right to mount, a small tmpfs; else a limit on the size of a file stands for the full disk.
    """
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        images = _make_classes(Path(folder, "images"), 12, 300, 400)
        find_images(images)
        jobs = {
            "preparation": lambda target: cache_images(images, target, CacheRules(128), workers=1),
            "training": lambda target: _train(images, target),
        }
        for kind in ("full disk", "read-only disk"):
            for job, run in jobs.items():
                result[f"{kind}, {job}"] = _in_place(kind, run, Path(folder, f"{kind} {job}"))
    return _report("places", result, json)


def _in_place(kind: str, run: Callable[[Path], Any], place: Path) -> dict[str, Any]:
    place.mkdir()
    options = "size=96k" if kind == "full disk" else "size=96k,ro"
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    ).returncode
    if not mounted and kind == "read-only disk":
        place = Path("/proc/read-only")  # where nobody can write

    def limited() -> None:
        if not mounted and kind == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        run(place / "out")

    try:
        status, output = in_child(limited)
        partial = [file.name for file in place.rglob("*.jpg") if not _opens(file)] if place.is_dir() else []
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=False)
    sentence = _sentence(output)
    outcome = "survived" if not status else "refused" if sentence.startswith("sentence") else "unclear"
    outcome = "lost" if partial else outcome
    means = "tmpfs" if mounted else "limit on a file's size" if kind == "full disk" else "/proc"
    return {**dict.fromkeys(OUTCOMES, 0), outcome: 1, "by": means, "details": [sentence]}


def _opens(file: Path) -> bool:
    try:
        LoadNaturalImage()(file)
        return True
    except ValueError:
        return False


# Processes that die, and training that cannot go on ------------------------------------------------------------------


class _Dies(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def _die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def processes(seconds: float = 300, json: str | None = None) -> dict[str, Any]:
    """Kill a preparing process, a loader process, and one of two ranks; nothing may wait for ever.

    Args:
        seconds: until a run counts as hanging.
        json: file for the result.
    """
    from vdt_workflows.parallel import run_parallel

    def load() -> None:
        list(DataLoader(_Dies(), 2, num_workers=1))

    result = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for name, job in (("preparing process", lambda: list(run_parallel(_die, [1, 2], workers=2))), ("loader", load)):
            status, output = in_child(job, seconds)
            result[name] = _outcome(status, _sentence(output))
        result["rank of two"] = _kill_rank(Path(folder), seconds)
    return _report("processes", result, json)


def _outcome(status: int, sentence: str) -> dict[str, Any]:
    hung = status == -signal.SIGKILL
    outcome = (
        "lost" if hung else "refused" if sentence.startswith("sentence") else "survived" if not status else "unclear"
    )
    return {**dict.fromkeys(OUTCOMES, 0), outcome: 1, "details": ["it hung" if hung else sentence]}


def _kill_rank(folder: Path, seconds: float) -> dict[str, Any]:
    images = _make_classes(folder / "images")
    configs = [str(BUNDLE / "configs" / f"{name}.yaml") for name in ("train", "multi_gpu_train")]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    words += ["--config_file", str(configs), "--bundle_root", str(BUNDLE), "--dataset_dir", str(images)]
    words += ["--ckpt_dir", str(folder / "models"), "--output_dir", str(folder / "eval")]
    settings = {**TINY, "epochs": 40}
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
            status = -signal.SIGKILL
    resumable = (folder / "eval" / "resume.pt").is_file()
    named = "SIGKILL" in (folder / "log").read_text() or "exitcode" in (folder / "log").read_text()
    outcome = "lost" if status == -signal.SIGKILL or not resumable else "refused" if status and named else "unclear"
    after = f"ended {time.monotonic() - killed:.0f} s after the kill, torchrun names the rank; the run can go on"
    return {**dict.fromkeys(OUTCOMES, 0), outcome: 1, "details": [after if outcome == "refused" else outcome]}


def training(json: str | None = None) -> dict[str, Any]:
    """Train with a rate that makes the loss no number, and with too little memory."""
    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        images = _make_classes(Path(folder, "images"))
        find_images(images)
        status, output = in_child(lambda: _train(images, Path(folder, "nan"), learning_rate=1e30))
        result["loss of NaN"] = _outcome(status, _sentence(output))
        written = Path(folder, "nan", "models", "model.pt")
        if written.is_file() and not all(
            v.isfinite().all() for v in torch.load(written, weights_only=True).values() if v.is_floating_point()
        ):
            result["loss of NaN"] = {
                **dict.fromkeys(OUTCOMES, 0),
                "lost": 1,
                "details": ["weights of NaN were written"],
            }

        def narrow() -> None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + 60_000_000, size + 60_000_000))
            _train(images, Path(folder, "oom"), image_size=224, base_channels=64)

        status, output = in_child(narrow)
        result["too little memory"] = _outcome(status, _sentence(output))
    return _report("training", result, json)


# Reporting -----------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Any:
    """Keep the log and warnings of a thousand broken files off the screen, and the user's cache as it is."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = cache
        try:
            with redirect_stderr(io.StringIO()):
                yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if kept is not None:
                os.environ["XDG_CACHE_HOME"] = kept
            logging.disable(before)


def _report(part: str, result: dict[str, dict[str, Any]], file: str | None) -> dict[str, Any]:
    print(f"{part:24}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for name, row in result.items():
        print(f"{name:24}" + "".join(f"{row[outcome]:>10}" for outcome in OUTCOMES))
        for line in row["details"]:
            print(f"    {line}")
    total = {outcome: sum(row[outcome] for row in result.values()) for outcome in OUTCOMES}
    print(f"{'all':24}" + "".join(f"{total[outcome]:>10}" for outcome in OUTCOMES))
    if file is not None:
        write_atomic(file, (json_format.dumps({part: result, "total": total}, indent=1) + "\n").encode())
    return {"total": total, **result}


if __name__ == "__main__":
    fire.Fire(
        {"files": files, "kills": kills, "places": places, "processes": processes, "training": training},
        serialize=lambda result: None,  # the table says it
    )
