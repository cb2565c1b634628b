import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensity, ScaleIntensityRange

from vdt_transforms import NormalizeWindow

CT = np.random.default_rng(0).uniform(-1100, 1500, (1, 9, 8, 7))
KINDS = [
    pytest.param(lambda x: x, id="numpy"),
    pytest.param(torch.from_numpy, id="torch"),
    pytest.param(lambda x: MetaTensor(torch.from_numpy(x), affine=np.diag([2.0, 2, 3, 1])), id="MetaTensor"),
]
SETTINGS = {
    "HU": ((-200, 250), 18.25, 103.05, None),
    "no window": ("none", 18.25, 103.05, None),
    "own": ((-958, 327), "own", "own", None),
    "own, no window": ("none", "own", "own", None),
    "own mean": ((-958, 327), "own", 137, None),
    "own std": ((-958, 327), 83, "own", None),
    "clip alone": ((-1024, 400), "none", "none", None),
    "other ends": ((-1024, 400), 99, 77, (0, 255)),
    "other ends alone": ((-1024, 1050), "none", "none", (-2.118, 2.249)),
    "nothing": ("none", "none", "none", None),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_values_are_clipped_and_normalised_as_the_formula_says(setting):
    window, mean, std, ends = SETTINGS[setting]
    values = CT if window == "none" else np.clip(CT, *window)
    if ends is not None:
        values = np.interp(values, window, ends)
    mean, std = (
        {"own": own, "none": none}.get(x, x) for x, own, none in ((mean, values.mean(), 0), (std, values.std(), 1))
    )
    np.testing.assert_allclose(NormalizeWindow(*SETTINGS[setting])(CT), (values - mean) / std, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_bit_is_that_of_monais_pair(setting, kind, dtype):
    window, mean, std, ends = SETTINGS[setting]
    pair = [] if window == "none" else [ScaleIntensityRange(*window, *(ends or window), clip=True)]
    if (mean, std) != ("none", "none"):
        pair.append(NormalizeIntensity(None if mean == "own" else mean, None if std == "own" else std))
    volume = kind(CT.astype(dtype))
    expected = torch.as_tensor(Compose(pair)(volume), dtype=torch.float32)
    found = NormalizeWindow(*SETTINGS[setting])(volume)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert found.dtype in (torch.float32, np.float32)
    if isinstance(volume, MetaTensor):
        assert torch.equal(found.affine, volume.affine)


def test_a_volume_of_one_value_is_not_divided():
    assert not np.any(NormalizeWindow("none", "own", "own")(np.full((1, 2, 2, 2), 7)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window": "own"}, "window must be two intensities, or 'none' where no ends are given, got 'own'"),
        ({"ends": (0, 255)}, "window must be two intensities, or 'none' where no ends are given, got 'none'"),
        ({"window": (250, -200)}, r"window must be a lower and a higher intensity, got \(250, -200\)"),
        ({"mean": "mine"}, "mean must be a number, 'own' or 'none', got 'mine'"),
        ({"std": "one"}, "std must be a number, 'own' or 'none', got 'one'"),
        ({"std": 0}, "std must be positive, got 0"),
    ],
)
def test_other_words_and_values_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        NormalizeWindow(**settings)
