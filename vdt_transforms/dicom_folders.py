"""The series of CT and MR that a folder, an archive, a file or a name stands for, with their headers read once."""

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vdt_transforms.dicom_headers import Header, Map, is_folder, read_header, read_headers
from vdt_transforms.dicom_series import (
    DicomSeries,
    along_normal,
    check_alike,
    check_places,
    check_straight,
    split_phases,
)

logger = logging.getLogger(__name__)

MOST_KEPT = 1000  # series whose headers are remembered
NAMED = "series-"  # begins the last part of the path of a series that shares its folder with others
_found: dict[str, tuple[list[tuple[int, int]], DicomSeries]] = {}  # by path, with the state of the files


@dataclass(frozen=True, eq=False)
class DicomFolder:
    """What a folder holds: its series, the files of each other kind, and what is wrong with those of no series."""

    series: tuple[DicomSeries, ...]
    skipped: dict[str, list[str]]
    damaged: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many files of each other kind there are, but for damaged ones."""
        return {kind: len(files) for kind, files in self.skipped.items() if kind != "damaged"}


def find_series(
    root: str | os.PathLike, *, modalities: Collection[str] = ("CT", "MR"), mapper: Map = map
) -> DicomFolder:
    """Find the series below a folder by what the headers say; names of files and folders mean nothing.

    MONAI's `PydicomReader` reads a folder as one series in the order of its instance numbers; several series in a
    folder, missing slices and copies go unnoticed. Here each series is apart, sorted by position, and checked. Points
    of time or echoes of one series are apart too.

    Args:
        root: the folder; headers of everything below it are read, also in zip archives.
        modalities: which to take, of "CT" and "MR".
        mapper: see `read_headers`.

    Returns:
        The series sorted by patient and uid. Those whose folder holds a damaged file have an error that names it.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    root = Path(root)
    slices: dict[str, list[Header]] = defaultdict(list)
    damaged: dict[str, list[Header]] = defaultdict(list)  # by series, or by folder where the series is not known
    localizers: list[Header] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for header in read_headers(root, mapper=mapper):
        if header.damaged:
            damaged[header.series_uid or os.path.dirname(header.path)].append(header)
        elif header.skipped or header.modality not in modalities:
            skipped[header.skipped or header.modality].append(str(root / header.path))
            localizers += [header] if header.skipped == "localizer" else []
        else:
            slices[header.series_uid].append(header)
    folders = {uid: sorted({os.path.dirname(header.path) for header in group}) for uid, group in slices.items()}
    held: dict[str, set[str]] = defaultdict(set)  # by folder, the series in it or below it
    for uid, place in ((uid, place) for uid, places in folders.items() for place in places):
        for above in ("", *(place[:i] for i, letter in enumerate(place) if letter == "/"), place):
            held[above].add(uid)
    claimed = slices.keys() | {place for places in folders.values() for place in places}
    stray = [group for key, group in sorted(damaged.items()) if key not in claimed]
    if stray:
        skipped["damaged"] = [str(root / header.path) for group in stray for header in group]
    numbers = {uid: group[0].number for uid, group in slices.items()}
    series: list[DicomSeries] = []
    for uid, group in slices.items():
        unique, notes = _leave_out_copies(root, group)
        for place in (place for place in folders[uid] if len(held[place]) > 1):
            notes.append(f"{root / place}: holds {len(held[place])} series, which are kept apart by their uid")
        near = [h for h in localizers if h.series_uid == uid or os.path.dirname(h.path) in folders[uid]]
        notes += [f"{root / header.path}: a localizer, left out" for header in near]
        errors = [describe_damage(root, damaged[key]) for key in (uid, *folders[uid]) if key in damaged]
        folder = os.path.commonpath(folders[uid]) if all(folders[uid]) else ""
        beside = [numbers[other] for other in held[folder]]
        name = numbers[uid] if numbers[uid] and beside.count(numbers[uid]) == 1 else uid
        phases = split_phases(unique)
        for count, phase in enumerate(phases, 1):
            part = f"-{count}" if len(phases) > 1 else ""
            path = root / folder / (f"{NAMED}{name}{part}" if part or len(beside) > 1 else "")
            series.append(_build(root, root / folder, path, f"{numbers[uid]}{part}", phase, notes, errors))
    series.sort(key=lambda s: (s.patient_id, s.uid, s.number))
    return DicomFolder(tuple(series), dict(sorted(skipped.items())), tuple(describe_damage(root, g) for g in stray))


def list_series(
    root: str | os.PathLike, *, series: str = "all", mapper: Map = map, left_out: dict[str, list[str]] | None = None
) -> dict[Path, DicomSeries]:
    """List the series of CT or MR below a folder, or that of one file, by the path that readers take for each.

    A warning names each file that is left out: a localizer, or a copy. What is found is remembered, so that the headers
    are not read again when the volume is.

    Args:
        root: the folder, a zip archive, or a file of a series, which is looked for in its folder.
        series: "all", or which to take: SeriesInstanceUID, SeriesNumber (`3`; `3-2` for its second point of time or
            echo), or SeriesDescription, where capitals do not matter.
        mapper: see `read_headers`.
        left_out: gets the other files and series of a folder, by the reason.

    Returns:
        The series, which may have errors of their own (see `DicomSeries.check`). Empty if there is none.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: naming a damaged file, if there are no others; or the series that there are, if none is as wanted.
    """
    root = Path(root)
    is_file = root.is_file() and not is_folder(root)
    found = find_series(root.parent if is_file else root, mapper=mapper)
    members = _series_of_file(root, found) if is_file else found.series
    for sentence in found.damaged:
        if not members:
            raise ValueError(sentence)
        logger.warning("%s; left out", sentence)
    wanted = str(series).strip().casefold()
    chosen = [s for s in members if wanted in ("all", s.uid, *_names(s))]
    if members and not chosen:
        raise ValueError(f"{root}: no series {series!r} in it; expected one of {describe_series(members)}")
    if left_out is not None and not is_file:
        left_out.update({**found.skipped, "series not chosen": [str(s.path) for s in members if s not in chosen]})
    for one in chosen:
        for note in one.notes if one.path == one.folder or len(chosen) == 1 else ():
            logger.warning("%s", note)
        _remember(one)
    return {one.path: one for one in chosen}


