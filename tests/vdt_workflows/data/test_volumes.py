from __future__ import annotations

import gzip
import json
import re
from os.path import relpath

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from tests.makers.dicom import uid, write_series
from tests.makers.volumes import make_affine, write_pair, write_volume
from vdt_workflows.data.headers import check_geometry
from vdt_workflows.data.volumes import find_volumes, list_volumes
from vdt_workflows.naming import result_name
from vdt_workflows.preparation.segmentation import prepare_segmentation

LAYOUTS = {
    "images_labels": ("images/{}.nii.gz", "labels/{}.nii.gz", ["case_1", "case_2", "case_3"]),
    "nnunet": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz", ["liver_001", "liver_002", "spleen_1"]),
    "synapse": ("flat/img{}.nii.gz", "flat/label{}.nii.gz", ["0001", "0002", "0040"]),
    "synapse_folders": ("img/img{}.nii.gz", "label/label{}.nii.gz", ["0001", "0002", "0040"]),
    "lits": ("flat/volume-{}.nii", "flat/segmentation-{}.nii", ["0", "3", "10"]),
    "lits_folders": ("images/volume-{}.nii", "labels/segmentation-{}.nii", ["0", "3", "10"]),
}


def make_layout(root, image, label, names):
    """Write the pairs and return their paths."""
    made = [write_pair(root / image.format(name), root / label.format(name), shape=(2, 2, 2)) for name in names]
    return [(str(image), str(label)) for image, label in made]


def pairs(cases):
    return [(case["image"], case["label"]) for case in cases]


def make_cases(root, count):
    return make_layout(root, "images/c{:03d}.nii.gz", "labels/c{:03d}.nii.gz", range(count))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_understood(tmp_path, layout):
    image, label, names = LAYOUTS[layout]
    made = make_layout(tmp_path, image, label, names)
    root = tmp_path / "flat" if "flat" in image else tmp_path
    cases = find_volumes(root)
    assert sorted(pairs(cases["training"] + cases["validation"])) == sorted(made)
    assert [len(cases[name]) for name in ("training", "validation", "test")] == [2, 1, 0]


def test_labelled_test_volumes_are_listed_apart(tmp_path):
    make_layout(tmp_path, *LAYOUTS["nnunet"])
    test = make_layout(tmp_path, "imagesTs/{}_0000.nii.gz", "labelsTs/{}.nii.gz", ["t1", "t2"])
    assert pairs(find_volumes(tmp_path)["test"]) == test


def test_hidden_files_and_files_of_other_kinds_are_left_out(tmp_path):
    made = make_cases(tmp_path, 2)
    for name in ("images/._c000.nii.gz", "images/notes.txt", "labels/.DS_Store"):
        (tmp_path / name).write_text("")
    cases = find_volumes(tmp_path)
    assert sorted(pairs(cases["training"] + cases["validation"])) == made


def test_the_split_is_seeded_disjoint_and_of_the_asked_size(tmp_path):
    made = make_cases(tmp_path, 10)
    splits = {}
    for seed in range(4):
        cases = find_volumes(tmp_path, seed=seed, val_fraction=0.3)
        training, validation = pairs(cases["training"]), pairs(cases["validation"])
        assert (len(training), len(validation)) == (7, 3)
        assert sorted(training + validation) == made
        assert cases == find_volumes(tmp_path, seed=seed, val_fraction=0.3)
        splits[seed] = tuple(validation)
    assert len(set(splits.values())) > 1


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.1, 1), (2, 1.0, 1), (5, 0.2, 1), (5, 0.5, 2)]
)
def test_both_parts_get_a_case_where_there_are_two(tmp_path, count, fraction, expected):
    make_cases(tmp_path, count)
    cases = find_volumes(tmp_path, val_fraction=fraction)
    assert (len(cases["training"]), len(cases["validation"])) == (count - expected, expected)


def test_without_a_part_for_validation_all_cases_are_trained_on_and_scored(tmp_path):
    make_cases(tmp_path, 3)
    cases = find_volumes(tmp_path, val_fraction=0)
    assert len(cases["training"]) == 3
    assert cases["validation"] == cases["training"]


