"""What is written into headers of DICOM files about a patient reaches nothing but DICOM results."""

from __future__ import annotations

import gzip
import logging

import pytest
from pydicom import dcmread
from pydicom.datadict import DicomDictionary

from tests.makers.dicom import make_archive
from tests.support.bundle_runs import BASE, ROOT, infer, run
from vdt_workflows.preparation.lidc_scans import prepare_lidc
from vdt_workflows.preparation.patients import key_of
from vdt_workflows.report.run_page import report_run

PLANTED, DATE = "PLANTED^NAME", "19710203"
TEXTS = ("AE", "LO", "LT", "PN", "SH", "ST", "UC", "UT")
UIDS = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}


def plant(file):
    """Write a name into every element of text that a header may have, and a date into those of dates."""
    dataset = dcmread(file)
    for group, (kind, many, _, retired, keyword) in ((tag >> 16, found) for tag, found in DicomDictionary.items()):
        if retired or group not in (0x8, 0x10, 0x12, 0x18, 0x20, 0x32, 0x38, 0x40) or not many.startswith("1"):
            continue
        if kind in TEXTS and keyword not in dataset:
            setattr(dataset, keyword, PLANTED)
        elif kind in ("DA", "DT"):
            setattr(dataset, keyword, DATE)
    dataset.PatientID = f"{PLANTED}{dataset.PatientID[-2:]}"
    for keyword, value in UIDS.items():
        setattr(dataset, keyword, value)
    dataset.save_as(file)


def find_planted(folder, *but):
    """Name the files below a folder that hold the name or the date, or are named so."""
    found = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and not {file, *file.parents} & {*but}):
        data = file.read_bytes()
        data = gzip.decompress(data) if file.name.endswith(".gz") else data
        texts = [text.encode(code) for text in ("PLANTED", DATE) for code in ("utf-8", "utf-16-le")]
        found += [file.name] if any(text in data for text in texts) or "PLANTED" in file.name else []
    return found


@pytest.mark.slow
def test_a_name_in_all_fields_of_the_headers_is_found_in_dicom_results_alone(tmp_path, capfd, caplog):
    pytest.importorskip("highdicom")
    caplog.set_level(logging.DEBUG)
    archive = make_archive(tmp_path / "dicom", 8, slices=12, size=32)
    for scan in archive.scans:
        for file in scan.files:
            plant(file)
    bundle, data = ROOT / "bundles" / "lidc_nodule_segmentation", tmp_path / "lidc"
    xml = archive.write_xml(tmp_path / "xml")
    prepare_lidc(str(archive.root), str(data), annotations=str(xml), size=24, workers=1)
    run(bundle, BASE, tmp_path / "run", data, epochs=1, steps_per_epoch=1, cache="disk", num_workers=0)
    infer(bundle, tmp_path / "run" / "models", tmp_path / "run", archive.scans[0].folder, output_format="dicom_seg")
    report_run(str(tmp_path / "run"), volumes=0)
    result = tmp_path / "run" / "eval" / "series_seg.dcm"
    assert find_planted(tmp_path, archive.root, key_of(data), result) == []
    assert find_planted(result.parent) == ["series_seg.dcm"]
    assert dcmread(result).PatientID.startswith(PLANTED)
    said = "".join([*capfd.readouterr(), caplog.text])
    assert "PLANTED" not in said
    assert DATE not in said
