"""Every bundle, run as a user runs it, on tiny data; a new folder in bundles/ is tested by being there."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
import torchvision
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import SupervisedTrainer
from PIL import Image
from pydicom import dcmread

from networks import GenesisUNet3D, ResNet2D, ResNet3D, load_pretrained
from networks.conversion import to_2d, to_3d
from tests.makers.dicom import write_series
from tests.makers.nodules import write_published, write_published_split
from tests.support.bundle_runs import BASE, BUNDLES, ROOT, TINY, command, config_files, places, run
from vdt_transforms.dicom_series import find_series
from vdt_workflows.training.initialisation import initialise

SCHEMA = ROOT / "vdt_workflows" / "packaging" / "metadata_schema.json"

# Ids that an overlay may add to its base.
ADDED = {"ckpt_path", "part", "surfaces", "sync_bn", "local_rank", "initialised", "finalize", "pretrained", "+imports"}
ADDED |= {
    "class_weights",
    "recipe::class_weights",
    "intervals",
    "pictures",
    "scores",
    "network_def::network::shortcut",
    "network_def::network",
}
FILES = {
    "imagenet_vdt_pretraining": ["model.pt", "encoder.pt", "model_best.pt", "run.json"],
    "bcv_multiorgan_segmentation": ["model.pt", "model_last.pt", "run.json"],
    "lits_liver_segmentation": ["model.pt", "model_last.pt", "run.json"],
    "lidc_nodule_classification": ["model.pt", "model_last.pt", "run.json", "split.json"],
    "lidc_nodule_segmentation": ["model.pt", "model_last.pt", "run.json", "split.json"],
    "deeplesion_lesion_detection": ["model.pt", "model_last.pt", "run.json"],
}
# The score of a bundle, the weights that gave its last one in training, and what else evaluation needs to repeat it.
SCORES = {
    "imagenet_vdt_pretraining": ("val_top1", "model.pt", {}),
    "bcv_multiorgan_segmentation": ("val_mean_dice", "model_last.pt", {}),
    "lits_liver_segmentation": ("val_mean_dice", "model_last.pt", {}),
    "lidc_nodule_classification": ("val_auc", "model_last.pt", {"part": "validation"}),
    "lidc_nodule_segmentation": ("val_mean_dice", "model_last.pt", {"part": "validation"}),
    "deeplesion_lesion_detection": ("val_froc_at_16", "model_last.pt", {"part": "validation"}),
}


# What the folder holds ---------------------------------------------------------------------------------------------


def test_licence_and_logging_are_copies_of_one_original(bundle):
    assert (bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (bundle / "configs" / "logging.conf").read_bytes() == (BUNDLES[0] / "configs" / "logging.conf").read_bytes()


def test_metadata_meets_the_schema_and_its_changelog_has_the_version(bundle):
    meta = bundle / "configs" / "metadata.json"
    monai.bundle.verify_metadata(meta_file=str(meta), filepath=str(SCHEMA))
    content = json.loads(meta.read_text())
    assert content["version"] in content["changelog"]


def test_metadata_lists_what_the_package_requires(bundle):
    listed = json.loads((bundle / "configs" / "metadata.json").read_text())["required_packages_version"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)[1]
    required = set(re.findall(r'"([a-z-]+)[>=]', block)) - {"torch", "monai", "numpy"}
    assert set(listed) == required | {"jsonschema"}  # for `monai.bundle verify_metadata`


def test_labels_in_the_metadata_are_those_of_the_configs(bundle):
    names = ConfigParser.load_config_file(str(bundle / "configs" / "inference.yaml")).get("label_names")
    if names is None:
        pytest.skip("not a segmentation")
    channels = json.loads((bundle / "configs" / "metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
    assert [channels["channel_def"][str(i)] for i in range(len(names))] == names
    assert channels["num_channels"] == len(names)


# What the configs say ----------------------------------------------------------------------------------------------


def test_training_and_inference_share_what_is_marked_shared(bundle):
    train, inference = (ConfigParser.load_config_file(config_files(bundle, [n])[0]) for n in ("train", "inference"))
    marked = re.findall(r"^(\w+):.*# \[shared\]", (bundle / "configs" / "train.yaml").read_text(), re.MULTILINE)
    assert marked
    derived = {"class_names", "num_classes"}  # counted from the data in training, taken from run.json in inference
    for name in [n for n in marked if n not in derived]:
        assert inference[name] == train[name], name


def test_training_and_inference_prepare_images_alike(bundle):
    if bundle.name == "deeplesion_lesion_detection":
        pytest.skip("slices in training, volumes in inference: tests/networks/test_volume_detector.py compares them")
    train, inference = (ConfigParser.load_config_file(config_files(bundle, [n])[0]) for n in ("train", "inference"))
    prepared = [train["validate"]["preprocessing"]["transforms"]]
    prepared += [train["train"]["deterministic_transforms"]] if "deterministic_transforms" in train["train"] else []
    for steps in prepared:
        own = [for_image(step) for step in steps if step["keys"] != "label"]
        assert own == inference["preprocessing"]["transforms"]
    if "inferer" in inference:
        assert inference["inferer"] == train["validate"]["inferer"]
    if "postprocessing" in inference:
        ours, theirs = (c["postprocessing"]["transforms"] for c in (train["validate"], inference))
        ours = [step for step in ours if step["keys"] != "label"]
        assert theirs[: len(ours)] == ours  # inference may go on, to save


def for_image(step: dict) -> dict:
    """Project a transform of image and label onto the image; a training crop may be larger, to be jittered."""
    step = dict(step, keys="image")
    if step["_target_"] == "ResizeWithPadOrCropd":
        step["spatial_size"] = "@patch_size"
    for name in ("mode", "dtype"):
        if isinstance(step.get(name), list):
            step[name] = step[name][0]
    return step


def test_overlays_name_only_ids_of_their_base(bundle):
    parser = ConfigParser(ConfigParser.load_config_file(config_files(bundle, BASE)[0]))
    for path in sorted((bundle / "configs").glob("*.yaml")):
        if path.stem in ("train", "inference"):
            continue
        for name in ConfigParser.load_config_file(str(path)):
            if name not in ADDED:
                assert name in parser, f"{path.name}: {name}"


def test_every_remembered_setting_is_an_id_of_inference(bundle):
    train, inference = (ConfigParser.load_config_file(config_files(bundle, [n])[0]) for n in ("train", "inference"))
    assert set(train["settings"]) <= set(inference)


# What the runs do --------------------------------------------------------------------------------------------------


def test_training_leaves_its_files_and_a_history(bundle, trained):
    folder = trained(bundle)
    assert sorted(path.name for path in (folder / "models").iterdir()) == sorted(FILES[bundle.name])
    with (folder / "eval" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert Image.open(folder / "eval" / "curves.png").size[0] > 500
    assert not (folder / "eval" / "resume.pt").exists()


def test_training_again_gives_the_same_weights(bundle, data, trained, tmp_path):
    first = trained(bundle)
    run(bundle, BASE, tmp_path, data)
    for path in (first / "models").glob("*.pt"):
        a, b = (torch.load(folder / "models" / path.name, weights_only=True) for folder in (first, tmp_path))
        assert all(torch.equal(a[name], b[name]) for name in a), path.name


def break_in_epoch_two(patch: pytest.MonkeyPatch) -> None:
    iteration = SupervisedTrainer._iteration

    def breaking(self, engine, batch):
        if engine.state.epoch == 2:
            raise KeyboardInterrupt
        return iteration(self, engine, batch)

    patch.setattr(SupervisedTrainer, "_iteration", breaking)


def test_a_run_that_breaks_goes_on_and_ends_with_the_same_weights(bundle, data, trained, tmp_path, monkeypatch):
    first = trained(bundle)
    with monkeypatch.context() as patch:
        break_in_epoch_two(patch)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run(bundle, BASE, tmp_path, data)
    assert (tmp_path / "eval" / "resume.pt").is_file()
    run(bundle, BASE, tmp_path, data)
    for path in (first / "models").glob("*.pt"):
        a, b = (torch.load(folder / "models" / path.name, weights_only=True) for folder in (first, tmp_path))
        assert all(torch.equal(a[name], b[name]) for name in a), path.name
    histories = [[r.rsplit(",", 1)[0] for r in (f / "eval" / "history.csv").read_text().splitlines()]
                 for f in (first, tmp_path)]  # fmt: skip
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_a_run_killed_twice_at_random_moments_ends_with_the_same_weights(images, tmp_path):
    bundle = ROOT / "bundles" / "imagenet_vdt_pretraining"
    run(bundle, BASE, tmp_path / "whole", images, epochs=8)
    words = [sys.executable, "-W", "ignore", "-m", *command(bundle, BASE, tmp_path / "killed", images, epochs=8)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: the order of sums is part of the bits
    models, state = tmp_path / "killed" / "models", tmp_path / "killed" / "eval" / "resume.pt"
    random, seen = np.random.default_rng(), 0
    for _ in range(2):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == seen):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.wait()
        seen = state.stat().st_mtime_ns if state.exists() else seen
        for path in models.glob("*.pt"):
            torch.load(path, weights_only=True)  # whole, or not there
    subprocess.run(words, check=True, capture_output=True, env=environment)
    for name in ("model.pt", "encoder.pt", "model_best.pt"):
        a, b = (torch.load(tmp_path / f / "models" / name, weights_only=True) for f in ("whole", "killed"))
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_properties_are_all_there(bundle, data, volumes, trained):
    folder = trained(bundle)
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
            **places(bundle, folder, names),
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.finalize()


def remembered(folder: Path) -> dict:
    settings = json.loads((folder / "models" / "run.json").read_text())
    return {k: v for k, v in settings.items() if k != "_run_"}


def test_evaluation_repeats_the_score_of_training(bundle, data, trained, tmp_path):
    folder = trained(bundle)
    name, weights, more = SCORES[bundle.name]
    run(bundle, ["train", "evaluate"], tmp_path, data, ckpt_path=str(folder / "models" / weights), **more)
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    with (folder / "eval" / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert scores[name] == pytest.approx(float(last[name]), abs=1e-6)


@pytest.mark.slow
def test_evaluation_and_inference_again_write_the_same_files(bundle, data, images, nodules, volumes, trained, tmp_path):
    """Byte for byte, but for pictures, the time, and the words that name the run's own folders."""
    models = trained(bundle) / "models"
    _, weights, more = SCORES[bundle.name]
    inputs = {"imagenet": images / "val" / "red", "lidc": nodules / "images"}
    source = inputs.get(bundle.name.partition("_")[0], volumes / "images" / "case0.nii.gz")
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        run(bundle, ["train", "evaluate"], folder / "evaluate", data, ckpt_path=str(models / weights), **more)
        settings = {"ckpt_path": str(models / weights), "args_file": str(models / "run.json")}
        run(bundle, ["inference"], folder / "inference", source, **settings)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".png"]
        written.append({str(file.relative_to(folder)): _content(file, folder) for file in files})
    assert written[0] == written[1]
    assert any(file.startswith("inference") for file in written[0])
    assert "evaluate/eval/scores.json" in written[0]


