"""Volume files and where their voxels lie: the one reading of NIfTI, NRRD and MetaImage that everything here uses.

A NIfTI file says where its voxels lie by its sform, its qform and its pixdim. Programs choose differently between them,
so that a file in which they disagree is refused, unless the user says which form is right.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError, SpatialImage

SUFFIX = re.compile(r"\.(nii(\.gz)?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
GEOMETRIES = ("refuse", "sform", "qform")
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # by NIfTI's code of the unit: unknown, metre, millimetre, micron
SIZES = (1e-3, 100.0)  # mm, of voxels
FIELDS = (  # of a NIfTI header, that say where its voxels lie
    *("sform_code", "qform_code", "xyzt_units", "pixdim", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
NRRD_PLACE = re.compile(rb"^space:\s*(right-anterior|left-anterior|left-posterior|RAS|LAS|LPS)", re.I | re.M)
NRRD_UNITS = re.compile(rb"^space units:(?!(\s*\"mm\")*\s*$).*", re.I | re.M)  # other than mm
META_PLACE = re.compile(rb"^(TransformMatrix|Rotation|Orientation)\s*=", re.M)


def open_volume(path: str | os.PathLike, geometry: str = "refuse", *, placed: bool = True) -> SpatialImage:
    """Open a volume file (NIfTI, NRRD or MetaImage), and check its header and that its voxels are there.

    Args:
        path: the file; what it is, is told by the end of its name, in capitals or not.
        geometry: what says where the voxels of a NIfTI file lie. "refuse" takes the sform where its code is above 0,
            else the qform, and refuses a file in which both codes are 0, or in which sform, qform and pixdim disagree
            by more than rounding explains. "sform" or "qform" takes that form where its code is above 0, or where both
            are 0; and is else as "refuse".
        placed: False leaves out what says where voxels lie, of a file that is given another affine anyway.

    Returns:
        The image as nibabel gives it, its affine in mm (RAS), whatever the unit of the file; its voxels are not read.
        `extra["forms"]` holds the fields of a NIfTI header that say where the voxels lie, as they are in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and what is wrong: if it is no such volume, colour, not 3D, of size zero or cut
            short; if its forms disagree, or give no voxel size or no three directions at right angles.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be 'refuse', 'sform' or 'qform', got {geometry!r}")
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if path.lower().endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        image = _open_itk(path)
        _check_grid(path, image.affine, image.shape[:3])
        return image
    image, stored = _open_nifti(path)
    forms = {name: np.ravel(stored[name]).astype(np.float64) for name in FIELDS}
    affine = image.affine
    if placed:
        affine = _choose_affine(path, stored, image.shape[:3], geometry)
        _check_grid(path, affine, image.shape[:3])
    return type(image)(image.dataobj, affine, image.header, extra={"forms": forms}, file_map=image.file_map)


def voxel_size(image: SpatialImage) -> tuple[float, ...]:
    """Voxel size in mm along the array's three axes, as the affine has it."""
    return tuple(np.linalg.norm(image.affine[:3, :3], axis=0).tolist())


