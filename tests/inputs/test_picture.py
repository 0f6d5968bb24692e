"""Any file becomes a picture or the reason why it is none."""

import io
import threading
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from sdbatch.inputs.picture import read_mask, read_picture
from tests.inputs.files import chunk, colours, png_header, save

PIXELS = colours(24, 16)
PHOTO = save(PIXELS, "JPEG")
PNG = save(PIXELS)
FRAMES = [Image.fromarray(colours(16, 16, seed)) for seed in range(3)]


def frames(kind):
    return save(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])


BAD = {
    "empty": (b"", "an empty file: must be a picture file"),
    "page": (b"<!DOCTYPE html><html><body>404", "an HTML page: .* The address is that of a page"),
    "page after spaces": (b"\xef\xbb\xbf\n <html>Forbidden", "an HTML page"),
    "drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing: .* Convert it"),
    "store's error": (b"<Error><Code>AccessDenied</Code>", "an XML file"),
    "json": (b'{"error": "not found"}', "a JSON text"),
    "text": ("Zugriff verweigert: für Gäste".encode(), "a text that begins with 'Zugriff"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS: .* `git lfs pull`"),
    "pdf": (b"%PDF-1.7 ...", "a PDF file"),
    "archive": (b"PK\x03\x04\x14\x00", "a ZIP archive"),
    "photoshop": (b"8BPS\x00\x01", "a Photoshop file"),
    "phone": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC file"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
    "webm": (b"\x1aE\xdf\xa3\x01\x00\x00", "a video"),
    "jpeg xl": (b"\xff\x0a\x00\x10", "a JPEG XL file"),
    "icon": (b"\x00\x00\x01\x00\x01\x00\x10\x10", "an ICO file"),
    "another format": (save(PIXELS, "PPM"), "a file of an unknown kind"),
    "random": (bytes(range(200, 240)), "an unknown kind that begins with the bytes c8c9cacb"),
    "zeros": (bytes(1000), "an unknown kind"),
    "cut JPEG": (PHOTO[: len(PHOTO) // 2], "a truncated JPEG file .* must be whole. Copy or down"),
    "cut PNG": (PNG[: len(PNG) // 2], "a truncated PNG file"),
    "cut WebP": (save(PIXELS, "WEBP")[:100], "a damaged WebP file"),
    "cut GIF": (save(PIXELS, "GIF")[:-200], "a truncated GIF file"),
    "cut BMP": (save(PIXELS, "BMP")[:-200], "a truncated BMP file"),
    "cut TIFF": (save(PIXELS, "TIFF")[:-500], "a truncated TIFF file"),
    "header only": (PHOTO[:4], "a damaged JPEG file \\(no header\\)"),
    "no pixels": (png_header(16, 16), "a truncated PNG file"),
    "broken checksum": (PNG.replace(b"IDAT", b"IDAT\x01", 1), "a damaged PNG file .broken"),
    "bomb": (
        png_header(30000, 30000),
        "hundreds of millions of pixels: must have at most 67108864",
    ),
    "large": (png_header(9000, 9000), "9000 x 9000 pixels: must have at most 67108864 .* Resize"),
    "long": (png_header(20000, 100), "20000 x 100 pixels: must have sides from 8 to 16384"),
    "one pixel": (save(PIXELS[:1, :1]), "1 x 1 pixels: must have sides from 8"),
    "thin": (save(PIXELS[:, :7]), "7 x 16 pixels: must have sides from 8"),
    "none": (png_header(0, 16), "a damaged PNG file .no header"),
    "animated GIF": (frames("GIF"), "an? GIF file of 3 frames: must be one picture. Save the one"),
    "animated PNG": (frames("PNG"), "a PNG file of 3 frames"),
    "animated WebP": (frames("WEBP"), "a WebP file of 3 frames"),
    "pages": (frames("TIFF"), "a TIFF file of 3 pages"),
    "deep": (save(np.full((8, 8), 70000, np.int32), "TIFF"), "TIFF file of numbers from 70000 to"),
    "negative": (save(np.full((8, 8), -1, np.int32), "TIFF"), "must be of 16 bits, 0 to 65535"),
    "bright": (save(np.full((8, 8), 2.5, np.float32), "TIFF"), "numbers from 2.5 to 2.5: must be"),
    "no number": (save(np.full((8, 8), np.nan, np.float32), "TIFF"), "must be from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_with_its_reason(name):
    file, reason = BAD[name]
    with pytest.raises(ValueError, match=f"^image = .*{reason}") as error:
        read_picture(file)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mask_is_refused_under_its_own_name(name):
    with pytest.raises(ValueError, match=r"^mask_image = "):
        read_mask(BAD[name][0])


@pytest.mark.skipif(not features.check("avif"), reason="Pillow has no AVIF")
def test_animated_avif_is_refused():
    with pytest.raises(ValueError, match="an AVIF file of 3 frames"):
        read_picture(frames("AVIF"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_file_without_loss_has_its_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = read_picture(save(PIXELS, kind, **options))
    assert np.array_equal(np.asarray(picture.rgb), PIXELS)
    assert picture.size == (24, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.swapaxes(0, 1)),
        (6, np.rot90(PIXELS, -1)),
        (7, PIXELS.swapaxes(0, 1)[::-1, ::-1]),
        (8, np.rot90(PIXELS)),
    ],
)
def test_pictures_are_turned_as_their_exif_says(kind, orientation, expected):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = save(PIXELS, kind, exif=exif, **options.get(kind, {}))
    picture = read_picture(file)
    assert picture.size == (expected.shape[1], expected.shape[0])
    difference = np.asarray(picture.rgb).astype(int) - expected
    assert abs(difference).max() <= (4 if kind == "JPEG" else 0)
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(expected)).convert("L")).astype(int)
    assert abs(np.asarray(read_mask(file)).astype(int) - grey).max() <= (4 if kind == "JPEG" else 0)


def test_exif_that_cannot_be_read_turns_nothing():
    picture = read_picture(save(PIXELS, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(picture.rgb), PIXELS)


def test_of_a_phones_jpeg_with_a_second_picture_the_photo_is_read():
    file = save(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:2])
    assert read_picture(file).size == (16, 16)
    with pytest.raises(ValueError, match="a truncated JPEG file"):
        read_picture(file[:400])


def test_a_large_jpeg_is_decoded_no_larger_than_needed():
    photo = Image.fromarray(colours(50, 30)).resize((1000, 600))
    whole = read_picture(save(photo, "JPEG"))
    small = read_picture(save(photo, "JPEG"), enough=(200, 128))
    assert small.size == whole.size == (1000, 600)
    assert small.rgb.size == (250, 150)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = read_picture(save(photo, "JPEG", exif=exif), enough=(128, 200))
    assert (turned.size, turned.rgb.size) == ((600, 1000), (150, 250))


def test_a_mask_with_transparent_pixels_is_refused():
    mask = np.zeros((8, 8, 4), np.uint8)
    with pytest.raises(ValueError, match="transparent pixels: must be opaque, white where"):
        read_mask(save(mask))
    mask[..., 3] = 255
    mask[:4, :, :3] = 255
    assert np.array_equal(np.asarray(read_mask(save(mask))), mask[..., 0])


def test_warnings_of_pillow_do_not_escape_from_any_thread():
    odd = [
        PNG[:8] + PNG[8:33] + chunk(b"acTL", bytes(8)) + PNG[33:],  # warns: an invalid APNG
        save(PIXELS, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0"),  # warns: corrupt EXIF
    ]
    failures = []

    def read_all():
        try:
            for file in odd * 10:
                read_picture(file)
        except Warning as error:
            failures.append(error)

    before = list(warnings.filters)
    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(odd[0]))
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(odd[1])).getexif()


def test_threads_read_the_same_pixels():
    results = [None] * 8

    def read(place):
        results[place] = np.asarray(read_picture(PHOTO).rgb)

    threads = [threading.Thread(target=read, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_random_damage_is_a_reason_or_a_picture_and_nothing_else(kind):
    rng, reasons = np.random.default_rng(7), []
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    whole = np.frombuffer(save(PIXELS, kind, **options), np.uint8)
    for _ in range(150):
        file = whole.copy()
        places = rng.integers(0, len(file), rng.integers(1, 6))
        file[places] = rng.integers(0, 256, len(places))
        cut = rng.integers(1, len(file) + 1) if rng.random() < 0.3 else len(file)
        for read in (read_picture, read_mask):
            try:
                read(file[:cut].tobytes())
            except ValueError as error:
                reasons.append(str(error))
    assert reasons
    assert all(reason.startswith(("image = ", "mask_image = ")) for reason in reasons)
