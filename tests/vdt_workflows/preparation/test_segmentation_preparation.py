"""The preparation of BTCV, LiTS and own data, on tiny synthetic copies of what people download."""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.makers.volumes import make_affine, write_volume
from tests.support.folders import contents, times, wait_until_ended
from vdt_workflows.data.volumes import find_volumes
from vdt_workflows.preparation.public_sets import BTCV, StoredFile
from vdt_workflows.preparation.segmentation import prepare_segmentation
from vdt_workflows.preparation.volumes import CaseRules, SourceCase, prepare_cases

PARTS = ("training", "validation", "test")
SHAPE = (9, 10, 8)
AFFINE = make_affine((-0.8, 0.8, 3.0), (50, -20, 100))


def prepare(data, out, **settings):
    return prepare_segmentation(data if isinstance(data, list) else str(data), str(out), **{"workers": 1, **settings})


def make_label(values, shape=SHAPE):
    """A label map with one voxel column for each value."""
    label = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        label[1 + i % 7, 1 + i // 7, 2:6] = value
    return label


def write_case(image, label, values=(1, 2), **options):
    hu = np.random.default_rng(0).integers(-1024, 1500, SHAPE)
    write_volume(image, hu, dtype=np.int16, affine=AFFINE)
    write_volume(label, make_label(values), dtype=np.uint8, affine=AFFINE, **options)


@pytest.fixture(scope="module")
def btcv(tmp_path_factory):
    """RawData.zip: 30 labelled cases, two without a label, and macOS' leavings."""
    root = tmp_path_factory.mktemp("btcv")
    training = root / "RawData" / "Training"
    for n in BTCV.numbers:
        write_case(training / f"img/img{n:04d}.nii.gz", training / f"label/label{n:04d}.nii.gz", range(1, 14))
    for n in (61, 62):
        write_volume(root / f"RawData/Testing/img/img{n:04d}.nii.gz", shape=SHAPE)
    (training / "img" / "._img0001.nii.gz").write_text("")
    with zipfile.ZipFile(root / "RawData.zip", "w") as archive:
        for path in sorted((root / "RawData").rglob("*")):
            archive.write(path, path.relative_to(root))
    return root


@pytest.fixture(scope="module")
def prepared_btcv(btcv, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "btcv"
    return out, prepare(btcv / "RawData.zip", out, source="btcv", split="published")


def numbers(cases):
    return [int(Path(case["image"]).name[3:7]) for case in cases]


def rows(out):
    with (out / "summary.csv").open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


# BTCV


def test_the_archive_becomes_a_folder_that_find_volumes_reads_with_the_published_split(prepared_btcv, caplog):
    out, made = prepared_btcv
    assert {part: made[part] for part in PARTS} == {"training": 24, "validation": 6, "test": 6}
    cases = find_volumes(out)
    assert numbers(cases["training"]) == [*range(1, 11), *range(21, 35)]
    assert numbers(cases["validation"]) == numbers(cases["test"]) == [35, 36, 37, 38, 39, 40]
    assert "6 cases are in two lists (as published, validation is the test set" in caplog.text
    listed = json.loads((out / "dataset.json").read_text())
    assert listed["labels"] == {str(i): name for i, name in enumerate(BTCV.labels)}
    assert listed["split"] == "published"
    assert (listed["numTraining"], listed["numTest"], listed["left_out"]) == (24, 6, [])


def test_files_are_bit_for_bit_those_of_the_archive_and_the_unlabelled_stay_in_it(btcv, prepared_btcv):
    out, _ = prepared_btcv
    for kind, folder in (("images", "img"), ("labels", "label")):
        source = btcv / "RawData" / "Training" / folder
        written = sorted(path.name for path in (out / kind).iterdir())
        assert written == [f"img{n:04d}.nii.gz" for n in BTCV.numbers]
        for name in written:
            assert (out / kind / name).read_bytes() == (source / name.replace("img", folder)).read_bytes()


@pytest.mark.slow
def test_the_unpacked_folder_gives_the_same_lists_by_hard_links(btcv, prepared_btcv, tmp_path):
    prepare(btcv / "RawData", tmp_path / "out", source="btcv", split="published")
    assert (tmp_path / "out" / "dataset.json").read_bytes() == (prepared_btcv[0] / "dataset.json").read_bytes()
    source, linked = btcv / "RawData/Training/img/img0001.nii.gz", tmp_path / "out/images/img0001.nii.gz"
    assert os.path.samefile(source, linked)


def test_other_splits_of_a_prepared_folder_are_lists_of_their_own_and_nothing_is_made_again(btcv, prepared_btcv):
    out, _ = prepared_btcv
    before = times(out, "*.nii.gz")
    first = (out / "dataset.json").read_bytes()
    seen = []
    for settings in ({"split": "recommended"}, {"folds": 5, "fold": 0}, {"folds": 5, "fold": 1}):
        datalist = prepare(btcv / "RawData.zip", out, source="btcv", **settings)["datalist"]
        cases = find_volumes(out, datalist=datalist)
        assert not set(numbers(cases["validation"])) & set(numbers(cases["test"]))
        assert [len(cases[part]) for part in PARTS] == [20, 4, 6]
        seen.append((datalist, numbers(cases["test"])))
    assert (out / "dataset.json").read_bytes() == first
    assert len({datalist for datalist, _ in seen}) == 3
    assert seen[0][1] == [35, 36, 37, 38, 39, 40]
    assert not set(seen[1][1]) & set(seen[2][1])
    assert times(out, "*.nii.gz") == before


def test_the_table_has_geometry_intensities_and_organ_volumes(prepared_btcv):
    out, _ = prepared_btcv
    table = rows(out)
    assert len(table) == 30
    row = table["img0035"]
    assert (row["shape"], row["spacing"], row["orientation"]) == ("9 10 8", "0.8 0.8 3.0", "LAS")
    hu = np.asarray(nib.load(out / "images/img0035.nii.gz").dataobj)
    assert (float(row["least"]), float(row["greatest"])) == (hu.min(), hu.max())
    assert float(row["spleen (ml)"]) == pytest.approx(4 * 0.8 * 0.8 * 3 / 1000, abs=1e-3)
    pages = sorted((out / "pictures").iterdir())
    assert [page.name for page in pages] == ["cases_01.png", "cases_02.png", "cases_03.png"]
    assert all(Image.open(page).size[0] > 1500 for page in pages)


def test_a_missing_case_is_named_and_left_out_when_asked(btcv, tmp_path):
    data = tmp_path / "data"
    with zipfile.ZipFile(btcv / "RawData.zip") as archive:
        archive.extractall(
            data, [n for n in archive.namelist() if not n.endswith(("img0036.nii.gz", "img0002.nii.gz"))]
        )
    with pytest.raises(ValueError, match=r"^BTCV case 2: no image of this number in .*; --on_error skip goes on"):
        prepare(data, tmp_path / "out", source="btcv")
    assert not (tmp_path / "out").exists()
    made = prepare(data, tmp_path / "out", source="btcv", split="published", on_error="skip")
    assert (made["training"], made["test"], made["left_out"]) == (23, 5, 2)
    assert json.loads((tmp_path / "out/dataset.json").read_text())["left_out"] == ["BTCV 2", "BTCV 36"]
    assert "no image of this number" in rows(tmp_path / "out")["BTCV 36"]["fault"]


# LiTS


@pytest.fixture
def lits(tmp_path):
    """Six cases in two batches."""
    for batch, ids in (("Training Batch 1", (0, 1, 2)), ("Training_Batch2", (28, 29, 130))):
        for n in ids:
            write_case(tmp_path / batch / f"volume-{n}.nii", tmp_path / batch / f"segmentation-{n}.nii")
    return [str(tmp_path / "Training Batch 1"), str(tmp_path / "Training_Batch2")]


@pytest.mark.parametrize(
    ("settings", "names"), [({}, ["background", "liver"]), ({"tumour": True}, ["background", "liver", "tumour"])]
)
def test_liver_and_tumour_are_merged_by_default_and_kept_when_asked(lits, tmp_path, settings, names):
    out = tmp_path / "out"
    made = prepare(lits, out, source="lits", folds=3, fold=0, **settings)
    assert [made[part] for part in PARTS] == [3, 1, 2]
    assert list(json.loads((out / "dataset.json").read_text())["labels"].values()) == names
    for case in find_volumes(out)["training"]:
        label, image = nib.load(case["label"]), nib.load(case["image"])
        assert set(np.unique(label.dataobj)) == set(range(len(names)))
        assert label.get_data_dtype() == np.uint8
        np.testing.assert_allclose(label.affine, image.affine)
    source = nib.load(Path(lits[0]) / "segmentation-1.nii")
    written = nib.load(next((out / "labels").glob("volume-1.*")))
    np.testing.assert_array_equal(np.asarray(written.dataobj) > 0, np.asarray(source.dataobj) > 0)
    assert os.path.samefile(Path(lits[0]) / "volume-1.nii", out / "images" / "volume-1.nii")


def test_the_published_lits_split_is_taken_by_number(lits, tmp_path):
    made = prepare(lits, tmp_path / "out", source="lits", split="published", on_error="skip")
    assert [made[part] for part in PARTS] == [3, 2, 1]
    cases = find_volumes(tmp_path / "out")
    assert [Path(case["image"]).name for case in cases["validation"]] == ["volume-0.nii", "volume-29.nii"]
    assert [Path(case["image"]).name for case in cases["test"]] == ["volume-2.nii"]
    assert made["left_out"] == 125


SPOILT_AFFINES = {
    "flipped": AFFINE @ np.diag([-1.0, 1, 1, 1]),
    "zero": np.zeros((4, 4)),
    "moved": make_affine(origin=(0, 0, 9)) @ AFFINE,
}


def write_with_sform(path, values, affine):
    """Write a NIfTI file whose affine may be any matrix."""
    content = bytearray(nib.Nifti1Image(values, np.eye(4)).to_bytes())
    content[80:92] = np.linalg.norm(affine[:3, :3], axis=0).astype("<f4").tobytes()  # pixdim
    content[280:328] = affine[:3].astype("<f4").tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("spoilt", SPOILT_AFFINES)
@pytest.mark.parametrize("rule", ["image", "label"])
@pytest.mark.parametrize("merged", [True, False], ids=["renumbered", "as it is"])
def test_affines_that_differ_are_refused_or_mended_by_a_named_rule_with_a_note(tmp_path, spoilt, rule, merged):
    batch = tmp_path / "batch"
    for n in (0, 1, 2, 3):
        write_case(batch / f"volume-{n}.nii.gz", batch / f"segmentation-{n}.nii.gz")
    kind, good = ("segmentation", "volume") if rule == "image" else ("volume", "segmentation")
    bad = batch / f"{kind}-1.nii.gz"
    stored = np.asarray(nib.load(bad).dataobj)
    write_with_sform(bad, stored, SPOILT_AFFINES[spoilt])
    settings = {"source": "lits", "folds": 2, "tumour": not merged}
    with pytest.raises(ValueError, match=r"(segmentation|volume)-1\.nii\.gz: .*(affine|voxel size)"):
        prepare(batch, tmp_path / "strict", **settings)
    prepare(batch, tmp_path / "out", **settings, affine=rule)
    assert f"affine of the {rule} taken, the other differed" in rows(tmp_path / "out")["volume-1"]["notes"]
    assert rows(tmp_path / "out")["volume-0"]["notes"] == ("label values renumbered" if merged else "")
    folder = {"segmentation": "labels", "volume": "images"}
    written = nib.load(tmp_path / "out" / folder[kind] / "volume-1.nii.gz")
    np.testing.assert_allclose(written.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(written.get_qform(), AFFINE, atol=1e-4)
    kept = stored > 0 if merged and kind == "segmentation" else stored
    np.testing.assert_array_equal(np.asarray(written.dataobj), kept)
    assert len(find_volumes(tmp_path / "out")["training"]) == 1
    other = tmp_path / "out" / folder[good] / "volume-1.nii.gz"
    np.testing.assert_allclose(nib.load(other).affine, AFFINE, atol=1e-5)


# Own data


@pytest.fixture
def own(tmp_path):
    root = tmp_path / "own"
    for n in range(10):
        write_case(root / f"imagesTr/c_{n}_0000.nii.gz", root / f"labelsTr/c_{n}.nii.gz")
    return root


def test_own_pairs_are_split_by_seed_and_labels_without_names_are_numbered(own, tmp_path):
    made = prepare(own, tmp_path / "out")
    assert [made[part] for part in PARTS] == [7, 1, 2]
    listed = json.loads((tmp_path / "out/dataset.json").read_text())
    assert listed["labels"] == {"0": "background", "1": "label 1", "2": "label 2"}
    first = {part: sorted(case["image"] for case in listed[part]) for part in PARTS}
    assert len({image for images in first.values() for image in images}) == 10
    prepare(own, tmp_path / "other", seed=1)
    other = json.loads((tmp_path / "other/dataset.json").read_text())
    assert sorted(case["image"] for case in other["test"]) != first["test"]


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({"0": "background", "1": "a", "2": "b"}, id="Decathlon"),
        pytest.param({"background": 0, "b": 2, "a": 1}, id="nnU-Net"),
    ],
)
def test_names_modality_and_lists_come_from_the_data(own, tmp_path, labels):
    files = sorted((own / "imagesTr").iterdir())
    entries = [{"image": f"imagesTr/{f.name}", "label": f"labelsTr/{f.name.replace('_0000', '')}"} for f in files]
    content = {"name": "Mine", "modality": {"0": "CT"}, "labels": labels, "licence": "CC0"}
    write = (own / "dataset.json").write_text
    write(json.dumps({**content, "training": entries[:6], "test": [*entries[6:9], "imagesTr/c_9_0000.nii.gz"]}))
    made = prepare(own, tmp_path / "out")
    assert [made[part] for part in PARTS] == [5, 1, 3]
    listed = json.loads((tmp_path / "out/dataset.json").read_text())
    assert listed["labels"] == {"0": "background", "1": "a", "2": "b"}
    assert (listed["name"], listed["modality"], listed["licence"]) == ("Mine", {"0": "CT"}, "CC0")


def test_chosen_labels_are_numbered_anew_and_the_others_become_background(own, tmp_path):
    write_case(own / "imagesTr/c_0_0000.nii.gz", own / "labelsTr/c_0.nii.gz", (3, 40, 41, 7))
    prepare(own, tmp_path / "out", label_names={"both": [40, 41], "three": 3})
    listed = json.loads((tmp_path / "out/dataset.json").read_text())
    assert listed["labels"] == {"0": "background", "1": "both", "2": "three"}
    written = np.asarray(nib.load(tmp_path / "out/labels/c_0.nii.gz").dataobj)
    expected = np.select([np.isin(make_label((3, 40, 41, 7)), (40, 41)), make_label((3, 40, 41, 7)) == 3], [1, 2], 0)
    np.testing.assert_array_equal(written, expected)
    assert rows(tmp_path / "out")["c_1"]["notes"] == "label values renumbered; no voxel labelled"


def test_a_float_label_is_saved_again_as_bytes(own, tmp_path):
    write_volume(own / "labelsTr/c_0.nii.gz", make_label((1, 2)), dtype=np.float64, affine=AFFINE)
    prepare(own, tmp_path / "out")
    written = nib.load(tmp_path / "out/labels/c_0.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), make_label((1, 2)))
    assert rows(tmp_path / "out")["c_0"]["notes"] == "label was float64"


@pytest.mark.parametrize(("modality", "note"), [("CT", "no intensity below 0, unlike HU"), ("MR", "")])
def test_a_ct_without_negative_values_is_noted(own, tmp_path, modality, note):
    write_volume(own / "imagesTr/c_0_0000.nii.gz", np.full(SHAPE, 255), dtype=np.int16, affine=AFFINE)
    prepare(own, tmp_path / "out", modality=modality)
    assert [rows(tmp_path / "out")[case]["notes"] for case in ("c_0", "c_1")] == [note, ""]


def test_a_folder_for_each_case_is_taken_by_a_list_and_its_name_tells_cases_apart(tmp_path):
    entries = [{"image": f"p{n}/ct.nii.gz", "label": f"p{n}/seg.nii.gz"} for n in range(3)]
    for entry in entries:
        write_case(tmp_path / entry["image"], tmp_path / entry["label"])
    (tmp_path / "list.json").write_text(json.dumps({"training": entries[:1], "validation": entries[1:]}))
    made = prepare(tmp_path / "list.json", tmp_path / "out", test_fraction=0)
    assert [made[part] for part in PARTS] == [1, 2, 0]
    assert sorted(path.name for path in (tmp_path / "out/labels").iterdir()) == [f"p{n}_ct.nii.gz" for n in range(3)]
    (tmp_path / "q").mkdir()
    (tmp_path / "p0").rename(tmp_path / "q" / "p1")
    moved = {"image": "q/p1/ct.nii.gz", "label": "q/p1/seg.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [moved, *entries[1:]]}))
    prepare(tmp_path / "list.json", tmp_path / "other", test_fraction=0)
    found = sorted(path.name for path in (tmp_path / "other/labels").iterdir())
    assert found == ["p1_ct.nii.gz", "p2_ct.nii.gz", "q_p1_ct.nii.gz"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"label_names": "liver"},
            r"label_names 'liver': expected quoted names, as \['background', 'liver'\], or values by name",
        ),
        ({"source": "kits"}, "source must be 'btcv', 'lits' or 'own', got 'kits'"),
        ({"split": "published"}, "split of --source own must be recommended, got 'published'"),
        (
            {"source": "btcv", "split": "random"},
            "split of --source btcv must be published or recommended, got 'random'",
        ),
        ({"affine": "mend"}, "affine must be 'strict', 'image' or 'label', got 'mend'"),
        ({"tumour": True}, "tumour is for --source lits, not own"),
        ({"source": "btcv", "modality": "CT"}, "label_names and modality are for own data, not for --source btcv"),
        ({"val_fraction": 0}, "val_fraction and test_fraction must be shares below 1, got 0, 0.2"),
        ({"on_error": "stop"}, "on_error must be 'raise' or 'skip', got 'stop'"),
        ({"label_names": {"a": 1, "both": [1, 2]}}, "a label value under two names; a voxel can have one label alone"),
        ({"label_names": ["background", "x", "x"]}, r"label_names \['background', 'x', 'x'\]: a name twice"),
        ({"label_names": {"a": 0}}, r"label_names \{'a': 0\}: expected one or several label values above 0 for each"),
        (
            {"source": "btcv"},
            "^BTCV case 10: no image of this number in .*; --on_error skip goes on without the missing",
        ),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_written(own, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(own, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_regions_in_place_of_labels_are_refused(own, tmp_path):
    (own / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "whole": [1, 2], "core": 2}}))
    with pytest.raises(
        ValueError, match=r"dataset\.json: its labels .* are not one name for each value from 0 on; choose"
    ):
        prepare(own, tmp_path / "out")


# Bad cases


def overwrite(path, values, dtype=np.float32, affine=AFFINE):
    write_volume(path, values, dtype=dtype, affine=affine)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 100, shape)


