"""Where users say nodules are, and what they get for saying it wrongly."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from tests.makers.dicom import write_series
from tests.makers.volumes import make_affine, write_volume
from vdt_transforms.dicom_folders import find_one_series
from vdt_workflows.data.nodule_tables import list_nodules

AFFINE = make_affine((-0.7, -0.7, 2.0), (100.0, 90.0, -300.0))


@pytest.fixture
def scan(tmp_path):
    return write_volume(tmp_path / "ct.nii.gz", shape=(30, 30, 10), affine=AFFINE)


def table(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x_mm,y_mm,z_mm\n1,2.5,-3\n", [{"nodule_id": "1", "position": [1, 2.5, -3]}]),
        ("seriesuid,coordX,coordY,coordZ\nct,1,2,3\n", [{"nodule_id": "1", "position": [-1, -2, 3]}]),
        ("column,row,slice\n4,5.5,6\n", [{"nodule_id": "1", "voxel": [4, 5.5, 6]}]),
        ("id,slice,row,column,note\nn7,6,5,4,x\n", [{"nodule_id": "n7", "voxel": [4, 5, 6]}]),
        ("nodule_id,column,row,slice,x_mm,y_mm,z_mm\na,4,5,6,1,2,3\n", [{"nodule_id": "a", "position": [1, 2, 3]}]),
    ],
)  # fmt: skip
def test_a_table_gives_places_in_mm_or_voxels(scan, tmp_path, text, expected):
    items = list_nodules(scan, table(tmp_path / "p.csv", text))
    assert items == [{"image": str(scan), "nodules": expected}]


def test_a_mask_gives_the_middle_of_each_connected_part_in_the_world(scan, tmp_path):
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    mask[5, 5, 5] = 2  # touches the first at a corner
    mask[10:14, 12, 15] = 1
    affine = make_affine((-1.0, 1.0, 1.5), (3.0, 4.0, 5.0))
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "mask.nii.gz")
    (item,) = list_nodules(scan, tmp_path / "mask.nii.gz")
    assert [nodule["nodule_id"] for nodule in item["nodules"]] == ["1", "2"]
    np.testing.assert_allclose(item["nodules"][1]["position"], [3 - 11.5, 4 + 12, 5 + 1.5 * 15])


def test_crops_need_no_positions(tmp_path):
    for name in ("b.nii.gz", "a.npz", "c.txt"):
        (write_volume(tmp_path / name) if name.endswith("nii.gz") else (tmp_path / name).touch())
    assert list_nodules(tmp_path) == [{"image": str(tmp_path / name)} for name in ("a.npz", "b.nii.gz")]
    assert list_nodules(tmp_path / "a.npz") == [{"image": str(tmp_path / "a.npz")}]
    prepared = write_volume(tmp_path / "prepared" / "images" / "n.nii.gz")
    assert list_nodules(tmp_path / "prepared") == [{"image": str(prepared)}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "x_mm,y_mm,z_mm,id\n1,2,3,n1\n4,5,6,n1\n",
            "positions .*: n1 listed more than once; expected one row a nodule",
        ),
        ("x,y,z\n1,2,3\n", r"columns are x, y, z; expected x_mm, y_mm, z_mm \(RAS\), coordX, .* or column, row, slice"),
        ("", "lists no nodules"),
        ("x_mm,y_mm,z_mm\n", "lists no nodules"),
        (b"\xff\xfe\x00", "not a CSV file of text"),
        ("x_mm,y_mm,z_mm\n1,2\n", "line 2: 2 values for 3 columns"),
        ("x_mm,y_mm,z_mm\n1,2,3\n1,here,3\n", "line 3: y_mm is 'here'; expected a number"),
        ("x_mm,y_mm,z_mm\n1,nan,3\n", "line 2: y_mm is 'nan'"),
    ],
)
def test_a_wrong_table_is_refused_in_one_sentence(scan, tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        list_nodules(scan, table(tmp_path / "p.csv", text))
    assert "p.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_mask_is_refused(scan, tmp_path):
    empty = write_volume(tmp_path / "empty.nii.gz", np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="a mask without any voxel above 0; expected nodules in it"):
        list_nodules(scan, empty)
    flat = write_volume(tmp_path / "flat.nii.gz", np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"flat\.nii\.gz: 2D, of shape \(3, 3\); expected one 3D volume"):
        list_nodules(scan, flat)
    (tmp_path / "cut.nii.gz").write_bytes(empty.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut\.nii\.gz: not a readable NIfTI volume"):
        list_nodules(scan, tmp_path / "cut.nii.gz")
    changed = write_volume(tmp_path / "changed.nii.gz", shape=(40, 40, 40))
    content = changed.read_bytes()
    changed.write_bytes(content[:-8] + bytes(4) + content[-4:])  # another checksum
    with pytest.raises(ValueError, match=r"changed\.nii\.gz: cut short or damaged"):
        list_nodules(scan, changed)


def test_what_is_not_there_is_named(scan, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.nii\.gz: no such file or folder"):
        list_nodules(tmp_path / "absent.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"positions .*absent\.csv: no such file"):
        list_nodules(scan, tmp_path / "absent.csv")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1.dcm").touch()
    with pytest.raises(FileNotFoundError, match="if it is a scan's DICOM folder, give positions"):
        list_nodules(tmp_path / "dicom")


def test_a_whole_scan_without_positions_is_refused(tmp_path):
    scan = write_volume(tmp_path / "ct.nii.gz", shape=(300, 300, 100), affine=AFFINE, dtype=np.int16)
    with pytest.raises(ValueError, match=r"a whole scan \(210 x 210 x 200 mm\); give positions"):
        list_nodules(scan)
    (tmp_path / "broken.nii.gz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.nii\.gz: not a readable NIfTI volume"):
        list_nodules(tmp_path / "broken.nii.gz")


@pytest.mark.parametrize(
    "text",
    [
        b"nodule_id;x_mm;y_mm;z_mm\n1;0,5;0;-10\n",
        "nodule_id\tx_mm\ty_mm\tz_mm\r\n1\t0.5\t0\t-10\r\n".encode("utf-16"),
        "nodule_id, x_mm, y_mm, z_mm\n1, 0.5, 0, -10\n".encode("utf-8-sig"),
    ],
    ids=["semicolons", "UTF-16-tabs", "blanks"],
)
def test_tables_of_spreadsheets_are_read(scan, tmp_path, text):
    [item] = list_nodules(scan, table(tmp_path / "p.csv", text))
    assert item["nodules"] == [{"nodule_id": "1", "position": [0.5, 0, -10]}]


def test_rows_of_other_scans_are_counted_and_never_scored(scan, tmp_path, caplog):
    rows = "seriesuid,coordX,coordY,coordZ\n1.2.OTHER,0,0,0\nct,1,2,3\n1.2.THIRD,4,5,6\n"
    [item] = list_nodules(scan, table(tmp_path / "p.csv", rows))
    assert item["nodules"] == [{"nodule_id": "2", "position": [-1, -2, 3]}]
    assert "p.csv: 1 used, 2 left out; 2 of other scans (1.2.OTHER, 1.2.THIRD)" in caplog.text
    with pytest.raises(ValueError, match=r"its seriesuid names 1\.2\.OTHER, 1\.2\.THIRD and never this scan, ct,"):
        list_nodules(scan, table(tmp_path / "p.csv", rows.replace("ct,", "1.2.OTHER,")))


def test_rows_of_a_dicom_series_are_told_by_its_uid(tmp_path):
    write_series(tmp_path / "scan")
    uid = find_one_series(tmp_path / "scan").uid
    rows = f"SeriesInstanceUID,x_mm,y_mm,z_mm\n1.2.3,0,0,0\n{uid},1,2,3\n"
    [item] = list_nodules(tmp_path / "scan", table(tmp_path / "p.csv", rows))
    assert [nodule["position"] for nodule in item["nodules"]] == [[1, 2, 3]]
