import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.folders import contents
from vdt_transforms import LoadNaturalImage, ResizeCenterCropImage
from vdt_workflows.data.images import find_images
from vdt_workflows.preparation import images
from vdt_workflows.preparation.images import prepare_images

JPEG = "*.[jJ][pP]*"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def smooth(rows=60, columns=90, seed=0):
    small = np.random.default_rng(seed).integers(40, 210, (4, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC)


def write(file, image=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or smooth()).save(file, options.pop("format", "JPEG"), **options)
    return file


@pytest.fixture
def source(tmp_path):
    """Two classes, three training pictures and one validation picture each."""
    for label in ("cat", "dog"):
        for i in range(3):
            write(tmp_path / "source" / "train" / label / f"{i}.JPEG", smooth(seed=i))
        write(tmp_path / "source" / "val" / label / "v.jpg", smooth(90, 60))
    return tmp_path / "source"


def prepare(source, **options):
    return prepare_images(str(source), str(source.parent / "out"), **{"short_side": 32, "workers": 1, **options})


def relative(images, root):
    return [(os.path.relpath(item["image"], root), item["label"]) for item in images]


def test_the_copy_is_found_as_the_data_set_is(source, tmp_path):
    done = prepare(source)
    before, after = find_images(source), find_images(tmp_path / "out")
    for part in ("train", "val"):
        assert relative(before[part], source) == relative(after[part], tmp_path / "out")
    assert (done["training_images"], done["validation_images"], done["written_anew"]) == (6, 2, 8)
    assert done["left_out"] == done["unusual"] == {}
    sizes = {Image.open(item["image"]).size for part in after.values() for item in part}
    assert sizes == {(48, 32), (32, 48)}


def test_the_pixels_are_those_of_the_tests_resize_but_for_jpeg(source, tmp_path):
    prepare(source, quality=100, chroma="444")
    for part in ("train/cat/1.JPEG", "val/dog/v.jpg"):
        crop = ResizeCenterCropImage(32, short_side=32)
        whole, small = (crop(LoadNaturalImage()(root / part)) for root in (source, tmp_path / "out"))
        assert (whole.float() - small.float()).abs().mean() < 1


def test_kinds_are_named_counted_and_become_upright_colour(source, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = source / "train" / "cat"
    write(folder / "cmyk.jpg", smooth().convert("CMYK"))
    write(folder / "turned.jpg", exif=exif)
    write(folder / "palette.png", smooth().convert("P"), format="PNG")
    write(folder / "grey.jpg", smooth().convert("L"))
    write(folder / "deep.png", Image.fromarray(np.full((40, 50), 65535, np.uint16)), format="PNG")
    write(folder / "clear.png", smooth().convert("RGBA"), format="PNG")
    write(folder / "really_png.JPEG", format="PNG")
    done = prepare(source)
    kinds = ("CMYK", "turned by EXIF", "palette", "grey", "16-bit", "transparent", "PNG named as JPEG")
    assert done["unusual"] == dict.fromkeys(kinds, 1)
    rows = list(csv.DictReader(Path(done["report"]).read_text().splitlines()))
    assert {"file": "train/cat/cmyk.jpg", "what": "CMYK", "more": ""} in rows
    assert len(rows) == 7
    for file in (tmp_path / "out" / "train" / "cat").iterdir():
        with Image.open(file) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert "exif" not in image.info
    assert Image.open(tmp_path / "out/train/cat/turned.jpg").size == (32, 48)
    assert (tmp_path / "out/train/cat/palette.png.jpg").is_file()


BAD = {
    "cut.jpg": ("damaged or cut short", lambda data: data[: len(data) // 2]),
    "empty.jpg": ("empty", lambda data: b""),
    "page.jpg": ("not an image", lambda data: b"<html>not found</html>"),
}


def spoil(source):
    whole = (source / "train/cat/0.JPEG").read_bytes()
    for name, (_, change) in BAD.items():
        (source / "train/cat" / name).write_bytes(change(whole))


def test_bad_pictures_stop_or_are_left_out_named_and_counted(source, tmp_path):
    spoil(source)
    with pytest.raises(ValueError, match=r"train/cat/cut\.jpg: it is damaged or cut short"):
        prepare(source)
    done = prepare(source, on_error="skip")
    assert done["left_out"] == {what: 1 for what, _ in BAD.values()}
    assert done["training_images"] == 6
    rows = {row["file"]: row for row in csv.DictReader(Path(done["report"]).read_text().splitlines())}
    for name, (what, _) in BAD.items():
        assert rows[f"train/cat/{name}"]["what"] == f"left out: {what}"
        assert name in rows[f"train/cat/{name}"]["more"]
    with pytest.raises(ValueError, match=r"cut\.jpg"):  # a second run does not hide the faults
        prepare(source)
    assert prepare(source, on_error="skip") == done


def test_a_small_plain_jpeg_is_kept_byte_for_byte(source, tmp_path):
    write(source / "train/cat/small.jpg", smooth(20, 30))
    done = prepare(source)
    assert (tmp_path / "out/train/cat/small.jpg").read_bytes() == (source / "train/cat/small.jpg").read_bytes()
    assert done["kept_as_they_are"] == 1


def test_flat_validation_images_keep_their_list_for_the_new_names(source, tmp_path):
    for folder in ("cat", "dog"):
        (source / "val" / folder / "v.jpg").unlink()
        (source / "val" / folder).rmdir()
    write(source / "val/one.png", format="PNG")
    write(source / "val/two.JPEG")
    (source / "val/bad.jpg").write_bytes(b"no")
    (source / "meta").mkdir()
    (source / "meta/val.txt").write_text("two.JPEG 1\nbad.jpg 0\none.png 0\n")
    prepare(source, on_error="skip")
    found = find_images(tmp_path / "out")["val"]
    assert relative(found, tmp_path / "out") == [("val/two.JPEG", 1), ("val/one.png.jpg", 0)]


def written(root):
    return {file: file.stat().st_ino for file in root.rglob(JPEG)}


def test_a_second_run_writes_nothing_and_gives_the_same_result(source, tmp_path):
    first = prepare(source)
    files = written(tmp_path / "out")
    assert prepare(source) == first
    assert written(tmp_path / "out") == files


@pytest.mark.parametrize("changed", ["source", "out"])
def test_a_picture_whose_content_changed_is_made_again_whatever_its_time_and_size_say(source, tmp_path, changed):
    first, files = prepare(source), contents(tmp_path / "out", JPEG)
    file = tmp_path / changed / "train/cat/0.JPEG"
    data, stamp = file.read_bytes(), file.stat().st_mtime_ns
    other = (source / "train/cat/1.JPEG").read_bytes() if changed == "source" else bytes(len(data))
    file.write_bytes((other + bytes(len(data)))[: len(data)])
    os.utime(file, ns=(stamp, stamp))
    if changed == "out":
        assert prepare(source) == first
        assert contents(tmp_path / "out", JPEG) == files
    else:
        assert prepare(source, on_error="skip") != first or contents(tmp_path / "out", JPEG) != files


def test_a_data_set_that_was_copied_is_not_written_again(source, tmp_path):
    prepare(source)
    files = written(tmp_path / "out")
    shutil.copytree(source, tmp_path / "copy")
    shutil.rmtree(source)
    shutil.copytree(tmp_path / "copy", source)  # other times of change, the same content
    prepare(source)
    assert written(tmp_path / "out") == files


def test_what_is_no_picture_is_counted_and_named_and_linked_folders_are_prepared_as_they_are_listed(source, tmp_path):
    write(source / "train/cat/a.jfif")
    write(source / "train/cat/b.avif", format="AVIF")
    write(source / "train/cat/@eaDir/0.JPEG/SYNOPHOTO_THUMB_M.jpg")
    write(tmp_path / "elsewhere/x.jpg")
    (source / "train/cat/notes.txt").touch()
    (source / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (source / "train/cat/self").symlink_to(".")
    done = prepare(source)
    assert done["left_out"] == {"@eaDir": 1, ".txt": 1, "linked again": 1}
    rows = {row["file"]: row["what"] for row in csv.DictReader(Path(done["report"]).read_text().splitlines())}
    assert rows["train/cat/@eaDir"] == "left out: @eaDir"
    assert done["training_images"] == 9 == len(find_images(source)["train"])
    names = {Path(item["image"]).name for item in find_images(tmp_path / "out")["train"]}
    assert {"a.jfif", "b.avif.jpg", "x.jpg"} < names
    (source / "train/cat/dogs").symlink_to("../dog")
    with pytest.raises(ValueError, match="are one by a link, but in two classes"):
        prepare(source)


def test_a_damaged_jpeg_is_written_anew_from_what_can_be_read_where_that_is_asked_for(source, tmp_path):
    file = source / "train/cat/0.JPEG"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 3 // 4] + data[-2:])
    with pytest.raises(ValueError, match=r"0\.JPEG: it is damaged or cut short"):
        prepare(source)
    with pytest.raises(ValueError, match="decode 'strict', not 'lenient'"):
        prepare(source, decode="lenient")
    prepare_images(str(source), str(tmp_path / "lenient"), decode="lenient", workers=1)
    assert len(find_images(tmp_path / "lenient")["train"]) == 6


def test_a_picture_that_was_cut_short_or_lost_is_made_again_and_the_others_stay(source, tmp_path):
    first = prepare(source)
    files = written(tmp_path / "out")
    cut, lost = tmp_path / "out/train/cat/0.JPEG", tmp_path / "out/val/cat/v.jpg"
    stamp = cut.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-200])
    os.utime(cut, ns=(stamp, stamp))
    lost.unlink()
    record = next((tmp_path / "out").rglob(".vdt_records/**/*.json"))
    halves = [cut.with_name(".0.JPEG.abc123"), record.with_name(".a.part"), tmp_path / "out" / ".b.part"]
    for half in halves:
        half.write_bytes(b"what a killed write leaves")
    assert prepare(source) == first
    assert not any(half.exists() for half in halves)
    again = written(tmp_path / "out")
    assert again.keys() == files.keys()
    assert again.pop(cut) != files.pop(cut)
    del again[lost], files[lost]
    assert again == files


def test_what_changed_in_the_source_is_made_again_and_what_is_gone_goes(source, tmp_path):
    prepare(source)
    changed = write(source / "train/cat/0.JPEG", smooth(80, 80))
    os.utime(changed, ns=(10**18, 10**18))
    (source / "train/dog/2.JPEG").unlink()
    write(source / "train/dog/9.jpg")
    done = prepare(source)
    assert Image.open(tmp_path / "out/train/cat/0.JPEG").size == (32, 32)
    assert sorted(os.listdir(tmp_path / "out/train/dog")) == ["0.JPEG", "1.JPEG", "9.jpg"]
    assert done["training_images"] == 6


@pytest.mark.parametrize(("share", "workers"), [(2, 1), (1024, 2)], ids=["small shares", "two processes"])
def test_however_the_work_is_shared_out_the_files_are_the_same(source, tmp_path, monkeypatch, share, workers):
    whole = prepare(source)
    monkeypatch.setattr(images, "SHARE", share)
    prepare_images(str(source), str(tmp_path / "parts"), short_side=32, workers=workers)
    assert len(list((tmp_path / "parts").rglob(".vdt_records/**/*.json"))) == (6 if share == 2 else 4)
    assert contents(tmp_path / "parts", JPEG) == contents(tmp_path / "out", JPEG)
    assert whole["written_anew"] == 8


def test_other_settings_and_other_peoples_folders_are_refused(source, tmp_path):
    prepare(source)
    with pytest.raises(ValueError, match="short_side 32, not 40"):
        prepare(source, short_side=40)
    with pytest.raises(FileExistsError, match="files that are not from this script"):
        prepare_images(str(source), str(tmp_path), workers=1)
    with pytest.raises(ValueError, match="lies inside the images"):
        prepare_images(str(source), str(source / "out"))
    write(tmp_path / "out/train/owl/0.jpg")
    with pytest.raises(ValueError, match="owl: a folder of images that the source does not have"):
        prepare(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 4}, "short_side must be 8 pixels or more, got 4"),
        ({"quality": 0}, "quality must be 1 to 100, got 0"),
        ({"chroma": 411}, "chroma must be '420', '422' or '444', got '411'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_impossible_settings_are_refused_by_name(source, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, **options)


def test_two_pictures_of_one_name_are_refused(source):
    write(source / "train/cat/a.png", format="PNG")
    write(source / "train/cat/a.png.jpg")
    with pytest.raises(ValueError, match=r"a\.png\.jpg: two pictures would get this name"):
        prepare(source)


def test_a_loaded_image_stays_as_it_is_while_others_are_loaded():
    stream = [io.BytesIO() for _ in range(3)]
    for i, s in enumerate(stream):
        smooth(seed=i).save(s, "JPEG")
    load, fresh = LoadNaturalImage(), [LoadNaturalImage()(s.getvalue()) for s in stream]
    first = load(stream[0].getvalue())
    row = first[:, 3]
    held = [load(s.getvalue()) for s in stream]
    for image, expected in zip(held, fresh, strict=True):
        assert torch.equal(image, expected)
    del held, image, first
    load(stream[1].getvalue())
    assert torch.equal(row, fresh[0][:, 3])  # and a view keeps its image
