import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.detection.transforms.dictionary import ClipBoxToImaged, RandFlipBoxd
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, ScaleIntensityRange
from PIL import Image

from vdt_transforms import RandFlipSlices, RandFlipSlicesd, RandResizeStack, RandResizeStackd, SliceStackReader
from vdt_transforms.slice_stacks import HU_OFFSET, slice_mixes


def write_slice(folder, number, hu):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:03d}.png"
    Image.fromarray((np.asarray(hu) + HU_OFFSET).astype(np.uint16)).save(path)
    return path


def write_series(folder, numbers, size=(6, 8)):
    """Slices whose every pixel is ten times their number, in HU."""
    for number in numbers:
        write_slice(folder, number, np.full(size, 10 * number))
    return folder


def depths(stack):
    """Where the slices of a stack of `write_series` lie, as slice numbers."""
    assert (stack == stack[:, :1, :1]).all()
    return (stack[:, 0, 0] / 10).tolist()


# Which slices


@pytest.mark.parametrize("interval", [0.25, 0.5, 0.6, 1, 1.25, 1.5, 2, 2.5, 3, 3.75, 4, 5, 7.5, 10])
@pytest.mark.parametrize("distance", [2.5, 2.0])
def test_slices_lie_at_multiples_of_the_distance(interval, distance):
    mixes = slice_mixes(9, distance, interval)
    assert len(mixes) == 9
    places = [interval * sum(offset * weight for offset, weight in mix) for mix in mixes]
    np.testing.assert_allclose(places, distance * np.arange(-4, 5), atol=1e-4)
    assert all(sum(weight for _, weight in mix) == pytest.approx(1) for mix in mixes)
    assert all(max(o for o, _ in mix) - min(o for o, _ in mix) <= 1 for mix in mixes)


@pytest.mark.parametrize(
    ("interval", "places"),
    [
        *((interval, (2.5, 5, 7.5, 10)) for interval in (0.25, 0.5, 1, 1.25, 2.5, 5)),
        (2, (2.5, 4.5, 6.5, 10)),
        (3, (2.5, 5.5, 8.5, 11.5)),
        (4, (2.5, 6.5, 6.5, 10.5)),
        (3.75, (2.5, 6.25, 7.5, 10)),
        (1.5, (2.5, 5.5, 7.5, 10)),
        (0.6, (2.5, 4.9, 7.3, 9.7)),
        (0.4, (2.5, 4.9, 7.3, 10)),
    ],
)
def test_reference_switch_gives_the_places_of_the_published_code(interval, places):
    mixes = slice_mixes(9, 2.5, interval, True)
    found = [interval * sum(offset * weight for offset, weight in mix) for mix in mixes]
    np.testing.assert_allclose(found, [*(-p for p in reversed(places)), 0, *places], atol=1e-3)


def test_stack_goes_from_the_head_to_the_feet_around_the_key_slice(tmp_path):
    write_series(tmp_path / "000001_01_01", range(90, 120))
    stack = SliceStackReader()(tmp_path / "000001_01_01" / "105.png", 1.0)
    assert stack.dtype == torch.float32
    np.testing.assert_allclose(depths(stack), 105 + 2.5 * np.arange(-4, 5), atol=1e-4)
    stack = SliceStackReader(5, 2.0)(tmp_path / "000001_01_01" / "105.png", 1.25)
    np.testing.assert_allclose(depths(stack), 105 + 1.6 * np.arange(-2, 3), atol=1e-4)


def test_missing_neighbours_are_replaced_by_the_nearest_towards_the_key_slice(tmp_path):
    write_series(tmp_path / "s", [100, 101, 102, 104, 105, 106])  # ends at 100 and 106; 103 is a gap
    stack = SliceStackReader()(tmp_path / "s" / "102.png", 2.5)
    assert depths(stack) == [100, 100, 100, 101, 102, 102, 104, 105, 106]
    stack = SliceStackReader()(tmp_path / "s" / "102.png", 5.0)
    np.testing.assert_allclose(depths(stack), [100, 100.5, 101, 101.5, 102, 102, 102, 103, 104], atol=1e-4)
    write_series(tmp_path / "lone", [7])
    assert depths(SliceStackReader()(tmp_path / "lone" / "007.png", 1.0)) == [7] * 9


@pytest.fixture
def opened(monkeypatch):
    """The pictures that are opened."""
    paths = []
    monkeypatch.setattr(Image, "open", lambda path, read=Image.open: paths.append(path) or read(path))
    return paths


def test_distance_zero_repeats_the_key_slice_and_reads_no_other(tmp_path, opened):
    write_series(tmp_path, range(1, 30))
    for interval in (0.6, 2.5, 5.0):
        assert depths(SliceStackReader(distance=0)(tmp_path / "015.png", interval)) == [15] * 9
    assert {path.name for path in opened} == {"015.png"}


