"""OpenAI's own client, and the errors in the shape that it expects."""

import asyncio
import base64
import io
import json
from dataclasses import replace
from http.client import HTTPConnection

import numpy as np
import openai
import pytest
from PIL import Image

from sdbatch.engine.request import Request
from sdbatch.output.image_file import read_parameters
from tests.fakes import FakeEngine


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_seeds_of_the_images_of_a_request_count_up(client):
    answer = client.images.generate(
        model="tiny", prompt="a red dog", n=3, size="64x72", extra_body={"seed": 11}
    )
    assert [image.seed for image in answer.data] == [11, 12, 13]
    assert {pixels(image.b64_json).shape for image in answer.data} == {(72, 64, 3)}
    assert answer.size == "64x72"
    assert abs(answer.created - 1_700_000_000) < 1e9


def test_images_without_a_seed_differ_and_have_their_seed_in_the_response(client, server):
    first, second = (client.images.generate(prompt="a dog").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = server.post(prompt="a dog", seed=first.seed).json()["data"][0]
    assert again["sha256"] == first.sha256


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_image_has_the_requested_format_and_its_parameters_inside(client, image_format):
    compression = {} if image_format == "png" else {"output_compression": 80}
    answer = client.images.generate(
        prompt="a dog",
        output_format=image_format,
        extra_body={"seed": 5, "sampler": "euler"},
        **compression,
    )
    file = base64.b64decode(answer.data[0].b64_json)
    assert Image.open(io.BytesIO(file)).format == image_format.upper()
    assert answer.output_format == image_format
    values = read_parameters(file)
    assert (values["prompt"], values["seed"], values["sampler"]) == ("a dog", 5, "euler")


def test_image_by_url_is_fetched_without_a_key_and_is_the_same(client, server):
    body = {"prompt": "a dog", "extra_body": {"seed": 4}}
    url = client.images.generate(response_format="url", **body).data[0].url
    fetched = server.client.get(url)
    inline = client.images.generate(**body).data[0].b64_json
    assert fetched.content == base64.b64decode(inline)
    assert fetched.headers["content-type"] == "image/png"


def test_client_streams_partial_images_then_the_same_image(client):
    body = {"prompt": "a dog", "extra_body": {"seed": 9, "num_inference_steps": 12}}
    events = list(client.images.generate(stream=True, partial_images=2, **body))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[2].b64_json == client.images.generate(**body).data[0].b64_json
    assert events[2].usage.total_tokens == events[2].usage.input_tokens == 4  # letters of "a dog"


def test_streamed_request_that_fails_raises_an_error_of_the_client(serving):
    server = serving(FakeEngine())
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="this prompt cannot be drawn"),
    ):
        list(client.images.generate(prompt="fail", stream=True))


def test_async_clients_share_the_running_batch(server, tiny_engine):
    async def ten():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client:
            return await asyncio.gather(
                *(
                    client.images.generate(
                        prompt="a dog", extra_body={"seed": seed, "num_inference_steps": 40}
                    )
                    for seed in range(10)
                )
            )

    ticks = tiny_engine.usage.ticks
    asyncio.run(ten())
    assert tiny_engine.usage.ticks - ticks < 400  # UNet calls; one image after the other takes 400


REJECTED = {
    "unknown": ({"guidance": 3}, "unknown_parameter", "guidance: unknown parameter"),
    "unknown null": ({"guidance": None}, "unknown_parameter", "guidance: unknown parameter"),
    "quality": ({"quality": "high"}, "invalid_value", "quality = 'high': must be auto or standard"),
    "style": ({"style": "natural"}, "invalid_value", "style = 'natural': must be vivid"),
    "background": (
        {"background": "transparent"},
        "invalid_value",
        "background = 'transparent': must be auto or opaque, as images have no transparent parts",
    ),
    "moderation": ({"moderation": "low"}, "invalid_value", "moderation = 'low': must be auto"),
    "fidelity": ({"input_fidelity": "high"}, "invalid_value", "input_fidelity = 'high'"),
    "no prompt": ({"prompt": None}, "invalid_value", "prompt = None: must be text"),
    "long prompt": ({"prompt": "x" * 4001}, "invalid_value", "at most 4000 characters"),
    "long negative": ({"negative_prompt": "x" * 4001}, "invalid_value", "at most 4000 characters"),
    "odd size": ({"size": "65x64"}, "invalid_value", "width = 65: must be a multiple of 8"),
    "no size": ({"size": "big"}, "invalid_value", "size = 'big'"),
    "huge": ({"size": "4096x4096"}, "invalid_value", "4096x4096: must have 1048576 pixels at most"),
    "two sizes": ({"size": "64x64", "width": 64}, "invalid_value", "together with width. Give one"),
    "steps": ({"num_inference_steps": 500}, "invalid_value", "500: must be 150 at most"),
    "many": ({"n": 11}, "invalid_value", "n = 11: must be 10 at most"),
    "sampler": ({"sampler": "dpm_2m"}, "invalid_value", "sampler = 'dpm_2m': must be a sampler"),
    "eta": ({"eta": 0.5}, "invalid_value", "eta = 0.5: must be 0, dpmpp_2m has no eta"),
    "text seed": ({"seed": "x"}, "invalid_value", "seed = 'x': must be a whole number"),
    "last seed": ({"seed": 2**63 - 1, "n": 2}, "invalid_value", "must leave room for 2 images"),
    "lossless": ({"output_compression": 5}, "invalid_value", "png is lossless"),
    "stream n": (
        {"stream": True, "n": 2},
        "invalid_value",
        "n = 2: must be 1 in a streamed request",
    ),
    "stream url": (
        {"stream": True, "response_format": "url"},
        "invalid_value",
        "must be b64_json in a streamed request",
    ),
    "partial": ({"partial_images": 2}, "invalid_value", "must be 0 without stream"),
    "clip_skip": ({"clip_skip": 50}, "invalid_value", "clip_skip = 50: must be below 2"),
    "infinite": ({"guidance_scale": 1e999}, "invalid_value", "guidance_scale"),
    "no number": ({"eta": float("nan")}, "invalid_value", "eta = nan: must be a number"),
    "text number": ({"eta": "0"}, "invalid_value", "eta = '0': must be a number"),
    "switch as number": ({"eta": True}, "invalid_value", "eta = True: must be a number"),
    "fraction": ({"n": 1.0}, "invalid_value", "n = 1.0: must be a whole number"),
    "number as switch": ({"stream": 0}, "invalid_value", "stream = 0: must be true or false"),
    "text as switch": ({"exact": "true"}, "invalid_value", "exact = 'true': must be true or false"),
}


