"""A race of equal computing time: a planned training, MONAI's UNet and nnU-Net learn from the same cases.

Each contestant is a process with one thread that may train for so many seconds of its own CPU time, loading and
validation included, whatever else the machine does; planning, preprocessing to files and the segmentation of the test
cases do not count. (CPU time is not quite independent of the rest: processes that share a cache slow each other.) The
scores are of the label files that were written, on the grid of the labels, by code that no contestant uses.
"""

import logging
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vdt_workflows.errors import check_choice
from vdt_workflows.files import read_csv, read_json, write_csv, write_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.planning.apply import segment
from vdt_workflows.planning.lines import BUNDLE, config_words, setting_words
from vdt_workflows.planning.plan import make_plan, write_plan
from vdt_workflows.planning.train import STEPS, plannable, start_from
from vdt_workflows.preparation.fingerprint import read_fingerprint
from vdt_workflows.preparation.segmentation import prepare_segmentation
from vdt_workflows.report.statistics import CaseTable, paired_difference

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
Pace = dict[str, float]  # steps, and CPU seconds of the training
COLUMNS = ("minutes", "contestant", "seed", "case", "label", "dice", "volume_ratio")
VDT = {"init": "vdt"}
CHANGE = "train::random_transforms::{}".format
OURS: dict[str, dict[str, Any]] = {  # settings beside the plan's
    "scratch": {},
    "vdt": VDT,
    # and with one ingredient less, or another in its place
    "one_rate": VDT | {"layer_decay": 1.0},
    "no_average": VDT | {"average": 0},
    "no_turns": VDT | {"turned": 0.0},  # nor scaling
    "no_intensities": VDT | {f"{CHANGE(i)}::prob": 0.0 for i in range(2, 9)},
    "no_flips": VDT | {"mirror": 0.0},
    "no_oversampling": VDT | {"centres": "$[1.0] + [0.0] * (@num_classes - 1)"},  # around background, so anywhere
    "interpolated": VDT | {"fine_channels": 0},
    "deep_supervision": VDT | {"deep_supervision": 2},
}
CPU = "$torch.device('cpu')"


def race(
    data: str,
    output_dir: str,
    label_names: Sequence[str] = ("background", "anterior", "posterior"),
    minutes: float = 6,
    seeds: Sequence[int] = (0, 1, 2),
    contestants: Sequence[str] = ("scratch", "vdt", "monai", "nnunet"),
    nnunet: str = "",
    training: int = 20,
    test: int = 60,
    rates: Sequence[float] = (0.001, 0.003, 0.01),
    scored: str = "test",
) -> dict[str, Any]:
    """Train all contestants for the same CPU time on the same cases, seed by seed, and score them; resumable.

    Args:
        data: folder with `images/` and `labels/` of NIfTI files of equal names.
        output_dir: for the split, the runs, and race.csv with a row for each label of each case.
        label_names: by label value, background first.
        minutes: of CPU time of each training.
        seeds: of the runs; the split is always the same.
        contestants: scratch or vdt (the planned training), vdt with one ingredient less (see `OURS`), monai, nnunet.
        nnunet: Python of an environment with nnU-Net v2.
        training: cases to learn from; as many again choose the rate of MONAI's UNet.
        test: cases to score.
        rates: of MONAI's UNet, of which the best on validation cases is taken.
        scored: test, or validation for what is then chosen by the scores, such as an ingredient of the plan; not of
            monai, whose rate is chosen on the validation cases.
    """
    check_choice("scored", scored, ("test", "validation"))
    root = Path(output_dir).resolve()
    parts = split_cases(Path(data).resolve(), root, training, test)
    parts["scored"] = parts[scored]
    if scored == "validation" and "monai" in contestants:
        raise ValueError("contestants: the rate of monai is chosen on the validation cases; score it on the test cases")
    settled = root / "scored.json"
    earlier = read_json(settled) if settled.is_file() else "unknown" if list(root.glob("*/scores.csv")) else scored
    if earlier != scored:
        raise ValueError(f"{root} has runs that were scored on {earlier} cases; name another output_dir")
    write_json(settled, scored)
    names = list(label_names)
    for seed in seeds:
        for who in contestants:
            folder = root / f"{minutes:g}_{who}_{seed}"
            if not (folder / "scores.csv").is_file():
                logger.info("%s, %g minutes, seed %d", who, minutes, seed)
                if who == "monai":
                    learned = run_monai(root, parts, folder, minutes, seed, names, rates)
                elif who == "nnunet":
                    learned = run_nnunet(nnunet, parts, folder, minutes, seed, names)
                else:
                    learned = run_ours(parts, folder, OURS[who], minutes, seed, names)
                write_json(folder / "pace.json", learned)
                rows = score_files(folder / "labels", parts["scored"] / "labels", names)
                known = {"minutes": minutes, "contestant": who, "seed": seed}
                write_csv(folder / "scores.csv", [{**known, **row} for row in rows], COLUMNS)
    return summarise(root)