def write_colour(path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, [(c, "u1") for c in "RGB"]), AFFINE), path)


LABEL = make_label((1, 2))
BAD_IMAGES = {
    "4D": (lambda file: overwrite(file, noise(*SHAPE, 2), np.int16), ": 4D, of shape"),
    "RGB": (write_colour, r": a colour \(RGB\) volume"),
    "zero-size": (lambda file: overwrite(file, noise(9, 0, 8), np.int16), ": zero-size volume"),
    "integer overflow": (
        lambda file: overwrite(file, noise(*SHAPE).astype(np.int16) - 1024, np.uint16),
        r": intensities from \d+ to \d+ do not fit 16-bit signed integers .*, as HU do; this is an",
    ),
    "wrong slope": (lambda file: set_slope(file, 1e6), ": intensities from .* do not fit 16-bit"),
    "NaN": (
        lambda file: overwrite(file, np.where(make_label((1,)), np.nan, 1.0)),
        ": 4 voxels are NaN or infinite; expected finite values$",
    ),
    "cut short": (
        lambda file: file.write_bytes(file.read_bytes()[:-300]),
        r": cut short or damaged, \d+ of 1792 bytes can be unpacked",
    ),
    "damaged": (flip_a_byte, ": (its voxels cannot be read|not a readable)"),
}
BAD_LABELS = {
    "missing label": (lambda file: file.unlink(), r"c_5_0000\.nii\.gz: has no label, which training"),
    "extra label": (
        lambda file: overwrite(file, make_label((1, 9)), np.uint8),
        r"c_5\.nii\.gz: unknown label values 9; expected 0, 1, 2; choose by --label_names$",
    ),
    "half a label": (
        lambda file: overwrite(file, LABEL * 0.75),
        r"c_5\.nii\.gz: label value 0\.75; expected whole numbers from 0 on$",
    ),
    "negative label": (
        lambda file: overwrite(file, -make_label((1,)).astype(int), np.int16),
        r"c_5\.nii\.gz: label values from -1 to 0; expected whole numbers from 0 on$",
    ),
    "other spacing": (
        lambda file: overwrite(file, LABEL, np.uint8, make_affine((-0.8, 0.8, 1.5))),
        r"c_5\.nii\.gz: its affine differs from that of .*c_5_0000\.nii\.gz in its spacing, .*; if the header alone is",
    ),
    "other shape": (
        lambda file: overwrite(file, LABEL[:-1], np.uint8),
        r"c_5\.nii\.gz: shape \(8, 10, 8\), but its image .* has shape \(9, 10, 8\)$",
    ),
}


