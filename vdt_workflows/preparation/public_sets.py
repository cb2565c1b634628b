"""What is known of BTCV and LiTS before they are looked at: file names, labels, case numbers and published splits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vdt_workflows.data.volumes import ROLE, SUFFIX
from vdt_workflows.preparation.stored_files import StoredFile

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
        stem = SUFFIX.sub("", file.name).removesuffix("_0000")
        key = _role(stem, file.folder)
        digits = re.findall(r"\d+", stem)
        if key is None or not digits or int(digits[-1]) not in data_set.numbers:
            continue
        case = found.setdefault(int(digits[-1]), {})
        if key in case:
            raise ValueError(
                f"{data_set.name} case {digits[-1]} has two {key}s, {case[key]} and {file}; name one folder or archive"
            )
        case[key] = file
    return found


def _role(stem: str, folder: str) -> str | None:
    """Whether a file is an image or a label; labels may bear the names of images in a folder of labels."""
    named = ROLE.match(stem)
    if folder.lower().startswith(LABEL_WORDS):
        return "label"
    word = (named[1] if named else folder).lower()
    return "image" if word.startswith(IMAGE_WORDS) else "label" if word.startswith(LABEL_WORDS) else None
