"""Folders of DICOM series and DICOMweb stores as what MONAI Label labels."""

import io
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from scipy.ndimage import gaussian_filter

from tests.makers.dicom import write_series
from tests.support.bundle_runs import ROOT, infer
from tests.support.label_server import PYTHON, ask, free_port, predict, running, serving
from vdt_transforms.dicom_folders import find_one_series
from vdt_workflows.packaging.label_studies import find_studies
from vdt_workflows.packaging.package import package_bundle
from vdt_workflows.packaging.serve import add_refusal

NAME = "bcv_multiorgan_segmentation"
PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"  # where Debian's orthanc-dicomweb puts it
UIDS = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}

# What is served ----------------------------------------------------------------------------------------------------


def test_each_dicom_series_becomes_a_volume_once_on_its_own_grid(tmp_path):
    write_series(tmp_path / "dicom" / "a", name="a", orientation=(0.8, 0.6, 0.0, -0.36, 0.48, 0.8))
    write_series(tmp_path / "dicom" / "b", name="b", seed=1)
    folder = Path(find_studies(str(tmp_path / "dicom"), tmp_path / "app", ""))
    assert folder.is_absolute()
    for name in "ab":
        series = find_one_series(tmp_path / "dicom" / name)
        volume = nib.load(folder / f"{series.uid}.nii.gz")
        np.testing.assert_array_equal(np.asarray(volume.dataobj), series.read())
        np.testing.assert_allclose(volume.affine, series.affine, atol=1e-4)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "labels").mkdir()
    assert len(written) == 2
    assert find_studies(str(tmp_path / "dicom"), tmp_path / "app", "") == str(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*.nii.gz")} == written


def test_series_of_another_folder_are_not_served_beside_them(tmp_path):
    for patient in ("P-1", "P-2"):
        write_series(tmp_path / patient / "ct", patient=patient)
    folders = [find_studies(str(tmp_path / patient), tmp_path / "app", "") for patient in ("P-1", "P-2")]
    assert [len(os.listdir(folder)) for folder in folders] == [1, 1]


def test_a_series_with_a_gap_is_left_out_and_named_and_refused_where_it_is_the_only_one(tmp_path, caplog):
    write_series(tmp_path / "dicom" / "gap", name="gap", places=np.array([0, 2.5, 7.5, 10]))
    with pytest.raises(ValueError, match=r"dicom: none of its 1 DICOM series can be served; the first: .*gap"):
        find_studies(str(tmp_path / "dicom"), tmp_path / "app", "")
    write_series(tmp_path / "dicom" / "whole", name="whole")
    assert len(os.listdir(find_studies(str(tmp_path / "dicom"), tmp_path / "app", ""))) == 1
    assert "gap" in caplog.text
    assert "left out" in caplog.text


def test_a_folder_of_volumes_is_served_as_it_is_and_not_with_dicom_in_it(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), tmp_path / "case.nii.gz")
    assert find_studies(str(tmp_path), tmp_path / "app", "") == str(tmp_path)
    write_series(tmp_path / "ct")
    with pytest.raises(ValueError, match=r"holds 1 volumes, such as case\.nii\.gz, and 1 DICOM series; serve them"):
        find_studies(str(tmp_path), tmp_path / "app", "")


def test_an_empty_folder_is_served_since_a_viewer_may_send_volumes(tmp_path, caplog):
    assert find_studies(str(tmp_path), tmp_path / "app", "") == str(tmp_path)
    assert "no volume" in caplog.text


def test_a_dicomweb_address_needs_the_program_that_writes_dicom_seg(tmp_path):
    address = "http://127.0.0.1:8042/dicom-web"
    with pytest.raises(ValueError, match=f"{address}: .*itkimage2segimage.*; install it there with: pip install dcmqi"):
        find_studies(address, tmp_path, str(tmp_path))
    (tmp_path / "itkimage2segimage").touch(mode=0o755)
    assert find_studies(address, tmp_path, str(tmp_path)) == address


def test_the_refusal_is_added_once_and_to_the_app_for_bundles_alone(tmp_path):
    main = tmp_path / "main.py"
    main.write_text("class MyApp(MONAILabelApp):\n    pass\n")
    add_refusal(main)
    added = main.read_text()
    add_refusal(main)
    assert main.read_text() == added
    compile(added, "main.py", "exec")
    main.write_text("class Other:\n    pass\n")
    with pytest.raises(ValueError, match=r"main\.py: not the app of MONAI Label for bundles; name another --app"):
        add_refusal(main)


