"""Every bundle, run as a user runs it, on tiny data; a new folder in bundles/ is tested by being there."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision
from monai.bundle import ConfigWorkflow
from monai.data import load_net_with_metadata
from monai.engines import SupervisedTrainer
from PIL import Image
from pydicom import dcmread

from networks import GenesisUNet3D, ResNet2D, ResNet3D, load_pretrained
from networks.conversion import to_2d, to_3d
from tests.makers.dicom import write_series
from tests.makers.nodules import write_published, write_published_split
from tests.makers.volumes import write_volume
from tests.support.bundle_runs import (
    BASE,
    BUNDLES,
    ROOT,
    TINY,
    config_files,
    history,
    infer,
    parse,
    places,
    read,
    remembered,
    rows,
    run,
    same_weights,
    sentence,
    weights,
)
from tests.support.documents import blocks
from vdt_transforms.dicom_folders import find_series
from vdt_workflows.training.initialisation import initialise

BCV, LITS, NODULES, DETECTION, PRETRAINING = (
    ROOT / "bundles" / name
    for name in (
        "bcv_multiorgan_segmentation",
        "lits_liver_segmentation",
        "lidc_nodule_classification",
        "deeplesion_lesion_detection",
        "imagenet_vdt_pretraining",
    )
)
# What a training leaves in `models`, but for two bundles with more.
LEFT = ["model.pt", "model_last.pt", "run.json"]
FILES = {
    "imagenet_vdt_pretraining": ["encoder.pt", "model.pt", "model_best.pt", "run.json"],
    "lidc_nodule_classification": [*LEFT, "split.json"],
    "lidc_nodule_segmentation": [*LEFT, "split.json"],
}
# The score of a bundle, the weights that gave its last one in training, and what else evaluation needs to repeat it.
DICE = ("val_mean_dice", "model_last.pt", {})
SCORES = {
    "imagenet_vdt_pretraining": ("val_top1", "model.pt", {}),
    "lidc_nodule_classification": ("val_auc", "model_last.pt", {"part": "validation"}),
    "lidc_nodule_segmentation": ("val_mean_dice", "model_last.pt", {"part": "validation"}),
    "deeplesion_lesion_detection": ("val_froc_at_16", "model_last.pt", {"part": "validation"}),
}


# What the runs do --------------------------------------------------------------------------------------------------


def test_training_leaves_its_files_and_a_history(bundle, trained):
    folder = trained(bundle)
    left = sorted(path.name for path in (folder / "models").iterdir())
    assert left == [".vdt.lock", ".vdt_run.json", *FILES.get(bundle.name, LEFT)]
    assert [row["epoch"] for row in history(folder)] == ["1", "2"]
    assert Image.open(folder / "eval" / "curves.png").size[0] > 500
    assert not (folder / "eval" / "resume.pt").exists()


def run_twice(bundle, folder, data, monkeypatch, **more) -> None:
    """Break a training in its second epoch, and start it again."""
    iteration = SupervisedTrainer._iteration

    def breaking(self, engine, batch):
        if engine.state.epoch == 2:
            raise KeyboardInterrupt
        return iteration(self, engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "_iteration", breaking)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run(bundle, BASE, folder, data, **more)
    assert (folder / "eval" / "resume.pt").is_file()
    run(bundle, BASE, folder, data, **more)


def test_a_run_that_breaks_goes_on_and_ends_with_the_same_weights(bundle, data, trained, tmp_path, monkeypatch):
    run_twice(bundle, tmp_path, data, monkeypatch)
    assert same_weights(trained(bundle) / "models", tmp_path / "models")
    assert history(trained(bundle)) == history(tmp_path)


def test_properties_are_all_there_and_the_network_without_data(bundle, data, volumes, trained, tmp_path):
    folder = trained(bundle)
    settings = {**TINY[bundle.name], **places(bundle, tmp_path, BASE), "num_classes": 2}
    given = {"workflow_type": "train", "dataset_dir": "nowhere", "logging_file": False, **settings}
    workflow = ConfigWorkflow(config_file=config_files(bundle, BASE), **given)
    workflow.initialize()
    assert isinstance(workflow.network_def, torch.nn.Module)
    searched = volumes / "images" if bundle.name == "deeplesion_lesion_detection" else data
    for names, kind in ((BASE, "train"), (["inference"], "inference")):
        settings = TINY[bundle.name] if kind == "train" else remembered(folder)
        workflow = ConfigWorkflow(
            config_file=config_files(bundle, names),
            meta_file=str(bundle / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type=kind,
            bundle_root=str(bundle),
            dataset_dir=str(data if kind == "train" else searched),
            **settings,
            **places(bundle, tmp_path, names),
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.finalize()


def test_evaluation_repeats_the_score_of_training(bundle, data, trained, tmp_path):
    folder = trained(bundle)
    name, file, more = SCORES.get(bundle.name, DICE)
    run(bundle, ["train", "evaluate"], tmp_path, data, ckpt_path=str(folder / "models" / file), **more)
    scores = read(tmp_path / "eval" / "scores.json")
    assert scores[name] == pytest.approx(float(history(folder)[-1][name]), abs=1e-6)


@pytest.mark.slow
def test_evaluation_and_inference_again_write_the_same_files(bundle, data, images, nodules, volumes, trained, tmp_path):
    """Byte for byte, but for pictures, the time, and the words that name the run's own folders."""
    models = trained(bundle) / "models"
    _, name, more = SCORES.get(bundle.name, DICE)
    inputs = {"imagenet": images / "val" / "red", "lidc": nodules / "images"}
    source = inputs.get(bundle.name.partition("_")[0], volumes / "images" / "case0.nii.gz")
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        run(bundle, ["train", "evaluate"], folder / "evaluate", data, ckpt_path=str(models / name), **more)
        infer(bundle, models, folder / "inference", source, ckpt_path=str(models / name))
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".png"]
        written.append({str(file.relative_to(folder)): _content(file, folder) for file in files})
    assert written[0] == written[1]
    assert any(file.startswith("inference") for file in written[0])
    assert "evaluate/eval/scores.json" in written[0]


