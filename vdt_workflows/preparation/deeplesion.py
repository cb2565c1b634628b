"""Prepare DeepLesion, or CT volumes with lesion masks in its layout, for `bundles/deeplesion_lesion_detection`.

    vdt prepare deeplesion DEEPLESION
    vdt prepare deeplesion DEEPLESION --annotations DEEPLESION/annotation
    vdt prepare deeplesion MINE --volumes FOLDER --split_by "[0.7, 0.1, 0.2]"

The first reads `DEEPLESION/DL_info.csv` and `DEEPLESION/Images_png/<series>/<slice>.png` (or `Images_png/Images_png/`,
as the archives unpack); some of the 56 archives are enough. The second takes the boxes from COCO-style files instead,
`deeplesion_train.json`, `deeplesion_val.json` and `deeplesion_test.json`. The third first writes the volumes of FOLDER,
`<name>_image.*` with a mask `<name>_label.*` (NIfTI, NRRD or MetaImage), as such a data set into MINE.

Either writes, beside the images, which are not touched,

    deeplesion.json          the key slices with their boxes, by split, and which slices there are
    deeplesion_summary.json  how many there are, and everything that is missing or was left out
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import LoadImage, Orientation
from PIL import Image
from skimage.measure import label as connected_components

from vdt_transforms.readers import VolumeReader
from vdt_transforms.slice_stacks import HU_OFFSET, ORIENTATION, SLICE_NAME
from vdt_workflows.errors import check_choice
from vdt_workflows.files import claim, remove_unfinished, write_csv, write_json
from vdt_workflows.locks import hold, leaving
from vdt_workflows.parallel import run_parallel
from vdt_workflows.preparation.deeplesion_tables import COLUMNS, SPLITS, Lesion, read_coco, read_table
from vdt_workflows.progress import track

logger = logging.getLogger(__name__)

MADE_BY = "prepare_deeplesion"
OFFICIAL = {  # lesions and key slices of the whole data set
    "training": (22_919, 22_496),
    "validation": (4_889, 4_793),
    "test": (4_927, 4_831),
}
MARGIN = 5  # px, between a lesion's end points and its box
LISTS = (  # of a key slice, and what each of its lesions has
    *(("boxes", "box"), ("areas", "area"), ("noisy", "noisy"), ("types", "type"), ("diameters", "diameter")),
    *(("axes", "axes"), ("locations", "location")),
)


@leaving
def prepare_deeplesion(
    dataset_dir: str,
    annotations: str | None = None,
    volumes: str | None = None,
    split_by: Sequence[float] = (0.7, 0.1, 0.2),
    key_slices: str = "largest",
    seed: int = 0,
    workers: int | None = None,
    geometry: str = "refuse",
) -> dict[str, Any]:
    """List the key slices of a data set that are there, with their boxes, in `dataset_dir/deeplesion.json`.

    Boxes become 0-based, are clipped to the image, and dropped where less than a pixel is left. Lesions marked as noisy
    are listed with the mark; training and evaluation choose what to do with them.

    Args:
        dataset_dir: folder of `Images_png`, and of `DL_info.csv` unless `annotations` are given.
        annotations: another csv file, or a COCO-style json file or folder of them.
        volumes: folder of CT volumes and masks to write into `dataset_dir` first.
        split_by: parts of the volumes for training, validation and test.
        key_slices: of the volumes' lesions: the slice of the "largest" area, or "all" slices of the lesion.
        seed: of the split of the volumes.
        workers: processes that write volumes, all cores by default.
        geometry: what says where the voxels of a NIfTI file lie: "refuse" a file in which sform, qform and pixdim
            disagree, or take its "sform" or "qform".

    Returns:
        The summary.

    Raises:
        FileNotFoundError: if a folder or file is missing.
        FileExistsError: if a file to be written is there and not from this script, or volumes shall go into a folder
            with files of other origin.
        ValueError: if an argument, a table or a volume is wrong, no key slice is there, or `dataset_dir` was made of
            other volumes or with other settings.
    """
    root = Path(str(dataset_dir))
    if volumes is not None:
        _convert_volumes(Path(str(volumes)), root, split_by, key_slices, seed, workers, geometry)
    images = root / "Images_png"
    if (images / "Images_png").is_dir():
        images = images / "Images_png"
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; expected the unpacked Images_png archives in it")
    hold(root)
    remove_unfinished(root)
    source = Path(str(annotations)) if annotations is not None else root / "DL_info.csv"
    lesions = list(read_coco(source) if source.is_dir() or source.suffix == ".json" else read_table(source))
    names = sorted({lesion["series"] for lesion in lesions})
    stored = {name: _list_slices(images / name) for name in track(names, len(names), "listing series")}
    problems: dict[str, list[str]] = defaultdict(list)
    slices: dict[tuple[str, int], list[Lesion]] = defaultdict(list)
    for lesion in lesions:
        if reason := _clip(lesion, stored[lesion["series"]], images / lesion["series"]):
            problems[reason].append(f"{lesion['series']}/{lesion['slice']:03d}.png")
        else:
            slices[lesion["series"], lesion["slice"]].append(lesion)
    kept = [lesion for found in slices.values() for lesion in found]
    if not kept:
        reasons = "; ".join(f"{len(names)} times {reason}" for reason, names in problems.items())
        raise ValueError(
            f"{images}: none of the {len(lesions)} annotated lesions can be used ({reasons or 'none at all'})"
        )
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS.values()}
    for (series, number), found in sorted(slices.items()):
        image = images / series / stored[series][number]
        splits[found[0]["split"]].append(
            {
                "image": image.relative_to(root).as_posix(),
                **{name: found[0][name] for name in ("patient", "slice_interval", "spacing", "size", "window")},
                **{names: [lesion[name] for lesion in found] for names, name in LISTS},
            }
        )
    summary = {
        "source": str(source),
        "lesions": Counter(lesion["split"] for lesion in kept),
        "noisy_lesions": sum(lesion["noisy"] for lesion in kept),
        "key_slices": {name: len(items) for name, items in splits.items()},
        "patients": {n: len({item["patient"] for item in items}) for n, items in splits.items()},
        "series": len({series for series, _ in slices}),
        "official": {n: _count(lesions, n) == OFFICIAL[n] for n in OFFICIAL},  # of the table, whatever is there
        "left_out": {reason: len(names) for reason, names in problems.items()},
    }
    runs = {series: _runs(stored[series]) for series in sorted({series for series, _ in slices})}
    _write(root / "deeplesion.json", {**splits, "slices": runs}, indent=None)
    _write(root / "deeplesion_summary.json", {**summary, "left_out_lesions": problems})
    for reason, names in problems.items():
        logger.warning("%d lesions left out: %s, such as %s", len(names), reason, names[0])
    return summary


def _count(lesions: list[Lesion], split: str) -> tuple[int, int]:
    chosen = [lesion for lesion in lesions if lesion["split"] == split]
    return len(chosen), len({(lesion["series"], lesion["slice"]) for lesion in chosen})


def _runs(numbers: dict[int, str]) -> list[list[int]]:
    """First and last number of each run of neighbouring slices."""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return [list(pair) for pair in zip(starts, ends, strict=True)]


def _list_slices(series: Path) -> dict[int, str]:
    """List the files of a series by slice number; a series that is not there has none."""
    files = os.listdir(series) if series.is_dir() else []
    return {int(m[1]): file for file in files if (m := SLICE_NAME.match(file))}


def _clip(lesion: Lesion, stored: dict[int, str], folder: Path) -> str:
    """Clip the lesion's box to the image, and return why it cannot be used, if so."""
    x1, y1 = (max(value, 0.0) for value in lesion["box"][:2])
    x2, y2 = (min(value, float(size)) for value, size in zip(lesion["box"][2:], lesion["size"], strict=True))
    lesion |= {"box": [x1, y1, x2, y2], "area": (x2 - x1) * (y2 - y1)}
    if not stored:
        return "the series is not there"
    if lesion["slice"] not in stored:
        return "the key slice is not there"
    for number in {min(stored), lesion["slice"], max(stored)}:  # of a series all are alike
        try:
            with Image.open(folder / stored[number]) as image:
                alike = image.mode.startswith("I")  # as `read_slice` asks
        except (OSError, SyntaxError):
            alike = False
        if not alike:
            return "the series has a slice that is no PNG of one channel of 16 bits, which holds HU + 32768"
    if not 0 < lesion["slice_interval"] < math.inf:
        return f"the slice interval is {lesion['slice_interval']:g} mm"
    return "" if x2 - x1 >= 1 and y2 - y1 >= 1 else "less than a pixel of the box is inside the image"