@pytest.mark.parametrize("fault", REJECTED)
def test_invalid_parameters_are_rejected_by_name(server, fault):
    fields, code, words = REJECTED[fault]
    answer = server.client.post(
        "/v1/images/generations",
        content=json.dumps({"prompt": "a dog", **fields}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["message"].endswith((".", "5 for its steps."))
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"


def test_error_of_the_client_names_the_parameter(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a dog", size="65x64")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "size")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a dog", background="transparent")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "background")


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="only tiny is served here"):
        client.images.generate(model="dall-e-3", prompt="a dog")


def test_models_are_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sdbatch"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


NOT_OBJECTS = {
    "empty": b"",
    "cut": b'{"prompt": "a", "prompt":',
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "half a character": b'{"prompt": "\\ud800"}',
    "deep": b"[" * 100_000,
    "long number": b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_body_that_is_not_a_json_object_is_rejected(server, body):
    headers = {"Content-Type": "application/json"}
    answer = server.client.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert error["message"].startswith("The body must be a JSON object")


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
@pytest.mark.parametrize("body", [b"", b'{"prompt": "a dog"}'])
def test_body_of_another_content_type_is_rejected(server, headers, body):
    answer = server.client.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 415
    assert "must be application/json" in answer.json()["error"]["message"]


def test_exact_image_equals_the_engines_and_others_differ_by_rounding(server, tiny_engine):
    values = {"prompt": "a dog", "seed": 21, "num_inference_steps": 6, "guidance_scale": 3.0}
    drawn = tiny_engine.submit(Request(**values, sampler="dpmpp_2m", height=64, width=64)).result()
    exact = server.post(**values, exact=True).json()["data"][0]
    quick = server.post(**values).json()["data"][0]
    assert np.array_equal(pixels(exact["b64_json"]), drawn.image)
    assert (exact["exact"], exact["lanes"]) == (True, 8)
    assert (quick["exact"], quick["lanes"]) == (False, 2)
    assert np.abs(pixels(quick["b64_json"]).astype(int) - drawn.image).max() <= 1


class DecodesAgain(FakeEngine):
    """Decodes every picture again."""

    def _draw(self, request):
        return replace(super()._draw(request), decoded_again=True)


def test_the_service_says_which_images_were_decoded_again(server, serving):
    assert server.post(prompt="a dog").json()["data"][0]["decoded_again"] is False
    again = serving(DecodesAgain())
    assert again.post(prompt="a dog").json()["data"][0]["decoded_again"] is True
    body = {"prompt": "a dog", "stream": True}
    with again.client.stream("POST", "/v1/images/generations", json=body) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line[:6] == "data: "]
    assert events[-1]["type"] == "image_generation.completed"
    assert events[-1]["decoded_again"] is True


def test_lanes_are_released_when_the_client_disconnects(server, tiny_engine):
    body = json.dumps({"prompt": "a dog", "num_inference_steps": 150, "size": "512x512"})
    host, port = server.url.removeprefix("http://").split(":")
    client = HTTPConnection(host, int(port))
    headers = {"Content-Type": "application/json"}
    client.request("POST", "/v1/images/generations", body, headers)
    server.wait_for_pending(1)
    client.close()
    server.wait_for_pending(0)
    ticks = tiny_engine.usage.ticks
    server.post(prompt="a dog", num_inference_steps=2)
    assert tiny_engine.usage.ticks - ticks < 20  # the 150 steps are not continued
