from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import LoadImaged, SaveImage

from networks import ResNet3DClassifier, load_pretrained, read_checkpoint
from tests.makers.dicom import write_series
from tests.support.bundle_runs import ROOT, run
from vdt_transforms import NoduleReader, SeriesReader
from vdt_transforms.dicom_folders import find_series
from vdt_workflows.data.cache import SeededCacheDataset
from vdt_workflows.data.images import find_images
from vdt_workflows.preparation.public_sets import find_files
from vdt_workflows.training.checkpoints import LoadWeights, ResumeRun, load_weights, read_provenance
from vdt_workflows.training.initialisation import initialise

SECRET = "MUSTERMANN^ERIKA"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


@pytest.fixture
def touched(tmp_path):
    return tmp_path / "code_ran"


def network():
    return ResNet3DClassifier(18, 3, base_channels=4)


READERS = {
    "read_checkpoint": read_checkpoint,
    "load_pretrained": lambda file: load_pretrained(network(), file),
    "load_weights": lambda file: load_weights(network(), file),
    "LoadWeights": lambda file: LoadWeights(network(), str(file))(None),
    "read_provenance": read_provenance,
    "initialise": lambda file: initialise(network(), "vdt", str(file)),
    "ResumeRun": lambda file: ResumeRun(str(file), {}).load(None),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(tmp_path, touched, name, zipped):
    file = tmp_path / "evil.pt"
    if zipped:
        torch.save({"state_dict": Evil(touched), "settings": {}}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Evil(touched)}))
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert touched.exists()  # the file is what it should be
    touched.unlink()
    with pytest.raises(ValueError, match=r"evil\.pt: "):
        READERS[name](file)
    assert not touched.exists()


def evil_array(touched):
    return np.array([Evil(touched)], dtype=object)


@pytest.mark.parametrize("array", ["voxel", "answer1"])
def test_a_nodule_file_runs_no_code(tmp_path, touched, array):
    np.savez(tmp_path / "lidc1_1.npz", **{array: evil_array(touched)})
    with pytest.raises(ValueError, match=r"lidc1_1\.npz: not a readable nodule or scan \(Object arrays"):
        LoadImaged("image", reader=NoduleReader, array=array)({"image": str(tmp_path / "lidc1_1.npz")})
    assert not touched.exists()


def test_an_image_index_runs_no_code(tmp_path, touched):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.jpg").touch()
    np.savez(tmp_path / ".vdt_index.npz", version=evil_array(touched), paths=evil_array(touched))
    assert len(find_images(tmp_path)["train"]) == 2
    assert not touched.exists()


def test_a_prepared_sample_in_the_disk_cache_runs_no_code(tmp_path, touched):
    data = [{"image": 1}]
    made = SeededCacheDataset(data, [dict], cache="disk", cache_dir=tmp_path / "cache", progress=False)
    (kept,) = (tmp_path / "cache").glob("*.pt")
    torch.save({"image": Evil(touched)}, kept)
    with pytest.raises(ValueError, match="changed while in use"):
        made[0]
    assert not touched.exists()


@pytest.mark.parametrize("name", ["../out.nii.gz", "a/../../out.nii.gz", "/etc/out.nii.gz", "..\\out.nii", "C:/o.nii"])
def test_an_archive_whose_names_lead_out_of_it_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "RawData.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match=r"RawData\.zip: its member .* leads out of the archive"):
        find_files([tmp_path / "RawData.zip"])
    assert os.listdir(tmp_path) == ["RawData.zip"]


def test_a_nodule_file_with_a_name_that_leads_out_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "lidc1_1.npz", "w") as archive:
        archive.writestr("../voxel.npy", b"x")
    with pytest.raises(ValueError, match=r"it has the arrays \.\./voxel, not voxel"):
        LoadImaged("image", reader=NoduleReader)({"image": str(tmp_path / "in" / "lidc1_1.npz")})
    assert os.listdir(tmp_path) == ["in"]