# With the server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(answering, tmp_path_factory):
    """The zip of a bundle, and a DICOM series, smooth, so that no two parts of a mask are equally large."""
    if not PYTHON:
        pytest.skip("MONAI_LABEL_PYTHON does not name an interpreter that has MONAI Label")
    folder = tmp_path_factory.mktemp("package")
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(20, 22, 15)), 2)
    hu = np.rint(smooth / smooth.std() * 200).astype(int)
    write_series(folder / "dicom" / "ct", hu, spacing=(0.8, 0.7, 2.5), **UIDS)
    return package_bundle(NAME, str(folder), weights=str(answering(ROOT / "bundles" / NAME) / "model.pt"))


def reference(package, answering, folder):
    series = Path(package).parent / "dicom" / "ct"
    infer(ROOT / "bundles" / NAME, answering(ROOT / "bundles" / NAME), folder, series)
    return series, nib.load(folder / "eval" / "ct_seg.nii.gz")


def compare(mask: bytes, ours: nib.Nifti1Image, folder: Path) -> None:
    """Compare a mask with another, also where its axes run the other way."""
    (folder / "served.nii.gz").write_bytes(mask)
    theirs = nib.as_closest_canonical(nib.load(folder / "served.nii.gz"))
    ours = nib.as_closest_canonical(ours)
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
    np.testing.assert_allclose(theirs.affine, ours.affine, atol=1e-4)
    assert len(np.unique(ours.dataobj)) > 1


@pytest.mark.slow
def test_a_served_folder_of_dicom_gives_the_mask_of_the_bundle(package, answering, tmp_path):
    series, ours = reference(package, answering, tmp_path)
    with serving(str(series.parent), [package], tmp_path) as address:
        compare(predict(address, NAME, f"image={find_one_series(series).uid}"), ours, tmp_path)


@pytest.fixture
def store(tmp_path):
    """The address of an empty Orthanc with DICOMweb."""
    if not shutil.which("Orthanc") or not Path(PLUGIN).exists():
        pytest.skip("needs Orthanc (Debian: orthanc, orthanc-dicomweb)")
    settings = {
        "StorageDirectory": str(tmp_path / "db"),
        "IndexDirectory": str(tmp_path / "db"),
        "HttpPort": free_port(),
    }
    settings |= {"DicomServerEnabled": False, "AuthenticationEnabled": False, "Plugins": [PLUGIN]}
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    address = f"http://127.0.0.1:{settings['HttpPort']}"
    with running(["Orthanc", str(tmp_path / "orthanc.json")], f"{address}/system", tmp_path / "orthanc.log"):
        yield address


@pytest.mark.slow
def test_a_dicomweb_store_gives_images_and_takes_labels_as_dicom_seg(package, answering, store, tmp_path):
    segread = pytest.importorskip("highdicom").seg.segread
    series, ours = reference(package, answering, tmp_path)
    for file in series.iterdir():
        ask("-X", "POST", f"{store}/instances", "--data-binary", f"@{file}")
    uid = find_one_series(series).uid
    cache = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(tmp_path / "cache")}
    with serving(f"{store}/dicom-web", [package], tmp_path, **cache) as address:
        compare(predict(address, NAME, f"image={uid}"), ours, tmp_path)
        info = json.dumps({"label_info": [{"name": "a"}, {"name": "b"}]})
        place = f"{address}/datastore/label?image={uid}&tag=final"
        ask("-X", "PUT", place, "-F", f"params={info}", "-F", f"label=@{tmp_path / 'served.nii.gz'}")
    (found,) = json.loads(ask("-X", "POST", f"{store}/tools/find", "-d", json.dumps(
        {"Level": "Instance", "Query": {"Modality": "SEG"}})))  # fmt: skip
    written = segread(io.BytesIO(ask(f"{store}/instances/{found}/file")))
    assert written.StudyInstanceUID == UIDS["StudyInstanceUID"]
    assert [item.SegmentLabel for item in written.SegmentSequence] == ["a", "b"]
    uids = [str(dcmread(file).SOPInstanceUID) for file in find_one_series(series).files]
    frames = written.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), np.asarray(ours.dataobj))
