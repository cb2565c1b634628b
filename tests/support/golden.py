"""Numbers that the published networks gave, and the rule that refills their weights from the tensors' names.

A vector, `data/golden/<name>.json`, tells for one network: the names and shapes of its tensors, how many parameters it
has, the input's shape and seed, and for each output its shape, its largest magnitude and some values at flat indices.
No weights are stored: each tensor is drawn from a generator seeded with the CRC-32 of its name.
"""

import json
from functools import lru_cache
from math import prod, sqrt
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 1e-4  # relative to the output's largest magnitude; float32 on a CPU stays below 1e-5


def read_vector(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)  # one network's weights are up to 180 MB
def published_weights(name):
    """The checkpoint that belongs to the vector: {published name: tensor}. Shared, so not to be changed in place."""
    return {key: _refill(key, shape) for key, shape in read_vector(name)["state_dict"].items()}


def _refill(key, shape):
    if key.endswith(".num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    draw = np.random.default_rng(crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith(".running_var"):
        draw = 1 + 0.1 * np.abs(draw)
    elif key.endswith((".running_mean", ".bias")):
        draw = 0.1 * draw
    elif len(shape) == 1:  # scales of norms
        draw = 1 + 0.1 * draw
    else:  # kernels, He-scaled by their fan-in
        draw = draw * np.float32(sqrt(2 / prod(shape[1:])))
    return torch.from_numpy(draw)


def published_input(vector):
    draw = np.random.default_rng(vector["input_seed"]).standard_normal(vector["input_shape"])
    return torch.from_numpy(draw.astype(np.float32))


def deviation(output, expected):
    """Largest difference at the recorded places, relative to the recorded output's largest magnitude."""
    assert list(output.shape) == expected["shape"]
    values = output.flatten()[torch.tensor(expected["idx"])].double()
    return (values - torch.tensor(expected["values"], dtype=torch.float64)).abs().max().item() / expected["absmax"]
