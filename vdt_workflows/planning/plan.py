"""Plan a segmentation from the fingerprint of its data: a file of settings that the bundle takes.

    vdt plan PREPARED
    vdt plan PREPARED --device 8 -o mine.json --spacing "[1, 1, 2]"
    vdt plan PREPARED --minutes 30

`--args_file plan.json` gives the settings to the bundles of organs and of the liver (nodules are cubes of one size).
Each decision is said with its reason. The file may be changed by hand; a setting that is given here is kept, and what
depends on it is decided by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdt_transforms.checks import AIR
from vdt_workflows.data.sides import find_pairs
from vdt_workflows.files import write_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.naming import literal
from vdt_workflows.overrides import check_command_line
from vdt_workflows.planning.lines import BUNDLE, config_words, setting_words
from vdt_workflows.planning.pace import say_steps
from vdt_workflows.planning.patch import choose_patch, choose_stem, choose_strides, fits, round_size
from vdt_workflows.preparation.fingerprint import Fingerprint, find_mirrored, read_fingerprint
from vdt_workflows.progress import say

THICK = 3  # times the other axes' spacing, from which on an axis is coarse (nnU-Net's rule)
CPU_CASE = 3e6  # voxels of the median case: a fifth of a minute for its windows


@dataclass
class Plan:
    """Settings by config id, and a sentence about each decision.

    Settings that are there from the start were given by the user: decisions keep to them.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    def decide(self, sentence: str, **settings: Any) -> None:
        """Take over what was not given, and say why; a decision that was given as a whole needs no reason."""
        kept = {name: self.settings.setdefault(name, value) for name, value in settings.items()}
        given = [f"{name} {value}" for name, value in kept.items() if value != settings[name]]
        self.words.append(f"{', '.join(given)}: as given" if given else sentence)


