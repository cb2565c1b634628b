from __future__ import annotations

import json
import os
import signal

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.makers.deeplesion import make_deeplesion, row, write_csv, write_series
from tests.support.folders import contents, run_until_killed
from vdt_transforms import SliceStackReader
from vdt_workflows.cli import main
from vdt_workflows.data.key_slices import find_key_slices
from vdt_workflows.preparation import deeplesion as script
from vdt_workflows.preparation.deeplesion import prepare_deeplesion
from vdt_workflows.preparation.deeplesion_tables import COLUMNS


def prepare(root, rows=None, **options):
    """Prepare a folder, of a table of such rows if they are given."""
    if rows is not None:
        write_csv(root / "DL_info.csv", rows)
    return prepare_deeplesion(str(root), **options)


def written(root):
    return json.loads((root / "deeplesion.json").read_text())


@pytest.fixture
def root(tmp_path):
    """Six slices of one series, 106 to 111, and room for a table."""
    write_series(tmp_path / "Images_png" / "000001_01_01", range(106, 112))
    return tmp_path


# From DL_info.csv


def test_first_lesion_of_the_data_set_gets_its_known_box(root):
    summary = prepare(root, [row()])
    (item,) = written(root)["test"]
    x, y, width, height = 225.169, 89.0204, 15.083, 21.9566
    np.testing.assert_allclose(item["boxes"], [[x, y, x + width, y + height]], atol=1e-4)
    np.testing.assert_allclose(item["areas"], [width * height], rtol=1e-4)
    assert item["image"] == "Images_png/000001_01_01/109.png"
    assert item["diameters"] == [pytest.approx(11.9677 * 0.488281)]
    assert (item["types"], item["patient"], item["slice_interval"]) == ([3], "000001", 5)
    axes = np.reshape(item["axes"], (4, 2))
    np.testing.assert_allclose(axes.min(0) - 5, item["boxes"][0][:2], atol=1e-3)  # 5 px around the end points
    np.testing.assert_allclose(axes.max(0) + 5, item["boxes"][0][2:], atol=1e-3)
    assert summary["lesions"] == {"test": 1}
    assert written(root)["slices"] == {"000001_01_01": [[106, 111]]}


def test_lesions_of_one_key_slice_are_one_item(root):
    summary = prepare(root, [row(), row(box=(10, 20, 30, 40), Possibly_noisy=1), row(number=110)])
    assert [len(item["boxes"]) for item in written(root)["test"]] == [2, 1]
    assert (summary["lesions"]["test"], summary["key_slices"]["test"], summary["noisy_lesions"]) == (3, 2, 1)


@pytest.mark.parametrize(("nested", "folder"), [(True, "Images_png/Images_png"), (False, "Images_png")])
def test_splits_are_those_of_the_table_wherever_the_images_are(tmp_path, nested, folder):
    summary = prepare(make_deeplesion(tmp_path, patients=(3, 2, 1), nested=nested))
    assert written(tmp_path)["training"][0]["image"] == f"{folder}/000001_01_01/006.png"
    assert summary["key_slices"] == {"training": 6, "validation": 4, "test": 2}
    assert summary["patients"] == {"training": 3, "validation": 2, "test": 1}
    assert summary["official"] == {"training": False, "validation": False, "test": False}
    patients = [{item["patient"] for item in written(tmp_path)[split]} for split in ("training", "validation", "test")]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]


def test_official_counts_are_the_published_ones_and_compared_with_the_table():
    assert script.OFFICIAL == {"training": (22919, 22496), "validation": (4889, 4793), "test": (4927, 4831)}
    lesions = [{"split": "test", "series": "s", "slice": min(i, 4830)} for i in range(4927)]
    assert script._count(lesions, "test") == script.OFFICIAL["test"]
    assert script._count(lesions[1:], "test") == (4926, 4830)


def test_part_of_the_download_works_and_the_summary_says_what_is_missing(root):
    rows = [row(), row(number=120), row("000002_01_01"), row("000003_02_01")]
    summary = prepare(root, rows)
    assert summary["left_out"] == {"the key slice is not there": 1, "the series is not there": 2}
    kept = json.loads((root / "deeplesion_summary.json").read_text())
    assert kept["left_out_lesions"]["the series is not there"] == ["000002_01_01/109.png", "000003_02_01/109.png"]


