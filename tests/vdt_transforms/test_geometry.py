import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from monai.transforms import LoadImage, Orientation, SaveImage

from tests.makers.volumes import make_affine
from vdt_transforms import RestoreGrid, VolumeReader
from vdt_transforms.geometry import open_volume, read_voxels

SHAPE = (6, 5, 4)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE)
SFORM = np.array([[-2.0, 0, 0, 30], [0, -2, 0, 25], [0, 0, 3, -40], [0, 0, 0, 1]])
QFORM = make_affine(origin=(15, -20, 30)) @ SFORM
METRES, MICRONS = (np.diag([scale, scale, scale, 1]) @ SFORM for scale in (1e-3, 1e3))
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.3)) @ SFORM


def write(path, *, sform=SFORM, qform=SFORM, codes=(1, 1), units=2, pixdim=None, kind=nib.Nifti1Image, voxels=VOXELS):
    """Write a NIfTI file whose forms, codes, unit and pixdim may say what they like."""
    image = kind(voxels, SFORM)
    content = bytearray(image.to_bytes())  # which mends the header
    size = image.header.sizeof_hdr
    header = type(image.header)(bytes(content[:size]), check=False)
    header.set_qform(qform, 1)
    header.set_sform(sform, 1)
    header["sform_code"], header["qform_code"], header["xyzt_units"] = *codes, units
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    content[:size] = header.binaryblock
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


GOOD = {
    "both": ({}, SFORM),
    "sform-alone": ({"qform": np.eye(4), "codes": (1, 0), "pixdim": (2, 2, 3)}, SFORM),
    "qform-alone": ({"sform": np.zeros((4, 4)), "qform": QFORM, "codes": (0, 1)}, QFORM),
    "oblique": ({"sform": OBLIQUE, "qform": OBLIQUE}, OBLIQUE),
    "rounded": ({"sform": SFORM @ np.diag([1.0002, 1, 1, 1])}, SFORM @ np.diag([1.0002, 1, 1, 1])),
    "metre": ({"sform": METRES, "qform": METRES, "units": 1}, SFORM),
    "micron": ({"sform": MICRONS, "qform": MICRONS, "units": 3}, SFORM),
    "NIfTI-2": ({"kind": nib.Nifti2Image}, SFORM),
}


