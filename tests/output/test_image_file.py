"""What an image file says of itself, in each of the formats."""

import io
import json
import re
from dataclasses import replace
from xml.dom import minidom

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image

from sdbatch import registry
from sdbatch.output import names
from sdbatch.output.image_file import (
    LONGEST,
    MADE_BY_A_MODEL,
    encode_image,
    encoding_of,
    infotext,
    read_parameters,
)
from sdbatch.output.reader import open_images
from sdbatch.samplers import NAMES
from sdbatch.sampling import Sampling
from tests.finished import encoding, finish, small_job

FORMATS = ("jpg", "png", "webp")
ROW = {
    **Sampling().model_dump(),
    "prompt": "a red dog",
    "negative_prompt": "blurred",
    "seed": 17,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "sampler": "dpmpp_2m_karras",
    "height": 24,
    "width": 16,
    "guidance_rescale": 0.0,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "guidance_sigma_low": 0.0,
    "guidance_sigma_high": 1000.0,
    "eta": 0.0,
    "clip_skip": 0,
    "prompt_weights": False,
    "chunk_prompts": False,
    "loras": "",
    "cache_interval": 1,
    "row_key": "row-3",
    "sample_index": 1,
}
NASTY = {
    "double quotes": 'a "red" dog',
    "single quotes": "a dog's 'bone'",
    "both quotes": "\"it's\" a 'dog'",
    "less than": "a <b>dog</b> <!-- <?xml ]]>",
    "ampersand": "cat & dog &amp; &quot; &#10; &lt;",
    "newline": "a dog\r\n\ton\n\na hill\n",
    "NUL": "a \x00 dog\x00",
    "control": "a \x01\x0b\x1f\x7f dog \ufffe\uffff",
    "emoji": "a 🐕 dog 👩‍👩‍👧",
    "CJK": "赤い犬、二匹",
    "backslash": "a \\ dog \\u0041 \\n",
    "brackets": "{prompt} %s {0} (red:1.2) [dog]",
    "itself": 'sdbatch:parameters="{}"',
    "empty": "",
    "blank": " \t ",
}


def picture(height=24, width=16):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opened(file):
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def text_of(file):
    """Return the parameters' text, from where AUTOMATIC1111 looks for it."""
    image = opened(file)
    if image.format == "PNG":
        return image.info["parameters"]
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def xmp_of(file):
    """Return the attributes of the description in the file's XMP packet."""
    info = opened(file).info
    packet = info.get("xmp", info.get("XML:com.adobe.xmp"))
    (description,) = minidom.parseString(packet).getElementsByTagName("rdf:Description")
    return dict(description.attributes.items())