def farthest(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Greatest distance in mm between the places that two affines give to a corner of a volume."""
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())


def read_voxels(image: SpatialImage, *, scaled: bool = True) -> np.ndarray:
    """Read the voxels (X, Y, Z) of an open volume, with the slope and intercept of its header, or as they are stored.

    Raises:
        ValueError: naming the file, if they are damaged.
    """
    try:
        voxels = np.asanyarray(image.dataobj) if scaled else image.dataobj.get_unscaled()
        return np.asanyarray(voxels).reshape(image.shape[:3])
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise whatever they lead to
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{image.get_filename()}: its voxels cannot be read ({reason}); copy or download it again"
        ) from error


def make_meta(affine: np.ndarray, shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """Make the metadata that MONAI's readers give beside a volume (X, Y, Z)."""
    place = {"affine": affine, "original_affine": affine.copy(), "spatial_shape": np.asarray(shape)}
    return {**place, "original_channel_dim": float("nan"), "space": "RAS", **more}


def to_nifti(
    voxels: np.ndarray, affine: np.ndarray, level: int = 6, *, forms: Mapping[str, Any] | None = None
) -> bytes:
    """Make a .nii.gz file of voxels (X, Y, Z).

    Args:
        voxels: of any type that NIfTI has.
        affine: in mm (RAS), for sform and qform, since some programs read one and some the other.
        level: of gzip.
        forms: in its place, those of the file whose grid this is (see `open_volume`), so that every program puts both
            files at one place.
    """
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    content = bytearray(image.to_bytes())  # which makes the header fit the affine
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, values in (forms or {}).items():
        header[name] = np.reshape(np.asarray(values), header[name].shape)
    content[:348] = header.binaryblock
    return gzip.compress(content, level, mtime=0)


# Opening -------------------------------------------------------------------------------------------------------------


def _open_nifti(path: str) -> tuple[SpatialImage, Any]:
    """Open a NIfTI file; also give its header as it is, of which nibabel mends some values."""
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise ValueError(f"it is of nibabel's {type(image).__name__}")
        kind = type(image.header)
        with ImageOpener(path) as file:
            stored = kind(file.read(kind.sizeof_hdr), check=False)
    except PermissionError:
        raise
    except Exception as error:  # broken bytes raise whatever they lead to
        raise ValueError(f"{path}: not a readable NIfTI volume ({error})") from error
    shape, dtype = image.shape, image.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        kind_of_value = "complex" if dtype.kind == "c" else "colour (RGB)"
        raise ValueError(f"{path}: a {kind_of_value} volume; expected one number a voxel, so save it as grey values")
    _check_shape(path, shape)
    if (missing := _missing_bytes(path, int(image.dataobj.offset) + prod(shape) * dtype.itemsize)) is not None:
        raise ValueError(f"{path}: cut short or damaged, {missing}; copy or download it again")
    return image, stored


def _open_itk(path: str) -> SpatialImage:
    """Open a NRRD or MetaImage file, whose header must say where its voxels lie."""
    import SimpleITK

    is_nrrd = path.lower().endswith(("nrrd", "nhdr"))
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 16)
        if not is_nrrd:
            _check_meta(path, text)  # ITK fills in what is missing, and may crash where fields contradict
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = " ".join(str(error).split("ERROR:")[-1].split())
        raise ValueError(f"{path}: not a readable NRRD or MetaImage volume ({reason})") from error
    size, shown = reader.GetSize(), SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    number = re.fullmatch(r"(8|16|32|64)-bit (?:(un)?signed (integer)|float)", shown)
    if number is None:
        raise ValueError(f"{path}: voxels of {shown}; expected one number a voxel, so save it as grey values")
    _check_shape(path, size)
    if not (NRRD_PLACE if is_nrrd else META_PLACE).search(text) or (is_nrrd and NRRD_UNITS.search(text)):
        raise ValueError(
            f"{path}: its header does not say where in the patient its voxels lie, in mm; save it again by 3D Slicer"
            " or ITK, which write " + ("space and space directions" if is_nrrd else "TransformMatrix and Offset")
        )
    affine = np.eye(4)
    directions = np.reshape(reader.GetDirection(), (len(size), len(size)))[:3, :3]
    affine[:3, :3], affine[:3, 3] = directions * reader.GetSpacing()[:3], reader.GetOrigin()[:3]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # from LPS
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine)) > 1e-9:
        raise ValueError(f"{path}: directions and spacing {affine[:3, :3].tolist()} are no grid; save it again")
    header = nib.Nifti1Header()
    header.set_data_shape(size[:3])
    header.set_data_dtype(f"{number[2] or ''}{'int' if number[3] else 'float'}{number[1]}".replace("unint", "uint"))
    image = nib.Nifti1Image(_ItkVoxels(path, size[:3], header.get_data_dtype()), affine, header)
    image.file_map["image"].filename = path
    return image


def _check_meta(path: str, text: bytes) -> None:
    """Refuse a MetaImage header that lacks a field which says what the voxels are, or has a value that cannot be."""
    head, _, _ = text.partition(b"ElementDataFile")
    lines = [line.partition("=") for line in head.decode("latin-1").splitlines()]
    fields = {name.strip(): value.split() for name, _, value in lines}
    axes = len(fields.get("DimSize", ()))
    number, truth = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", "True|False"
    order = next((name for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if name in fields), "byte order")
    packed = fields.get("CompressedData", ["False"]) == ["True"]
    expected: dict[str, tuple[str, int]] = {
        "NDims": (str(axes), 1),
        "DimSize": (r"[1-9]\d*", axes),
        "ElementSpacing": (number, axes),
        "ElementType": ("MET_[A-Z_]+", 1),
        order: (truth, 1),
        **({"CompressedData": (truth, 1)} if "CompressedData" in fields else {}),
        **({"CompressedDataSize": (r"\d+" if packed else "none", 1)} if "CompressedDataSize" in fields else {}),
        **{name: (number, axes**2) for name in ("TransformMatrix", "Rotation", "Orientation") if name in fields},
        **{name: (number, axes) for name in ("Offset", "Position", "Origin") if name in fields},
    }
    for name, (pattern, count) in expected.items():
        values = fields.get(name, [])
        if not axes or len(values) != count or not all(re.fullmatch(pattern, value) for value in values):
            fault = f"{name} is {' '.join(values)!r}"
            raise ValueError(f"{path}: not a readable NRRD or MetaImage volume ({fault}); copy it again")


