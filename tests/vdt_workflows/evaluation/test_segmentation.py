from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from PIL import Image

from vdt_transforms import RestoreGrid
from vdt_workflows.drawing import colour, cut_planes, find_centre, read_png
from vdt_workflows.evaluation.segmentation import CaseScores, OrganScore, central_planes, score_organs, summarise

NAMES = ["background", "liver", "left kidney", "right kidney"]


def box(shape, *ranges, value=1):
    volume = np.zeros(shape, np.uint8)
    volume[tuple(slice(*r) for r in ranges)] = value
    return volume


def random_maps(shape=(24, 20, 16), seed=0):
    """Two maps of three overlapping blobs each, the second somewhat off the first."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    maps = []
    for off in (0, 1):
        volume = np.zeros(shape, np.uint8)
        for value, centre in ((1, (8, 9, 7)), (2, (16, 9, 8)), (3, (12, 14, 6))):
            distance = sum((g - c - off) ** 2 for g, c in zip(grid, centre, strict=True))
            volume[distance + rng.normal(0, 3, shape) < 20] = value
        maps.append(volume)
    return maps


def test_scores_are_those_of_monai_on_whole_one_hot_volumes():
    pred, label = random_maps()
    spacing = (0.8, 1.2, 2.5)
    one_hot = [torch.stack([torch.as_tensor(v == i) for i in range(4)])[None] for v in (pred, label)]
    hd95 = compute_hausdorff_distance(*one_hot, percentile=95, spacing=list(spacing))[0]
    asd = compute_average_surface_distance(*one_hot, symmetric=True, spacing=list(spacing))[0]
    for i, score in enumerate(score_organs(pred, label, NAMES, spacing)):
        assert score.organ == NAMES[i + 1]
        assert score.hd95_mm == pytest.approx(float(hd95[i]), abs=1e-5)
        assert score.asd_mm == pytest.approx(float(asd[i]), abs=1e-5)
        a, b = pred == i + 1, label == i + 1
        assert score.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert (score.common, score.predicted, score.labelled) == ((a & b).sum(), a.sum(), b.sum())
        assert score.labelled_ml == pytest.approx(b.sum() * 0.8 * 1.2 * 2.5 / 1000)


def test_organ_at_the_border_of_the_volume_is_measured_as_in_the_whole():
    pred, label = box((12, 10, 8), (0, 5), (0, 10), (3, 8)), box((12, 10, 8), (0, 6), (1, 10), (2, 8))
    one_hot = [torch.as_tensor(v == 1)[None, None] for v in (pred, label)]
    (score,) = score_organs(pred, label, NAMES[:2], (1, 1, 1))
    want = compute_hausdorff_distance(*one_hot, percentile=95, include_background=True, spacing=[1.0, 1.0, 1.0])
    assert score.hd95_mm == pytest.approx(float(want))


def test_distance_of_shifted_boxes_is_the_shift_in_mm():
    a, b = box((20, 20, 20), (5, 10), (5, 10), (5, 10)), box((20, 20, 20), (5, 10), (5, 10), (8, 13))
    (score,) = score_organs(a, b, NAMES[:2], (1, 1, 2.5))
    assert score.hd95_mm == pytest.approx(7.5)
    assert score.dice == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("pred", "label", "dice"),
    [(0, 0, math.nan), (1, 0, 0.0), (0, 1, 0.0)],
    ids=["absent", "invented", "missed"],
)
def test_missing_organ_has_no_distance(pred, label, dice):
    maps = [box((6, 6, 6), (1, 4), (1, 4), (1, 4), value=v) for v in (pred, label)]
    (score,) = score_organs(*maps, NAMES[:2], (1, 1, 1))
    assert score.dice == pytest.approx(dice, nan_ok=True)
    assert math.isnan(score.hd95_mm)
    assert math.isnan(score.asd_mm)


def test_surfaces_may_be_left_out():
    assert all(math.isnan(s.hd95_mm) for s in score_organs(*random_maps(), NAMES, (1, 1, 1), surfaces=False))


def test_shapes_that_differ_are_named():
    with pytest.raises(
        ValueError, match=r"a.nii: prediction \(2, 2, 2\) and label \(2, 2, 3\) must have the same shape"
    ):
        score_organs(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), NAMES, (1, 1, 1), "a.nii")


def organ(case, common, predicted, labelled):
    dice = 2 * common / (predicted + labelled) if predicted + labelled else math.nan
    return OrganScore(case, "liver", dice, math.nan, math.nan, common, predicted, labelled, 0.0, 0.0)


def liver(*scores):
    return summarise(scores, NAMES[:2])["organs"]["liver"]


def test_pooled_dice_counts_all_voxels_as_one_volume_and_is_one_where_there_are_none():
    found = liver(organ("large", 900, 1000, 1000), organ("small", 0, 10, 10))
    # I = 900, U = 1100 + 20: (2 * 900 + 0) / (900 + 1120 + 1e-5)
    assert found["pooled_dice"] == pytest.approx(1800 / 2020)
    assert found["dice"]["mean"] == pytest.approx(0.45)
    assert found["dice"]["sd"] == pytest.approx(0.45 * math.sqrt(2))
    found = liver(organ("a", 0, 0, 0), organ("b", 0, 0, 0))
    assert found["pooled_dice"] == pytest.approx(1.0)
    assert found["dice"]["n"] == 0


def test_missed_and_invented_organs_are_counted():
    found = liver(organ("a", 0, 0, 5), organ("b", 0, 5, 0), organ("c", 4, 5, 5))
    assert (found["missed"], found["invented"]) == (1, 1)


def evaluated(tmp_path, cases=4, names=NAMES, file="scans/case{}.nii.gz"):
    """The folder of a handler that saw some cases on an oblique and anisotropic grid."""
    affine = np.array([[-0.9, 0.1, 0, 5], [0.1, 0.9, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])

    def step(engine, seed):
        pred, label = random_maps(seed=seed)
        image = torch.as_tensor(label * 50.0 + np.random.default_rng(seed).normal(0, 9, label.shape))
        meta = {"filename_or_obj": file.format(seed), "original_affine": affine, "spatial_shape": label.shape}
        volumes = {"image": image, "label": torch.as_tensor(label), "pred": torch.as_tensor(pred)}
        return [{k: MetaTensor(v[None], affine=affine, meta=dict(meta)) for k, v in volumes.items()}]

    engine = Engine(step)
    CaseScores(str(tmp_path), names, {"protocol": "paper"}).attach(engine)
    engine.run(range(cases))
    return tmp_path


def read(folder):
    """The rows of cases.csv, and scores.json."""
    with (folder / "cases.csv").open() as file:
        return list(csv.DictReader(file)), json.loads((folder / "scores.json").read_text())


def test_handler_writes_a_row_for_each_case_and_organ_and_a_summary(tmp_path):
    rows, scores = read(evaluated(tmp_path))
    assert [(row["case"], row["organ"]) for row in rows] == [
        (f"case{i}.nii.gz", n) for i in range(4) for n in NAMES[1:]
    ]
    assert scores["_run_"] == {"protocol": "paper"}
    by_case = [np.mean([float(r["dice"]) for r in rows if r["case"] == f"case{i}.nii.gz"]) for i in range(4)]
    assert scores["mean_dice"]["mean"] == pytest.approx(np.mean(by_case), abs=1e-4)
    assert scores["mean_dice"]["sd"] == pytest.approx(np.std(by_case, ddof=1), abs=1e-4)
    assert set(scores["organs"]) == set(NAMES[1:])


def test_a_case_without_organs_is_no_number_but_no_fault(tmp_path):
    rows, scores = read(evaluated(tmp_path, names=[*NAMES, "spleen"]))
    assert scores["organs"]["spleen"]["dice"] == {"mean": None, "sd": None, "n": 0}
    assert {row["dice"] for row in rows if row["organ"] == "spleen"} == {""}


@pytest.mark.parametrize(("cases", "drawn"), [(1, 1), (2, 2), (5, 3)])
def test_pictures_are_drawn_of_any_number_of_cases_and_the_summary_names_them(tmp_path, cases, drawn):
    folder = evaluated(tmp_path, cases)
    rows, scores = read(folder)
    known = [(row["case"], float(row["dice"])) for row in rows if row["dice"]]
    dice = {name: [value for case, value in known if case == name] for name, _ in known}
    ranked = sorted(dice, key=lambda name: np.mean(dice[name]))
    named = {"the only case": ranked[0]} if cases == 1 else {"best": ranked[-1], "worst": ranked[0]}
    assert scores["examples"] == named | ({"median": ranked[2]} if cases == 5 else {})
    assert Image.open(folder / "scores.png").size[0] > 500
    examples = read_png((folder / "examples.png").read_bytes())
    assert examples.shape[0] == pytest.approx(456 * drawn, abs=90)  # a row for each case below the legend
    assert all((examples[90:] == colour(value)).all(-1).any() for value in (1, 2, 3))  # lines of the labels


def test_the_planes_of_a_picture_are_those_of_the_image_on_the_files_grid_cut_out_of_slices_of_it(monkeypatch):
    file, own = np.diag([-0.8, 0.8, 2.0, 1.0]), np.zeros((4, 4))
    own[:3, :3] = np.array([[0, -1.1, 0], [0, 0, 1.2], [-1.5, 0, 0]])  # axes in another order and direction
    own[:, 3] = 0, 2, 30, 1  # the image shows a part of the file
    label = np.zeros((16, 18, 20), np.uint8)
    label[5:8, 8:12, 9:13] = 1
    meta = {"original_affine": file, "spatial_shape": np.array(label.shape)}
    image = MetaTensor(torch.rand(1, 14, 9, 10) * 1000 + 500, affine=torch.as_tensor(own), meta=dict(meta))
    whole = RestoreGrid(outside=0)(image, image).numpy()[0]
    made = []
    monkeypatch.setattr(
        RestoreGrid, "__call__", lambda *words, own=RestoreGrid.__call__: made.append(own(*words)) or made[-1]
    )
    planes, true, _ = central_planes(image, label, label)
    assert [min(thin.shape[1:]) for thin in made] == [1, 1, 1]
    for cut, plane, drawn in zip(cut_planes(whole, file, find_centre(label)), planes, true, strict=True):
        assert (plane.name, plane.size, plane.values.shape) == (drawn.name, drawn.size, drawn.values.shape)
        low, high = np.percentile(image.numpy(), (1, 99))
        expected = np.clip((cut.values - low) / (high - low), 0, 1) * 255
        assert np.abs(expected - plane.values).max() <= 1
        assert 0 < (cut.values == 0).mean() < 0.9


def test_cases_of_one_file_name_in_several_folders_stay_apart(tmp_path):
    rows, _ = read(evaluated(tmp_path, 2, file="scan{}/image.nii.gz"))
    assert [row["case"] for row in rows] == [f"scan{i}_image.nii.gz" for i in (0, 1) for _ in NAMES[1:]]


def test_running_twice_scores_each_case_once(tmp_path, monkeypatch):
    monkeypatch.setattr("vdt_workflows.evaluation.segmentation.is_first_process", lambda: False)
    engine = Engine(lambda engine, batch: [])
    handler = CaseScores(str(tmp_path), NAMES)
    handler.attach(engine)
    handler.scores = score_organs(*random_maps(), NAMES, (1, 1, 1), "of the run before")
    engine.run([0])
    assert handler.scores == []
    assert not list(tmp_path.iterdir())  # the other processes write nothing
