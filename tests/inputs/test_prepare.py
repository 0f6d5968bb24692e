"""A row's pictures reach the engine fitted, and what is not masked comes back as it was."""

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sdbatch.inputs import masks
from sdbatch.inputs.picture import read_picture
from sdbatch.inputs.prepare import Prepared, prepare
from sdbatch.sampling import Sampling
from tests.inputs.files import colours, save
from tests.inputs.test_masks import box_mask

SMALL = Sampling(height=24, width=32)
PIXELS = colours(32, 24)
PICTURE = save(PIXELS)
MASK = box_mask(32, 24, 8, 8, 20, 16)


def over_wire(prepared):
    return Prepared.from_bytes(prepared.to_bytes())


def test_a_picture_of_the_rows_size_reaches_the_engine_as_it_is():
    prepared = prepare(SMALL, PICTURE)
    assert list(prepared.arrays) == ["image"]
    assert prepared.arrays["image"].flags.writeable
    assert np.array_equal(prepared.arrays["image"], PIXELS)
    assert prepared.sha256 == {"image": hashlib.sha256(PICTURE).hexdigest()}
    larger = colours(64, 48, 9)  # hires fix
    assert prepared.finish(larger) is larger


def test_a_mask_of_the_rows_size_reaches_the_engine_as_it_is():
    prepared = prepare(SMALL, PICTURE, save(MASK))
    assert np.array_equal(prepared.arrays["image"], PIXELS)
    assert np.array_equal(prepared.arrays["mask"], MASK)
    assert prepared.sha256["mask"] == hashlib.sha256(save(MASK)).hexdigest()
    drawn = colours(32, 24, 9)
    finished = prepared.finish(drawn)
    assert np.array_equal(finished[MASK == 0], PIXELS[MASK == 0])
    assert np.array_equal(finished[MASK == 255], drawn[MASK == 255])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_not_masked_comes_back_exactly(data):
    """Of any mask, size and fit, and after the way between processes."""
    draw = data.draw
    sides = st.integers(8, 80)
    size, scale = (draw(sides), draw(sides)), draw(st.sampled_from([1, 2]))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.integers(0, 2, (3, 3)), np.ones((30, 30))).astype(np.uint8)[
        : size[1], : size[0]
    ]
    mask[size[1] // 2, size[0] // 2] = 1
    mask = np.kron(mask, np.ones((scale, scale), np.uint8)) * np.uint8(draw(st.integers(128, 255)))
    sampling = Sampling(
        height=draw(st.integers(1, 8)) * 8,
        width=draw(st.integers(1, 8)) * 8,
        fit=draw(st.sampled_from(["crop", "pad", "stretch"])),
        resample=draw(st.sampled_from(["lanczos", "bicubic", "bilinear", "box", "nearest"])),
        mask_fill=draw(st.sampled_from(["original", "fill", "noise"])),
        compat=draw(st.sampled_from(["diffusers", "a1111"])),
        only_masked=draw(st.booleans()),
        only_masked_padding=draw(st.integers(0, 20)),
    )
    picture = save(colours(*size, seed))
    try:
        prepared = prepare(sampling, picture, save(mask))
    except ValueError as error:  # too thin to be seen after it was reduced
        assert "nothing to draw" in str(error)  # noqa: PT017
        return
    shape = (sampling.height, sampling.width)
    assert prepared.arrays["image"].shape == (*shape, 3)
    assert prepared.arrays["mask"].shape == shape
    drawn = colours(sampling.width, sampling.height, seed + 1)
    finished = over_wire(prepared).finish(drawn)
    assert np.array_equal(finished, prepared.finish(drawn))
    if sampling.only_masked:
        original = np.asarray(read_picture(picture).rgb)
        filters = {"nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX}
        soft = filters.get(sampling.resample, Image.Resampling.BILINEAR)
        weights = np.asarray(Image.fromarray(mask).resize(size, soft))
        expected = finished.shape == original.shape
    else:
        original = prepare(sampling, picture).arrays["image"]
        weights = prepare(sampling.updated(mask_fill="original"), picture, save(mask)).arrays[
            "mask"
        ]
        expected = finished.shape == drawn.shape
    assert expected
    assert np.array_equal(finished[weights == 0], original[weights == 0])


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("scale", [1, 3])
def test_picture_and_mask_are_fitted_in_step(fit, scale):
    mask = box_mask(60, 40, 20, 10, 40, 30)
    pixels = np.dstack([mask] * 3)
    large = np.kron(mask, np.ones((scale, scale), np.uint8))
    sampling = Sampling(height=32, width=32, fit=fit, resample="bilinear")
    arrays = prepare(sampling, save(pixels), save(large)).arrays
    if fit == "pad":  # borders are drawn
        assert (arrays["mask"][:5] == 255).all()
        assert (arrays["image"][:5] == 0).all()
        inside = slice(6, 26)
    else:
        inside = slice(0, 32)
    same = abs(arrays["mask"][inside].astype(int) - arrays["image"][inside, :, 0])
    assert same.max() <= (0 if scale == 1 else 64)  # of a larger mask the edge is sharper
    assert ((arrays["mask"] >= 128) == (arrays["image"][..., 0] >= 128))[inside].all()


def test_a_mask_does_not_ring_where_the_picture_does():
    mask = box_mask(240, 240, 100, 100, 140, 140)
    sampling = Sampling(height=64, width=64, resample="lanczos")
    fitted = prepare(sampling, save(colours(240, 240)), save(mask)).arrays["mask"]
    assert not fitted[:25].any()
    assert (fitted[28:36, 28:36] == 255).all()


def test_turned_pictures_and_masks_match():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = save(np.ascontiguousarray(np.rot90(PIXELS)), exif=exif)
    prepared = prepare(SMALL, turned, save(MASK))
    assert np.array_equal(prepared.arrays["image"], PIXELS)


@pytest.mark.parametrize("compat", ["diffusers", "a1111"])
def test_a_soft_edge_is_blended(compat):
    sampling = SMALL.updated(mask_blur=2, compat=compat)
    prepared = prepare(sampling, save(np.zeros_like(PIXELS)), save(MASK))
    finished = prepared.finish(np.full_like(PIXELS, 255))[..., 0]
    mask = prepared.arrays["mask"].astype(int)
    assert np.array_equal(mask, masks.blur(MASK, 2))
    expected = np.minimum(2 * mask, 255) if compat == "a1111" else mask
    assert np.array_equal(finished, expected)
    assert 0 < finished[12, 6] < finished[12, 7] < 255
    assert (mask[12, 8:20] >= 128).all()
    assert (mask[MASK == 0] < 128).all()


@pytest.mark.parametrize("mask_fill", ["fill", "noise", "nothing"])
def test_what_is_under_the_mask_is_filled_for_the_engine_alone(mask_fill):
    pixels = np.full((24, 32, 3), (90, 20, 160), np.uint8)
    pixels[MASK == 255] = (0, 255, 0)
    prepared = prepare(SMALL.updated(mask_fill=mask_fill), save(pixels), save(MASK))
    image = prepared.arrays["image"].astype(int)
    assert abs(image - (90, 20, 160)).max() < 8
    half = save(MASK // 2 + 1)  # 128: the picture that half shines through is not the filled one
    prepared = prepare(SMALL.updated(mask_fill=mask_fill), save(pixels), half)
    finished = prepared.finish(np.zeros_like(pixels))
    assert abs(finished[MASK == 255].astype(int) - (0, 127, 0)).max() <= 1


def test_transparency_becomes_the_mask():
    pixels = np.dstack([PIXELS, np.where(MASK == 255, 0, 255).astype(np.uint8)])
    prepared = prepare(SMALL.updated(mask_from_alpha=True), save(pixels))
    assert np.array_equal(prepared.arrays["mask"], MASK)
    assert np.array_equal(prepared.arrays["image"], PIXELS)  # as it is below
    white = prepare(SMALL, save(pixels)).arrays
    assert list(white) == ["image"]
    assert (white["image"][MASK == 255] == 255).all()
    other = box_mask(32, 24, 0, 0, 9, 9)
    both = prepare(SMALL.updated(mask_from_alpha=True), save(pixels), save(other)).arrays
    assert np.array_equal(both["mask"], other)
    assert (both["image"][MASK == 255] == 255).all()


CUT = Sampling(height=64, width=64, only_masked=True, only_masked_padding=4)
PHOTO = colours(200, 120, 5)
SPOT = box_mask(200, 120, 90, 50, 114, 74)  # with the padding 32 x 32


def test_only_masked_draws_the_surroundings_of_the_mask():
    prepared = prepare(CUT, save(PHOTO), save(SPOT))
    assert prepared.box == (86, 46, 118, 78)
    region = Image.fromarray(PHOTO[46:78, 86:118]).resize((64, 64), 1)
    assert np.array_equal(prepared.arrays["image"], np.asarray(region))
    assert prepared.arrays["mask"][32, 32] == 255
    assert not prepared.arrays["mask"][:6].any()


def test_only_masked_returns_the_whole_picture():
    prepared = over_wire(prepare(CUT, save(PHOTO), save(SPOT)))
    drawn = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    finished = prepared.finish(drawn)
    assert finished.shape == PHOTO.shape
    assert (finished[SPOT == 255] == (10, 200, 30)).all()
    assert np.array_equal(finished[SPOT == 0], PHOTO[SPOT == 0])


def test_a_cut_out_of_another_shape_is_continued_and_returns_undistorted():
    wide = box_mask(200, 16, 0, 0, 200, 16)
    pixels = colours(200, 16)
    prepared = prepare(CUT, save(pixels), save(wide))
    assert prepared.part == (0, 29, 64, 34)
    image = prepared.arrays["image"]
    assert (image[:29] == image[29]).all()
    drawn = np.zeros((64, 64, 3), np.uint8)
    drawn[29:34] = 255
    assert (prepared.finish(drawn) == 255).all()


def test_a_cut_out_returns_to_its_size_by_the_rows_filter():
    sampling = CUT.updated(resample="nearest", only_masked_padding=0)
    prepared = over_wire(prepare(sampling, save(PHOTO), save(SPOT)))
    drawn = colours(64, 64, 8)
    left, top, right, bottom = prepared.box
    piece = Image.fromarray(drawn).resize((right - left, bottom - top), 0)
    finished = prepared.finish(drawn)[top:bottom, left:right]
    assert np.array_equal(finished, np.asarray(piece))


def test_only_masked_sends_the_pictures_own_file_and_turns_it_again():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    file = save(np.ascontiguousarray(np.rot90(PHOTO, -1)), exif=exif)
    prepared = prepare(CUT, file, save(SPOT))
    assert over_wire(prepared).files["original"] == file
    finished = prepared.finish(np.zeros((64, 64, 3), np.uint8))
    assert np.array_equal(finished[SPOT == 0], PHOTO[SPOT == 0])


def test_only_masked_with_transparency_as_the_mask():
    alpha = np.where(SPOT == 255, 100, 255).astype(np.uint8)
    file = save(np.dstack([PHOTO, alpha]))
    sampling = CUT.updated(mask_from_alpha=True)
    prepared = over_wire(prepare(sampling, file))
    finished = prepared.finish(np.zeros((64, 64, 3), np.uint8))
    assert np.array_equal(finished[SPOT == 0], PHOTO[SPOT == 0])
    inside = finished[SPOT == 255].astype(int)
    assert abs(inside - PHOTO[SPOT == 255] * (100 / 255)).max() <= 1


def test_only_masked_resizes_a_mask_to_the_picture():
    small = save(SPOT[::2, ::2])
    prepared = prepare(CUT.updated(resample="nearest"), save(PHOTO), small)
    assert prepared.box == (86, 46, 118, 78)


@pytest.mark.parametrize(
    ("keys", "mask", "reason"),
    [
        (
            {},
            box_mask(24, 32, 0, 0, 9, 9),
            "24 x 32 pixels: must have the shape of the image, 32 x",
        ),
        ({}, np.zeros((24, 32), np.uint8), "nothing to draw, its brightest pixel is 0: must be"),
        ({}, MASK // 255, "its brightest pixel is 1: must be white, 128 to 255"),
        ({"only_masked": True}, np.zeros((24, 32), np.uint8), "nothing to draw"),
        ({"mask_blur": 20}, box_mask(32, 24, 8, 8, 9, 9), "nothing to draw"),
        ({"width": 8, "height": 24}, box_mask(32, 24, 0, 0, 4, 24), "nothing to draw"),  # cropped
        ({"hires_scale": 2.0}, MASK, "hires_scale = 2: must be 1 in a row with a mask"),
    ],
)
def test_masks_that_cannot_be_used(keys, mask, reason):
    with pytest.raises(ValueError, match=reason):
        prepare(SMALL.updated(**keys), PICTURE, save(mask))


def test_an_opaque_picture_has_no_mask_from_alpha():
    sampling = SMALL.updated(mask_from_alpha=True)
    for file in (PICTURE, save(np.dstack([PIXELS, np.full((24, 32), 255, np.uint8)]))):
        with pytest.raises(ValueError, match="image = a picture without transparent pixels"):
            prepare(sampling, file)


def test_a_black_mask_with_borders_continues_the_picture():
    sampling = Sampling(height=32, width=32, fit="pad")
    prepared = prepare(sampling, PICTURE, save(np.zeros((24, 32), np.uint8)))
    drawn = np.full((32, 32, 3), 77, np.uint8)
    finished = prepared.finish(drawn)
    assert np.array_equal(finished[4:28], PIXELS)
    assert (finished[:4] == 77).all()


def test_a_reduced_jpeg_is_nearly_the_same_and_nearest_takes_its_pixels():
    smooth = Image.fromarray(colours(12, 9)).resize((1200, 900), Image.Resampling.BICUBIC)
    file = save(smooth, "JPEG", quality=95)
    whole = np.asarray(read_picture(file).rgb)
    sampling = Sampling(height=96, width=128)
    exact = np.asarray(Image.fromarray(whole).resize((128, 96), Image.Resampling.LANCZOS))
    fitted = prepare(sampling, file).arrays["image"]
    assert abs(fitted.astype(int) - exact).max() <= 3
    nearest = np.asarray(Image.fromarray(whole).resize((128, 96), Image.Resampling.NEAREST))
    fitted = prepare(sampling.updated(resample="nearest"), file).arrays["image"]
    assert np.array_equal(fitted, nearest)


def test_the_same_row_has_the_same_bytes_for_its_way():
    sampling = SMALL.updated(mask_blur=2, mask_fill="fill", only_masked=True)
    one, other = (prepare(sampling, PICTURE, save(MASK)) for _ in range(2))
    assert one == other == over_wire(one) == pickle.loads(pickle.dumps(one))
    assert one.to_bytes() == other.to_bytes()
    assert one.arrays.keys() == over_wire(one).arrays.keys()
