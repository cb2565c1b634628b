"""Train a segmentation of your own data: prepare, plan, train and evaluate, as the bundle's own commands do.

    vdt train VOLUMES
    vdt train VOLUMES --minutes 30 -o mine
    vdt train PREPARED -o mine --init vdt --learning_rate 0.001

The lines of `python -m monai.bundle run` that it stands for are printed, and can be given by hand. A run that was
killed goes on with the same command.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from networks import describe_encoder, read_checkpoint
from vdt_workflows.locator import find_bundles
from vdt_workflows.overrides import check_command_line
from vdt_workflows.planning.lines import BUNDLE, config_words, make_page, run_line, setting_words
from vdt_workflows.planning.plan import find_memory, make_plan, write_plan
from vdt_workflows.preparation.fingerprint import FILE, read_fingerprint
from vdt_workflows.preparation.segmentation import prepare_segmentation
from vdt_workflows.progress import say
from vdt_workflows.training.shipped import find_encoders, locate_weights

STEPS = ("epochs", "steps_per_epoch", "val_interval")


def train(
    data: str,
    output_dir: str = "",
    minutes: float = 0,
    protocol: str = "",
    device: str | float = "",
    datalist: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Prepare and plan what is not yet, train, and evaluate the test cases.

    Args:
        data: a folder of `vdt prepare`, or volumes with labels as it takes them (folder or JSON list), which are then
            prepared into OUTPUT_DIR/data.
        output_dir: of the run; by default the data's name with _run, here. A plan.json there is taken as it is.
        minutes: time of everything, the evaluation included; 0 trains the whole schedule of the plan.
        protocol: recommended, or the name of another overlay; by default short for a time, else recommended.
        device: what to plan for: cpu, cuda, or the GB of memory of a GPU; by default what this machine has.
        datalist: JSON list in place of the folder's.
        settings: any setting of the bundle, and of vdt prepare where the data are not prepared; with --init the
            width of the encoder is taken, of shipped ones that of the narrowest.

    Returns:
        The mean Dice, the cases it was found on, the folder, and a page of curves, scores and pictures of the worst,
        median and best case.

    Raises:
        ValueError: if an argument or the data are wrong.
        ChildProcessError: if the training or the evaluation fails.
    """
    began = time.time()
    for name in {"args_file", "config_file"} & settings.keys():
        raise ValueError(
            f"--{name} {settings[name]}: vdt train writes and gives its own; give settings as --NAME VALUE"
        )
    source = Path(str(data))
    root = Path(str(output_dir) or f"{source.resolve().name.partition('.')[0]}_run").resolve()
    bundle = find_bundles() / BUNDLE
    memory = find_memory(device)
    configs = _find_configs(bundle / "configs", protocol, bool(minutes))
    ready = (source / FILE).is_file()
    settings = start_from(settings)
    options = {} if ready else _of_preparation(settings)
    settings = {name: v for name, v in settings.items() if name not in options or name in ("seed", "on_error")}
    check_command_line(["run", *config_words(configs), *setting_words(settings)], bundle)
    within = f"within {minutes:g} minutes" if minutes else "as long as its plan says; the bar tells the time left"
    say(f"{source}: checked, planned for, trained on and scored in {root}, {within}")
    prepared = source.resolve() if ready else root / "data"
    if not ready:
        prepare_segmentation(str(source), str(prepared), **options)
    if not (root / "plan.json").is_file():
        made = make_plan(read_fingerprint(prepared, datalist), memory, plannable(settings))
        write_plan(made, root / "plan.json", without=STEPS if minutes else ())
    lines = _write_lines(prepared, root, minutes, configs, device, datalist, settings)
    for words, when in zip(lines, ([f"--began={began:.0f}"] if minutes else [], []), strict=True):
        run_line(bundle, [*words, *when], root)  # a training that is finished ends at once, if it is the same
    scores = json.loads((root / "eval" / "scores.json").read_text())
    page = make_page(str(root), 0)
    return {"mean_dice": scores["mean_dice"], "cases": lines[1][-1], "folder": str(root), "page": page}


def _find_configs(folder: Path, protocol: str, timed: bool) -> list[str]:
    """Name the bundle's config files of a training.

    Raises:
        ValueError: if there is no such protocol.
    """
    protocol = protocol or ("short" if timed else "recommended")
    if protocol != "recommended" and not (folder / f"{protocol}.yaml").is_file():
        raise ValueError(f"protocol must be recommended or an overlay in {folder}, such as short, got {protocol!r}")
    return ["train", *([protocol] if protocol != "recommended" else []), *(["timed"] if timed else [])]


def _of_preparation(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(prepare_segmentation).parameters.keys() - {"data", "output_dir"}
    return {name: value for name, value in settings.items() if name in known}


def _write_lines(
    prepared: Path,
    root: Path,
    minutes: float,
    configs: Sequence[str],
    device: str | float,
    datalist: str | None,
    settings: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Give the words of training and evaluation after `monai.bundle run`."""
    data = {"bundle_root": str(root), "dataset_dir": str(prepared)}
    data |= {"datalist": os.path.abspath(datalist)} if datalist else {}  # the bundle runs in its own folder
    data |= {"device": "$torch.device('cpu')"} if str(device) == "cpu" else {}
    more = {**data, **settings, **({"minutes": minutes} if minutes else {})}
    lists = json.loads(Path(datalist or prepared / "dataset.json").read_text())
    score = {**data, "part": "test" if lists.get("test") else "validation"}
    planned = ["--args_file", str(root / "plan.json")]
    train = [*config_words(configs), *planned, *setting_words(more)]
    remembered = ["--args_file", str(root / "models" / "run.json")]
    scored = [name for name in configs if name != "timed"]
    return train, [*config_words([*scored, "evaluate"]), *remembered, *setting_words(score)]


def start_from(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add the width of the encoder that a training starts from, where it is known and no other is given."""
    settings = dict(settings)
    known: dict[str, Any] = {}
    if (file := settings.get("pretrained")) is not None:
        settings["pretrained"] = os.path.abspath(locate_weights(file))  # the bundle runs in its own folder
        known = describe_encoder(read_checkpoint(settings["pretrained"]))
    elif encoders := find_encoders(settings.get("init", "scratch")):
        known = {"base_channels": next(iter(encoders))[1]}
    return {**{name: known[name] for name in ("depth", "base_channels") if name in known}, **settings}


def plannable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take the settings that a plan decides by, or decides."""
    known = {
        "label_names",
        "spacing",
        "window",
        "mean",
        "std",
        "patch_size",
        "depth",
        "base_channels",
        "stem",
        "strides",
    }
    known |= {"batch_size", "micro_batch", "overlap", "pairs", "mirror", "flips", "rotation", "turned"}
    known |= {"centres", *STEPS}
    return {name: value for name, value in settings.items() if name in known}