# Datalists


def write_list(path, **content):
    path.write_text(json.dumps(content))
    return path


def entries(made, root):
    return [{"image": f"./{relpath(image, root)}", "label": f"./{relpath(label, root)}"} for image, label in made]


@pytest.mark.parametrize(
    ("labels", "wanted", "sentence"),
    [
        (
            {"0": "background", "1": "posterior", "2": "anterior"},
            ["background", "anterior", "posterior"],
            "value 1, and 2",
        ),
        ({"background": 0, "liver": 2}, ["background", "Liver"], "'liver' has the label value 2, and 1 in label_names"),
        ({"0": "background", "1": "liver"}, ["background", "lungs"], ""),  # another word for it, or another organ
        ({"background": 0, "whole": [1, 2], "liver": 2}, ["background", "whole", "liver"], ""),
        ({"0": "background", "1": "liver"}, [], ""),
        ("none", ["background", "liver"], ""),
    ],
)
def test_a_label_that_has_another_value_than_is_wanted_is_refused(tmp_path, labels, wanted, sentence):
    made = make_layout(tmp_path, "imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz", ["a", "b"])
    write_list(tmp_path / "dataset.json", training=entries(made, tmp_path), labels=labels)
    if not sentence:
        assert len(find_volumes(tmp_path, label_names=wanted)["training"]) == 1
        return
    with pytest.raises(ValueError, match=sentence):
        find_volumes(tmp_path, label_names=wanted)


def test_a_decathlon_dataset_json_is_read(tmp_path):
    made = make_layout(tmp_path, "imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz", ["a", "b", "c"])
    test = write_volume(tmp_path / "imagesTs" / "t.nii.gz", shape=(2, 2, 2))
    content = {"name": "Spleen", "labels": {"0": "background"}, "test": ["./imagesTs/t.nii.gz"]}
    write_list(tmp_path / "dataset.json", training=entries(made, tmp_path), **content)
    cases = find_volumes(tmp_path)
    assert sorted(pairs(cases["training"] + cases["validation"])) == made
    assert len(cases["validation"]) == 1
    assert cases["test"] == [{"image": str(test)}]


def test_a_validation_list_is_taken_as_it_is(tmp_path):
    made = make_cases(tmp_path, 4)
    listed = entries(made, tmp_path)
    write_list(tmp_path / "dataset.json", training=listed[:3], validation=listed[3:])
    cases = find_volumes(tmp_path, val_fraction=0.5, seed=3)
    assert pairs(cases["training"]) == made[:3]
    assert pairs(cases["validation"]) == made[3:]


def test_an_explicit_datalist_goes_before_what_the_folder_says(tmp_path):
    made = make_cases(tmp_path / "data", 4)
    write_list(tmp_path / "data" / "dataset.json", training=[])
    (tmp_path / "lists").mkdir()
    listed = [{"image": image, "label": label, "fold": 0} for image, label in made[:2]]  # absolute paths
    datalist = write_list(tmp_path / "lists" / "mine.json", training=listed)
    cases = find_volumes(tmp_path / "data", datalist=datalist)
    assert sorted(pairs(cases["training"] + cases["validation"])) == made[:2]


# What is refused


def test_a_missing_folder_or_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^dataset_dir .*/none: no such folder$"):
        find_volumes(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"^datalist .*/none\.json: no such file$"):
        find_volumes(tmp_path, datalist=tmp_path / "none.json")


def test_a_folder_without_pairs_is_named_with_what_was_expected(tmp_path):
    message = re.escape(str(tmp_path)) + r": no training cases; expected pairs of volume"
    with pytest.raises(ValueError, match=message):
        find_volumes(tmp_path)
    write_list(tmp_path / "dataset.json", training=[])
    with pytest.raises(ValueError, match=r"dataset\.json: no training cases"):
        find_volumes(tmp_path)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_listed_case_without_a_label_is_named(tmp_path, part):
    listed = entries(make_cases(tmp_path, 3), tmp_path)
    bad = [{"image": "images/c002.nii.gz"}]
    content = {"training": listed[:1], "validation": listed[1:2]}
    write_list(tmp_path / "dataset.json", **{**content, part: content[part] + bad})
    with pytest.raises(ValueError, match=r"images/c002\.nii\.gz: has no label, which training and validation need$"):
        find_volumes(tmp_path)


