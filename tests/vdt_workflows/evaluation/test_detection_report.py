from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from PIL import Image
from torch import nn

from tests.support.bundle_runs import BASE, ROOT, TINY, config_files
from vdt_workflows.data.key_slices import add_losses, collate_key_slices, prepare_key_slices
from vdt_workflows.evaluation.detection_report import DetectionReport, DetectionScores, as_key_slices
from vdt_workflows.training.optimisation import ClipGradients, StepSchedule, warm_up

BUNDLE = ROOT / "bundles" / "deeplesion_lesion_detection"


def item(name, lesions, size=(24, 16), scale=(1.0, 1.0)):
    lesions = np.asarray(lesions, np.float32).reshape(-1, 4)
    return {
        "image": torch.zeros(9, *size),
        "box": lesions,
        "label": np.ones(len(lesions), np.int64),
        "scale": np.array(scale),
        "truth": {"lesions": lesions, "patient": name, "name": f"Images_png/{name}/001.png", "slice_interval": 1.0},
    }


class Answers(nn.Module):
    """Stands in for a detector: one box a slice."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = list(boxes)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, targets=None):
        if self.training:
            return {"a": self.weight * sum(len(t["boxes"]) for t in targets), "b": self.weight * 2}
        rows = torch.zeros(len(images), 100, 6)
        for row in rows:
            row[0] = torch.tensor([*self.boxes.pop(0), 0.9, 1])
        return rows


def evaluate(items, boxes, handlers=(), metric=None):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[collate_key_slices(items[:1]), collate_key_slices(items[1:])],
        network=Answers(boxes),
        prepare_batch=prepare_key_slices,
        key_val_metric={"val_froc": metric or DetectionScores()},
        val_handlers=list(handlers),
        decollate=False,
    )
    evaluator.run()
    return evaluator.state.metrics


ITEMS = [item("a", [[2, 2, 10, 10]]), item("b", [[4, 8, 20, 40]], scale=(0.5, 0.25)), item("c", [])]
BOXES = [[2, 2, 10, 10], [2, 2, 10, 10], [0, 0, 5, 5]]  # the second is [4, 8, 20, 40] in the pixels of its file


def test_metric_scores_in_the_pixels_of_the_files_and_names_every_value():
    metrics = evaluate(ITEMS, BOXES)
    assert metrics["val_froc"] == 1
    assert metrics["val_froc_at_0.5"] == metrics["val_froc_at_16"] == 1
    assert 0 < metrics["val_froc_AP_50"] <= 1
    assert all(isinstance(value, float) for value in metrics.values())


def test_metric_begins_anew_with_each_evaluation():
    metric = DetectionScores("strict")
    for _ in range(2):
        evaluate(ITEMS, BOXES, metric=metric)
        assert [s.patient for s in metric.slices] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"rule must be 'lenient' or 'strict', got 'coco'"):
        DetectionScores("coco")


def test_report_writes_scores_detections_curve_and_pictures(tmp_path):
    metric = DetectionScores()
    report = DetectionReport(str(tmp_path), metric, intervals=5, pictures=2, notes={"split": "test"})
    metrics = evaluate(ITEMS, BOXES, [report], metric)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["val_froc"] == metrics["val_froc"]
    assert scores["strict"]["sensitivity_at_1"] == 1
    assert scores["lenient_95_percent_intervals"]["sensitivity_at_1"] == [1, 1]
    assert scores["_run_"] == {"split": "test"}
    detections = json.loads((tmp_path / "detections.json").read_text())
    assert detections[1] == {"image": "Images_png/b/001.png", "boxes": [[4, 8, 20, 40]], "scores": [0.9]}
    assert sorted(p.name for p in (tmp_path / "slices").iterdir()) == ["a_001.png", "b_001.png"]
    assert Image.open(tmp_path / "froc.png").size[0] > 500


def test_the_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("vdt_workflows.evaluation.detection_report.is_first_process", lambda: False)
    metric = DetectionScores()
    evaluate(ITEMS, BOXES, [DetectionReport(str(tmp_path), metric)], metric)
    assert list(tmp_path.iterdir()) == []


def test_stacks_of_one_size_become_a_tensor_and_of_two_a_list():
    batch = collate_key_slices(ITEMS)
    assert batch["image"].shape == (3, 9, 24, 16)
    images, labels, (targets,), _ = prepare_key_slices(batch, torch.device("cpu"))
    assert images.shape == (3, 9, 24, 16)
    assert [t["boxes"].shape for t in targets] == [(1, 4), (1, 4), (0, 4)]
    assert labels[0]["truth"]["name"] == "Images_png/a/001.png"
    batch = collate_key_slices([ITEMS[0], item("d", [], size=(32, 16))])
    assert [image.shape for image in prepare_key_slices(batch)[0]] == [(9, 24, 16), (9, 32, 16)]


def test_losses_are_added_and_the_gradient_of_the_sum_is_clipped_before_each_step():
    network = Answers([])
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    rates = []

    class Note:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self)

        def __call__(self, engine):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[collate_key_slices(ITEMS)] * 5,
        network=network,
        optimizer=optimizer,
        loss_function=add_losses,
        prepare_batch=prepare_key_slices,
        train_handlers=[
            ClipGradients(network.parameters(), 0.5),
            StepSchedule(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)),
            Note(),
        ],
        accumulation_steps=2,
        decollate=False,
    )
    trainer.run()
    assert trainer.state.output["loss"].item() == pytest.approx(4 * (1 - 0.5 - 0.25))
    assert rates == [1, 0.5, 0.5, 0.25, 0.125]  # steps after the second, the fourth and the last micro batch
    # Each step has a gradient of norm 0.5; torch adds 1e-6 to the norm that it divides by.
    assert network.weight.item() == pytest.approx(1 - 0.5 - 0.25 - 0.125, abs=1e-5)


def rates(steps, **arguments):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    schedule = warm_up(optimizer, steps, **arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_rate_rises_by_the_published_formula_and_drops_at_the_published_steps():
    found = rates(2400, warmup_steps=500, milestones=[16 / 24, 22 / 24])
    wanted = [0.3 * (1 - (1 - i / 500) * 2 / 3) for i in range(500)]
    np.testing.assert_allclose(found[:500], wanted, rtol=1e-9)
    assert found[500] == found[1599] == pytest.approx(0.3)
    assert found[1600] == found[2199] == pytest.approx(0.03)
    assert found[2200] == found[-1] == pytest.approx(0.003)


def test_rate_falls_as_a_cosine_without_milestones():
    found = rates(100, warmup_steps=0)
    np.testing.assert_allclose(found, [0.15 * (1 + math.cos(math.pi * i / 100)) for i in range(100)], atol=1e-9)


# Data


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_cached_stacks_are_those_that_are_read_each_time(key_slices, tmp_path, cache):
    def batches(cache):
        parser = ConfigParser(ConfigParser.load_config_file(config_files(BUNDLE, BASE)[0]))
        parser.update({**TINY[BUNDLE.name], "dataset_dir": str(key_slices), "cache": cache, "cache_dir": str(tmp_path)})
        for part in ("train", "validate"):
            dataset = parser.get_parsed_content(f"{part}::dataset")
            yield from (collate_key_slices([dataset[epoch, 1], dataset[epoch, 0]]) for epoch in (0, 1, 0))

    for found, wanted in zip(batches(cache), batches("none"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found["image"], wanted["image"], strict=True))
        for label, other in zip(found["label"], wanted["label"], strict=True):
            assert torch.equal(label["boxes"], other["boxes"])
            detections = torch.zeros(1, 100, 6)
            (slice_,), (same,) = as_key_slices(detections, [label]), as_key_slices(detections, [other])
            assert slice_.name == same.name
            np.testing.assert_array_equal(slice_.lesions, same.lesions)
    assert len(list(tmp_path.glob("*.pt"))) == (12 if cache == "disk" else 0)