def plan(
    dataset_dir: str,
    output_file: str = "",
    device: str | float = "",
    datalist: str | None = None,
    minutes: float = 0,
    hours: float = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Plan a segmentation, and write the settings to a file for `--args_file`.

    Args:
        dataset_dir: a folder of `vdt prepare`.
        output_file: by default plan.json in that folder.
        device: cpu, cuda, or the GB of memory of a GPU; by default what this machine has.
        datalist: JSON list in place of the folder's.
        minutes: of a training on this machine; how many steps fit is said, after some were timed.
        hours: the same.
        settings: settings of the bundle that are wanted as they are, such as --spacing "[1, 1, 2]".

    Returns:
        Where the file is.

    Raises:
        FileNotFoundError: if the folder was not prepared.
        ValueError: if the device is unknown, has not enough memory for the least patch, or is not here to be timed.
    """
    memory = find_memory(device)
    if min(minutes, hours) < 0:
        raise ValueError(f"minutes and hours must not be below 0, got {minutes:g} and {hours:g}")
    check_command_line(["run", *config_words(["train"]), *setting_words(settings)], find_bundles() / BUNDLE)
    made = make_plan(read_fingerprint(Path(str(dataset_dir)), datalist), memory, settings)
    if minutes or hours:
        if str(device) not in ("", "cpu", "cuda"):
            raise ValueError(f"minutes and hours need a device of this machine, cpu or cuda, got device {device!r}")
        made.words.append(say_steps(made.settings, minutes + 60 * hours, memory is not None))
    target = Path(str(output_file)) if output_file else Path(str(dataset_dir), "plan.json")
    write_plan(made, target)
    say("\n".join(made.words))
    return {"plan": str(target)}


def write_plan(made: Plan, target: Path, without: Sequence[str] = ()) -> None:
    """Write a plan for MONAI's `--args_file`, with its reasons but `without` some settings."""
    kept = {name: value for name, value in made.settings.items() if name not in without}
    write_json(target, literal({**kept, "_plan_": made.words}))


def find_memory(device: str | float) -> float | None:
    """Give the memory of the device in GB, None for a CPU.

    Raises:
        ValueError: if it is neither cpu nor cuda nor a number, or there is no CUDA.
    """
    name = str(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return None
    if name == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    if re.fullmatch(r"\d+(\.\d+)?", name) and float(name) > 0:
        return float(name)
    raise ValueError(f"device must be cpu, cuda (if this machine has it) or GB of memory, got {device!r}")


def make_plan(data: Fingerprint, memory: float | None, given: Mapping[str, Any] | None = None) -> Plan:
    """Decide all settings from the data and the memory of the device.

    Args:
        data: of the cases to learn from.
        memory: GB of the GPU, None for a CPU.
        given: settings that are kept.

    Raises:
        ValueError: if the least patch does not fit the memory, or a setting that is given is of no use.
    """
    made = Plan(dict(given or {}))
    _check_given(made.settings)
    found = {int(value) for case in data.cases for value in case["voxels"]}
    unused = len(data.labels) - 1 - len(found)
    why = (
        f"; {unused} are in no case and slow each step, vdt prepare --label_names can leave them out" if unused else ""
    )
    made.decide(
        f"labels: {len(data.labels)} with the background, of {len(data.cases)} cases{why}", label_names=[*data.labels]
    )
    choose_spacing(made, data, memory)
    choose_intensities(made, data)
    choose_network(made, data, memory)
    choose_sides(made, data)
    choose_turns(made, data)
    made.decide(
        "centres: a third of the patches lies around background, the others around each label equally often",
        centres=[len(found) / 2 or 1.0, *[1.0] * (len(data.labels) - 1)],  # labels that no case has are no centres
    )
    steps = int(np.clip(250 * len(data.cases), 5_000, 250_000))
    made.decide(
        f"steps: {steps:,}, 250 for each case, but 5,000 at least; --minutes of vdt train fits them to a time",
        steps_per_epoch=250,
        epochs=steps // 250,
        val_interval=max(1, steps // 250 // 50),
    )
    return made


def _check_given(settings: Mapping[str, Any]) -> None:
    """Refuse a grid, a patch or a batch that nothing can be planned with."""

    def three(value: Any, kinds: Any, least: int) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == 3
            and all(isinstance(n, kinds) and n >= least for n in value)
        )

    spacing, patch, batch = (settings.get(name) for name in ("spacing", "patch_size", "batch_size"))
    if spacing not in (None, "own") and not three(spacing, int | float, 0):
        raise ValueError(f"spacing must be three numbers of mm, 0 for what each case has, or own; got {spacing!r}")
    if patch is not None and not three(patch, int, 1):
        raise ValueError(f"patch_size must be three numbers of voxels, got {patch!r}")
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        raise ValueError(f"batch_size must be a number of patches, 1 or more, got {batch!r}")


# The grid ------------------------------------------------------------------------------------------------------------


def choose_spacing(made: Plan, data: Fingerprint, memory: float | None) -> None:
    """Take the median of each axis; of a coarse one, nnU-Net's 10th percentile, so that fine cases lose little."""
    spacings = data.array("spacing")
    target = np.median(spacings, axis=0)
    why = "the median of the cases"
    coarse, others = int(target.argmax()), np.delete(target, target.argmax())
    if target[coarse] > THICK * others.min() and len(np.unique(spacings[:, coarse])) > 1:
        target[coarse] = max(np.percentile(spacings[:, coarse], 10), others.max())
        why += f", and of the coarse axis {'XYZ'[coarse]} the 10th percentile"
    fine = target
    extent = np.median(data.array("crop") * spacings, axis=0)
    while memory is None and np.prod(extent / target) > CPU_CASE:
        target = np.maximum(target, 1.02 * target.min())
    why += ", made coarser for a CPU" if np.any(target > fine) else ""
    spacing = [round(float(s), 4 if s in fine else 1) for s in target]
    made.decide(f"spacing: {_times(spacing)} mm, {why}", spacing=spacing)


def choose_intensities(made: Plan, data: Fingerprint) -> None:
    """Clip and scale CT as the foreground says; scale other volumes by themselves, since their units mean nothing."""
    lowest = np.array([case["range"][0] for case in data.cases])
    known = data.modality.lower() not in ("", "unknown")
    is_ct = "ct" in re.split(r"[^a-z]+", data.modality.lower()) if known else bool(np.mean(lowest <= AIR) > 0.9)
    modality = "CT" if is_ct else data.modality if known else "unknown"
    pool = data.array("quantiles")
    if not is_ct or not pool.size:
        why = f"modality {modality}{'' if known else ', and without the air of CT'}"
        own = {"window": "none", "mean": "own", "std": "own", "modality": modality}
        made.decide(f"intensities: mean and deviation of each volume, {why}", **own)
        return
    low, high = (round(float(v), 1) for v in np.percentile(pool, (0.5, 99.5)))
    values = pool.clip(low, high)
    window, mean, std = [low, max(high, low + 1)], round(float(values.mean()), 2), round(max(float(values.std()), 1), 2)
    made.decide(
        f"intensities: {low:g} to {high:g} HU, 99 % of what lies inside the labels, and their mean and deviation"
        f"{'' if known else '; modality unknown, taken for CT by its air'}",
        **{"window": window, "mean": mean, "std": std, "modality": modality},
    )


# Patch and network ---------------------------------------------------------------------------------------------------


def choose_network(made: Plan, data: Fingerprint, memory: float | None) -> None:
    """Choose patch, batch and network together: the widest network whose patch sees enough, within the memory.

    Raises:
        ValueError: if nothing fits.
    """
    s = made.settings
    spacing = _grid_of(made, data)
    extents = data.array("crop") * (data.array("spacing") / spacing)
    median = [max(round(n), 1) for n in np.median(extents, axis=0).tolist()]
    stem, why = (s["stem"], ", as given") if "stem" in s else choose_stem(median, memory)
    where = "on a CPU" if memory is None else f"in {memory:g} GB"
    widths = [s["base_channels"]] if "base_channels" in s else [16] if memory is None else [64, 32, 16]
    for width in widths:
        patch = choose_patch(median, spacing, stem, width, len(data.labels), memory)
        enough = min(prod(map(round_size, median)), 128**3)
        if patch and (prod(patch) >= 0.5 * enough or width == widths[-1]):
            break
    else:
        raise ValueError(f"a patch of 32 voxels a side does not fit {memory:g} GB; name a device with more memory")
    made.decide(f"patch: {_times(patch)} voxels {where}; the median case has {_times(median)}", patch_size=patch)
    patch = list(s["patch_size"])
    strides = choose_strides(patch, spacing, stem)
    total = [prod(axis) for axis in zip(*strides, strict=True)]
    head = 16 if memory else 0  # 0.862 in place of 0.857 on 20 validation hippocampi in 6 CPU minutes: 1.4 x the steps
    fine = 8 if memory is None and max(strides[0]) > 1 else 0
    made.decide(
        f"network: ResNet3D-18, {width} channels, stem {stem}{why}" + (f", {fine} channels at full" if fine else ""),
        depth=18,
        base_channels=width,
        stem=stem,
        head_channels=head,
        fine_channels=fine,
        deep_supervision=2 if memory else 0,  # no gain on 20 validation hippocampi
    )
    flat = ", ".join(f"{'XYZ'[axis]} less" for axis in range(3) if total[axis] < max(total))
    made.decide(f"strides: {_times(total)} in all{flat and f', since coarse or short: {flat}'}", strides=strides)
    most = max(2, int(0.05 * len(data.cases) * prod(median) / prod(patch)))  # nnU-Net's 5 % of all voxels
    batch = 2
    while memory and batch < min(most, 8) and fits(patch, batch + 2, stem, width, len(data.labels), memory):
        batch += 2
    made.decide(f"batch: {batch} patches a step", batch_size=batch, micro_batch=s.get("batch_size", batch))
    made.decide(
        "overlap of windows in inference: " + ("a quarter, on a CPU" if memory is None else "half"),
        overlap=0.25 if memory is None else 0.5,
    )


# Sides ---------------------------------------------------------------------------------------------------------------


def choose_sides(made: Plan, data: Fingerprint) -> None:
    """Flip left and right, in inference too, with swapped labels; or not at all where one has no mirror image."""
    names = [str(name) for name in made.settings["label_names"]]
    pairs, lonely = find_pairs(names)
    if all(re.fullmatch(r"label \d+", name) for name in names[1:]) and (alike := find_mirrored(data)):
        a, b = alike
        lonely = [f"{names[a]} and {names[b]}, which lie like left and right"]
    if lonely:
        made.decide(
            f"flips: none of left and right, for want of a mirror image of {', '.join(lonely)}", pairs=pairs, mirror=0.0
        )
    elif pairs:
        swapped = ", ".join(f"{names[a]} and {names[b]}" for a, b in pairs)
        made.decide(f"flips: left and right, exchanging {swapped}", pairs=pairs, mirror=0.5)
    else:
        made.decide("flips: left and right, no label is of one side", pairs=[], mirror=0.5)
    if made.settings["mirror"]:
        made.decide("inference: the mean over each window and its mirror image, in twice the time", flips=[[0]])


def choose_turns(made: Plan, data: Fingerprint) -> None:
    """Turn thick slices that are not of CT by any angle: they lie as they were placed, not along the body's axes."""
    spacing = _grid_of(made, data)  # else turns would be about all axes
    if made.settings["modality"] != "CT" and max(spacing) >= THICK * min(spacing):
        made.decide(
            "turns: half of the patches, by any angle in the plane of the thick slices, which lie as they were placed",
            rotation=3.1416,
            turned=0.5,
        )


def _grid_of(made: Plan, data: Fingerprint) -> list[float]:
    """Give the voxel size in mm that is planned; 0 and 'own' keep what a case has, of which this is the median."""
    usual = np.median(data.array("spacing"), axis=0).tolist()
    planned = made.settings["spacing"]
    wanted = [0, 0, 0] if isinstance(planned, str) else planned
    return [float(mm or own) for mm, own in zip(wanted, usual, strict=True)]


def _times(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
