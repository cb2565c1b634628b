"""Files that are whole or absent, tables, and folders that are claimed by what made them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch


def hash_file(path: str | os.PathLike) -> str:
    """Give the SHA-256 of a file, which is not held in memory as a whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: str | os.PathLike, content: bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all: to a temporary file in its folder, flushed to the disk, then renamed.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
        durable: False leaves the flushing to the caller, who writes many small files and flushes once.

    Raises:
        OSError: naming the file, if the folder cannot be written to or the disk is full; the file that was there before
            stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OSError(
            error.errno, f"{path}: could not be written ({error.strerror}); free space or choose a folder you may write"
        ) from error
    finally:
        if temporary is not None:  # also where the user interrupts
            Path(temporary).unlink(missing_ok=True)


def claim(folder: str | os.PathLike, settings: Mapping[str, Any], *, empty: bool = False) -> None:
    """Keep a folder's results together with what they were made with, in its `settings.json`.

    Args:
        folder: the folder, which is made if need be.
        settings: plain values that make the results what they are.
        empty: refuse a folder that has files but no such record, since they are someone else's.

    Raises:
        ValueError: if the folder holds results of other settings.
        FileExistsError: if it holds files of other origin.
    """
    record = Path(folder) / "settings.json"
    settings = json.loads(json.dumps(settings))
    there = list(Path(folder).iterdir()) if Path(folder).is_dir() else []
    others = [file for file in there if not file.name.startswith(f".{record.name}.")]  # a claim that was killed
    if empty and not record.is_file() and others:
        raise FileExistsError(f"output_dir {folder} has files that are not from this script; name a new folder")
    kept = json.loads(record.read_text()) if record.is_file() else settings
    differ = [f"{k} {kept.get(k)!r}, not {settings.get(k)!r}" for k in settings if kept.get(k) != settings.get(k)]
    if differ:
        raise ValueError(f"output_dir {folder} holds results made with {'; '.join(differ)}; name another folder")
    write_atomic(record, json.dumps(settings, indent=1).encode())


def write_record(record: Path, root: Path, files: Sequence[str], made_from: Any, content: Mapping[str, Any]) -> None:
    """Record that a piece of work is finished, after all its files were written.

    Args:
        record: JSON file of the record.
        root: folder that the names of files are relative to.
        files: what was written.
        made_from: plain values that make the files what they are.
        content: what else to keep.
    """
    sizes = {name: (root / name).stat().st_size for name in files}
    write_json(record, {**content, "made_from": made_from, "sizes": sizes})


def read_record(record: Path, root: Path, made_from: Any) -> dict[str, Any] | None:
    """Read what `write_record` kept; None if there is no record, of the same origin, or a file has another size."""
    try:
        content = json.loads(record.read_bytes())
        sizes = {name: (root / name).stat().st_size for name in content["sizes"]}
        same = content["made_from"] == json.loads(json.dumps(made_from)) and content["sizes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if same else None


def remove_unfinished(*folders: Path) -> None:
    """Remove the hidden files that a killed `write_atomic` leaves behind."""
    for unfinished in (file for folder in folders for file in folder.glob(".*.*") if file.is_file()):
        unfinished.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_atomic(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all (see `write_atomic`)."""
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    except RuntimeError as error:
        if "inline_container" in str(error):  # what torch's zip writer says where the buffer could not grow
            raise MemoryError(f"{path} could not be put together") from error
        raise
    write_atomic(path, buffer.getvalue())


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 1) -> None:
    """Write JSON, whole or not at all; arrays become lists, and paths text."""
    write_atomic(path, json.dumps(content, indent=indent, default=_plain).encode())


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Make a CSV table of rows by column; a value that a row lacks is empty, and one of no column is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may be of any bytes


def write_csv(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a table (see `to_csv`), whole or not at all."""
    write_atomic(path, to_csv(rows, columns))


def read_csv(path: Path, columns: Sequence[str], *, others: bool = False) -> list[dict[str, str]]:
    """Read a table of text whose heading has each of `columns` once, and no `others` unless they may be there.

    Raises:
        ValueError: naming the columns or the line that are wrong, or if the file is no text.
    """
    heading, lines = read_lines(path)
    missing = [name for name in columns if name not in heading]
    unknown = [name for name in heading if name not in columns and not others]
    repeated = [name for name, times in Counter(heading).items() if times > 1 and (name in columns or not others)]
    problems = [
        f"{kind} {few([repr(n) for n in names])}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("repeated", repeated))
        if names
    ]
    if problems:
        near = get_close_matches(missing[0], unknown or heading, 1) if missing else []
        hint = f"; is {near[0]!r} meant to be {missing[0]!r}?" if near else ""
        raise ValueError(f"{path}: wrong columns, {', '.join(problems)}{hint}")
    for number, line in enumerate(lines, 2):
        if len(line) != len(heading):
            raise ValueError(f"{path}, line {number}: {len(line)} values for {len(heading)} columns")
    return [dict(zip(heading, line, strict=True)) for line in lines]


def read_lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the heading and the lines of a CSV file, without empty ones."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file of text ({error})") from error
    return (lines[0], lines[1:]) if lines else ([], [])


def few(names: Sequence[str], most: int = 5) -> str:
    """Name the first ones and count the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