class _ItkVoxels:
    """Array proxy of nibabel for a file that SimpleITK reads."""

    is_proxy, ndim, slope, inter = True, 3, 1.0, 0.0

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype

    def get_unscaled(self) -> np.ndarray:
        import SimpleITK

        if self.path.lower().endswith(".mha"):  # ITK leaves voxels at random where a stream or its size is damaged
            with open(self.path, "rb") as file:
                head, _, rest = file.read().partition(b"ElementDataFile")
            if re.search(rb"CompressedData\s*=\s*True", head):
                return self._unpack(head, rest.partition(b"\n")[2])
        return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(self.path)).transpose().reshape(self.shape)

    def _unpack(self, head: bytes, packed: bytes) -> np.ndarray:
        kind = self.dtype.newbyteorder(">" if re.search(rb"ByteOrderMSB\s*=\s*True", head) else "<")
        try:
            voxels = np.frombuffer(zlib.decompress(packed), kind)
            return voxels.reshape(self.shape, order="F").astype(self.dtype)
        except (zlib.error, ValueError) as error:
            raise ValueError(f"{self.path}: cut short or damaged ({error}); copy or download it again") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.get_unscaled().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.get_unscaled()[index]


def _check_shape(path: str, shape: tuple[int, ...]) -> None:
    if min(shape, default=0) < 1:
        raise ValueError(f"{path}: zero-size volume of shape {shape}; expected voxels along three axes")
    if len(shape) != 3 and (len(shape) != 4 or shape[3] != 1):
        raise ValueError(f"{path}: {len(shape)}D, of shape {shape}; expected one 3D volume in a file")


def _missing_bytes(path: str, expected: int) -> str | None:
    """Say how many bytes of header and voxels are there, if not all are."""
    found = os.path.getsize(path)
    if path.lower().endswith(".gz"):
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


# Where voxels lie ----------------------------------------------------------------------------------------------------


def _choose_affine(path: str, header: Any, shape: tuple[int, ...], geometry: str) -> np.ndarray:
    """Give the affine in mm of a NIfTI header, which is as it is in the file."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in MILLIMETRES:
        raise ValueError(f"{path}: code {unit} for the unit of length; expected 1 (m), 2 (mm) or 3 (micron)")
    scale = np.diag([*[MILLIMETRES[unit]] * 3, 1.0])
    sform, steps = scale @ header.get_sform(), header["pixdim"][1:4] * MILLIMETRES[unit]
    try:
        qform, fault = scale @ _qform(header), ""
    except (HeaderDataError, ValueError) as error:
        qform, fault = np.full((4, 4), np.nan), f" ({error})"
    known = {"sform": header["sform_code"] > 0, "qform": header["qform_code"] > 0}
    if known.get(geometry) or (geometry != "refuse" and not any(known.values())):
        return sform if geometry == "sform" else qform
    if not any(known.values()):
        forms = {"--geometry sform": sform, "--geometry qform": qform}
        fit = " or ".join(n for n, form in forms.items() if abs(np.linalg.det(form[:3, :3])) > 0) or "no knob"
        where = "that it is not known which side is left nor where its voxels lie"
        raise ValueError(f"{path}: sform and qform have code 0, so {where}; {fit} takes that form as it is")
    if not known["sform"]:
        return qform
    if known["qform"]:
        other = qform
    else:
        with np.errstate(all="ignore"):  # a column of zeros is told of later
            other = np.hstack([sform[:, :3] / np.linalg.norm(sform[:3, :3], axis=0) * steps, sform[:, 3:]])
    size = np.linalg.norm(sform[:3, :3], axis=0)
    off = farthest(sform, other, shape)
    # Quaternions of 32 bits turn by up to 0.04 degrees, and pixdim is often rounded to three digits.
    if np.isfinite(sform).all() and min(size) > 0 and not off <= 0.1 * min(size) + 1e-3 * np.linalg.norm(size * shape):
        what = "qform" + fault if known["qform"] else "pixdim"
        voxels = " and ".join(f"({', '.join(f'{v:.6g}' for v in s)})" for s in (size, steps))
        which = "sform, or --geometry qform the qform" if known["qform"] else "sform"
        raise ValueError(
            f"{path}: its sform and its {what} disagree by up to {off:.3g} mm (voxels of {voxels} mm); --geometry sform"
            f" takes the {which}"
        )
    return sform


def _qform(header: Any) -> np.ndarray:
    fixed = header.copy()
    if fixed["pixdim"][0] == 0:  # NIfTI: the same as 1
        fixed["pixdim"][0] = 1
    return fixed.get_qform()


def _check_grid(path: str, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the file, if an affine gives no voxel size or no three directions at right angles."""
    size = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and SIZES[0] <= min(size) and max(size) <= SIZES[1]):
        shown = ", ".join(f"{v:g}" for v in size)
        raise ValueError(f"{path}: voxel size ({shown}) mm in its header; expected {SIZES[0]:g} to {SIZES[1]:g} mm")
    axes = affine[:3, :3] / size
    if abs(np.linalg.det(axes)) < 1e-3:
        raise ValueError(f"{path}: the axes in its affine are not independent; expected three directions in space")
    upright = np.abs(np.linalg.qr(affine[:3, :3])[1])
    aside = (upright - np.diag(np.diag(upright))) * shape / np.diag(upright)[:, None]
    if aside.max() > 0.25:  # voxels, at the far end
        angle = np.degrees(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(0, 1)))
        raise ValueError(f"{path}: its axes are sheared by {angle:.2g} degrees; resample it to right angles")