def _content(file: Path, folder: Path) -> bytes:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return re.sub(rb'"started": "[^"]+"', b"", data.replace(str(folder).encode(), b""))


def test_inference_of_pretraining_writes_the_top_classes(images, trained, tmp_path):
    infer(PRETRAINING, trained(PRETRAINING) / "models", tmp_path, images / "val" / "red")
    found = read(tmp_path / "eval" / "predictions.json")
    assert len(found) == 3
    assert {guess["class"] for guess in found[0]["top"]} == {"red", "green", "blue"}
    assert sum(guess["probability"] for guess in found[0]["top"]) == pytest.approx(1, abs=1e-5)
    assert len(rows(tmp_path / "eval" / "predictions.csv")) == 9


def test_inference_of_segmentation_keeps_the_grid_of_the_input(volumes, trained, tmp_path):
    image = volumes / "images" / "case0.nii.gz"
    infer(BCV, trained(BCV) / "models", tmp_path, image, spacing=[1.0, 1.5, 1.0])
    written, source = nib.load(tmp_path / "eval" / "case0_seg.nii.gz"), nib.load(image)
    assert written.shape == source.shape
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)


def test_inference_of_detection_writes_boxes_of_whole_volumes(volumes, trained, tmp_path):
    infer(DETECTION, trained(DETECTION) / "models", tmp_path, volumes / "images" / "case0.nii.gz", least_score=0.01)
    found = read(tmp_path / "eval" / "case0_lesions.json")
    assert found["lesions"]
    markups = read(tmp_path / "eval" / "case0_lesions.mrk.json")["markups"]
    assert [m["center"] for m in markups] == [lesion["center_lps_mm"] for lesion in found["lesions"]]