@pytest.mark.parametrize(
    ("image_format", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
)
def test_image_has_the_format_and_size_that_were_asked_for(image_format, name):
    image = opened(encode_image(picture(), ROW, encoding(image_format)))

    assert (image.format, image.mode, image.size) == (name, "RGB", (16, 24))


def test_image_has_the_same_pixels_when_it_is_a_png():
    file = encode_image(picture(), ROW, encoding("png"))

    assert np.array_equal(np.asarray(opened(file)), picture())


def test_png_has_the_same_pixels_and_fewer_bytes_when_it_is_compressed_more():
    smooth = np.add.outer(np.arange(64, dtype=np.uint8), np.arange(64, dtype=np.uint8))
    flat = np.repeat(smooth[..., None], 3, axis=2)
    files = {
        level: encode_image(flat, ROW, replace(encoding("png"), compression=level))
        for level in (0, 1, 9, None)
    }
    assert all(np.array_equal(np.asarray(opened(file)), flat) for file in files.values())
    assert len(files[0]) > len(files[1]) > len(files[9])


def test_png_has_level_6_unless_the_job_sets_another():
    default, same = (replace(encoding("png"), compression=level) for level in (None, 6))
    assert encode_image(picture(), ROW, default) == encode_image(picture(), ROW, same)
    assert registry.IMAGE_FORMATS["png"].compression == 6


def test_compression_reaches_the_encoder_from_the_job(make_job):
    job = make_job(output={"image_format": "png", "compression": 1})
    assert encoding_of(job).compression == 1


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_image_is_nearer_to_its_pixels_when_the_quality_is_higher(image_format):
    def distance(quality):
        file = encode_image(picture(), ROW, replace(encoding(image_format), quality=quality))
        return np.abs(np.asarray(opened(file)).astype(int) - picture()).mean()

    assert distance(95) < distance(10)


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_has_the_same_bytes_when_it_is_encoded_twice(image_format):
    files = {encode_image(picture(), dict(ROW), encoding(image_format)) for _ in range(3)}

    assert len(files) == 1


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_carries_the_text_that_automatic1111_reads(image_format):
    file = encode_image(picture(), ROW, encoding(image_format))

    assert text_of(file) == infotext(read_parameters(file))
    assert text_of(file).startswith("a red dog\nNegative prompt: blurred\nSteps: 25, ")


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_carries_the_mark_of_a_trained_model_in_xmp_that_any_reader_parses(image_format):
    xmp = xmp_of(encode_image(picture(), {**ROW, "prompt": "<&'\"\x00\n"}, encoding(image_format)))

    assert xmp["Iptc4xmpExt:DigitalSourceType"] == MADE_BY_A_MODEL
    assert MADE_BY_A_MODEL.endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    assert xmp["xmlns:Iptc4xmpExt"] == "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_that_was_drawn_from_a_picture_says_that_it_is_a_composite(image_format):
    row = {**ROW, "image_sha256": "ab" * 32}
    xmp = xmp_of(encode_image(picture(), row, encoding(image_format)))
    expected = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    assert xmp["Iptc4xmpExt:DigitalSourceType"] == expected


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_carries_its_values_as_json_that_any_xml_reader_finds(image_format):
    file = encode_image(picture(), {**ROW, "prompt": "<&'\"\x00\n"}, encoding(image_format))

    assert json.loads(xmp_of(file)["sdbatch:parameters"]) == read_parameters(file)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("prompt", NASTY.values(), ids=NASTY.keys())
def test_parameters_are_what_the_image_was_encoded_with(prompt, image_format):
    row = {**ROW, "prompt": prompt, "negative_prompt": prompt, "row_key": prompt}
    file = encode_image(picture(), row, encoding(image_format))

    assert read_parameters(file) == row | {
        "model": "a-model",
        "model_hash": "0123456789abcdef",
        "software": "sdbatch 0",
    }
    assert prompt in text_of(file)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("letter", ["x", "🐕", "犬", "\x00", "\"'", "<", "&"])
def test_parameters_say_where_a_prompt_was_cut_when_it_is_long(letter, image_format):
    prompt = (letter * 20_000)[:20_000]
    row = {**ROW, "prompt": prompt, "negative_prompt": prompt}
    said = read_parameters(encode_image(picture(), row, encoding(image_format)))

    assert said["prompt"] == said["negative_prompt"] == prompt[:LONGEST]
    assert said["prompt_cut_at"] == said["negative_prompt_cut_at"] == LONGEST


def test_parameters_speak_of_no_cut_when_a_prompt_just_fits():
    said = read_parameters(encode_image(picture(), {**ROW, "prompt": "x" * LONGEST}, encoding()))

    assert said["prompt"] == "x" * LONGEST
    assert not [name for name in said if name.endswith("_cut_at")]


@pytest.mark.parametrize("image_format", FORMATS)
def test_image_is_encoded_when_its_row_key_is_very_long(image_format):
    """An id column may hold anything, and a JPEG segment ends at 64 KiB."""
    said = read_parameters(
        encode_image(picture(), {**ROW, "row_key": "k" * 70_000}, encoding(image_format))
    )

    assert said["row_key"].startswith("k" * LONGEST)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("letter", ["🐕", "\x00", '"', "<"])
def test_image_is_encoded_when_all_its_texts_are_very_long(letter, image_format):
    text = letter * 10_000_000
    row = {**ROW, "prompt": text, "negative_prompt": text, "row_key": text}
    file = encode_image(picture(), row, encoding(image_format))
    said = read_parameters(file)

    assert len(file) < 200_000
    assert said["prompt_cut_at"] == said["negative_prompt_cut_at"] == said["row_key_cut_at"]
    assert said["prompt"] == letter * said["prompt_cut_at"]
    assert said["prompt_cut_at"] >= LONGEST // 2


@pytest.mark.parametrize("image_format", FORMATS)
def test_row_with_a_prompt_and_a_column_of_10_mb_gets_its_image(make_job, tmp_path, image_format):
    long = "dog " * 2_500_000
    table = pa.table({"prompt": [long, "a cat"], "note": ["a", long], "id": ["🐕" * 5_000, "b"]})
    (tmp_path / "out").mkdir()
    job = small_job(
        make_job,
        tmp_path,
        table,
        prompts={"columns": {"id": "id"}},
        output={"image_format": image_format},
    )
    output = finish(job)

    assert (output.report.images, output.report.failed) == (2, 0)
    row, other = open_images(output.store).rows()
    assert (row["prompt"], other["note"]) == (long, long)
    assert read_parameters(row["image"]["bytes"])["prompt_cut_at"] == LONGEST
    for page in (names.GALLERY, names.CARD):
        assert len(output.store.read(page)) < 100_000


@pytest.mark.parametrize("image_format", FORMATS)
def test_parameters_are_refused_when_an_image_carries_none(image_format):
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, {"jpg": "JPEG"}.get(image_format, image_format))

    with pytest.raises(ValueError, match="carries no parameters of sdbatch"):
        read_parameters(file.getvalue())


