"""NIfTI files where people have them: in folders of any depth, or still in the zip archive they came in."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from vdt_workflows.data.volumes import SUFFIX


@dataclass(frozen=True, order=True)
class StoredFile:
    """A file on the disk, or a member of a zip archive.

    Attributes:
        path: of the file, or of the archive.
        member: name inside the archive; empty for a file on the disk.
    """

    path: str
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else self.path

    @property
    def name(self) -> str:
        """File name without folders."""
        return self._inner.name

    @property
    def folder(self) -> str:
        """Name of the folder that it lies in."""
        return self._inner.parent.name

    @property
    def _inner(self) -> PurePath:
        return PurePosixPath(self.member) if self.member else PurePath(self.path)

    def stamp(self) -> list[int]:
        """What shows whether the content is still the same: size and time of change, or size and CRC in an archive."""
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file")
        if self.member:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self.member)
            return [info.file_size, info.CRC]
        status = os.stat(self.path)
        return [status.st_size, status.st_mtime_ns]

    def open_in(self, folder: Path) -> Path:
        """Path of the file to read from: itself, or a copy that is streamed out of the archive into `folder`."""
        if not self.member:
            return Path(self.path)
        target = folder / self.name
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # damaged, or encrypted
            raise ValueError(f"{self}: cannot be unpacked ({error}); download the archive again") from error
        return target


def find_files(paths: Sequence[str | os.PathLike]) -> list[StoredFile]:
    """List the NIfTI files in folders (at any depth) and zip archives, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a path is neither folder nor zip archive, has no NIfTI file, or is an archive with names that
            lead out of it.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [StoredFile(str(file)) for file in _walk(path)]
        elif zipfile.is_zipfile(path):
            files = [StoredFile(str(path), name) for name in _members(path)]
        elif path.exists():
            raise ValueError(f"{path}: neither a folder nor a whole zip archive; download it again, or unpack it")
        else:
            raise FileNotFoundError(f"{path}: no such folder or archive")
        if not files:
            archives = sorted(path.glob("*.zip")) if path.is_dir() else []
            hint = f"; it holds {archives[0].name}, so name that instead" if archives else ""
            raise ValueError(f"{path}: no .nii or .nii.gz file in it{hint}")
        found += files
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if SUFFIX.search(name) and not name.startswith("."))


def _members(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",) or ":" in name.split("/")[0]:
            raise ValueError(f"{path}: its member {name!r} leads out of the archive; this is not a file to unpack")
    return [
        name
        for name in names
        if SUFFIX.search(name) and not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(name).parts)
    ]
