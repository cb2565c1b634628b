"""Lesions in a whole CT: the key-slice detector on every slice, and its boxes linked through the slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from torchvision.ops import box_iou


class VolumeLesionDetector(nn.Module):
    """Find lesions in whole CT volumes with a key-slice detector: every slice is a key slice in turn.

    Volumes come in MONAI's order and in HU, turned to LPI (x to the patient's left, y to the back, z to the feet), as
    the detector learnt to see slices. Each slice is scaled once; the stacks of neighbouring key slices share it.
    MONAI Label and MONAI's evaluator call it like a detector; the first sets `network` for each request.

    Args:
        network: a `LesionDetector` that takes its images in MONAI's order (`columns_first=True`).
        slices: of a stack, as in training.
        distance: between them in mm, as in training.
        window: HU that values are clipped to, as in training.
        value_range: what the window's ends become, as in training.
        size: length in pixels to which a slice's longer side is resized, as in training; 0 keeps it.
        batch: number of stacks at once.
        least_score: detections of a lower score are left out.
        least_iou: of boxes in neighbouring slices that are one lesion.

    Raises:
        ValueError: if the distance between a volume's slices is unknown or not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        slices: int = 9,
        distance: float = 2.5,
        window: Sequence[float] = (-1024, 1050),
        value_range: Sequence[float] = (-2.118, 2.249),
        size: int = 512,
        batch: int = 4,
        least_score: float = 0.3,
        least_iou: float = 0.5,
    ) -> None:
        super().__init__()
        self.network = network
        self.slices, self.distance = slices, distance
        self.window, self.value_range, self.size = tuple(window), tuple(value_range), size
        self.batch, self.least_score, self.least_iou = batch, least_score, least_iou

    def forward(self, volumes: Tensor, *args: Any, **kwargs: Any) -> list[dict[str, Tensor]]:
        """Find the lesions of volumes (N, 1, X, Y, Z) with an affine (`MetaTensor`), by falling score.

        Further arguments, which MONAI Label passes, are not needed.

        Returns:
            For each volume `box` (B, 6): x1, y1, z1, x2, y2, z2 in voxels, a voxel's centre at its index; `label` (B,),
            zeros; `label_scores` (B,).
        """
        affines = getattr(volumes, "affine", None)
        if affines is None:
            raise ValueError("volumes must be MetaTensors, whose affine holds the distance between slices")
        affines = torch.as_tensor(affines).reshape(-1, 4, 4)
        plain = torch.as_tensor(volumes).as_subclass(Tensor)
        return [self._find(plain[i, 0], affines[min(i, len(affines) - 1)]) for i in range(len(plain))]

    def stacks(self, volume: Tensor, interval: float) -> Iterator[Tensor]:
        """Yield the stacks (slices, X, Y) of all slices of a volume (X, Y, Z), as training prepares them.

        A slice between two stored ones is interpolated; beyond the ends of the volume the last one stands in.
        """
        planes = volume.permute(2, 0, 1).float()
        offsets = range(-(self.slices // 2), self.slices // 2 + 1)  # from the key slice
        places = torch.tensor([k * self.distance / interval for k in offsets], dtype=torch.float64)
        near = (places.abs() + 1e-6).floor()  # 3 * (2.5 / 7.5) is meant to be 1
        weight = (places.abs() - near).clamp(min=0).to(planes)[:, None, None]
        near, far = (places.sign() * near).long(), (places.sign() * (near + 1)).long()
        for key in range(len(planes)):
            inner, outer = (planes[(key + offset).clamp(0, len(planes) - 1)] for offset in (near, far))
            yield self._scaled(inner.lerp(outer, weight))

    def _scaled(self, stack: Tensor) -> Tensor:
        (low, high), (start, end) = self.window, self.value_range
        stack = (stack.clamp(low, high) - low) / (high - low) * (end - start) + start
        sides = self._sides(stack)
        if sides == tuple(stack.shape[-2:]):
            return stack
        return F.interpolate(stack[None], sides, mode="bilinear", align_corners=False)[0]

    def _sides(self, stack: Tensor) -> tuple[int, int]:
        x, y = stack.shape[-2:]
        if not self.size:
            return x, y
        return int(x * self.size / max(x, y) + 0.5), int(y * self.size / max(x, y) + 0.5)

    def _find(self, volume: Tensor, affine: Tensor) -> dict[str, Tensor]:
        interval = float(affine[:3, 2].norm())
        if not interval > 0:
            raise ValueError(
                f"the distance between the volume's slices must be a positive number of mm, got {interval}"
            )
        x, y = self._sides(volume[..., 0][None])
        scale = torch.tensor([volume.shape[0] / x, volume.shape[1] / y] * 2, device=volume.device)
        rows: list[Tensor] = []
        pending: list[Tensor] = []
        for i, stack in enumerate(self.stacks(volume, interval), 1):
            pending.append(stack)
            if len(pending) == self.batch or i == volume.shape[2]:
                rows.append(self.network(torch.stack(pending)))
                pending = []
        found = torch.cat(rows)
        number = torch.arange(len(found), device=found.device)[:, None].expand(found.shape[:2])
        kept = (found[..., 5] > 0) & (found[..., 4] >= self.least_score)
        boxes, scores = link_boxes(found[kept][:, :4] * scale, found[kept][:, 4], number[kept], self.least_iou)
        return {"box": boxes, "label": torch.zeros(len(boxes), dtype=torch.int64), "label_scores": scores}


def link_boxes(
    boxes: Tensor, scores: Tensor, slices: Tensor, least_iou: float = 0.5, least_part: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Link boxes of single slices through neighbouring slices into 3D boxes.

    The box of the highest score begins a lesion. Up and down from it, slice by slice, the lesion takes the box that
    overlaps its last one most, as long as the IoU is at least `least_iou` and the score at least `least_part` of the
    first one's. The lesion's box is the mean of its boxes weighted by score, from its first slice to its last; its
    score is the highest. Other boxes of these slices that overlap the lesion's box by `least_iou` vanish, as in
    non-maximum suppression. Then the best of the boxes that are left begins the next lesion.

    Args:
        boxes: (B, 4).
        scores: (B,).
        slices: (B,), number of the slice of each.
        least_iou: of two boxes in neighbouring slices.
        least_part: of a lesion's best score.

    Returns:
        Boxes (L, 6) as x1, y1, z1, x2, y2, z2, z half a slice beyond the outer slices; and scores (L,), falling.
    """
    boxes, scores, slices = boxes.detach().float().cpu(), scores.detach().float().cpu(), slices.cpu()
    free = torch.ones(len(boxes), dtype=torch.bool)
    lesions: list[Tensor] = []
    best: list[Tensor] = []
    for seed in scores.argsort(descending=True, stable=True).tolist():
        if not free[seed]:
            continue
        members = [seed]
        for step in (-1, 1):
            last = seed
            while True:
                near = torch.where(free & (slices == slices[last] + step) & (scores >= least_part * scores[seed]))[0]
                iou = box_iou(boxes[last][None], boxes[near])[0]
                if not len(near) or iou.max() < least_iou:
                    break
                last = int(near[iou.argmax()])
                members.append(last)
        weights = scores[members] / scores[members].sum()
        flat = (boxes[members] * weights[:, None]).sum(0)
        first, end = slices[members].min() - 0.5, slices[members].max() + 0.5
        inside = (slices > first) & (slices < end)
        free[members] = False
        free &= ~(inside & (box_iou(flat[None], boxes)[0] >= least_iou))
        lesions.append(torch.stack([flat[0], flat[1], first, flat[2], flat[3], end]))
        best.append(scores[seed])
    if not lesions:
        return torch.zeros(0, 6), torch.zeros(0)
    return torch.stack(lesions), torch.stack(best)
