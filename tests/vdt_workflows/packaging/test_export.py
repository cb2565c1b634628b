"""Networks as one file: in MONAI Deploy's operator without these packages, and as ONNX that tells what it is.

Set DEPLOY_SDK to a folder that the wheel monai-deploy-app-sdk was unpacked in, to run its own operator in the place of
the sequence of calls in tests/support/deploy_operator.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, load_net_with_metadata
from monai.transforms import Compose

from tests.support.bundle_runs import BUNDLES, ROOT, infer, parse, read, remembered, rows
from tests.support.documents import blocks
from vdt_workflows.evaluation.cubes import CubeInferer
from vdt_workflows.evaluation.inference import SlabInferer
from vdt_workflows.packaging.deploy import complete_network, deploy_config
from vdt_workflows.packaging.export import export_bundle
from vdt_workflows.training.checkpoints import load_weights
from vdt_workflows.training.shipped import find_weights

ORGANS, MALIGNANCY = (ROOT / "bundles" / n for n in ("bcv_multiorgan_segmentation", "lidc_nodule_classification"))
OPERATOR = ROOT / "tests" / "support" / "deploy_operator.py"
DEPLOYED = [bundle for bundle in BUNDLES if not bundle.name.endswith("_pretraining")]
GIVEN = {  # so that volumes are resampled, to no less than a window, and there is something to compare
    "bcv": {"spacing": [0.9, 0.8, 0.9]},
    "lits": {"spacing": [0.9, 0.8, 0.9]},
    "lidc": {"spacing": [1.0, 1.0, 2.0]},  # a cube that is resampled and cut differs at the cut by a voxel's width
    "lidc_nodule_classification": {"spacing": 1.2},
    "deeplesion": {"least_score": 0.01},
}


def deploy(script, scans: dict[str, nib.Nifti1Image], folder) -> dict[str, np.ndarray]:
    """Give the operator's answers to scans, from a process that cannot import these packages."""
    given = {}
    for name, scan in scans.items():
        given |= {name: np.asarray(scan.dataobj), f"{name}.affine": scan.affine}
    np.savez(folder / "scans.npz", **given)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    words = [str(OPERATOR), str(script), str(folder / "scans.npz"), str(folder / "answers.npz")]
    subprocess.run([sys.executable, "-W", "ignore", *words], cwd=folder, env=environment, check=True)
    return dict(np.load(folder / "answers.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", DEPLOYED, ids=lambda path: path.name)
def test_deploys_operator_answers_as_the_bundle_does_without_these_packages(answering, volumes, tmp_path, bundle):
    models, task = answering(bundle), bundle.name.rpartition("_")[2]
    more = GIVEN.get(bundle.name) or GIVEN[bundle.name.partition("_")[0]]
    export_bundle(bundle.name, str(tmp_path / "model_v0.1.ts"), str(models / "model.pt"), **more)
    first = nib.load(volumes / "images" / "case0.nii.gz")
    axes = nib.orientations.axcodes2ornt("PSL")
    turned = first.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(first.affine), axes))
    scans = {"first": first, "turned": turned}
    for name, scan in scans.items():
        nib.save(scan, tmp_path / f"{name}.nii.gz")
        infer(bundle, models, tmp_path / name, tmp_path / f"{name}.nii.gz", **more)
    answers = deploy(tmp_path / "model_v0.1.ts", scans, tmp_path)
    for name, answer in answers.items():
        results = tmp_path / name / "eval"
        if task == "segmentation":
            ours = np.asarray(nib.load(results / f"{name}_seg.nii.gz").dataobj)
            assert answer.dtype == np.uint8
            assert len(np.unique(ours)) > 1
            assert (answer != ours).sum() <= 2  # where two classes are equal but for the last digit
        elif task == "classification":
            (row,) = rows(results / "malignancy.csv")
            assert answer[1] == pytest.approx(float(row["malignancy"]), abs=1e-5)
        else:
            lesions = read(results / f"{name}_lesions.json")["lesions"]
            ours = [[*lesion["center_lps_mm"], *lesion["size_mm"], lesion["score"]] for lesion in lesions]
            assert len(ours) > 1
            # sizes are along the axes of the world here, and along those of the file there
            np.testing.assert_allclose(answer[:, [0, 1, 2, 6]], np.array(ours)[:, [0, 1, 2, 6]], atol=2e-3)
            np.testing.assert_allclose(np.sort(answer[:, 3:6]), np.sort(np.array(ours)[:, 3:6]), atol=2e-3)


