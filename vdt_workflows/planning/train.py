"""Train a segmentation of your own data: prepare, plan, train and evaluate, as the bundle's own commands do.

    vdt train VOLUMES
    vdt train VOLUMES --minutes 30 -o mine
    vdt train PREPARED -o mine --init vdt --pretrained ENCODER --learning_rate 0.001

The lines of `python -m monai.bundle run` that it stands for are printed, and can be given by hand. A run that was
killed goes on with the same command.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdt_workflows.files import write_json
from vdt_workflows.locator import find_bundles
from vdt_workflows.planning.plan import find_memory, make_plan, write_plan
from vdt_workflows.preparation.fingerprint import FILE, read_fingerprint
from vdt_workflows.preparation.segmentation import prepare_segmentation

BUNDLE = "bcv_multiorgan_segmentation"
CHILD = (  # what `python -m monai.bundle` does, in a process that ends with this one
    "import runpy; from vdt_workflows.parallel import follow_parent; follow_parent();"
    " runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"
)
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
        settings: --NAME VALUE for any setting of the bundle, and of vdt prepare where the data are not prepared.

    Returns:
        The mean Dice, the cases it was found on, and the folder.

    Raises:
        ValueError: if an argument or the data are wrong.
        ChildProcessError: if the training or the evaluation fails.
    """
    began = time.time()
    source = Path(str(data))
    root = Path(str(output_dir) or f"{source.resolve().name.partition('.')[0]}_run").resolve()
    prepared, settings = _prepare(source, root / "data", settings)
    lines = _write_lines(prepared, root, minutes, protocol, device, datalist, settings)
    bundle = find_bundles() / BUNDLE
    done = root / "trained.json"
    for words, when in zip(lines, ([f"--began={began:.0f}"] if minutes else [], []), strict=True):
        if done.is_file() and json.loads(done.read_text()) == lines[0] and words is lines[0]:
            continue  # killed in the evaluation
        command = ["run", *words, *when]
        print(f"cd {bundle}; {shlex.join(['python', '-m', 'monai.bundle', *command])}", file=sys.stderr)
        if subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD, *command], cwd=bundle, check=False).returncode:
            raise ChildProcessError(f"{root}: the run failed, its own message is above")
        if words is lines[0]:
            write_json(done, words)
    scores = json.loads((root / "eval" / "scores.json").read_text())
    return {"mean_dice": scores["mean_dice"], "cases": lines[1][-1], "folder": str(root)}


def _prepare(source: Path, target: Path, settings: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Prepare what is not; give the folder, and the settings that are the bundle's."""
    if (source / FILE).is_file():
        return source.resolve(), dict(settings)
    known = inspect.signature(prepare_segmentation).parameters.keys() - {"data", "output_dir"}
    options = {name: value for name, value in settings.items() if name in known}
    prepare_segmentation(str(source), str(target), **options)
    return target, {name: v for name, v in settings.items() if name not in known or name in ("seed", "on_error")}


def _write_lines(
    prepared: Path,
    root: Path,
    minutes: float,
    protocol: str,
    device: str | float,
    datalist: str | None,
    settings: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Write the plan if there is none, and the words of training and evaluation after `monai.bundle run`.

    Raises:
        ValueError: if there is no such protocol.
    """
    configs = find_bundles() / BUNDLE / "configs"
    protocol = protocol or ("short" if minutes else "recommended")
    if protocol != "recommended" and not (configs / f"{protocol}.yaml").is_file():
        raise ValueError(f"protocol must be recommended or an overlay in {configs}, such as short, got {protocol!r}")
    target = root / "plan.json"
    if not target.is_file():
        made = make_plan(read_fingerprint(prepared, datalist), find_memory(device), _plannable(settings))
        write_plan(made, target, without=STEPS if minutes else ())
    names = ["train", *([protocol] if protocol != "recommended" else [])]
    data = {"bundle_root": str(root), "dataset_dir": str(prepared), **({"datalist": datalist} if datalist else {})}
    data |= {"device": "$torch.device('cpu')"} if str(device) == "cpu" else {}
    more = {**data, **settings, **({"minutes": minutes} if minutes else {})}
    lists = json.loads(Path(datalist or prepared / "dataset.json").read_text())
    score = {**data, "part": "test" if lists.get("test") else "validation"}
    planned = ["--args_file", str(target)]
    train = [*_config_words([*names, "timed"] if minutes else names), *planned, *_words(more)]
    remembered = ["--args_file", str(root / "models" / "run.json")]
    return train, [*_config_words([*names, "evaluate"]), *remembered, *_words(score)]


def _plannable(settings: Mapping[str, Any]) -> dict[str, Any]:
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
    known |= {"batch_size", "micro_batch", "overlap", "pairs", "mirror", "centres", *STEPS}
    return {name: value for name, value in settings.items() if name in known}


def _config_words(names: Sequence[str]) -> list[str]:
    return ["--config_file", str([os.path.join("configs", f"{name}.yaml") for name in names])]


def _words(settings: Mapping[str, Any]) -> list[str]:
    pairs = ((f"--{name}", value if isinstance(value, str) else repr(value)) for name, value in settings.items())
    return [word for pair in pairs for word in pair]
