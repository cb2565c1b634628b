"""Pages of cases and of nodules; where things are in their planes is tested with vdt_workflows.drawing."""

import numpy as np
import pytest

from vdt_workflows.drawing import CAPTION, colour, cut_planes, read_png
from vdt_workflows.preparation.case_sheets import ALARM, draw_case, draw_fault, draw_pages
from vdt_workflows.preparation.nodule_sheets import draw_sheets, take_views


def has(picture, wanted):
    return bool((np.abs(picture.astype(int) - wanted).max(axis=-1) == 0).any())


@pytest.mark.parametrize(("count", "pages", "columns", "rows"), [(1, 1, 1, 1), (3, 1, 2, 2), (11, 2, 2, 5)])
def test_pages_hold_ten_cases_and_a_legend(count, pages, columns, rows):
    planes = cut_planes(np.ones((4, 4, 4)), np.eye(4))
    tile = draw_case("case", "", planes, planes)
    height, width, _ = read_png(tile).shape
    drawn = [read_png(page) for page in draw_pages("title", ["background", "organ"], [tile] * count)]
    assert len(drawn) == pages
    assert drawn[0].shape[1] == columns * width
    assert rows * height < drawn[0].shape[0] < rows * height + 100
    assert has(drawn[-1][:70], colour(1))


def test_a_case_that_was_left_out_takes_its_place_and_says_why():
    planes = cut_planes(np.ones((4, 4, 4)), np.eye(4))
    tile, fault = (read_png(png) for png in (draw_case("a", "", planes, planes), draw_fault("b", "no labels " * 40)))
    assert fault.shape == tile.shape
    assert has(fault[CAPTION:], ALARM)
    assert not has(tile, ALARM)


def test_a_sheet_shows_the_consensus_and_each_reader_of_a_nodule(tmp_path):
    image, label = np.full((40, 40, 40), -800.0), np.zeros((40, 40, 40), np.uint8)
    label[15:25, 15:25, 15:25] = 1
    masks = np.stack([np.roll(label, shift, 0) for shift in (0, 3)])
    views = take_views(image, label, masks)
    assert views["image"].shape == (3, 40, 40)
    assert views["masks"].shape == (3, 3, 40, 40)
    np.testing.assert_array_equal(views["masks"][2, 0], masks[1][::-1, ::-1, 20].T)  # axial, the right on the left
    (tmp_path / "scans").mkdir()
    np.savez(tmp_path / "scans" / "scan.npz", **{f"scan_01.{name}": view for name, view in views.items()})
    (tmp_path / "sheet_009.png").touch()
    draw_sheets(tmp_path, [{"nodule_id": "scan_01", "diameter_mm": "10", "malignancy_votes": "3 4"}], workers=0)
    assert [file.name for file in tmp_path.glob("*.png")] == ["sheet_001.png"]
    picture = read_png((tmp_path / "sheet_001.png").read_bytes())
    assert has(picture[80:], colour(2))  # below the legend
    assert has(picture[80:], colour(3))
    assert not has(picture, colour(4))
