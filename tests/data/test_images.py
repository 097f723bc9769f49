import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from imgcls.data import images
from imgcls.data.images import MAX_PIXELS, decode_image, fit_image
from imgcls.errors import BadExampleError, printable

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), np.uint8)
PALETTE_RED = Image.new("RGB", (4, 4), "red").quantize(2)


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    ramp = np.linspace(0, 255, height * width).reshape(height, width, 1)
    return np.repeat(ramp, 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_give_the_pixels_that_were_saved(file_format, options, tmp_path):
    encoded = encode(COLOUR, file_format, **options)
    path = tmp_path / "no extension"
    path.write_bytes(encoded)
    for source in (encoded, path, str(path)):
        image = decode_image(source, channels=3)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, COLOUR)


def test_jpeg_is_close_to_what_was_saved():
    image = decode_image(encode(smooth(16, 16), "JPEG", quality=95), channels=3)
    assert np.abs(image.astype(int) - smooth(16, 16)).max() < 8


def test_one_channel_is_the_luma_of_a_colour_picture():
    gray = decode_image(encode(COLOUR), channels=1)
    np.testing.assert_allclose(gray[..., 0], COLOUR @ [0.299, 0.587, 0.114], atol=1)
    assert gray.shape == (6, 9, 1)


def test_a_gray_picture_has_three_equal_channels():
    image = decode_image(encode(COLOUR[..., 0]), channels=3)
    np.testing.assert_array_equal(image, np.repeat(COLOUR[..., :1], 3, axis=-1))
    np.testing.assert_array_equal(decode_image(encode(COLOUR[..., 0]), channels=1), image[..., :1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP"])
def test_palette_pictures_have_their_colours(file_format, channels):
    palette = Image.fromarray(COLOUR).quantize(16)
    image = decode_image(encode(palette, file_format), channels=channels)
    expected = np.asarray(palette.convert("RGB").convert("L" if channels == 1 else "RGB"))
    np.testing.assert_array_equal(image, expected.reshape(6, 9, channels))


def test_bilevel_pictures_are_black_and_white():
    bits = RNG.random((6, 9)) < 0.5
    image = decode_image(encode(Image.fromarray(bits)), channels=1)
    np.testing.assert_array_equal(image[..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "encoded",
    [
        encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True),
        encode(Image.new("LA", (4, 4), (9, 0))),
        encode(Image.new("L", (4, 4), 9), transparency=9),
        encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        encode(PALETTE_RED, transparency=0),
        encode(PALETTE_RED, "GIF", transparency=0),
    ],
    ids=["RGBA", "WebP", "LA", "L key", "RGB key", "P key", "GIF"],
)
def test_transparent_pixels_are_white_whatever_colour_they_hide(encoded, channels):
    assert (decode_image(encoded, channels=channels) == 255).all()


def test_half_transparent_pixels_are_mixed_with_white():
    image = decode_image(encode(Image.new("RGBA", (2, 2), (255, 0, 100, 128))), channels=3)
    np.testing.assert_allclose(image[0, 0], [255, 127, 177], atol=1)


def test_sixteen_bit_gray_is_scaled_to_eight():
    values = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
    for channels in (1, 3):
        image = decode_image(encode(values), channels=channels)
        np.testing.assert_array_equal(image[..., 0], np.round(values / 257))
        assert image.shape == (6, 9, channels)


def test_cmyk_is_converted():
    red = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in red  # whose JPEGs store the complement
    np.testing.assert_allclose(
        decode_image(red, channels=3), np.full((8, 8, 3), [255, 0, 0]), atol=2
    )


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(file_format):
    upright = smooth(16, 32)
    stored = {  # what a camera stores so that the orientation gives `upright`
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"quality": 100} if file_format == "JPEG" else {}
        options |= {"lossless": True} if file_format == "WEBP" else {}
        encoded = encode(np.ascontiguousarray(pixels), file_format, exif=exif, **options)
        image = decode_image(encoded, channels=3)
        assert image.shape == upright.shape
        assert np.abs(image.astype(int) - upright).max() <= 3, orientation


def test_an_unreadable_exif_block_counts_as_none():
    encoded = encode(COLOUR, exif=b"Exif\0\0 no TIFF header")
    np.testing.assert_array_equal(decode_image(encoded, channels=3), COLOUR)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(file_format):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("black", "white")]
    options = {"save_all": True, "append_images": frames[1:]}
    image = decode_image(encode(frames[0], file_format, **options), channels=3)
    assert image.shape == (5, 5, 3)
    assert image.max() == 0


@pytest.mark.parametrize("file_format", images.FORMATS[:9])
def test_truncated_pictures_are_refused(file_format, tmp_path):
    encoded = encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), file_format)
    for part in (0.1, 0.5, 0.9):
        path = tmp_path / "damaged"
        path.write_bytes(encoded[: int(part * len(encoded))])
        with pytest.raises(BadExampleError, match="damaged"):
            decode_image(path, channels=3)