def test_parameters_are_refused_when_the_xmp_is_another_programs():
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>')

    with pytest.raises(ValueError, match="carries no parameters of sdbatch"):
        read_parameters(file.getvalue())


SAID = {**ROW, "model": "dreamshaper", "model_hash": "0123456789abcdef", "software": "sdbatch 0"}


def test_infotext_is_laid_out_as_automatic1111_does():
    # The order of modules/processing.py create_infotext, of AUTOMATIC1111's webui 1.10.
    assert infotext(SAID) == (
        "a red dog\n"
        "Negative prompt: blurred\n"
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 17, Size: 16x24, "
        "Model hash: 0123456789, Model: dreamshaper, RNG: CPU, Version: sdbatch 0"
    )


def test_infotext_has_the_loras_of_a_row_as_tags_of_its_prompt():
    text = infotext({**SAID, "prompt": "a <lora:wet:1> dog", "loras": "ink:0.8, soft fur:-1"})

    assert text.splitlines()[0] == "a <lora:wet:1> dog<lora:ink:0.8><lora:soft fur:-1>"


def test_infotext_has_no_second_line_when_there_is_no_negative_prompt():
    prompt, values = infotext({**SAID, "negative_prompt": ""}).split("\n")

    assert prompt == "a red dog"
    assert values.startswith("Steps: 25, ")


@pytest.mark.parametrize("model", ["dogs, cats.safetensors", "builtin:shapes", "two\nlines"])
def test_infotext_quotes_the_models_name_when_it_holds_a_separator(model):
    """As webui's `quote` does; its reader ends a bare value at the next comma."""
    assert f"Model: {json.dumps(model)}, RNG: CPU" in infotext({**SAID, "model": model})


@pytest.mark.parametrize("sampler", NAMES)
def test_infotext_names_every_sampler_that_a_job_may_ask_for(sampler):
    name = infotext({**SAID, "sampler": sampler}).partition("Sampler: ")[2].partition(",")[0]

    assert name
    assert "_" not in name


OF_MODES = "Denoising|Image CFG|Inpaint|Mask|Variation|Hires"
LABELS = {
    "a picture": ({"image_sha256": "0"}, ["Denoising strength: 0.8", "Image CFG scale: 1.5"]),
    "a mask": (
        {"image_sha256": "0", "mask_sha256": "1"},
        [
            "Denoising strength: 0.8",
            "Image CFG scale: 1.5",
            "Inpaint only masked: False",
            "Mask blur: 0",
            "Masked area padding: 32",
        ],
    ),
    "its alpha": ({"image_sha256": "0", "mask_from_alpha": True}, ["Mask blur: 0"]),
    "a variation": (
        {"variation_strength": 0.1},
        ["Variation seed: 0", "Variation seed strength: 0.1"],
    ),
    "hires fix": (
        {"hires_scale": 2.0},
        [
            "Hires denoising strength: 0.7",
            "Hires steps: 0",
            "Hires upscale: 2",
            "Hires upscaler: latent",
        ],
    ),
    "keys that say nothing": (
        {"strength": 0.5, "mask_blur": 4, "variation_seed": 7, "hires_steps": 5},
        [],
    ),
}


@pytest.mark.parametrize(("values", "labels"), LABELS.values(), ids=LABELS)
def test_infotext_names_what_the_row_has(values, labels):
    text = text_of(encode_image(picture(), {**ROW, **values}, encoding()))
    found = {part for part in text.split("\n")[-1].split(", ") if re.match(OF_MODES, part)}
    assert found >= set(labels)
    assert labels or not found


@pytest.mark.parametrize(("scale", "text"), [(1.0, "1"), (7.5, "7.5"), (12.25, "12.25")])
def test_infotext_writes_the_guidance_without_needless_digits(scale, text):
    assert f"CFG scale: {text}, " in infotext({**SAID, "guidance_scale": scale})
