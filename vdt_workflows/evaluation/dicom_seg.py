"""Label maps as DICOM SEG objects that refer to the series they were made from."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from vdt_transforms.dicom_folders import find_one_series
from vdt_transforms.dicom_headers import open_dicom
from vdt_transforms.dicom_series import DicomSeries
from vdt_transforms.grids import align_grids
from vdt_workflows.drawing import colour
from vdt_workflows.errors import check_choice
from vdt_workflows.files import write_atomic
from vdt_workflows.naming import result_name

logger = logging.getLogger(__name__)

STRUCTURES = (  # SNOMED CT concepts, which pydicom calls by these words in capitals, such as InferiorVenaCava
    *("spleen", "kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "inferior vena cava", "portal vein"),
    *("splenic vein", "pancreas", "adrenal gland", "lung", "hippocampus"),
)
FINDINGS = {"nodule": "Nodule", "tumor": "Neoplasm", "lesion": "Lesion", "mass": "Mass"}
SPELLINGS = {"oesophagus": "esophagus", "tumour": "tumor"}
SIDES = ("right", "left")
OWN_SCHEME = "99VDT"  # DICOM's prefix for a private coding scheme
# What of the source's headers comes into the result; patient's name, birth date, sex and all else do not.
COPIED = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
GEOMETRY = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "InstanceNumber"),
)
EMPTY = (
    *("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
    "ReferringPhysicianName",
)


def writes_dicom(output_format: str, formats: Sequence[str] = ("nifti", "dicom_seg")) -> bool:
    """Say whether an inference's `output_format` asks for the second of two formats, DICOM beside the first.

    Raises:
        ValueError: if it is neither of them.
        ImportError: if highdicom is missing, where it asks for DICOM.
    """
    check_choice("output_format", output_format, formats)
    if output_format == formats[1]:
        import_highdicom()
    return output_format == formats[1]


class SaveDicomSegd(MapTransform):
    """Write the label map of a DICOM series as a binary DICOM SEG, `<folder>_seg.dcm`.

    Each label but the background is a segment, in the colour of previews and pages. Each frame lies on one image of the
    series, in that image's rows and columns, and refers to it; frames without the label are left out, unless all are.
    Names that are known get their SNOMED CT code ("right kidney": Kidney, with the modifier Right), others one of a
    private scheme, 99VDT.

    Of the source's headers the patient's id, the study's uid and the frame of reference are copied, and the images'
    uids and geometry are referred to. Names, dates of birth, dates, institutions and all else are not.

    Args:
        keys: label maps (1, X, Y, Z) on the grid of the series, as `vdt_transforms.RestoreGridd` gives them.
        output_dir: where the file goes.
        label_names: by label value; the first is the background.
        algorithm: what made the labels, as the file names it.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ImportError: if highdicom is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | os.PathLike,
        label_names: Sequence[str],
        algorithm: str = "vdt-bundles",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        import_highdicom()
        self.output_dir = Path(output_dir)
        self.label_names = list(label_names)
        self.algorithm = algorithm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each label map, and give the data as they are.

        Raises:
            ValueError: naming the source, if it is no DICOM series, lacks an identifier, or has another grid.
        """
        for key in self.key_iterator(data):
            labels = data[key]
            source = Path(str(labels.meta["filename_or_obj"]))
            series = find_source(source, "a DICOM SEG", "nifti")
            frames = place_on_slices(np.asarray(labels[0].cpu()), np.asarray(labels.affine, float), series)
            path = self.output_dir / f"{result_name(source)}_seg.dcm"
            write_atomic(path, make_segmentation(frames, series, self.label_names, self.algorithm))
            logger.info("%s: written as %s", source, path)
        return dict(data)


def find_source(source: Path, kind: str, other: str) -> DicomSeries:
    """Find the series whose images a DICOM result refers to.

    Args:
        source: what was read.
        kind: of the result, for the error.
        other: the output format that needs no series, for the error.

    Raises:
        ValueError: naming the source, if it is no DICOM series, or one that cannot be used.
    """
    if re.search(r"\.(nii|nii\.gz|npz|nrrd|nhdr|mha|mhd)$", source.name, re.IGNORECASE):
        raise ValueError(f"{source}: no DICOM series, whose images {kind} must refer to; use output_format: {other}")
    series = find_one_series(source)
    series.check(irregular=True)  # which the reader refuses unless it is asked not to
    return series


def place_on_slices(labels: np.ndarray, affine: np.ndarray, series: DicomSeries) -> np.ndarray:
    """Labels (X, Y, Z) with their affine to RAS mm -> (slices, rows, columns), in the order of the series' files.

    Raises:
        ValueError: naming the folder, if the voxels do not lie on the pixels of the images.
    """
    size = (series.columns, series.rows, len(series.files))
    try:
        axes, positions = align_grids(affine, series.affine, size, tolerance=0.1)
        voxels = [places.round().astype(int) for places in positions]
        for axis, places, nearest in zip(axes, positions, voxels, strict=True):
            if np.abs(places - nearest).max() > 0.1 or sorted(nearest) != list(range(labels.shape[axis])):
                raise ValueError("voxels and pixels do not coincide")
    except ValueError as error:
        raise ValueError(
            f"{series.folder}: the labels do not lie on the pixels of its {len(series.files)} images of"
            f" {series.rows} x {series.columns} ({error})"
        ) from error
    return labels.transpose(axes)[np.ix_(*voxels)].transpose(2, 1, 0)


def make_segmentation(frames: np.ndarray, series: DicomSeries, label_names: Sequence[str], algorithm: str) -> bytes:
    """Give the bytes of a DICOM SEG of labels (slices, rows, columns) that lie on the images of a series.

    Raises:
        ImportError: if highdicom is missing.
        ValueError: naming a file without PatientID, StudyInstanceUID or FrameOfReferenceUID.
    """
    highdicom = import_highdicom()
    version = installed_version()
    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, version=version, family=codes.DCM.ArtificialIntelligence
    )
    segments = []
    for number, name in enumerate(label_names[1:], 1):
        category, kind, side = code_label(name)
        segment = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type="AUTOMATIC",
            algorithm_identification=identification,
            display_color=highdicom.color.CIELabColor.from_rgb(*colour(number)),
        )
        if side is not None:
            modifier = highdicom.sr.CodedConcept.from_code(side)
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        segments.append(segment)
    segmentation = highdicom.seg.Segmentation(
        source_images=[source_header(file) for file in series.files],
        pixel_array=frames.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=100,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="vdt-bundles",
        manufacturer_model_name=algorithm,
        software_versions=version,
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=algorithm[:64],
        series_description=f"{algorithm} segmentation"[:64],
    )
    return to_bytes(segmentation)


def to_bytes(dataset: Dataset) -> bytes:
    """Give a data set as the bytes of a DICOM file."""
    content = io.BytesIO()
    dataset.save_as(content)
    return content.getvalue()


def code_label(name: str) -> tuple[Code, Code, Code | None]:
    """Give the category, the type, and the side of a label by its name, as coded concepts."""
    words = [SPELLINGS.get(word, word) for word in name.lower().replace("_", " ").split()]
    side = next((word for word in words if word in SIDES), None)
    plain = " ".join(word for word in words if word not in SIDES)
    modifier = getattr(codes.SCT, side.title()) if side else None
    if plain in STRUCTURES:
        return codes.SCT.AnatomicalStructure, getattr(codes.SCT, plain.title().replace(" ", "")), modifier
    if words and words[-1] in FINDINGS:  # a liver tumor is a tumor
        return codes.SCT.MorphologicallyAbnormalStructure, getattr(codes.SCT, FINDINGS[words[-1]]), modifier
    own = Code("_".join(words)[:16].upper(), OWN_SCHEME, name[:64])
    return codes.SCT.AnatomicalStructure, own, None


def import_highdicom() -> Any:
    """Import highdicom, or say how to get it."""
    try:
        import highdicom
        import highdicom.seg
        import highdicom.sr
    except ImportError as error:
        message = "DICOM output needs highdicom; install it with: pip install highdicom (the extra [dicom] has it)"
        raise ImportError(message) from error
    return highdicom


def installed_version() -> str:
    """Give the version of this package, as DICOM results name it."""
    try:
        return metadata.version("vdt-bundles")
    except metadata.PackageNotFoundError:  # the code came with a packaged bundle
        return "unknown"


def source_header(file: Path) -> Dataset:
    """Read of an image's header what its results refer to, and nothing else.

    Raises:
        ValueError: naming the file, if it has no PatientID, StudyInstanceUID or FrameOfReferenceUID.
    """
    with open_dicom(file) as content:
        full = dcmread(content, stop_before_pixels=True)
    header = Dataset()
    for name in COPIED:
        if not full.get(name):
            raise ValueError(f"{file}: has no {name}, which a DICOM result of it must have")
    for name in (*COPIED, *GEOMETRY):
        if name in full:
            setattr(header, name, full[name].value)
    for name in EMPTY:
        setattr(header, name, None)
    header.file_meta = full.file_meta
    return header
