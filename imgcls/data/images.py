"""From picture files to uint8 arrays, the same way in training, evaluation and prediction."""

import contextlib
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from imgcls.errors import BadExampleError, printable

# Nothing else is ever opened: Pillow would hand an EPS file to Ghostscript, for one.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM"]
NAMES = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF, JPEG 2000 or PNM"
# How the names of pictures end. A phone's MPO and a browser's JFIF are JPEGs.
ENDINGS = "jpg jpeg jpe jif jfif mpo png apng webp bmp dib gif tif tiff avif jp2 j2k j2c jpc jpx"
ENDINGS += " jpf ppm pgm pbm pnm heic heif hif"
MAX_PIXELS = 100_000_000  # checked when only the header has been read
# Larger pictures are halved, and decoded one at a time, because 100 megapixels need up to 1.3 GB.
# One of 25 needs 0.2 GB, or 0.6 GB if it is transparent, in each thread.
LARGE = 25_000_000
MAX_SCANS = 100  # of a JPEG, fewer of a large one: each takes as long as a decoding; usual are 10
# What shows through transparent pixels, whatever colour is hidden in them: white, as on a page.
BACKGROUND = (255, 255, 255, 255)
# Another decoder may give other pixels.
DECODER = f"Pillow {PIL.__version__}, halved above {LARGE}"
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
    DECODER += f", pillow-heif {pillow_heif.__version__}"

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we have our own limit
_large = threading.Lock()
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # of a JPEG, with a length, or its end
_HEIC = re.compile(rb".{4}ftyp.{0,56}he[iv][cmsx]", re.DOTALL)
# Of no pictures. Dots stand within names, too: "Dr. Who", "photo.0001", "photo.jpg!d".
_OTHER = re.compile(
    rf"readme|licen[cs]e|copying|notice|manifest|.*@syno.*|"
    rf".*\.(?!(?:{ENDINGS.replace(' ', '|')})$)(?=\d*[a-z])[a-z\d]{{1,12}}",
    re.DOTALL,
)


def is_picture(name: str) -> bool:
    """Whether a file may be a picture by its name: it ends as pictures do, or has no ending."""
    return not _OTHER.fullmatch(name.lower())


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(width, height) by the header, None where that cannot be read."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return image.size
    return None


def decode_image(
    source: str | os.PathLike[str] | bytes, *, channels: int, name: str = "an image"
) -> np.ndarray:
    """Decodes the first frame of a picture of one of `FORMATS`, whatever its file is called.

    EXIF orientation is applied; transparency is composited on `BACKGROUND`; 16-bit gray is scaled
    to 8 bits; colour becomes gray by ITU-R 601 luma (0.299 R + 0.587 G + 0.114 B).

    Args:
        source: a path, or the content of a file.
        channels: 1 (gray) or 3 (RGB).
        name: what an error calls a picture that has no path.

    Returns:
        uint8[h, w, channels], not writeable; of half the size where there are over `LARGE` pixels.

    Raises:
        BadExampleError: no such picture, damaged, unreadable, of more than `MAX_PIXELS` (a JPEG
            2000: half) or `MAX_SCANS`, or of pixels of 32 bits, whose range is unknown.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
            allowed = MAX_PIXELS // (2 if image.format == "JPEG2000" else 1)  # needs most memory
            if pixels > allowed:
                size = f"{image.width}x{image.height}"
                raise Image.DecompressionBombError(f"{size} is over {allowed:,} pixels")
            if image.format in ("JPEG", "MPO"):
                scans, most = _count_scans(image.fp), min(MAX_SCANS, 15 * MAX_PIXELS // pixels)
                if scans > most:
                    raise ValueError(f"{scans} scans are more than the {most} that are decoded")
            with _large if pixels > LARGE else contextlib.nullcontext():
                return _to_array(image, channels)
    except Exception as error:  # on damaged files Pillow raises nearly every type there is
        where = printable(name if isinstance(source, bytes) else source)
        raise BadExampleError(f"{where}: {_reason(error, source)}") from error


def as_array(image: Any, *, channels: int) -> np.ndarray:
    """uint8[h, w, channels] of one image, which is any that `Classifier` takes, as by decoding."""
    if isinstance(image, str | os.PathLike):
        return decode_image(os.path.expanduser(image), channels=channels)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
            array = np.rint(255 * array).astype(np.uint8)
        right = array.size and array.ndim > 1 and array.shape[2:] in ((), (1,), (3,), (4,))
        if array.dtype != np.uint8 or not right:
            what = "an image must be [h, w] or [h, w, 1, 3 or 4] of uint8 or of floats in [0, 1]"
            raise ValueError(f"{what}, not {array.dtype}{array.shape}")
        image = Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
    return _to_array(image, channels)


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    large = image.width * image.height > LARGE
    if large and image.draft(None, (image.width // 2, image.height // 2)):
        large = False  # a JPEG, which is halved while it is decoded
    image.load()  # not in the try: damaged pixels are an error
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)  # which copies an upright one
    except Exception:  # an unreadable EXIF block counts as none, as it does in browsers
        pass
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow's convert() would clip to white
        gray = np.asarray(image, np.int32)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8 or 16")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    transparent = image.has_transparency_data
    if image.mode != (wanted := "RGBA" if transparent else mode):
        image = image.convert(wanted)  # which would copy one of that mode
    if large:
        image = image.reduce(2)
    if transparent:
        below = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(below, image).convert(mode)
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], channels)


def _count_scans(file: Any) -> int:
    """The passes over a JPEG's pixels. Pictures that it embeds, or that follow it, have others."""
    file.seek(0)
    content, scans, position = file.read(4 * MAX_PIXELS), 0, 2
    while (found := _MARKER.search(content, position)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def _reason(error: Exception, source: str | os.PathLike[str] | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(72)
        if _HEIC.match(head) and "HEIF" not in FORMATS:
            return "a HEIC image: pip install pillow-heif to read it, or save it as JPEG"
        return f"not a {NAMES} image" if head else "the file is empty"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def hash_files(paths: Iterable[str | os.PathLike[str]], *facts: Any) -> str:
    """SHA-256 of facts and of the contents of files. A passing error is an OSError."""

    def content(path: str | os.PathLike[str]) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, PermissionError):
            return "unreadable"

    with ThreadPoolExecutor() as executor:
        return hashlib.sha256(repr((facts, *executor.map(content, paths))).encode()).hexdigest()


def fit_image(image: np.ndarray, *, image_size: tuple[int, int], resize: str) -> np.ndarray:
    """Resizes uint8[h, w, c], with c of 1 or 3, to uint8[*image_size, c].

    An image of that size is returned as it is. "squash" keeps the whole image, whatever its
    proportions; "crop" takes the largest centred part with those of `image_size`. They interpolate
    bilinearly, or with "-bicubic" cubically.
    """
    channels = image.shape[2]
    if image.shape[:2] == tuple(image_size):
        return image
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    fit = ImageOps.fit if resize.startswith("crop") else Image.Image.resize
    # Pillow's filters widen when shrinking, so that nothing aliases. LANCZOS overshoots at edges.
    how = Image.Resampling.BICUBIC if resize.endswith("bicubic") else Image.Resampling.BILINEAR
    picture = fit(picture, (image_size[1], image_size[0]), how)
    return np.asarray(picture).reshape(*image_size, channels)
