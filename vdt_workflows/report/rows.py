"""Rows and protocols of a comparison: the ways to start a network, and the settings that go with each."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from vdt_workflows.errors import check_choice
from vdt_workflows.files import hash_file
from vdt_workflows.locator import find_bundles
from vdt_workflows.training.initialisation import INITIALISATIONS
from vdt_workflows.training.shipped import first_weights, locate_weights


@dataclass(frozen=True)
class Row:
    """One row of the matrix: how the network starts, or another network.

    Attributes:
        name: in the report.
        init: the bundle's `--init`; the name by default.
        pretrained: name of shipped weights, or a path.
        settings: more overrides by config id.
        configs: overlays, such as one with another `network_def`; inference takes them too.
        note: what the report says of the row.
    """

    name: str
    init: str
    pretrained: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    configs: tuple[str, ...] = ()
    note: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^A-Za-z0-9.+]+", "-", self.name).strip("-.")

    def identity(self) -> dict[str, Any]:
        """Give what makes the row what it is: files by their content, wherever they lie."""
        hashes = {Path(path).name: hash_file(path) for path in self.configs}
        weights = None if self.pretrained is None else hash_file(self.pretrained)
        own = {"name": self.name, "init": self.init, "weights": weights}
        return {**own, "settings": dict(self.settings), "configs": hashes}


def read_rows(rows: str | Sequence[Any]) -> list[Row]:
    """Read rows from a file, or from words such as "scratch,vdt=encoder.pt".

    Paths in a file are relative to its folder; `~` and environment variables are replaced.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a row is malformed, its initialisation unknown, or two rows share a name.
    """
    folder = Path.cwd()
    entries: Any = rows
    if isinstance(rows, str) and Path(rows).suffix in (".yaml", ".yml", ".json"):
        folder = Path(rows).resolve().parent
        entries = _read_file(Path(rows), "rows")
        entries = entries.get("rows") if isinstance(entries, dict) else entries
    elif isinstance(rows, str):
        entries = rows.split(",")
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"rows {rows!r}: expected a list of rows, or words such as scratch,vdt=encoder.pt")
    found = [_read_row(entry, folder) for entry in entries]
    for i, row in enumerate(found):
        if not row.folder or row.folder in [other.folder for other in found[:i]]:
            raise ValueError(f"rows: {row.name!r} names two rows, or none; give each a name of its own")
    return found


def _read_row(entry: Any, folder: Path) -> Row:
    if isinstance(entry, str):
        name, _, path = entry.strip().partition("=")
        entry = {"name": name, "pretrained": path or None}
    known = list(Row.__dataclass_fields__)
    if not isinstance(entry, dict) or not entry.get("name"):
        raise ValueError(f"rows: {entry!r} is no row; expected a mapping with {', '.join(known)}")
    for key in entry:
        if key not in known:
            near = get_close_matches(str(key), known, n=1) or known
            raise ValueError(f"row {entry['name']!r}: {key!r} is unknown; did you mean {' or '.join(near)}?")
    name, init = str(entry["name"]), str(entry.get("init") or entry["name"])
    check_choice(f"row {name!r}: init", init, tuple(INITIALISATIONS))

    def place(path: Any, what: str) -> str:
        found = folder / Path(os.path.expandvars(str(path))).expanduser()
        if not found.is_file():
            raise FileNotFoundError(f"row {name!r}: {what} {found}: no such file")
        return str(found.resolve())

    pretrained, configs = entry.get("pretrained"), entry.get("configs") or ()
    return Row(
        name,
        init,
        None if pretrained is None else place(locate_weights(str(pretrained)), "pretrained"),
        read_mapping(entry.get("settings") or {}, f"row {name!r}: settings"),
        tuple(place(path, "config") for path in ([configs] if isinstance(configs, str) else configs)),
        str(entry.get("note") or ""),
    )


def find_protocols(bundle: str) -> dict[str, str]:
    """List the protocols of a bundle: that of train.yaml, and each overlay that sets `protocol`.

    Returns:
        The overlay's path from the bundle's folder, by protocol; empty for train.yaml's own.
    """
    folder = find_bundles() / bundle
    found = {}
    for path in sorted((folder / "configs").glob("*.yaml"), key=lambda p: (p.name != "train.yaml", p.name)):
        protocol = yaml.safe_load(path.read_text()).get("protocol")
        if protocol is not None and path.name != "inference.yaml":
            found[str(protocol)] = "" if path.name == "train.yaml" else str(path.relative_to(folder))
    return found


def merge_settings(shared: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Put a row's settings over those of all rows; parts of a network that its overlays replace are left out."""
    replaced = tuple(
        f"{name.replace('#', '::')}::"
        for path in row.configs
        for name, value in read_mapping(path, f"row {row.name!r}: config").items()
        if name.startswith("network_def") and isinstance(value, dict) and "_target_" in value
    )
    kept = {name: value for name, value in shared.items() if not name.replace("#", "::").startswith(replaced)}
    return {**kept, **row.settings}


def name_weights(row: Row, shared: Mapping[str, Any]) -> Row:
    """Name the file of a row that takes a shipped encoder, so that its hash belongs to the results."""
    settings = merge_settings(shared, row)
    width, depth = settings.get("base_channels", 64), settings.get("depth", 18)  # the bundles' own
    return replace(row, pretrained=first_weights(row.init, row.pretrained, width, depth))


def choose_reference(rows: Sequence[Row], reference: str) -> str:
    """Name the row that the others are compared with.

    Raises:
        ValueError: if there is no row of that name.
    """
    names = [row.name for row in rows]
    if reference and reference not in names:
        raise ValueError(f"reference must be one of the rows {', '.join(names)}, got {reference!r}")
    return reference or ("scratch" if "scratch" in names else names[0])


def as_list(value: Any) -> list[Any]:
    """Give a list of one value, of several, or of words with commas between."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, Sequence) else [value]


def read_mapping(value: Any, what: str) -> dict[str, Any]:
    """Take a mapping of config ids to values, or read it from a YAML or JSON file; without notes, such as `_plan_`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no mapping.
    """
    if isinstance(value, str):
        value = _read_file(Path(value), what) if value else {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: expected a mapping of config ids to values, got {value!r}")
    return {name: setting for name, setting in value.items() if not str(name).startswith("_")}


def _read_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {path}: neither YAML nor JSON ({str(error).splitlines()[0]})") from error
