"""BTCV and LiTS as people have them: labels and published splits, files in folders or still in their zip archives."""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeVar

import nibabel as nib
import numpy as np

from vdt_transforms.geometry import SUFFIX
from vdt_workflows.data.volume_files import ROLE, draw, patient_of
from vdt_workflows.files import hash_file

T = TypeVar("T")
Lists = dict[str, list[T]]

SURPLUS = 1 << 20  # bytes that a file may have beside its voxels
IMAGE_WORDS = ("image", "img", "volume")
LABEL_WORDS = ("label", "seg", "mask")


@dataclass(frozen=True)
class DataSet:
    """A public data set of labelled CT volumes, its cases known by number.

    Attributes:
        name: as people call it.
        labels: what the stored label values mean; the first is the background.
        published: the split of the VDT paper's code: training, validation and test.
        origin: where it is to be had, and under which licence.
        shared_cases: why two of the published lists share cases; empty where they do not.
    """

    name: str
    labels: tuple[str, ...]
    published: dict[str, tuple[int, ...]]
    origin: str
    shared_cases: str = ""

    @property
    def numbers(self) -> list[int]:
        """Numbers of all labelled cases."""
        return sorted({number for numbers in self.published.values() for number in numbers})


BTCV = DataSet(
    name="BTCV",
    labels=(
        "background",
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "inferior vena cava",
        "portal and splenic vein",
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
    ),
    published={
        "training": (*range(1, 11), *range(21, 35)),
        "validation": tuple(range(35, 41)),
        "test": tuple(range(35, 41)),
    },
    shared_cases="as published, validation is the test set, so nothing may be selected on it",
    origin="Synapse syn3193805, for registered users under the terms stated there",
)

LITS_VALIDATION = (0, 17, 29, 34, 58, 72, 73, 75, 85, 87, 103, 110, 113)
LITS_TEST = (2, 19, 20, 26, 42, 52, 65, 77, 86, 88, 99, 112, 127)
LITS = DataSet(
    name="LiTS",
    labels=("background", "liver", "tumour"),
    published={
        "training": tuple(n for n in range(131) if n not in (*LITS_VALIDATION, *LITS_TEST)),
        "validation": LITS_VALIDATION,
        "test": LITS_TEST,
    },
    origin="the LiTS challenge on CodaLab, for registered users under the terms stated there",
)

DATA_SETS = {"btcv": BTCV, "lits": LITS}


