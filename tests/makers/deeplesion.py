"""A tiny data set of DeepLesion's layout: bright balls in noise, and one ball that goes on as a vessel."""

from functools import partial

import numpy as np
from PIL import Image

from vdt_transforms.slice_stacks import HU_OFFSET
from vdt_workflows import files
from vdt_workflows.preparation.deeplesion_tables import COLUMNS

write_csv = partial(files.write_csv, columns=COLUMNS)


def row(series="000001_01_01", number=109, box=(226.169, 90.0204, 241.252, 111.977), **more):
    """A row of DL_info.csv; by default the first of the data set, whose numbers are known."""
    patient, study, part = series.split("_")
    values = {
        "File_name": f"{series}_{number:03d}.png",
        "Patient_index": int(patient),
        "Study_index": int(study),
        "Series_ID": int(part),
        "Key_slice_index": number,
        "Measurement_coordinates": "233.537, 95.0204, 234.057, 106.977, 231.169, 101.605, 236.252, 101.143",
        "Bounding_boxes": ", ".join(map(str, box)),
        "Lesion_diameters_Pixel_": "11.9677, 5.10387",
        "Normalized_lesion_location": "0.44666, 0.283794, 0.434454",
        "Coarse_lesion_type": 3,
        "Possibly_noisy": 0,
        "Slice_range": "103, 115",
        "Spacing_mm_px_": "0.488281, 0.488281, 5",
        "Image_size": "512, 512",
        "DICOM_windows": "-175, 275",
        "Patient_gender": "F",
        "Patient_age": 62,
        "Train_Val_Test": 3,
    }
    return values | more


def write_series(folder, numbers, hu=None, size=(512, 512)):
    """Write the slices of a series, rows by columns, and the same for all unless `hu` gives them by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.zeros(size) if hu is None else hu[number]
        Image.fromarray((np.rint(pixels) + HU_OFFSET).astype(np.uint16)).save(folder / f"{number:03d}.png")


def make_deeplesion(root, patients=(4, 2, 2), size=(64, 80), seed=0, nested=True):
    """Write balls of 60 HU in noise around 0 HU: for each patient one series of 11 slices with two key slices."""
    random = np.random.default_rng(seed)
    rows = []
    images = root / "Images_png" / "Images_png" if nested else root / "Images_png"
    for patient, split in enumerate(np.repeat((1, 2, 3), patients).tolist(), 1):
        series = f"{patient:06d}_01_01"
        z, y, x = np.indices((11, *size))
        row_of, column_of = random.uniform(20, size[0] - 20), random.uniform(20, size[1] - 20)
        distance = ((z - 5) * 2.5) ** 2 + (y - row_of) ** 2 + (x - column_of) ** 2
        volume = random.normal(0, 20, (11, *size)) + 400 * (distance < 8**2)
        write_series(images / series, range(1, 12), dict(enumerate(volume, 1)), size)
        box = (column_of - 7, row_of - 7, column_of + 10, row_of + 10)
        more = {"Image_size": f"{size[1]}, {size[0]}", "Spacing_mm_px_": "0.8, 0.8, 2.5", "Train_Val_Test": split}
        more |= {"Coarse_lesion_type": split if split > 1 else -1, "Lesion_diameters_Pixel_": "16, 15"}
        rows += [row(series, number, box, **more) for number in (6, 7)]
    write_csv(root / "DL_info.csv", rows)
    return root
