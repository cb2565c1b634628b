"""Write an image data set once more, upright and small, so that pre-training reads it several times faster.

    vdt prepare images --images IMAGENET --output_dir imagenet_256

The layout stays: give the new folder to the pre-training bundle as `--dataset_dir`. Every picture is decoded whole;
what is cut short, no image, CMYK, a palette or turned by EXIF is counted, and named in `report.csv`. A run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

from vdt_transforms import ImageDecodeError, LoadNaturalImage
from vdt_transforms.natural_images import ORIENTATION, resize
from vdt_workflows.data.folder_index import INDEX, Folder, is_image, kind_of, walk
from vdt_workflows.data.images import VALIDATION_FOLDERS, VALIDATION_LISTS, find_images
from vdt_workflows.errors import check_choice
from vdt_workflows.files import claim, has_mark, mark_of, write_atomic, write_csv, write_json
from vdt_workflows.locks import LOCK, leaving
from vdt_workflows.parallel import run_parallel

logger = logging.getLogger(__name__)

SHARE = 1024  # images of a folder that one process takes at a time
JPEG_NAMES = (".jpg", ".jpeg", ".jpe", ".jfif")
RECORDS = ".vdt_records"  # folder of what each share was made from
JPEG_END = b"\xff\xd9"
CHROMA = ("420", "422", "444")


class Rules(NamedTuple):
    """How pictures are written (see `prepare_images`)."""

    short_side: int
    quality: int
    chroma: str
    decode: str


class Share(NamedTuple):
    """A part of one folder's images, `part` of `parts` in sorted order; no list of files travels between processes."""

    folder: str
    part: int
    parts: int


class Found(NamedTuple):
    """What became of a share: bytes written, and by name why a picture is left out or what is unusual about it."""

    kept: int
    resized: int
    size: int
    faults: dict[str, tuple[str, str]]  # kind and sentence
    remarks: dict[str, list[str]]