def _content(file: Path, folder: Path) -> bytes:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return re.sub(rb'"started": "[^"]+"', b"", data.replace(str(folder).encode(), b""))


def test_inference_of_pretraining_writes_the_top_classes(images, trained, tmp_path):
    bundle = ROOT / "bundles" / "imagenet_vdt_pretraining"
    folder = trained(bundle)
    shutil.copytree(folder / "models", tmp_path / "models")
    run(bundle, ["inference"], tmp_path, images / "val" / "red", args_file=str(folder / "models" / "run.json"))
    found = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert len(found) == 3
    assert {guess["class"] for guess in found[0]["top"]} == {"red", "green", "blue"}
    assert sum(guess["probability"] for guess in found[0]["top"]) == pytest.approx(1, abs=1e-5)
    with (tmp_path / "eval" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9


def test_inference_of_segmentation_keeps_the_grid_of_the_input(volumes, trained, tmp_path):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    folder = trained(bundle)
    shutil.copytree(folder / "models", tmp_path / "models")
    image = volumes / "images" / "case0.nii.gz"
    run(bundle, ["inference"], tmp_path, image, args_file=str(folder / "models" / "run.json"), spacing=[1.0, 1.5, 1.0])
    written, source = nib.load(tmp_path / "eval" / "case0_seg.nii.gz"), nib.load(image)
    assert written.shape == source.shape
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)