@pytest.mark.slow
def test_a_script_tells_what_it_takes_and_gives_and_the_same_weights_give_the_same_config(tmp_path):
    name = "hippocampus_mr_segmentation"
    made = export_bundle(ORGANS.name, str(tmp_path / "a.ts"), "hippocampus_mr_w16", name=name, window_batch=3)
    network, meta, files = load_net_with_metadata(str(tmp_path / "a.ts"), more_extra_files=("inference.json",))
    settings = read(find_weights("hippocampus_mr_w16") / "run.json")
    for id in ("spacing", "window", "mean", "std", "patch_size", "label_names"):
        assert meta["settings"][id] == settings[id]
    assert (meta["name"], meta["version"]) == ("Hippocampus segmentation in MR", "0.2.0")
    channels = {"0": "background", "1": "anterior", "2": "posterior"}
    assert meta["network_data_format"]["outputs"]["pred"]["channel_def"] == channels
    assert json.loads(files["inference.json"])["inferer"]["sw_batch_size"] == 3
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    with zipfile.ZipFile(tmp_path / "a.ts") as archive:
        assert "a/extra/metadata.json" in archive.namelist()  # where the operator looks
    assert set(made) == {"file", "MB", "sha256"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.ts"]


@pytest.mark.parametrize(("flips", "sentence"), [(5, "lists of axes 0, 1, 2, got 5"), ([[1]], "training did not flip")])
def test_flips_that_the_bundle_would_refuse_are_refused(flips, sentence):
    with pytest.raises(ValueError, match=sentence):
        complete_network(parse(ORGANS, ["inference"], flips=flips, base_channels=4, device="cpu"))


@pytest.mark.slow
def test_the_network_of_a_file_has_the_flips_and_the_weights_of_classes_of_the_bundle_inside():
    given = {
        "base_channels": 4,
        "flips": [[0], [0, 1]],
        "mirrored": [0, 1],
        "class_weights": [1 + 0.02 * i for i in range(14)],
    }
    parser = parse(ORGANS, ["inference"], **given, patch_size=[16, 16, 16], device="cpu")
    torch.manual_seed(0)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        labels = parser.get_parsed_content("inferer")(MetaTensor(x), parser.get_parsed_content("network_def").eval())
        logits = torch.jit.script(complete_network(parser))(x)
        plain = SlabInferer([16, 16, 16])(x, parser.get_parsed_content("network_def").eval())
    assert len(labels.unique()) > 2
    assert torch.equal(logits.argmax(1, keepdim=True), labels.as_tensor())
    assert not torch.equal(plain, labels.as_tensor())  # so that flips and weights matter


@pytest.mark.parametrize("rotations", [4, 24])
def test_the_network_of_a_file_averages_over_the_rotations_of_a_cube(rotations):
    parser = parse(MALIGNANCY, ["inference"], base_channels=4, rotations=rotations, device="cpu")
    torch.manual_seed(0)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = CubeInferer(rotations)(x, parser.get_parsed_content("network_def").eval())
        torch.testing.assert_close(torch.jit.script(complete_network(parser))(x), expected)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.ones(9, 9, 9), "the image has no affine, so that its voxel size is not known"),
        (torch.full((9, 9, 9), torch.nan), "the image has NaN or infinite voxels; expected finite values"),
        (torch.full((9, 9, 9), 64512.0), "intensities of the image do not fit 16-bit signed integers, as HU do"),
        (torch.ones(9, 9, 9), "the image is smaller than the cube of 32 mm that the network takes"),
    ],
)
def test_what_the_operator_cannot_use_is_refused_in_a_sentence(image, sentence):
    config = ConfigParser(deploy_config(parse(MALIGNANCY, ["inference"], device="cpu")))
    known = {} if "affine" in sentence else {"original_affine": np.eye(4)}
    image = MetaTensor(image, meta={**known, "original_channel_dim": "no_channel"})
    with pytest.raises(RuntimeError) as refused:
        Compose(config.get_parsed_content("preprocessing").transforms[:6])({"image": image})
    assert str(refused.value.__cause__) == sentence


