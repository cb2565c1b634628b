"""What is measured of cases, and what is decided from it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from vdt_workflows.data.sides import find_pairs
from vdt_workflows.planning.pace import say_steps
from vdt_workflows.planning.patch import count_activations
from vdt_workflows.planning.plan import find_memory, make_plan, plan
from vdt_workflows.preparation.fingerprint import POINTS, Fingerprint, measure_case, read_fingerprint
from vdt_workflows.preparation.segmentation import prepare_segmentation


def case(shape, spacing=(1.0, 1.0, 1.0), lowest=0, quantiles=(10, 200), voxels=None, middle=None):
    voxels = {"1": 1000, "2": 900} if voxels is None else voxels
    return {
        **{"shape": list(shape), "crop": list(shape), "spacing": list(spacing), "range": [lowest, 3000]},
        **{"voxels": voxels, "middle": middle or dict.fromkeys(voxels, 0.5)},
        "quantiles": np.interp(POINTS, (0, 1), quantiles).tolist(),
    }


def data(labels, cases, modality="unknown"):
    return Fingerprint(["background", *labels], modality, cases)


CT = {"lowest": -1024, "quantiles": (-200, 300)}
HIPPOCAMPUS = data(["anterior", "posterior"], [case((35, 50, 36))] * 180, "MRI")
HEART = data(["right ventricle", "myocardium", "left ventricle"], [case((144, 144, 9), (1.5, 1.5, 10))] * 80)
MIXED = data(["a"], [case((200, 200, 40), (0.8, 0.8, z)) for z in (2.5, *[5] * 8, 7)])
ABDOMEN = data(["liver", "right kidney", "left kidney"], [case((512, 512, 150), (0.8, 0.8, 3), **CT)] * 20, "CT")
LIVER = data(["liver"], [case((512, 512, 500), (0.7, 0.7, 1), **CT)] * 100)
TINY = data(["a"], [case((16, 18, 16))] * 5)
ONE = data(["a"], [case((122, 101, 112), (3, 3, 3), **CT)], "CT")


@pytest.mark.parametrize(
    ("fingerprint", "memory", "expected"),
    [
        (HIPPOCAMPUS, None, ([1, 1, 1], "own", [32, 48, 32], "strided", 16, 2, [8, 8, 8], [[], 0.5])),
        (HIPPOCAMPUS, 8, ([1, 1, 1], "own", [40, 56, 40], "unet", 64, 6, [8, 8, 8], [[], 0.5])),
        (HEART, None, ([1.5, 1.5, 10], "own", [96, 112, 10], "strided", 16, 2, [16, 16, 2], [[], 0.0])),
        (HEART, 24, ([1.5, 1.5, 10], "own", [144, 144, 10], "unet", 64, 4, [16, 16, 2], [[], 0.0])),
        (MIXED, 8, ([0.8, 0.8, 4.75], "own", [208, 208, 32], "unet", 32, 2, [16, 16, 4], [[], 0.5])),
        (ABDOMEN, 8, ([0.8, 0.8, 3], 50.0, [176, 176, 40], "unet", 32, 2, [16, 16, 8], [[[2, 3]], 0.5])),
        (ABDOMEN, None, ([2.9, 2.9, 3], 50.0, [48, 48, 48], "strided", 16, 2, [8, 8, 8], [[[2, 3]], 0.5])),
        (LIVER, None, ([2.8, 2.8, 2.8], 50.0, [48, 48, 48], "strided", 16, 2, [8, 8, 8], [[], 0.5])),
        (LIVER, 11, ([0.7, 0.7, 1], 50.0, [144, 144, 96], "unet", 32, 2, [16, 16, 16], [[], 0.5])),
        (LIVER, 80, ([0.7, 0.7, 1], 50.0, [224, 240, 160], "unet", 64, 2, [16, 16, 16], [[], 0.5])),
        (TINY, None, ([1, 1, 1], "own", [16, 20, 16], "unet", 16, 2, [4, 4, 4], [[], 0.5])),
        (ONE, None, ([3, 3, 3], 50.0, [48, 48, 48], "strided", 16, 2, [8, 8, 8], [[], 0.5])),
    ],
    ids=[
        "hippocampus",
        "hippocampus-8",
        "heart",
        "heart-24",
        "mixed-8",
        "abdomen-8",
        "abdomen",
        "liver",
        "liver-11",
        "liver-80",
        "tiny",
        "one",
    ],
)
def test_plan_of_usual_data(fingerprint, memory, expected):
    s = make_plan(fingerprint, memory).settings
    totals = np.prod(s["strides"], axis=0)
    decided = (s["spacing"], s["mean"], s["patch_size"], s["stem"], s["base_channels"], s["batch_size"])
    assert (*decided, totals.tolist(), [s["pairs"], s["mirror"]]) == expected
    assert not (np.array(s["patch_size"]) % totals).any()


@pytest.mark.parametrize(
    ("shape", "memory", "stem", "fine", "words"),
    [
        ((35, 50, 36), None, "strided", 8, "stem strided, half the resolution inside, on a CPU, 8 channels at full"),
        ((512, 512, 500), None, "strided", 8, "half the resolution inside"),
        ((20, 22, 1000), None, "unet", 0, "stem unet, the full resolution inside"),
        ((35, 50, 36), 8, "unet", 0, "stem unet, the full resolution inside"),
    ],
)
def test_a_cpu_gets_a_light_stage_at_full_resolution_behind_a_strided_stem(shape, memory, stem, fine, words):
    made = make_plan(data(["a"], [case(shape)] * 4), memory)
    assert (made.settings["stem"], made.settings["fine_channels"]) == (stem, fine)
    assert made.settings["deep_supervision"] == (2 if memory else 0)
    assert words in "\n".join(made.words)
    given = make_plan(data(["a"], [case(shape)] * 4), memory, {"stem": "flat"})
    assert "stem flat, as given" in "\n".join(given.words)
    assert given.settings["fine_channels"] == 0


def test_patches_on_a_cpu_are_no_longer_than_a_case_but_keep_thin_axes_whole():
    plans = [make_plan(data(["a"], [case((36, 50, 19))] * 4), memory).settings for memory in (None, 8)]
    assert [plan["patch_size"] for plan in plans] == [[32, 48, 20], [40, 56, 20]]


@pytest.mark.parametrize(("cases", "steps"), [(1, 5_000), (80, 20_000), (3000, 250_000)])
def test_steps_grow_with_the_cases(cases, steps):
    s = make_plan(data(["a"], [case((40, 40, 40))] * cases), None).settings
    assert s["epochs"] * s["steps_per_epoch"] == steps


def test_thick_slices_wait_until_the_plane_is_as_coarse():
    strides = make_plan(HEART, 24).settings["strides"]
    assert strides == [[1, 1, 1], [2, 2, 1], [1, 1, 1], [2, 2, 1], [2, 2, 2], [2, 2, 1]]


def test_given_settings_are_kept_and_decide_the_rest():
    made = make_plan(ABDOMEN, 8, {"spacing": [1.6, 1.6, 3], "base_channels": 16, "batch_size": 3})
    s = made.settings
    assert (s["spacing"], s["base_channels"], s["batch_size"], s["micro_batch"]) == ([1.6, 1.6, 3], 16, 3, 3)
    assert np.prod(s["patch_size"]) > np.prod(make_plan(ABDOMEN, 8).settings["patch_size"])
    assert "spacing [1.6, 1.6, 3]: as given" in made.words


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"spacing": 2}, "spacing must be three numbers of mm, 0 for what each case has, or own; got 2"),
        ({"spacing": [1, 0, -1]}, "spacing must be three numbers"),
        ({"patch_size": [32, 32]}, r"patch_size must be three numbers of voxels, got \[32, 32\]"),
        ({"batch_size": "two"}, "batch_size must be a number of patches, 1 or more, got 'two'"),
    ],
)
def test_a_grid_a_patch_or_a_batch_of_no_use_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(HIPPOCAMPUS, None, given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"spacng": [2, 2, 2]}, "--spacng: no such setting in configs/train.yaml; did you mean --spacing"),
        ({"minutes": -5}, "minutes and hours must not be below 0, got -5 and 0"),
    ],
)
def test_what_no_plan_can_take_is_refused_before_the_data_are_read(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(str(tmp_path), **options)


def test_labels_that_no_case_has_are_said_and_leave_background_a_third_of_the_patches():
    made = make_plan(data(list("abcdef"), [case((40, 40, 40), voxels={"1": 90, "4": 90})] * 3), None)
    assert made.settings["centres"] == [1, *[1] * 6]  # those without voxels are drawn never: one of three
    assert "labels: 7 with the background, of 3 cases; 4 are in no case" in made.words[0]


def test_the_steps_of_a_time_are_timed_with_the_planned_network(monkeypatch):
    seen = []

    def time_steps(network, optimizer, loss, inferer, loader, **more):
        seen.append((inferer(loader[0]["image"], network).shape, loss(network(loader[0]["image"]), loader[0]["label"])))
        return 0.25

    monkeypatch.setattr("vdt_workflows.planning.pace.time_steps", time_steps)
    settings = {"base_channels": 4, "batch_size": 4, "micro_batch": 2}
    said = say_steps(make_plan(TINY, None, settings).settings, 30, on_gpu=False)
    assert "30 minutes here are some 2,880 steps, 0.5 s each" in said
    (shape, loss), *_ = seen
    assert (shape, bool(loss > 0)) == ((2, 2, 16, 20, 16), True)


def test_a_device_too_small_for_any_patch_is_refused():
    with pytest.raises(ValueError, match=r"does not fit 1 GB; name a device with more memory"):
        make_plan(ABDOMEN, 1)


@pytest.mark.parametrize(("device", "memory"), [("cpu", None), (8, 8.0), ("11.5", 11.5)])
def test_devices_are_named_by_kind_or_memory(device, memory):
    assert find_memory(device) == memory


@pytest.mark.parametrize("device", ["gpu", "-3", "0", "8GB"])
def test_another_device_is_refused(device):
    with pytest.raises(ValueError, match=r"device must be cpu, cuda .* or GB of memory"):
        find_memory(device)


@pytest.mark.parametrize(
    ("names", "pairs", "lonely"),
    [
        (["right kidney", "left kidney", "liver"], [[1, 2]], []),
        (["Kidney_L", "spleen", "Kidney_R"], [[1, 3]], []),
        (["lung_lt", "lung_rt"], [[1, 2]], []),
        (["leftThalamus", "rightThalamus"], [[1, 2]], []),
        (["left kidney", "liver"], [], ["left kidney"]),
        (["right ventricle", "left ventricle", "left atrium"], [], ["right ventricle", "left ventricle"]),
        (["LV cavity", "myocardium", "RV cavity"], [], ["LV cavity", "RV cavity"]),
        (["left atrium"], [], []),
        (["RV", "portal vein"], [], []),
        (["lung upper lobe left", "lung upper lobe right"], [], ["lung upper lobe left", "lung upper lobe right"]),
        (["left lateral ventricle", "right lateral ventricle"], [[1, 2]], []),
        (["lung upper lobe left"], [], []),
        (["portal vein", "aorta", "gallbladder", "L5"], [], []),
    ],
)
def test_sides_are_found_by_name(names, pairs, lonely):
    assert find_pairs(["background", *names]) == (pairs, lonely)


@pytest.mark.parametrize(
    ("sizes", "middles", "mirror"),
    [((900, 1000), (0.3, 0.72), 0.0), ((900, 4000), (0.3, 0.72), 0.5), ((900, 1000), (0.3, 0.4), 0.5)],
)
def test_numbered_labels_that_lie_like_two_sides_are_not_flipped(sizes, middles, mirror):
    voxels, middle = (dict(zip("12", values, strict=True)) for values in (sizes, middles))
    made = make_plan(data(["label 1", "label 2"], [case((40, 40, 40), voxels=voxels, middle=middle)] * 4), None)
    assert made.settings["mirror"] == mirror
    assert made.settings.get("flips", []) == ([[0]] if mirror else [])
    assert mirror or "label 1 and label 2, which lie like left and right" in "\n".join(made.words)


def test_inference_flips_what_training_flips_unless_told_otherwise():
    cases = [case((40, 40, 40))]
    assert make_plan(data(["left kidney", "right kidney"], cases), None).settings["flips"] == [[0]]
    assert "flips" not in make_plan(data(["liver"], cases), None, {"mirror": 0}).settings
    assert make_plan(data(["liver"], cases), None, {"flips": []}).settings["flips"] == []


@pytest.mark.parametrize(
    ("prepared", "turned"),
    [(HEART, True), (HIPPOCAMPUS, False), (ABDOMEN, False), (MIXED, True)],
    ids=lambda x: str(x)[:9],
)
def test_thick_slices_are_turned_by_any_angle_unless_they_are_of_ct(prepared, turned):
    made = make_plan(prepared, None)
    assert {"rotation", "turned"} & made.settings.keys() == ({"rotation", "turned"} if turned else set())
    assert any("by any angle in the plane of the thick slices" in sentence for sentence in made.words) == turned
    assert make_plan(prepared, None, {"turned": 0.2}).settings["turned"] == 0.2
    even = make_plan(prepared, None, {"spacing": [2, 2, 2], "turned": 0.3})  # there, turns are about all axes
    assert "rotation" not in even.settings
    assert {"rotation", "turned"} & make_plan(prepared, None, {"spacing": "own"}).settings.keys() == (
        {"rotation", "turned"} if turned else set()
    )


def test_one_label_without_its_side_switches_flips_off():
    made = make_plan(data(["left kidney"], [case((40, 40, 40))]), None)
    assert made.settings["mirror"] == 0
    assert "for want of a mirror image of left kidney" in "\n".join(made.words)


@pytest.mark.parametrize(
    ("modality", "lowest", "noted"),
    [
        ("CT", 0, "CT"),
        ("unknown", -1000, "CT"),
        ("unknown", 0, "unknown"),
        ("", 0, "unknown"),
        ("MRI", -1000, "MRI"),
        ("ct scan", 0, "CT"),
    ],
)
def test_ct_is_known_by_its_name_or_its_air(modality, lowest, noted):
    cases = [case((40, 40, 40), lowest=lowest, quantiles=(-100, 100))] * 3
    s = make_plan(data(["a"], cases, modality), None).settings
    window = noted == "CT"
    assert (s["modality"], s["window"] != "none") == (noted, window)
    if window:
        assert s["window"] == pytest.approx([-99, 99], abs=1)
        assert s["std"] == pytest.approx(198 / 12**0.5, abs=1)  # of a uniform distribution
        assert s["mean"] == 0


def test_numbers_that_are_kept_for_the_backward_pass():
    """Counted by saved_tensors_hooks on ResUNet3D with cross-entropy: 45, 316 and 557 a voxel."""
    assert count_activations("strided", 16, 3) == pytest.approx(45, rel=0.15)
    assert count_activations("unet", 16, 3) == pytest.approx(316, rel=0.1)
    assert count_activations("unet", 32, 14) == pytest.approx(557, rel=0.1)


def test_a_case_is_measured_in_the_order_of_the_body():
    """Array axes run superior, right, anterior backwards: Z, -X, Y."""
    labels = np.zeros((4, 10, 6), np.uint8)
    labels[1:3, 0:2, 1:4] = 2  # at the right end, as axis 1 runs to the left
    voxels = np.where(labels > 0, 50, 0).astype(np.int16)
    voxels[0, 9, 5] = 7
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 5, -1, 2, 1
    measured = measure_case(voxels, labels, affine, (5, 1, 2))
    assert (measured["shape"], measured["spacing"]) == ([10, 6, 4], [1, 2, 5])
    assert measured["crop"] == [10, 5, 3]
    assert (measured["voxels"], measured["middle"]) == ({"2": 12}, {"2": 0.9})
    assert set(measured["quantiles"]) == {50}


def test_a_prepared_folder_is_planned_and_the_file_is_an_args_file(tmp_path, capsys):
    for kind, values in (("images", np.arange(24**3).reshape(24, 24, 24) % 7), ("labels", np.zeros((24, 24, 24)))):
        (tmp_path / "raw" / kind).mkdir(parents=True)
        for number in range(4):
            volume = values.astype(np.int16)
            if kind == "labels":
                volume[8:16, 8:16, 8 : 12 + number] = 1
            nib.save(nib.Nifti1Image(volume, np.diag([1, 1, 2, 1])), tmp_path / "raw" / kind / f"c{number}.nii.gz")
    folder = tmp_path / "made"
    prepare_segmentation(str(tmp_path / "raw"), str(folder), label_names=["background", "@odd"], workers=1)
    found = read_fingerprint(folder)
    lists = json.loads((folder / "dataset.json").read_text())
    assert len(found.cases) == len(lists["training"]) + len(lists["validation"]) == 3  # the test case is not looked at
    assert found.array("spacing").tolist() == [[1, 1, 2]] * 3
    written = json.loads((folder / "plan.json").read_text()) if plan(str(folder), device="cpu") else {}
    assert written["label_names"] == ["background", r"$'\x40odd'"]  # text, not a reference
    assert written["patch_size"] == [24, 24, 24]
    assert "patch: 24 x 24 x 24 voxels on a CPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"need a device of this machine, cpu or cuda, got device 8"):
        plan(str(folder), device=8, hours=1)
    with pytest.raises(FileNotFoundError, match=r"vdt prepare DATA OUTPUT writes it"):
        plan(str(tmp_path / "raw"))
