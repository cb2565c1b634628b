"""Checks of NIfTI files by their headers, before any voxel is read."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Mapping
from itertools import product
from math import prod

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from nibabel.spatialimages import SpatialImage


def check_geometry(case: Mapping[str, str]) -> None:
    """Check by their headers that a case's files can be used, and that its image and label are on the same grid.

    Grids are the same if no corner is off by more than a tenth of a voxel.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, as in `read_header`, `check_voxel_size` and `check_same_grid`.
    """
    headers = [read_header(case[key]) for key in ("image", "label") if key in case]
    for header in headers:
        check_voxel_size(header)
    if len(headers) == 2:
        check_same_grid(*headers)


def read_header(path: str | os.PathLike) -> SpatialImage:
    """Read a NIfTI file's header, and check that it holds one grey 3D volume, and all of its voxels.

    Returns:
        The image; its voxels are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no NIfTI, colour, not 3D, of size zero, or cut short.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except PermissionError:
        raise
    except Exception as error:  # broken bytes raise whatever they lead to
        raise ValueError(f"{path}: not a readable NIfTI volume ({error})") from error
    shape, dtype = image.shape, image.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        kind = "complex" if dtype.kind == "c" else "colour (RGB)"
        raise ValueError(f"{path}: a {kind} volume; expected one number a voxel, so save it as grey values")
    if min(shape, default=0) < 1:
        raise ValueError(f"{path}: zero-size volume of shape {shape}; expected voxels along three axes")
    if len(shape) != 3 and (len(shape) != 4 or shape[3] != 1):
        raise ValueError(f"{path}: {len(shape)}D, of shape {shape}; expected one 3D volume in a file")
    if (missing := _missing_bytes(path, image)) is not None:
        raise ValueError(f"{path}: cut short or damaged, {missing}; copy or download it again")
    return image


def check_checksum(path: str | os.PathLike) -> None:
    """Raise ValueError, naming the file, if one that ends in .gz does not unpack to its end, where its checksum is.

    nibabel stops after the last voxel, before the checksum, so that changed bytes would go unnoticed.
    """
    if not os.fspath(path).endswith(".gz"):
        return
    try:
        with gzip.open(path) as unpacked:
            while unpacked.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cut short or damaged ({error}); copy or download it again") from error


def check_voxel_size(image: SpatialImage) -> None:
    """Raise ValueError, naming the file, if the affine gives no voxel size or no three directions in space."""
    path, affine = image.get_filename(), image.affine
    size = voxel_size(image)
    if not image.header["sform_code"]:  # nibabel replaces 0 by 1 mm; only the file itself has the 0
        kind = type(image.header)
        with ImageOpener(path) as file:
            stored = kind(file.read(kind.sizeof_hdr), check=False)["pixdim"][1:4].tolist()
        size = tuple(0.0 if s == 0 else v for s, v in zip(stored, size, strict=True))
    if not np.isfinite(affine).all() or min(size) <= 0:
        shown = ", ".join(f"{v:g}" for v in size)
        raise ValueError(f"{path}: voxel size ({shown}) mm in its header; expected numbers above 0")
    if abs(np.linalg.det(affine[:3, :3] / size)) < 1e-3:
        raise ValueError(f"{path}: the axes in its affine are not independent; expected three directions in space")


def _missing_bytes(path: str | os.PathLike, image: SpatialImage) -> str | None:
    """Say how many bytes of header and voxels are there, if not all are."""
    expected = int(image.dataobj.offset) + prod(image.shape) * image.get_data_dtype().itemsize
    found = os.path.getsize(path)
    if str(path).endswith(".gz"):
        # The last four bytes are the length of what was compressed. Where they differ, the file is cut short or has
        # several gzip members, and must be unpacked.
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            if int.from_bytes(file.read(), "little") == expected % 2**32:
                return None
        found = 0
        try:
            with gzip.open(path) as unpacked:
                while chunk := unpacked.read(1 << 20):
                    found += len(chunk)
        except (EOFError, OSError, zlib.error) as error:
            return f"{found} of {expected} bytes can be unpacked ({error})"
    return None if found >= expected else f"{found} of {expected} bytes are there"


def voxel_size(image: SpatialImage) -> tuple[float, ...]:
    """Voxel size in mm along the array's three axes, as the affine has it."""
    return tuple(np.sqrt((image.affine[:3, :3] ** 2).sum(axis=0)).tolist())


def check_same_grid(image: SpatialImage, label: SpatialImage) -> None:
    """Raise ValueError, naming both files, if a label is not on its image's grid."""
    name, label_name = image.get_filename(), label.get_filename()
    shape, label_shape = image.shape[:3], label.shape[:3]
    if shape != label_shape:
        raise ValueError(f"{label_name}: shape {label_shape}, but its image {name} has shape {shape}")
    if (how := grid_difference(image, label)) is not None:
        raise ValueError(f"{label_name}: its affine differs from that of {name} {how}; both must lie on the same grid")


def grid_difference(image: SpatialImage, label: SpatialImage) -> str | None:
    """Say how the affine of a label of the same shape differs from the image's, if it does by a tenth of a voxel."""
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in image.shape[:3]))])
    off = np.linalg.norm((corners @ (image.affine - label.affine).T)[:, :3], axis=1).max()
    size, label_size = voxel_size(image), voxel_size(label)
    if off <= 0.1 * min(size) and np.allclose(size, label_size, rtol=0.1):
        return None
    if np.allclose(size, label_size, rtol=1e-3):
        return f"by up to {off:.3g} mm"
    return "in its spacing, {} instead of {} mm".format(*(tuple(round(v, 4) for v in s) for s in (label_size, size)))
