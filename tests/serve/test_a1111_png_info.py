"""AUTOMATIC1111's png-info: the parameters in an image's file, of this service and of others."""

import base64
import io
import json

import pytest
from PIL import Image, PngImagePlugin

from sdbatch.serve.a1111_png_info import parse_infotext
from sdbatch.serve.drawer import Drawer
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.serve.conftest import PHOTO, Server, base64_of, file_of


@pytest.fixture(scope="module")
def server():
    """A service that draws at once."""
    server = Server(Drawer(FakeEngine, SafetyPolicy("flag")))
    yield server
    server.close()


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_parameters_are_read_from_an_image_of_the_service(server, image_format):
    drawn = server.post(
        "/sdapi/v1/txt2img",
        prompt="a (red:1.2) dog,\nin snow",
        negative_prompt="blurry",
        seed=7,
        sampler_name="Euler a",
        override_settings={"samples_format": image_format},
    ).json()
    [text] = json.loads(drawn["info"])["infotexts"]
    read = server.post("/sdapi/v1/png-info", image=drawn["images"][0]).json()
    assert read["info"] == text
    assert "parameters" not in read["items"]
    assert read["parameters"] == {
        "Prompt": "a (red:1.2) dog,\nin snow",
        "Negative prompt": "blurry",
        "Steps": "4",
        "Sampler": "Euler a",
        "CFG scale": "5",
        "Seed": "7",
        "Size-1": "64",
        "Size-2": "64",
        "Model hash": "0123456789",
        "Model": "tiny",
        "RNG": "CPU",
        "Version": "sdbatch test",
    }


def test_picture_without_parameters_has_none(server):
    answer = server.post("/sdapi/v1/png-info", image=f"data:image/png;base64,{base64_of(PHOTO)}")
    assert answer.json() == {"info": "", "items": {}, "parameters": {}}


def test_texts_of_a_png_after_its_pixels_are_read_and_others_are_items(server):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 2, Seed: 3, CFG scale: 4", zip=True)
    chunks.add(b"tEXt", b"Title\0cat", after_idat=True)
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG", pnginfo=chunks)
    read = server.post(
        "/sdapi/v1/png-info", image=base64.b64encode(file.getvalue()).decode()
    ).json()
    assert (read["items"], read["parameters"]["Seed"]) == ({"Title": "cat"}, "3")


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "hé".encode("utf-16-be"), "hé"),
        (b"UNICODE\0" + "hé".encode("utf-16"), "hé"),
        (b"ASCII\0\0\0he", "he"),
        (b"\0\0\0\0\0\0\0\0h\xffe", "h\ufffde"),
        (b"UNICODE\0" + b"h\0e", "\u6800\ufffd"),
        (b"", ""),
    ],
)
def test_comment_in_exif_is_read_in_every_code(server, comment, text):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "JPEG", exif=exif.tobytes())
    read = server.post(
        "/sdapi/v1/png-info", image=base64.b64encode(file.getvalue()).decode()
    ).json()
    assert read["info"] == text


def test_halves_of_characters_in_a_text_are_replaced(server):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", 'a\nSteps: 1, Seed: 2, Model: "\\ud800"')
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG", pnginfo=texts)
    image = base64.b64encode(file.getvalue()).decode()
    answer = server.post("/sdapi/v1/png-info", image=image)
    assert answer.status_code == 200
    assert answer.json()["parameters"]["Model"] == "?"


def test_files_that_are_no_pictures_are_refused(server):
    truncated = base64.b64encode(file_of(PHOTO)[:-500]).decode()
    for image, words in (
        ("...", "image = '...': must be a picture's file in base64"),
        (base64.b64encode(b"GIF8").decode(), "image = a damaged GIF file"),
        (base64.b64encode(b"hello").decode(), "must be a picture file"),
        (truncated, "truncated PNG file"),
    ):
        answer = server.post("/sdapi/v1/png-info", image=image)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "image"


def test_texts_of_a_picture_are_bounded(server):
    chunks = PngImagePlugin.PngInfo()
    for name in ("a", "b"):
        chunks.add_text(name, "x" * 600_000, zip=True)
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG", pnginfo=chunks)
    answer = server.post("/sdapi/v1/png-info", image=base64.b64encode(file.getvalue()).decode())
    assert answer.status_code == 400
    assert "texts of 1200000 characters: must have at most" in answer.json()["error"]["message"]


def test_parameters_of_other_programs_are_read():
    text = (
        "a cat\nNegative prompt: dog,\nbird\n"
        'Steps: 2, Sampler: "x, \\"y\\"", Hires resize: 8x16, Lora hashes: "a: 1, b: 2", Odd: "x'
    )
    assert parse_infotext(text) == {
        "Prompt": "a cat",
        "Negative prompt": "dog,\nbird",
        "Steps": "2",
        "Sampler": 'x, "y"',
        "Hires resize-1": "8",
        "Hires resize-2": "16",
        "Lora hashes": "a: 1, b: 2",
        "Odd": '"x',
    }
    assert parse_infotext("only: a, prompt") == {
        "Prompt": "only: a, prompt",
        "Negative prompt": "",
    }
    assert parse_infotext("\n")["Prompt"] == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part", ["a", "a,", "a:", ' a:"', 'a: "\\",', " ", '"', "a:,b:c:"])
def test_long_texts_are_read_in_time_that_grows_as_their_length(part):
    parse_infotext(part * (1_000_000 // len(part)))  # in quadratic time: hours
