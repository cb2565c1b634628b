import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from vdt_transforms import ImageDecodeError, LoadNaturalImage, RandResizedCropImage, ResizeCenterCropImage

ORIENTATION = 0x0112
ROWS, COLUMNS = 20, 40


def picture(rows=ROWS, columns=COLUMNS, seed=0):
    """A smooth picture of faint colours, (rows, columns, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = (rng.integers(30, 200, (4, 6, 1)) + rng.integers(-20, 20, (4, 6, 3))).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((columns, rows), Image.Resampling.BICUBIC))


def encoded(image, kind, **options):
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def with_orientation(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


@pytest.fixture
def load():
    return LoadNaturalImage()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_rows_come_before_columns_and_red_comes_first(load, kind):
    image = np.zeros((ROWS, COLUMNS, 3), np.uint8)
    image[:, : COLUMNS // 2, 0] = 255  # the left half is red
    loaded = load(encoded(image, kind))
    assert loaded.shape == (3, ROWS, COLUMNS)
    assert loaded.dtype == torch.uint8
    assert loaded[0, :, :10].min() > 200
    assert loaded[0, :, 30:].max() < 50
    assert loaded[1:].max() < 50


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_jpeg_pixels_are_those_of_pillow_but_for_the_chroma_between_samples(load, options):
    full, half = (encoded(picture(61, 83), "JPEG", subsampling=value, **options) for value in ("4:4:4", "4:2:0"))
    # Not equal: versions of libjpeg-turbo round differently.
    assert (load(full).float() - by_pillow(full).float()).abs().mean() <= 0.1
    assert (load(half).float() - by_pillow(half).float()).abs().mean() <= 2


@pytest.mark.parametrize("name", ["a.JPEG", "a.png"])
def test_a_path_and_its_bytes_give_the_same_image_whatever_the_extension_says(load, tmp_path, name):
    data = encoded(picture(), "PNG")
    file = tmp_path / name
    file.write_bytes(data)
    assert torch.equal(load(file), load(data))
    assert torch.equal(load(str(file)), by_pillow(data))


def test_the_first_picture_of_an_mpo_is_taken(load):
    first, second = Image.fromarray(picture(seed=1)), Image.fromarray(picture(seed=2))
    data = encoded(first, "MPO", save_all=True, append_images=[second], subsampling="4:4:4")
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert torch.equal(load(data), by_pillow(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_is_repeated_for_the_three_colours(load, kind):
    data = encoded(picture()[..., 0], kind)
    loaded = load(data)
    assert torch.equal(loaded, loaded[:1].expand(3, -1, -1))
    assert torch.equal(loaded, by_pillow(data))


def test_without_colours_an_image_is_its_brightness_thrice(load):
    data = encoded(picture(), "PNG")
    loaded = LoadNaturalImage(grey=True)(data)
    assert torch.equal(loaded, torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("L"))).expand(3, -1, -1))
    assert not torch.equal(loaded, load(data))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(load, kind):
    grey = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    assert load(encoded(grey, kind))[0].tolist() == [[0, 0, 1, 1, 255]]


def test_black_and_white_becomes_0_and_255(load):
    assert load(encoded(np.array([[True, False]]), "PNG"))[:, 0].tolist() == [[255, 0]] * 3


def test_transparent_pixels_are_laid_over_white(load):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    assert load(encoded(rgba, "PNG"))[:, 0].tolist() == [[255, 127, 0]] * 3
    assert load(encoded(Image.fromarray(rgba).convert("LA"), "PNG"))[:, 0].tolist() == [[255, 127, 0]] * 3


def test_a_palette_is_looked_up_and_its_transparent_colour_is_white(load):
    image = Image.new("P", (3, 1))
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert load(encoded(image, "PNG"))[:, 0].tolist() == [[10, 40, 70], [20, 50, 80], [30, 60, 90]]
    transparent = load(encoded(image, "PNG", transparency=1))
    assert transparent[:, 0].tolist() == [[10, 255, 70], [20, 255, 80], [30, 255, 90]]


def test_cmyk_is_converted_as_by_pillow(load):
    data = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG")  # Adobe's inverted kind
    assert torch.equal(load(data), by_pillow(data))
    assert (load(data).float() - torch.from_numpy(picture()).permute(2, 0, 1)).abs().mean() < 10
    transform = data.index(b"Adobe") + 11  # byte of the marker: 0 is CMYK, 2 is YCCK, as Photoshop writes it
    ycck = data[:transform] + b"\x02" + data[transform + 1 :]
    assert torch.equal(load(ycck), by_pillow(ycck))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(load, kind, orientation):
    upright = torch.from_numpy(picture()).permute(2, 0, 1)
    stored = {  # what a camera held that way writes
        1: upright,
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.transpose(1, 2),
        6: upright.rot90(1, (1, 2)),
        7: upright.transpose(1, 2).flip(1, 2),
        8: upright.rot90(-1, (1, 2)),
    }[orientation]
    options = {"quality": 95} if kind != "WEBP" else {"lossless": True}
    data = encoded(stored.permute(1, 2, 0).numpy(), kind, exif=with_orientation(orientation), **options)
    loaded = load(data)
    assert loaded.shape == (3, ROWS, COLUMNS)
    assert (loaded.float() - upright.float()).abs().mean() < 6


def test_an_exif_block_that_cannot_be_read_does_no_harm(load):
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0nothing of use", subsampling="4:4:4")
    assert torch.equal(load(data), by_pillow(data))


def damaged(kind, way, **options):
    """A picture whose file was damaged in its data, with the whole file."""
    image = Image.fromarray(picture(120, 160))
    whole = encoded(image.convert("CMYK") if options.pop("cmyk", False) else image, kind, **options)
    start, end = whole.rindex(b"\xff\xda") + 14 if kind == "JPEG" else whole.index(b"IDAT"), len(whole) - 2
    middle = (start + end) // 2
    return whole, {
        "cut and ended": whole[:middle] + b"\xff\xd9",
        "hole": whole[:middle] + bytes(len(whole) // 5) + whole[middle + len(whole) // 5 :],
        "stray bytes": whole[:end] + bytes(3) + whole[end:],
        "checksum of pixels": whole[:-16] + bytes([whole[-16] ^ 1]) + whole[-15:],  # the last byte of IDAT's
    }[way]


@pytest.mark.parametrize(
    ("kind", "way", "options"),
    [
        *(("JPEG", way, {}) for way in ("cut and ended", "hole", "stray bytes")),
        *(("JPEG", "cut and ended", more) for more in ({"cmyk": True}, {"exif": with_orientation(6)})),
        ("JPEG", "hole", {"progressive": True}),
        ("PNG", "checksum of pixels", {}),
    ],
)
def test_what_the_decoder_warns_of_is_refused_unless_it_may_be_lenient(load, tmp_path, kind, way, options):
    whole, content = damaged(kind, way, **options)
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(ImageDecodeError, match=r"a\.jpg: it is damaged or cut short \(.*\); .*decode 'lenient'"):
        load(file)
    assert LoadNaturalImage(decode="lenient")(file).shape == load(whole).shape


def test_a_turned_jpeg_has_the_pixels_of_the_same_jpeg_without_its_orientation(load):
    upright, turned = (encoded(picture(), "JPEG", exif=with_orientation(value)) for value in (1, 6))
    assert torch.equal(load(turned), load(upright).rot90(-1, (1, 2)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.9])
def test_a_file_that_is_cut_short_is_refused(load, tmp_path, kind, part):
    data = encoded(picture(120, 160), kind)
    file = tmp_path / "half.jpg"
    file.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ImageDecodeError, match=r"half\.jpg: it is damaged or cut short"):
        load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"<html>not found</html>", "no picture format that Pillow knows", id="text"),
        pytest.param(None, "No such file", id="missing"),
        pytest.param(encoded(np.zeros((2, 2), np.float32), "TIFF"), "floating point", id="float"),
        pytest.param(encoded(np.full((2, 2), 70000, np.int32), "TIFF"), "70000..70000", id="32-bit"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_name_of_the_file(load, tmp_path, content, message):
    file = tmp_path / "a.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ImageDecodeError, match=rf"a\.jpg: .*{message}") as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_an_absurdly_large_picture_is_refused(load, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", ROWS * COLUMNS // 3)
    with pytest.raises(ImageDecodeError, match="MAX_IMAGE_PIXELS"):
        load(encoded(picture(), "JPEG"))


def random_crop(seed=0, **options):
    crop = RandResizedCropImage(16, **options)
    crop.set_random_state(seed)
    return crop


@pytest.fixture
def image():
    return torch.from_numpy(picture(60, 90)).permute(2, 0, 1)


def test_the_crop_is_pillows_bilinear_resize_of_its_box(image):
    crop = random_crop(flip_prob=0.0)
    for _ in range(20):
        got = crop(image)
        top, left, height, width = crop.box
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        expected = np.asarray(pillow.resize((16, 16), Image.Resampling.BILINEAR))
        assert np.abs(got.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (64, 64), (10, 200), (200, 10), (1, 1)])
def test_boxes_are_drawn_as_torchvision_draws_them(size):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    ours, theirs = [], []
    crop = random_crop()
    torch.manual_seed(0)
    for _ in range(1000):
        crop.randomize(image)
        ours.append(crop.box)
        theirs.append(RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]))
    for top, left, height, width in ours:
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
    assert np.allclose(np.mean(ours, axis=0), np.mean(theirs, axis=0), atol=0.04 * max(size))
    assert np.allclose(np.std(ours, axis=0), np.std(theirs, axis=0), atol=0.04 * max(size))


@pytest.mark.parametrize("size", [(10, 200), (200, 10)])
def test_without_a_box_that_fits_the_largest_central_one_is_taken(size):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    crop = random_crop(area=(1.0, 1.0))
    crop.randomize(image)
    assert crop.box == RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])


def test_area_and_aspect_keep_their_limits():
    image = torch.zeros(1, 1000, 1000, dtype=torch.uint8)
    crop = random_crop(area=(0.2, 0.4), aspect=(0.5, 2.0))
    for _ in range(200):
        crop.randomize(image)
        _, _, height, width = crop.box
        assert 0.199 <= height * width / 1e6 <= 0.401
        assert math.log(0.498) <= math.log(width / height) <= math.log(2.01)


def test_the_flip_mirrors_left_and_right_and_twice_is_identity(image):
    plain, flipped = random_crop(flip_prob=0.0)(image), random_crop(flip_prob=1.0)(image)
    assert torch.equal(flipped.flip(2), plain)
    assert not torch.equal(flipped, plain)


def test_half_of_the_crops_are_flipped(image):
    crop = random_crop()
    assert 150 < sum(crop.flip for _ in range(400) if crop.randomize(image) is None) < 250


@pytest.mark.parametrize("size", [(60, 90), (91, 60), (33, 33), (17, 100)])
def test_the_centre_crop_is_that_of_torchvision(size):
    image = picture(*size)
    expected = np.asarray(CenterCrop(24)(Resize(27)(Image.fromarray(image)))).transpose(2, 0, 1)
    got = ResizeCenterCropImage(24, short_side=27)(image.transpose(2, 0, 1))
    assert np.abs(got.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandResizedCropImage(8, area=(0.5, 0.2)), "area"),
        (lambda: RandResizedCropImage(8, area=(0.5, 2.0)), "area"),
        (lambda: RandResizedCropImage(8, aspect=(0.0, 1.0)), "aspect"),
        (lambda: LoadNaturalImage(decode="loose"), "decode must be 'strict' or 'lenient', got 'loose'"),
        (lambda: ResizeCenterCropImage(8, short_side=7), "short_side must be at least size"),
    ],
)
def test_impossible_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
