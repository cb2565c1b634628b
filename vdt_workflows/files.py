"""Files that are whole or absent, tables, and folders that are claimed by what made them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vdt_workflows.errors import not_written
from vdt_workflows.locks import LOCK, hold

UNFINISHED = ".part"  # how names of files end that are being written
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
SYSTEM = {  # names, in small letters, that Synology, QNAP, NetApp, Linux, macOS and Windows give their own files
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "lost+found"),
    *("__macosx", ".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
}


def hash_file(path: str | os.PathLike) -> str:
    """Give the SHA-256 of a file, which is not held in memory as a whole."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stamp_of(path: str | os.PathLike) -> list[int]:
    """Size and times of the last change of a file's content and of itself (which nobody can set back), in ns."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def mark_of(path: str | os.PathLike) -> dict[str, Any]:
    """Give what `has_mark` compares: the stamp of a file and its hash."""
    return {"stamp": stamp_of(path), "sha256": hash_file(path)}


def read_mark(record: Path) -> Any:
    """Read a mark that was kept as JSON; None if there is none, or a damaged one."""
    try:
        return json.loads(record.read_bytes())
    except (OSError, ValueError):
        return None


def has_mark(path: str | os.PathLike, mark: Any) -> bool:
    """Whether a file has the content that it had for `mark_of`; it is read only if it was touched since."""
    try:
        stamp = stamp_of(path)
        return stamp == mark["stamp"] or (stamp[0] == mark["stamp"][0] and hash_file(path) == mark["sha256"])
    except (OSError, TypeError, KeyError, IndexError):  # not there, or no mark
        return False


def write_atomic(path: str | os.PathLike, content: bytes, *, durable: bool = True, mode: int = 0o666) -> None:
    """Write a file whole or not at all: to a temporary file in its folder, flushed to the disk, then renamed.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
        durable: False leaves the flushing to the caller, who writes many small files and flushes once.
        mode: who may read and write it, of which the user's umask takes away.

    Raises:
        OSError: naming the file, if the folder cannot be written to or the disk is full; the file that was there before
            stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=UNFINISHED, delete=False) as file:
            temporary = file.name
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, mode & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        if temporary is not None:  # also where the user interrupts
            Path(temporary).unlink(missing_ok=True)


def claim(folder: str | os.PathLike, settings: Mapping[str, Any], *, empty: bool = False, alone: bool = True) -> None:
    """Keep a folder's results together with what they were made with, in its `settings.json`.

    Args:
        folder: the folder, which is made if need be.
        settings: plain values that make the results what they are.
        empty: refuse a folder that has files but no such record, since they are someone else's.
        alone: `hold` the folder too, and remove what a killed process left half written in it.

    Raises:
        BlockingIOError: if another process holds the folder.
        ValueError: if the folder holds results of other settings.
        FileExistsError: if it holds files of other origin.
    """
    record = Path(folder) / "settings.json"
    settings = json.loads(json.dumps(settings))
    there = list(Path(folder).iterdir()) if Path(folder).is_dir() else []
    others = [file for file in there if file.name != LOCK and file.suffix != UNFINISHED]  # left by a claim
    if empty and not record.is_file() and others:
        raise FileExistsError(f"output_dir {folder} has files that are not from this script; name a new folder")
    if alone:
        hold(folder)
        remove_unfinished(Path(folder))
    kept = read_json(record, "another folder, or remove this one") if record.is_file() else settings
    if not isinstance(kept, dict):
        raise ValueError(f"{record}: not the settings of earlier results; give another folder, or remove this one")
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
    write_json(record, {**content, "made_from": made_from, "files": {name: hash_file(root / name) for name in files}})


def read_record(record: Path, root: Path, made_from: Any) -> dict[str, Any] | None:
    """Read what `write_record` kept; None if there is no record of the same origin, or a file has changed."""
    try:
        content = json.loads(record.read_bytes())
        same = content["made_from"] == json.loads(json.dumps(made_from))
        same = same and all(hash_file(root / name) == kept for name, kept in content["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if same else None


def remove_unfinished(*folders: Path) -> None:
    """Remove the hidden files that a killed `write_atomic` leaves behind."""
    for unfinished in (file for folder in folders for file in folder.glob(f".*{UNFINISHED}")):
        unfinished.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_atomic(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all (see `write_atomic`)."""
    import torch  # seconds, which only a process that saves tensors pays

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


def read_json(path: Path, meant: str = "the step that writes it again") -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is none, damaged or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give {meant}")
    try:
        return json.loads(path.read_bytes())  # of UTF-8 or UTF-16, with or without their marks
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no whole JSON ({error}); give {meant}") from error


def read_number(
    text: str, column: str, place: str, low: float = 0, high: float = float("inf"), *, whole: bool = False
) -> float:
    """Read a decimal number within bounds; `nan`, `inf`, `1_0`, blanks inside and other digits are none.

    Args:
        text: the number, maybe among blanks.
        column: what it is, for the message.
        place: file and line, for the message.
        low: least value.
        high: greatest value; infinity itself never is.
        whole: whether a fraction is refused.

    Raises:
        ValueError: naming the place, the column, the text and the bounds.
    """
    value = float(text) if NUMBER.fullmatch(text.strip()) else math.nan
    if not low <= value <= high or math.isinf(value) or (whole and value % 1):
        wanted = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
        raise ValueError(f"{place}: {column} is {text!r}; expected a {'whole ' * whole}number {wanted}")
    return value


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Make a CSV table of rows by column; a value that a row lacks is empty, and one of no column is left out.

    Text is no formula for a spreadsheet: such a one gets an apostrophe before it, which `read_lines` takes off.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_guard, columns))
    writer.writerows([_guard(row.get(column, "")) for column in columns] for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # file names may be of any bytes


def _guard(value: Any) -> Any:
    """Put an apostrophe before a text that spreadsheets would take for a formula; `read_lines` takes it off again."""
    if not isinstance(value, str) or not re.match(r"'*[=+\-@\t\r]", value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


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
    """Read the heading and the lines of a CSV file, without empty ones.

    Files of Excel are read too: in UTF-16, or with semicolons or tabs, where numbers may have decimal commas.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        heading = text.lstrip().partition("\n")[0]
        separator = max(",;\t", key=heading.count)  # the first of equals
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        lines = [[re.sub(r"^'('*[=+\-@\t\r])", r"\1", cell) for cell in line] for line in reader if line]
        if separator != ",":
            lines = [[re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", value) for value in line] for line in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file of text ({error})") from error
    return (lines[0], lines[1:]) if lines else ([], [])


def kind_of_system(name: str) -> str | None:
    """Say what a file or folder of a file system or a server's is, such as `@eaDir`; None for anything else.

    Such ones hold thumbnails, deleted files or notes of the system beside the data, under the data's names and
    extensions. Hidden files count as such.
    """
    if name.lower() in SYSTEM:
        return name
    return "._*" if name.startswith("._") else ".*" if name.startswith(".") else None


def few(names: Sequence[str], most: int = 5) -> str:
    """Name the first ones and count the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
