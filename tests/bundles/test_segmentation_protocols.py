"""What the segmentation bundles' published protocol says, number by number, against the published code's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from tests.makers.volumes import make_affine, write_volume
from tests.support.bundle_runs import ROOT, parse

BCV, LITS, NODULES = (
    ROOT / "bundles" / name
    for name in ("bcv_multiorgan_segmentation", "lits_liver_segmentation", "lidc_nodule_segmentation")
)
BUNDLES = pytest.mark.parametrize("bundle", [BCV, LITS], ids=lambda bundle: bundle.name)


def paper(bundle, **settings):
    return parse(bundle, ["train", "paper"], **settings)


def logits_and_labels(classes):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, classes, 7, 6, 5, generator=generator)
    return logits, torch.randint(0, classes, (2, 1, 7, 6, 5), generator=generator)


def test_bcv_loss_is_squared_dice_of_all_classes_and_three_tenths_cross_entropy():
    logits, labels = logits_and_labels(14)
    p, g = logits.softmax(1).double(), torch.nn.functional.one_hot(labels[:, 0], 14).movedim(-1, 1).double()
    common, squares = (p * g).sum((2, 3, 4)), (p**2 + g**2).sum((2, 3, 4))
    dice = (1 - (2 * common + 1e-5) / (squares + 1e-5)).mean()
    entropy = -(g * p.log()).sum(1).mean()
    loss = paper(BCV).get_parsed_content("loss")(logits, labels)
    assert loss.item() == pytest.approx((dice + 0.3 * entropy).item(), abs=1e-6)


def test_lits_loss_is_cross_entropy_and_half_the_dice_of_the_liver():
    logits, labels = logits_and_labels(2)
    p, g = logits.softmax(1)[:, 1].double(), labels[:, 0].double()
    common, total = (p * g).sum((1, 2, 3)), (p + g).sum((1, 2, 3))
    dice = (1 - (2 * common + 1e-3) / (total + 1e-3)).mean()  # published: common once more below, so never below 1/3
    entropy = torch.nn.functional.cross_entropy(logits.double(), labels[:, 0])
    loss = paper(LITS).get_parsed_content("loss")(logits, labels)
    assert loss.item() == pytest.approx((entropy + 0.5 * dice).item(), abs=1e-6)


@BUNDLES
def test_perfect_prediction_has_no_loss(bundle):
    classes = len(paper(bundle)["label_names"])
    _, labels = logits_and_labels(classes)
    logits = 100.0 * torch.nn.functional.one_hot(labels[:, 0], classes).movedim(-1, 1)
    assert paper(bundle).get_parsed_content("loss")(logits, labels).item() < 1e-4


@pytest.mark.parametrize(("bundle", "rate", "steps"), [(BCV, 0.02, 39_000), (LITS, 1e-4, 3_281)])
def test_rate_falls_as_published_step_by_step(bundle, rate, steps):
    parser = paper(bundle, micro_batch=100)  # no accumulation
    factor = parser.get_parsed_content("scheduler::lr_lambda")
    assert parser.get_parsed_content("steps") == steps
    for step in (0, 1, steps // 2, steps - 1, steps):
        published = (rate - 1e-6) * (1 - step / steps) ** 0.9 + 1e-6
        assert rate * factor(step) == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize(
    ("bundle", "kind", "constants"),
    [
        (BCV, torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}),
        (LITS, torch.optim.Adam, {"lr": 1e-4, "weight_decay": 1e-4}),
    ],
)
def test_optimizer_is_the_published_one(bundle, kind, constants):
    optimizer = paper(bundle, base_channels=4, device="cpu").get_parsed_content("optimizer")
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in constants} == pytest.approx(constants)


@BUNDLES
def test_windows_are_the_published_ones(
    bundle,
):  # how many that makes: tests/vdt_workflows/evaluation/test_inference.py
    inferer = paper(bundle).get_parsed_content("validate::inferer")
    assert (inferer.roi_size, inferer.overlap) == ((256, 256, 32), (0.5, 0.5, 0.625))


def test_lits_intensities_are_the_published_ones():
    parser = paper(LITS)
    for hu in (-300, -200, 0, 137, 250, 900):
        grey = (np.clip(hu, -200, 250) + 200) / 450 * 255  # not rounded to a byte
        ours = (np.clip(hu, *parser["window"]) - parser["mean"]) / parser["std"]
        assert ours == pytest.approx((grey - 123.675) / 58.395, abs=1e-6)


def training_patches(bundle, tmp_path, count):
    """Patches of a scan whose image tells each voxel's place and whose label tells its side."""
    x, _, z = np.indices((96, 96, 40))
    side = np.where(x < 48, 3, 2).astype(np.uint8) if bundle == BCV else np.ones((96, 96, 40), np.uint8)
    side[:, :, :8] = side[:, :, 33:] = 0
    side[:, :20] = 0
    affine = make_affine((1, 1, 2))  # the first axis runs to the right: low x is the left side
    write_volume(tmp_path / "images" / "a.nii.gz", 100.0 * z + x, affine=affine)
    write_volume(tmp_path / "labels" / "a.nii.gz", side, affine=affine, dtype=np.uint8)
    own = {"spacing": "own", "window": "none", "mean": 0, "std": 1, "patch_size": [48, 48, 16], "num_workers": 0}
    parser = paper(bundle, dataset_dir=str(tmp_path), val_fraction=0.0, **own)
    dataset = parser.get_parsed_content("train::dataset")
    return [dataset[number, 0] for number in range(count)]


