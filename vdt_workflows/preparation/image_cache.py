"""A copy of an image data set that is fast to read: upright RGB JPEG files with a short side, in the same folders."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image, UnidentifiedImageError

from vdt_transforms import ImageDecodeError, LoadNaturalImage
from vdt_transforms.natural_images import ORIENTATION, resize
from vdt_workflows.data.folder_index import INDEX, is_image
from vdt_workflows.data.images import VALIDATION_FOLDERS, VALIDATION_LISTS, find_images
from vdt_workflows.data.volumes import check_on_error
from vdt_workflows.files import claim, write_atomic
from vdt_workflows.parallel import run_parallel

logger = logging.getLogger(__name__)

RECORDS = ".prepared"  # folder of what is known of each finished share of the work
SHARE = 1024  # images of a folder that one process takes at a time
JPEG_NAMES = (".jpg", ".jpeg", ".jpe")
JPEG_END = b"\xff\xd9"
CHROMA = ("420", "422", "444")


@dataclass(frozen=True)
class CacheRules:
    """How pictures are written.

    Attributes:
        short_side: pixels of the short side; a smaller picture keeps its size.
        quality: of JPEG, 1 to 100.
        chroma: "420" halves the resolution of colour (quarter the values), "422" halves its columns, "444" keeps it.
    """

    short_side: int = 256
    quality: int = 90
    chroma: str = "420"

    def __post_init__(self) -> None:
        """Refuse what no picture can be written with."""
        if self.short_side < 8:
            raise ValueError(f"short_side must be 8 pixels or more, got {self.short_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, got {self.quality}")
        if self.chroma not in CHROMA:
            raise ValueError(f"chroma must be one of {', '.join(CHROMA)}, got {self.chroma!r}")


@dataclass(frozen=True)
class Share:
    """A part of one folder's images, `part` of `parts` in sorted order; no list of files travels between processes."""

    source: Path
    target: Path
    folder: str
    part: int
    parts: int

    @property
    def record(self) -> Path:
        """File of what is known when this share is finished."""
        name = hashlib.sha256(f"{self.folder}\0{self.part}\0{self.parts}".encode("utf-8", "surrogateescape"))
        return self.target / RECORDS / f"{name.hexdigest()[:24]}.json"


def cache_images(
    source: str | Path, target: str | Path, rules: CacheRules, *, on_error: str = "raise", workers: int | None = None
) -> dict[str, Any]:
    """Write the pictures of a data set, in any layout of `find_images`, into `target` in the same layout.

    A picture is decoded as by `LoadNaturalImage`, so each is checked whole, resized as in testing, and written with its
    time of change. A plain JPEG that is small enough is copied as it is. A run that was stopped goes on: what is there
    with the time of its source, and whole, is not made again, and a finished share of a folder has a record.

    Args:
        source: folder of the data set.
        target: a new folder, or that of an earlier run with the same source and rules.
        rules: how.
        on_error: "raise" stops at the first picture that cannot be read; "skip" leaves it out, names and counts it.
        workers: processes; all cores by default.

    Returns:
        How many pictures there are, how many were resized, kept and left out and why, and what else was met.
        `report.csv` names each picture that is left out or unusual.

    Raises:
        ValueError: if a picture cannot be read, the layout is none of those known, `target` lies inside `source` or was
            made otherwise.
        FileExistsError: if `target` has files of other origin.
        OSError: if the disk is full or read-only.
    """
    check_on_error(on_error)
    source, target = Path(os.path.abspath(source)), Path(os.path.abspath(target))
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output_dir {target} lies inside the images {source}; name a folder elsewhere")
    find_images(source)  # a layout that training would refuse is refused now
    claim(target, {"source": str(source), **asdict(rules)}, empty=True)
    shares = list(_shares(source, target))
    _clear(target, {share.folder for share in shares})
    records: dict[Share, dict[str, Any]] = {}
    tasks = [(share, rules, on_error) for share in shares]
    for share, record in run_parallel(_prepare_share, tasks, workers=workers, label="folders"):
        records[share] = record
        for fault in record["faults"].values():
            logger.warning("%s; the picture is left out", fault["sentence"])
    ordered = [(share, records[share]) for share in shares]
    _copy_lists(source, target, ordered)
    found = find_images(target)  # and leaves the index for training
    return {
        "output_dir": str(target),
        "training_images": len(found["train"]),
        "validation_images": len(found["val"]),
        **_report(target, ordered),
    }