def test_inference_of_detection_writes_boxes_of_whole_volumes(volumes, trained, tmp_path):
    bundle = ROOT / "bundles" / "deeplesion_lesion_detection"
    folder = trained(bundle)
    shutil.copytree(folder / "models", tmp_path / "models")
    image = volumes / "images" / "case0.nii.gz"
    run(bundle, ["inference"], tmp_path, image, args_file=str(folder / "models" / "run.json"), least_score=0.01)
    found = json.loads((tmp_path / "eval" / "case0_lesions.json").read_text())
    assert found["lesions"]
    markups = json.loads((tmp_path / "eval" / "case0_lesions.mrk.json").read_text())["markups"]
    assert [m["center"] for m in markups] == [lesion["center_lps_mm"] for lesion in found["lesions"]]


def test_detection_is_called_as_monai_label_calls_it(volumes, trained):
    bundle = ROOT / "bundles" / "deeplesion_lesion_detection"
    parser = ConfigParser(ConfigParser.load_config_file(config_files(bundle, ["inference"])[0]))
    parser.update({**remembered(trained(bundle)), "bundle_root": str(bundle), "least_score": 0.01, "device": "cpu"})
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
    bundle = ROOT / "bundles" / "deeplesion_lesion_detection"
    run(bundle, ["train", "paper"], tmp_path, key_slices, epochs=1)
    record = json.loads((tmp_path / "models" / "run.json").read_text())
    assert record["pad_value"] == 0
    noted = {name: record["_run_"][name] for name in ("protocol", "noisy", "reference")}
    assert noted == {"protocol": "paper", "noisy": "keep", "reference": True}