MISFITS = {
    "no label": (None, r"images/c001\.nii\.gz: has no label, which training and validation need$"),
    "shape": ({"shape": (2, 2, 3)}, r"shape \(2, 2, 3\), but its image .*images/c001.* shape \(2, 2, 2\)$"),
    "spacing": (
        {"affine": make_affine((1, 1, 1.5))},
        r"its affine differs from that of .*images/c001\.nii\.gz in its spacing, \(1.0, 1.0, 1.5\) instead of"
        r" \(1.0, 1.0, 1.0\) mm; both",
    ),
    "origin": ({"affine": make_affine(origin=(0, -12, 0))}, r"images/c001\.nii\.gz by up to 12 mm; both"),
    "mirrored": ({"affine": np.diag([-1.0, 1, 1, 1])}, r"images/c001\.nii\.gz by up to 2 mm; both"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_label_that_does_not_fit_its_image_is_named(tmp_path, misfit):
    options, sentence = MISFITS[misfit]
    make_cases(tmp_path, 2)
    label = tmp_path / "labels" / "c001.nii.gz"
    label.unlink()
    if options is not None:
        write_volume(label, **{"shape": (2, 2, 2), **options})
        sentence = rf"labels/c001\.nii\.gz: .*{sentence}"
    with pytest.raises(ValueError, match=sentence):
        find_volumes(tmp_path)


def test_a_rounded_affine_and_a_fourth_axis_of_one_are_no_difference(tmp_path):
    image = write_volume(tmp_path / "i.nii.gz", shape=(4, 5, 6, 1), affine=make_affine(origin=(100, 0, 0)))
    label = write_volume(tmp_path / "l.nii.gz", shape=(4, 5, 6), affine=make_affine(origin=(100.004, 0, 0)))
    check_geometry({"image": str(image), "label": str(label)})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{not json", "not JSON"),
        (b'{"training": [{"label": "x"}]}', "training holds {'label': 'x'}; expected"),
        (b'{"training": [3]}', "training holds 3; expected"),
        (b'{"training": [{"image": ["a", "b"]}]}', r"training holds {'image': \['a', 'b'\]}"),
        (b'{"training": [{"image": "a", "label": 1}]}', "training holds .*'label': 1"),
        (b'{"training": null}', "no training cases"),
        (b'{"training": 7}', "training holds 7; expected a list"),
        (b'{"training": {"image": "a"}}', "training holds {'image': 'a'}; expected a list"),
        (b"[1, 2]", "no training cases"),
        (b"", "not JSON"),
        (b"\xff\xfe\x00\x80", "not JSON"),
    ],
)
def test_a_datalist_that_is_wrong_is_named_with_what_was_expected(tmp_path, text, reason):
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"dataset\.json: {reason}"):
        find_volumes(tmp_path)


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    listed = entries(make_cases(tmp_path, 2), tmp_path)
    write_list(tmp_path / "dataset.json", training=[*listed, {"image": "images/x.nii.gz", "label": "labels/x.nii.gz"}])
    with pytest.raises(FileNotFoundError, match=r"images/x\.nii\.gz: no such file$"):
        find_volumes(tmp_path)