def sources():
    return [
        file
        for folder in ("networks", "vdt_transforms", "vdt_workflows", "scripts")
        for file in (ROOT / folder).rglob("*.py")
    ]


UNPACK_PACKAGES = ("check.py", "serve.py")  # which open_package has refused if a name leads out


def test_no_code_of_ours_unpickles_evaluates_or_unpacks_by_name():
    for file in sources():
        text = file.read_text()
        for phrase in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", "extractall("):
            if phrase == "extractall(" and file.name in UNPACK_PACKAGES:
                assert text.count("extractall(") == text.count("with open_package(") == 1
                continue
            assert phrase not in text, f"{file} has {phrase}"
        for line in text.splitlines():
            if "torch.load(" in line:
                assert "weights_only=True" in line, f"{file}: {line.strip()}"


@pytest.fixture
def scan(tmp_path):
    """A DICOM series that names its patient, and a folder that does not."""
    folder = tmp_path / "scan"
    extra = {"PatientName": SECRET, "PatientBirthDate": "19700102", "InstitutionName": "KLINIK NORD"}
    files = write_series(folder, shape=(24, 22, 12), patient="SECRET-ID-77", **extra)
    assert all(word in files[0].read_bytes().decode("latin-1") for word in PRIVATE)
    return folder


PRIVATE = (SECRET, "MUSTERMANN", "19700102", "KLINIK NORD", "SECRET-ID-77")


def private_in(text):
    return [word for word in PRIVATE if word in text]


@pytest.mark.parametrize("reader", [SeriesReader, NoduleReader, None])
def test_what_is_saved_of_a_dicom_scan_has_no_patient(scan, tmp_path, reader):
    kwargs = {} if reader is None else {"reader": reader}
    image = LoadImaged("image", ensure_channel_first=True, **kwargs)({"image": str(scan)})["image"]
    if reader is not None:  # our readers keep the geometry alone
        assert not private_in(repr(image.meta))
    SaveImage(tmp_path / "out", output_postfix="seg", print_log=False)(image)
    (written,) = (tmp_path / "out").rglob("*.nii.gz")
    assert not private_in(gzip.decompress(written.read_bytes()).decode("latin-1") + str(written))


def test_listing_and_its_errors_name_no_patient(scan, caplog):
    caplog.set_level("DEBUG")
    found = find_series(scan, modalities=("CT", "MR"))
    for series in found.series:
        series.check()
    next(scan.glob("*.dcm")).unlink()
    messages = [caplog.text]
    for series in find_series(scan, modalities=("CT", "MR")).series:
        try:
            series.check()
        except ValueError as error:
            messages.append(str(error))
    assert not private_in("".join(messages))


INFERENCE = {
    "bcv_multiorgan_segmentation": {},
    "lidc_nodule_classification": {"positions": "positions.csv"},
    "deeplesion_lesion_detection": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_from_dicom_writes_and_logs_no_patient(name, scan, trained, tmp_path, caplog, capfd):
    caplog.set_level("INFO")
    bundle = ROOT / "bundles" / name
    (tmp_path / "positions.csv").write_text("column,row,slice\n11,12,6\n")
    more = {key: str(tmp_path / value) for key, value in INFERENCE[name].items()}
    folder = trained(bundle)
    weights = next(
        path for path in (folder / "models" / "model.pt", folder / "models" / "model_last.pt") if path.is_file()
    )
    caplog.clear()
    run(
        bundle,
        ["inference"],
        tmp_path,
        scan,
        **{"ckpt_path": str(weights), "args_file": str(folder / "models" / "run.json"), **more},
    )
    written = [file for file in (tmp_path / "eval").rglob("*") if file.is_file()]
    assert written
    for file in written:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert not private_in(content.decode("latin-1") + str(file))
    assert not private_in(caplog.text + "".join(capfd.readouterr()))
