"""Kinds of files that the fault suite damages: how they are made, read, and read without the product's code."""

import csv
import gzip
import json
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813  (the field's name for it)
import simplejpeg
import torch
from monai.transforms import LoadImaged
from PIL import Image, ImageOps

from networks import ResNet3DClassifier, load_pretrained
from tests.faults.damage import Kind
from tests.faults.outcomes import draw_picture, make_classes
from tests.makers.dicom import write_frames, write_series
from tests.makers.nodules import write_nodules
from tests.makers.volumes import make_affine, write_volume
from vdt_transforms import CheckFinited, CheckLabelsd, LoadNaturalImage, NoduleReader, VolumeReader
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.images import find_images
from vdt_workflows.data.nodule_tables import list_nodules, read_nodules
from vdt_workflows.data.volumes import find_volumes, list_volumes
from vdt_workflows.preparation.images import prepare_images
from vdt_workflows.training.checkpoints import ResumeRun, check_settings, load_weights, save_weights

# Pictures


def _draw() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        **{f"a.{kind}": (draw_picture(1), {}) for kind in ("jpg", "png", "webp", "gif", "avif", "bmp")},
        "a.tif": (draw_picture(1), {"compression": "tiff_lzw"}),
        "turned.jpg": (draw_picture(2), {"exif": turned}),
        "cmyk.jpg": (draw_picture(3).convert("CMYK"), {}),
        "palette.png": (draw_picture(4).convert("P"), {}),
        "progressive.jpg": (draw_picture(5), {"progressive": True}),
    }


def _make_pictures(folder: Path) -> list[Path]:
    for name, (picture, options) in _draw().items():
        picture.save(folder / name, **options)
    return [folder / name for name in _draw()]


def _read_pictures(folder: Path) -> Any:
    load = LoadNaturalImage()
    return [load(file) for file in sorted(folder.iterdir())]