def test_boxes_are_clipped_to_the_image_and_empty_ones_left_out(root):
    summary = prepare(root, [row(box=(-4, 500, 20, 530)), row(number=110, box=(600, 600, 620, 620))])
    assert written(root)["test"][0]["boxes"] == [[0, 499, 19, 512]]
    assert summary["left_out"] == {"less than a pixel of the box is inside the image": 1}


@pytest.mark.parametrize("interval", ["0", "-5"])
def test_unusable_slice_interval_is_left_out_and_counted(root, interval):
    (reason,) = prepare(root, [row(), row(number=110, Spacing_mm_px_=f"0.5, 0.5, {interval}")])["left_out"]
    assert reason == f"the slice interval is {float(interval):g} mm"


@pytest.mark.parametrize("spoilt", ["109", "106", "111"])
def test_slices_of_8_bits_are_left_out_and_refused_where_there_are_no_others(root, spoilt):
    (file,) = root.rglob(f"{spoilt}.png")
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(file)
    with pytest.raises(
        ValueError, match=r"can be used \(1 times the series has a slice that is no PNG of one channel of"
    ):
        prepare(root, [row()])
    write_series(file.parents[1] / "000002_01_01", range(106, 112))
    assert list(prepare(root, [row(), row("000002_01_01")])["left_out"].values()) == [1]


def test_preparing_again_gives_the_same_file_and_a_longer_download_more(root):
    prepare(root, [row(), row("000002_01_01")])
    first = (root / "deeplesion.json").read_bytes()
    prepare(root)
    assert (root / "deeplesion.json").read_bytes() == first
    write_series(root / "Images_png" / "000002_01_01", [109])
    assert prepare(root)["key_slices"]["test"] == 2


