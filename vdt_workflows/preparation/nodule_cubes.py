"""Cubes of 1 mm voxels around the nodules of an axial CT series, cut from the slices they need."""

from __future__ import annotations

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
    places, counts = _grid(series, position, size), _counts(series)
    axes = [_between(place, count) for place, count in zip(places, counts, strict=True)]
    (x0, x1), (y0, y1), (z0, z1) = ((int(low.min()), int(low.max()) + 2) for low, _ in axes)
    stack = np.stack([read_slice(index)[y0:y1, x0:x1] for index in range(z0, z1)]).transpose(2, 1, 0)
    near = [(low - start, weight) for start, (low, weight) in zip((x0, y0, z0), axes, strict=True)]
    cube = _interpolate(np.maximum(stack, AIR).astype(np.float32), near).round().astype(np.int16)
    for axis, (place, count) in enumerate(zip(places, counts, strict=True)):
        np.moveaxis(cube, axis, 0)[(place < -0.5) | (place > count - 0.5)] = AIR
    return cube


def needed_slices(series: DicomSeries, position: np.ndarray, size: int) -> range:
    """Give the slices that `cut_image` reads."""
    low, _ = _between(_grid(series, position, size)[2], len(series.files))
    return range(int(low.min()), int(low.max()) + 2)


def cut_masks(series: DicomSeries, nodule: Nodule, size: int) -> np.ndarray:
    """Bring a nodule's masks to its cube's grid: bool, (readers, X, Y, Z), RAS.

    Each reader's mask is interpolated linearly as the image is, and holds where it is a half or more. One so small that
    it is a half nowhere is the voxel nearest to its middle.
    """
    places = _grid(series, nodule.position, size)
    cubes = np.zeros((len(nodule.masks), size, size, size), bool)
    axes, window = [], []
    for place, start, length, count in zip(places, nodule.start, nodule.masks.shape[1:], _counts(series), strict=True):
        near = place.clip(0, count - 1) - start + 1  # in the masks with a voxel more on each side
        inside = (near > 0) & (near < length + 1) & (place >= -0.5) & (place <= count - 0.5)
        axes.append(_between(near[inside], length + 2))
        window.append(np.flatnonzero(inside))
    for cube, mask in zip(cubes, np.pad(nodule.masks, [(0, 0), (1, 1), (1, 1), (1, 1)]), strict=True):
        cube[np.ix_(*window)] = _interpolate(mask.astype(np.float32), axes) >= 0.5
        if not cube.any() and mask.any():
            middle = np.argwhere(mask).mean(axis=0) - 1 + nodule.start
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


def _between(places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The voxel below each place, and how far it is to the next, from 0 to 1."""
    places = places.clip(0, count - 1)
    low = np.minimum(places.astype(int), count - 2)
    return low, (places - low).astype(np.float32)


def _interpolate(volume: np.ndarray, axes: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    for axis, (low, weight) in enumerate(axes):
        weight = weight.reshape([-1 if a == axis else 1 for a in range(3)])
        volume = volume.take(low, axis) * (1 - weight) + volume.take(low + 1, axis) * weight
    return volume