@BUNDLES
def test_patches_are_zoomed_in_the_plane_alone(bundle, tmp_path):
    scales = []
    for patch in training_patches(bundle, tmp_path, 40):
        assert patch["image"].shape == patch["label"].shape == (1, 48, 48, 16)
        image = patch["image"].as_tensor()[0]
        slices = (image[24, 24, 1:] - image[24, 24, :-1]).abs().round() / 100
        assert set(slices.round().tolist()) <= {1.0, 0.0}  # a slice a slice; none where the last one goes on
        scales.append(float((image[44, 24, 8] - image[4, 24, 8]).abs()) / 40)
    assert 0.82 < min(scales) < 0.9
    assert 1.12 < max(scales) < 1.26


def test_bcv_patches_keep_right_organs_on_the_right(tmp_path):
    flipped = Counter()
    for patch in training_patches(BCV, tmp_path, 40):
        image, label = patch["image"].as_tensor()[0], patch["label"].as_tensor()[0]
        flipped[bool(image[4, 24, 8] > image[44, 24, 8])] += 1
        for value in (2, 3):
            places = (label == value).nonzero()[:, 0].float()
            others = (label == 5 - value).nonzero()[:, 0].float()
            if len(places) and len(others):
                assert (places.mean() > others.mean()) == (value == 2)
    assert 10 <= flipped[True] <= 30


def test_published_slabs_of_bcv_lie_within_the_organs(tmp_path):
    for patch in training_patches(BCV, tmp_path, 20):
        assert (patch["label"].as_tensor() > 0).any(0).any(0).any(0).all()


def test_half_of_the_published_lits_slabs_are_centred_anywhere(tmp_path):
    empty = sum(not (patch["label"] > 0).any(0).any(0).any(0).all() for patch in training_patches(LITS, tmp_path, 30))
    assert 10 < empty < 27


@pytest.mark.parametrize("overlays", [[], ["short"]], ids=["recommended", "short"])
@pytest.mark.parametrize("background", [0.3, 1], ids=["fractions", "whole-numbers"])
def test_the_loss_is_batch_dice_of_the_organs_and_cross_entropy_and_counts_classes_as_asked(overlays, background):
    parser = parse(BCV, ["train", *overlays], device="cpu", class_weights=[background] + 13 * [1])
    logits, labels = logits_and_labels(14)
    p, g = logits.softmax(1).double(), torch.nn.functional.one_hot(labels[:, 0], 14).movedim(-1, 1).double()
    weight = torch.tensor([background] + [1.0] * 13, dtype=torch.float64)
    common, sizes = (p * g).sum((0, 2, 3, 4))[1:], (p + g).sum((0, 2, 3, 4))[1:]
    dice = (1 - (2 * common + 1e-5) / (sizes + 1e-5)).mean()
    shares = (g * weight.view(1, 14, 1, 1, 1)).sum(1)
    entropy = -(shares * (g * p.log()).sum(1)).sum() / shares.sum()
    loss = parser.get_parsed_content("loss")(logits, labels)
    assert loss.item() == pytest.approx((dice + entropy).item(), abs=1e-5)
    assert parser.get_parsed_content("settings")["class_weights"] == weight.tolist()  # for inference and a resumed run


def test_the_loss_of_nodules_is_the_mean_of_their_dice_and_cross_entropy():
    logits, labels = logits_and_labels(2)
    p, g = logits.softmax(1)[:, 1].double(), (labels[:, 0] == 1).double()
    common, sizes = (p * g).sum((1, 2, 3)), (p + g).sum((1, 2, 3))
    dice = (1 - (2 * common + 1e-5) / (sizes + 1e-5)).mean()
    assert len(common) > 1
    entropy = torch.nn.functional.cross_entropy(logits.double(), labels[:, 0].long())
    loss = parse(NODULES, device="cpu").get_parsed_content("loss")(logits, labels)
    assert loss.item() == pytest.approx((dice + entropy).item(), abs=1e-5)


@BUNDLES
def test_only_the_published_protocol_starts_with_a_small_head_and_zero_residuals(bundle):
    for start, parser in (("published", paper(bundle, base_channels=4)), ("ours", parse(bundle, base_channels=4))):
        network = parser.get_parsed_content("network_def").network
        small = bool(network.decode_head.conv_seg.weight.std() < 0.02)
        assert small == (not network.backbone.layer1[0].bn2.weight.any()) == (start == "published"), start
        assert network.decode_head.dropout.p == (0.1 if start == "published" else 0.0)


@BUNDLES
@pytest.mark.parametrize(
    ("spacing", "thick"), [([1.5, 1.5, 10.0], True), ([1.0, 3.0, 1.0], True), ([1.0, 1.0, 2.9], False), ("own", False)]
)
def test_thick_slices_are_neither_blurred_nor_made_coarser(bundle, spacing, thick):
    made = parse(bundle, ["train"], spacing=spacing).get_parsed_content("train::random_transforms")
    names = {type(step).__name__ for step in made}
    assert ("RandGaussianSmoothd" in names, "RandSimulateLowResolutiond" in names) == (not thick, not thick)
    assert {"RandGaussianNoised", "RandTurnedCropd"} <= names