def test_a_listed_folder_is_refused_with_the_series_in_it(tmp_path, caplog):
    listed = entries(make_cases(tmp_path, 3), tmp_path)
    write_series(tmp_path / "images" / "scan", name="a", SeriesNumber=3)
    write_series(tmp_path / "images" / "scan", name="b", SeriesNumber=4)
    find_volumes(tmp_path)
    assert caplog.messages[-1].endswith("; 1 folders (scan)")
    write_list(tmp_path / "dataset.json", training=[{**listed[0], "image": "images/scan"}, *listed[1:]])
    series = (
        r"scan: a folder with 3: 1\.2\.\S+ with 4 images, 4: 1\.2\.\S+ with 4 images; a case with a label is a volume"
    )
    with pytest.raises(ValueError, match=series):
        find_volumes(tmp_path)
    assert sum(map(len, find_volumes(tmp_path, on_error="skip").values())) == 2
    with pytest.raises(ValueError, match=series):
        prepare_segmentation(str(tmp_path), str(tmp_path.with_name("out")), workers=1)


def whole(tmp_path):
    return gzip.decompress(write_volume(tmp_path / "whole.nii.gz", shape=(20, 20, 20)).read_bytes())


TEXT = b"no volume" * 100
CORRUPT = {
    "empty-gz": ("x.nii.gz", lambda whole: b""),
    "empty": ("x.nii", lambda whole: b""),
    "text-gz": ("x.nii.gz", lambda whole: TEXT),
    "text": ("x.nii", lambda whole: TEXT),
    "text-in-gz": ("x.nii.gz", lambda whole: gzip.compress(TEXT)),
    "cut-in-header-gz": ("x.nii.gz", lambda whole: gzip.compress(whole)[:40]),
    "cut-in-header": ("x.nii", lambda whole: whole[:100]),
    "not-compressed": ("x.nii.gz", lambda whole: whole),
}


@pytest.mark.parametrize("fault", CORRUPT)
@pytest.mark.parametrize("key", ["image", "label"])
def test_a_corrupt_volume_is_named(tmp_path, key, fault):
    name, content = CORRUPT[fault]
    good = write_volume(tmp_path / "good.nii.gz", shape=(20, 20, 20))
    (tmp_path / name).write_bytes(content(whole(tmp_path)))
    case = {"image": str(good), "label": str(good), key: str(tmp_path / name)}
    with pytest.raises(ValueError, match=rf"/{re.escape(name)}: not a readable NIfTI volume \("):
        check_geometry(case)


def colour(shape):
    return np.zeros(shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


def write_raw(path, values, *, affine=None, pixdim=None):
    """Write voxels as they are, with a header that no careful program would write."""
    image = nib.Nifti1Image(values, np.eye(4))
    content = bytearray(image.to_bytes())
    if affine is not None:
        content[80:92] = np.linalg.norm(affine[:3, :3], axis=0).astype("<f4").tobytes()  # pixdim
        content[280:328] = affine[:3].astype("<f4").tobytes()  # sform
    if pixdim is not None:
        content[80:92] = np.array(pixdim, "<f4").tobytes()
        content[252:256] = bytes([1, 0, 0, 0])  # qform alone
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


GREY = np.zeros((2, 3, 4), np.int16)
FLAT = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SIZE = r"voxel size \({}\) mm in its header; expected 0.001 to 100 mm$"
UNUSABLE = {
    "4D": (np.zeros((2, 3, 4, 5), np.int16), {}, r"4D, of shape \(2, 3, 4, 5\); expected one"),
    "2D": (GREY[0], {}, r"2D, of shape \(3, 4\); expected one 3D volume in a file$"),
    "RGB": (colour((2, 3, 4)), {}, r"a colour \(RGB\) volume; expected one number a voxel"),
    "complex": (GREY.astype(np.complex64), {}, "a complex volume; expected one number"),
    "zero-size": (GREY[:, :0], {}, r"zero-size volume of shape \(2, 0, 4\); expected voxels"),
    "zero-column": (GREY, {"affine": np.diag([0.0, 1, 2, 1])}, SIZE.format("0, 1, 2")),
    "zero-pixdim": (GREY, {"pixdim": (1, 0, 2)}, SIZE.format("1, 0, 2")),
    "NaN-pixdim": (GREY, {"pixdim": (1, np.nan, 2)}, SIZE.format("1, nan, 2")),
    "flat-affine": (GREY, {"affine": FLAT}, "the axes in its affine are not independent; expected three directions"),
}


@pytest.mark.parametrize("fault", UNUSABLE)
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_a_volume_that_cannot_be_used_is_named_from_its_header(tmp_path, fault, name, key):
    values, header, sentence = UNUSABLE[fault]
    bad, good = write_raw(tmp_path / name, values, **header), write_volume(tmp_path / "good.nii.gz", shape=GREY.shape)
    with pytest.raises(ValueError, match=rf"/{re.escape(name)}: {sentence}") as caught:
        check_geometry({"image": str(good), "label": str(good), key: str(bad)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cut", "reason"),
    [
        ("x.nii", lambda whole: whole[:-1], "32351 of 32352 bytes are there"),
        ("x.nii", lambda whole: whole[:400], "400 of 32352 bytes are there"),
        ("x.nii.gz", lambda whole: gzip.compress(whole)[:-3000], r"\d+ of 32352 bytes can be unpacked \(Compressed"),
        ("x.nii.gz", lambda whole: gzip.compress(whole[:-9]), "32343 of 32352 bytes are"),
    ],
    ids=["plain", "plain-early", "cut-gz", "short-gz"],
)
def test_a_volume_cut_short_in_its_voxels_is_named_without_reading_them(tmp_path, name, cut, reason):
    (tmp_path / name).write_bytes(cut(whole(tmp_path)))
    with pytest.raises(ValueError, match=rf"/{re.escape(name)}: cut short or damaged, {reason}"):
        check_geometry({"image": str(tmp_path / name)})


def test_a_whole_file_of_several_gzip_members_is_not_called_cut(tmp_path):
    content = whole(tmp_path)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content[:9000]) + gzip.compress(content[9000:]))
    check_geometry({"image": str(tmp_path / "x.nii.gz")})


