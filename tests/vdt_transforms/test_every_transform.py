"""The same questions asked of every public pair of an array transform and its dictionary version."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

import vdt_transforms as vt

VOLUME = np.random.default_rng(0).integers(0, 3, (1, 6, 7, 9)).astype(np.float32)
IMAGE = np.random.default_rng(0).integers(0, 255, (3, 12, 17)).astype(np.uint8)
STACK = np.random.default_rng(0).normal(size=(9, 6, 8)).astype(np.float32)
AFFINE = np.diag([-1.0, 2.0, 2.0, 1.0])
KINDS = {
    "numpy": np.array,
    "torch": torch.tensor,
    "MetaTensor": lambda x: MetaTensor(
        torch.tensor(x), meta={"original_affine": AFFINE, "spatial_shape": x.shape[1:]}, affine=torch.tensor(AFFINE)
    ),
}


class Pair(NamedTuple):
    """An array transform and its dictionary version.

    Attributes:
        array: makes the first, if there is one.
        dictionary: makes the second from keys and options.
        given: what they take; a function of a folder if it is a file.
        keeps: whether the type, of container and of values, is that of what is given.
        kinds: of arrays that are taken; those that have an affine may only be some.
        result: the dictionary's entry with the result, where it is not the key.
    """

    array: Callable[[], Any] | None
    dictionary: Callable[..., Any]
    given: Any = VOLUME
    keeps: bool = True
    kinds: tuple[str, ...] = tuple(KINDS)
    result: str = "image"


def write_png(folder):
    for number in (1, 2, 3):
        Image.fromarray(np.full((6, 8), 32768 + 10 * number, np.uint16)).save(folder / f"{number}.png")
    return str(folder / "2.png")


def write_class(folder):
    (folder / "a.json").write_text(json.dumps({"label": "b"}))
    return str(folder / "a.json")


def write_picture(folder):
    stream = io.BytesIO()
    Image.fromarray(IMAGE.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


PAIRS = {
    "CheckFinited": Pair(vt.CheckFinite, vt.CheckFinited),
    "CheckLabelsd": Pair(lambda: vt.CheckLabels(3), lambda keys, **o: vt.CheckLabelsd(keys, 3, **o)),
    "CheckOverflowd": Pair(vt.CheckOverflow, vt.CheckOverflowd),
    "CropNoduled": Pair(lambda: vt.CropNodule(4), lambda keys, **o: vt.CropNoduled(keys, 4, **o), keeps=False),
    "ForegroundSlicesd": Pair(vt.ForegroundSlices, vt.ForegroundSlicesd, keeps=False, result="image_slices"),
    "ImageToVolumed": Pair(vt.ImageToVolume, vt.ImageToVolumed, IMAGE),
    "InterpolateSlicesd": Pair(
        lambda: vt.InterpolateSlices(9), lambda keys, **o: vt.InterpolateSlicesd(keys, 9, **o), VOLUME, False
    ),
    "LoadNaturalImaged": Pair(vt.LoadNaturalImage, vt.LoadNaturalImaged, write_picture),
    "NormalizeWindowd": Pair(
        lambda: vt.NormalizeWindow((0, 9), 1, 2), lambda k, **o: vt.NormalizeWindowd(k, (0, 9), 1, 2, **o), keeps=False
    ),
    "RandFlipLeftRightd": Pair(None, vt.RandFlipLeftRightd, keeps=False, kinds=("torch", "MetaTensor")),
    "RandFlipSlicesd": Pair(vt.RandFlipSlices, vt.RandFlipSlicesd, STACK),
    "RandResizeStackd": Pair(
        lambda: vt.RandResizeStack([4, 6, 12]), lambda k, **o: vt.RandResizeStackd(k, [4, 6, 12], **o), STACK, False
    ),
    "RandResizedCropImaged": Pair(
        lambda: vt.RandResizedCropImage(8), lambda k, **o: vt.RandResizedCropImaged(k, 8, **o), IMAGE, False
    ),
    "RandRotateCubed": Pair(vt.RandRotateCube, vt.RandRotateCubed, VOLUME[:, :6, :6, :6]),
    "RandRotateScaled": Pair(lambda: vt.RandRotateScale(prob=1), lambda k, **o: vt.RandRotateScaled(k, prob=1, **o)),
    "RandSlabd": Pair(
        lambda: vt.RandSlab(4),
        lambda k, **o: vt.RandSlabd(k, "image", 4, **o),
        keeps=False,
        kinds=("torch", "MetaTensor"),
    ),
    "RandSliceDriftd": Pair(vt.RandSliceDrift, vt.RandSliceDriftd, VOLUME, False),
    "RandSliceShuffled": Pair(vt.RandSliceShuffle, vt.RandSliceShuffled, VOLUME),
    "ReadClassd": Pair(lambda: vt.ReadClass("ab"), lambda keys, **o: vt.ReadClassd(keys, "ab", **o), write_class),
    "ResizeCenterCropImaged": Pair(
        lambda: vt.ResizeCenterCropImage(8, short_side=10),
        lambda keys, **o: vt.ResizeCenterCropImaged(keys, 8, short_side=10, **o),
        IMAGE,
        False,
    ),
    "RestoreGridd": Pair(lambda: lambda x: vt.RestoreGrid()(x, x), vt.RestoreGridd, kinds=("MetaTensor",)),
    "SliceStackReaderd": Pair(
        lambda: lambda file: vt.SliceStackReader(3)(file, 2.5),
        lambda k, **o: vt.SliceStackReaderd(k, 3, **o),
        write_png,
    ),
    "Spacingd": Pair(lambda: vt.Spacing(2.0), lambda k, **o: vt.Spacingd(k, 2.0, **o), keeps=False),
}
RANDOM = [name for name in PAIRS if name.startswith("Rand")]
CASES = [
    pytest.param(name, kind, id=f"{name}-{kind or 'file'}")
    for name, pair in PAIRS.items()
    for kind in (pair.kinds if isinstance(pair.given, np.ndarray) else [""])
]


def make(name, kind, folder):
    given = PAIRS[name].given
    return KINDS[kind](given) if kind else given(folder)


def apply(name, given, seed=None):
    """Apply the dictionary version to two keys, and give the results."""
    pair = PAIRS[name]
    transform = pair.dictionary(["image", "other"])
    if seed is not None:
        transform.set_random_state(seed)
    out = transform({"image": given, "other": copy.deepcopy(given), "slice_interval": 2.5, "note": "x"})
    assert out["note"] == "x"
    return out[pair.result], out[pair.result.replace("image", "other")]


def equal(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_every_public_dictionary_transform_is_asked():
    public = {name for name in vt.__all__ if name.endswith("d") and name[:-1] in vt.__all__}
    assert public | {"RandFlipLeftRightd"} == set(PAIRS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_dictionary_version_equals_the_array_transform_for_all_keys(name, kind, tmp_path):
    given, pair = make(name, kind, tmp_path), PAIRS[name]
    first, second = apply(name, given, 3 if name in RANDOM else None)
    assert equal(first, second)
    if pair.array:
        transform = pair.array()
        if name in RANDOM:
            transform.set_random_state(3)
        alone = transform(given)
        assert equal(first, alone)
        assert type(first) is type(alone)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_given_is_untouched(name, kind, tmp_path):
    given = make(name, kind, tmp_path)
    before = copy.deepcopy(given)
    apply(name, given)
    assert equal(given, before)
    if kind == "MetaTensor":
        assert equal(given.affine, before.affine)
        assert given.applied_operations == before.applied_operations


@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if isinstance(pair.given, np.ndarray)])
def test_kinds_of_arrays_agree_and_types_survive(name, tmp_path):
    pair, results = PAIRS[name], []
    for kind in pair.kinds:
        given = make(name, kind, tmp_path)
        result, _ = apply(name, given, 5 if name in RANDOM else None)
        if pair.keeps:
            assert type(result) is type(given)
            assert result.dtype == given.dtype
        results.append(np.asarray(result))
    if name not in ("CropNoduled", "RandRotateScaled", "Spacingd"):  # which go by the affine that only a MetaTensor has
        assert all(np.allclose(results[0], other) for other in results)


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_gives_the_same_and_another_something_else(name, tmp_path):
    def draws(seed):
        transform = PAIRS[name].dictionary("image").set_random_state(seed)
        return [np.asarray(transform({"image": given})["image"]) for _ in range(20)]

    given = make(name, "torch", tmp_path)
    first, again, other = (draws(seed) for seed in (1, 1, 2))
    assert all(map(equal, first, again))
    assert not all(map(equal, first, other))


@pytest.mark.parametrize("name", ["RandFlipLeftRightd", "RandFlipSlicesd", "RandSliceShuffled"])
def test_with_probability_zero_nothing_changes(name, tmp_path):
    given = make(name, "torch", tmp_path)
    transform = PAIRS[name].dictionary("image", prob=0.0)
    assert all(transform({"image": given})["image"] is given for _ in range(10))


@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"RandSlabd"}))  # which cannot do without its label map
def test_a_missing_key_is_an_error_unless_allowed(name):
    with pytest.raises(KeyError, match="image"):
        PAIRS[name].dictionary("image")({"note": "x"})
    assert PAIRS[name].dictionary("image", allow_missing_keys=True)({"note": "x"})["note"] == "x"
