"""The key-slice detector as one graph without lists and loops that depend on the data, which ONNX takes.

torchvision's own stages take out boxes at each step, and `batched_nms` asks how many are left, where `torch.export`
stops. Here boxes that are out stay in place with a score of -1: it is the lowest, so that they suppress no other one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align

from networks import LesionDetector


class DetectorGraph(nn.Module):
    """A `LesionDetector` for one stack of slices, with the answer that it gives in evaluation.

    Args:
        detector: the network.
    """

    def __init__(self, detector: LesionDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """(1, slices, X, Y), or rows and columns as the network takes them -> (1, 100, 6), see `LesionDetector`."""
        detector, rpn, heads = self.detector, self.detector.rpn, self.detector.roi_heads
        batch = images.transpose(-1, -2) if detector.columns_first else images
        size = (batch.shape[-2], batch.shape[-1])
        features = detector._features(detector._padded(batch))
        maps = list(features.values())
        objectness, deltas = rpn.head(maps)
        anchors = rpn.anchor_generator(ImageList(batch, [size]), maps)
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in objectness]
        logits, offsets = concat_box_prediction_layers(objectness, deltas)
        boxes = clip_boxes_to_image(rpn.box_coder.decode(offsets, anchors).reshape(-1, 4), size)
        found, best = [], []
        for of_level, scores in zip(boxes.split(counts), logits.flatten().split(counts), strict=True):
            first = scores.topk(min(rpn.pre_nms_top_n(), scores.shape[0])).indices
            found.append(of_level[first])
            best.append(_suppress(of_level[first], scores[first].sigmoid(), rpn.min_size, rpn.nms_thresh))
        proposals, scores = _best(torch.cat(found), torch.cat(best), rpn.post_nms_top_n())
        classes, deltas = heads.box_predictor(heads.box_head(_pool(maps, proposals)))
        number = classes.shape[1]
        decoded = heads.box_coder.decode(deltas, [proposals]).reshape(-1, number, 4)
        probable = torch.where(scores[:, None] >= 0, classes.softmax(1), -1.0)
        found, best, labels = [], [], []
        for label in range(1, number):
            mine = clip_boxes_to_image(decoded[:, label], size)
            found.append(mine)
            best.append(_suppress(mine, probable[:, label], 1e-2, heads.nms_thresh))
            labels.append(torch.full_like(best[-1], float(label)))
        every = torch.cat([torch.cat(found), torch.cat(labels)[:, None]], 1)
        rows, scores = _best(every, torch.cat(best), heads.detections_per_img)
        rows = torch.cat([rows[:, :4], scores[:, None], rows[:, 4:]], 1)
        rows = torch.where(scores[:, None] > heads.score_thresh, rows, 0.0)
        return nn.functional.pad(rows, [0, 0, 0, 100 - rows.shape[0]])[None]


def _suppress(boxes: Tensor, scores: Tensor, least_side: float, iou: float) -> Tensor:
    """Give the scores (B,) with -1 for boxes (B, 4) that are too small, or that a better one overlaps."""
    sides = boxes[:, 2:] - boxes[:, :2]
    scores = torch.where((sides >= least_side).all(1), scores, -1.0)
    kept = torch.zeros_like(scores).index_fill(0, nms(boxes, scores, iou), 1.0)
    return torch.where(kept > 0, scores, -1.0)


def _best(rows: Tensor, scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Take the rows of the highest scores, by falling score."""
    first = scores.topk(min(most, scores.shape[0]))
    return rows[first.indices], first.values


def _pool(maps: list[Tensor], boxes: Tensor) -> Tensor:
    """As `AlignedRoIPool`: each level pools all boxes, those of the others as empty ones at the origin."""
    root = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    level = (root / 56 + 1e-6).log2().floor().clamp(0, 3)
    pooled = []
    for i in range(4):
        mine = (level == i)[:, None]
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), torch.where(mine, boxes, 0.0)], 1)
        values = roi_align(maps[i], rois, (7, 7), 0.25 / 2**i, 0, True)
        pooled.append(torch.where(mine[:, :, None, None], values, 0.0))
    return torch.stack(pooled).sum(0)
