"""The CT volumes to search for lesions."""

from __future__ import annotations

import os
from pathlib import Path

from pydicom.misc import is_dicom

from vdt_transforms.readers import list_slices
from vdt_transforms.slice_stacks import read_slice


def list_scans(source: str | os.PathLike) -> list[dict[str, str]]:
    """List the CT volumes to search: a file, a folder of NIfTI files, of one DICOM series, or of numbered PNG slices.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the folder holds nothing of the kind, or its PNG slices have a hole.
    """
    path = Path(source)
    if path.is_file():
        return [{"image": str(path)}]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a CT volume or a folder of them")
    if slices := list_slices(path):
        read_slice(slices[0])
        return [{"image": str(path)}]
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    volumes = [file for file in files if file.name.endswith((".nii", ".nii.gz", ".nrrd", ".mha"))]
    if volumes:
        return [{"image": str(file)} for file in volumes]
    if any(is_dicom(file) for file in files[:3]):
        return [{"image": str(path)}]
    raise ValueError(f"{path}: no volume in it; expected NIfTI files, one DICOM series, or slices such as 001.png")