def test_each_slice_is_read_once(tmp_path, opened):
    write_series(tmp_path, range(1, 30))
    SliceStackReader()(tmp_path / "015.png", 5.0)
    assert len(opened) == len(set(opened)) == 5
    opened.clear()
    SliceStackReader()(tmp_path / "015.png", 1.0)
    assert len(opened) == len(set(opened)) == 13


def test_neighbouring_key_slices_share_what_was_read_of_their_series(tmp_path, opened):
    for name in "ab":
        write_series(tmp_path / name, range(1, 30))
    reader = SliceStackReader()
    for place in ("a/015", "a/016", "a/018", "b/018", "a/018"):
        stack = reader(tmp_path / f"{place}.png", 5.0)
        assert torch.equal(stack, SliceStackReader()(tmp_path / f"{place}.png", 5.0))
    alone = 5 * 5
    assert len(opened) - alone == 5 + 1 + 2 + 5 + 5  # of another series nothing is kept
    opened.clear()
    for number in range(11, 20):
        reader(tmp_path / "b" / f"{number:03d}.png", 1.0)
        assert len(reader._last[1]) <= 21  # 10 mm to either side
    assert len(opened) == len(set(opened)) == 29
    assert not pickle.loads(pickle.dumps(reader))._last[1]
    assert pickle.dumps(reader) == pickle.dumps(SliceStackReader())


def test_what_is_done_to_a_stack_does_not_reach_the_next(tmp_path):
    write_series(tmp_path, range(1, 30))
    reader = SliceStackReader()
    reader(tmp_path / "015.png", 2.5).add_(1)
    assert depths(reader(tmp_path / "016.png", 2.5)) == list(range(12, 21))


def test_numbers_above_999_and_other_files_in_the_folder_are_no_trouble(tmp_path):
    write_series(tmp_path, [999, 1000, 1001])
    (tmp_path / "notes.txt").write_text("")
    assert depths(SliceStackReader(3)(tmp_path / "1000.png", 2.5)) == [999, 1000, 1001]


def test_convention_x_runs_along_the_columns_of_the_picture(tmp_path):
    picture = np.zeros((6, 8))
    picture[1, 5] = 700  # row 1, column 5
    stack = SliceStackReader(1)(write_slice(tmp_path, 1, picture), 1.0)
    assert stack.shape == (1, 8, 6)
    assert stack[0, 5, 1] == 700


def test_values_are_hu_and_the_window_gives_the_published_ones(tmp_path):
    hu = np.array([[-3000, -1024, -18, 0, 50, 300, 1050, 3000]])
    stack = SliceStackReader(1)(write_slice(tmp_path, 1, hu), 1.0)
    assert stack[0, :, 0].tolist() == hu[0].tolist()
    window = ScaleIntensityRange(-1024, 1050, -123.675 / 58.395, (255 - 123.675) / 58.395, clip=True)
    wanted = [-2.118, -2.118, 0, 0.038, 0.143, 0.670, 2.249, 2.249]
    np.testing.assert_allclose(window(stack)[0, :, 0], wanted, atol=2e-3)


def write_volume(path, affine):
    """Voxels that tell where they are: 100 times the index along z of the LPI grid, plus 10 x, plus y."""
    x, y, z = np.indices((5, 6, 7))
    values = MetaTensor(
        torch.from_numpy((100 * z + 10 * x + y)[None].astype(np.float32)), affine=np.diag([-1, -1, -2.0, 1])
    )

    turned = Orientation("".join(nib.aff2axcodes(affine)), labels=None)(values)
    nib.save(nib.Nifti1Image(turned[0].numpy(), turned.affine.numpy()), path)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "LAS"])
def test_volume_is_turned_to_lpi_and_knows_its_interval(tmp_path, axes):
    signs = {"R": 1, "A": 1, "S": 1, "L": -1, "P": -1, "I": -1}
    write_volume(tmp_path / "ct.nii.gz", np.diag([*(signs[a] for a in axes), 1.0]))
    stack = SliceStackReader(3, 4.0)(tmp_path / "ct.nii.gz", key_slice=3)
    assert stack.shape == (3, 5, 6)
    x, y = np.indices((5, 6))
    np.testing.assert_allclose(stack, [100 * z + 10 * x + y for z in (1, 3, 5)])


# What wrong input gets


@pytest.mark.parametrize("interval", [0, -1.0, float("nan"), float("inf"), None])
def test_interval_that_is_no_positive_number_is_refused(tmp_path, interval):
    write_series(tmp_path, [1])
    with pytest.raises(ValueError, match=r"001.png: slice_interval must be a positive number of mm, got"):
        SliceStackReader()(tmp_path / "001.png", interval)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_picture_of_another_kind_is_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "001.png")
    with pytest.raises(ValueError, match=f"mode {mode}; expected one channel of 16 bits"):
        SliceStackReader()(tmp_path / "001.png", 1.0)