@pytest.mark.parametrize("case", GOOD)
def test_headers_and_voxels_are_read_in_one_way_in_mm(tmp_path, case):
    settings, affine = GOOD[case]
    path = write(tmp_path / "X.NII.GZ", **settings)
    np.testing.assert_allclose(open_volume(path).affine, affine, rtol=1e-5, atol=1e-5)
    image = LoadImage(VolumeReader())(path)
    np.testing.assert_allclose(image.affine, affine, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(image, VOXELS)


BAD = {
    "qform": ({"qform": QFORM}, r"its sform and its qform disagree by up to 39\.1 mm .*; --geometry sform takes the"),
    "pixdim": (
        {"codes": (1, 0), "pixdim": (1, 1, 1)},
        r"sform and its pixdim disagree .* and \(1, 1, 1\) mm",
    ),
    "negative": ({"codes": (1, 0), "pixdim": (-2, 2, 3)}, "sform and its pixdim disagree"),
    "no-code": (
        {"codes": (0, 0)},
        "code 0, so that it is not known which side is left nor where .*; --geometry sform or --geometry qform takes",
    ),
    "no-code-nor-sform": ({"codes": (0, 0), "sform": np.zeros((4, 4))}, "voxels lie; --geometry qform takes that form"),
    "sheared": (
        {"sform": SFORM + np.eye(4, k=1) * [0, 0, 0.5, 0], "codes": (1, 0)},
        "sheared by 9.5 degrees",
    ),
    "unit": ({"units": 5}, r"code 5 for the unit of length; expected 1 \(m\), 2 \(mm\) or 3 \(micron\)"),
    "metres-of-mm": ({"units": 1}, r"voxel size \(2000, 2000, 3000\) mm in its header; expected 0\.001 to 100 mm"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_contradicts_itself_is_refused_by_name(tmp_path, case):
    settings, sentence = BAD[case]
    path = write(tmp_path / "x.nii", **settings)
    for read in (open_volume, LoadImage(VolumeReader())):
        with pytest.raises(ValueError, match=rf"/x\.nii: .*{sentence}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "geometry", "affine"),
    [
        ({"qform": QFORM}, "sform", SFORM),
        ({"qform": QFORM}, "qform", QFORM),
        ({"codes": (1, 0), "pixdim": (1, 1, 1)}, "sform", SFORM),
        ({"qform": QFORM, "codes": (0, 0)}, "sform", SFORM),
        ({"qform": QFORM, "codes": (0, 0)}, "qform", QFORM),
        ({"qform": QFORM, "codes": (1, 0)}, "qform", SFORM),  # a form that says nothing is not taken
    ],
)
def test_a_form_that_is_asked_for_is_taken(tmp_path, settings, geometry, affine):
    path = write(tmp_path / "x.nii.gz", **settings)
    np.testing.assert_allclose(LoadImage(VolumeReader(geometry=geometry))(path).affine, affine, atol=1e-4)


def test_a_form_without_code_is_not_taken_against_pixdim(tmp_path):
    path = write(tmp_path / "x.nii.gz", codes=(1, 0), pixdim=(1, 1, 1))
    with pytest.raises(ValueError, match="sform and its pixdim disagree"):
        open_volume(path, "qform")
    with pytest.raises(ValueError, match="geometry must be 'refuse', 'sform' or 'qform', got 'both'"):
        VolumeReader(geometry="both")


OUTPUTS = {
    "plain": ({}, "refuse"),
    "scanner-qform": ({"qform": QFORM, "codes": (2, 1)}, "sform"),
    "scanner-qform-taken": ({"qform": QFORM, "codes": (2, 1)}, "qform"),
    "no-codes": ({"qform": QFORM, "codes": (0, 0)}, "qform"),
    "metre": (GOOD["metre"][0], "refuse"),
    "oblique": (GOOD["oblique"][0], "refuse"),
    "qform-alone": (GOOD["qform-alone"][0], "refuse"),
    "one-slice": ({"voxels": VOXELS[:, :, :1]}, "refuse"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_result_lies_where_its_image_lies_in_every_program(tmp_path, case):
    settings, geometry = OUTPUTS[case]
    path = write(tmp_path / "x.nii.gz", **settings)
    image = LoadImage(VolumeReader(geometry=geometry), ensure_channel_first=True)(path)
    turned = Orientation("RAS", labels=None)(image)
    options = {"output_dtype": np.uint8, "separate_folder": False, "print_log": False}
    save = SaveImage(tmp_path, "seg", writer="vdt_workflows.VolumeWriter", **options)
    save(RestoreGrid()(turned, turned))
    result = tmp_path / "x_seg.nii.gz"
    before, after = nib.load(path), nib.load(result)
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    for name in ("sform_code", "qform_code", "xyzt_units"):
        assert after.header[name] == before.header[name]
    np.testing.assert_array_equal(after.header.get_sform(), before.header.get_sform())
    np.testing.assert_array_equal(after.header.get_qform(), before.header.get_qform())
    first, second = sitk.ReadImage(path), sitk.ReadImage(result)
    for read in (sitk.Image.GetOrigin, sitk.Image.GetSpacing, sitk.Image.GetDirection):
        assert read(first) == read(second)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))


def write_itk(path, affine=SFORM, voxels=VOXELS, **options):
    """Write what ITK writes, placed by an affine in RAS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, path, **options)
    return path


@pytest.mark.parametrize("name", ["x.nrrd", "x.nhdr", "x.mha", "x.mhd", "X.NRRD"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_nrrd_and_metaimage_are_read_where_itk_puts_them(tmp_path, name, dtype):
    path = write_itk(tmp_path / name, OBLIQUE, VOXELS.astype(dtype), useCompression="x" in name)
    opened = open_volume(path)
    assert opened.shape == SHAPE
    assert opened.get_data_dtype() == dtype
    image = LoadImage(VolumeReader())(path)
    np.testing.assert_array_equal(image, VOXELS)
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-4)
    np.testing.assert_array_equal(read_voxels(opened), VOXELS)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def replace(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"CompressedDataSize", b"CompressedDataS-ze"),
        (b"CompressedDataSize = ", b"CompressedDataSize = 1"),
        (b"ByteOrderMSB = False", b"ByteOrderMSB = True"),
    ],
)
def test_a_compressed_metaimage_is_unpacked_whatever_size_its_header_gives(tmp_path, old, new):
    path = write_itk(tmp_path / "x.mha", useCompression=True)
    replace(old, new)(path)
    right = VOXELS.byteswap() if b"MSB" in old else VOXELS
    np.testing.assert_array_equal(read_voxels(open_volume(path)), right)


@pytest.mark.parametrize(
    ("name", "spoil", "sentence"),
    [
        (
            "x.mha",
            replace(b"TransformMatrix", b"TransformNothin"),
            "does not say where in the .*TransformMatrix",
        ),
        (
            "x.nrrd",
            replace(b"space: left-posterior-superior", b"space dimension: 3"),
            "does not say where in the",
        ),
        ("x.mha", cut, "its voxels cannot be read"),
        ("x.nrrd", cut, "its voxels cannot be read"),
        ("x.mha", lambda path: path.write_bytes(b"nonsense"), "not a readable NRRD or MetaImage volume"),
        ("x.mha", replace(b"ElementSpacing", b"ElementSpaci9g"), "volume \\(ElementSpacing is ''\\)"),
        ("x.nrrd", lambda path: path.write_bytes(b""), "not a readable NRRD or MetaImage volume"),
    ],
    ids=["no-matrix", "no-space", "cut-mha", "cut-nrrd", "nonsense", "field", "empty"],
)
def test_a_damaged_or_placeless_nrrd_or_metaimage_is_refused_by_name(tmp_path, name, spoil, sentence):
    spoil(write_itk(tmp_path / name))
    with pytest.raises(ValueError, match=rf"/{name}: .*{sentence}") as caught:
        LoadImage(VolumeReader())(tmp_path / name)
    assert "\n" not in str(caught.value)
