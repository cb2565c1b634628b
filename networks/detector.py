"""The key-slice lesion detector: Faster R-CNN with torchvision's parts on the 2D maps of P3D or MP3D."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from networks.p3d import P3D
from networks.resnet3d import check_classes

STRIDES = (4, 8, 16, 32, 64)
AIR = -2.118  # the window's lower end, after the published normalisation


class ExactAnchors(AnchorGenerator):
    """Anchors as published: 16, 32, 64, 128, 256 px at strides 4 to 64, ratios 0.5, 1, 2, not rounded to pixels."""

    def __init__(self) -> None:
        super().__init__(tuple((4 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors (A, 4) around the origin, one for each ratio height / width."""
        size = torch.as_tensor(scales, dtype=dtype, device=device)
        ratio = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (size / ratio[:, None]).flatten(), (size * ratio[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Anchors (H W A, 4) of each map at its true stride; `strides` are wrong where they do not divide a size."""
        anchors: list[Tensor] = []
        for i, cell in enumerate(self.cell_anchors):
            rows = torch.arange(grid_sizes[i][0], device=cell.device, dtype=cell.dtype) * (4 << i)
            columns = torch.arange(grid_sizes[i][1], device=cell.device, dtype=cell.dtype) * (4 << i)
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((shifts + cell).reshape(-1, 4))
        return anchors


class LesionProposals(RegionProposalNetwork):
    """torchvision's region proposals, with the published rules for which anchors learn what.

    An anchor that leaves its image is not trained on. A lesion without an anchor of IoU 0.7 takes the anchors that tie
    for its best IoU, if that is at least 0.3, and they learn this lesion's box. (torchvision trains on all anchors, has
    no least IoU, and lets such an anchor learn the box that it overlaps most.)
    """

    @torch.jit.unused
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Give each anchor its label (1 lesion, 0 background, -1 not trained on) and its box."""
        assigned = [assign_anchors(a, t["boxes"], t["size"]) for a, t in zip(anchors, targets, strict=True)]
        return [labels for labels, _ in assigned], [boxes for _, boxes in assigned]


def assign_anchors(anchors: Tensor, boxes: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Label anchors (A, 4) for the lesions `boxes` (L, 4) of an image of `size` (rows, columns), as published."""
    rows, columns = size.tolist()
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < columns) & (anchors[:, 3] < rows)
    labels = anchors.new_zeros(len(anchors))
    learnt = torch.zeros_like(anchors)
    if len(boxes):
        iou = box_iou(boxes, anchors).where(inside, -1.0)
        best, index = iou.max(0)
        labels[best >= 0.3] = -1
        labels[best >= 0.7] = 1
        for lesion, best_of_lesion in enumerate(iou.max(1).values.tolist()):
            if best_of_lesion >= 0.3:
                ties = iou[lesion] == best_of_lesion
                labels[ties], index[ties] = 1, lesion
        learnt = boxes.to(anchors.dtype)[index]
    labels[~inside] = -1
    return labels, learnt


class AlignedRoIPool(nn.Module):
    """7 x 7 RoIAlign with the half-pixel correction and as many samples as the box is large, from the map of its size.

    A box whose root of area is below 112, 224, 448 px reads the map of stride 4, 8, 16, a larger one that of stride 32.
    (torchvision's own pooler has neither the correction nor samples by size.)
    """

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps "0" to "3" and boxes [(B, 4)] -> (sum of B, C, 7, 7)."""
        maps = [features["0"], features["1"], features["2"], features["3"]]
        image = torch.cat([torch.full((len(boxes[i]), 1), float(i)) for i in range(len(boxes))]).to(maps[0].device)
        box = torch.cat(boxes)
        root = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).clamp(min=0).sqrt()
        level = (root / 56 + 1e-6).log2().floor().clamp(0, 3)
        rois = torch.cat([image.to(box.dtype), box], dim=1)
        pooled = torch.zeros(len(rois), maps[0].shape[1], 7, 7, dtype=box.dtype, device=box.device)
        for i, feature in enumerate(maps):
            chosen = torch.where(level == i)[0]
            values = roi_align(feature, rois[chosen], (7, 7), 0.25 / 2**i, 0, True)
            pooled[chosen] = values.to(pooled.dtype)
        return pooled


class LesionHeads(RoIHeads):
    """torchvision's second stage with the published box loss: smooth L1 of beta 1 (torchvision has 1/9 wired in)."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Maps and proposals [(P, 4)] -> detections in evaluation, losses in training, as torchvision's."""
        if self.training:
            return self._losses(features, proposals, image_shapes, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        boxes, scores, labels = self.postprocess_detections(logits.float(), deltas.float(), proposals, image_shapes)
        found = [{"boxes": boxes[i], "scores": scores[i], "labels": labels[i]} for i in range(len(boxes))]
        empty: dict[str, Tensor] = {}
        return found, empty

    @torch.jit.unused
    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        proposals, _, labels_by_image, learnt_by_image = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        labels, learnt = torch.cat(labels_by_image), torch.cat(learnt_by_image)
        lesions = torch.where(labels > 0)[0]
        deltas = deltas.float().unflatten(1, (-1, 4))[lesions, labels[lesions]]
        box_loss = F.smooth_l1_loss(deltas, learnt[lesions], reduction="sum", beta=1.0) / max(labels.numel(), 1)
        return [], {"loss_classifier": F.cross_entropy(logits.float(), labels), "loss_box_reg": box_loss}


class LesionDetector(nn.Module):
    """Find lesions in the centre slice of a stack: P3D or MP3D, feature pyramid, region proposals, box head.

    Training takes images and targets and returns the four losses, as torchvision's detectors do. In evaluation
    `forward` returns one tensor, so that it verifies, scripts and goes through MONAI's evaluator; `detect` returns a
    list of dictionaries. Boxes are (x1, y1, x2, y2) in pixels of the input, x along the columns.

    Source: arXiv 2012.08770 and its published configs: anchors, thresholds, samplers and losses are theirs. Different
    here: padding is air rather than zero (which reads as soft tissue), and boxes are class-specific in torchvision's
    way, with unused ones for the background. A published detector loads through `networks.load_pretrained`.

    Args:
        depth: of the backbone, see `P3D`.
        num_classes: kinds of lesion, the background not counted.
        conversion: "center" (P3D) or "group" (MP3D).
        pad_value: value of padded pixels, where images of a batch differ in size or are no multiples of 32.
        pyramid_channels: width of the feature pyramid and of the proposal head.
        head_channels: width of the box head's two layers.
        columns_first: images come in MONAI's order, slices of (X, Y) rather than (rows, columns). Boxes are the same
            in both.
        backbone: every further argument goes to `P3D` (`slices`, `base_channels`, `checkpointing`, ...).

    Raises:
        ValueError: if `num_classes` is below one, or as `P3D` does; in training, if targets are missing.
    """

    def __init__(
        self,
        depth: int | str = 63,
        *,
        num_classes: int = 1,
        conversion: str = "group",
        pad_value: float = AIR,
        pyramid_channels: int = 256,
        head_channels: int = 1024,
        columns_first: bool = False,
        **backbone: Any,
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        self.pad_value = pad_value
        self.columns_first = columns_first
        self.backbone = P3D(depth, conversion=conversion, **backbone)
        self.neck = FeaturePyramidNetwork(self.backbone.channels, pyramid_channels, LastLevelMaxPool())
        self.rpn = LesionProposals(
            ExactAnchors(),
            RPNHead(pyramid_channels, 3),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        self.roi_heads = LesionHeads(
            AlignedRoIPool(),
            TwoMLPHead(pyramid_channels * 7 * 7, head_channels),
            FastRCNNPredictor(head_channels, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.0,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        heads = self.roi_heads
        for module in [*self.neck.modules(), heads.box_head.fc6, heads.box_head.fc7]:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # there is a bias
        for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor | list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Stacks of slices -> losses in training, (N, 100, 6) in evaluation.

        Args:
            images: (N, D, H, W), or (N, 1, D, H, W), or in Python also a list of (D, H, W) of different sizes.
            targets: in training, for each image `boxes` (L, 4) and `labels` (L,), from 1; L may be 0.

        Returns:
            In training `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier` and `loss_box_reg`. In evaluation the
            rows x1, y1, x2, y2, score, label by falling score; rows of zeros fill up, their label 0 is the background.
        """
        if torch.jit.is_scripting():
            assert isinstance(images, Tensor)  # tells the script compiler which of the two it is
            batch = images.squeeze(1) if images.dim() == 5 else images
            if self.columns_first:
                batch = batch.transpose(-1, -2)
            sizes = [(batch.shape[-2], batch.shape[-1])] * len(batch)
            return as_rows(self._detections(self._padded(batch), sizes))
        batch, sizes = self._batch(images)
        if self.training:
            return self._losses(batch, sizes, targets)
        return as_rows(self._detections(batch, sizes))

    @torch.jit.unused
    def detect(self, images: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        """Find the lesions: for each image `boxes` (B, 4), `scores` and `labels` (B,), by falling score; B <= 100."""
        return self._detections(*self._batch(images))

    @torch.jit.unused
    def _losses(
        self, batch: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        if targets is None or len(targets) != len(batch):
            raise ValueError(
                f"training needs targets, one dictionary of boxes and labels for each of {len(batch)} images"
            )
        targets = [
            {"boxes": t["boxes"].to(batch), "labels": t["labels"].to(batch.device), "size": torch.tensor(size)}
            for t, size in zip(targets, sizes, strict=True)
        ]
        features = self._features(batch)
        proposals, losses = self.rpn(ImageList(batch, sizes), features, targets)
        _, more = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **more}

    def _detections(self, batch: Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        features = self._features(batch)
        proposals, _ = self.rpn(ImageList(batch, sizes), features)
        return self.roi_heads(features, proposals, sizes)[0]

    def _features(self, batch: Tensor) -> dict[str, Tensor]:
        """Five maps of the pyramid, in single precision also under autocast, since boxes are computed beside them."""
        maps: dict[str, Tensor] = {}
        for i, feature in enumerate(self.backbone(batch)):
            maps[str(i)] = feature
        features: dict[str, Tensor] = {}
        for name, feature in self.neck(maps).items():
            features[name] = feature.float()
        return features

    @torch.jit.unused
    def _batch(self, images: Tensor | list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """One padded batch (N, D, H, W) of the images, and each image's rows and columns."""
        stacks = [image.squeeze(0) if image.dim() == 4 else image for image in images]
        if self.columns_first:
            stacks = [stack.transpose(-1, -2) for stack in stacks]
        sizes = [(stack.shape[-2], stack.shape[-1]) for stack in stacks]
        rows, columns = (max(size[axis] for size in sizes) for axis in (0, 1))
        same = all(size == (rows, columns) for size in sizes)
        padded = stacks if same else [self._fill(s, rows - s.shape[-2], columns - s.shape[-1]) for s in stacks]
        return self._padded(torch.stack(padded)), sizes

    def _padded(self, batch: Tensor) -> Tensor:
        """Fill up to multiples of 32, at the bottom and on the right."""
        rows, columns = batch.shape[-2], batch.shape[-1]
        return self._fill(batch, -rows % 32, -columns % 32)

    def _fill(self, images: Tensor, rows: int, columns: int) -> Tensor:
        return F.pad(images, [0, columns, 0, rows], value=self.pad_value)


def as_rows(found: list[dict[str, Tensor]]) -> Tensor:
    """Detections of N images as one tensor (N, 100, 6): x1, y1, x2, y2, score, label; filled up with zeros."""
    rows = torch.zeros(len(found), 100, 6, device=found[0]["boxes"].device)
    for i, one in enumerate(found):
        count = len(one["boxes"])
        rows[i, :count, :4] = one["boxes"].to(rows.dtype)
        rows[i, :count, 4] = one["scores"].to(rows.dtype)
        rows[i, :count, 5] = one["labels"].to(rows.dtype)
    return rows
