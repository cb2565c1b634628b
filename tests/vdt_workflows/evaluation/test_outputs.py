import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import Orientation

from tests.support.bundle_runs import rows as read_rows
from vdt_workflows.drawing import colour, draw_sheet, read_png
from vdt_workflows.evaluation import outputs
from vdt_workflows.evaluation.outputs import ReportVolumes, SaveLesions, SavePredictions

SCHEMA = os.environ.get("SLICER_MARKUPS_SCHEMA", "")


def save(tmp_path, affine, axes="LPI", boxes=((1.0, 2, 3, 3, 6, 9),)):
    """Write lesions whose boxes are given in the voxels of the turned volume."""
    image = MetaTensor(torch.zeros(1, 10, 20, 30), affine=torch.as_tensor(affine).double(), meta={
        "filename_or_obj": "/somewhere/ct.nii.gz", "original_affine": np.asarray(affine)})  # fmt: skip
    image = Orientation(axes, labels=None)(image)
    data = {"image": image, "box": torch.tensor(boxes), "label": torch.zeros(len(boxes)).long(),
            "label_scores": torch.linspace(0.9, 0.5, len(boxes))}  # fmt: skip
    SaveLesions(str(tmp_path))(data)
    lesions = json.loads((tmp_path / "ct_lesions.json").read_text())["lesions"]
    return lesions, json.loads((tmp_path / "ct_lesions.mrk.json").read_text()), image


def test_voxels_are_those_of_the_file_whatever_way_the_volume_was_turned(tmp_path):
    affine = np.array([[0.7, 0, 0, -50], [0, 0.8, 0, -60], [0, 0, 2.5, 100], [0, 0, 0, 1.0]])  # RAS
    (lesion,), _, _ = save(tmp_path, affine)
    assert lesion["box_voxel"] == [6, 13, 20, 8, 17, 26]  # 9 - 3, 19 - 6, 29 - 9, ...
    centre = affine @ [7, 15, 23, 1]
    np.testing.assert_allclose(lesion["center_ras_mm"], centre[:3], atol=1e-3)
    np.testing.assert_allclose(lesion["center_lps_mm"], centre[:3] * [-1, -1, 1], atol=1e-3)
    np.testing.assert_allclose(lesion["size_mm"], [2 * 0.7, 4 * 0.8, 6 * 2.5], atol=1e-3)


def test_corners_of_the_markup_are_those_of_the_box_also_in_a_tilted_volume(tmp_path):
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.8, 2.5])
    affine[:3, 3] = [5, -7, 11]
    (lesion,), content, _ = save(tmp_path, affine)
    markup = content["markups"][0]
    assert (markup["type"], markup["coordinateSystem"]) == ("ROI", "LPS")
    axes = np.reshape(markup["orientation"], (3, 3))
    assert np.linalg.det(axes) == pytest.approx(1, abs=1e-4)
    signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
    corners = markup["center"] + (signs * np.array(markup["size"]) / 2) @ axes.T
    low, high = np.reshape(lesion["box_voxel"], (2, 3))
    voxels = np.where(signs < 0, low, high)
    wanted = (voxels @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    distances = np.linalg.norm(corners[:, None] - wanted[None], axis=-1)
    assert distances.min(1).max() < 0.01
    assert distances.min(0).max() < 0.01


@pytest.mark.skipif(not SCHEMA, reason="SLICER_MARKUPS_SCHEMA names no markups-schema-v1.0.3.json of 3D Slicer")
@pytest.mark.parametrize("boxes", [((1.0, 2, 3, 3, 6, 9), (0.0, 0, 0, 1, 1, 1)), np.zeros((0, 6)).tolist()])
def test_markups_fit_the_schema_of_slicer(tmp_path, boxes):
    schema = json.loads(Path(SCHEMA).read_text())
    _, content, _ = save(tmp_path, np.diag([0.7, 0.8, 2.5, 1]), boxes=boxes)
    jsonschema.Draft7Validator(schema).validate(content)
    assert content["@schema"].endswith(f"/{Path(SCHEMA).name}#")
    broken = {**content, "markups": [{"type": "Box"}]}
    assert not jsonschema.Draft7Validator(schema).is_valid(broken)


def test_nothing_found_is_written_too(tmp_path):
    lesions, content, _ = save(tmp_path, np.eye(4), boxes=np.zeros((0, 6)).tolist())
    assert lesions == []
    assert content["markups"] == []


LOGITS = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.5]]).log_softmax(1)


def predict(folder, logits=LOGITS, paths=("b.png", 'a, "1".png'), **options):
    engine = Engine(lambda engine, batch: {"pred": batch["logits"]})
    SavePredictions(str(folder), **options).attach(engine)
    engine.run([{"path": [path], "logits": row[None]} for path, row in zip(paths, logits, strict=True)])
    return json.loads((folder / "predictions.json").read_text()), read_rows(folder / "predictions.csv")