def _write(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write a result, unless something else has its name."""
    try:
        ours = not path.exists() or json.loads(path.read_text()).get("made_by") == MADE_BY
    except (ValueError, AttributeError):
        ours = False
    if not ours:
        raise FileExistsError(f"{path}: is there and was not made by this script; move it away")
    write_json(path, {"made_by": MADE_BY, **content}, indent=indent)


# Volumes and masks ---------------------------------------------------------------------------------------------------


def _convert_volumes(
    volumes: Path,
    root: Path,
    split_by: Sequence[float],
    key_slices: str,
    seed: int,
    workers: int | None,
    geometry: str,
) -> None:
    """Write CT volumes with lesion masks as a data set of DeepLesion's layout: 16-bit slices and `DL_info.csv`.

    Volumes are turned to LPI. A lesion is a connected part of a mask; its box is that of its outline in the key slice
    and 5 px more on every side, as DeepLesion's. Volumes that were written before are not written again.
    """
    check_choice("key_slices", key_slices, ("largest", "all"))
    if len(split_by) != 3 or min(split_by) < 0 or sum(split_by) <= 0:
        raise ValueError(f"split_by must be the parts of training, validation and test, got {split_by}")
    pairs = _find_pairs(volumes)
    names = [image.name for image, _ in pairs]
    claim(root, {"volumes": names, "split_by": list(split_by), "key_slices": key_slices, "seed": seed}, empty=True)
    order = np.random.default_rng(seed).permutation(len(pairs))
    bounds = np.cumsum(split_by) / sum(split_by) * len(pairs)
    split = {int(place): 1 + int(np.searchsorted(bounds, rank + 0.5)) for rank, place in enumerate(order)}
    tasks = [(i + 1, split[i], image, mask) for i, (image, mask) in enumerate(pairs)]
    write = partial(_write_volume, root / "Images_png", key_slices, geometry)
    rows = [row for found in run_parallel(write, tasks, workers=workers, label="volumes") for row in found]
    rows.sort(key=lambda row: row["Patient_index"])  # they come as they are done
    if not rows:
        raise ValueError(f"{volumes}: no mask has a lesion")
    write_csv(root / "DL_info.csv", rows, COLUMNS)


def _find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [file for file in files if "_image." in file.name]
    if not images:
        raise FileNotFoundError(f"{folder}: no volumes; expected <name>_image.* and <name>_label.* files")
    pairs = [(image, image.with_name(image.name.replace("_image.", "_label."))) for image in images]
    for image, mask in pairs:
        if not mask.is_file():
            raise FileNotFoundError(f"{mask}: no such file; {image.name} needs its mask")
    return pairs


def _write_volume(
    images: Path, key_slices: str, geometry: str, task: tuple[int, int, Path, Path]
) -> list[dict[str, Any]]:
    """Write one volume's slices, whole or not at all, and give the rows of its lesions."""
    number, split, image_file, mask_file = task
    load = LoadImage(reader=VolumeReader(geometry=geometry), ensure_channel_first=True)
    image, mask = (Orientation(ORIENTATION, labels=None)(load(file)) for file in (image_file, mask_file))
    if image.shape != mask.shape or image.shape[0] != 1:
        raise ValueError(f"{mask_file}: shape {tuple(mask.shape)}, but its image has {tuple(image.shape)}")
    if not np.allclose(image.affine, mask.affine, atol=1e-2):
        raise ValueError(f"{mask_file}: its affine differs from that of its image; both must lie on the same grid")
    voxels = np.asarray(image[0])
    if not np.isfinite(voxels).all():
        raise ValueError(f"{image_file}: has NaN or infinite voxels; expected HU")
    series = images / f"{number:06d}_01_01"
    if not series.is_dir():
        unfinished = images / f".{series.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        stored = np.clip(np.rint(voxels) + HU_OFFSET, 0, 65535).astype(np.uint16)
        for z in range(voxels.shape[2]):
            Image.fromarray(np.ascontiguousarray(stored[:, :, z].T)).save(unfinished / f"{z + 1:03d}.png")
        unfinished.rename(series)
    lesions = connected_components(np.asarray(mask[0]) > 0)
    spacing = [float(value) for value in image.pixdim]
    rows = []
    for lesion in range(1, lesions.max() + 1):
        areas = (lesions == lesion).sum((0, 1))
        for z in [int(areas.argmax())] if key_slices == "largest" else np.flatnonzero(areas).tolist():
            points = np.argwhere(lesions[:, :, z] == lesion)
            rows.append(_row(number, split, z, points, spacing, voxels.shape))
    return rows


def _row(number: int, split: int, z: int, points: np.ndarray, spacing: list[float], shape: Sequence[int]) -> Lesion:
    """A row of `DL_info.csv` for the pixels (P, 2), as x and y from 0, of a lesion in slice z."""
    long, short = _axes(points)
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN

    def text(*values: Any) -> str:
        return ", ".join(f"{value:g}" for value in values)

    place = (np.append(points.mean(0), z) + 0.5) / shape
    return {
        "File_name": f"{number:06d}_01_01_{z + 1:03d}.png",
        "Patient_index": number,
        "Study_index": 1,
        "Series_ID": 1,
        "Key_slice_index": z + 1,
        "Measurement_coordinates": text(*(np.concatenate([long, short]).ravel() + 1)),
        "Bounding_boxes": text(*(low + 1), *(high + 1)),
        "Lesion_diameters_Pixel_": text(*(np.linalg.norm(axis[1] - axis[0]) for axis in (long, short))),
        "Normalized_lesion_location": text(*place),
        "Coarse_lesion_type": -1,
        "Possibly_noisy": 0,
        "Slice_range": text(1, shape[2]),
        "Spacing_mm_px_": text(*spacing),
        "Image_size": text(*shape[:2]),
        "DICOM_windows": "-1500, 500",
        "Train_Val_Test": split,
    }


def _axes(points: np.ndarray) -> list[np.ndarray]:
    """End points (2, 2) of the longest diameter of pixels (P, 2), and of their extent across it."""
    angles = np.linspace(0, np.pi, 180, endpoint=False)
    along = points @ np.stack([np.cos(angles), np.sin(angles)])
    longest = int(np.ptp(along, axis=0).argmax())
    across = (longest + 90) % 180
    return [points[[along[:, a].argmin(), along[:, a].argmax()]].astype(float) for a in (longest, across)]
