"""Scores of cubes are means of probabilities over rotations and networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import ResNet3DClassifier
from vdt_workflows.evaluation.cubes import CubeInferer
from vdt_workflows.training.checkpoints import save_weights


@pytest.mark.parametrize("rotations", [1, 4, 24])
def test_every_rotation_is_seen_once(rotations):
    seen = []

    def look(cube):
        seen.append(cube.flatten().tolist())
        return torch.zeros(1, 2)

    cube = torch.arange(27.0).view(1, 1, 3, 3, 3)
    CubeInferer(rotations)(cube, look)
    assert len({tuple(s) for s in seen}) == len(seen) == rotations
    for s in seen:  # turned and not mirrored: the three axes keep their handedness
        at = {v: i for i, v in enumerate(s)}
        points = torch.tensor([[at[v] // 9, at[v] // 3 % 3, at[v] % 3] for v in (22, 16, 14, 13)], dtype=torch.float64)
        assert torch.linalg.det(points[:3] - points[3]) == pytest.approx(1)


def test_scores_are_mean_probabilities_of_all_networks_and_rotations(tmp_path):
    torch.manual_seed(0)
    build = lambda: ResNet3DClassifier(18, 2, base_channels=4)  # noqa: E731
    first, second = build().eval(), build().eval()
    save_weights(second, tmp_path / "fold1.pt")
    cube = torch.randn(3, 1, 16, 16, 16)
    with torch.inference_mode():
        turns = [cube.rot90(k, (2, 3)) for k in range(4)]
        wanted = torch.stack([n(t).softmax(1) for n in (first, second) for t in turns]).mean(0)
        scores = CubeInferer(4, [tmp_path / "fold1.pt"], build())(cube, first).softmax(1)
        torch.testing.assert_close(scores, wanted)
        assert torch.equal(CubeInferer()(cube, first), first(cube))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rotations": 8}, "rotations must be 1, 4 or 24, got 8"),
        ({"ensemble": "fold1.pt", "network": nn.Identity()}, "ensemble must be a list of files"),
        ({"ensemble": ["fold1.pt"]}, "ensemble must be a list of files, with a network that they fit"),
    ],
)
def test_wrong_arguments_are_told(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        CubeInferer(**arguments)
