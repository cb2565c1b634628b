"""Write an image data set once more, upright and small, so that pre-training reads it several times faster.

    vdt prepare images --images IMAGENET --output_dir imagenet_256

The layout stays: give the new folder to the pre-training bundle as `--dataset_dir`. Every picture is decoded whole;
what is cut short, no image, CMYK, a palette or turned by EXIF is counted, and named in `report.csv`. A run that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

from typing import Any

from vdt_workflows.preparation.image_cache import CacheRules, cache_images


def prepare_images(
    images: str,
    output_dir: str,
    short_side: int = 256,
    quality: int = 90,
    chroma: str = "420",
    on_error: str = "raise",
    workers: int = 0,
) -> dict[str, Any]:
    """Check every picture of a data set and write it as a small upright JPEG, in the same folders.

    Args:
        images: folder with `train/` and `val/` (or one of the other layouts of the pre-training bundle).
        output_dir: a new folder, or one of an earlier run with the same images and settings.
        short_side: pixels of the short side; smaller pictures keep their size. The bundle's tests look at 256.
        quality: of JPEG, 1 to 100.
        chroma: 420, 422 or 444: how much of the colours' resolution is kept.
        on_error: `raise` stops at the first picture that cannot be read; `skip` leaves it out, names and counts it.
        workers: processes; 0 takes as many as there are cores.

    Returns:
        How many pictures were written, kept as they are, left out and why, and what else was met.

    Raises:
        ValueError: if an argument or a picture is wrong, or `output_dir` was made from other images or settings.
        FileExistsError: if `output_dir` has files of other origin.
    """
    rules = CacheRules(short_side, quality, str(chroma))  # fire reads 420 as a number
    return cache_images(str(images), str(output_dir), rules, on_error=on_error, workers=workers or None)