# What is skipped when asked


def spoil(root, number):
    """Make the cases of a folder unusable, each in its own way, and return their sentences."""
    ways = [
        lambda image, label: label.unlink(),
        lambda image, label: write_raw(image, np.zeros((2, 2, 2, 3), np.int16)),
        lambda image, label: write_raw(label, colour((2, 2, 2))),
        lambda image, label: image.write_bytes(write_volume(image, shape=(9, 9, 9)).read_bytes()[:-20]),
        lambda image, label: write_volume(label, shape=(2, 2, 2), affine=make_affine((1, 1, 3))),
    ]
    for i, way in zip(range(number), ways, strict=False):
        way(root / "images" / f"c{i:03d}.nii.gz", root / "labels" / f"c{i:03d}.nii.gz")
    return ["has no label", "4D", "RGB", "cut short", "in its spacing"][:number]


def test_bad_cases_are_left_out_counted_and_named_and_no_other_changes_sides(tmp_path, caplog):
    make_cases(tmp_path, 12)
    before = find_volumes(tmp_path, seed=1)
    sentences = spoil(tmp_path, 5)
    with pytest.raises(ValueError, match="c00"):
        find_volumes(tmp_path, seed=1)
    with caplog.at_level("INFO"):
        after = find_volumes(tmp_path, seed=1, on_error="skip")
    good = [f"c{i:03d}" for i in range(5, 12)]
    for part in ("training", "validation"):
        assert after[part] == [case for case in before[part] if any(name in case["image"] for name in good)]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 6
    for i, sentence in enumerate(sentences):
        [line] = [w for w in warnings[:-1] if f"c{i:03d}.nii.gz" in w]
        assert sentence in line
        assert line.endswith("; the case is left out")
    assert ": 7 used, 5 left out; 5 training, 2 validation, 0 test; 5 unusable, see above (c000" in caplog.messages[-1]


def test_a_listed_case_is_left_out_and_a_missing_file_with_it(tmp_path):
    listed = entries(make_cases(tmp_path, 4), tmp_path)
    gone, bare = {"image": "images/x.nii.gz", "label": "labels/x.nii.gz"}, {"image": "images/c003.nii.gz"}
    write_list(tmp_path / "dataset.json", training=[*listed[:2], gone], validation=[listed[2], bare])
    cases = find_volumes(tmp_path, on_error="skip")
    assert [len(cases[name]) for name in ("training", "validation", "test")] == [2, 1, 0]