def _look_at_pictures(folder: Path) -> Any:
    """Decode by libjpeg, with its warnings as errors, or by Pillow, after PNG's checksums were looked at."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        with Image.open(BytesIO(data)) as image:
            if data.startswith(b"\xff\xd8"):
                kind = "CMYK" if image.mode == "CMYK" else "RGB"
                decoded = simplejpeg.decode_jpeg(data, kind, fastupsample=True, strict=True)
                if kind == "RGB":
                    exif = image.getexif()
                    image = Image.fromarray(decoded)
                    image.getexif()[0x0112] = exif.get(0x0112, 1)
            elif data.startswith(b"\x89PNG"):
                _check_png(data)
            pixels = ImageOps.exif_transpose(image)
            pixels = pixels.convert("RGBA") if pixels.has_transparency_data else pixels.convert("RGB")
            white = Image.new("RGBA", pixels.size, "white")
            pixels = Image.alpha_composite(white, pixels).convert("RGB") if pixels.mode == "RGBA" else pixels
        found.append(np.array(pixels).transpose(2, 0, 1))
    return found


def _check_png(data: bytes) -> None:
    at = 8
    while at + 12 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if int.from_bytes(data[end : end + 4], "big") != zlib.crc32(data[at + 4 : end]):
            raise ValueError(f"the checksum of {data[at + 4 : at + 8]!r} differs")
        at = end + 4


def _make_index(folder: Path) -> list[Path]:
    make_classes(folder)
    find_images(folder)
    return sorted(folder.rglob(".vdt_index.npz"))


def _read_lists(folder: Path) -> Any:
    return {part: [dict(item) for item in items] for part, items in find_images(folder).items()}


def _list_classes(folder: Path) -> Any:
    return {
        part: [
            {"image": str(file), "label": label}
            for label, name in enumerate(("cat", "dog"))
            for file in sorted((folder / part / name).glob("*.jpg"))
        ]
        for part in ("train", "val")
    }


def _make_copy(folder: Path) -> list[Path]:
    make_classes(folder / "images", 2)
    prepare_images(str(folder / "images"), str(folder / "copy"), 16, workers=1)
    return sorted(file for file in (folder / "copy").rglob("*.jp*g") if file.is_file())[:4] + sorted(
        (folder / "copy").rglob(".vdt_records/**/*.json")
    )


def _read_copy(folder: Path) -> Any:
    prepare_images(str(folder / "images"), str(folder / "copy"), 16, workers=1)
    return {file.name: file.read_bytes() for file in sorted((folder / "copy" / "train").rglob("*.jpg"))}


def _encode_again(folder: Path) -> Any:
    prepare_images(str(folder / "images"), str(folder / "another"), 16, workers=1)
    return {file.name: file.read_bytes() for file in sorted((folder / "another" / "train").rglob("*.jpg"))}


# Volumes


def _make_volumes(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    return [
        write_volume(
            folder / kind / f"case{i}{suffix}",
            rng.integers(0, 3, (9, 10, 11)),
            affine=make_affine((-1, 1, 2)),
            dtype=np.uint8 if kind == "labels" else np.int16,
        )
        for kind in ("images", "labels")
        for i, suffix in enumerate((".nii", ".nii.gz"))
    ]


def _make_other_volumes(folder: Path) -> list[Path]:
    written = []
    for i, suffix in enumerate((".nrrd", ".mha")):
        volume = np.random.default_rng(i).integers(0, 900, (7, 6, 5)).astype(np.int16)
        image = sitk.GetImageFromArray(volume)
        image.SetSpacing((1.5, 1.5, 2.0))
        (folder / "images").mkdir(exist_ok=True)
        written.append(folder / "images" / f"case{i}{suffix}")
        sitk.WriteImage(image, str(written[-1]), useCompression=True)
    return written


def _load(items: list[dict[str, Any]], keys: tuple[str, ...]) -> Any:
    transform = [LoadImaged(keys, reader=VolumeReader, ensure_channel_first=True), CheckFinited("image")]
    transform += [CheckLabelsd("label", num_classes=3)] if "label" in keys else []
    loaded = SeededCacheDataset(items, transform, cache="memory", progress=False)
    return [(np.asarray(item[key][0]), np.asarray(item[key].affine)) for item in loaded for key in keys]


def _read_volumes(folder: Path) -> Any:
    found = find_volumes(folder, val_fraction=0.5)
    cases = sorted(found["training"] + found["validation"], key=lambda case: case["image"])
    return _load(cases, ("image", "label"))


def _look_at_volumes(folder: Path) -> Any:
    """Read by nibabel, where header fields that say the same thing twice agree and checksums are right."""
    found = []
    for i, suffix in enumerate((".nii", ".nii.gz")):
        for kind in ("images", "labels"):
            data = (folder / kind / f"case{i}{suffix}").read_bytes()
            image = nib.Nifti1Image.from_bytes(gzip.decompress(data) if suffix == ".nii.gz" else data)
            affine = image.affine
            if not np.allclose(np.abs(np.linalg.norm(affine[:3, :3], axis=0)), image.header.get_zooms()[:3], rtol=1e-2):
                raise ValueError("pixdim and the affine differ")
            values = np.asarray(image.dataobj)
            if kind == "labels":
                whole = np.rint(values)
                if not (np.isin(whole, (0, 1, 2)).all() and np.abs(values - whole).max() < 1.1e-3):
                    raise ValueError("labels other than 0, 1 and 2")
                values = whole
            if not np.isfinite(values).all():
                raise ValueError("values that are no numbers")
            found.append((values.reshape(values.shape[:3]), affine))
    return found


def _read_listed(folder: Path) -> Any:
    return _load([{"image": case["image"]} for case in list_volumes(folder)], ("image",))


def _look_at_other_volumes(folder: Path) -> Any:
    found = []
    for file in sorted((folder / "images").iterdir()):
        image = sitk.ReadImage(str(file))
        affine = np.eye(4)
        affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = np.array([-1, -1, 1]) * image.GetOrigin()
        found.append((sitk.GetArrayFromImage(image).transpose(), affine))
    return found


def _make_series(folder: Path) -> list[Path]:
    write_series(folder, shape=(9, 8, 4))
    return sorted(folder.glob("*"))


def _make_frames(folder: Path) -> list[Path]:
    hu = np.random.default_rng(0).integers(-900, 900, (9, 8, 4))
    write_frames(folder / "frames.dcm", hu)
    return [folder / "frames.dcm"]


def _voxels(folder: Path) -> Any:
    """HU of a folder's slices or frames (columns, rows, slices), where all below air is air."""
    slices = []
    for file in sorted(folder.iterdir()):
        header = pydicom.dcmread(file)
        pixels = header.pixel_array.reshape(-1, *header.pixel_array.shape[-2:])
        frames = header.get("PerFrameFunctionalGroupsSequence") or [header]
        for frame, image in zip(frames, pixels, strict=True):
            if frame is header:
                place, slope, shift = header.ImagePositionPatient[2], header.RescaleSlope, header.RescaleIntercept
            else:
                shared = header.SharedFunctionalGroupsSequence[0]
                values = frame if "PixelValueTransformationSequence" in frame else shared
                values = values.PixelValueTransformationSequence[0]
                place = frame.PlanePositionSequence[0].ImagePositionPatient[2]
                slope, shift = values.RescaleSlope, values.RescaleIntercept
            slices.append((float(place), np.maximum(image * float(slope) + float(shift), -1024)))
    return [np.stack([image.T for _, image in sorted(slices, key=lambda pair: pair[0])], axis=-1)]