def test_detection_is_called_as_monai_label_calls_it(volumes, trained):
    parser = parse(DETECTION, ["inference"], **remembered(trained(DETECTION)), least_score=0.01, device="cpu")
    data = parser.get_parsed_content("preprocessing")({"image": str(volumes / "images" / "case0.nii.gz")})
    detector = parser.get_parsed_content("detector")
    parser.get_parsed_content("detector_ops")
    detector.network = parser.get_parsed_content("network_def").eval()
    with torch.no_grad():
        outputs = detector(data["image"][None].to("cpu"), use_inferer=True)
    data.update(outputs[0])
    voxels = data["box"].clone()
    data = parser.get_parsed_content("postprocessing")(data)
    assert len(voxels)
    assert data["label"].tolist() == [0] * len(voxels)
    spacing = torch.tensor([1.0, 1.0, 2.0])  # of the volumes, whose first axis points left already
    torch.testing.assert_close(data["box"][:, 3:].float(), (voxels[:, 3:] - voxels[:, :3]) * spacing)
    world = (voxels[:, :3] + voxels[:, 3:]) / 2  # in LPI; the file is LAS with its origin at the first voxel
    lps = torch.stack([world[:, 0], world[:, 1] - 21, (14 - world[:, 2]) * 2], 1)
    torch.testing.assert_close(data["box"][:, :3].float(), lps, atol=1e-3, rtol=0)


def test_the_paper_protocol_is_remembered_and_changes_what_it_names(key_slices, tmp_path):
    run(DETECTION, ["train", "paper"], tmp_path, key_slices, epochs=1)
    record = read(tmp_path / "models" / "run.json")
    assert record["pad_value"] == 0
    noted = {name: record["_run_"][name] for name in ("protocol", "noisy", "reference")}
    assert noted == {"protocol": "paper", "noisy": "keep", "reference": True}


def test_inference_of_segmentation_reads_a_dicom_folder(trained, tmp_path):
    hu = np.random.default_rng(0).integers(-400, 400, (20, 22, 15))
    write_series(tmp_path / "scans" / "ct", hu, spacing=(0.8, 0.7, 2.5), origin=(-20.0, -10.0, -100.0))
    infer(BCV, trained(BCV) / "models", tmp_path, tmp_path / "scans")
    written = nib.load(tmp_path / "eval" / "ct_seg.nii.gz")
    assert written.shape == (20, 22, 15)
    # DICOM's world runs to the left and the back, NIfTI's to the right and the front.
    np.testing.assert_allclose(np.abs(np.linalg.norm(written.affine[:3, :3], axis=0)), [0.8, 0.7, 2.5], atol=1e-5)
    np.testing.assert_allclose(written.affine @ [0, 0, 0, 1], [20, 10, -100, 1], atol=1e-4)
    assert read(tmp_path / "eval" / "inference.json")["volumes"] == [str(tmp_path / "scans" / "ct")]


@pytest.mark.parametrize("task", ["bcv_multiorgan", "lits_liver", "lidc_nodule"])
def test_inference_writes_a_dicom_seg_of_the_same_voxels_whatever_the_instance_numbers(answering, tmp_path, task):
    segread = pytest.importorskip("highdicom").seg.segread
    bundle = ROOT / "bundles" / f"{task}_segmentation"
    models = answering(bundle)
    hu = np.random.default_rng(0).integers(-400, 400, (20, 22, 15))
    fields = {"spacing": (0.8, 0.7, 2.5), "StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    for number, file in enumerate(write_series(tmp_path / "ct", hu, **fields)):
        dataset = dcmread(file)
        dataset.InstanceNumber = 1 + number * 4 % 15
        dataset.save_as(file)
    infer(bundle, models, tmp_path, tmp_path / "ct", output_format="dicom_seg", largest_component=[])
    nifti = np.asarray(nib.load(tmp_path / "eval" / "ct_seg.nii.gz").dataobj)
    written = segread(tmp_path / "eval" / "ct_seg.dcm")
    (series,) = find_series(tmp_path / "ct").series
    uids = [str(dcmread(file).SOPInstanceUID) for file in series.files]
    frames = written.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=False
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), nifti)
    assert 0.05 < (nifti > 0).mean() < 0.95
    names = read(models / "run.json")["label_names"]
    assert [item.SegmentLabel for item in written.SegmentSequence] == names[1:]


