"""Check a data set of labelled volumes, and lay it out for the segmentation bundles.

    vdt prepare volumes --source btcv --data RawData.zip --output_dir btcv
    vdt prepare volumes --source lits --data "['Training Batch 1', 'Training Batch 2']" \
        --output_dir lits
    vdt prepare volumes FOLDER_OF_NIFTI_PAIRS mine

Leaves `images/` and `labels/` (hard links where the disk allows; voxels are never resampled), `dataset.json` with the
training, validation and test cases, `summary.csv` with a row and `pictures/` with three slices for each case. Give the
folder to a bundle as `--dataset_dir`. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vdt_transforms.geometry import GEOMETRIES
from vdt_workflows.data.volume_files import LeftOut, conclude, draw
from vdt_workflows.data.volumes import list_cases
from vdt_workflows.errors import check_choice
from vdt_workflows.files import claim, read_json, write_atomic, write_json
from vdt_workflows.locks import leaving
from vdt_workflows.naming import tell_apart
from vdt_workflows.preparation.case_sheets import draw_fault, draw_pages
from vdt_workflows.preparation.fingerprint import FILE
from vdt_workflows.preparation.public_sets import (
    DATA_SETS,
    LITS,
    DataSet,
    Lists,
    Split,
    StoredFile,
    find_files,
    find_numbered,
)
from vdt_workflows.preparation.volumes import (
    CaseRules,
    Record,
    SourceCase,
    describe,
    picture_of,
    prepare_cases,
    write_table,
)
from vdt_workflows.progress import say

logger = logging.getLogger(__name__)
ALONE = "one case alone is there to learn from, and it is the validation too"


@dataclass(frozen=True)
class Plan:
    """What is to be prepared: the cases, the lists they are in by name, and what holds for them all."""

    title: str
    cases: list[SourceCase]
    lists: Lists[str]
    names: list[str]  # of the labels; empty if only the voxels tell
    rules: CaseRules
    split: str
    about: dict[str, Any]  # for dataset.json
    missing: dict[str, str] = field(default_factory=dict)  # sentences by case
    left_out: LeftOut = field(default_factory=dict)


@leaving
def prepare_segmentation(
    data: str | Sequence[str],
    output_dir: str,
    source: str = "own",
    split: str = "recommended",
    folds: int = 0,
    fold: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.2,
    seed: int = 0,
    tumour: bool = False,
    label_names: Sequence[str] | Mapping[str, Any] | None = None,
    modality: str | None = None,
    affine: str = "strict",
    geometry: str = "refuse",
    copy: bool = False,
    on_error: str = "raise",
    workers: int = 0,
) -> dict[str, Any]:
    """Check a data set of labelled volumes, and lay it out for the segmentation bundles.

    Args:
        data: zip archive or folder, or a list of them, with the volumes of BTCV or LiTS at any depth. For own data a
            folder of NIfTI pairs, in any of the layouts that the bundles read, or a JSON list of cases.
        output_dir: a new folder, or one of an earlier run with the same sources and settings. Another split of it is
            written as a list of its own beside the first.
        source: btcv, lits or own.
        split: `published` (of the VDT paper's code) or `recommended` (validation apart from test; own data keep the
            lists they come with, and what is missing is drawn by seed).
        folds: number of folds of a seeded cross-validation over all labelled cases, in place of `split`.
        fold: which of them is the test.
        val_fraction: share of the cases to learn from that becomes validation, where it is drawn.
        test_fraction: share of own data that becomes the test, where none is named.
        seed: of what is drawn.
        tumour: LiTS: keep the tumour as a class of its own; by default it is liver.
        label_names: own data: names by label value, background first; or `{name: value or values}`, which keeps these
            labels alone and numbers them from 1. By default from the data's JSON, or else numbers.
        modality: own data: CT refuses what cannot be HU, and draws a fixed window. By default from the data's JSON.
        affine: whose affine counts where image and label of one shape differ: `image`, `label`, or `strict` to refuse.
        geometry: what says where the voxels of a NIfTI file lie: `refuse` a file in which sform, qform and pixdim
            disagree, or take its `sform` or `qform`; what is written then has it in both forms.
        copy: copy the files rather than link them.
        on_error: `raise` stops at the first bad case; `skip` leaves it out, counts it and goes on.
        workers: processes; 0 takes as many as there are cores, 8 at most. Each holds one volume.

    Returns:
        The list of cases that was written, how many are in each part, the table and the pictures.

    Raises:
        ValueError: if an argument or a case is wrong, or `output_dir` was made from other sources or settings.
        FileExistsError: if `output_dir` has files of other origin.
    """
    check_choice("source", source, (*DATA_SETS, "own"))
    check_choice("affine", affine, ("strict", "image", "label"))
    check_choice("geometry", geometry, GEOMETRIES)
    check_choice("on_error", on_error, ("raise", "skip"))
    if split not in (known := ("recommended",) if source == "own" else ("published", "recommended")):
        raise ValueError(f"split of --source {source} must be {' or '.join(known)}, got {split!r}")
    if source != "own" and (label_names or modality):
        raise ValueError(f"label_names and modality are for own data, not for --source {source}")
    if tumour and source != "lits":
        raise ValueError(f"tumour is for --source lits, not {source}")
    if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1:
        raise ValueError(f"val_fraction and test_fraction must be shares below 1, got {val_fraction}, {test_fraction}")
    paths = [Path(str(path)) for path in (data if isinstance(data, list | tuple) else [data])]
    root = Path(str(output_dir))  # fire reads a folder called 2024 as a number
    for path in paths:
        if path.is_dir() and root.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"output_dir {root} lies inside the data {path}; name a folder elsewhere")
    wanted = Split(split, folds, fold, val_fraction, test_fraction, seed)
    if source == "own":
        plan = _plan_own(paths, wanted, label_names, modality)
    else:
        plan = _plan_numbered(DATA_SETS[source], paths, wanted, tumour)
    if plan.missing and on_error == "raise":
        raise ValueError(f"{next(iter(plan.missing.values()))}; --on_error skip goes on without the missing ones")
    rules = replace(plan.rules, affine=affine, geometry=geometry, copy=copy)
    made_from = {"source": source, "data": [str(path.resolve()) for path in paths]}
    claim(root, {**made_from, **asdict(rules)}, empty=True)

    records = prepare_cases(plan.cases, root, rules, on_error=on_error, workers=workers or min(os.cpu_count() or 1, 8))
    if plan.missing:
        logger.warning("%d cases are missing: %s", len(plan.missing), ", ".join(plan.missing))
    records += [{"case": name, "fault": sentence} for name, sentence in plan.missing.items()]
    return _finish(root, plan, records)


# The plan ------------------------------------------------------------------------------------------------------------


def _plan_numbered(data_set: DataSet, paths: Sequence[Path], split: Split, tumour: bool) -> Plan:
    """Plan BTCV or LiTS, whose cases are known by number."""
    files = find_files(paths)
    found = {number: pair for number, pair in sorted(find_numbered(files, data_set).items()) if "image" in pair}
    places = ", ".join(map(str, paths))
    if not found:
        raise ValueError(f"{places}: no image of {data_set.name} in {len(files)} NIfTI files")
    others = len(files) - sum(map(len, found.values()))
    logger.info("%s: %d cases, and %d other files that are left alone", places, len(found), others)
    cases = {n: SourceCase(pair["image"].stem, pair["image"], pair.get("label")) for n, pair in found.items()}
    about: dict[str, Any] = {"modality": {"0": "CT"}, "reference": data_set.origin}
    if data_set.shared_cases and split.describe() == "published":
        about["shared_cases"] = data_set.shared_cases
    lists = split.divide(data_set, list(found))
    names = list(data_set.labels)
    values = {value: value for value in range(1, len(names))}
    if data_set is LITS and not tumour:
        names, values = names[:2], {1: 1, 2: 1}
    return Plan(
        title=data_set.name,
        cases=list(cases.values()),
        lists={name: [cases[n].name for n in numbers if n in cases] for name, numbers in lists.items()},
        names=names,
        rules=CaseRules(values=values, hounsfield=True, empty=False),
        split=split.describe(),
        about=about,
        missing={
            f"{data_set.name} {n}": f"{data_set.name} case {n}: no image of this number in {places}"
            for n in sorted({n for numbers in lists.values() for n in numbers} - found.keys())
        },
    )


def _plan_own(
    paths: Sequence[Path],
    split: Split,
    label_names: Sequence[str] | Mapping[str, Any] | None,
    modality: str | None,
) -> Plan:
    """Plan own data, whose lists, label names and modality may come with them in a JSON file."""
    if len(paths) != 1:
        raise ValueError(f"own data must be one folder or list, got {len(paths)}: {', '.join(map(str, paths))}")
    found, listing, left_out = list_cases(paths[0], paths[0] if paths[0].suffix == ".json" else None)
    listing = listing if listing.is_file() else listing / "dataset.json"
    listed = read_json(listing, "a whole one") if listing.is_file() else {}
    if unlabelled := [pair for pair in found["test"] if "label" not in pair]:
        left_out["test images without label"] = [pair["image"] for pair in unlabelled]
        found["test"] = [pair for pair in found["test"] if "label" in pair]
    by_image = {pair["image"]: pair for group in found.values() for pair in group}
    names_of = tell_apart(by_image, lambda image: StoredFile(image).stem)
    cases = {
        name: SourceCase(
            name, StoredFile(image), StoredFile(label) if (label := by_image[image].get("label")) else None
        )
        for image, name in names_of.items()
    }
    drawn_test = not (split.folds or found["test"])
    if split.folds:
        found = split.divide_folds(list(by_image.values()))
    else:
        if drawn_test and split.test_fraction:
            found["training"], found["test"] = draw(found["training"], split.test_fraction, split.seed, 0)
        if not found["validation"]:
            found["training"], found["validation"] = draw(found["training"], split.val_fraction, split.seed, 1)
    alone = not (split.folds or found["validation"])
    if alone:
        found["validation"] = found["training"]
        logger.warning("%s: %s; scores on it say nothing of other cases", paths[0], ALONE)
    lists = {part: [names_of[pair["image"]] for pair in group] for part, group in found.items()}
    names, values, only_these = _choose_labels(label_names, listed.get("labels"), listing)
    channels = listed.get("modality") or listed.get("channel_names")
    modality = modality or str(channels.get("0", "unknown") if isinstance(channels, dict) else channels or "unknown")
    kept = ("licence", "reference", "release", *(() if split.folds else ("shared_cases",)))
    return Plan(
        title=str(listed.get("name") or paths[0].resolve().stem),
        cases=list(cases.values()),
        lists=lists,
        names=names,
        rules=CaseRules(values=values, only_these=only_these, hounsfield=modality.upper() == "CT"),
        split=split.describe(drawn_test=drawn_test),
        left_out=left_out,
        about={
            "modality": {"0": modality},
            **{key: listed[key] for key in kept if listed.get(key)},
            **({"shared_cases": ALONE} if alone else {}),
        },
    )


def _choose_labels(
    given: Sequence[str] | Mapping[str, Any] | None, listed: Any, listing: Path
) -> tuple[list[str], dict[int, int] | None, bool]:
    """Find the label names, the value that each stored one becomes (None keeps all), and whether others are refused."""
    if isinstance(given, Mapping):
        groups = [value if isinstance(value, list | tuple) else [value] for value in given.values()]
        if not all(isinstance(value, int) and value > 0 for group in groups for value in group):
            raise ValueError(f"label_names {given!r}: expected one or several label values above 0 for each name")
        values = {value: number for number, group in enumerate(groups, 1) for value in group}
        if len(values) < sum(map(len, groups)):
            raise ValueError(f"label_names {given!r}: a label value under two names; a voxel can have one label alone")
        return ["background", *given], values, False
    if isinstance(given, str):
        raise ValueError(f"label_names {given!r}: expected quoted names, as ['background', 'liver'], or values by name")
    names = [str(name) for name in given] if given else _read_labels(listed, listing) if listed else []
    if len({*names}) < len(names):
        raise ValueError(f"label_names {names!r}: a name twice; expected one for each label value")
    return names, {value: value for value in range(1, len(names))} if names else None, True


def _read_labels(listed: Any, listing: Path) -> list[str]:
    """Read the labels of a dataset.json: names by value as in the Decathlon, or values by name as in nnU-Net."""
    pairs = list(listed.items()) if isinstance(listed, dict) else []
    by_value = {int(key): name for key, name in pairs if str(key).isdecimal()}
    if not by_value:
        by_value = {value: name for name, value in pairs if isinstance(value, int)}
    if len(by_value) < len(pairs) or sorted(by_value) != list(range(len(by_value))):
        raise ValueError(
            f"{listing}: its labels {listed!r} are not one name for each value from 0 on; choose by --label_names"
        )
    return [str(by_value[value]) for value in range(len(by_value))]


# The results ---------------------------------------------------------------------------------------------------------


def _finish(root: Path, plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """Write the lists, the table and the pictures of prepared cases."""
    good = {record["case"]: record for record in records if "fault" not in record}
    entries = {case: {kind: record[kind] for kind in ("image", "label")} for case, record in good.items()}
    lists = {part: [case for case in cases if case in good] for part, cases in plan.lists.items()}
    for part in [part for part, cases in plan.lists.items() if cases and not lists[part]]:
        sentence = f"{root}: none of the {len(plan.lists[part])} {part} cases can be used, see above"
        if part == "training":
            raise ValueError(sentence)
        logger.warning(sentence)
    highest = max((int(value) for record in good.values() for value in record["ml"]), default=0)
    names = plan.names or ["background", *(f"label {value}" for value in range(1, highest + 1))]
    datalist = _write_list(
        root,
        {
            "name": plan.title,
            "tensorImageSize": "3D",
            "labels": {str(value): name for value, name in enumerate(names)},
            **plan.about,
            "split": plan.split,
            "left_out": [record["case"] for record in records if "fault" in record],
            **{f"num{part.capitalize()}": len(cases) for part, cases in lists.items()},
            **{part: [entries[case] for case in cases] for part, cases in lists.items()},
        },
    )
    measured = {case: {**record["measured"], "range": record["range"]} for case, record in good.items()}
    write_json(root / FILE, {"labels": names, "modality": plan.about["modality"]["0"], "cases": measured}, indent=None)
    write_atomic(root / "summary.csv", write_table(records, names))
    tiles = [
        draw_fault(record["case"], record["fault"]) if "fault" in record else (root / picture_of(record)).read_bytes()
        for record in records[: len(plan.cases)]  # what is missing has no picture
    ]
    pages = draw_pages(plan.title, names, tiles)
    for old in (root / "pictures").glob("cases_*.png"):
        old.unlink()
    for number, page in enumerate(pages, 1):
        write_atomic(root / "pictures" / f"cases_{number:02d}.png", page)
    faults = [record["case"] for record in records if "fault" in record]
    conclude(plan.title, len(good), {**plan.left_out, "unusable, see above": faults})
    say(f"{plan.title}, {plan.split}\n{describe(records, lists, names)}")
    return {
        "datalist": str(datalist),
        **{part: len(cases) for part, cases in lists.items()},
        "left_out": len(faults) + sum(map(len, plan.left_out.values())),
        "summary": str(root / "summary.csv"),
        "pictures": f"{root / 'pictures'}, {len(pages)} pages",
    }


def _write_list(root: Path, content: dict[str, Any]) -> Path:
    """Write dataset.json, or where that holds another split, a list named after this one."""
    words = re.sub(r"[^\w.]+", "_", content["split"]).strip("_")
    for target in (root / "dataset.json", root / f"dataset_{words}.json"):
        if not target.is_file() or read_json(target, "another output_dir")["split"] == content["split"]:
            break
    write_json(target, content)
    return target
