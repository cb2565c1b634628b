"""Weights that come with the packages: what there is, where it lies, and whether it is whole.

    vdt weights
    vdt weights vdt_resnet3d18_w16

A folder of `vdt_workflows/weights`, or of `weights` in a clone, holds `model.pt`, the `run.json` that evaluation and
inference take, and `card.md`, whose front matter says what they are for and which hashes they have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vdt_workflows.files import hash_file

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "weights", PACKAGE.parent / "weights")  # the second is a clone's, for what is no part of the wheel
MODEL, RECORD, CARD = "model.pt", "run.json", "card.md"
NONE = "this copy of the packages came without weights: install vdt-bundles, or give the path of a file"


@dataclass(frozen=True)
class Weights:
    """Shipped weights, as their card and their `run.json` describe them.

    Attributes:
        folder: of the three files, whose name is theirs; of weights that are no part of the wheel it has no `model.pt`.
        use: what they are for, in a few words.
        bundle: whose networks and settings they have.
        license: SPDX expression.
        figure: how good they are, in a few words.
        sha256: hash by file name.
        text: the card.
        init: of an encoder, the initialisations that take it.
        datasets: that they were trained on, by names in small letters.
        metadata: what a package of them says in the place of its bundle's metadata.
    """

    folder: Path
    use: str
    bundle: str
    license: str
    figure: str
    sha256: Mapping[str, str]
    text: str
    init: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What `run.json` says, which is checked first."""
        self.check(RECORD)
        return json.loads((self.folder / RECORD).read_bytes())

    def check(self, file: str) -> None:
        """Refuse a file that has not the hash of the card."""
        given, wanted = hash_file(self.folder / file), self.sha256[file]
        if given != wanted:
            raise ValueError(
                f"{self.folder / file}: has SHA-256 {given[:12]}..., not {wanted[:12]}... as {CARD} says; it is damaged"
                " or was changed, install or check it out again"
            )


@cache
def list_weights() -> dict[str, Weights]:
    """List the shipped weights by name; none in a bundle's zip, which carries its own in `models`."""
    cards = {card.parent.name: card for folder in FOLDERS for card in sorted(folder.glob(f"*/{CARD}"))}
    return {name: _read(card) for name, card in cards.items()}


def _read(card: Path) -> Weights:
    try:
        text = card.read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---\n", 2)[1])
        lists = {key: tuple(value) for key, value in front.items() if isinstance(value, list)}
        return Weights(card.parent, text=text, **{**front, **lists})
    except (ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise ValueError(f"{card}: not a whole card of weights ({error}); install or check it out again") from error


def find_weights(name: str) -> Path:
    """Give the folder of shipped weights, whose files have the hashes of the card.

    Args:
        name: one of `list_weights`.

    Raises:
        ValueError: if there are none of this name, or a file was changed.
        FileNotFoundError: if they are no part of this installation.
    """
    there = list_weights()
    if name not in there:
        known = f"there are {', '.join(there)}" if there else NONE
        raise ValueError(f"weights {name!r}: there are none of this name; {known}")
    folder = there[name].folder
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f"{folder / MODEL}: too large for the wheel; take the folder weights/{name} of a clone of the repository,"
            f" and give the path of its {MODEL}{' as pretrained' if there[name].init else ''}"
        )
    for file in (MODEL, RECORD):
        there[name].check(file)
    return folder


def locate_weights(weights: str | os.PathLike) -> str:
    """Give the path of shipped weights by their name, and a path as it is.

    Args:
        weights: name or path. A word that is no file's, as a name that is spelt wrong, is taken for a name.

    Raises:
        FileNotFoundError, ValueError: as `find_weights`.
    """
    text = os.fspath(weights)
    is_word = os.path.basename(text) == text and not os.path.splitext(text)[1] and not os.path.exists(text)
    return str(find_weights(text) / MODEL) if is_word or text in list_weights() else text


def first_weights(init: str, pretrained: str | None, base_channels: int, depth: int = 18) -> str | None:
    """Give the file that a network starts from: `pretrained`, or without it the shipped encoder for `init`.

    Args:
        init: as in `initialise`.
        pretrained: name of shipped weights, path of a file, or None.
        base_channels: of the network, which the encoder must have too.
        depth: of the network, the same.

    Returns:
        The path; None where no encoder is shipped for `init`, as with "scratch".

    Raises:
        ValueError: if there is none of this width and depth, or a file was changed.
        FileNotFoundError: if it is no part of this installation.
    """
    if pretrained is not None:
        return locate_weights(pretrained)
    encoders = find_encoders(init)
    if not encoders:
        return None
    if (depth, base_channels) in encoders:
        return str(find_weights(encoders[depth, base_channels]) / MODEL)
    there = " or ".join(f"depth {d} and base_channels {width}" for d, width in encoders)
    raise ValueError(
        f"init {init!r} without pretrained takes a shipped encoder, and there is none of depth {depth} and"
        f" base_channels {base_channels}; set {there}, or give the path of a file as pretrained"
    )


def find_encoders(init: str) -> dict[tuple[int, int], str]:
    """Give the names of the shipped encoders for an initialisation, by depth and `base_channels`, narrow ones first."""
    found = [(w.settings, name) for name, w in list_weights().items() if init in w.init]
    return dict(sorted(((s["depth"], s["base_channels"]), name) for s, name in found))


def name_of(sha256: str) -> str | None:
    """Give the name of the shipped weights whose `model.pt` has a hash, wherever that file lies."""
    return next((name for name, weights in list_weights().items() if weights.sha256[MODEL] == sha256), None)


def show_weights(name: str = "") -> None:
    """Print which weights are shipped, or the card of one, whose files are then checked.

    Args:
        name: of the weights whose card is wanted.

    Raises:
        ValueError: if there are none of this name, or a file was changed.
    """
    there = list_weights()
    if not name:
        rows = [("NAME", "FOR", "CHANNELS", "SIZE", "LICENCE", "FIGURE"), *map(_row, there.values())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) if there else NONE)
        return
    if name in there:
        print(there[name].text)
    try:
        find_weights(name)
    except FileNotFoundError as error:
        print(error)


def _row(weights: Weights) -> tuple[str, ...]:
    model = weights.folder / MODEL
    size = f"{model.stat().st_size / 1e6:.1f} MB" if model.is_file() else "not here"
    return (
        *(weights.folder.name, weights.use, str(weights.settings["base_channels"]), size),
        *(weights.license, weights.figure),
    )
