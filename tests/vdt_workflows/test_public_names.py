"""The names people import. To take one away, or add one, change this list in the same commit."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "networks": """
        P3D P3DClassifier DepthFirst FlatConv3d GenesisUNet3D LesionDetector LoadReport NoduleFCN ResNet2D
        ResNet2DClassifier ResNet3D
        ResNet3DClassifier ResUNet3D VolumeLesionDetector constrain convert describe_encoder expand
        load_pretrained read_checkpoint
    """,
    "vdt_transforms": """
        MEAN STD CheckFinite CheckFinited CheckLabels CheckLabelsd CheckOverflow CheckOverflowd CropNodule
        CropNoduled ForegroundSlices ForegroundSlicesd ImageDecodeError ImageToVolume ImageToVolumed
        InterpolateSlices InterpolateSlicesd
        LoadNaturalImage LoadNaturalImaged NoduleReader NormalizeWindow NormalizeWindowd RandFlipLeftRightd
        RandFlipSlices RandFlipSlicesd RandResizeStack RandResizeStackd RandResizedCropImage
        RandResizedCropImaged RandRotateCube RandRotateCubed RandRotateScale
        RandRotateScaled RandSlab RandSlabd RandSliceDrift RandSliceDriftd
        RandSliceShuffle RandSliceShuffled RandTurnedCropd ReadClass ReadClassd ResizeCenterCropImage
        ResizeCenterCropImaged RestoreGrid RestoreGridd
        SeriesReader SliceFolderReader SliceStackReader SliceStackReaderd Spacing Spacingd
        VolumeReader VolumeToImage
    """,
    "vdt_workflows": """
        Attach AverageWeights CaseScores ClipGradients CubeInferer DeepSupervision DetectionReport DetectionScores
        KeepPace LoadWeights PacedRate PooledEncoder RememberRun ReportNodules ReportVolumes ResumeRun RunFolders
        RunLog SaveDicomSegd SaveLesions SaveMalignancy SavePredictions SaveScores SaveSplit SaveWeights SeedEpochs
        SeededCacheDataset
        SeededDataset SeededSampler SharedCrossEntropyLoss SharedDiceCELoss ShowProgress SkippedImages
        SlabInferer StepSchedule ValidateEpochs VolumeWriter
        add_losses check_command_line class_weights collate_images collate_key_slices
        describe_origin describe_split describe_weights embed find_images find_key_slices find_nodules
        find_pairs find_volumes find_weights first_weights fit_to_time hold initialise join_processes
        leave_folders leave_processes list_images list_nodules list_scans list_volumes list_weights
        load_encoder name_result pick_device pick_norm place polynomial_rate prepare_key_slices
        rates_by_layer share_batch share_out
        take_cases take_part unbatch_lesions warm_up weigh_classes writes_dicom
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_the_listed_ones_and_importable(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'networks' has no attribute 'ResNet4D'"):
        importlib.import_module("networks").ResNet4D  # noqa: B018  (the access is the test)


def test_networks_import_nothing_and_their_names_only_torch_but_for_the_detectors():
    code = """
import sys
import networks
assert "torch" not in sys.modules
for name in set(networks.__all__) - {"LesionDetector", "VolumeLesionDetector"}:
    getattr(networks, name)
heavy = {"torchvision", "monai", "ignite"} & set(sys.modules)
assert "torch" in sys.modules and not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
