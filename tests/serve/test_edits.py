"""Edits and variations as OpenAI's own client sends them."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import openai
import pytest

from sdbatch.engine.request import Request
from sdbatch.inputs.prepare import prepare
from sdbatch.serve import bodies, queue
from sdbatch.serve.drawer import DrawRequest
from sdbatch.serve.requests import ImageRequest
from tests.serve.conftest import (
    ENCODING,
    LEFT,
    PHOTO,
    PausedEngine,
    Recorder,
    file_of,
    pixels_of,
)

MASK = file_of(np.dstack([PHOTO, 255 - LEFT]))  # its left half is transparent
PICTURE = file_of(PHOTO)


@pytest.fixture
def client(recording):
    with openai.OpenAI(base_url=f"{recording.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server, path="/v1/images/edits", files=None, **fields):
    files = {"image": PICTURE} if files is None else files
    return server.client.post(path, data={"prompt": "a dog", **fields}, files=files)


def test_edit_is_drawn_from_its_picture_with_the_jobs_strength(client, recorder):
    answer = client.images.edit(
        image=PICTURE, prompt="a dog", n=2, extra_body={"seed": 5, "guidance_scale": 2.5}
    )
    assert [image.seed for image in answer.data] == [5, 6]
    assert np.array_equal(pixels_of(answer.data[0].b64_json), 255 - PHOTO)
    first, second = recorder.requests
    assert (first.prompt, first.strength, first.guidance_scale) == ("a dog", 0.8, 2.5)
    assert first.inputs["image"] is second.inputs["image"]


def test_transparent_parts_of_the_mask_are_drawn_anew(client):
    answer = client.images.edit(image=PICTURE, mask=MASK, prompt="a dog")
    pixels = pixels_of(answer.data[0].b64_json)
    assert np.array_equal(pixels[:, :32], 255 - PHOTO[:, :32])
    assert np.array_equal(pixels[:, 32:], PHOTO[:, 32:])


def test_transparent_parts_of_the_picture_are_its_mask_without_another(client, recorder):
    client.images.edit(image=MASK, prompt="a dog")
    client.images.edit(image=MASK, prompt="a dog", extra_body={"mask_from_alpha": False})
    masked, whole = recorder.requests
    assert np.array_equal(masked.inputs["mask"] >= 128, LEFT >= 128)
    assert "mask" not in whole.inputs


def test_fields_of_a_form_are_read_as_their_types(client, recorder):
    answer = client.images.edit(
        image=PICTURE,
        prompt="12",
        size="72x80",
        output_format="webp",
        response_format="url",
        extra_body={"only_masked": False, "mask_blur": 3, "sampler": "euler", "exact": True},
    )
    assert answer.data[0].url.endswith(".webp")
    assert answer.size == "72x80"
    [request] = recorder.requests
    assert (request.prompt, request.sampler, request.mask_blur) == ("12", "euler", 3)
    assert request.inputs["image"].shape == (80, 72, 3)


def test_edit_is_streamed_with_previews(client):
    stream = client.images.edit(
        image=PICTURE, mask=MASK, prompt="a dog", stream=True, partial_images=1
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    for event in events:
        assert np.array_equal(pixels_of(event.b64_json)[:, 32:], PHOTO[:, 32:])


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # by OpenAI
def test_variations_are_drawn_without_a_prompt(client, recorder):
    answer = client.images.create_variation(image=PICTURE, n=2, size="64x64")
    assert len(answer.data) == 2
    assert {request.prompt for request in recorder.requests} == {""}
    assert np.array_equal(recorder.requests[0].inputs["image"], PHOTO)


REJECTED = {
    "no picture": ({}, {"mask": MASK}, "image", "image = nothing: must be given"),
    "several": (
        {},
        [("image[]", PICTURE), ("image[]", PICTURE)],
        "image",
        "image = several files: must be one",
    ),
    "text": ({"image": "a.png"}, {"mask": MASK}, "image", "image = text: must be a file"),
    "not a picture": ({}, {"image": b"<html>"}, "image", "image = "),
    "mask": ({}, {"image": PICTURE, "mask": b"<html>"}, "mask", "mask = "),
    "opaque mask": (
        {},
        {"image": PICTURE, "mask": PICTURE},
        "mask",
        "mask = a picture without transparent parts: what is drawn anew must be transparent",
    ),
    "unknown file": ({}, {"image": PICTURE, "images": PICTURE}, "images", "unknown parameter"),
    "unknown": ({"guidance": "3"}, None, "guidance", "guidance: unknown parameter"),
    "quality": ({"quality": "high"}, None, "quality", "quality = 'high': must be auto"),
    "twice": ({"n": ["1", "2"]}, None, "n", "n = two values: must be given once"),
    "number": ({"n": "two"}, None, "n", "n = 'two': must be a whole number"),
    "zeros": ({"n": "02"}, None, "n", "n = '02': must be a whole number"),
    "fraction": ({"n": "1.5"}, None, "n", "n = 1.5: must be a whole number"),
    "switch": ({"stream": "1"}, None, "stream", "stream = 1: must be true or false"),
    "width": ({"width": "65"}, None, "width", "must be a multiple of 8. Nearest: 64"),
    "large": ({"size": "2048x1024"}, None, "size", "must have 1048576 pixels at most"),
    "strength": ({"strength": "1.5"}, None, "strength", "strength = 1.5"),
}


@pytest.mark.parametrize("fault", REJECTED)
def test_invalid_forms_are_rejected_by_name(recording, fault):
    fields, files, param, words = REJECTED[fault]
    answer = post(recording, files=files, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_variation_has_no_mask(recording):
    answer = post(recording, "/v1/images/variations", {"image": PICTURE, "mask": MASK})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("mask: unknown parameter")


@pytest.mark.parametrize("path", ["edits", "variations"])
def test_body_of_another_content_type_is_rejected(recording, path):
    answer = recording.post(f"/v1/images/{path}", prompt="a dog")
    assert answer.status_code == 415
    assert "must be multipart/form-data" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"--x\r\n", b"--x\r\nno header\r\n\r\n--x--"])
@pytest.mark.parametrize("boundary", ["; boundary=x", ""])
def test_broken_form_is_rejected(recording, content, boundary):
    headers = {"Content-Type": f"multipart/form-data{boundary}"}
    answer = recording.client.post("/v1/images/edits", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_long_job_can_be_an_edit_and_stores_no_picture(serving):
    engine = PausedEngine()
    server = serving(engine)
    begun = post(server, "/v1/images/jobs", {"image": PICTURE, "mask": MASK})
    assert begun.status_code == 202
    engine.wait_for(waiting=1)
    [job] = server.service.jobs._running.values()
    assert job.request.pictures_size > PHOTO.nbytes
    engine.draw_all()
    server.wait_for_pending(0)
    state = server.client.get(begun.json()["poll_url"]).json()
    pixels = pixels_of(state["result"]["data"][0]["b64_json"])
    assert np.array_equal(pixels[:, 32:], PHOTO[:, 32:])
    assert job.request.first.inputs == job.result.request.first.inputs == {}
    assert job.request.pictures_size == 0


def test_pictures_of_waiting_images_are_bounded_and_released(serving, monkeypatch):
    monkeypatch.setattr(queue, "MAX_PICTURE_BYTES", 2 * PHOTO.nbytes + 2 * len(PICTURE))
    engine = PausedEngine()
    server = serving(engine)
    for _ in range(2):
        assert post(server, "/v1/images/jobs").status_code == 202
    engine.wait_for(waiting=2)
    refused = post(server)
    assert refused.status_code == 503
    assert "Retry-After" in refused.headers
    engine.draw_all()
    server.wait_for_pending(0)
    assert post(server, "/v1/images/jobs").status_code == 202


def test_bodies_of_pictures_are_larger_and_bounded(recording, monkeypatch):
    monkeypatch.setattr(bodies, "MAX_PICTURE_BODY_BYTES", 600_000)
    assert post(recording, files={"image": bytes(500_000)}).status_code == 400
    refused = post(recording, files={"image": bytes(700_000)})
    assert refused.status_code == 413
    assert "600000 bytes" in refused.json()["error"]["message"]
    monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", 400_000)
    for _ in range(3):
        assert post(recording, files={"image": bytes(500_000)}).status_code == 429
    assert post(recording).status_code == 200  # what was received is not counted any more


def test_picture_is_hidden_where_the_image_is_not_safe(serving):
    class Unsafe(Recorder):
        def _draw(self, request):
            return replace(super()._draw(request), nsfw=True)

    server = serving(Unsafe(), policy="blank")
    answer = post(server, files={"image": PICTURE, "mask": MASK})
    assert not pixels_of(answer.json()["data"][0]["b64_json"]).any()


def test_exact_edit_equals_the_engines(server, tiny_engine):
    values = {"prompt": "a dog", "seed": 21, "num_inference_steps": 6, "guidance_scale": 3.0}
    request = Request(**values, height=64, width=64)
    prepared = prepare(request, PICTURE, file_of(LEFT))
    request = request.model_copy(update={"inputs": prepared.arrays})
    drawn = prepared.finish(tiny_engine.submit(request).result().image)
    files = {"image": PICTURE, "mask": MASK}
    answer = post(server, files=files, exact="true", **values).json()["data"][0]
    assert np.array_equal(pixels_of(answer["b64_json"]), drawn)
    assert np.array_equal(drawn[:, 32:], PHOTO[:, 32:])
    assert not np.array_equal(drawn[:, :32], PHOTO[:, :32])
    assert answer["exact"]


def test_strength_that_leaves_no_step_is_rejected_by_name(server):
    answer = post(server, strength="0.1", num_inference_steps="4")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "strength"
    assert "must leave a step" in error["message"]


def test_pictures_travel_once_to_the_process_that_draws():
    request = Request(prompt="a dog", height=64, width=64)
    image_request = ImageRequest((DrawRequest(request, ENCODING),))
    prepared = prepare(request, PICTURE)
    [sent] = image_request.with_pictures(prepared).draw_requests
    assert sent.hashes == {"image_sha256": hashlib.sha256(PICTURE).hexdigest()}
    received = pickle.loads(pickle.dumps(sent))
    assert np.array_equal(received.request.inputs["image"], PHOTO)
    assert received.prepared.arrays["image"] is received.request.inputs["image"]
