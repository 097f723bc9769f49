"""From picture files to uint8 arrays, the same way in training, evaluation and prediction."""

import io
import os

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from imgcls.errors import BadExampleError, printable

# Nothing else is ever opened: Pillow would hand an EPS file to Ghostscript, for one.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Checked when only the header has been read; 100 megapixels are 300 MB when decoded.
MAX_PIXELS = 100_000_000
# What shows through transparent pixels, whatever colour is hidden in them: white, as on a page.
BACKGROUND = (255, 255, 255, 255)
# Part of every fingerprint: another decoder may give other pixels.
DECODER = f"Pillow {PIL.__version__}"


def decode_image(
    source: str | os.PathLike[str] | bytes, *, channels: int, name: str = "an image"
) -> np.ndarray:
    """Decodes a picture of one of `FORMATS` (a GIF's first frame), whatever its file is called.

    EXIF orientation is applied; transparency is composited on `BACKGROUND`; 16-bit gray is scaled
    to 8 bits; colour becomes gray by ITU-R 601 luma (0.299 R + 0.587 G + 0.114 B).

    Args:
        source: a path, or the content of a file.
        channels: 1 (gray) or 3 (RGB).
        name: what an error calls a picture that has no path.

    Returns:
        uint8[h, w, channels], not writeable.

    Raises:
        BadExampleError: no such picture, damaged, unreadable, or of more than `MAX_PIXELS`.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise Image.DecompressionBombError(f"{size} is over {MAX_PIXELS:,} pixels")
            return _to_array(image, channels)
    except Exception as error:  # on damaged files Pillow raises nearly every type there is
        where = printable(name if isinstance(source, bytes) else source)
        raise BadExampleError(f"{where}: {_reason(error, source)}") from error


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    image.load()  # not in the try: damaged pixels are an error
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)  # which copies an upright one
    except Exception:  # an unreadable EXIF block counts as none, as it does in browsers
        pass
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's convert() would clip to white
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(below, image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], channels)


def _reason(error: Exception, source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = not (source if isinstance(source, bytes) else os.path.getsize(source))
        return "the file is empty" if empty else "not a JPEG, PNG, WebP, BMP or GIF image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def fit_image(image: np.ndarray, *, image_size: tuple[int, int], resize: str) -> np.ndarray:
    """Resizes uint8[h, w, c], with c of 1 or 3, to uint8[*image_size, c].

    An image of that size is returned as it is. "squash" keeps the whole image, whatever its
    proportions; "crop" takes the largest centred part with those of `image_size`.
    """
    channels = image.shape[2]
    if image.shape[:2] == tuple(image_size):
        return image
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    fit = ImageOps.fit if resize == "crop" else Image.Image.resize
    # Pillow's BILINEAR widens when shrinking, so that nothing aliases. LANCZOS overshoots at edges.
    picture = fit(picture, (image_size[1], image_size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(*image_size, channels)
