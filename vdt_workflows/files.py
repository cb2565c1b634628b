"""Files that are whole or absent, and folders that are claimed by what made them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_atomic(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all (see `write_atomic`)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())