@pytest.mark.parametrize("file_format", images.FORMATS[:9])
def test_damaged_pictures_give_pixels_or_the_documented_error(file_format):
    encoded = np.frombuffer(encode(smooth(24, 24), file_format), np.uint8)
    for _ in range(60):
        damaged = encoded.copy()
        places = RNG.integers(0, len(damaged), 4)
        damaged[places] = RNG.integers(0, 256, 4)
        try:
            image = decode_image(damaged.tobytes(), channels=3)
            assert image.dtype == np.uint8 and image.shape[-1] == 3
        except BadExampleError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        ("JPEG2000", {}),
        ("PPM", {}),
        ("MPO", {"quality": 100, "save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
    ],
)
def test_pictures_of_scanners_phones_and_browsers_are_read(file_format, options, channels):
    pixels = smooth(16, 32)
    image = decode_image(encode(pixels, file_format, **options), channels=channels)
    expected = np.asarray(Image.fromarray(pixels).convert("L" if channels == 1 else "RGB"))
    np.testing.assert_allclose(image, expected.reshape(16, 32, channels), atol=6)


@pytest.mark.parametrize("file_format", ["TIFF", "AVIF"])
def test_orientation_is_applied_once_where_the_decoder_knows_it_too(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = smooth(16, 32)
    image = decode_image(encode(pixels, file_format, exif=exif), channels=3)
    np.testing.assert_allclose(image, np.rot90(pixels, -1), atol=12)


@pytest.mark.parametrize(
    "pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)]
)
def test_pixels_of_unknown_range_are_refused(pixels):
    with pytest.raises(BadExampleError, match="save it with 8"):
        decode_image(encode(pixels, "TIFF"), channels=1)


@pytest.mark.skipif("HEIF" in images.FORMATS, reason="pillow-heif is installed")
@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heix"])
def test_a_heic_picture_is_named_with_the_remedy(brands, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\0\0\0\x18ftyp" + brands + bytes(100))
    with pytest.raises(BadExampleError, match="HEIC.*pip install pillow-heif"):
        decode_image(path, channels=3)


def test_names_tell_what_is_no_picture():
    pictures = "a.jpg a.JPEG a.jfif a.mpo a.TIF a.avif a.jp2 a.heic a photo.0001 a.jpg!d 图.像"
    pictures += " a.jif a.jpf a.j2c"
    others = "a.json a.jpg.xml a.TXT a.csv a.md a.mp4 a.h5 a.7z a.npy a.pdf README LICENSE a.svg"
    assert all(map(images.is_picture, [*pictures.split(), "Dr. Who", "x.jpeg_large"]))
    others += " a.jpg:Zone.Identifier a.jpg@SynoEAStream"
    assert not any(map(images.is_picture, others.split()))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"a text", "not a JPEG"),
        (b"<!DOCTYPE html><html></html>", "not a JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG"),
        (b"%PDF-1.7\n", "not a JPEG"),
        (encode(COLOUR, "TGA"), "not a JPEG"),
        (encode(COLOUR, "ICO"), "not a JPEG"),
    ],
)
def test_what_is_no_picture_of_the_listed_formats_is_refused(content, reason, tmp_path):
    path = tmp_path / "pretends.jpg"
    path.write_bytes(content)
    for source, where in ((path, "pretends.jpg"), (content, "record 7")):
        with pytest.raises(BadExampleError, match=f"{where}: .*{reason}") as caught:
            decode_image(source, channels=3, name="record 7")
        assert caught.value.exit_code == 2


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [10_001, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(width, monkeypatch):
    height = 10_000
    assert height * 10_000 == MAX_PIXELS
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    small = encode(np.zeros((1, 1), np.uint8))
    bomb = small[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + small[33:]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadExampleError, match="pixels"):
        decode_image(bomb, channels=1)


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded(monkeypatch):
    """Each takes as long as a decoding."""
    progressive = encode(smooth(64, 64), "JPEG", progressive=True)
    assert decode_image(progressive, channels=3).shape == (64, 64, 3)
    last = progressive.rindex(b"\xff\xda")
    many = progressive[:-2] + 200 * progressive[last:-2] + progressive[-2:]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadExampleError, match="210 scans are more than the 100"):
        decode_image(many, channels=3)