@leaving
def prepare_images(
    images: str,
    output_dir: str,
    short_side: int = 256,
    quality: int = 90,
    chroma: str = "420",
    on_error: str = "raise",
    decode: str = "strict",
    workers: int = 0,
) -> dict[str, Any]:
    """Check every picture of a data set and write it as a small upright JPEG, in the same folders.

    A picture is decoded as in training, so each is checked whole, resized as in testing, and written with its time of
    change. A plain JPEG that is small enough is copied as it is. What an earlier run wrote is kept if neither it nor
    its source has changed since: by size and times, and by content where these differ.

    Args:
        images: folder with `train/` and `val/` (or one of the other layouts of the pre-training bundle).
        output_dir: a new folder, or one of an earlier run with the same images and settings.
        short_side: pixels of the short side; smaller pictures keep their size. The bundle's tests use 256.
        quality: of JPEG, 1 to 100.
        chroma: 420 halves the resolution of colour (a quarter of the values), 422 halves its columns, 444 keeps it.
        on_error: `raise` stops at the first picture that cannot be read; `skip` leaves it out, names and counts it.
        decode: `lenient` writes what can be read of damaged JPEG and PNG files, which `strict` takes for unreadable.
        workers: processes; 0 takes as many as there are cores.

    Returns:
        How many pictures were written, kept as they are, left out and why, and what else was met. `report.csv` names
        each picture that is left out or unusual.

    Raises:
        ValueError: if an argument or a picture is wrong, the layout is none of those known, or `output_dir` lies inside
            the images or was made from other images or settings.
        FileExistsError: if `output_dir` has files of other origin.
        OSError: if the disk is full or read-only.
    """
    rules = Rules(short_side, quality, str(chroma), decode)  # fire reads 420 as a number
    if short_side < 8:
        raise ValueError(f"short_side must be 8 pixels or more, got {short_side}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    check_choice("chroma", rules.chroma, CHROMA)
    check_choice("on_error", on_error, ("raise", "skip"))
    check_choice("decode", decode, ("strict", "lenient"))
    source, target = (Path(os.path.abspath(str(folder))) for folder in (images, output_dir))
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"output_dir {target} lies inside the images {source}; name a folder elsewhere")
    find_images(source)  # a layout that training would refuse is refused now
    claim(target, {"source": str(source), **rules._asdict()}, empty=True)
    shares: list[Share] = []
    left_out: list[tuple[str, str]] = []
    for found in _walk(source):
        parts = -(-len(found.images) // SHARE)
        shares += (Share(os.path.normpath(found.path), part, parts) for part in range(parts))
        left_out += found.left_out
    _clear(target, {share.folder for share in shares})
    work = partial(_prepare_share, source, target, rules, on_error)
    results: dict[Share, Found] = {}
    for share, result in run_parallel(work, shares, workers=workers or None, label="folders"):
        results[share] = result
        for _, sentence in result.faults.values():
            logger.warning("%s; the picture is left out", sentence)
    results = {share: results[share] for share in shares}
    _copy_lists(source, target, results)
    listed = find_images(target)  # and leaves the index for training
    return {
        "output_dir": str(target),
        "training_images": len(listed["train"]),
        "validation_images": len(listed["val"]),
        **_report(target, results, left_out),
    }


def target_name(name: str) -> str:
    """Name of a picture's file in the copy: its own, with `.jpg` after an extension of another format."""
    return name if name.lower().endswith(JPEG_NAMES) else f"{name}.jpg"


def _walk(source: Path) -> Iterator[Folder]:
    """Go through the folders as the listing does; where there is `train/`, each folder beside it is a part too."""
    parts = [entry.name for entry in os.scandir(source) if kind_of(entry) == "folder"]
    for part in sorted(parts) if "train" in parts else ["."]:
        yield from walk(source, [part])


def _clear(target: Path, folders: set[str]) -> None:
    """Remove what a killed run left half written; refuse images of folders that the source does not have (any more)."""
    for parent, inner, names in os.walk(target):
        inner[:] = [name for name in inner if not name.startswith(".") or name == RECORDS]
        for name in names:
            if name.startswith(".") and name not in (INDEX, LOCK):
                Path(parent, name).unlink()
            elif is_image(name) and os.path.relpath(parent, target) not in folders:
                raise ValueError(f"{parent}: a folder of images that the source does not have; remove it")


# One share of the work -----------------------------------------------------------------------------------------------


def _prepare_share(source: Path, target: Path, rules: Rules, on_error: str, share: Share) -> tuple[Share, Found]:
    record = target / RECORDS / share.folder / f"{share.part}of{share.parts}.json"
    source, target = source / share.folder, target / share.folder
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(entry.name for entry in os.scandir(source) if kind_of(entry) == "image")
    _remove_others(target, names)
    names = names[share.part :: share.parts]
    marks = _read_marks(record, {name: (source / name, target / target_name(name)) for name in names})
    finished = len(marks)
    load = LoadNaturalImage(decode=rules.decode)
    counts: Counter[str] = Counter()
    faults, remarks = {}, {}
    try:
        for name in names:
            file = target / target_name(name)
            try:
                if name not in marks:
                    marks[name] = _write(source / name, file, load, rules)
                keeps, unusual = _describe(source / name, rules)
            except ImageDecodeError as error:
                if on_error == "raise":
                    raise
                file.unlink(missing_ok=True)
                faults[name] = (_kind(error), str(error))
                continue
            counts.update({"kept" if keeps else "resized": 1, "size": file.stat().st_size})
            if unusual:
                remarks[name] = unusual
    finally:
        if len(marks) > finished:
            os.sync()  # once a share, since the pictures are not flushed one by one
            write_json(record, marks, indent=None)
    return share, Found(counts["kept"], counts["resized"], counts["size"], faults, remarks)


def _read_marks(record: Path, files: Mapping[str, tuple[Path, Path]]) -> dict[str, Any]:
    """Read the marks of pictures that an earlier run wrote and that are as they were then, like their sources."""
    try:
        marks = json.loads(record.read_bytes())
        return {name: both for name, both in marks.items() if name in files and all(map(has_mark, files[name], both))}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def _remove_others(target: Path, names: Sequence[str]) -> None:
    """Remove the pictures whose source is gone."""
    wanted = Counter(map(target_name, names))
    if twice := [name for name, count in wanted.items() if count > 1]:
        raise ValueError(f"{target / twice[0]}: two pictures would get this name; rename one of them in the source")
    for entry in os.scandir(target):
        if is_image(entry.name) and entry.name not in wanted:
            os.unlink(entry.path)


def _write(source: Path, file: Path, load: LoadNaturalImage, rules: Rules) -> list[dict[str, Any]]:
    """Write a picture, and give the marks of its source and of its file."""
    try:
        mark = mark_of(source)  # before it is read: a change in between shows the next time
    except OSError:
        mark = {}
    image = load(source)  # which says what is wrong with it
    keeps, _ = _describe(source, rules)
    data = source.read_bytes() if keeps else b""
    if not data.endswith(JPEG_END):
        rows, columns = image.shape[1:]
        if (short := min(rows, columns)) > rules.short_side:
            image = resize(image, rules.short_side * rows // short, rules.short_side * columns // short)
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        data = simplejpeg.encode_jpeg(pixels, rules.quality, "RGB", rules.chroma)
    write_atomic(file, data, durable=False)
    os.utime(file, ns=(mark["stamp"][1],) * 2)
    return [mark, mark_of(file)]


def _describe(file: Path, rules: Rules) -> tuple[bool, list[str]]:
    """Read from a picture's header whether it is taken byte for byte, and what is unusual about it."""
    with Image.open(file) as image:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        is_jpeg = image.format in ("JPEG", "MPO")
        remarks = {
            "CMYK": image.mode == "CMYK",
            "palette": image.mode == "P",
            "16-bit": image.mode.startswith("I"),
            "grey": image.mode in ("1", "L", "LA"),
            "transparent": image.has_transparency_data,
            "turned by EXIF": turned,
            "animation": bool(getattr(image, "is_animated", False)) and image.format != "MPO",
            f"{image.format} named as JPEG": not is_jpeg and file.name.lower().endswith(JPEG_NAMES),
        }
        plain = rules.decode == "strict" and image.format == "JPEG" and image.mode in ("RGB", "L") and not turned
        keeps = plain and min(image.size) <= rules.short_side
        return keeps, [remark for remark, holds in remarks.items() if holds]


def _kind(error: ImageDecodeError) -> str:
    if isinstance(error.__cause__, UnidentifiedImageError):
        return "not an image"
    if isinstance(error.__cause__, ImageDecodeError):
        return "empty" if "it is empty" in str(error) else "values of no defined range"
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return "too large"
    return "not readable" if getattr(error.__cause__, "strerror", None) else "damaged or cut short"


# Lists and report ----------------------------------------------------------------------------------------------------


def _copy_lists(source: Path, target: Path, results: Mapping[Share, Found]) -> None:
    """Write the lists of flat validation images for the pictures' new names, without those that are left out."""
    left_out = {name for share, found in results.items() if share.folder in VALIDATION_FOLDERS for name in found.faults}
    for list_name in VALIDATION_LISTS:
        if not (source / list_name).is_file():
            continue
        lines = []
        for line in (source / list_name).read_text(encoding="utf-8").splitlines():
            name, _, label = line.strip().rpartition(" ")
            if name and name.strip() not in left_out:
                lines.append(f"{target_name(name.strip())} {label}\n")
        write_atomic(target / list_name, "".join(lines).encode())


def _report(target: Path, results: Mapping[Share, Found], left_out: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Write report.csv and add up the shares."""
    rows = [{"file": os.path.normpath(path), "what": f"left out: {kind}"} for path, kind in left_out]
    kinds = Counter(kind for _, kind in left_out)
    for share, found in results.items():
        folder = "" if share.folder == "." else f"{share.folder}/"
        for name, (kind, sentence) in found.faults.items():
            rows.append({"file": folder + name, "what": f"left out: {kind}", "more": sentence})
        for name, remarks in found.remarks.items():
            rows.append({"file": folder + name, "what": ", ".join(remarks)})
    write_csv(target / "report.csv", rows, ("file", "what", "more"))
    every = results.values()
    return {
        "written_anew": sum(found.resized for found in every),
        "kept_as_they_are": sum(found.kept for found in every),
        "MB": round(sum(found.size for found in every) / 1e6, 1),
        "left_out": dict(kinds + Counter(kind for found in every for kind, _ in found.faults.values())),
        "unusual": dict(Counter(remark for found in every for remarks in found.remarks.values() for remark in remarks)),
        "report": str(target / "report.csv"),
    }