# What wrong input gets


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"Bounding_boxes": "1, 2, 3"}, r"line 3: Bounding_boxes is '1, 2, 3', not 4 numbers"),
        ({"Bounding_boxes": "9, 2, 3, 8"}, r"line 3: Bounding_boxes is '9, 2, 3, 8', not x1 < x2"),
        ({"File_name": "109.png"}, r"line 3: File_name is '109.png'"),
        ({"Train_Val_Test": 4}, "line 3: a value: Train_Val_Test is '4'; expected a whole number from 1 to 3"),
        ({"Spacing_mm_px_": "a, b, c"}, "line 3: a value: Spacing_mm_px_ is 'a'; expected a number"),
        ({"Bounding_boxes": "1, 2, 1_0, inf"}, "line 3: a value: Bounding_boxes is '1_0'; expected a number"),
        ({"Spacing_mm_px_": "0.5, 0.5, nan"}, "line 3: a value: Spacing_mm_px_ is 'nan'; expected a number"),
        ({"Possibly_noisy": "2"}, "line 3: a value: Possibly_noisy is '2'; expected a whole number from 0 to 1"),
    ],
)
def test_row_that_is_no_lesion_is_named(root, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        prepare(root, [row(), row() | change])


def test_missing_table_images_and_columns_are_named(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"DL_info.csv: no such file"):
        prepare(root)
    write_csv(root / "DL_info.csv", [row()], columns=COLUMNS[:-1])
    with pytest.raises(ValueError, match=r"DL_info.csv: wrong columns, missing 'Train_Val_Test'"):
        prepare(root)
    with pytest.raises(FileNotFoundError, match="Images_png: no such folder"):
        prepare(tmp_path / "absent")


def test_nothing_usable_and_a_foreign_file_are_refused(root):
    with pytest.raises(ValueError, match=r"none of the 1 annotated lesions can be used \(1 times the series is"):
        prepare(root, [row("000002_01_01")])
    (root / "deeplesion.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"deeplesion.json: is there and was not made by this script"):
        prepare(root, [row()])


def test_command_ends_in_one_sentence(root):
    with pytest.raises(SystemExit, match=r"^vdt prepare deeplesion: .*DL_info.csv: no such file"):
        main(["prepare", "deeplesion", str(root)])


# From COCO-style files


def coco(path, split="val", **lesion):
    image = {"id": 1, "file_name": "000001_01_01/109.png", "width": 512, "height": 512, "slice_no": 109,
             "spacing": 0.8, "slice_intv": 1.0, "z_position": 0.4, "windows": [-175, 275]}  # fmt: skip
    annotation = {"id": 1, "image_id": 1, "bbox": [0.0, 10.0, 20.0, 30.0], "area": 0.0, "noisy": 1, "category_id": 1}
    path.mkdir(exist_ok=True)
    content = {"images": [image], "annotations": [annotation | lesion], "categories": [{"id": 1, "name": "Lesion"}]}
    (path / f"deeplesion_{split}.json").write_text(json.dumps(content))
    return path


def test_coco_files_are_read_and_their_area_is_not_believed(root):
    summary = prepare(root, annotations=str(coco(root / "annotation")))
    (item,) = written(root)["validation"]
    assert item["boxes"] == [[0, 10, 20, 40]]
    assert item["areas"] == [600]
    assert (item["noisy"], item["types"], item["diameters"]) == ([1], [-1], [None])
    assert summary["noisy_lesions"] == 1


def test_coco_file_without_its_image_is_named(root):
    with pytest.raises(ValueError, match=r"deeplesion_val.json: not such a COCO-style file .KeyError: 7"):
        prepare(root, annotations=str(coco(root / "annotation", image_id=7)))


# What training reads


def test_noisy_lesions_are_ignored_dropped_or_kept_by_name(root):
    rows = [row(Train_Val_Test=1), row(box=(10, 20, 30, 40), Possibly_noisy=1, Train_Val_Test=1),
            row(number=110, Possibly_noisy=1, Train_Val_Test=1), row(number=111, Possibly_noisy=1)]  # fmt: skip
    prepare(root, rows)
    found = {rule: find_key_slices(root, noisy=rule) for rule in ("ignore", "drop", "keep")}
    assert [len(found[rule]["training"]) for rule in found] == [1, 1, 2]
    assert [len(found[rule]["test"]) for rule in found] == [1, 0, 1]
    assert [len(found[rule]["training"][0]["box"]) for rule in found] == [1, 1, 2]
    truths = [found[rule]["training"][0]["truth"] for rule in found]
    assert [t["ignored"].tolist() for t in truths] == [[False, True], [False], [False, False]]
    assert found["ignore"]["test"][0]["truth"]["ignored"].tolist() == [True]
    with pytest.raises(ValueError, match=r"noisy must be .* got 'no'"):
        find_key_slices(root, noisy="no")


def test_unprepared_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"deeplesion.json: no such file; give the folder that vdt prepare"):
        find_key_slices(tmp_path)
    (tmp_path / "deeplesion.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of vdt prepare deeplesion"):
        find_key_slices(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("slice_interval", "NaN"), ("slice_interval", "-1"), ("boxes", "[[0, 0, Infinity, 5]]"), ("noisy", "[7]")],
)
def test_numbers_that_cannot_be_are_refused(root, name, value):
    prepare(root, [row()])
    content = json.loads((root / "deeplesion.json").read_text())
    (entry,) = content["test"]
    entry[name] = json.loads(value)
    (root / "deeplesion.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"deeplesion\.json: not a file of vdt prepare deeplesion .*109\.png"):
        find_key_slices(root)


# From volumes and masks


def write_pair(folder, name, axes=(-1, -1, -2.5), lesion=((4, 9), (10, 13), (3, 6))):
    """A volume with its lesion's voxels given in LPI, stored with the given axes (L and P first where negative)."""
    folder.mkdir(exist_ok=True)
    shape = (20, 24, 9)
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(*edge) for edge in lesion)] = 1
    mask[15:17, 3:5, 7] = 1
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    turn = tuple(slice(None, None, -1) if axis > 0 else slice(None) for axis in axes)
    affine = np.diag([*axes, 1.0])
    nib.save(nib.Nifti1Image(values[turn], affine), folder / f"{name}_image.nii.gz")
    nib.save(nib.Nifti1Image(mask[turn], affine), folder / f"{name}_label.nii.gz")
    return values