def split_cases(data: Path, root: Path, training: int, test: int) -> dict[str, Path]:
    """Draw test, validation and training cases once, and link them into a folder for each part."""
    names = sorted(path.name for path in (data / "images").glob("*.nii.gz"))
    random.Random(0).shuffle(names)
    ends = {
        "test": (0, test),
        "validation": (test, test + training),
        "training": (test + training, test + 2 * training),
    }
    if len(names) < ends["training"][1]:
        raise ValueError(f"data {data} has {len(names)} cases, {ends['training'][1]} are needed")
    for part, (first, last) in ends.items():
        for kind in ("images", "labels"):
            (root / part / kind).mkdir(parents=True, exist_ok=True)
            for name in names[first:last]:
                if not (link := root / part / kind / name).exists():
                    link.symlink_to(data / kind / name)
    return {part: root / part for part in ends}


def run_alone(command: Sequence[Any], log: Path, cwd: Path | None = None) -> float:
    """Run a command with one thread and its output in a file; give the CPU seconds of it and its children."""
    one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    log.parent.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        environment = {**os.environ, **one, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(list(map(str, command)), stdout=file, stderr=file, cwd=cwd, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Contestants: each leaves labels/ with a file of each test image's name ---------------------------------------------


def prepare(parts: Mapping[str, Path], root: Path, names: list[str]) -> Path:
    """Prepare the training cases once, and give the list that has all of them to learn from."""
    prepared = root / "prepared"
    lists = prepared / "all.json"
    if not lists.is_file():
        about = prepare_segmentation(str(parts["training"]), str(prepared), test_fraction=0, label_names=names)
        found = read_json(Path(about["datalist"]))
        cases = sorted(found["training"] + found["validation"], key=lambda case: case["image"])
        more = {"shared_cases": "nothing is selected by the case that is scored"}
        write_json(lists, {**found, "training": cases, "validation": cases[:1], **more})
    return lists


def run_ours(
    parts: Mapping[str, Path], folder: Path, settings: Mapping[str, Any], minutes: float, seed: int, names: list[str]
) -> Pace:
    """Prepare, plan and train as `vdt train --minutes` does, on all cases; give its pace."""
    lists = prepare(parts, folder.parent, names)
    prepared = lists.parent
    known = start_from({**settings, "seed": seed})
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(make_plan(read_fingerprint(prepared, str(lists)), None, plannable(known)), folder / "plan.json", STEPS)
    given: dict[str, Any] = {
        "bundle_root": str(folder),
        "dataset_dir": str(prepared),
        "datalist": str(lists),
        **known,
        "device": CPU,
    }
    given |= {"minutes": minutes, "clock": "cpu", "num_workers": 0}
    words = [
        *config_words(["train", "short", "timed"]),
        "--args_file",
        str(folder / "plan.json"),
        *setting_words(given),
    ]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *words]
    seconds = run_alone(command, folder / "log.txt", find_bundles() / BUNDLE)
    out = folder / "labels"
    segment(str(parts["scored"] / "images"), str(out), str(folder / "models"), device=CPU)
    for file in out.glob("*_seg.nii.gz"):
        file.rename(out / file.name.replace("_seg.nii.gz", ".nii.gz"))
    fitted = read_json(folder / "eval" / "time.json")
    return {"steps": fitted["epochs"] * fitted["steps_per_epoch"], "cpu_seconds": round(seconds)}


def run_monai(
    root: Path,
    parts: Mapping[str, Path],
    folder: Path,
    minutes: float,
    seed: int,
    names: list[str],
    rates: Sequence[float],
) -> Pace:
    """Run the tutorials' training at the rate that is best on the validation cases after a third of the time.

    Its spacing and its patch are those of our plan, which is better than the fixed ones of a tutorial.
    """
    lists = prepare(parts, root, names)
    planned = make_plan(read_fingerprint(lists.parent, str(lists)), None).settings
    options = [f"--classes={len(names)}", f"--spacing={planned['spacing']}", f"--patch={planned['patch_size']}"]
    best = root / f"{minutes:g}_monai_rates.json"
    if not best.is_file():
        found = {}
        for rate in rates:
            tried = root / "rates" / f"{minutes:g}_{rate}"
            _train_monai(parts, "validation", tried, minutes / 3, 100, rate, options)
            rows = score_files(tried / "labels", parts["validation"] / "labels", names)
            found[rate] = float(np.mean([row["dice"] for row in rows]))
        write_json(best, {"rate": max(found, key=lambda rate: found[rate]), "validation_dice": found})
    return _train_monai(parts, "scored", folder, minutes, seed, read_json(best)["rate"], options)


def _train_monai(
    parts: Mapping[str, Path], scored: str, folder: Path, minutes: float, seed: int, rate: float, options: list[str]
) -> Pace:
    script = [sys.executable, "-W", "ignore", HERE / "race_monai.py", parts["training"], parts[scored]]
    given = [f"--minutes={minutes}", f"--seed={seed}", f"--rate={rate}", *options]
    run_alone([*script, folder / "labels", *given], folder / "log.txt")
    return _read_pace(folder / "log.txt")


def _read_pace(log: Path) -> Pace:
    """Find what the scripts print at the end of their trainings."""
    found = re.search(r"^(\d+) steps, (\d+) s", log.read_text(), re.MULTILINE)
    return {"steps": int(found[1]), "cpu_seconds": float(found[2])} if found else {}


def run_nnunet(
    python: str, parts: Mapping[str, Path], folder: Path, minutes: float, seed: int, names: list[str]
) -> Pace:
    """Plan once, then train and segment in nnU-Net's environment."""
    if not python:
        raise ValueError("nnunet must be the Python of an environment with nnU-Net v2, for this contestant")
    root = folder.parent / "nnunet"
    script = [python, HERE / "race_nnunet.py", parts["training"], parts["scored"], folder / "labels"]
    options = ["--root", root, "--names", ",".join(names), "--minutes", str(minutes), "--seed", str(seed)]
    run_alone([*script, *options, "--plan_only"], folder / "plan.txt")
    run_alone([*script, *options], folder / "log.txt")
    return _read_pace(folder / "log.txt")


# Scores --------------------------------------------------------------------------------------------------------------


def score_files(found: Path, true: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Compare each label file with that of the same name: the Dice of each label, and predicted over true volume.

    Raises:
        FileNotFoundError: if one was not written.
        ValueError: if its grid is not that of the labels.
    """
    rows = []
    for path in sorted(true.iterdir()):
        truth, guess = nib.load(path), nib.load(found / path.name)
        if truth.shape != guess.shape or not np.allclose(truth.affine, guess.affine, atol=1e-3):
            raise ValueError(f"{found / path.name}: its grid is not that of {path}")
        t, g = np.asarray(truth.dataobj), np.asarray(guess.dataobj)
        for value, name in list(enumerate(names))[1:]:
            here, there = t == value, g == value
            size, mine, both = (int(np.count_nonzero(mask)) for mask in (here, there, here & there))
            if size:
                scores = {"dice": round(2 * both / (size + mine), 5), "volume_ratio": round(mine / size, 5)}
                rows.append({"case": path.name.removesuffix(".nii.gz"), "label": name, **scores})
    return rows


def summarise(root: Path) -> dict[str, Any]:
    """Write race.csv of all runs, and give means, and differences of our trainings paired over cases."""
    rows = [row for file in sorted(root.glob("*/scores.csv")) for row in read_csv(file, COLUMNS)]
    write_csv(root / "race.csv", rows, COLUMNS)
    runs: dict[tuple[float, str], dict[int, dict[str, list[float]]]] = {}
    volumes: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        key = float(row["minutes"]), row["contestant"]
        runs.setdefault(key, {}).setdefault(int(row["seed"]), {}).setdefault(row["case"], []).append(float(row["dice"]))
        volumes.setdefault(key, []).append(float(row["volume_ratio"]))
    scored = {
        key: {seed: {case: float(np.mean(dice)) for case, dice in cases.items()} for seed, cases in by_seed.items()}
        for key, by_seed in runs.items()
    }
    result: dict[str, Any] = {}
    for (minutes, who), by_seed in scored.items():
        means = [float(np.mean(list(cases.values()))) for cases in by_seed.values()]
        about = {"dice": round(float(np.mean(means)), 4), "seeds": [round(m, 4) for m in means]}
        result[f"{minutes:g} min, {who}"] = {**about, "volumes": round(float(np.mean(volumes[minutes, who])), 3)}
    for (minutes, who), ours in scored.items():
        for other in ("monai", "nnunet", "vdt"):
            theirs = scored.get((minutes, other), {})
            if who in OURS and who != other and (seeds := sorted(ours.keys() & theirs)):
                tables = [CaseTable(np.array([[r[s][c] for c in sorted(r[s])] for s in seeds])) for r in (ours, theirs)]
                found = paired_difference(tables[0], tables[1])
                kept = {name: round(found[name], 4) for name in ("mean", "low", "high")}
                result[f"{minutes:g} min, {who} - {other}"] = {**kept, "seeds": len(seeds)}
    return result
