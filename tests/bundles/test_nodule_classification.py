"""What the classification bundle does beyond what every bundle is asked."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine
from PIL import Image

from networks import DepthFirst, ResNet3DClassifier, load_pretrained
from tests.makers.nodules import make_list, own_row, write_nodules, write_published, write_published_split, write_table
from tests.makers.volumes import make_affine
from tests.support.bundle_runs import BASE, ROOT, infer, parse, read, remembered, rows, run, sentence, weights
from tests.support.golden import TOLERANCE, deviation, published_input, published_weights, read_vector
from vdt_workflows.data.nodule_tables import list_nodules
from vdt_workflows.data.nodules import find_nodules
from vdt_workflows.overrides import explanation

BUNDLE = ROOT / "bundles" / "lidc_nodule_classification"
PAPER = ["train", "paper"]
EVALUATE = ["train", "evaluate"]
VOXEL = ("column", "row", "slice")
DEEPEST = "network.backbone.layer4.1.conv2.weight"


def malignancies(trained, folder, source, **more):
    infer(BUNDLE, trained(BUNDLE) / "models", folder, source, **more)
    return read(folder / "eval" / "malignancy.json")["nodules"]


def evaluate(trained, folder, data, **more):
    run(BUNDLE, EVALUATE, folder, data, ckpt_path=str(trained(BUNDLE) / "models" / "model.pt"), **more)
    return read(folder / "eval" / "scores.json")


# The network -------------------------------------------------------------------------------------------------------


def test_the_published_encoder_gives_the_published_numbers_inside_the_bundles_network(tmp_path):
    vector, path = read_vector("resnet3d18_lidc"), tmp_path / "published.pth"
    torch.save(published_weights("resnet3d18_lidc"), path)
    network = parse(BUNDLE).get_parsed_content("network_def")
    report = load_pretrained(network, path)
    assert len(report.matched) == len(vector["state_dict"])
    assert report.left_random == ["head.fc.weight", "head.fc.bias"]
    x = published_input(vector)
    with torch.inference_mode():
        features = network.eval().network.backbone(x)[-1]
        logits = network(x.permute(0, 1, 4, 3, 2))
    assert deviation(features, vector["outputs"][-1]) < TOLERANCE
    torch.testing.assert_close(logits, network.network.head.fc(features.mean(dim=[2, 3, 4])))
    assert logits.shape == (2, 2)


def test_the_published_classifier_loads_but_for_the_head_of_other_classes(tmp_path):
    torch.save(published_weights("vdt_classifier18"), tmp_path / "published.pth")
    network = DepthFirst(ResNet3DClassifier(18, 2, depth_stride=True), restore=False)
    report = load_pretrained(network, tmp_path / "published.pth")
    assert report.left_random == ["head.fc.weight", "head.fc.bias"]
    assert set(report.skipped) == {"head.fc.weight", "head.fc.bias"}


# What a run leaves -------------------------------------------------------------------------------------------------


def test_a_run_says_its_protocol_its_label_rule_and_its_split(nodules, trained):
    folder = trained(BUNDLE)
    record, split = read(folder / "models" / "run.json"), read(folder / "models" / "split.json")
    assert (record["protocol"], record["label_rule"]) == ("recommended", "mode")
    shares = {"val_fraction": 0.15, "test_fraction": 0.15, "folds": 0, "fold": 0, "seed": 0}
    assert record["_run_"]["split"] == {"split": "patient", **shares}
    parts = find_nodules(nodules)
    assert {name: split[name] for name in parts} == {n: [i["nodule_id"] for i in part] for n, part in parts.items()}


def test_evaluation_reports_the_test_part_of_the_runs_own_split(nodules, trained, tmp_path):
    folder = trained(BUNDLE)
    scores, predictions = evaluate(trained, tmp_path, nodules, seed=5), rows(tmp_path / "eval" / "predictions.csv")
    assert sorted(row["nodule_id"] for row in predictions) == sorted(read(folder / "models" / "split.json")["test"])
    labels = {n["nodule_id"]: n["label"] for n in find_nodules(nodules)["test"]}
    assert {row["nodule_id"]: int(row["label"]) for row in predictions} == labels
    record = scores["_run_"]
    assert (record["protocol"], record["label_rule"], record["part"]) == ("recommended", "mode", "test")
    assert record["split"]["split"] == "patient"
    for name in ("auc", "sensitivity", "specificity"):
        assert scores[name] == pytest.approx(scores[f"val_{name}"])
    assert all((float(row["score"]) >= 0.5) == (row["called"] == "1") for row in predictions)
    for name in ("roc.png", "reliability.png"):
        assert min(Image.open(tmp_path / "eval" / name).size) > 400


def test_evaluation_of_other_data_takes_all_of_it(trained, tmp_path):
    data = tmp_path / "other"
    write_nodules(data, patients=6, most=2, size=20, seed=9, indeterminate=0.0)
    scores = evaluate(trained, tmp_path, data, split="all", label_rule="mean")
    assert scores["count"] == len(make_list(6, 2, seed=9, indeterminate=0.0))
    assert scores["_run_"]["split"]["split"] == "all"


# Protocols and settings --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_paper_protocol_keeps_the_last_epoch_and_watches_the_test_part(nodules, tmp_path):
    run(BUNDLE, PAPER, tmp_path, nodules, epochs=3)
    written = sorted(path.name for path in (tmp_path / "models").glob("[!.]*"))
    assert written == ["model.pt", "run.json", "split.json"]
    record, split = read(tmp_path / "models" / "run.json"), read(tmp_path / "models" / "split.json")
    assert record["protocol"] == "paper"
    assert not split["validation"]
    run(BUNDLE, [*PAPER, "evaluate"], tmp_path, nodules, ckpt_path=str(tmp_path / "models" / "model.pt"))
    history = rows(tmp_path / "eval" / "history.csv")
    assert read(tmp_path / "eval" / "scores.json")["auc"] == pytest.approx(float(history[-1]["val_auc"]))
    assert read(tmp_path / "eval" / "scores.json")["_run_"]["protocol"] == "paper"


def test_the_published_schedule_warms_up_for_fifty_steps_and_falls_thrice():
    parser = parse(BUNDLE, PAPER, steps=20, **{"optimizer::params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer, scheduler = (parser.get_parsed_content(name) for name in ("optimizer", "scheduler"))
    rates = []
    for _ in range(100 * 20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert type(optimizer) is torch.optim.Adam
    assert rates[0] == rates[49] == pytest.approx(5e-5)
    assert rates[50] == rates[599] == pytest.approx(5e-4)
    for first, rate in ((600, 5e-5), (1200, 5e-6), (1800, 5e-7)):
        assert rates[first] == rates[first + 199] == pytest.approx(rate)


def test_the_published_layout_and_lists_train_and_say_so(tmp_path, caplog):
    nodules = write_published(tmp_path / "data", patients=20, most=2, size=20)
    names = [f"lidc{n['patient']}_{n['number']}.npz" for n in nodules]
    split = write_published_split(tmp_path / "train_test_split.csv", names[::2], names[1::2])
    run(BUNDLE, PAPER, tmp_path, tmp_path / "data", split=str(split), epochs=1)
    run(BUNDLE, [*PAPER, "evaluate"], tmp_path, tmp_path / "data", ckpt_path=str(tmp_path / "models" / "model.pt"))
    assert "patients are on both sides" in caplog.text
    scores = read(tmp_path / "eval" / "scores.json")
    assert scores["_run_"]["split"]["split"] == str(split)
    assert scores["count"] == sum(n["malignant"] is not None for n in nodules[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("imbalance", ["loss", "sampling"])
def test_each_way_of_balancing_classes_changes_what_is_learnt(imbalance, tmp_path, trained):
    nodules = [n | {"malignant": n["patient"] % 4 == 0} for n in make_list(20, 2)]
    nodules = [n | {"votes": [5 if n["malignant"] else 1]} for n in nodules]
    write_nodules(tmp_path / "data", nodules, size=20)
    for name in ("none", imbalance):
        run(BUNDLE, BASE, tmp_path / name, tmp_path / "data", imbalance=name, epochs=1)
    a, b = (weights(tmp_path / name / "models" / "model_last.pt") for name in ("none", imbalance))
    assert not torch.equal(a[DEEPEST], b[DEEPEST])
    parser = parse(BUNDLE, BASE, dataset_dir=str(tmp_path / "data"), imbalance=imbalance, cache="none", num_workers=0)
    labels = parser.get_parsed_content("labels")
    weight = parser.get_parsed_content("loss").weight
    keys = list(parser.get_parsed_content("train::sampler"))
    if imbalance == "loss":
        assert weight[1] / weight[0] == pytest.approx(labels.count(0) / labels.count(1))
    else:
        assert weight.tolist() == [1, 1]
        assert abs(sum(labels[index] for _, index in keys) - len(keys) / 2) <= 1


# Inference ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan(nodules, tmp_path_factory):
    """A scan of 2 mm slices around two prepared cubes, which lie at known places in it."""
    cube = nib.load(next((nodules / "images").glob("*_1_01.nii.gz")))
    values = np.full((70, 60, 30), -1000, np.int16)
    values[10:30, 20:40, 5:15] = np.asarray(cube.dataobj)[:, :, ::2]
    values[40:60, 30:50, 15:25] = np.asarray(cube.dataobj)[:, :, ::2]
    affine = make_affine((-1.0, -1.0, 2.0), (90.0, 80.0, -60.0))
    path = tmp_path_factory.mktemp("scan") / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values, affine), path)
    return path, affine, [(19.5, 29.5, 9.5), (49.5, 39.5, 19.5)]


def test_a_scan_with_places_gives_the_scores_of_its_nodules(scan, trained, tmp_path):
    path, affine, voxels = scan
    world = [apply_affine(affine, voxel) for voxel in voxels]
    in_mm, in_voxels = tmp_path / "mm.csv", tmp_path / "voxels.csv"
    for file, names, points in ((in_mm, ("x_mm", "y_mm", "z_mm"), world), (in_voxels, VOXEL, voxels)):
        write_table(file, [dict(zip(names, point, strict=True)) for point in points], names)
    found = [malignancies(trained, tmp_path / p.stem, path, positions=str(p)) for p in (in_mm, in_voxels)]
    assert found[0] == found[1]
    assert [nodule["nodule_id"] for nodule in found[0]] == ["1", "2"]
    np.testing.assert_allclose([[n["x_mm"], n["y_mm"], n["z_mm"]] for n in found[0]], world, atol=0.01)
    # The same nodule twice, in different surroundings, of which the crop shows none.
    assert found[0][0]["malignancy"] == pytest.approx(found[0][1]["malignancy"], abs=1e-5)
    assert Image.open(tmp_path / "mm" / "eval" / "crops.png").size[0] > 400
    written = rows(tmp_path / "mm" / "eval" / "malignancy.csv")
    assert [float(row["malignancy"]) for row in written] == [n["malignancy"] for n in found[0]]


def test_a_mask_gives_the_scores_of_its_parts(scan, trained, tmp_path):
    path, affine, voxels = scan
    mask = np.zeros((70, 60, 30), np.uint8)
    for i, j, k in voxels:
        mask[int(i) : int(i) + 2, int(j) : int(j) + 2, int(k) : int(k) + 2] = 1
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "mask.nii.gz")
    found = malignancies(trained, tmp_path, path, positions=str(tmp_path / "mask.nii.gz"))
    np.testing.assert_allclose(
        [[n["x_mm"], n["y_mm"], n["z_mm"]] for n in found], [apply_affine(affine, v) for v in voxels], atol=0.01
    )


def test_crops_get_the_scores_that_evaluation_gave_them(nodules, trained, tmp_path):
    evaluate(trained, tmp_path, nodules, part="training")
    expected = {row["nodule_id"]: float(row["score"]) for row in rows(tmp_path / "eval" / "predictions.csv")}
    found = {n["nodule_id"]: n["malignancy"] for n in malignancies(trained, tmp_path, nodules)}
    assert len(found) == len(list_nodules(nodules)) > len(expected)
    for name, score in expected.items():
        assert found[name] == pytest.approx(score, abs=2e-6)


def test_the_published_cube_and_the_prepared_one_get_nearly_the_same_score(trained, tmp_path):
    nodules = make_list(3, 1)
    write_nodules(tmp_path / "own", nodules, size=20)
    write_published(tmp_path / "published", nodules, size=20)
    own = malignancies(trained, tmp_path / "a", tmp_path / "own")
    published = malignancies(trained, tmp_path / "b", tmp_path / "published")
    for a, b in zip(own, published, strict=True):
        assert a["malignancy"] == pytest.approx(b["malignancy"], abs=2e-3)  # the archive has steps of 5.6 HU


def test_a_crop_at_the_border_is_filled_with_air_and_one_outside_refused(scan, trained, tmp_path, caplog):
    path, affine, _ = scan
    write_table(tmp_path / "edge.csv", [dict(zip(VOXEL, (1, 30, 15), strict=True))], VOXEL)
    (found,) = malignancies(trained, tmp_path, path, positions=str(tmp_path / "edge.csv"))
    np.testing.assert_allclose(found["x_mm"], apply_affine(affine, (1, 30, 15))[0])
    assert "leaves the scan; outside is taken as air" in caplog.text
    write_table(tmp_path / "out.csv", [dict(zip(VOXEL, (-3, 30, 15), strict=True))], VOXEL)
    with pytest.raises(RuntimeError) as caught:
        malignancies(trained, tmp_path, path, positions=str(tmp_path / "out.csv"))
    assert "is outside the volume, which reaches from" in sentence(caught.value)


def test_in_monai_label_an_image_alone_gives_a_vector_of_scores(nodules, scan, trained):
    # What MONAI Label does with the config: metadata kept apart from the image, transforms one by one, no collation.
    parser = parse(BUNDLE, ["inference"], **remembered(trained(BUNDLE)))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(weights(trained(BUNDLE) / "models" / "model.pt"))
    before, after = (parser.get_parsed_content(name).transforms for name in ("preprocessing", "postprocessing"))
    before[0]._loader.image_only = False
    for file in (next((nodules / "images").iterdir()), scan[0]):
        data = {"image": str(file), "image_path": str(file), "device": "cpu"}
        for transform in before:
            data = transform(data)
        assert data["image"].shape == (1, 16, 16, 16)
        with torch.no_grad():
            data["pred"] = network(data["image"][None])[0]
        for transform in after:
            data = transform(data)
        assert data["pred"].array.shape == (2,)
        assert float(data["pred"].sum()) == pytest.approx(1)
        assert "image" not in data
        assert "image_meta_dict" not in data


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "more", "reason"),
    [
        (BASE, {"val_fraction": 0.0}, "validation has no nodules; give val_fraction, test_fraction or a split"),
        (BASE, {"imbalance": "focal"}, "imbalance must be 'none', 'loss' or 'sampling', got 'focal'"),
        (BASE, {"watched": "tests"}, "part must be one of training, validation, test, got 'tests'"),
        (BASE, {"split": "nodule"}, "split must be 'patient', 'all', or the path"),
        (BASE, {"init": "vdt"}, "there is none of depth 18 and base_channels 4; set depth 18"),
        (EVALUATE, {"ckpt_path": "absent/model.pt"}, "absent/split.json: no such file; give the split.json of a run"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(nodules, tmp_path, names, more, reason):
    with pytest.raises((RuntimeError, ValueError, OSError)) as caught:
        run(BUNDLE, names, tmp_path, nodules, **more)
    assert reason in sentence(caught.value)


def test_a_spoilt_cube_is_named_in_one_sentence(tmp_path):
    write_nodules(tmp_path / "data", patients=20, most=2, size=20)
    spoilt = Path(find_nodules(tmp_path / "data")["training"][0]["image"])
    spoilt.write_bytes(b"cut")
    with pytest.raises(RuntimeError) as caught:
        run(BUNDLE, BASE, tmp_path, tmp_path / "data")
    message = explanation(caught.value)
    assert message.startswith(f"{spoilt}: cut short or damaged")
    assert "\n" not in message


# Slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shapes_are_learnt_and_shuffled_labels_are_not(tmp_path):
    nodules = make_list(80, 2, indeterminate=0.0)
    write_nodules(tmp_path / "data", nodules, size=40)
    votes = [nodules[i]["votes"] for i in np.random.default_rng(0).permutation(len(nodules))]
    (tmp_path / "shuffled").mkdir()
    for folder in ("images", "labels"):
        (tmp_path / "shuffled" / folder).symlink_to(tmp_path / "data" / folder)
    shuffled = [own_row(n | {"votes": v}) for n, v in zip(nodules, votes, strict=True)]
    write_table(tmp_path / "shuffled" / "nodules.csv", shuffled)
    settings = {"epochs": 20, "base_channels": 8, "batch_size": 8, "crop_size": 32, "jitter": 4, "selection": "last"}
    settings["learning_rate"] = 1e-3
    scores = {}
    for name in ("data", "shuffled"):
        run(BUNDLE, BASE, tmp_path / name, tmp_path / name, test_fraction=0.3, **settings)
        path = str(tmp_path / name / "models" / "model.pt")
        run(BUNDLE, EVALUATE, tmp_path / name, tmp_path / name, ckpt_path=path, **settings)
        scores[name] = read(tmp_path / name / "eval" / "scores.json")
    assert scores["data"]["auc"] > 0.9
    low, high = scores["shuffled"]["auc_interval_95"]
    # not low < 0.5: such an interval misses 0.5 once in twenty draws, and another CPU's rounding is another draw
    assert low < 0.6
    assert high < scores["data"]["auc"]
