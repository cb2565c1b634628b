"""Names of results, told apart by their sources' paths, and text of data that no parser may take for code."""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ENDING = re.compile(r"(?<=.)\.(nii(\.gz)?|nrrd|nhdr|mha|mhd|dcm|npz|zip)$", re.IGNORECASE)  # of volumes
RESULTS = ("_seg.nii.gz", "_seg.dcm", "_sr.dcm", "_lesions.json", "_lesions.mrk.json")  # endings, by volume
LONGEST = 160  # bytes of a name; most disks take 255 with all that is put before and after it
TEXTS = (  # ids whose values are paths and names, which fire and MONAI may take for something else
    *("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "ckpt_path", "cache_dir", "pretrained", "datalist"),
    *("split", "positions", "table", "train_dir", "val_dir", "best_name", "last_name", "series"),
)
NAMES = ("label_names", "class_names")  # ids whose values are lists of names
_NAMED: dict[str, str] = {}  # names of results by the path of their volume, of what this process has listed


def bare_name(path: str | os.PathLike) -> str:
    """Give the name of a file without the ending of a volume, or of a folder with all its dots."""
    return ENDING.sub("", os.path.basename(os.path.abspath(path))) or "volume"


def tell_apart(paths: Iterable[str], name: Callable[[str], str] = bare_name) -> dict[str, str]:
    """Name what lies at each path by its own name, and where others share that, by what differs of their paths too.

    `P2/image.nii.gz` and `P3/image.nii.gz` become `P2_image` and `P3_image`. Names that differ in capitals alone count
    as shared, since many disks do not tell them apart; what still shares a name gets a number. A long name is cut, and
    ends in a hash of the path.

    Args:
        paths: files, folders, or names with slashes.
        name: what makes a name of a path.

    Returns:
        The name by path, in their order.
    """
    names = {path: name(path) for path in paths}
    for alike in _groups(names):
        folders = [os.path.dirname(os.path.abspath(path)) for path in alike]
        shared = os.path.commonpath(folders)
        for path, folder in zip(alike, folders, strict=True):
            parts = Path(folder).relative_to(shared).parts
            names[path] = "_".join([*parts, names[path]])
    for path, long in names.items():
        if len(kept := os.fsencode(long)) > LONGEST:
            names[path] = (
                f"{kept[:LONGEST].decode(errors='ignore')}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
            )
    taken = {_key(each) for each in names.values()}
    for alike in _groups(names):
        numbered = (f"{names[alike[0]]}_{number}" for number in count(2))
        for path in alike[1:]:
            names[path] = next(each for each in numbered if _key(each) not in taken)
            taken.add(_key(names[path]))
    return names


def _groups(names: Mapping[str, str]) -> list[list[str]]:
    """The paths of each name that several have."""
    times = Counter(map(_key, names.values()))
    return [[path for path in names if _key(names[path]) == key] for key, found in times.items() if found > 1]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def name_results(sources: Iterable[str]) -> dict[str, str]:
    """Name the results of the volumes that a run takes, for all that write some in this process (see `tell_apart`)."""
    names = tell_apart(sources)
    _NAMED.update({os.path.abspath(source): name for source, name in names.items()})
    changed = [f"{source} as {name}" for source, name in names.items() if name != bare_name(source)]
    if changed:
        logger.info("%d results are named apart, such as %s", len(changed), changed[0])
    return names


def result_name(source: str | os.PathLike) -> str:
    """Give the name of a volume's results: that of `name_results`, or its own where it was not listed."""
    return _NAMED.get(os.path.abspath(source)) or bare_name(source)


def name_result(meta: Mapping[str, Any] | None, saver: Any) -> dict[str, Any]:
    """Name a result of MONAI's `SaveImaged`, as its `output_name_formatter`.

    Raises:
        ValueError: if the result would be written over one of the volumes.
    """
    source = str((meta or {}).get("filename_or_obj", f"volume{saver._data_index}"))
    named = {"subject": f"{result_name(source)}.nii", "idx": None}  # MONAI takes the ending off
    target = os.path.abspath(saver.folder_layout.filename(**named))
    if target in _NAMED:
        raise ValueError(f"{source}: its result would replace the volume {target}; name another output_dir")
    return named


def list_results(sources: Iterable[str], folder: str | os.PathLike) -> dict[str, list[str]]:
    """List the files that a folder holds of each volume's results."""
    there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return {str(s): [file for end in RESULTS if (file := result_name(s) + end) in there] for s in sources}


def literal(value: Any) -> Any:
    """Write texts so that MONAI's `ConfigParser` keeps them as they are.

    It takes what begins with `$`, `@` or `%` for an expression, a reference or a macro, and each `#` for `::`. Such a
    text becomes an expression that is a string of it (`plain` turns it back); lists and mappings are searched for them.
    """
    if isinstance(value, Mapping):
        return {name: literal(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [literal(inner) for inner in value]
    if not isinstance(value, str) or not re.search(r"^\s*[$@%]|#|[@%]::", value):
        return value
    escaped = (c if c.isascii() and (c.isalnum() or c in " _/-") else _escape(c) for c in value)
    return f"$'{''.join(escaped)}'"


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\U{number:08x}"


def plain(value: Any) -> Any:
    """Turn back what `literal` did."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str) and re.match(r"""\$(['"]).*\1$""", value):
        try:
            return str(ast.literal_eval(value[1:]))
        except (ValueError, SyntaxError):  # a user's own expression
            return value
    return value


def join_words(words: Iterable[str]) -> str:
    """Write a command as `shlex.join` does, but words with single quotes, as lists have, for people to read."""
    easy = (f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word) for word in words)
    return " ".join(easy)