def _read_series(folder: Path) -> Any:
    return [volume for volume, _ in _read_listed(folder)]


def _make_cubes(folder: Path) -> list[Path]:
    cube = (np.arange(512) % 256).astype(np.uint8).reshape(8, 8, 8)
    np.savez(folder / "lidc1_1.npz", voxel=cube, answer1=cube)
    np.savez_compressed(folder / "lidc2_1.npz", voxel=cube, answer1=cube)
    return sorted(folder.glob("*.npz"))


def _read_cubes(folder: Path) -> Any:
    load = LoadImaged("image", reader=NoduleReader)
    return [load(item)["image"].as_tensor() for item in list_nodules(folder)]


def _look_at_cubes(folder: Path) -> Any:
    cubes = [np.load(file)["voxel"] for file in sorted(folder.glob("*.npz"))]
    return [cube.transpose() / 255 * 1424 - 1024 for cube in cubes]


# Weights, states, caches and zips

RUN_STATE = {"epoch": 1, "iteration": 2, "objects": {}, "scaler": {}}
SETTINGS = {"depth": 18, "mean": 3.5, "class_names": ["a", "b"]}


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return ResNet3DClassifier(18, 3, base_channels=4)


def _make_checkpoints(folder: Path) -> list[Path]:
    save_weights(_network(), folder / "model.pt", SETTINGS)
    torch.save(RUN_STATE, folder / "resume.pt")
    return [folder / "model.pt", folder / "resume.pt"]


def _read_checkpoints(folder: Path) -> Any:
    read = []
    for load in (load_weights, load_pretrained):
        network = ResNet3DClassifier(18, 3, base_channels=4)
        load(network, folder / "model.pt")
        read.append({name: value.numpy() for name, value in network.state_dict().items()})
    return read, ResumeRun(str(folder / "resume.pt"), {})._read()


def _list_weights(folder: Path) -> Any:
    return [{name: value.numpy() for name, value in _network().state_dict().items()}] * 2, RUN_STATE


def _make_record(folder: Path) -> list[Path]:
    save_weights(_network(), folder / "model.pt", SETTINGS)
    (folder / "run.json").write_text(json.dumps({**SETTINGS, "_run_": {"command": "x"}}))
    return [folder / "run.json"]


def _read_record(folder: Path) -> Any:
    check_settings(folder / "run.json", folder / "model.pt")
    return {name: value for name, value in json.loads((folder / "run.json").read_text()).items() if name in SETTINGS}


def _list_settings(folder: Path) -> Any:
    """Those of the network; the others are nobody's."""
    return {name: value for name, value in json.loads((folder / "run.json").read_text()).items() if name in SETTINGS}


def _make_cache(folder: Path) -> list[Path]:
    _make_volumes(folder)
    _read_cache(folder)
    return sorted((folder / "cache").iterdir())


def _read_cache(folder: Path) -> Any:
    items = [{"image": str(folder / "images" / f"case{i}{s}")} for i, s in enumerate((".nii", ".nii.gz"))]
    load = [LoadImaged("image", ensure_channel_first=True)]
    data = SeededCacheDataset(items, load, cache="disk", cache_dir=folder / "cache", progress=False)
    return [np.array(item["image"][0]) for item in data]


def _look_at_images(folder: Path) -> Any:
    return [np.asarray(nib.load(folder / "images" / f"case{i}{s}").dataobj) for i, s in enumerate((".nii", ".nii.gz"))]


# Tables and lists