def target_name(name: str) -> str:
    """Name of a picture's file in the cache: its own, with `.jpg` after an extension of another format."""
    return name if name.lower().endswith(JPEG_NAMES) else f"{name}.jpg"


def _shares(source: Path, target: Path) -> Iterator[Share]:
    """Walk through the folders, one listing each."""
    for parent, folders, names in os.walk(source, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parts = -(-sum(map(is_image, names)) // SHARE)
        folder = os.path.relpath(parent, source)
        yield from (Share(source, target, folder, part, parts) for part in range(parts))


def _clear(target: Path, folders: set[str]) -> None:
    """Remove what a killed run left half written; refuse images of folders that the source does not have (any more)."""
    for parent, inner, names in os.walk(target):
        inner[:] = [name for name in inner if name == RECORDS or not name.startswith(".")]
        folder = os.path.relpath(parent, target)
        for name in names:
            if name.startswith(".") and name != INDEX:
                Path(parent, name).unlink()
            elif is_image(name) and folder not in folders:
                raise ValueError(f"{parent}: a folder of images that the source does not have; remove it")


# One share of the work -----------------------------------------------------------------------------------------------


def _prepare_share(task: tuple[Share, CacheRules, str]) -> tuple[Share, dict[str, Any]]:
    share, rules, on_error = task
    source, target = share.source / share.folder, share.target / share.folder
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(entry.name for entry in os.scandir(source) if is_image(entry.name))
    _remove_others(target, names)
    stamps = {name: os.stat(source / name).st_mtime_ns for name in names[share.part :: share.parts]}
    made_from = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    record = _finished(share, made_from, {target_name(name) for name in stamps})
    if record is None:
        record = _prepare_images(source, target, stamps, rules, on_error)
        os.sync()  # once a share: a record never outlives the pictures that it speaks of
        write_atomic(share.record, json.dumps({**record, "made_from": made_from}).encode())
    if record["faults"] and on_error == "raise":
        raise ValueError(next(iter(record["faults"].values()))["sentence"])
    return share, record


def _remove_others(target: Path, names: Sequence[str]) -> None:
    """Remove the pictures whose source is gone."""
    wanted = Counter(map(target_name, names))
    if twice := [name for name, count in wanted.items() if count > 1]:
        raise ValueError(f"{target / twice[0]}: two pictures would get this name; rename one of them in the source")
    for entry in os.scandir(target):
        if is_image(entry.name) and entry.name not in wanted:
            os.unlink(entry.path)


def _finished(share: Share, made_from: str, wanted: set[str]) -> dict[str, Any] | None:
    try:
        record = json.loads(share.record.read_bytes())
        left_out = set(map(target_name, record["faults"]))
        there = set(os.listdir(share.target / share.folder))
        return record if record["made_from"] == made_from and wanted - left_out <= there else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare_images(
    source: Path, target: Path, stamps: Mapping[str, int], rules: CacheRules, on_error: str
) -> dict[str, Any]:
    load = LoadNaturalImage()
    faults, remarks = {}, {}
    counts = Counter(kept=0, resized=0)
    size = 0
    for name, stamp in stamps.items():
        file = target / target_name(name)
        try:
            if not _is_whole(file, stamp):
                _write(source / name, file, load, rules)
                os.utime(file, ns=(stamp, stamp))
            found = _describe(source / name)
        except ImageDecodeError as error:
            if on_error == "raise":
                raise
            file.unlink(missing_ok=True)
            faults[name] = {"what": _kind(error), "sentence": str(error)}
            continue
        counts["kept" if _keeps(found, rules) else "resized"] += 1
        size += os.stat(file).st_size
        if found["remarks"]:
            remarks[name] = found["remarks"]
    return {**counts, "bytes": size, "faults": faults, "remarks": remarks}


def _is_whole(file: Path, stamp: int) -> bool:
    """Whether a picture was written for a source of this time of change, up to its last bytes."""
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_mtime_ns != stamp:
                return False
            opened.seek(-len(JPEG_END), os.SEEK_END)
            return opened.read() == JPEG_END
    except OSError:  # none there, or too short for an end
        return False


def _write(source: Path, file: Path, load: LoadNaturalImage, rules: CacheRules) -> None:
    image = load(source)
    if _keeps(_describe(source), rules) and (data := source.read_bytes()).endswith(JPEG_END):
        write_atomic(file, data, durable=False)
        return
    rows, columns = image.shape[1:]
    if (short := min(rows, columns)) > rules.short_side:
        image = resize(image, rules.short_side * rows // short, rules.short_side * columns // short)
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    write_atomic(file, simplejpeg.encode_jpeg(pixels, rules.quality, "RGB", rules.chroma), durable=False)


def _keeps(found: Mapping[str, Any], rules: CacheRules) -> bool:
    """Whether a source is taken byte for byte."""
    return found["plain"] and found["short_side"] <= rules.short_side


def _describe(file: Path) -> dict[str, Any]:
    """What the header says of a picture that was decoded before."""
    with Image.open(file) as image:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        remarks = {
            "CMYK": image.mode == "CMYK",
            "palette": image.mode == "P",
            "16-bit": image.mode.startswith("I"),
            "grey": image.mode in ("1", "L", "LA"),
            "transparent": image.has_transparency_data,
            "turned by EXIF": turned,
            "animation": bool(getattr(image, "is_animated", False)) and image.format != "MPO",
            f"{image.format} named as JPEG": image.format not in ("JPEG", "MPO")
            and file.name.lower().endswith(JPEG_NAMES),
        }
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not turned
        return {
            "plain": plain,
            "short_side": min(image.size),
            "remarks": [key for key, holds in remarks.items() if holds],
        }


def _kind(error: ImageDecodeError) -> str:
    if isinstance(error.__cause__, UnidentifiedImageError):
        return "not an image"
    if isinstance(error.__cause__, ImageDecodeError):
        return "empty" if "it is empty" in str(error) else "values of no defined range"
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return "too large"
    return "not readable" if getattr(error.__cause__, "strerror", None) else "damaged or cut short"


# What is left --------------------------------------------------------------------------------------------------------


def _copy_lists(source: Path, target: Path, records: Sequence[tuple[Share, Mapping[str, Any]]]) -> None:
    """Write the lists of flat validation images for the pictures' new names, without those that are left out."""
    left_out = {name for share, record in records if share.folder in VALIDATION_FOLDERS for name in record["faults"]}
    for list_name in VALIDATION_LISTS:
        if not (source / list_name).is_file():
            continue
        lines = []
        for line in (source / list_name).read_text(encoding="utf-8").splitlines():
            name, _, label = line.strip().rpartition(" ")
            if name and name.strip() not in left_out:
                lines.append(f"{target_name(name.strip())} {label}\n")
        write_atomic(target / list_name, "".join(lines).encode())


def _report(target: Path, records: Sequence[tuple[Share, Mapping[str, Any]]]) -> dict[str, Any]:
    """Write report.csv and add up the records."""
    left_out: Counter[str] = Counter()
    unusual: Counter[str] = Counter()
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(("file", "what", "more"))
    for share, record in records:
        folder = "" if share.folder == "." else f"{share.folder}/"
        for name, fault in record["faults"].items():
            left_out[fault["what"]] += 1
            writer.writerow((folder + name, f"left out: {fault['what']}", fault["sentence"]))
        for name, remarks in record["remarks"].items():
            unusual.update(remarks)
            writer.writerow((folder + name, ", ".join(remarks), ""))
    write_atomic(target / "report.csv", buffer.getvalue().encode("utf-8", "surrogateescape"))
    sums = {key: sum(record[key] for _, record in records) for key in ("resized", "kept", "bytes")}
    return {
        "written_anew": sums["resized"],
        "kept_as_they_are": sums["kept"],
        "MB": round(sums["bytes"] / 1e6, 1),
        "left_out": dict(left_out),
        "unusual": dict(unusual),
        "report": str(target / "report.csv"),
    }