def test_inference_of_segmentation_reads_a_dicom_folder(trained, tmp_path):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    folder = trained(bundle)
    hu = np.random.default_rng(0).integers(-400, 400, (20, 22, 15))
    write_series(tmp_path / "scans" / "ct", hu, spacing=(0.8, 0.7, 2.5), origin=(-20.0, -10.0, -100.0))
    shutil.copytree(folder / "models", tmp_path / "models")
    run(bundle, ["inference"], tmp_path, tmp_path / "scans", args_file=str(folder / "models" / "run.json"))
    written = nib.load(tmp_path / "eval" / "ct_seg.nii.gz")
    assert written.shape == (20, 22, 15)
    # DICOM's world runs to the left and the back, NIfTI's to the right and the front.
    np.testing.assert_allclose(np.abs(np.linalg.norm(written.affine[:3, :3], axis=0)), [0.8, 0.7, 2.5], atol=1e-5)
    np.testing.assert_allclose(written.affine @ [0, 0, 0, 1], [20, 10, -100, 1], atol=1e-4)
    record = json.loads((tmp_path / "eval" / "inference.json").read_text())
    assert record["volumes"] == [str(tmp_path / "scans" / "ct")]


@pytest.mark.parametrize("task", ["bcv_multiorgan", "lits_liver", "lidc_nodule"])
def test_inference_writes_a_dicom_seg_of_the_same_voxels_whatever_the_instance_numbers(trained, tmp_path, task):
    segread = pytest.importorskip("highdicom").seg.segread
    bundle = ROOT / "bundles" / f"{task}_segmentation"
    folder = trained(bundle)
    hu = np.random.default_rng(0).integers(-400, 400, (20, 22, 15))
    fields = {"spacing": (0.8, 0.7, 2.5), "StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    for number, file in enumerate(write_series(tmp_path / "ct", hu, **fields)):
        dataset = dcmread(file)
        dataset.InstanceNumber = 1 + number * 4 % 15
        dataset.save_as(file)
    settings = {"args_file": str(folder / "models" / "run.json"), "largest_component": []}
    shutil.copytree(folder / "models", tmp_path / "models")
    state = torch.load(folder / "models" / "model.pt", weights_only=True)
    *_, weight, bias = state
    torch.nn.init.normal_(state[weight], generator=torch.Generator().manual_seed(0))  # else it says: all background
    state[bias].zero_()
    torch.save(state, tmp_path / "models" / "model.pt")
    run(bundle, ["inference"], tmp_path, tmp_path / "ct", output_format="dicom_seg", **settings)
    nifti = np.asarray(nib.load(tmp_path / "eval" / "ct_seg.nii.gz").dataobj)
    written = segread(tmp_path / "eval" / "ct_seg.dcm")
    (series,) = find_series(tmp_path / "ct").series
    uids = [str(dcmread(file).SOPInstanceUID) for file in series.files]
    frames = written.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=False
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), nifti)
    assert 0.05 < (nifti > 0).mean() < 0.95
    names = json.loads((folder / "models" / "run.json").read_text())["label_names"]
    assert [item.SegmentLabel for item in written.SegmentSequence] == names[1:]


