"""From intensities as they are stored, such as HU, to what a network takes."""

from collections.abc import Sequence
from typing import Any

from monai.config import NdarrayOrTensor
from monai.transforms import NormalizeIntensity, ScaleIntensityRange, Transform
from monai.utils import TransformBackends

from vdt_transforms.dictionary import ArrayPerKey


class NormalizeWindow(Transform):
    """Clip a volume to a window of intensities, then subtract a mean and divide by a standard deviation.

    It is `monai.transforms.ScaleIntensityRange` and `NormalizeIntensity` in one, with words for what shall not be done:
    a config names the settings and needs no condition. The result is float32.

    Args:
        window: least and greatest intensity to keep, in HU for CT; "none" does not clip.
        mean: what is subtracted; "own" takes the volume's own, after clipping, and "none" subtracts nothing.
        std: what the rest is divided by; "own" and "none" as for `mean`. An own one of 0 does not divide.
        ends: what the ends of the window become before mean and std count, such as (0, 255); by default they stay.

    Raises:
        ValueError: if an argument is none of these.
    """

    backend = [TransformBackends.TORCH, TransformBackends.NUMPY]  # noqa: RUF012  (MONAI declares it this way)

    def __init__(
        self,
        window: Sequence[float] | str = "none",
        mean: float | str = "none",
        std: float | str = "none",
        ends: Sequence[float] | None = None,
    ) -> None:
        if isinstance(window, str) and (window != "none" or ends is not None):
            raise ValueError(f"window must be two intensities, or 'none' where no ends are given, got {window!r}")
        if not isinstance(window, str) and (len(window) != 2 or not window[0] < window[1]):
            raise ValueError(f"window must be a lower and a higher intensity, got {window!r}")
        for name, value in (("mean", mean), ("std", std)):
            if isinstance(value, str) and value not in ("own", "none"):
                raise ValueError(f"{name} must be a number, 'own' or 'none', got {value!r}")
        if not isinstance(std, str) and std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.clip = None
        if not isinstance(window, str):
            self.clip = ScaleIntensityRange(*window, *(window if ends is None else ends), clip=True)
        means: dict[Any, Any] = {"own": None, "none": 0.0}  # None: MONAI takes the volume's own
        stds: dict[Any, Any] = {"own": None, "none": 1.0}
        self.normalize = NormalizeIntensity(means.get(mean, mean), stds.get(std, std))

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Normalise one volume (C, X, Y, Z); mean and std of its own are those of all channels."""
        return self.normalize(img if self.clip is None else self.clip(img))


class NormalizeWindowd(ArrayPerKey):
    """Dictionary version of `NormalizeWindow`."""

    array = NormalizeWindow