def test_a_list_of_which_nothing_is_left_is_an_error(tmp_path):
    make_cases(tmp_path, 5)
    spoil(tmp_path, 5)
    with pytest.raises(ValueError, match=r"none of the 4 training cases can be used, see above$"):
        find_volumes(tmp_path, on_error="skip")
    with pytest.raises(FileNotFoundError):
        find_volumes(tmp_path / "none", on_error="skip")


def test_another_word_for_on_error_is_refused(tmp_path):
    for function in (find_volumes, list_volumes):
        with pytest.raises(ValueError, match=r"^on_error must be 'raise' or 'skip', got 'ignore'$"):
            function(tmp_path, on_error="ignore")


# What two lists share


def test_a_case_to_learn_from_that_is_scored_too_is_named(tmp_path):
    listed = entries(make_cases(tmp_path, 3), tmp_path)
    again = {"image": "images/../images/c001.nii.gz", "label": listed[1]["label"]}
    for part in ("validation", "test"):
        write_list(tmp_path / "dataset.json", training=listed[:2], **{part: [listed[2], again]})
        with pytest.raises(ValueError, match=rf"/images/c001\.nii\.gz is listed for training and for {part}; list it"):
            find_volumes(tmp_path, on_error="skip")


def test_a_case_in_two_lists_is_taken_where_the_file_gives_the_reason_which_is_logged(tmp_path, caplog):
    listed = entries(make_cases(tmp_path, 1), tmp_path)
    write_list(tmp_path / "dataset.json", training=listed, validation=listed, shared_cases="there is one case only")
    cases = find_volumes(tmp_path)
    assert cases["training"] == cases["validation"]
    assert "1 cases are in two lists (there is one case only)" in caplog.text


def test_validation_that_is_the_test_is_said_in_the_log(tmp_path, caplog):
    listed = entries(make_cases(tmp_path, 4), tmp_path)
    write_list(tmp_path / "dataset.json", training=listed[:2], validation=listed[2:], test=listed[2:])
    cases = find_volumes(tmp_path)
    assert cases["validation"] == cases["test"]
    assert "2 cases are in two lists (validation and test)" in caplog.text


# list_volumes


def test_volumes_that_cannot_be_used_are_refused_or_left_out(tmp_path, caplog):
    good = write_volume(tmp_path / "b.nii.gz")
    write_raw(tmp_path / "a.nii.gz", np.zeros((2, 3, 4, 5), np.int16))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: 4D"):
        list_volumes(tmp_path)
    assert list_volumes(tmp_path, on_error="skip") == [{"image": str(good)}]
    assert "a.nii.gz: 4D" in caplog.text
    good.unlink()
    with pytest.raises(ValueError, match="none of its 1 volumes can be used"):
        list_volumes(tmp_path, on_error="skip")


@pytest.mark.parametrize("folder", ["", "imagesTs", "imagesTr", "images"])
def test_the_volumes_of_a_folder_or_of_its_images_folder_are_listed(tmp_path, folder):
    files = [write_volume(tmp_path / folder / name) for name in ("b.nii", "a.nii.gz")]
    (tmp_path / folder / "notes.txt").write_text("")
    assert list_volumes(tmp_path) == [{"image": str(file)} for file in sorted(files)]
    assert list_volumes(files[0]) == list_volumes(str(files[0])) == [{"image": str(files[0])}]


def test_test_images_go_before_training_images(tmp_path):
    test = write_volume(tmp_path / "imagesTs" / "t.nii.gz")
    write_volume(tmp_path / "imagesTr" / "a.nii.gz")
    assert list_volumes(tmp_path) == [{"image": str(test)}]


def test_nothing_to_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/none: no such file or folder; expected a volume or a folder"):
        list_volumes(tmp_path / "none")
    with pytest.raises(ValueError, match=r": no volume file .* nor DICOM series in or below it$"):
        list_volumes(tmp_path)