def test_inference_goes_on_without_a_bad_volume_when_asked(volumes, trained, tmp_path, caplog):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    folder = trained(bundle)
    shutil.copytree(volumes / "images", tmp_path / "images")
    bad = nib.load(tmp_path / "images" / "case1.nii.gz")
    spoilt = np.where(np.arange(bad.shape[0])[:, None, None] == 3, np.nan, bad.get_fdata()).astype(np.float32)
    nib.save(nib.Nifti1Image(spoilt, bad.affine), tmp_path / "images" / "case1.nii.gz")
    shutil.copytree(folder / "models", tmp_path / "models")
    settings = {"args_file": str(folder / "models" / "run.json"), "on_error": "skip"}
    run(bundle, ["inference"], tmp_path, tmp_path / "images", **settings)
    written = sorted(path.name for path in (tmp_path / "eval").glob("*_seg.nii.gz"))
    assert written == [f"case{i}_seg.nii.gz" for i in (0, 2, 3, 4, 5)]
    assert "case1.nii.gz: 330 voxels are NaN or infinite" in caplog.text


def test_tumours_are_liver_or_a_class_of_their_own(volumes, trained, tmp_path):
    bundle = ROOT / "bundles" / "lits_liver_segmentation"
    run(bundle, BASE, tmp_path, volumes, epochs=1, label_names=["background", "liver", "tumour"])
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    merged = torch.load(trained(bundle) / "models" / "model.pt", weights_only=True)
    last = "network.decode_head.conv_seg.weight"
    assert (len(state[last]), len(merged[last])) == (3, 2)


