"""Cubes of 1 mm voxels around the nodules of an axial CT series, cut from the slices they need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vdt_transforms.dicom_series import DicomSeries
from vdt_workflows.preparation.lidc import Annotation, cluster_annotations, consensus, draw_masks, locate_contours

AIR = -1024  # HU


@dataclass(frozen=True, eq=False)
class Nodule:
    """One nodule as its readers drew it, on the voxels of its scan.

    Attributes:
        annotations: of its readers.
        masks: of its readers, (readers, columns, rows, slices), in a box around all contours.
        start: the box's first voxel: column, row, slice.
        voxel: centre of mass of the consensus, as column, row and slice.
        position: the same place in the world (RAS, mm).
        volume: of the consensus, mm3.
    """

    annotations: Sequence[Annotation]
    masks: np.ndarray
    start: tuple[int, int, int]
    voxel: np.ndarray
    position: np.ndarray
    volume: float


def find_nodules(series: DicomSeries, annotations: Sequence[Annotation]) -> list[Nodule]:
    """Cluster a scan's annotations to nodules, in the order of slice, row and column of their centres.

    Raises:
        ValueError: naming the series' folder, if a contour lies in no slice or outside the image, or if the readers'
            consensus on a nodule is empty.
    """
    where = f"{series.folder}: series {series.uid}"
    z = series.positions[:, 2]
    reach = max(0.1 * series.slice_spacing, 0.01)

    def find_slice(place: float) -> int:
        nearest = int(np.abs(z - place).argmin())
        if abs(z[nearest] - place) > reach:
            raise ValueError(
                f"{where} has no slice at z = {place:g} mm, where a reader drew a contour;"
                f" the nearest is at {z[nearest]:g} mm"
            )
        return nearest

    points = [locate_contours(annotation, find_slice) for annotation in annotations]
    for drawn in points:
        if drawn[:, :2].min() < 0 or (drawn.max(axis=0)[:2] >= (series.columns, series.rows)).any():
            raise ValueError(f"{where}: a contour lies outside its {series.columns} x {series.rows} pixels")
    nodules = []
    for group in cluster_annotations(points, series.thickness or series.slice_spacing):
        chosen = [annotations[i] for i in group]
        masks, start = draw_masks(chosen, find_slice)
        inside = np.argwhere(consensus(masks))
        if not len(inside):
            raise ValueError(f"{where}: the contours around {points[group[0]][0].tolist()} enclose no common voxel")
        voxel = inside.mean(axis=0) + start
        volume = len(inside) * series.slice_spacing * series.pixel_spacing[0] * series.pixel_spacing[1]
        nodules.append(Nodule(chosen, masks, start, voxel, _to_world(series, voxel), volume))
    return sorted(nodules, key=lambda nodule: tuple(nodule.voxel[::-1]))


def cut_image(
    series: DicomSeries, position: np.ndarray, size: int, read_slice: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Interpolate a series linearly on a cube's grid: HU, int16, (X, Y, Z), RAS.

    Values below -1024 HU, which scanners write where they have not measured, are taken as air (-1024) first. What lies
    further from the outermost voxel centres than half a voxel is air too; the cube is never shifted. There is no
    smoothing before: pixels are seldom larger than 1 mm, and slices are often thicker.

    Args:
        series: an axial series without errors.
        position: the cube's centre in the world (RAS, mm).
        size: voxels of its edge.
        read_slice: gives the HU of a slice, (rows, columns).
    """
    places = _grid(series, position, size)
    ends = [_span(place, count) for place, count in zip(places, _counts(series), strict=True)]
    (x0, x1), (y0, y1), (z0, z1) = ends
    stack = np.stack([read_slice(index)[y0:y1, x0:x1] for index in range(z0, z1)]).transpose(2, 1, 0)
    # Above air, so that zeros are air.
    cube = _interpolate(np.maximum(stack, AIR).astype(float) - AIR, (x0, y0, z0), places, _counts(series))
    return (cube.round() + AIR).astype(np.int16)