def set_slope(path, slope):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:116] = np.float32(slope).tobytes()
    path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize("fault", [*BAD_IMAGES, *BAD_LABELS])
def test_a_bad_case_is_named_in_a_sentence_or_left_out_while_the_others_go_on(own, tmp_path, fault):
    file = own / ("imagesTr/c_5_0000.nii.gz" if fault in BAD_IMAGES else "labelsTr/c_5.nii.gz")
    spoil, sentence = {**BAD_IMAGES, **BAD_LABELS}[fault]
    spoil(file)
    sentence = rf"c_5_0000\.nii\.gz{sentence}" if fault in BAD_IMAGES else sentence
    settings = {"label_names": ["background", "a", "b"], "modality": "CT"}
    with pytest.raises(ValueError, match=sentence) as caught:
        prepare(own, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    made = prepare(own, tmp_path / "out", **settings, on_error="skip")
    assert made["left_out"] == 1
    assert sum(made[part] for part in PARTS) == 9
    assert rows(tmp_path / "out")["c_5"]["fault"] == str(caught.value)
    assert not list((tmp_path / "out").rglob("c_5*.nii.gz"))
    assert json.loads((tmp_path / "out/dataset.json").read_text())["left_out"] == ["c_5"]
    find_volumes(tmp_path / "out")


def test_a_part_of_which_nothing_is_left_is_said_and_the_others_are_listed(own, tmp_path, caplog):
    entries = [{"image": f"imagesTr/c_{n}_0000.nii.gz", "label": f"labelsTr/c_{n}.nii.gz"} for n in range(5)]
    listed = {"training": entries[:3], "validation": entries[3:4], "test": entries[4:]}
    (own / "list.json").write_text(json.dumps(listed))
    (own / "labelsTr" / "c_4.nii.gz").unlink()
    made = prepare(own / "list.json", tmp_path / "out", on_error="skip")
    assert [made[part] for part in PARTS] == [3, 1, 0]
    assert "none of the 1 test cases can be used" in caplog.text


def test_a_bad_case_in_an_archive_is_named_by_its_member(tmp_path):
    write_case(tmp_path / "img0001.nii.gz", tmp_path / "label0001.nii.gz", (1, 14))
    with zipfile.ZipFile(tmp_path / "RawData.zip", "w") as archive:
        for name in ("img0001.nii.gz", "label0001.nii.gz"):
            archive.write(tmp_path / name, f"Training/{name[:-11]}/{name}")
    with pytest.raises(ValueError, match=r"none of the 1 training cases can be used, see above"):
        prepare(tmp_path / "RawData.zip", tmp_path / "out", source="btcv", on_error="skip")
    members = (f"Training/{kind}/{kind}0001.nii.gz" for kind in ("img", "label"))
    case = SourceCase("1", *(StoredFile(str(tmp_path / "RawData.zip"), member) for member in members))
    rules = CaseRules(values={value: value for value in range(1, 14)})
    [record] = prepare_cases([case], tmp_path / "other", rules, on_error="skip")
    member = f"{tmp_path}/RawData.zip: Training/label/label0001.nii.gz"
    assert record["fault"].startswith(f"{member}: unknown label values 14; expected 0, 1, 2, 3")
    assert [path.name for path in (tmp_path / "other").rglob("*") if path.is_file()] == []


# Runs


def test_a_folder_of_other_origin_or_of_other_settings_is_refused(own, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(
        FileExistsError, match=r"output_dir .*/mine has files that are not from this script; name a new"
    ):
        prepare(own, tmp_path / "mine")
    prepare(own, tmp_path / "out")
    kept = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"output_dir .*/out holds results made with .*copy False, not True; name another"
    ):
        prepare(own, tmp_path / "out", copy=True)
    with pytest.raises(ValueError, match=r"output_dir .* lies inside the data .*; name a folder elsewhere"):
        prepare(own, own / "out")
    assert contents(tmp_path / "out") == kept


def test_a_finished_case_is_not_made_again_but_one_whose_source_changed_is(own, tmp_path):
    prepare(own, tmp_path / "out", copy=True)
    before = times(tmp_path / "out/.prepared", "*.png")
    assert len(before) == 10
    write_case(own / "imagesTr/c_3_0000.nii.gz", own / "labelsTr/c_3.nii.gz", (1,))
    (tmp_path / "out/labels/c_4.nii.gz").unlink()
    prepare(own, tmp_path / "out", copy=True)
    changed = [path.stem for path, time in times(tmp_path / "out/.prepared", "*.png").items() if time != before[path]]
    assert sorted(changed) == ["c_3", "c_4"]
    assert rows(tmp_path / "out")["c_3"]["label 2 (ml)"] == "0"
    assert (tmp_path / "out/labels/c_4.nii.gz").read_bytes() == (own / "labelsTr/c_4.nii.gz").read_bytes()


def test_a_case_that_has_become_bad_takes_its_old_files_away(own, tmp_path):
    prepare(own, tmp_path / "out")
    write_case(own / "imagesTr/c_3_0000.nii.gz", own / "labelsTr/c_3.nii.gz")
    (own / "labelsTr/c_3.nii.gz").write_bytes(b"")
    assert prepare(own, tmp_path / "out", on_error="skip")["left_out"] == 1
    assert not list((tmp_path / "out").rglob("c_3*.nii.gz"))
    assert (own / "imagesTr/c_3_0000.nii.gz").is_file()


@pytest.mark.slow
def test_several_processes_make_the_same_files_as_one_whose_links_stay(own, tmp_path):
    prepare(own, tmp_path / "one", label_names={"a": 1})
    made = times(tmp_path / "one/.prepared", "*.png")
    prepare(own, tmp_path / "three", label_names={"a": 1}, workers=3)
    prepare(own, tmp_path / "one", label_names={"a": 1})
    assert times(tmp_path / "one/.prepared", "*.png") == made
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    (own / "labelsTr/c_3.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"c_3_0000\.nii\.gz: has no label"):
        prepare(own, tmp_path / "four", workers=3)


def big_cases(tmp_path, count=8):
    cases = []
    for n in range(count):
        image, label = tmp_path / f"img{n}.nii.gz", tmp_path / f"label{n}.nii.gz"
        write_volume(image, shape=(60, 60, 40), seed=n)
        write_volume(label, np.random.default_rng(n).integers(0, 3, (60, 60, 40)), dtype=np.float32)
        cases.append(SourceCase(f"c{n}", StoredFile(str(image)), StoredFile(str(label))))
    return cases


@pytest.mark.slow
def test_a_run_killed_in_its_midst_goes_on_and_leaves_the_same_files_and_no_processes(tmp_path):
    cases = big_cases(tmp_path)
    rules = CaseRules(copy=True)
    prepare_cases(cases, tmp_path / "whole", rules)
    out, fork = tmp_path / "killed", multiprocessing.get_context("fork")
    process = fork.Process(target=prepare_cases, args=(cases, out, rules), kwargs={"workers": 2})
    process.start()
    while process.is_alive() and len(list(out.glob(".prepared/*.json"))) < 3:
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = list(out.glob(".prepared/*.json"))
    assert 3 <= len(finished) < len(cases)
    assert len(workers) == 2
    wait_until_ended(workers)
    for path in [*out.glob("images/*.nii.gz"), *out.glob("labels/*.nii.gz")]:  # no hidden ones: these bear final names
        nib.load(path).get_fdata()
    before = {path: path.stat().st_mtime_ns for path in finished}
    prepare_cases(cases, out, rules)
    assert contents(out) == contents(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == before


@pytest.mark.slow
def test_the_command_prints_json_or_one_sentence(own, tmp_path):
    words = [sys.executable, "-W", "ignore", "-m", "vdt_workflows.cli", "prepare", "volumes"]
    words += ["--data", str(own), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["training"] == 7
    assert "10 prepared, 0 left out" in result.stderr
    result = subprocess.run([*words, "--copy"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("vdt prepare volumes: output_dir")
    assert "Traceback" not in result.stderr


def test_a_chosen_form_and_scaled_labels_are_written_so_that_all_read_them_alike(tmp_path):
    root = tmp_path / "own"
    for n in range(3):
        write_case(root / f"images/c{n}.nii.gz", root / f"labels/c{n}.nii.gz")
    image = nib.load(root / "images/c0.nii.gz")
    image.set_qform(make_affine(origin=(9, 0, 0)) @ image.affine, 1)
    nib.save(image, root / "images/c0.nii.gz")
    label = nib.load(root / "labels/c1.nii.gz")
    values = np.asarray(label.dataobj)
    label = nib.Nifti1Image((values * 100).astype(np.uint8), label.affine)
    label.header.set_slope_inter(0.01, 0)
    content = bytearray(label.to_bytes())
    content[112:120] = np.array([0.01, 0], "<f4").tobytes()
    (root / "labels/c1.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"c0\.nii\.gz: its sform and its qform disagree by up to 9 mm"):
        prepare(root, tmp_path / "strict")
    prepare(root, tmp_path / "out", geometry="sform")
    assert rows(tmp_path / "out")["c0"]["notes"] == "sform taken"
    assert "label was scaled" in rows(tmp_path / "out")["c1"]["notes"]
    written = nib.load(tmp_path / "out/images/c0.nii.gz")
    np.testing.assert_allclose(written.get_qform(), written.get_sform(), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out/labels/c1.nii.gz").dataobj), values)
    assert sum(map(len, find_volumes(tmp_path / "out").values())) == 3
