import numpy as np
import pytest

from tests.makers.dicom import AXIAL, box_line, write_series
from vdt_transforms.dicom_folders import find_series
from vdt_workflows.preparation.lidc import Annotation, Contour, consensus
from vdt_workflows.preparation.nodule_cubes import cube_affine, cut_image, cut_masks, find_nodules

RATINGS = (3, 4, 1, 6, 3, 5, 2, 1, 5)
ORIGIN = (-20.0, -10.0, -100.0)


def boxes(columns, rows, slices, spacing=1.0, origin=ORIGIN):
    """One reader's boxes, one a slice."""
    lines = [
        Contour(origin[2] + k * spacing, np.array(box_line(columns, rows))) for k in range(slices[0], slices[1] + 1)
    ]
    return Annotation(RATINGS, tuple(lines))


def write(folder, hu, **options):
    write_series(folder, hu, **{"spacing": (1.0, 1.0, 1.0), "origin": ORIGIN, **options})
    (series,) = find_series(folder).series
    return series


def cut(series, nodule, size):
    return cut_image(series, nodule.position, size, series.read_slice), cut_masks(series, nodule, size)


def test_on_voxels_of_1_mm_a_cube_is_the_scan_itself_in_ras_order(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 1000, (30, 28, 26))
    series = write(tmp_path, hu)
    (nodule,) = find_nodules(series, [boxes((10, 13), (12, 17), (8, 11))])
    assert nodule.voxel.tolist() == [11.5, 14.5, 9.5]
    assert nodule.position.tolist() == [20 - 11.5, 10 - 14.5, -100 + 9.5]
    assert nodule.volume == 4 * 6 * 4
    image, masks = cut(series, nodule, 16)
    assert image.dtype == np.int16
    assert np.array_equal(image, hu[4:20, 7:23, 2:18][::-1, ::-1])  # columns go left, rows go back
    inside = np.zeros_like(hu, bool)
    inside[10:14, 12:18, 8:12] = True
    assert np.array_equal(masks, inside[None, 4:20, 7:23, 2:18][:, ::-1, ::-1])


@pytest.mark.parametrize("size", [16, 17])
def test_the_affine_leads_from_each_voxel_of_the_cube_to_its_voxel_of_the_scan(tmp_path, size):
    hu = np.random.default_rng(0).integers(-1000, 1000, (30, 28, 26))
    series = write(tmp_path, hu)
    slices = (8, 11) if size == 16 else (8, 10)
    last = (13, 17) if size == 16 else (14, 18)  # so that the cube's voxels lie on the scan's
    (nodule,) = find_nodules(series, [boxes((10, last[0]), (12, last[1]), slices)])
    image, _ = cut(series, nodule, size)
    for voxel in [(0, 0, 0), (size - 1, 3, 5), (7, 2, size - 1)]:
        world = cube_affine(nodule.position, size) @ [*voxel, 1]
        place = np.linalg.solve(series.affine, world)[:3]
        assert np.allclose(place, place.round())
        assert image[voxel] == hu[tuple(place.round().astype(int))]


@pytest.mark.parametrize("orientation", [AXIAL, (-1, 0, 0, 0, -1, 0), (-1, 0, 0, 0, 1, 0)], ids=str)
@pytest.mark.parametrize("places", [None, np.array([0, 2, 4.5, 6, 8, 14, 16, 17, 20, 22])], ids=["even", "uneven"])
def test_a_ramp_through_the_world_is_the_same_ramp_in_the_cube(tmp_path, orientation, places):
    spacing, slope = (0.7, 0.6, 2.0), np.array([9.0, -7.0, 11.0])
    places = np.arange(10) * 2.0 if places is None else places
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    index = np.indices((40, 44, 10))
    lps = np.array(ORIGIN)[:, None, None, None] + (
        row[:, None, None, None] * index[0] * spacing[0]
        + column[:, None, None, None] * index[1] * spacing[1]
        + normal[:, None, None, None] * places[index[2]]
    )
    centre = lps.mean(axis=(1, 2, 3)) * [-1, -1, 1]
    ramp = np.tensordot(slope * [-1, -1, 1], lps, 1) - slope @ centre
    series = write(tmp_path, ramp.round(), spacing=spacing, orientation=orientation, places=places)
    size = 18
    image = cut_image(series, centre, size, series.read_slice)
    world = np.indices(image.shape).reshape(3, -1) + cube_affine(centre, size)[:3, 3:]
    expected = (slope @ world - slope @ centre).reshape(image.shape)
    assert np.abs(image - expected).max() <= 1.01  # both ramps are rounded to whole HU


def test_what_lies_outside_the_scan_is_air_and_nothing_is_shifted(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 1000, (30, 28, 26))
    series = write(tmp_path, hu)
    (nodule,) = find_nodules(series, [boxes((1, 2), (24, 25), (0, 1))])
    image, masks = cut(series, nodule, 16)
    padded = np.pad(hu, 16, constant_values=-1024)
    x, y, z = (int(v - 7.5) + 16 for v in nodule.voxel)
    assert np.array_equal(image, padded[x : x + 16, y : y + 16, z : z + 16][::-1, ::-1])
    assert (image == -1024).mean() > 0.5
    assert masks[0].sum() == masks[0, 7:9, 7:9, 7:9].sum() == 8


def test_the_scan_ends_half_a_voxel_beyond_its_outermost_centres(tmp_path):
    series = write(tmp_path, np.full((20, 20, 3), 100), spacing=(1.0, 1.0, 4.0))
    image = cut_image(series, np.array([20 - 9.5, 10 - 9.5, -100 + 3.5]), 32, series.read_slice)
    inside = np.flatnonzero((image == 100).any(axis=(0, 1)))
    heights = -100 + 3.5 - 15.5 + inside
    assert (heights.min(), heights.max()) == (-102, -90)  # centres at -100, -96 and -92
    assert np.isin(image, (100, -1024)).all()