def test_damaged_picture_missing_key_slice_and_odd_names_are_named(tmp_path):
    path = write_slice(tmp_path, 1, np.random.default_rng(0).integers(0, 99, (64, 64)))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"001.png: cannot be read"):
        SliceStackReader()(path, 1.0)
    with pytest.raises(FileNotFoundError, match=r"002.png: no such key slice; its folder has 1 slices"):
        SliceStackReader()(tmp_path / "002.png", 1.0)
    with pytest.raises(FileNotFoundError, match="its folder has 0 slices"):
        SliceStackReader()(tmp_path / "absent" / "002.png", 1.0)
    with pytest.raises(ValueError, match="must be named by its number"):
        SliceStackReader()(tmp_path / "key.png", 1.0)


def test_slices_of_two_sizes_are_refused(tmp_path):
    write_series(tmp_path, [1])
    write_slice(tmp_path, 2, np.zeros((6, 9)))
    with pytest.raises(ValueError, match=r"slice 2 has \(9, 6\) pixels.*slice 1"):
        SliceStackReader(3)(tmp_path / "001.png", 2.5)


def test_key_slice_outside_the_volume_is_refused(tmp_path):
    write_volume(tmp_path / "ct.nii.gz", np.eye(4))
    for key in (None, 7, -1):
        with pytest.raises(ValueError, match="key_slice must be from 0 to 6, got"):
            SliceStackReader()(tmp_path / "ct.nii.gz", key_slice=key)


@pytest.mark.parametrize("arguments", [{"slices": 8}, {"slices": 0}, {"distance": -1}, {"distance": float("nan")}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be .* got"):
        SliceStackReader(**arguments)


# Flips and sizes


def test_flip_of_slices_reverses_them_and_twice_is_nothing():
    stack = torch.arange(9.0).reshape(9, 1, 1).expand(9, 2, 3)
    flip = RandFlipSlices(prob=1.0)
    assert depths(flip(stack) * 10) == list(range(8, -1, -1))
    assert torch.equal(flip(flip(stack)), stack)


def test_resize_moves_boxes_with_the_image_on_a_side_that_is_not_square():
    image = torch.zeros(9, 60, 40)
    image[:, 12:24, 10:30] = 1
    out = RandResizeStackd("image", 120)({"image": image, "box": np.array([[12.0, 10, 24, 30]])})
    assert out["image"].shape == (9, 120, 80)
    assert out["box"].tolist() == [[24, 20, 48, 60]]
    assert out["scale"].tolist() == [2, 2]
    assert (out["image"][:, 25:47, 21:59] == 1).all()
    assert image.shape == (9, 60, 40)


def test_resize_to_the_own_size_changes_nothing_and_rounds_as_published():
    image = torch.rand(3, 50, 33)
    assert torch.equal(RandResizeStack(50)(image), image)
    assert RandResizeStack(47)(image).shape == (3, 47, 31)  # 31.02
    out = RandResizeStackd("image", 47)({"image": image, "box": np.zeros((0, 4), np.float32)})
    assert out["box"].shape == (0, 4)
    np.testing.assert_allclose(out["scale"], [47 / 50, 31 / 33])
    assert torch.equal(RandResizeStack(0)(image), image)
    resize = RandResizeStack([4, 5, 6]).set_random_state(3)
    assert {resize(image).shape[-2] for _ in range(30)} == {4, 5, 6}
    with pytest.raises(ValueError, match="sizes must be numbers of pixels, 0 or more, got"):
        RandResizeStack([-1])


def filled(boxes, sides):
    image = torch.zeros(sides)
    for x1, y1, x2, y2 in np.asarray(boxes).astype(int).tolist():
        image[x1:x2, y1:y2] = 1
    return image


def test_moving_image_and_box_then_drawing_the_box_is_drawing_then_moving():
    sides, boxes = (40, 24), np.array([[4.0, 2, 12, 10], [20, 12, 38, 22]], np.float32)
    item = {"image": filled(boxes, sides).expand(9, *sides), "box": boxes, "label": np.ones(2, np.int64)}
    moved = Compose(
        [
            RandFlipSlicesd("image", prob=1.0),
            RandResizeStackd("image", 80),
            RandFlipBoxd(image_keys="image", box_keys="box", box_ref_image_keys="image", prob=1.0, spatial_axis=0),
            ClipBoxToImaged(box_keys="box", label_keys="label", box_ref_image_keys="image", remove_empty=True),
        ]
    )(item)
    drawn = filled(moved["box"], (80, 48))
    inner = torch.nn.functional.avg_pool2d(drawn[None], 3, 1, 1)[0] % 1 == 0  # away from edges, which the resize blurs
    assert moved["box"].tolist() == [[56, 4, 72, 20], [4, 24, 40, 44]]
    assert torch.equal(torch.as_tensor(moved["image"])[0][inner], drawn[inner])
    assert inner.float().mean() > 0.8
