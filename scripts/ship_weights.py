"""Put trained weights into the folder of those that are shipped, in half precision, with the hashes that are checked.

    python scripts/ship_weights.py MODEL vdt_workflows/weights/NAME

MODEL is a `model.pt` of training; the `run.json` beside it is taken too, without the machine's paths and names. Write
`card.md` first, by the example of another folder: the hashes go into its front matter.
"""

import re
from pathlib import Path
from typing import Any

import fire
import torch

from networks import read_checkpoint
from vdt_workflows.files import hash_file, read_json, save_atomic, write_atomic, write_json

KEPT = (
    *("init", "epochs", "steps_per_epoch", "batch_size"),
    *("learning_rate", "layer_decay", "momentum", "weight_decay", "seed"),
)
TRAINING_ALONE = "side_heads."  # parts of names


def ship(model: str, folder: str, **settings: Any) -> None:
    """Write `model.pt` and `run.json` of shipped weights, and their hashes into `card.md`.

    Kernels are halved; norms and biases, which are few, keep their precision.

    Args:
        model: the weights that training wrote, with their `run.json` beside them.
        folder: of the shipped weights, whose name is theirs.
        settings: of the network's use that replace or join those of the record, such as --flips "[[0], [1], [2]]".

    Raises:
        FileNotFoundError: if there is no card, model or record.
        ValueError: if halving turns a kernel into infinities.
    """
    target = Path(folder)
    card = (target / "card.md").read_text()
    tensors = read_checkpoint(model)
    for name in [name for name in tensors if TRAINING_ALONE in name]:
        del tensors[name]
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{model}: {name} has values up to {tensor.abs().max():g}, too large for half precision")
    record = read_json(Path(model).parent / "run.json")
    run = record.pop("_run_", {})
    record |= {**settings, "_run_": {name: run[name] for name in KEPT if name in run}}
    save_atomic(tensors, target / "model.pt")
    write_json(target / "run.json", record)
    hashes = "".join(f"  {name}: {hash_file(target / name)}\n" for name in ("model.pt", "run.json"))
    write_atomic(target / "card.md", re.sub(r"^sha256:\n(  .*\n)*", f"sha256:\n{hashes}", card, flags=re.M).encode())


if __name__ == "__main__":
    fire.Fire(ship)
