"""Bring the files of a case to their final names: as they are where that is possible, else with the least change."""

from __future__ import annotations

import gzip
import os
import shutil
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

LEVEL = 6  # of gzip


def place_file(file: Path, target: Path, *, copy: bool, moves: bool) -> None:
    """Bring a whole file to its final name: move it, make a hard link where the disk allows, or copy it."""
    source = os.path.realpath(file)
    if target.exists() and os.path.samefile(source, target):
        return
    temporary = target.with_name(f".{target.name}")
    linked = False
    if not (copy or moves):
        with suppress(OSError):  # another file system, or one without hard links
            os.link(source, temporary)
            linked = True
    if moves:
        os.replace(source, temporary)
    elif not linked:
        shutil.copyfile(source, temporary)
    if not linked:
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
    os.replace(temporary, target)


def label_bytes(labels: np.ndarray, affine: np.ndarray) -> bytes:
    """Make a .nii.gz file of a label map (X, Y, Z)."""
    image = nib.Nifti1Image(labels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)  # ITK reads this one
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), LEVEL, mtime=0)


def with_affine(file: Path, affine: np.ndarray) -> bytes:
    """Give the content of a NIfTI file another affine; its voxels and all else stay."""
    kind = type(nib.load(file).header)
    with ImageOpener(file) as opened:
        content = bytearray(opened.read())
    header = kind(bytes(content[: kind.sizeof_hdr]), check=False)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    content[: kind.sizeof_hdr] = header.binaryblock
    return gzip.compress(content, LEVEL, mtime=0) if file.name.endswith(".gz") else bytes(content)