@pytest.mark.parametrize("task", ["deeplesion_lesion_detection", "lidc_nodule_classification"])
def test_inference_writes_a_structured_report_of_what_the_json_says(answering, tmp_path, task):
    srread = pytest.importorskip("highdicom").sr.srread
    hu = np.random.default_rng(0).integers(-400, 400, (20, 22, 15))
    write_series(tmp_path / "ct", hu, **{"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"})
    (tmp_path / "nodules.csv").write_text("column,row,slice\n9.5,10.5,7\n4,5,6\n")
    more = {"least_score": 0.01} if task.endswith("detection") else {"positions": str(tmp_path / "nodules.csv")}
    bundle = ROOT / "bundles" / task
    infer(bundle, answering(bundle), tmp_path, tmp_path / "ct", output_format="dicom_sr", **more)
    report = srread(tmp_path / "eval" / "ct_sr.dcm").content
    if task.endswith("detection"):
        scores = [lesion["score"] for lesion in read(tmp_path / "eval" / "ct_lesions.json")["lesions"]]
        groups = report.get_volumetric_roi_measurement_groups()
    else:
        scores = [nodule["malignancy"] for nodule in read(tmp_path / "eval" / "malignancy.json")["nodules"]]
        groups = report.get_planar_roi_measurement_groups()
        np.testing.assert_allclose([group.roi.value[0] for group in groups], [(10, 11), (4.5, 5.5)], atol=1e-3)
    assert len(groups) == len(scores) > 1
    written = [group.get_measurements()[0].value for group in groups]
    np.testing.assert_allclose(written, 100 * np.array(scores), atol=1e-3)


def test_inference_goes_on_without_a_bad_volume_when_asked(volumes, trained, tmp_path, caplog):
    shutil.copytree(volumes / "images", tmp_path / "images")
    bad = nib.load(tmp_path / "images" / "case1.nii.gz")
    spoilt = np.where(np.arange(bad.shape[0])[:, None, None] == 3, np.nan, bad.get_fdata()).astype(np.float32)
    write_volume(tmp_path / "images" / "case1.nii.gz", spoilt, affine=bad.affine)
    infer(BCV, trained(BCV) / "models", tmp_path, tmp_path / "images", on_error="skip")
    written = sorted(path.name for path in (tmp_path / "eval").glob("*_seg.nii.gz"))
    assert written == [f"case{i}_seg.nii.gz" for i in (0, 2, 3, 4, 5)]
    assert "case1.nii.gz: 330 voxels are NaN or infinite" in caplog.text


def test_tumours_are_liver_or_a_class_of_their_own(volumes, trained, tmp_path):
    run(LITS, BASE, tmp_path, volumes, epochs=1, label_names=["background", "liver", "tumour"])
    last = "network.decode_head.conv_seg.weight"
    assert [len(weights(f / "models" / "model.pt")[last]) for f in (tmp_path, trained(LITS))] == [3, 2]


@pytest.mark.slow
def test_a_segmentation_learns_its_two_balls(volumes, tmp_path):
    settings = {"learning_rate": 0.1, "norm": "instance", "steps_per_epoch": 20}
    run(BCV, ["train", "paper"], tmp_path, volumes, **settings)
    assert float(history(tmp_path)[-1]["val_mean_dice"]) > 0.3  # scores 0.0 untrained