def test_an_nnunet_folder_is_listed_although_its_dataset_json_lists_no_cases(tmp_path):
    for number in range(3):
        write_pair(tmp_path / "imagesTr" / f"c{number}_0000.nii.gz", tmp_path / "labelsTr" / f"c{number}.nii.gz")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "numTraining": 3}')
    cases = find_volumes(tmp_path)
    assert len(cases["training"]) + len(cases["validation"]) == 3


# DICOM ------------------------------------------------------------------------------------------------------------


def test_each_folder_with_a_series_is_a_volume(tmp_path):
    for patient in ("p1", "p2"):
        write_series(tmp_path / patient / f"study-{patient}", name=patient)
    found = [case["image"] for case in list_volumes(tmp_path)]
    assert found == [str(tmp_path / p / f"study-{p}") for p in ("p1", "p2")]
    assert list_volumes(tmp_path / "p1" / "study-p1") == [{"image": found[0]}]


def test_series_without_a_slice_is_named_and_left_out_when_asked(tmp_path, caplog):
    write_series(tmp_path / "a", name="a")
    write_series(tmp_path / "b", name="b", shape=(6, 5, 8))[3].unlink()
    with pytest.raises(ValueError, match=r"/b: series .* lacks 1 slice, the first between"):
        list_volumes(tmp_path)
    assert list_volumes(tmp_path, on_error="skip") == [{"image": str(tmp_path / "a")}]
    assert "lacks 1 slice" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [("all", ["3", "5"]), (3, ["3"]), (" Portal Venous", ["5"]), (uid("P1", "a"), ["3"])],
)
def test_several_series_in_a_folder_are_each_done_under_its_own_name_or_chosen(tmp_path, wanted, taken):
    for number, name, description in ((3, "a", "native"), (5, "b", "portal venous")):
        fields = {"SeriesNumber": number, "SeriesDescription": description}
        write_series(tmp_path / "both", shape=(6, 5, 2 + number), patient="P1", name=name, **fields)
    found = [case["image"] for case in list_volumes(tmp_path, series=wanted)]
    assert found == [str(tmp_path / "both" / f"series-{number}") for number in taken]
    shapes = [LoadImage(reader="vdt_transforms.VolumeReader", image_only=True)(image).shape for image in found]
    assert shapes == [(6, 5, 2 + int(number)) for number in taken]


def test_what_a_folder_holds_beside_a_series_is_named_and_counted(tmp_path, caplog):
    files = write_series(tmp_path / "scan", SeriesNumber=3)
    (tmp_path / "scan" / "last_slice").write_bytes(files[-1].read_bytes()[200:])
    (tmp_path / "cut.dcm").write_bytes(files[-1].read_bytes()[:100])
    list_volumes(tmp_path)
    assert caplog.messages[-1].endswith(": 1 used, 2 left out; 1 damaged (cut.dcm); 1 not DICOM (last_slice)")
    write_series(tmp_path / "scan", name="b", SeriesNumber=5)
    list_volumes(tmp_path, series=5)
    assert caplog.messages[-1].endswith(
        "; 1 damaged (cut.dcm); 1 not DICOM (last_slice); 1 series not chosen (series-3)"
    )


def test_a_series_that_is_not_there_is_refused_with_those_that_are_but_no_words_of_their_headers(tmp_path):
    write_series(tmp_path, patient="DOE", SeriesNumber=3, SeriesDescription="DOE")
    with pytest.raises(ValueError, match=r"no series '4' in it; expected one of 3: [\d.]+ with 4 images$"):
        list_volumes(tmp_path, series="4")


def test_series_whose_folders_share_a_name_get_results_of_their_own(tmp_path):
    for patient in ("p1", "p2"):
        write_series(tmp_path / patient / "ct", name=patient)
    assert [result_name(case["image"]) for case in list_volumes(tmp_path)] == ["p1_ct", "p2_ct"]
