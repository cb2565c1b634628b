"""What MONAI Label labels: volumes of a folder, DICOM series, of which it wants volumes, or a DICOMweb store."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from vdt_transforms.dicom_folders import list_series
from vdt_transforms.geometry import to_nifti
from vdt_workflows.files import write_atomic
from vdt_workflows.naming import bare_name

VOLUMES = (".nii.gz", ".nii", ".nrrd")  # that MONAI Label takes, directly in its folder
SEG_WRITER = "itkimage2segimage"  # of dcmqi, by which MONAI Label writes the DICOM SEG that it stores by DICOMweb
logger = logging.getLogger(__name__)


def find_studies(studies: str, folder: Path, path: str) -> str:
    """Give what MONAI Label takes as its studies: an address, or a folder of volumes.

    Args:
        studies: an address of a DICOMweb store, a folder of volumes, or a folder or zip archive with DICOM series.
        folder: in which the DICOM series of each source get a folder, as `<SeriesInstanceUID>.nii.gz`; one that is
            there already is kept, and so are labels beside it.
        path: of MONAI Label's environment, as in the variable PATH.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds volumes and DICOM series, or no series of it can be used, or an archive holds none; or
            if MONAI Label lacks the program that writes DICOM SEG.
    """
    if studies.startswith(("http://", "https://")):
        if shutil.which(SEG_WRITER, path=path) is None:
            raise ValueError(
                f"{studies}: MONAI Label stores labels by {SEG_WRITER}, which its environment lacks and it would"
                " download; install it there with: pip install dcmqi"
            )
        return studies
    source = Path(studies)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder of studies")
    volumes = [file.name for file in source.iterdir() if file.name.endswith(VOLUMES)] if source.is_dir() else []
    series = list_series(source)
    if volumes and series:
        raise ValueError(
            f"{source}: holds {len(volumes)} volumes, such as {volumes[0]}, and {len(series)} DICOM series; serve them"
            " from folders of their own"
        )
    if not series and source.is_dir():
        if not volumes:
            logger.warning("%s: no volume (%s) in it, and no DICOM series below it", source, ", ".join(VOLUMES))
        return str(source.absolute())
    refused: list[str] = []
    own = folder / f"{bare_name(source)}-{hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:8]}"
    for one in series.values():
        number = f"-{one.number.partition('-')[2]}" if "-" in one.number else ""  # of a point of time or an echo
        target = own / f"{one.uid}{number}.nii.gz"
        try:
            one.check()
            if not target.exists():
                write_atomic(target, to_nifti(one.read(), one.affine, level=1))
        except ValueError as error:
            refused.append(str(error))
            logger.warning("%s; left out", error)
    if len(refused) == len(series):
        first = f"; the first: {refused[0]}" if refused else ""
        raise ValueError(f"{source}: none of its {len(series)} DICOM series can be served{first}")
    logger.info("%s: %d DICOM series as volumes in %s", source, len(series) - len(refused), own)
    return os.path.abspath(own)
