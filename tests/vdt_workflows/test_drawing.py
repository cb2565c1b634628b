"""Where things are in pictures of volumes, whatever way the voxels are stored, and what colours they have."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.makers.volumes import make_affine
from vdt_workflows.drawing import (
    CAPTION,
    EDGES,
    MARGIN,
    PAPER,
    TEXT,
    colour,
    cut_planes,
    draw_planes,
    draw_sheet,
    draw_tile,
    find_centre,
    get_font,
    overlay,
    read_png,
    to_grey,
    to_png,
)

ROTATION = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
AFFINES = {
    "RAS": make_affine((1, 2, 3)),
    "LAS": make_affine((-1, 2, 3)),
    "LPS": make_affine((-1, -2, 3)),
    "PIR": make_affine((1, 2, 3))[:, [1, 2, 0, 3]] @ np.diag([-1, -1, 1, 1]),
    "oblique": ROTATION @ make_affine((1, 2, 3)),
}
SIZES = (20, 10, 8)  # voxels of 1, 2 and 3 mm to the right, to the front, to the head
SHAPES = {"axial": (10, 20), "coronal": (8, 20), "sagittal": (8, 10)}
PIXELS = {"axial": (2, 1), "coronal": (3, 1), "sagittal": (3, 2)}
MARKERS = {"R": (17, 5, 4), "L": (1, 5, 4), "A": (10, 8, 4), "P": (10, 2, 4), "S": (10, 5, 6), "I": (10, 5, 1)}
CENTRE = (10, 5, 4)


def stored(array, name):
    """Bring an array in RAS order to the order of an affine."""
    codes = "".join(nib.aff2axcodes(AFFINES[name]))
    assert codes == ("RAS" if name == "oblique" else name)
    pairs = ("RL", "AP", "SI")
    places = [next(i for i, pair in enumerate(pairs) if code in pair) for code in codes]
    return np.flip(array.transpose(places), [i for i, code in enumerate(codes) if code in "LPI"])


def phantom():
    """A volume with a marker at each side of the patient, numbered as in `MARKERS`."""
    volume = np.zeros(SIZES)
    for value, place in enumerate(MARKERS.values(), 1):
        volume[place] = value
    return volume


@pytest.mark.parametrize("name", AFFINES)
def test_each_side_of_the_patient_is_where_the_letter_of_the_edge_says(name):
    centre = np.zeros(SIZES)
    centre[CENTRE] = 1
    voxel = tuple(np.argwhere(stored(centre, name))[0])
    planes = cut_planes(stored(phantom(), name), AFFINES[name], voxel)
    assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal"]
    for plane in planes:
        assert plane.values.shape == SHAPES[plane.name]
        assert plane.size == pytest.approx(PIXELS[plane.name])
        rows, columns = plane.values.shape
        for letter, edge in zip(EDGES[plane.name], ("left", "right", "top", "bottom"), strict=True):
            ((row, column),) = np.argwhere(plane.values == 1 + list(MARKERS).index(letter))
            near = {"left": column, "right": columns - 1 - column, "top": row, "bottom": rows - 1 - row}[edge]
            along = "RLAPSI".index(letter) // 2
            assert near == (SIZES[along] - 1 - MARKERS[letter][along] if letter in "RAS" else MARKERS[letter][along])


@pytest.mark.parametrize("name", AFFINES)
def test_the_middle_is_the_same_voxel_in_every_orientation_and_channels_stay_in_front(name):
    volume = np.random.default_rng(0).random((2, *SIZES))
    planes = cut_planes(np.stack([stored(channel, name) for channel in volume]), AFFINES[name])
    for plane, view in zip(planes, (volume[..., 4], volume[:, :, 5], volume[:, 10]), strict=True):
        np.testing.assert_array_equal(plane.values, view[:, ::-1, ::-1].swapaxes(1, 2))


def glyph(letter):
    image = Image.new("L", (20, 20))
    ImageDraw.Draw(image).text((10, 10), letter, 255, get_font(12), anchor="mm")
    return np.asarray(image, float)


def read_letter(patch):
    """Name the letter that a grey patch of 20 x 20 pixels resembles most."""
    patch = patch.astype(float)[..., 0] - PAPER[0]
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]

    def likeness(letter):
        return max(np.corrcoef(np.roll(glyph(letter), s, (0, 1)).ravel(), patch.ravel())[0, 1] for s in shifts)

    return max("RLAPSI", key=likeness)


@pytest.mark.parametrize("name", ["LAS", "oblique"])
def test_letters_are_written_at_their_edges(name):
    picture = draw_planes(
        cut_planes(np.zeros((40, 40, 40)), AFFINES[name] @ np.diag([1, 1 / 2, 1 / 3, 1])), window=(0, 1), panel=120
    )
    side, half = 120 + 2 * MARGIN, MARGIN // 2
    for number, edges in enumerate(EDGES.values()):
        panel = np.pad(picture[:, number * side :][:, :side], ((9, 9), (9, 9), (0, 0)), constant_values=PAPER[0])
        middle = side // 2
        places = [(middle, half), (middle, side - half), (half, middle), (side - half, middle)]
        found = [
            read_letter(panel[row + 9 - 10 : row + 9 + 10, column + 9 - 10 : column + 9 + 10]) for row, column in places
        ]
        assert "".join(found) == edges


def test_the_centre_is_where_each_plane_shows_most_of_the_labels():
    labels = np.zeros(SIZES, np.uint8)
    labels[8:13, 4:7, 3:6], labels[2, 1, 1] = 1, 2
    assert find_centre(labels) == CENTRE
    assert find_centre(np.zeros(SIZES)) is None


def test_two_organs_beside_the_middle_are_both_cut_and_not_the_gap_between_them():
    labels = np.zeros(SIZES, np.uint8)
    labels[2:5, 4:7, 3:6], labels[15:19, 4:7, 3:6] = 1, 2
    planes = cut_planes(labels, np.eye(4), find_centre(labels))
    assert all(plane.values.any() for plane in planes)


def test_a_millimetre_is_as_long_in_all_planes_and_labels_have_their_colours():
    volume, labels = np.full((40, 40, 10), 100.0), np.zeros((40, 40, 10), np.uint8)
    labels[10:30, 10:30, 2:8], labels[14:18, 14:18] = 1, 2
    affine = make_affine((1, 1, 4))  # a cube of 40 mm, with a box of 20 x 20 x 24 mm in it
    centre = (16, 16, 5)
    planes, marked = (cut_planes(array, affine, centre) for array in (volume, labels))
    drawn = draw_planes(planes, marked, marked, window=(-160, 240), panel=280).astype(int)
    side = 280 + 2 * MARGIN
    assert drawn.shape == (side, 3 * side, 3)
    grey = to_grey(np.array(100), (-160, 240))
    for number, shape in enumerate([(20, 20), (24, 20), (24, 20)]):
        panel = drawn[:, number * side :][:, :side]
        edge = np.abs(panel - colour(1)).max(axis=-1) == 0
        rows, columns = np.flatnonzero(edge.any(axis=1)), np.flatnonzero(edge.any(axis=0))
        np.testing.assert_allclose(np.array([np.ptp(rows), np.ptp(columns)]) / 280 * 40, shape, atol=0.3)
        assert abs(panel[MARGIN + 4, MARGIN + 4] - grey).max() <= 1
        assert (np.abs(panel - colour(2)).max(axis=-1) == 0).any()


def test_the_window_is_the_middle_of_the_values_and_a_constant_volume_is_drawn():
    volume = np.linspace(0, 100, 1000).reshape(10, 10, 10)
    volume[0, 0, 0] = 1e6
    planes = cut_planes(volume, np.eye(4))
    shown = draw_planes(planes, panel=10)
    assert shown[MARGIN:-MARGIN, MARGIN : MARGIN + 10].std() > 1
    assert draw_planes(cut_planes(np.ones((4, 4, 4)), np.eye(4)), panel=20).shape == (
        20 + 2 * MARGIN,
        60 + 6 * MARGIN,
        3,
    )


def test_shades_mix_and_outlines_cover():
    grey, labels = np.full((8, 8), 100, np.uint8), np.zeros((8, 8), np.uint8)
    labels[2:6, 2:6] = 3
    picture = overlay(grey, labels, [labels], opacity=0.25)
    inside, edge, outside = picture[3, 3], picture[2, 3], picture[0, 0]
    np.testing.assert_allclose(inside, 75 + 0.25 * np.array(colour(3)), atol=0.5)
    assert tuple(edge) == colour(3)
    assert tuple(outside) == (100, 100, 100)
    other = np.where(labels, 5, 0)
    assert tuple(overlay(grey, None, [labels, other])[2, 3]) == colour(5)


def test_colours_of_neighbouring_values_are_far_apart_and_bright():
    colours = np.array([colour(value) for value in range(1, 15)])
    assert len(np.unique(colours, axis=0)) == 14
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 100
    assert (colours @ [0.2126, 0.7152, 0.0722]).min() > 60  # luminance; pure blue has 18


def test_a_scale_bar_has_its_length():
    plain, barred = (
        draw_planes(cut_planes(np.zeros((40, 40, 40)), np.eye(4)), window=(0, 1), panel=200, bar=bar)
        for bar in (None, 10)
    )
    rows, columns = np.nonzero((plain != barred).any(axis=-1))
    assert np.ptp(columns) == pytest.approx(10 / 40 * 200, abs=1)
    assert np.ptp(rows) <= 2


def test_a_sheet_lays_tiles_out_under_a_legend_that_has_their_colours():
    tile = draw_tile(
        np.zeros((50, 400, 3), np.uint8), "a $title$ with_signs and \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    )
    assert tile.shape == (50 + CAPTION, 400, 3)
    sheets = {count: draw_sheet([tile] * count, "title", {1: "liver", 7: "spleen"}, columns=2) for count in (1, 2, 3)}
    heights = {count: sheet.shape[0] for count, sheet in sheets.items()}
    assert [sheet.shape[1] for sheet in sheets.values()] == [400, 800, 800]
    assert heights[3] - heights[2] == len(tile)
    assert heights[1] == heights[2] < len(tile) + 100
    for value, is_there in ((1, True), (7, True), (2, False)):
        assert (np.abs(sheets[1].astype(int) - colour(value)).max(axis=-1) == 0).any() == is_there


def test_umlauts_are_letters_of_the_font():
    masks = [
        np.asarray(get_font(15).getmask(letter)) for letter in ("\N{LATIN SMALL LETTER U WITH DIAERESIS}", "\ue000")
    ]
    assert masks[0].shape != masks[1].shape or (masks[0] != masks[1]).any()


def test_a_picture_survives_its_file():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture[0, 0] = TEXT
    np.testing.assert_array_equal(read_png(to_png(picture)), picture)