def test_a_segmentation_learns_its_two_balls(volumes, tmp_path):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    settings = {"learning_rate": 0.1, "batch_size": 2, "norm": "instance"}
    run(bundle, [*BASE, "paper"], tmp_path, volumes, epochs=2, steps_per_epoch=20, **settings)
    with (tmp_path / "eval" / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val_mean_dice"]) > 0.3  # scores 0.0 untrained


def test_the_encoder_of_pretraining_starts_a_segmentation(volumes, trained, tmp_path, caplog):
    encoder = trained(ROOT / "bundles" / "imagenet_vdt_pretraining") / "models" / "encoder.pt"
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    with caplog.at_level("INFO", logger="networks.weights"):
        run(bundle, BASE, tmp_path, volumes, init="vdt", pretrained=str(encoder), epochs=1)
    assert "120 tensors matched, 0 folded, 0 skipped" in caplog.text
    assert json.loads((tmp_path / "models" / "run.json").read_text())["_run_"]["init"] == "vdt"


def test_the_2d_twin_is_pretrained_on_the_same_images_and_starts_other_bundles(images, tmp_path, caplog):
    bundle, pair = ROOT / "bundles" / "imagenet_vdt_pretraining", ["train", "two_dimensional"]
    run(bundle, pair, tmp_path, images, epochs=1, channels_last=True)
    encoder = tmp_path / "models" / "encoder.pt"
    tensors = torch.load(encoder, weights_only=True)
    assert {name: tuple(tensors[name].shape) for name in ("conv1.weight", "layer2.0.downsample.0.weight")} == {
        "conv1.weight": (4, 3, 7, 7), "layer2.0.downsample.0.weight": (8, 4, 1, 1),
    }  # fmt: skip
    assert set(tensors) == {name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")}
    args = {"args_file": str(tmp_path / "models" / "run.json")}
    run(bundle, [*pair, "evaluate"], tmp_path, images, ckpt_path=str(tmp_path / "models" / "model.pt"), **args)
    with (tmp_path / "eval" / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    scores = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert scores["val_top1"] == pytest.approx(float(last["val_top1"]), abs=1e-6)
    run(bundle, ["inference", "two_dimensional"], tmp_path, images / "val" / "red", **args)
    assert len(json.loads((tmp_path / "eval" / "predictions.json").read_text())) == 3
    with caplog.at_level("INFO", logger="networks.weights"):
        initialise(ResNet3D(18, base_channels=4), "i3d", encoder)
    assert "100 tensors matched, 1 folded, 0 skipped, 0 left random" in caplog.text
    assert "made 3D (20): conv1.weight" in caplog.text


def test_the_controls_of_pretraining_change_what_they_name(images, trained, tmp_path):
    bundle = ROOT / "bundles" / "imagenet_vdt_pretraining"
    run(bundle, BASE, tmp_path, images, epochs=1, grey=True, shuffle_labels=True)
    record = json.loads((tmp_path / "models" / "run.json").read_text())
    assert record["grey"] is True
    assert (record["_run_"]["shuffle_labels"], record["_run_"]["shuffle_slices"]) == (True, True)
    parser = ConfigParser(ConfigParser.load_config_file(config_files(bundle, BASE)[0]))
    parser.update({**TINY[bundle.name], "bundle_root": str(bundle), "dataset_dir": str(images), "grey": True})
    sample = parser.get_parsed_content("train::dataset")[0]["image"]
    assert torch.equal(sample[:, 0], sample[:, 1])
    assert torch.equal(sample[:, 0], sample[:, 2])
    parser = ConfigParser(ConfigParser.load_config_file(config_files(bundle, BASE)[0]))
    parser.update({**TINY[bundle.name], "bundle_root": str(bundle), "dataset_dir": str(images)})
    parser.update({"shuffle_slices": False})
    samples = parser.get_parsed_content("train::dataset")
    brightest = [int(samples[i]["image"].float().mean((0, 2, 3)).argmax()) for i in range(len(samples))]
    labels = [["red", "green", "blue"][i] for i in brightest]
    assert labels == [samples.data.classes[samples.data[i]["label"]] for i in range(len(samples))]


OTHERS = {"medicalnet": ResNet3D, "genesis": GenesisUNet3D}


@pytest.mark.parametrize("name", OTHERS)
def test_overlays_of_other_networks_are_the_same_in_every_bundle_and_serve_inference(name):
    paths = sorted((ROOT / "bundles").glob(f"*/configs/{name}.yaml"))
    assert len(paths) == {"medicalnet": 4, "genesis": 3}[name]
    assert len({path.read_text() for path in paths}) == 1
    for path in paths:
        for base in ("train", "inference"):
            parser = ConfigParser()
            parser.read_config(config_files(path.parent.parent, [base, name]))
            parser.update({"base_channels": 4, "num_classes": 2})
            network = parser.get_parsed_content("network_def")
            (inner,) = (m for m in network.modules() if isinstance(m, OTHERS[name]))
            if name == "medicalnet":
                assert inner.architecture["shortcut"] == "A"


@pytest.mark.parametrize("name", OTHERS)
def test_a_segmentation_starts_from_another_medical_network(name, volumes, tmp_path, caplog):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    source = ResNet3D(18, base_channels=4, shortcut="A") if name == "medicalnet" else GenesisUNet3D(5, base_channels=4)
    state = {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}
    torch.save(state, tmp_path / "theirs.pt")
    given = {"init": name, "pretrained": str(tmp_path / "theirs.pt"), "steps_per_epoch": 1, "epochs": 1}
    with pytest.raises(RuntimeError) as caught:
        run(bundle, BASE, tmp_path, volumes, **given)
    assert f"configs/{name}.yaml" in str(root_cause(caught.value))
    with caplog.at_level("INFO", logger="networks.weights"):
        run(bundle, [*BASE, name], tmp_path, volumes, **given)
    assert f"{len(state['state_dict']) - 2 * (name == 'genesis')} tensors matched" in caplog.text
    image, args = volumes / "images" / "case0.nii.gz", {"args_file": str(tmp_path / "models" / "run.json")}
    run(bundle, ["inference", name], tmp_path, image, **args)
    assert (tmp_path / "eval" / "case0_seg.nii.gz").is_file()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run(bundle, ["inference"], tmp_path, image, **args)
    told = {"medicalnet": "shortcut='A' (here 'B')", "genesis": "made by another architecture"}[name]
    assert told in str(root_cause(caught.value))


def test_a_strided_stem_is_remembered_for_inference(volumes, tmp_path):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    run(bundle, BASE, tmp_path, volumes, stem="strided", steps_per_epoch=1, epochs=1)
    assert json.loads((tmp_path / "models" / "run.json").read_text())["stem"] == "strided"
    image, args = volumes / "images" / "case0.nii.gz", {"args_file": str(tmp_path / "models" / "run.json")}
    run(bundle, ["inference"], tmp_path, image, **args)
    assert (tmp_path / "eval" / "case0_seg.nii.gz").is_file()
    with pytest.raises((RuntimeError, ValueError)) as caught:  # so it had been taken from run.json
        run(bundle, ["inference"], tmp_path, image, stem="unet", **args)
    assert "stem='strided' (here 'unet')" in str(root_cause(caught.value))


@pytest.mark.parametrize("init", ["acs", "2.5d"])
def test_flat_kernels_are_trained_through_a_break_and_saved_native(volumes, tmp_path, monkeypatch, init):
    bundle = ROOT / "bundles" / "bcv_multiorgan_segmentation"
    torch.manual_seed(0)
    torch.save(ResNet2D(18, base_channels=4).state_dict(), tmp_path / "image.pt")
    settings = {"init": init, "pretrained": str(tmp_path / "image.pt"), "steps_per_epoch": 1}
    run(bundle, BASE, tmp_path / "whole", volumes, **settings)
    with monkeypatch.context() as patch:
        break_in_epoch_two(patch)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run(bundle, BASE, tmp_path / "broken", volumes, **settings)
    run(bundle, BASE, tmp_path / "broken", volumes, **settings)
    first, second = (
        torch.load(tmp_path / folder / "models" / "model_last.pt", weights_only=True) for folder in ("whole", "broken")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_image(tmp_path / "image.pt", init)
    kernel = first["network.backbone.layer2.0.conv1.weight"]
    assert kernel.shape[2:] == (3, 3, 3)
    assert torch.equal(to_3d(to_2d(kernel, init), init), kernel)  # nothing outside the planes
    assert not torch.equal(kernel, start["layer2.0.conv1.weight"])  # and trained
    args = str(tmp_path / "whole" / "models" / "run.json")
    run(bundle, ["inference"], tmp_path / "whole", volumes / "images" / "case0.nii.gz", args_file=args)
    assert (tmp_path / "whole" / "eval" / "case0_seg.nii.gz").is_file()


def load_image(path: Path, init: str) -> dict:
    network = ResNet3D(18, base_channels=4)
    load_pretrained(network, path, conversion=init)
    return network.state_dict()


def test_finetuning_starts_from_the_encoder(images, trained, tmp_path, caplog):
    bundle = ROOT / "bundles" / "imagenet_vdt_pretraining"
    encoder = trained(bundle) / "models" / "encoder.pt"
    with caplog.at_level("INFO", logger="networks.weights"):
        run(bundle, ["train", "finetune"], tmp_path, images, pretrained=str(encoder), epochs=1)
    assert "120 tensors matched" in caplog.text


def test_the_network_has_the_shapes_of_the_metadata(bundle):
    monai.bundle.verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=config_files(bundle, ["inference"]),
        device="cpu",
    )


def test_the_exported_network_answers_as_the_trained_one(bundle, trained, tmp_path):
    folder = trained(bundle)
    exported = tmp_path / "model.ts"
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(folder / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=config_files(bundle, ["inference"]),
        args_file=str(folder / "models" / "run.json"),
    )
    parser = ConfigParser(ConfigParser.load_config_file(config_files(bundle, ["inference"])[0]))
    parser.update(remembered(folder))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    special = {"imagenet_vdt_pretraining": (2, 1, 3, 40, 33), "deeplesion_lesion_detection": (1, 9, 64, 70)}
    x = torch.randn(special.get(bundle.name, (1, 1, 19, 33, 21)))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(exported)(x), network(x))


# What wrong input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        pytest.param(lambda image, label: (image[:-1], label, None), "has shape", id="shape"),
        pytest.param(lambda image, label: (image, label, np.diag([-1.0, 1, 3, 1])), "affine differs", id="affine"),
        pytest.param(lambda image, label: (image, label + 7, None), "label values", id="label value"),
        pytest.param(lambda image, label: (np.where(label == 1, np.nan, image), label, None), "NaN", id="NaN voxels"),
    ],
)
def test_a_spoilt_volume_is_named_in_one_sentence(volumes, tmp_path, spoil, sentence):
    data = tmp_path / "data"
    shutil.copytree(volumes, data)
    image, label = (nib.load(data / name / "case2.nii.gz") for name in ("images", "labels"))
    new_image, new_label, affine = spoil(image.get_fdata(), np.asarray(label.dataobj))
    nib.save(nib.Nifti1Image(new_image.astype(np.float32), image.affine), data / "images" / "case2.nii.gz")
    affine = label.affine if affine is None else affine
    nib.save(nib.Nifti1Image(new_label.astype(np.uint8), affine), data / "labels" / "case2.nii.gz")
    with pytest.raises(RuntimeError) as caught:
        run(ROOT / "bundles" / "bcv_multiorgan_segmentation", BASE, tmp_path, data)
    message = str(root_cause(caught.value))
    assert "case2.nii.gz" in message
    assert sentence in message
    assert "\n" not in message


