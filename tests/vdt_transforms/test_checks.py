import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from pydicom.uid import CTImageStorage, MRImageStorage

from tests.makers.dicom import write_series
from tests.makers.volumes import write_volume
from vdt_transforms import CheckFinite, CheckLabels, CheckOverflow, VolumeReader

KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(torch.from_numpy, id="torch")]


def named(values):
    return MetaTensor(torch.as_tensor(values), meta={"filename_or_obj": "case7.nii.gz"})


def test_a_voxel_that_is_not_finite_is_refused_with_its_file_and_place(tmp_path):
    values = np.zeros((4, 5, 6))
    values[1, 2, 3], values[3, 0, 0] = np.nan, -np.inf
    file = write_volume(tmp_path / "ct.nii.gz", values)
    volume = LoadImage(image_only=True, ensure_channel_first=True)(file)
    with pytest.raises(ValueError, match=r"ct\.nii\.gz: 2 voxels are NaN or infinite, the first at \(1, 2, 3\)"):
        CheckFinite()(volume)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_both_infinities_are_refused_without_metadata_too(kind, value):
    with pytest.raises(ValueError, match=r"^volume: 1 voxels are NaN or infinite"):
        CheckFinite()(kind(np.array([[[[0.0, value]]]])))


DTYPES = ["bool", "uint8", "int16", "uint16", "uint32", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_good_volumes_pass_as_the_same_object(kind, dtype):
    volume = kind(np.arange(8).reshape(1, 2, 2, 2).astype(dtype))
    assert CheckFinite()(volume) is volume
    assert CheckLabels(8)(volume) is volume


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0, 1, 3], "3"), ([0, -1], "-1"), ([0, 0.5, 1.0], "0.5"), ([1.0, float("nan")], "nan"), ([7, 255], "7, 255")],
)
def test_labels_out_of_range_are_refused_with_the_file_the_values_and_the_range(values, shown):
    message = rf"^case7\.nii\.gz: label values {shown} are out of range; expected whole numbers from 0 to 2, .* 3 label"
    with pytest.raises(ValueError, match=message):
        CheckLabels(3)(named(values).reshape(1, 1, 1, -1))


def test_of_many_wrong_labels_five_are_shown():
    with pytest.raises(ValueError, match="label values 2, 3, 4, 5, 6 are out of range"):
        CheckLabels(2)(torch.arange(300).reshape(1, 10, 10, 3))


@pytest.mark.parametrize(
    ("values", "shown"), [([-1024, 64512], "-1024 to 64512"), ([-40000, 0], "-40000 to 0"), ([0, 1e9], r"0 to 1e\+09")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_intensities_that_no_int16_holds_are_refused_with_the_file_and_their_range(kind, values, shown):
    volume = np.array(values, np.float32).reshape(1, 1, 1, 2)
    with pytest.raises(ValueError, match=rf"^volume: intensities from {shown} do not fit 16-bit signed integers"):
        CheckOverflow()(kind(volume))
    with pytest.raises(ValueError, match=rf"^case7\.nii\.gz: intensities from {shown} do not fit"):
        CheckOverflow()(named(volume))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_range_of_int16_passes_as_the_same_object(kind):
    volume = kind(np.array([-32768.0, 32767.0]).reshape(1, 1, 1, 2))
    assert CheckOverflow()(volume) is volume


@pytest.mark.parametrize(("least", "warned"), [(0, True), (-1, False)])
def test_a_volume_without_negative_values_is_warned_of_by_name(caplog, least, warned):
    volume = named(np.array([[[[least, 255.0]]]]))
    assert CheckOverflow()(volume) is volume
    words = ["case7.nii.gz: no voxel is below 0 (0 to 255), where HU have air at -1000 and fat at -100"]
    assert [text.split(";")[0] for text in caplog.messages] == (words if warned else [])


@pytest.mark.parametrize("found", ["CT", "MR"])
@pytest.mark.parametrize("expected", ["CT", "ct", "MR", "T2", "unknown"])
def test_a_series_of_another_modality_than_the_networks_is_refused(tmp_path, found, expected):
    storage = {"CT": CTImageStorage, "MR": MRImageStorage}[found]
    write_series(tmp_path / "study", Modality=found, SOPClassUID=storage)
    volume = LoadImage(reader=VolumeReader, image_only=True)(tmp_path / "study")[None]
    if expected == "unknown" or (found == "CT") == (expected.upper() == "CT"):
        assert CheckOverflow(expected)(volume) is volume
        return
    with pytest.raises(
        ValueError,
        match=rf"study: its modality is {found}, and the network is made for {expected.replace('ct', 'CT')};",
    ):
        CheckOverflow(expected)(volume)


@pytest.mark.parametrize(("modality", "least", "warned"), [("MR", -500, True), ("MR", -499, False), ("T1", -1e6, True)])
def test_a_volume_with_air_of_ct_is_warned_of_where_no_ct_is_expected(caplog, modality, least, warned):
    volume = named(np.array([[[[least, 1e6]]]]))
    assert CheckOverflow(modality)(volume) is volume
    words = [
        f"case7.nii.gz: voxels down to {least:g}, as the air of a CT in HU, and the network is made for {modality}"
    ]
    assert [text.split(";")[0] for text in caplog.messages] == (words if warned else [])
    caplog.clear()
    assert CheckOverflow("unknown")(volume) is volume
    assert not caplog.messages


@pytest.mark.parametrize("stored", [0.99999994, 1.0009])
def test_labels_off_by_a_rounding_error_are_rounded_and_others_refused(stored):
    labels = torch.tensor([[[[0.0, stored, 2.0]]]])
    np.testing.assert_array_equal(CheckLabels(3)(labels), [[[[0, 1, 2]]]])
    with pytest.raises(ValueError, match=r"label values 1\.002 are out of range"):
        CheckLabels(3)(torch.tensor([[[[0.0, 1.002]]]]))