# Files ---------------------------------------------------------------------------------------------------------------


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
        return PurePath(self.member or self.path).name

    @property
    def stem(self) -> str:
        """File name without suffix, and without the channel number of nnU-Net."""
        return SUFFIX.sub("", self.name).removesuffix("_0000")

    @property
    def folder(self) -> str:
        """Name of the folder that it lies in."""
        return PurePath(self.member or self.path).parent.name

    def stamp(self) -> list[int | str]:
        """What shows whether the content is still the same: size and SHA-256, or size and CRC in an archive."""
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self.path}: no such file")
        if self.member:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(self.member)
            return [info.file_size, info.CRC]
        return [os.path.getsize(self.path), hash_file(self.path)]

    def open_in(self, folder: Path) -> Path:
        """Path of the file to read from: itself, or a copy that is streamed out of the archive into a new `folder`."""
        if not self.member:
            return Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / self.name
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._check_size(archive, shutil.disk_usage(folder).free)
                with archive.open(self.member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # damaged, or encrypted
            raise ValueError(f"{self}: cannot be unpacked ({error}); download the archive again") from error
        return target

    def _check_size(self, archive: zipfile.ZipFile, free: int) -> None:
        """Refuse a member that unpacks to more than its header speaks of, as none but a bomb does, or than there is."""
        size = archive.getinfo(self.member).file_size
        with archive.open(self.member) as file:
            head = (gzip.GzipFile(fileobj=file) if self.name.lower().endswith(".gz") else file).read(1024)
        kind = nib.Nifti2Header if 540 in (int.from_bytes(head[:4], order) for order in ("little", "big")) else None
        try:
            header = (kind or nib.Nifti1Header).from_fileobj(io.BytesIO(head), check=False)
            voxels = math.prod(map(int, header.get_data_shape())) * header.get_data_dtype().itemsize
        except Exception as error:  # broken bytes raise whatever they lead to
            raise ValueError(f"{self}: not a readable NIfTI volume ({error})") from error
        expected = voxels + int(max(header["vox_offset"], 0))
        if size > expected + expected // 50 + SURPLUS:
            raise ValueError(f"{self}: unpacks to {size} bytes, but its header speaks of {expected}; not unpacked")
        if size > free:
            raise ValueError(f"{self}: unpacks to {size} bytes, but {free} are free; free space or name another folder")


def find_files(paths: Sequence[str | os.PathLike]) -> list[StoredFile]:
    """List the volume files in folders (at any depth) and zip archives, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: if there is nothing at a path.
        ValueError: if a path is neither folder nor zip archive, has no NIfTI file, or is an archive with links or with
            names that lead out of it.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder or archive")
        if path.is_dir():
            inner = [file for file in path.rglob("*") if _is_volume(file.relative_to(path)) and file.is_file()]
            files = [StoredFile(str(file)) for file in inner]
        else:
            files = [StoredFile(str(path), name) for name in _members(path) if _is_volume(PurePosixPath(name))]
        if not files:
            archives = sorted(path.glob("*.zip")) if path.is_dir() else []
            hint = f"; it holds {archives[0].name}, so name that instead" if archives else ""
            raise ValueError(f"{path}: no volume file (.nii, .nii.gz, .nrrd, .mha) in it{hint}")
        found += files
    return sorted(found)


def _is_volume(name: PurePath) -> bool:
    return bool(SUFFIX.search(name.name)) and not any(part.startswith((".", "__MACOSX")) for part in name.parts)


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: neither a folder nor a whole zip archive; download it again, or unpack it"
        ) from error
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/")).parts
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if ".." in parts or parts[:1] == ("/",) or ":" in "".join(parts[:1]) or is_link:
            raise ValueError(
                f"{path}: its member {member.filename!r} leads out of the archive; this is not a file to unpack"
            )
    return [member.filename for member in members]


def find_numbered(files: Sequence[StoredFile], data_set: DataSet) -> dict[int, dict[str, StoredFile]]:
    """Sort out the images and labels of a data set's cases, in whatever folders they lie.

    Knows `img0001` and `label0001`, `volume-1` and `segmentation-1`, and any name with the number last inside folders
    such as `imagesTr` and `labelsTr` (Medical Segmentation Decathlon, nnU-Net). Files with other numbers, such as
    the unlabelled test images, are left alone.

    Returns:
        `image` and `label`, as far as there are any, for each number that was found.

    Raises:
        ValueError: if two files claim to be the same.
    """
    found: dict[int, dict[str, StoredFile]] = {}
    for file in files:
        key = _role(file)
        digits = re.findall(r"\d+", file.stem)
        if key is None or not digits or int(digits[-1]) not in data_set.numbers:
            continue
        case = found.setdefault(int(digits[-1]), {})
        if key in case:
            raise ValueError(
                f"{data_set.name} case {digits[-1]} has two {key}s, {case[key]} and {file}; name one folder or archive"
            )
        case[key] = file
    return found


def _role(file: StoredFile) -> str | None:
    """Whether a file is an image or a label; labels may bear the names of images in a folder of labels."""
    if file.folder.lower().startswith(LABEL_WORDS):
        return "label"
    named = ROLE.match(file.stem)
    word = (named[1] if named else file.folder).lower()
    return "image" if word.startswith(IMAGE_WORDS) else "label" if word.startswith(LABEL_WORDS) else None


# Splits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How cases are divided; `name` is the `split` of `prepare_segmentation`, the other fields are its arguments."""

    name: str = "recommended"
    folds: int = 0
    fold: int = 0
    val_fraction: float = 0.15
    test_fraction: float = 0.2
    seed: int = 0

    def describe(self, *, drawn_test: bool = False) -> str:
        """What dataset.json calls it; by this, splits are distinguished."""
        if self.name == "published" and not self.folds:
            return self.name
        test = f"test_fraction {self.test_fraction:g}, " if drawn_test else ""
        name = f"fold {self.fold} of {self.folds}" if self.folds else self.name
        return f"{name} (val_fraction {self.val_fraction:g}, {test}seed {self.seed})"

    def divide(self, data_set: DataSet, numbers: Sequence[int]) -> Lists[int]:
        """Divide a public data set: a fold of the cases there are, or else all that are published.

        The recommended split has the published test cases. Validation cases that are apart from the test are kept; else
        a share of the training cases is drawn by seed.
        """
        if self.folds:
            return self.divide_folds(numbers)
        lists = {part: list(published) for part, published in data_set.published.items()}
        if self.name == "recommended" and data_set.shared_cases:
            lists["training"], lists["validation"] = draw(lists["training"], self.val_fraction, self.seed)
        return lists

    def divide_folds(self, cases: Sequence[T]) -> Lists[T]:
        """Take one fold of a cross-validation as the test; a share of the others validates.

        Over all folds each case is tested once, and never by a run that saw it, be it for selection.

        Raises:
            ValueError: if there is no such fold, or there are too few cases.
        """
        patients = list(dict.fromkeys(map(patient_of, cases)))
        if not 2 <= self.folds <= len(patients):
            raise ValueError(f"folds must be 2 to {len(patients)}, the number of cases, got {self.folds}")
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"fold must be 0 to {self.folds - 1}, got {self.fold}")
        order = np.random.default_rng(self.seed).permutation(len(patients))
        tested = {patients[i] for i in np.array_split(order, self.folds)[self.fold]}
        rest = [case for case in cases if patient_of(case) not in tested]
        training, validation = draw(rest, self.val_fraction, self.seed, self.fold)
        return {"training": training, "validation": validation, "test": [c for c in cases if patient_of(c) in tested]}