def root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# What the documents promise ----------------------------------------------------------------------------------------


def documented_commands() -> list:
    found = []
    for bundle in BUNDLES:
        text = (bundle / "docs" / "README.md").read_text()
        for number, block in enumerate(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)):
            found.append(pytest.param(bundle, block.replace("\\\n", " "), id=f"{bundle.name}-{number}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "documented"), documented_commands())
def test_every_command_of_the_documents_runs(
    bundle, documented, images, volumes, nodules, key_slices, trained, preloaded, tmp_path
):
    folder = tmp_path / bundle.name
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("models", "eval"))
    shutil.copytree(trained(bundle) / "models", folder / "models")
    shutil.copytree(trained(ROOT / "bundles" / "imagenet_vdt_pretraining") / "models", tmp_path / "pretrained")
    write_published(tmp_path / "published", patients=20, most=2, size=20)
    names = sorted(path.name for path in (tmp_path / "published").glob("*.npz"))
    write_published_split(tmp_path / "split.csv", names[len(names) // 3 :], names[: len(names) // 3])
    (tmp_path / "positions.csv").write_text("column,row,slice\n10,11,7\n")
    study = {"StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    write_series(tmp_path / "ct", shape=(20, 22, 15), **study)
    given = {
        "DICOM_FOLDER": str(tmp_path / "ct"),
        "IMAGES": str(images),
        "IMAGE_OR_FOLDER": str(images / "val"),
        "VOLUMES": str(volumes),
        "VOLUME_OR_FOLDER": str(volumes),
        "NODULES": str(nodules),
        "CUBE_OR_FOLDER": str(nodules),
        "CROP": str(nodules),
        "SCAN": str(volumes / "images" / "case0.nii.gz"),
        "POSITIONS": str(tmp_path / "positions.csv"),
        "PUBLISHED": str(tmp_path / "published"),
        "SPLIT_CSV": str(tmp_path / "split.csv"),
        "ENCODER": str(tmp_path / "pretrained" / "encoder.pt"),
        "DEEPLESION": str(key_slices),
        "DETECTOR": str(folder / "models" / "model_last.pt"),
        "CT": str(volumes / "images" / "case0.nii.gz"),
    }
    words = [given.get(word, word) for word in shlex.split(documented)]
    if "configs/train.yaml" in documented:
        for name, value in TINY[bundle.name].items():
            words += [f"--{name}", value if isinstance(value, str) else repr(value)]
    log = tmp_path / "log.txt"
    if words[0] == "python":
        status = preloaded.run(words[1:], folder, {}, log)
    else:
        assert words[0] == "torchrun"
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        with log.open("w") as output:
            status = subprocess.run(words, cwd=folder, stdout=output, stderr=output, check=False).returncode
    assert status == 0, log.read_text()[-6000:]