def test_the_2d_twin_is_pretrained_on_the_same_images_and_starts_other_bundles(images, tmp_path, caplog):
    pair, models = ["train", "two_dimensional"], tmp_path / "models"
    run(PRETRAINING, pair, tmp_path, images, epochs=1, channels_last=True)
    tensors = weights(models / "encoder.pt")
    assert tensors["conv1.weight"].shape == (4, 3, 7, 7)
    assert tensors["layer2.0.downsample.0.weight"].shape == (8, 4, 1, 1)
    assert set(tensors) == {name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")}
    more = {"args_file": str(models / "run.json"), "ckpt_path": str(models / "model.pt")}
    run(PRETRAINING, [*pair, "evaluate"], tmp_path, images, **more)
    score = float(history(tmp_path)[-1]["val_top1"])
    assert read(tmp_path / "eval" / "scores.json")["val_top1"] == pytest.approx(score, abs=1e-6)
    infer(PRETRAINING, models, tmp_path, images / "val" / "red", "two_dimensional")
    assert len(read(tmp_path / "eval" / "predictions.json")) == 3
    with caplog.at_level("INFO", logger="networks.weights"):
        initialise(ResNet3D(18, base_channels=4), "i3d", models / "encoder.pt")
    assert "100 tensors matched, 1 folded, 0 skipped, 0 left random" in caplog.text
    assert "made 3D (20): conv1.weight" in caplog.text


def test_the_controls_of_pretraining_change_what_they_name(images, trained, tmp_path):
    run(PRETRAINING, BASE, tmp_path, images, epochs=1, grey=True, shuffle_labels=True)
    record = read(tmp_path / "models" / "run.json")
    assert record["grey"] is True
    assert (record["_run_"]["shuffle_labels"], record["_run_"]["shuffle_slices"]) == (True, True)
    settings = {**TINY[PRETRAINING.name], "dataset_dir": str(images)}
    sample = parse(PRETRAINING, grey=True, **settings).get_parsed_content("train::dataset")[0]["image"]
    assert torch.equal(sample, sample[:, :1].expand_as(sample))
    samples = parse(PRETRAINING, shuffle_slices=False, **settings).get_parsed_content("train::dataset")
    brightest = [int(samples[i]["image"].float().mean((0, 2, 3)).argmax()) for i in range(len(samples))]
    labels = [["red", "green", "blue"][i] for i in brightest]
    assert labels == [samples.data.classes[samples.data[i]["label"]] for i in range(len(samples))]


@pytest.mark.parametrize("name", ["medicalnet", "genesis"])
def test_a_segmentation_starts_from_another_medical_network(name, volumes, tmp_path, caplog):
    source = ResNet3D(18, base_channels=4, shortcut="A") if name == "medicalnet" else GenesisUNet3D(5, base_channels=4)
    state = {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    torch.save(state, tmp_path / "theirs.pt")
    given = {"init": name, "pretrained": str(tmp_path / "theirs.pt"), "steps_per_epoch": 1, "epochs": 1}
    with pytest.raises(RuntimeError) as caught:
        run(BCV, BASE, tmp_path, volumes, **given)
    assert f"configs/{name}.yaml" in sentence(caught.value)
    with caplog.at_level("INFO", logger="networks.weights"):
        run(BCV, [*BASE, name], tmp_path, volumes, **given)
    assert f"{len(state['state_dict']) - 2 * (name == 'genesis')} tensors matched" in caplog.text
    image = volumes / "images" / "case0.nii.gz"
    infer(BCV, tmp_path / "models", tmp_path, image, name)
    assert (tmp_path / "eval" / "case0_seg.nii.gz").is_file()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        infer(BCV, tmp_path / "models", tmp_path, image)
    reason = {"medicalnet": "shortcut='A' (here 'B')", "genesis": "made by another architecture"}[name]
    assert reason in sentence(caught.value)


def test_a_strided_stem_is_remembered_for_inference(volumes, tmp_path):
    run(BCV, BASE, tmp_path, volumes, stem="strided", steps_per_epoch=1, epochs=1)
    assert remembered(tmp_path)["stem"] == "strided"
    image = volumes / "images" / "case0.nii.gz"
    infer(BCV, tmp_path / "models", tmp_path, image)
    assert (tmp_path / "eval" / "case0_seg.nii.gz").is_file()
    with pytest.raises((RuntimeError, ValueError)) as caught:  # so it had been taken from run.json
        infer(BCV, tmp_path / "models", tmp_path, image, stem="unet")
    assert "stem='strided' (here 'unet')" in sentence(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["acs", "2.5d"])
def test_flat_kernels_are_trained_through_a_break_and_saved_native(volumes, tmp_path, monkeypatch, init):
    torch.manual_seed(0)
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    settings = {"init": init, "pretrained": str(tmp_path / "image.pt"), "steps_per_epoch": 1}
    run(BCV, BASE, tmp_path / "whole", volumes, **settings)
    run_twice(BCV, tmp_path / "broken", volumes, monkeypatch, **settings)
    models = tmp_path / "whole" / "models"
    assert same_weights(models, tmp_path / "broken" / "models")
    start = ResNet3D(18, base_channels=4)
    load_pretrained(start, tmp_path / "image.pt", conversion=init)
    kernel = weights(models / "model_last.pt")["network.backbone.layer2.0.conv1.weight"]
    assert kernel.shape[2:] == (3, 3, 3)
    assert torch.equal(to_3d(to_2d(kernel, init), init), kernel)  # nothing outside the planes
    assert not torch.equal(kernel, start.layer2[0].conv1.weight)  # and trained
    infer(BCV, models, tmp_path, volumes / "images" / "case0.nii.gz")
    assert (tmp_path / "eval" / "case0_seg.nii.gz").is_file()


@pytest.mark.parametrize(
    ("bundle", "overlays", "start", "report"),
    [
        (PRETRAINING, ["finetune"], PRETRAINING / "encoder.pt", "120 tensors matched, 0 folded, 0 skipped"),
        (BCV, [], PRETRAINING / "encoder.pt", "120 tensors matched, 0 folded, 0 skipped"),
        (NODULES, [], PRETRAINING / "encoder.pt", "120 tensors matched, 0 folded, 0 skipped, 2 left random"),
        (NODULES, ["finetune"], NODULES / "model.pt", "122 tensors matched, 0 folded, 0 skipped, 0 left random"),
    ],
)
def test_a_training_starts_from_pretrained_weights(bundle, overlays, start, report, data_of, trained, tmp_path, caplog):
    given = {"pretrained": str(trained(start.parent) / "models" / start.name), "epochs": 1}
    with caplog.at_level("INFO", logger="networks.weights"):
        run(bundle, [*BASE, *overlays], tmp_path, data_of(bundle), **given, **({} if overlays else {"init": "vdt"}))
    assert report in caplog.text
    assert bundle == PRETRAINING or read(tmp_path / "models" / "run.json")["_run_"]["init"] == "vdt"


@pytest.mark.slow
def test_the_exported_network_answers_as_the_trained_one(bundle, trained, tmp_path):
    folder = trained(bundle)
    exported = tmp_path / "model.ts"
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(folder / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=[*config_files(bundle, ["inference"]), str(folder / "models" / "run.json")],  # as documented
    )
    _, _, carried = load_net_with_metadata(exported, more_extra_files=["inference.json", "run.json"])
    assert json.loads(carried["run.json"]) == read(folder / "models" / "run.json")
    assert "network_def" in json.loads(carried["inference.json"])
    network = parse(bundle, ["inference"], **remembered(folder)).get_parsed_content("network_def").eval()
    network.load_state_dict(weights(folder / "models" / "model.pt"))
    special = {"imagenet_vdt_pretraining": (2, 1, 3, 40, 33), "deeplesion_lesion_detection": (1, 9, 64, 70)}
    x = torch.randn(special.get(bundle.name, (1, 1, 19, 33, 21)))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(exported)(x), network(x))


# What wrong input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda image, label: (image[:-1], label), "has shape"),
        (lambda image, label: (image, label, np.diag([-1.0, 1, 3, 1])), "affine differs"),
        (lambda image, label: (image, label + 7), "label values"),
        (lambda image, label: (np.where(label == 1, np.nan, image), label), "NaN"),
    ],
    ids=["shape", "affine", "label value", "NaN voxels"],
)
def test_a_spoilt_volume_is_named_in_one_sentence(volumes, tmp_path, spoil, reason):
    data = tmp_path / "data"
    shutil.copytree(volumes, data)
    image, label = (nib.load(data / name / "case2.nii.gz") for name in ("images", "labels"))
    new_image, new_label, *affine = spoil(image.get_fdata(), np.asarray(label.dataobj))
    write_volume(data / "images" / "case2.nii.gz", new_image, affine=image.affine)
    write_volume(data / "labels" / "case2.nii.gz", new_label, affine=[label.affine, *affine][-1], dtype=np.uint8)
    with pytest.raises(RuntimeError) as caught:
        run(BCV, BASE, tmp_path, data)
    assert "case2.nii.gz" in sentence(caught.value)
    assert reason in sentence(caught.value)


