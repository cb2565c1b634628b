"""Where things are in the picture sheets, whatever way the voxels are stored."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.makers.volumes import make_affine
from vdt_workflows.preparation.case_sheets import (
    COLUMNS,
    PANEL,
    ROWS,
    TILE,
    TITLE,
    central_slices,
    colour,
    draw_case,
    draw_pages,
)

ROTATION = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
AFFINES = {
    "RAS": make_affine((1, 2, 3)),
    "LPS": make_affine((-1, -2, 3)),
    "slices first": make_affine((1, 2, 3))[:, [2, 0, 1, 3]],
    "oblique": ROTATION @ make_affine((1, 2, 3)),
}
SIZES = (20, 10, 8)  # voxels to the right, to the front, to the head


def stored(array, affine):
    """Bring an array in RAS order to the order of an affine."""
    places = [int(np.argmax(np.abs(affine[:3, axis]))) for axis in range(3)]
    flips = [axis for axis, place in enumerate(places) if affine[place, axis] < 0]
    return np.flip(array.transpose(places), flips)


@pytest.mark.parametrize("name", AFFINES)
def test_right_is_left_the_front_is_up_and_the_head_is_on_top(name):
    volume, labels = np.zeros(SIZES), np.zeros(SIZES, np.uint8)
    labels[8:13, 4:7, 3:6] = 1  # centre at (10, 5, 4)
    volume[17, 5, 4], volume[10, 8, 4], volume[10, 5, 6] = 1, 2, 3  # on the right, in front, towards the head
    axial, coronal, sagittal = central_slices(
        *(stored(array, AFFINES[name]) for array in (volume, labels)), AFFINES[name]
    )
    for (values, cut, _, _), shape in zip((axial, coronal, sagittal), [(10, 20), (8, 20), (8, 10)], strict=True):
        assert values.shape == cut.shape == shape
    assert axial[0][4, 2] == coronal[0][3, 2] == 1  # columns from the right: 19 - 17
    assert axial[0][1, 9] == sagittal[0][3, 1] == 2  # from the front: 9 - 8
    assert coronal[0][1, 9] == sagittal[0][1, 4] == 3  # rows from the head: 7 - 6
    assert [slice_[2:] for slice_ in (axial, coronal, sagittal)] == [
        pytest.approx(sizes) for sizes in [(2, 1), (3, 1), (3, 2)]
    ]


def test_a_volume_without_foreground_is_cut_in_its_own_middle():
    volume = np.arange(4 * 6 * 8).reshape(4, 6, 8)
    axial, _, _ = central_slices(volume, np.zeros(volume.shape), np.eye(4))
    np.testing.assert_array_equal(axial[0], volume[::-1, ::-1, 4].T)


def panels(png):
    picture = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    assert picture.shape == (*TILE[::-1], 3)
    return [picture[TITLE : TITLE + PANEL, 6 + i * (PANEL + 6) :][:, :PANEL] for i in range(3)]


def test_a_millimetre_is_as_long_in_all_three_pictures_and_labels_have_their_colours():
    volume, labels = np.full((40, 40, 10), 100.0), np.zeros((40, 40, 10), np.uint8)
    labels[10:30, 10:30, 2:8], labels[14:18, 14:18] = 1, 2
    slices = central_slices(volume, labels, make_affine((1, 1, 4)))  # a cube of 40 mm, a box of 20 x 20 x 24 mm in it
    drawn = panels(draw_case("case", "details", slices, (-160, 240)))
    grey = round(260 / 400 * 255)
    for panel, shape in zip(drawn, [(20, 20), (24, 20), (24, 20)], strict=True):
        edge = np.abs(panel - colour(1)).max(axis=-1) == 0
        rows, columns = np.flatnonzero(edge.any(axis=1)), np.flatnonzero(edge.any(axis=0))
        found = np.array([np.ptp(rows), np.ptp(columns)]) / PANEL * 40
        np.testing.assert_allclose(found, shape, atol=0.3)
        assert abs(panel[5, PANEL // 2] - grey).max() <= 1
    assert (np.abs(drawn[0] - colour(2)).max(axis=-1) == 0).any()


def test_colours_of_neighbouring_values_are_far_apart_and_bright():
    colours = np.array([colour(value) for value in range(1, 15)])
    assert len(np.unique(colours, axis=0)) == 14
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 100
    assert (colours @ [0.2126, 0.7152, 0.0722]).min() > 60  # luminance; pure blue has 18


@pytest.mark.parametrize(("count", "pages", "columns", "rows"), [(1, 1, 1, 1), (3, 1, 2, 2), (11, 2, 2, 5)])
def test_pages_hold_ten_cases_and_a_legend(count, pages, columns, rows):
    assert (COLUMNS, ROWS) == (2, 5)
    tile = draw_case("case", "", central_slices(np.ones((4, 4, 4)), np.ones((4, 4, 4)), np.eye(4)))
    drawn = [Image.open(io.BytesIO(page)) for page in draw_pages("title", ["background", "organ"], [tile] * count)]
    assert len(drawn) == pages
    width, height = drawn[0].size
    assert width == columns * TILE[0]
    assert rows * TILE[1] < height < rows * TILE[1] + 100
    assert (np.abs(np.asarray(drawn[-1]).astype(int) - colour(1)).max(axis=-1) == 0).any()