def test_what_a_jpeg_embeds_and_what_follows_it_are_no_scans_of_it():
    scans = 500 * b"\xff\xda\0\2"
    embedding = encode(smooth(64, 64), "JPEG", comment=scans)
    assert scans in embedding
    for content in (embedding, encode(smooth(64, 64), "JPEG", progressive=True) + scans):
        assert decode_image(content, channels=3).shape == (64, 64, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG", "transparent", "palette", "16 bits"])
def test_a_large_picture_is_halved_whatever_it_is(kind, channels, monkeypatch):
    pixels = np.repeat(smooth(8, 15).repeat(2, 0).repeat(2, 1)[..., :1], 3, axis=-1)
    picture = Image.fromarray(pixels)
    encoded = {
        "transparent": lambda: encode(picture.convert("RGBA")),
        "palette": lambda: encode(picture.convert("L").convert("P")),
        "16 bits": lambda: encode(pixels[..., 0].astype(np.uint16) * 257),
    }.get(kind, lambda: encode(picture, kind, **({"quality": 100} if kind == "JPEG" else {})))()
    assert decode_image(encoded, channels=channels).shape == (16, 30, channels)
    monkeypatch.setattr(images, "LARGE", 100)
    halved = decode_image(encoded, channels=channels)
    expected = np.repeat(pixels[::2, ::2, :1], channels, axis=-1)
    np.testing.assert_allclose(halved, expected, atol=0 if kind != "JPEG" else 30)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    active, most, load = [], [], ImageFile.ImageFile.load

    def slow_load(self):
        active.append(1)
        most.append(len(active))
        time.sleep(0.02)
        active.pop()
        return load(self)

    encoded = encode(smooth(16, 16))
    monkeypatch.setattr(ImageFile.ImageFile, "load", slow_load)
    for limit, together in ((1000, True), (100, False)):
        monkeypatch.setattr(images, "LARGE", limit)
        most.clear()
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(lambda _: decode_image(encoded, channels=3), range(8)))
        assert (max(most) > 1) == together


def test_missing_and_unreadable_paths_are_named(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(BadExampleError, match=str(path)):
            decode_image(path, channels=3)


def test_printable_is_injective_and_one_printable_line():
    hostile = ["a\nb", "a\\nb", "\udcff", "\\udcff", "\x1b[31mred", "\u202egnp", "naïve 图.png"]
    shown = [printable(text) for text in hostile]
    assert len(set(shown)) == len(hostile)
    assert all(text.isprintable() and text.encode() for text in shown)
    assert shown[-1] == hostile[-1]


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_an_image_of_the_right_size_is_untouched(resize):
    assert fit_image(COLOUR, image_size=(6, 9), resize=resize) is COLOUR


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (7, 5), (300, 200)])
def test_any_shape_fits_and_a_constant_stays_constant(shape, channels, resize):
    image = np.full((*shape, channels), 77, np.uint8)
    fitted = fit_image(image, image_size=(20, 32), resize=resize)
    assert fitted.shape == (20, 32, channels) and fitted.dtype == np.uint8
    assert (fitted == 77).all()


@pytest.mark.parametrize("shape", [(900, 1600), (1600, 900)])
@pytest.mark.parametrize("size", [28, 56, 112, 224])
def test_a_crop_takes_the_whole_short_side_of_any_length(shape, size):
    """900 / 224 * 224 is more than 900, and Pillow takes nothing from outside a picture."""
    image = np.full((*shape, 1), 77, np.uint8)
    assert (fit_image(image, image_size=(size, size), resize="crop") == 77).all()


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_shrinking_does_not_alias(resize):
    stripes = np.zeros((256, 256, 1), np.uint8)
    stripes[:, ::2] = 255
    fitted = fit_image(stripes, image_size=(16, 16), resize=resize)
    assert np.abs(fitted.astype(int) - 127).max() < 10


def test_channels_are_resized_independently():
    fitted = fit_image(COLOUR, image_size=(4, 4), resize="squash")
    for channel in range(3):
        alone = fit_image(COLOUR[..., channel : channel + 1], image_size=(4, 4), resize="squash")
        np.testing.assert_array_equal(fitted[..., channel], alone[..., 0])


def test_squash_keeps_the_whole_image_and_crop_the_proportions():
    image = np.zeros((8, 24, 1), np.uint8)
    image[:, :8], image[:, 16:] = 100, 200
    squashed = fit_image(image, image_size=(8, 12), resize="squash")
    assert squashed[0, 0, 0] == 100 and squashed[0, -1, 0] == 200
    for picture in (image, image.transpose(1, 0, 2)):
        cropped = fit_image(picture, image_size=(4, 4), resize="crop")
        assert (cropped[1:-1, 1:-1] == 0).all()
    image = RNG.integers(0, 256, (8, 16, 3), np.uint8)
    cropped = fit_image(image, image_size=(8, 8), resize="crop")
    np.testing.assert_array_equal(cropped, image[:, 4:12])
