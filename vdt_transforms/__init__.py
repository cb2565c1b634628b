"""The variable dimension transform and what stands around it, as MONAI array and dictionary transforms.

Conventions, for every transform of this package:

- A natural image is (channels, rows, columns) = (3, H, W), RGB, 0..255, as Pillow shows it: MONAI's own Pillow reader
  transposes unless it gets `reverse_indexing=False`.
- Read as a volume it is (1, 3, H, W), depth first: one channel, three slices, rows, columns.
- A stack of slices is (slices, X, Y), from the head to the feet, X along the columns and Y down the rows of a slice;
  its boxes are (x1, y1, x2, y2), as MONAI's box transforms take them.
- A medical volume keeps MONAI's order (C, X, Y, Z); voxel sizes are in mm, CT values in HU.
- The dictionary version of a transform has its name and a `d`; all keys share one draw.
- Inputs are never changed in place. Random transforms draw from `self.R` alone.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from vdt_transforms.checks import CheckFinite, CheckFinited, CheckLabels, CheckLabelsd, CheckOverflow, CheckOverflowd
from vdt_transforms.grids import RestoreGrid, RestoreGridd, Spacing, Spacingd
from vdt_transforms.intensity import NormalizeWindow, NormalizeWindowd
from vdt_transforms.natural_images import (
    ImageDecodeError,
    LoadNaturalImage,
    LoadNaturalImaged,
    RandResizedCropImage,
    RandResizedCropImaged,
    ResizeCenterCropImage,
    ResizeCenterCropImaged,
)
from vdt_transforms.nodules import CropNodule, CropNoduled, RandRotateCube, RandRotateCubed
from vdt_transforms.readers import NoduleReader, ReadClass, ReadClassd, SeriesReader, SliceFolderReader, VolumeReader
from vdt_transforms.slice_stacks import SliceStackReader, SliceStackReaderd
from vdt_transforms.stack_augmentation import RandFlipSlices, RandFlipSlicesd, RandResizeStack, RandResizeStackd
from vdt_transforms.vdt import (
    MEAN,
    STD,
    ImageToVolume,
    ImageToVolumed,
    InterpolateSlices,
    InterpolateSlicesd,
    RandSliceDrift,
    RandSliceDriftd,
    RandSliceShuffle,
    RandSliceShuffled,
    VolumeToImage,
)
from vdt_transforms.volumes import (
    ForegroundSlices,
    ForegroundSlicesd,
    RandFlipLeftRightd,
    RandRotateScale,
    RandRotateScaled,
    RandSlab,
    RandSlabd,
    RandTurnedCropd,
)

__all__ = ["MEAN", "STD", "CheckFinite", "CheckFinited", "CheckLabels", "CheckLabelsd", "CheckOverflow"]
__all__ += ["CheckOverflowd", "CropNodule", "CropNoduled", "ForegroundSlices", "ForegroundSlicesd"]
__all__ += ["ImageDecodeError", "ImageToVolume", "ImageToVolumed", "InterpolateSlices", "InterpolateSlicesd"]
__all__ += ["LoadNaturalImage", "LoadNaturalImaged", "NoduleReader", "NormalizeWindow", "NormalizeWindowd"]
__all__ += ["RandFlipLeftRightd", "RandFlipSlices", "RandFlipSlicesd", "RandResizeStack", "RandResizeStackd"]
__all__ += ["RandResizedCropImage", "RandResizedCropImaged", "RandRotateCube", "RandRotateCubed"]
__all__ += ["RandRotateScale", "RandRotateScaled", "RandSlab", "RandSlabd", "RandSliceDrift", "RandSliceDriftd"]
__all__ += ["RandSliceShuffle", "RandSliceShuffled", "RandTurnedCropd", "ReadClass", "ReadClassd"]
__all__ += ["ResizeCenterCropImage", "ResizeCenterCropImaged", "RestoreGrid", "RestoreGridd", "SeriesReader"]
__all__ += ["SliceFolderReader", "SliceStackReader", "SliceStackReaderd", "Spacing", "Spacingd", "VolumeReader"]
__all__ += ["VolumeToImage"]

# MONAI passes over an `import` that fails, so that a file that hides vdt_workflows would go unnamed.
_other = find_spec(__name__.replace("vdt_transforms", "vdt_workflows"))
_place = Path(__file__).resolve().parents[1] / "vdt_workflows"
if _other is not None and _other.origin and Path(_other.origin).resolve().parent != _place:
    _sentence = f"{_other.origin}: hides the package vdt_workflows in {_place}; rename it, or start in another folder"
    raise (SystemExit if Path(sys.argv[0]).name == "__main__.py" else ImportError)(_sentence)