@pytest.mark.parametrize(
    ("bundle", "output", "more", "sentence"),
    [
        ("bcv", "x.ts", {}, "bcv: no such bundle; there are bcv_multiorgan_segmentation, "),
        (ORGANS.name, "x.pt", {}, r"output .*x\.pt: must end in \.ts or \.onnx"),
        (ORGANS.name, "x.ts", {"spacings": 1}, "--spacings: no setting of bcv_multiorgan_segmentation's inference"),
        (ORGANS.name, "x.ts", {"skip_below": -5}, "skip_below -5: MONAI's windows skip nothing; leave it out"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, bundle, output, more, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        export_bundle(bundle, str(tmp_path / output), "hippocampus_mr_w16", **more)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_and_transforms_without_a_counterpart_in_monai_are_refused():
    parser = parse(MALIGNANCY, ["inference"], ensemble=["other.pt"], device="cpu")
    with pytest.raises(ValueError, match=r"ensemble \['other\.pt'\]: a file has one network; export each by itself"):
        deploy_config(parser)
    parser = parse(ROOT / "bundles" / "imagenet_vdt_pretraining", ["inference"], device="cpu")
    with pytest.raises(ValueError, match=r"vdt_\w+\.\w+: there is nothing in MONAI that is known to do the same"):
        deploy_config(parser)


@pytest.mark.slow
def test_the_example_reads_spacing_and_window_out_of_the_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    export_bundle(ORGANS.name, "hippocampus.ts", "hippocampus_mr_w16")
    export_bundle(MALIGNANCY.name, "malignancy.onnx", "lung_nodule_malignancy_w16")
    (code,) = [code for code in blocks(ROOT / "docs" / "export.md", "python") if "custom_metadata_map" in code]
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.endswith("[1.0, 1.0, 1.0] [-1024, 400]\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "weights", "size", "given"),
    [
        (ORGANS, "hippocampus_mr_w16", (40, 24, 32), ["batch", 3, "width", "height", "depth"]),
        (MALIGNANCY, "lung_nodule_malignancy_w16", (48, 48, 48), ["batch", 2]),
    ],
)
def test_onnx_tells_what_it_is_and_answers_as_the_network(tmp_path, bundle, weights, size, given):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_bundle(bundle.name, str(tmp_path / "a.onnx"), weights)
    export_bundle(bundle.name, str(tmp_path / "a.ts"), weights)
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    (taken,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape) == ("image", ["batch", 1, "width", "height", "depth"])
    assert (answer.name, answer.shape) == ("pred", given)
    told = session.get_modelmeta().custom_metadata_map
    settings = read(find_weights(weights) / "run.json")
    kept = json.loads(told["settings"])
    for id in {"spacing", "window", "mean", "std", "patch_size", "crop_size"} & settings.keys():
        assert kept[id] == settings[id]
    names = settings.get("label_names") or settings["class_names"]
    assert list(json.loads(told["network_data_format"])["outputs"]["pred"]["channel_def"].values()) == names
    assert told["version"] == read(bundle / "configs" / "metadata.json")["version"]
    assert json.loads(told["axes"]) == ["batch", "channel", "width", "height", "depth"]
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.jit.load(tmp_path / "a.ts")(x).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], expected, atol=1e-4)


@pytest.mark.slow
def test_onnxs_detector_gives_the_rows_of_the_network(tmp_path, trained):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    bundle = ROOT / "bundles" / "deeplesion_lesion_detection"
    weights = trained(bundle) / "models" / "model.pt"
    export_bundle(bundle.name, str(tmp_path / "a.onnx"), str(weights))
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    told = session.get_modelmeta().custom_metadata_map
    (taken,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (taken.shape, answer.shape) == ([1, 9, 80, 80], [1, 100, 6])
    assert json.loads(told["axes"]) == ["batch", "slice", "width", "height"]
    assert json.loads(told["columns"]) == ["x1", "y1", "x2", "y2", "score", "label"]
    assert json.loads(told["settings"])["window"] == [-1024, 1050]
    network = parse(bundle, ["inference"], **remembered(trained(bundle)), device="cpu").get_parsed_content(
        "network_def"
    )
    load_weights(network, weights)
    x = torch.randn(1, 9, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (ours,) = network.eval()(x).numpy()
    (theirs,) = session.run(None, {"image": x.numpy()})[0]
    assert (ours[:, 5] > 0).sum() > 5
    # rows of nearly equal scores change places
    assert np.abs(ours[:, None] - theirs).max(-1).min(1).max() < 1e-2
    np.testing.assert_allclose(theirs[:, 4], ours[:, 4], atol=1e-4)