def find_one_series(path: str | os.PathLike) -> DicomSeries:
    """Find the one series of CT or MR that a path stands for (see `list_series` and `DicomSeries.path`).

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: naming the folder, if it holds no series or several, or a damaged file.
    """
    path = Path(path)
    if (known := _recall(path)) is not None:
        return known
    named = path.name.startswith(NAMED) and not path.exists() and is_folder(path.parent)
    by_path = list_series(path.parent if named else path, series=path.name[len(NAMED) :] if named else "all")
    if not by_path:
        raise ValueError(f"{path}: no DICOM series of CT or MR in it or below it")
    if len(by_path) > 1:
        raise ValueError(
            f"{path}: holds {len(by_path)} series ({describe_series(by_path.values())}); choose one by --series"
        )
    (series,) = by_path.values()
    _remember(replace(series, path=path))
    return series


def _names(series: DicomSeries) -> set[str]:
    own = series.path.name.removeprefix(NAMED) if series.path != series.folder else ""
    return {series.number, series.number.partition("-")[0], series.description.casefold(), own} - {""}


def describe_series(found: Iterable[DicomSeries]) -> str:
    """Name some series by number and uid; what people wrote into their headers is kept out of messages."""
    shown = [f"{s.number or 'without number'}: {s.uid} with {len(s.files)} images" for s in found]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _series_of_file(file: Path, found: DicomFolder) -> tuple[DicomSeries, ...]:
    """Find the series that a file belongs to, or say why it belongs to none."""
    header = read_header(file.parent, file.name)[0]
    if header.damaged:
        raise ValueError(f"{file}: {header.damaged}; copy or download it again")
    series = tuple(s for s in found.series if s.uid == header.series_uid)
    if header.skipped or not series:
        raise ValueError(f"{file}: no image of a CT or MR series ({header.skipped or header.modality})")
    return series


def _remember(series: DicomSeries) -> None:
    while len(_found) >= MOST_KEPT:
        _found.pop(next(iter(_found)))
    _found[os.path.abspath(series.path)] = (_stamp(series), series)


def _recall(path: Path) -> DicomSeries | None:
    stamp, series = _found.get(os.path.abspath(path), ([], None))
    return series if series is not None and _stamp(series) == stamp else None


def _stamp(series: DicomSeries) -> list[tuple[int, int]]:
    """Size and time of change of a series' files and folders, or of the archive that holds them."""
    places = dict.fromkeys([*series.files, *(file.parent for file in series.files), series.folder])
    found = []
    for place in places:
        there = next(path for path in (place, *place.parents) if os.path.exists(path))
        found.append(((status := os.stat(there)).st_size, status.st_mtime_ns))
    return found


# One series --------------------------------------------------------------------------------------------------------


def describe_damage(root: Path, headers: Sequence[Header]) -> str:
    """Say what is wrong with the first of some damaged files, and how many there are."""
    more = f" (and {len(headers) - 1} more damaged files)" if len(headers) > 1 else ""
    return f"{root / headers[0].path}: {headers[0].damaged}; copy or download it again{more}"


def _leave_out_copies(root: Path, group: Sequence[Header]) -> tuple[list[Header], list[str]]:
    once: dict[tuple, Header] = {}
    notes = []
    for header in group:
        kept = once.setdefault((header.sop_uid or header.path, *header.position), header)
        if kept is not header and kept.path != header.path:
            notes.append(f"{root / header.path}: the same image as {root / kept.path}, left out")
    return list(once.values()), notes


def _build(
    root: Path,
    folder: Path,
    path: Path,
    number: str,
    group: Sequence[Header],
    notes: Sequence[str],
    errors: Sequence[str],
) -> DicomSeries:
    first = group[0]
    where = f"{folder}: series {first.series_uid}"
    orientation = np.reshape(first.orientation, (2, 3))
    places = along_normal([header.position for header in group], orientation)
    order = sorted(range(len(group)), key=lambda i: (places[i], group[i].instance))
    in_order, irregularities = check_places([group[i] for i in order], places[order], root, where)
    positions = np.array([header.position for header in in_order])
    errors = [*errors, *check_alike(group, root, where)]
    if len(in_order) < 2:
        errors.append(f"{where} has one slice; a volume needs two or more")
    return DicomSeries(
        uid=first.series_uid,
        number=number,
        description=first.description,
        patient_id=first.patient_id,
        modality=first.modality,
        path=path,
        folder=folder,
        files=tuple(root / header.path for header in in_order),
        frames=tuple(header.frame for header in in_order),
        rescale=np.array([header.rescale or (1.0, 0.0) for header in in_order]),
        positions=positions,
        orientation=orientation,
        pixel_spacing=(first.pixel_spacing[0], first.pixel_spacing[1]),
        rows=first.rows,
        columns=first.columns,
        thickness=first.thickness,
        notes=tuple(notes),
        irregularities=tuple(irregularities),
        errors=tuple(errors or check_straight(positions, orientation, min(first.pixel_spacing), where)),
    )