@pytest.mark.parametrize("axes", [(-1, -1, -2.5), (1, 1, 2.5), (-1, 1, 2.5)], ids=["LPI", "RAS", "LAS"])
def test_volumes_with_masks_become_a_data_set_of_this_layout(tmp_path, axes):
    values = write_pair(tmp_path / "volumes", "a", axes)
    root = tmp_path / "made"
    summary = prepare(root, volumes=str(tmp_path / "volumes"), split_by=[1, 0, 0], workers=1)
    assert summary["lesions"] == {"training": 2}
    item = written(root)["training"][0]
    assert item["image"] == "Images_png/000001_01_01/004.png"  # slices are counted from 1
    assert item["boxes"] == [[0, 5, 13, 17]]  # x 4 to 8 and y 10 to 12, and 5 px around, clipped
    assert item["slice_interval"] == 2.5
    assert item["diameters"] == [pytest.approx(np.hypot(4, 2), rel=0.01)]
    picture = np.asarray(Image.open(root / item["image"])).astype(int) - 32768
    np.testing.assert_array_equal(picture, values[:, :, 3].T)
    stack = SliceStackReader(3)(root / item["image"], 2.5)
    np.testing.assert_array_equal(stack, values[:, :, 2:5].transpose(2, 0, 1))


def test_all_slices_of_a_lesion_may_be_key_slices_and_volumes_are_split_whole(tmp_path):
    for name in "abcde":
        write_pair(tmp_path / "volumes", name)
    root = tmp_path / "made"
    summary = prepare(
        str(root), volumes=str(tmp_path / "volumes"), split_by=[0.6, 0.2, 0.2], key_slices="all", workers=1
    )
    assert summary["patients"] == {"training": 3, "validation": 1, "test": 1}
    assert summary["key_slices"]["training"] == 3 * 4


def test_converting_goes_on_where_it_stopped_and_refuses_other_settings_and_foreign_folders(tmp_path):
    write_pair(tmp_path / "volumes", "a")
    root = tmp_path / "made"
    arguments = {"volumes": str(tmp_path / "volumes"), "split_by": [1, 0, 0], "workers": 1}
    prepare(root, **arguments)
    first, table = root / "Images_png" / "000001_01_01", (root / "DL_info.csv").read_bytes()
    time = (first / "001.png").stat().st_mtime_ns
    (root / "DL_info.csv").unlink()
    prepare(root, **arguments)
    assert (root / "DL_info.csv").read_bytes() == table
    assert (first / "001.png").stat().st_mtime_ns == time
    with pytest.raises(ValueError, match="holds results made with key_slices 'largest', not 'all'"):
        prepare(root, **{**arguments, "key_slices": "all"})
    with pytest.raises(FileExistsError, match="volumes has files that are not from this script"):
        prepare(tmp_path / "volumes", **arguments)


def test_a_killed_conversion_leaves_no_half_series_and_goes_on(tmp_path):
    for name in "ab":
        write_pair(tmp_path / "volumes", name)
    arguments = {"volumes": str(tmp_path / "volumes"), "split_by": [1, 0, 0], "workers": 1}
    prepare(tmp_path / "whole", **arguments)

    def killed_at_the_13th_slice():
        save, seen = Image.Image.save, []

        def save_or_die(image, path, **options):
            seen.append(path)
            if len(seen) == 13:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(image, path, **options)

        Image.Image.save = save_or_die
        prepare(tmp_path / "made", **arguments)

    run_until_killed(killed_at_the_13th_slice)
    made = tmp_path / "made"
    assert [path.name for path in sorted((made / "Images_png").iterdir())] == [".000002_01_01", "000001_01_01"]
    assert not (made / "DL_info.csv").exists()
    first = made / "Images_png" / "000001_01_01" / "001.png"
    time = first.stat().st_mtime_ns
    prepare(made, **arguments)
    assert first.stat().st_mtime_ns == time
    found, wanted = contents(made), contents(tmp_path / "whole")
    for files in (found, wanted):
        del files["deeplesion_summary.json"]  # has its place
    assert found == wanted


def test_volume_without_mask_or_on_another_grid_is_named(tmp_path):
    write_pair(tmp_path / "v", "a")
    label = tmp_path / "v" / "a_label.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((20, 24, 8), np.uint8), np.eye(4)), label)
    with pytest.raises(ValueError, match=r"a_label.nii.gz: shape \(1, 20, 24, 8\), but its image has"):
        prepare(tmp_path / "one", volumes=str(tmp_path / "v"), workers=1)
    label.unlink()
    with pytest.raises(FileNotFoundError, match=r"a_label.nii.gz: no such file; a_image.nii.gz needs its mask"):
        prepare(tmp_path / "two", volumes=str(tmp_path / "v"), workers=1)
    with pytest.raises(ValueError, match="key_slices must be 'largest' or 'all', got 'some'"):
        prepare(tmp_path / "three", volumes=str(tmp_path / "v"), key_slices="some")