def _make_tables(folder: Path) -> list[Path]:
    write_nodules(folder, patients=6, most=2, size=4)
    (folder / "positions.csv").write_text("nodule_id,x_mm,y_mm,z_mm\na,1,2,3\nb,4,5,6\n")
    return [folder / "nodules.csv", folder / "positions.csv"]


KEPT = ("nodule_id", "patient_id", "image", "malignancy_mode", "malignancy_mean", "diameter_mm")


def _read_tables(folder: Path) -> Any:
    image = sorted((folder / "images").iterdir())[0]
    (item,) = list_nodules(image, folder / "positions.csv")
    places = [(nodule["nodule_id"], nodule.get("position", nodule.get("voxel"))) for nodule in item["nodules"]]
    return [tuple(nodule[name] for name in KEPT) for nodule in read_nodules(folder)], places


def _look_at_tables(folder: Path) -> Any:
    """Row by row, by the csv module; numbers must be plain decimals within what a nodule can have."""

    def number(text: str, low: float, high: float) -> float:
        if not set(text.strip()) <= set("0123456789.+-eE") or not low <= float(text) <= high:
            raise ValueError(f"{text!r} is no number from {low} to {high}")
        return float(text)

    rows = list(csv.DictReader((folder / "nodules.csv").read_text(encoding="utf-8-sig").splitlines()))
    nodules = [
        (
            row["nodule_id"],
            row["patient_id"],
            str(folder / row["image"]),
            int(number(row["malignancy_mode"], 1, 5)),
            number(row["malignancy_mean"], 1, 5),
            number(row["diameter_mm"], 0, 1000),
        )
        for row in rows
    ]
    heading, *rows = csv.reader((folder / "positions.csv").read_text(encoding="utf-8-sig").splitlines())
    rows = [dict(zip(heading, row, strict=True)) for row in rows if row]
    named = next((name for name in ("nodule_id", "id", "name") if name in heading), None)
    columns = next(c for c in (("x_mm", "y_mm", "z_mm"), ("coordX", "coordY", "coordZ")) if {*c} <= {*heading})
    places = [
        (row[named] if named else str(i), [number(row[name], -1e5, 1e5) for name in columns])
        for i, row in enumerate(rows, 1)
    ]
    return nodules, places


def _make_json(folder: Path) -> list[Path]:
    _make_volumes(folder)
    cases = [{"image": f"images/case{i}{s}", "label": f"labels/case{i}{s}"} for i, s in enumerate((".nii", ".nii.gz"))]
    content = {"name": "x", "labels": {"0": "background", "1": "a"}, "training": cases[:1], "validation": cases[1:]}
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))
    return [folder / "dataset.json"]


def _read_json(folder: Path) -> Any:
    return {part: list(map(dict, cases)) for part, cases in find_volumes(folder).items()}


def _look_at_json(folder: Path) -> Any:
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8-sig"))
    parts = {part: content.get(part, []) for part in ("training", "validation", "test")}
    return {
        part: [{key: str(folder / case[key]) for key in ("image", "label") if key in case} for case in cases]
        for part, cases in parts.items()
    }


KINDS = (
    Kind("image", _make_pictures, _read_pictures, _look_at_pictures, tolerance=1e-6),
    Kind("image index", _make_index, _read_lists, _list_classes, exact=True, mends=True),
    Kind("prepared images", _make_copy, _read_copy, _encode_again, exact=True, mends=True),
    Kind("NIfTI", _make_volumes, _read_volumes, _look_at_volumes, tolerance=1e-6),
    *(
        [Kind("NRRD and MetaImage", _make_other_volumes, _read_listed, _look_at_other_volumes, tolerance=1e-6)]
        if VolumeReader().verify_suffix(["a.nrrd"])
        else []
    ),
    Kind("DICOM", _make_series, _read_series, _voxels, tolerance=1e-3, several=True),
    Kind("DICOM frames", _make_frames, _read_series, _voxels, tolerance=1e-3),
    Kind("npz", _make_cubes, _read_cubes, _look_at_cubes, tolerance=1e-3, exact=True),
    Kind("checkpoint", _make_checkpoints, _read_checkpoints, _list_weights, exact=True),
    Kind("run.json", _make_record, _read_record, _list_settings),
    Kind("disk cache", _make_cache, _read_cache, _look_at_images, exact=True, mends=True),
    Kind("csv", _make_tables, _read_tables, _look_at_tables),
    Kind("json", _make_json, _read_json, _look_at_json),
)
