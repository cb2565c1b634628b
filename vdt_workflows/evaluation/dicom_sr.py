"""Lesions and nodules as DICOM Structured Reports that refer to the images that they were found in."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from vdt_transforms.dicom_series import DicomSeries
from vdt_workflows.evaluation.dicom_seg import (
    OWN_SCHEME,
    code_label,
    find_source,
    import_highdicom,
    installed_version,
    source_header,
    to_bytes,
)
from vdt_workflows.files import write_atomic
from vdt_workflows.naming import result_name

logger = logging.getLogger(__name__)

FORMATS = ("json", "dicom_sr")
CERTAINTY, CANCER = codes.DCM.CertaintyOfFinding, codes.DCM.ProbabilityOfCancer
CLASSES = {"benign": codes.SCT.Benign, "malignant": codes.SCT.Malignant}
MALIGNANCY = Code("MALIGNANCY", OWN_SCHEME, "Malignancy")
EXAMINATIONS = {"CT": codes.LN.CTUnspecifiedBodyRegion, "MR": codes.LN.MRIUnspecifiedBodyRegion}
OBSERVER = uuid.uuid5(uuid.NAMESPACE_DNS, "vdt-bundles").int  # one for all reports, as a device has


class Finding(NamedTuple):
    """What was found at a place.

    Attributes:
        name: "lesion 1".
        label: what it is; known names get their SNOMED CT code, see `code_label`.
        score: from 0 to 1.
        places: (2, 3), opposite corners of a box along the voxels of the series, or (1, 3), a point; mm, RAS.
        called: its class, or nothing.
    """

    name: str
    label: str
    score: float
    places: np.ndarray
    called: str = ""


def save_report(
    findings: Sequence[Finding],
    source: str | PathLike,
    folder: str | PathLike,
    *,
    measured: Code = CERTAINTY,
    site: Code | None = None,
    algorithm: str = "vdt-bundles",
) -> Path:
    """Write the findings in a DICOM series as a Comprehensive SR of template 1500, `<name>_sr.dcm`.

    A box becomes a rectangle on each image that it reaches (template 1411), a point lies on the nearest image (1410).
    The score is a measurement in percent. Without findings the report says that there are 0 lesions. The patient's id,
    the study's uid and the frame of reference are copied as `SaveDicomSegd` does, and nothing else about the patient.

    Args:
        findings: in the order of the report.
        source: path of the series, as the readers take it.
        folder: where the file goes.
        measured: what the score is, a coded concept.
        site: where in the body all findings are.
        algorithm: what found them, as the file names it.

    Raises:
        ImportError: if highdicom is missing.
        ValueError: naming the source, if it is no DICOM series, lacks an identifier, or a finding is outside.
    """
    series = find_source(Path(source), "a DICOM SR", FORMATS[0])
    path = Path(folder, f"{result_name(source)}_sr.dcm")
    write_atomic(path, make_report(findings, series, measured, site, algorithm))
    logger.info("%s: written as %s", source, path)
    return path


def make_report(
    findings: Sequence[Finding], series: DicomSeries, measured: Code, site: Code | None, algorithm: str
) -> bytes:
    """Give the bytes of a report on a series, see `save_report`."""
    highdicom = import_highdicom()
    sr = highdicom.sr
    headers = {file: source_header(file) for file in dict.fromkeys(series.files)}
    version = installed_version()
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=highdicom.UID(f"2.25.{OBSERVER}"), name=algorithm, manufacturer_name="vdt-bundles"
    )
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    algorithm_id = sr.AlgorithmIdentification(name=algorithm, version=version)
    groups = []
    for finding in findings:
        regions = [
            sr.ImageRegion(
                graphic_type="POINT" if len(pixels) == 1 else "POLYLINE",
                graphic_data=pixels,
                source_image=_refer(sr, headers[series.files[index]], series.frames[index]),
            )
            for index, pixels in place_on_images(finding, series)
        ]
        score = sr.Measurement(name=measured, value=round(100 * finding.score, 4), unit=codes.UCUM.Percent)
        called = CLASSES.get(finding.called.lower(), Code(finding.called[:16], OWN_SCHEME, finding.called[:64]))
        common: dict[str, Any] = {
            "tracking_identifier": sr.TrackingIdentifier(uid=highdicom.UID(), identifier=finding.name[:64]),
            "finding_type": code_label(finding.label)[1],
            "finding_sites": None if site is None else [sr.FindingSite(anatomic_location=site)],
            "algorithm_id": algorithm_id,
            "measurements": [score],
            "qualitative_evaluations": [sr.QualitativeEvaluation(MALIGNANCY, called)] if finding.called else None,
        }
        if len(finding.places) == 1:
            groups.append(sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=regions[0], **common))
        else:
            groups.append(sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_regions=regions, **common))
    if not findings:
        none = sr.Measurement(name=codes.SCT.NumberOfLesions, value=0, unit=codes.UCUM.NoUnits)
        groups.append(
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(uid=highdicom.UID(), identifier="all lesions"),
                finding_type=codes.SCT.Lesion,
                algorithm_id=algorithm_id,
                measurements=[none],
            )
        )
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=EXAMINATIONS[series.modality],
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    document = sr.ComprehensiveSR(
        evidence=list(headers.values()),
        content=report,
        series_instance_uid=highdicom.UID(),
        series_number=101,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="vdt-bundles",
        is_complete=True,
        series_description=f"{algorithm} findings"[:64],
    )
    return to_bytes(document)


def place_on_images(finding: Finding, series: DicomSeries) -> list[tuple[int, np.ndarray]]:
    """Bring a finding's places to the images of its series.

    Returns:
        Number of the image in the order of the series' files, and points (P, 2) as column and row, where (0, 0) is the
        outer corner of the first pixel, as in DICOM: one, or the five of a closed rectangle.

    Raises:
        ValueError: naming the series' folder, if the finding is outside.
    """
    voxels = apply_affine(np.linalg.inv(series.affine), finding.places)
    low, high = voxels.min(0), voxels.max(0)
    size = np.array([series.columns, series.rows, len(series.files)])
    if (high < -1).any() or (low > size + 0.01).any():  # the detector's boxes end up to a pixel beyond the last centre
        raise ValueError(
            f"{series.folder}: {finding.name} lies outside of its {size[2]} images of {series.rows} x {series.columns}"
        )
    (left, top), (right, bottom) = ((edge[:2] + 0.5).clip(0, size[:2]).round(4) for edge in (low, high))
    first, last = np.ceil(low[2] - 1e-3), np.floor(high[2] + 1e-3)
    if first > last:  # between two images
        first = last = round((low[2] + high[2]) / 2)
    start, stop = (int(index) for index in np.clip((first, last), 0, size[2] - 1))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    points = np.array(corners if len(voxels) > 1 else corners[:1])
    return [(index, points) for index in range(start, stop + 1)]


def _refer(sr: Any, header: Dataset, frame: int | None) -> Any:
    frames = None if frame is None else [frame + 1]
    return sr.SourceImageForRegion(header.SOPClassUID, header.SOPInstanceUID, referenced_frame_numbers=frames)