def test_the_most_probable_classes_come_first_by_name(tmp_path):
    found, rows = predict(tmp_path / "out", class_names=["cat", "dog", "eel"], top=2)
    assert [item["image"] for item in found] == ["b.png", 'a, "1".png']
    assert [[guess["class"] for guess in item["top"]] for item in found] == [["dog", "eel"], ["cat", "eel"]]
    assert [[guess["index"] for guess in item["top"]] for item in found] == [[1, 2], [0, 2]]
    for item, logits in zip(found, LOGITS, strict=True):
        for guess in item["top"]:
            assert guess["probability"] == pytest.approx(logits.exp()[guess["index"]].item())
    expected = [("b.png", "1", "dog", "1"), ("b.png", "2", "eel", "2")]
    expected += [('a, "1".png', "1", "cat", "0"), ('a, "1".png', "2", "eel", "2")]
    assert [(row["image"], row["rank"], row["class"], row["index"]) for row in rows] == expected
    assert float(rows[0]["probability"]) == pytest.approx(LOGITS[0, 1].exp().item(), abs=1e-6)


def test_without_names_the_classes_are_numbers_and_top_may_exceed_them(tmp_path):
    found, rows = predict(tmp_path, top=10)
    assert [[guess["class"] for guess in item["top"]] for item in found] == [["1", "2", "0"], ["0", "2", "1"]]
    assert [sum(guess["probability"] for guess in item["top"]) for item in found] == pytest.approx([1, 1])
    assert len(rows) == 6


def test_half_precision_logits_are_understood(tmp_path):
    found, _ = predict(tmp_path, LOGITS.half())
    assert [item["top"][0]["index"] for item in found] == [1, 0]


TILTED = np.array([[0, -0.5, 0.3, 5], [0.8, 0, 0, -7], [0, 0.1, 2.0, 11], [0, 0, 0, 1.0]])  # mm


def report(folder, labels, **options):
    meta = {"filename_or_obj": "/somewhere/ct.nii.gz", "original_affine": TILTED, "spatial_shape": labels.shape}
    image = torch.arange(labels.size).reshape(labels.shape).float()
    values = {"image": image, "pred": torch.as_tensor(labels)}
    item = {key: MetaTensor(v[None], affine=torch.as_tensor(TILTED), meta=dict(meta)) for key, v in values.items()}
    engine = Engine(lambda *_: [item])
    ReportVolumes(str(folder), ["background", "left, upper", "right", "none"], **options).attach(engine)
    engine.run([0])


def test_volumes_are_those_of_the_voxels_in_ml_whatever_their_edges_directions(tmp_path, caplog):
    caplog.set_level("INFO")
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[1:3, 2:6, 3:8] = 1  # 40 voxels
    labels[4, 0, 0] = 2
    report(tmp_path, labels, statistics=True)
    voxel = abs(0.8 * (0.5 * 2.0 + 0.1 * 0.3)) / 1000  # ml, by the determinant
    written = read_rows(tmp_path / "statistics.csv")
    assert [(row["label"], row["voxels"]) for row in written] == [("left, upper", "40"), ("right", "1"), ("none", "0")]
    assert [float(row["ml"]) for row in written] == pytest.approx([40 * voxel, voxel, 0], rel=1e-5)
    assert f"ct: left, upper: {40 * voxel:.3g} ml, right: {voxel:.3g} ml" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.ctbl", "statistics.csv"]
    report(tmp_path, labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.ctbl"]
    assert "statistics.csv: removed, it was of label maps that are replaced now" in caplog.text


def test_the_colour_table_is_in_the_documented_format_of_slicer_with_the_colours_of_previews(tmp_path):
    """A line for each value from 0: value, name without white space, red, green, blue and opacity of 0 to 255."""
    report(tmp_path, np.zeros((6, 7, 8), np.uint8))
    header, _, *lines = (tmp_path / "labels.ctbl").read_text().splitlines()
    assert header == "# Color table file"
    names = ["background", "left,_upper", "right", "none"]
    assert [line.split()[:2] for line in lines] == [[str(value), name] for value, name in enumerate(names)]
    written = [tuple(map(int, line.split()[2:])) for line in lines]
    assert written == [(0, 0, 0, 0), *((*colour(value), 255) for value in (1, 2, 3))]


@pytest.mark.parametrize("found", [True, False])
def test_a_preview_shows_the_labels_in_their_colours_and_names_those_that_were_found(tmp_path, found, monkeypatch):
    legends = []
    monkeypatch.setattr(outputs, "draw_sheet", lambda *words, **more: legends.append(words[1:]) or draw_sheet(*words))
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[1:3, 2:6, 3:8] = 2 * found
    report(tmp_path, labels, previews=True)
    picture = read_png((tmp_path / "ct_seg.png").read_bytes())
    (title, legend) = legends[0]
    assert title == ("ct, where most is labelled" if found else "ct, nothing is labelled")
    assert legend == ({2: "right: 0.033 ml"} if found else {})
    assert bool((picture == colour(2)).all(-1).any()) == found