# What the documents promise ----------------------------------------------------------------------------------------


DOCUMENTED = [
    pytest.param(bundle, block.replace("\\\n", " "), id=f"{bundle.name}-{number}")
    for bundle in BUNDLES
    for number, block in enumerate(blocks(bundle / "docs" / "README.md", "bash"))
]


@pytest.fixture(scope="module")
def given(images, volumes, nodules, key_slices, trained, tmp_path_factory):
    """What the words in capitals of the bundles' pages stand for."""
    root = tmp_path_factory.mktemp("given")
    write_published(root / "published", patients=20, most=2, size=20)
    names = sorted(path.name for path in (root / "published").glob("*.npz"))
    write_published_split(root / "split.csv", names[len(names) // 3 :], names[: len(names) // 3])
    (root / "positions.csv").write_text("column,row,slice\n10,11,7\n")
    write_series(root / "ct", shape=(20, 22, 15), StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4")
    return {
        "DICOM_FOLDER": root / "ct",
        "IMAGES": images,
        "IMAGE_OR_FOLDER": images / "val",
        "POSITIONS": root / "positions.csv",
        "PUBLISHED": root / "published",
        "SPLIT_CSV": root / "split.csv",
        "ENCODER": trained(PRETRAINING) / "models" / "encoder.pt",
        "DEEPLESION": key_slices,
        "DETECTOR": trained(DETECTION) / "models" / "model_last.pt",
        **dict.fromkeys(("VOLUMES", "VOLUME_OR_FOLDER"), volumes),
        **dict.fromkeys(("NODULES", "CUBE_OR_FOLDER", "CROP"), nodules),
        **dict.fromkeys(("SCAN", "CT"), volumes / "images" / "case0.nii.gz"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "documented"), DOCUMENTED)
def test_every_command_of_the_documents_runs(bundle, documented, given, trained, preloaded, tmp_path):
    folder = tmp_path / bundle.name
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("models", "eval"))
    shutil.copytree(trained(bundle) / "models", folder / "models")
    words = [str(given.get(word, word)) for word in shlex.split(documented)]
    if "configs/train.yaml" in documented:
        for name, value in TINY[bundle.name].items():
            words += [f"--{name}", value if isinstance(value, str) else repr(value)]
        if "evaluate.yaml" not in documented:
            words += ["--overwrite", "true"]  # the folder has a finished run, for the commands that need one
    log = tmp_path / "log.txt"
    if words[0] == "python":
        status = preloaded.run(words[1:], folder, {}, log)
    else:
        assert words[:2] == ["torchrun", "--nproc_per_node=2"]
        status = preloaded.run(words[2:], folder, {}, log, processes=2)
    assert status == 0, log.read_text()[-6000:]
