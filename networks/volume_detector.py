"""Lesions in a whole CT: the key-slice detector on every slice, and its boxes linked through the slices."""

from collections.abc import Sequence
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
        self.window = (float(window[0]), float(window[1]))
        self.value_range = (float(value_range[0]), float(value_range[1]))
        self.size = size
        self.batch, self.least_score, self.least_iou = batch, least_score, least_iou

    @torch.jit.unused
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
        intervals = torch.as_tensor(affines).reshape(-1, 4, 4)[:, :3, 2].norm(dim=1).tolist()
        plain = torch.as_tensor(volumes).as_subclass(Tensor)
        rows = [self.find(plain[i, 0], intervals[min(i, len(intervals) - 1)]) for i in range(len(plain))]
        labels = [torch.zeros(len(found), dtype=torch.int64) for found in rows]
        return [
            {"box": f[:, :6], "label": label, "label_scores": f[:, 6]} for f, label in zip(rows, labels, strict=True)
        ]

    def find(self, volume: Tensor, interval: float) -> Tensor:
        """Find the lesions of a volume (X, Y, Z) whose slices are `interval` mm apart; TorchScript takes it too.

        Returns:
            (L, 7): x1, y1, z1, x2, y2, z2 in voxels and the score, by falling score.
        """
        if not interval > 0:
            raise ValueError(
                f"the distance between the volume's slices must be a positive number of mm, got {interval}"
            )
        depth = volume.shape[2]
        rows: list[Tensor] = []
        for first in range(0, depth, self.batch):
            stacks = [self.stack(volume, key, interval) for key in range(first, min(first + self.batch, depth))]
            found = self.network(torch.stack(stacks))
            assert isinstance(found, Tensor)  # tells the script compiler what it is
            rows.append(found)
        x, y = self._sides(volume.shape[0], volume.shape[1])
        scale = torch.tensor([volume.shape[0] / x, volume.shape[1] / y] * 2, device=volume.device)
        each = torch.cat(rows)
        number = torch.arange(len(each), device=each.device)[:, None].expand(each.shape[0], each.shape[1])
        kept = (each[..., 5] > 0) & (each[..., 4] >= self.least_score)
        boxes, scores = link_boxes(each[kept][:, :4] * scale, each[kept][:, 4], number[kept], self.least_iou)
        return torch.cat([boxes, scores[:, None]], 1)

    def stack(self, volume: Tensor, key: int, interval: float) -> Tensor:
        """Give the stack (slices, X, Y) around a slice of a volume (X, Y, Z), as training prepares it.

        A slice between two stored ones is interpolated; beyond the ends of the volume the last one stands in.
        """
        offsets = torch.arange(-(self.slices // 2), self.slices // 2 + 1, dtype=torch.float64)  # from the key slice
        places = offsets * self.distance / interval
        near = (places.abs() + 1e-6).floor()  # 3 * (2.5 / 7.5) is meant to be 1
        weight = (places.abs() - near).clamp(min=0).to(volume.device, torch.float32)[:, None, None]
        last = volume.shape[2] - 1
        inner, outer = [
            volume[:, :, (key + (places.sign() * step).long()).clamp(0, last)].permute(2, 0, 1).float()
            for step in [near, near + 1]
        ]
        return self._scaled(inner.lerp(outer, weight))

    def _scaled(self, stack: Tensor) -> Tensor:
        (low, high), (start, end) = self.window, self.value_range
        stack = (stack.clamp(low, high) - low) / (high - low) * (end - start) + start
        x, y = self._sides(stack.shape[1], stack.shape[2])
        if x == stack.shape[1] and y == stack.shape[2]:
            return stack
        return F.interpolate(stack[None], [x, y], mode="bilinear", align_corners=False)[0]

    def _sides(self, x: int, y: int) -> tuple[int, int]:
        if not self.size:
            return x, y
        return int(x * self.size / max(x, y) + 0.5), int(y * self.size / max(x, y) + 0.5)


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
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    for seed in order:
        if not free[seed]:
            continue
        found = [seed]
        for step in (-1, 1):
            last = seed
            while True:
                near = torch.where(free & (slices == slices[last] + step) & (scores >= least_part * scores[seed]))[0]
                iou = box_iou(boxes[last][None], boxes[near])[0]
                if not len(near) or iou.max() < least_iou:
                    break
                last = int(near[iou.argmax()])
                found.append(last)
        members = torch.tensor(found)
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