def cut_masks(series: DicomSeries, nodule: Nodule, size: int) -> np.ndarray:
    """Bring a nodule's masks to its cube's grid: bool, (readers, X, Y, Z), RAS.

    Each reader's mask is interpolated linearly as the image is, and holds where it is a half or more. One so small that
    it is a half nowhere is the voxel nearest to its middle.
    """
    places = _grid(series, nodule.position, size)
    cubes = np.zeros((len(nodule.masks), size, size, size), bool)
    for cube, mask in zip(cubes, nodule.masks, strict=True):
        cube |= _interpolate(mask.astype(float), nodule.start, places, _counts(series)) > 0.5 - 1e-6  # of rounding
        if not cube.any() and mask.any():
            middle = np.argwhere(mask).mean(axis=0) + nodule.start
            off = [np.abs(place - m) / abs(place[1] - place[0]) for place, m in zip(places, middle, strict=True)]
            if max(o.min() for o in off) <= 0.5:  # else it lies outside the cube
                cube[tuple(o.argmin() for o in off)] = True
    return cubes


def cube_affine(position: np.ndarray, size: int) -> np.ndarray:
    """Voxel to world (RAS, mm) of a cube of 1 mm voxels whose middle is at `position`."""
    affine = np.eye(4)
    affine[:3, 3] = position - (size - 1) / 2
    return affine


def _counts(series: DicomSeries) -> tuple[int, int, int]:
    return series.columns, series.rows, len(series.files)


def _to_world(series: DicomSeries, voxel: np.ndarray) -> np.ndarray:
    x, y = (-series.positions[0, a] - voxel[a] * _step(series, a) for a in (0, 1))
    return np.array([x, y, np.interp(voxel[2], np.arange(len(series.files)), series.positions[:, 2])])


def _step(series: DicomSeries, axis: int) -> float:
    """Mm from a column, or a row, to the next, in DICOM's world (LPS)."""
    return float(series.orientation[axis, axis] * series.pixel_spacing[1 - axis])


def _grid(series: DicomSeries, position: np.ndarray, size: int) -> list[np.ndarray]:
    """Where in the series' columns, rows and slices the cube's voxels lie, along each axis of the cube."""
    steps = np.arange(size) - (size - 1) / 2
    in_plane = [(-(position[a] + steps) - series.positions[0, a]) / _step(series, a) for a in (0, 1)]
    z, world = series.positions[:, 2], position[2] + steps
    place = np.interp(world, z, np.arange(len(z)))
    place += np.minimum(world - z[0], 0) / (z[1] - z[0]) + np.maximum(world - z[-1], 0) / (z[-1] - z[-2])
    return [*in_plane, place]


def _span(places: np.ndarray, count: int) -> tuple[int, int]:
    """First voxel of an axis that interpolation at some places needs, and the one after the last."""
    within = places.clip(0, count - 1)
    return int(np.floor(within.min())), int(np.ceil(within.max())) + 1


def _interpolate(
    volume: np.ndarray, start: Sequence[int], places: Sequence[np.ndarray], counts: Sequence[int]
) -> np.ndarray:
    """Interpolate linearly between the voxels of a part of a series; all around it, and outside the series, is zero.

    Args:
        volume: the part, (columns, rows, slices).
        start: its first voxel.
        places: where to interpolate, in voxels of the series, along each axis.
        counts: voxels of the series; it ends half a voxel beyond the outermost centres.
    """
    weights = []
    for place, first, length, count in zip(places, start, volume.shape, counts, strict=True):
        apart = np.abs(place.clip(0, count - 1) - (first + np.arange(length))[:, None])
        weights.append((1 - apart).clip(0) * ((place >= -0.5) & (place <= count - 0.5)))
    return np.einsum("xyz,xi,yj,zk->ijk", volume, *weights, optimize=True)
