"""The class of an image out of a JSON file, as it is labelled in MONAI Label."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform


class ReadClass(Transform):
    """Make a class's number of what names it.

    A number is passed on. A path is read as JSON: `{"label": NAME}`, or what MONAI Label answers in classification,
    `{"prediction": [{"label": NAME, "score": NUMBER}, ...]}`, of which the highest score counts.

    Args:
        names: names of the classes, in order; capitals do not matter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no such JSON or names no known class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = [name.lower() for name in names]

    def __call__(self, label: int | str | os.PathLike) -> int:
        """Number, or path of a JSON file -> number from 0."""
        if not isinstance(label, str | os.PathLike):
            return label
        path = Path(label)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such label file")
        try:
            content = json.loads(path.read_bytes())
            best = max(content["prediction"], key=lambda c: c["score"]) if "prediction" in content else content
            name = best["label"].lower()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}: not the class of an image; expected JSON such as {{"label": "{self.names[-1]}"}}'
            ) from error
        if name not in self.names:
            raise ValueError(f"{path}: no class is called {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)


class ReadClassd(MapTransform):
    """Dictionary version of `ReadClass`."""

    def __init__(self, keys: KeysCollection, names: Sequence[str], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.read = ReadClass(names)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the class of each key."""
        out = dict(data)
        for key in self.key_iterator(out):
            out[key] = self.read(out[key])
        return out
