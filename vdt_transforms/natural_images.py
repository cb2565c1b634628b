"""Natural images: any picture file to RGB, and the crops of ImageNet training and testing.

Images are uint8 tensors (channels, rows, columns). Nothing here makes a `MetaTensor`: a picture has no affine, and at
a few hundred images a second the bookkeeping would cost more than the crop.
"""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from monai.transforms import RandomizableTransform, Transform
from PIL import Image, ImageOps
from torch import Tensor

from vdt_transforms.dictionary import ArrayPerKey, RandArrayPerKey

JPEG_START = b"\xff\xd8"
PLAIN_COLOURS = ("Gray", "RGB", "YCbCr")  # of a JPEG; simplejpeg does not convert the others
ORIENTATION = 0x0112  # EXIF tag


class ImageDecodeError(ValueError):
    """A file that is not a whole, readable picture; the message names the file and says what to do."""


class LoadNaturalImage(Transform):
    """Read a picture file as RGB. path or bytes -> uint8 (3, H, W).

    The content decides, never the extension. Each kind has one rule:

    - 8-bit grey or colour JPEG (the first picture of an MPO): libjpeg-turbo by simplejpeg, half-size chroma repeated
      rather than interpolated (a mean difference from Pillow of about 0.4 of 255)
    - grey: repeated for the three colours; 16-bit grey: divided by 257 and rounded, so that 65535 is 255
    - palette: looked up; transparency: laid over white
    - CMYK (Adobe's inverted kind too), YCbCr, 16-bit colour: Pillow's conversion
    - animation: the first frame

    An EXIF orientation is applied, whatever the format.

    Args:
        grey: take the colours out: all three are the brightness, 0.299 red + 0.587 green + 0.114 blue, rounded.
        decode: "strict" refuses a JPEG that libjpeg warns of (data missing, corrupt or left over) and a PNG whose
            checksums differ; "lenient" takes what the decoder makes of them, with grey or wrong parts. JPEG has no
            checksum, so that a few changed bits may look like another picture to any decoder.

    Raises:
        ImageDecodeError: if the file is missing, empty, damaged, cut short, not a picture, too large to be one
            (`PIL.Image.MAX_IMAGE_PIXELS`), or holds values with no defined range (float, 32-bit integers above 65535).
        ValueError: if `decode` is neither "strict" nor "lenient".
    """

    def __init__(self, grey: bool = False, decode: str = "strict") -> None:
        if decode not in ("strict", "lenient"):
            raise ValueError(f"decode must be 'strict' or 'lenient', got {decode!r}")
        self.grey = grey
        self.strict = decode == "strict"

    def __call__(self, file: str | Path | bytes) -> Tensor:
        """Read `file`."""
        try:
            data = file if isinstance(file, bytes) else Path(file).read_bytes()
            if not data:
                raise ImageDecodeError("it is empty (0 bytes); copy or download it again")
            image = torch.from_numpy(_decode(data, self.strict)).permute(2, 0, 1)
            return _brightness(image).repeat(3, 1, 1) if self.grey else image
        except Exception as error:  # on broken bytes Pillow's readers raise errors of any kind
            name = f"{len(file)} bytes in memory" if isinstance(file, bytes) else str(file)
            raise ImageDecodeError(f"cannot read the image {name}: {_reason(error)}") from error


class LoadNaturalImaged(ArrayPerKey):
    """Dictionary version of `LoadNaturalImage`."""

    array = LoadNaturalImage


def _brightness(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> uint8 (1, H, W), by the integers of Pillow's conversion."""
    red, green, blue = image.int()
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]


def _reason(error: Exception) -> str:
    if isinstance(error, ImageDecodeError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no picture format that Pillow knows; replace or remove it"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error}; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check the path and its permissions"
    return (
        f"it is damaged or cut short ({type(error).__name__}: {error}); copy or download it again, or read what is left"
        " of a JPEG or PNG with decode 'lenient'"
    )


def _decode(data: bytes, strict: bool) -> np.ndarray:
    """Bytes to uint8 (H, W, 3)."""
    if data.startswith(JPEG_START):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=strict)
        if height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow says it of the others
            wanted = "RGB" if colours in PLAIN_COLOURS else "CMYK"
            pixels = simplejpeg.decode_jpeg(data, wanted, fastupsample=True, strict=strict)
            if wanted == "RGB":
                return _upright(pixels, data)
    with Image.open(BytesIO(data)) as image:
        if strict and image.format == "PNG":
            with Image.open(BytesIO(data)) as again:  # Pillow leaves checksums of pixels alone while it decodes
                again.verify()
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(_to_rgb(image))