def test_values_below_air_do_not_leak_into_the_cube(tmp_path):
    hu = np.full((20, 20, 20), -500)
    hu[:5] = -1024
    series = write(tmp_path, hu, RescaleIntercept=-3024)  # stored numbers are 2000 too low
    image = cut_image(series, np.array([9.3, -0.4, -91.2]), 8, series.read_slice)
    assert image.min() == -1024


def test_only_the_slices_around_the_nodule_are_read(tmp_path):
    series = write(tmp_path, np.zeros((20, 20, 60)))
    position = np.array([10, 0, -80.0])
    read = []
    cut_image(series, position, 16, lambda index: read.append(index) or series.read_slice(index))
    assert read == list(range(12, 29))


# Masks


def test_each_reader_keeps_a_mask_on_the_cube_and_the_consensus_is_of_these(tmp_path):
    series = write(tmp_path, np.zeros((30, 30, 30)))
    drawn = [((10, 13), (10, 13)), ((10, 13), (10, 15)), ((12, 13), (10, 13))]
    readers = [boxes(columns, (10, 13), slices) for columns, slices in drawn]
    (nodule,) = find_nodules(series, readers)
    _, masks = cut(series, nodule, 16)
    assert masks.shape == (3, 16, 16, 16)
    assert consensus(masks).sum() == nodule.volume == 64
    assert masks.sum(axis=(1, 2, 3)).tolist() == [64, 96, 32]


def test_a_mask_of_thick_slices_keeps_its_volume_and_reaches_half_a_slice_up_and_down(tmp_path):
    series = write(tmp_path, np.zeros((40, 40, 20)), spacing=(0.5, 0.5, 3.0))
    (nodule,) = find_nodules(series, [boxes((10, 25), (8, 27), (6, 9), spacing=3.0)])
    _, masks = cut(series, nodule, 32)
    assert masks.sum() == nodule.volume == 8 * 10 * 12


def test_a_mask_below_half_of_a_voxel_becomes_the_nearest_voxel(tmp_path):
    series = write(tmp_path, np.zeros((40, 40, 20)), spacing=(0.5, 0.5, 0.5))
    readers = [boxes((20, 25), (20, 25), (10, 13), spacing=0.5), boxes((25, 25), (24, 24), (13, 13), spacing=0.5)]
    (nodule,) = find_nodules(series, readers)
    _, masks = cut(series, nodule, 16)
    ((x, y, z),) = np.argwhere(masks[1])
    offset = cube_affine(nodule.position, 16) @ [x, y, z, 1] - series.affine @ [25, 24, 13, 1]
    assert np.abs(offset).max() <= 0.5


def test_a_mask_larger_than_the_cube_is_cut_at_its_faces(tmp_path):
    series = write(tmp_path, np.zeros((40, 40, 40)))
    (nodule,) = find_nodules(series, [boxes((4, 33), (4, 33), (4, 33))])
    _, masks = cut(series, nodule, 16)
    assert masks.all()


# Nodules


def test_nodules_are_in_the_order_of_slice_row_and_column(tmp_path):
    series = write(tmp_path, np.zeros((40, 40, 40)))
    at = {(20, 5, 30), (5, 20, 10), (20, 20, 10), (5, 5, 30), (30, 5, 10)}
    found = find_nodules(series, [boxes((c, c), (r, r), (k, k)) for c, r, k in at])
    expected = sorted(at, key=lambda place: place[::-1])
    assert [tuple(nodule.voxel.round().astype(int).tolist()) for nodule in found] == expected


def test_the_slice_thickness_is_how_near_contours_of_one_nodule_come(tmp_path):
    readers = [boxes((5, 7), (5, 7), (5, 6)), boxes((5, 7), (5, 7), (8, 9))]
    assert len(find_nodules(write(tmp_path / "1", np.zeros((20, 20, 20))), readers)) == 2
    assert len(find_nodules(write(tmp_path / "2", np.zeros((20, 20, 20)), SliceThickness=2), readers)) == 1


def test_a_contour_that_lies_in_no_slice_is_named_with_its_height(tmp_path):
    series = write(tmp_path, np.zeros((20, 20, 20)))
    with pytest.raises(ValueError, match=r"series [\d.]+ has no slice at z = -80 mm, .*; the nearest is at -81 mm$"):
        find_nodules(series, [boxes((5, 7), (5, 7), (18, 20))])
    with pytest.raises(ValueError, match=r"has no slice at z = -95\.8 mm"):
        find_nodules(series, [boxes((5, 7), (5, 7), (4, 4), origin=(0, 0, -99.8))])


@pytest.mark.parametrize(("columns", "rows"), [((17, 18), (5, 7)), ((5, 7), (13, 14)), ((0, 3), (5, 7))])
def test_a_contour_outside_the_image_is_refused(tmp_path, columns, rows):
    series = write(tmp_path, np.zeros((19, 15, 20)))
    with pytest.raises(ValueError, match="a contour lies outside its 19 x 15 pixels"):
        find_nodules(series, [boxes(columns, rows, (4, 5))])


def test_contours_around_nothing_are_refused(tmp_path):
    series = write(tmp_path, np.zeros((20, 20, 20)))
    line = Contour(-95.0, np.array([(5, 5), (6, 5), (6, 6)]))
    with pytest.raises(ValueError, match=r"the contours around \[5, 5, 5\] enclose no common voxel"):
        find_nodules(series, [Annotation(RATINGS, (line,))])