def _upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Turn the pixels of a JPEG by its EXIF orientation."""
    if b"Exif\0\0" not in data and b"tiff:Orientation" not in data:
        return pixels
    with Image.open(BytesIO(data)) as image:  # reads the header only
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation == 1:
        return pixels
    stored = Image.fromarray(pixels)
    stored.getexif()[ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(stored))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageDecodeError("its pixels are floating point with no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageDecodeError(
                f"its pixels range over {grey.min()}..{grey.max()}, outside 0..65535; save it with 8 or 16 bits"
            )
        return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _as_tensor(image: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(image).as_subclass(Tensor)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear, as Pillow's, and on uint8 several times faster."""
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


class RandResizedCropImage(RandomizableTransform):
    """Crop a random box, resize it to a square and flip it left to right at random. (C, H, W) -> (C, size, size).

    The box is drawn as by torchvision's `RandomResizedCrop`: an area and an aspect ratio, up to ten times until they
    fit; after that the largest central box within `aspect`. The last draw stays readable as `box` (top row, left
    column, height, width) and `flip`. The resize is antialiased bilinear. Metadata of a `MetaTensor` is dropped.

    Args:
        size: rows and columns of the result.
        area: least and greatest part of the image's area that the box covers.
        aspect: least and greatest width / height of the box; drawn uniformly on a logarithmic scale.
        flip_prob: probability of the flip.
    """

    def __init__(
        self,
        size: int,
        *,
        area: tuple[float, float] = (0.08, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip_prob: float = 0.5,
    ) -> None:
        super().__init__(prob=1.0)
        for name, (low, high), limit in (("area", area, 1.0), ("aspect", aspect, math.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"{name} must be two rising numbers above 0 and up to {limit}, got ({low}, {high})")
        self.size, self.area, self.aspect, self.flip_prob = size, area, aspect, flip_prob
        self.box = (0, 0, 0, 0)
        self.flip = False

    def randomize(self, data: Tensor | np.ndarray) -> None:
        """Draw `box` and `flip` for the image `data`."""
        rows, columns = data.shape[-2:]
        self.box = self._draw_box(rows, columns)
        self.flip = bool(self.R.rand() < self.flip_prob)

    def _draw_box(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = rows * columns * self.R.uniform(*self.area)
            aspect = math.exp(self.R.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < height <= rows and 0 < width <= columns:
                return (self.R.randint(rows - height + 1), self.R.randint(columns - width + 1), height, width)
        height = min(rows, round(columns / self.aspect[0]))
        width = min(columns, round(rows * self.aspect[1]))
        return ((rows - height) // 2, (columns - width) // 2, height, width)

    def __call__(self, img: Tensor | np.ndarray, randomize: bool = True) -> Tensor:
        """Crop, resize and flip `img`; `randomize=False` applies the last draw again."""
        if randomize:
            self.randomize(img)
        top, left, height, width = self.box
        crop = resize(_as_tensor(img)[:, top : top + height, left : left + width], self.size, self.size)
        return crop.flip(-1) if self.flip else crop


class RandResizedCropImaged(RandArrayPerKey):
    """Dictionary version of `RandResizedCropImage`: one draw, for the first key's size, serves all keys."""

    array = RandResizedCropImage


class ResizeCenterCropImage(Transform):
    """Resize the short side, then crop the centre. (C, H, W) -> (C, size, size).

    Rounded as by torchvision's `Resize` and `CenterCrop`, so that test accuracies compare. Metadata of a `MetaTensor`
    is dropped.

    Args:
        size: rows and columns of the result.
        short_side: length of the short side before the crop, at least `size`.
    """

    def __init__(self, size: int, *, short_side: int) -> None:
        if short_side < size:
            raise ValueError(f"short_side must be at least size ({size}), got {short_side}")
        self.size, self.short_side = size, short_side

    def __call__(self, img: Tensor | np.ndarray) -> Tensor:
        """Resize and crop `img`."""
        image = _as_tensor(img)
        short = min(image.shape[-2:])
        rows, columns = (self.short_side * side // short for side in image.shape[-2:])
        top, left = (round((side - self.size) / 2) for side in (rows, columns))
        return resize(image, rows, columns)[:, top : top + self.size, left : left + self.size]


class ResizeCenterCropImaged(ArrayPerKey):
    """Dictionary version of `ResizeCenterCropImage`."""

    array = ResizeCenterCropImage
