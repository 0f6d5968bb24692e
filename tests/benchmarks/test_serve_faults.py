"""What the campaign of kills takes for a broken promise."""

import asyncio
import base64
import io
import json

import httpx
import pytest
from PIL import Image


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "png")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")
AGAIN = {"retry-after": "1"}
LOST = {"error": {"type": "server_error", "code": "replica_lost"}}


def generation(file):
    return {"data": [{"b64_json": base64.b64encode(file).decode()}]}


@pytest.fixture
def outcome(script):
    """Send a request that is answered by these; return its outcome. The right image is red."""
    faults = script("serve_faults")

    def send(kind, *answers, proxy_is_gone=False):
        rest = iter(answers)

        def answer(_):
            found = next(rest)
            if isinstance(found, Exception):
                raise found
            return found

        async def run():
            transport = httpx.MockTransport(answer)
            async with httpx.AsyncClient(transport=transport, base_url="http://a") as http:
                pixels, kills = {5: faults.hash_of_pixels(RED)}, faults.Kills()
                kills.proxy_is_gone = proxy_is_gone
                await getattr(faults.Clients(http, kills, pixels), kind)(5)

        try:
            asyncio.run(run())
        except (faults.Retryable, faults.Broken, faults.BrokenPromise) as error:
            return f"{type(error).__name__}: {error}"
        return "image"

    return send


def test_the_right_image_and_a_retryable_error_are_kept_promises(outcome):
    assert outcome("single", httpx.Response(200, json=generation(RED))) == "image"
    answer = httpx.Response(503, headers=AGAIN, json=LOST)
    assert outcome("single", answer) == "Retryable: 503 replica_lost"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (httpx.Response(200, json=generation(BLUE)), "other pixels"),
        (httpx.Response(503, json=LOST), "503"),  # it does not say when
        (httpx.Response(500, headers=AGAIN), "500"),
        (httpx.ReadError("gone"), "the proxy was there"),
    ],
)
def test_any_other_answer_breaks_a_promise(outcome, answer, text):
    found = outcome("single", answer)
    assert found.startswith("BrokenPromise: ")
    assert text in found


def test_a_connection_may_break_if_the_proxy_was_killed(outcome):
    assert outcome("single", httpx.ReadError("gone"), proxy_is_gone=True).startswith("Broken: ")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"type": "image_generation.partial_image"}, "BrokenPromise: a stream ended without"),
        ({"error": {"type": "server_error", "code": "internal"}}, "BrokenPromise: a stream ended"),
        (LOST, "Retryable: replica_lost"),
        ({"type": "image_generation.completed", **generation(RED)["data"][0]}, "image"),
    ],
)
def test_a_stream_ends_with_its_image_or_a_retryable_error(outcome, event, expected):
    stream = httpx.Response(200, text=f"data: {json.dumps(event)}\n\n")
    assert outcome("stream", stream).startswith(expected)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (httpx.Response(200, json={"status": "completed", "result": generation(RED)}), "image"),
        (httpx.Response(200, json={"status": "failed"}), "BrokenPromise: a long job ended as"),
        (httpx.Response(404), "BrokenPromise: GET /poll: 404"),
    ],
)
def test_an_accepted_job_completes_also_after_an_error_of_its_poll(outcome, last, expected):
    accepted = httpx.Response(202, json={"poll_url": "/poll"})
    lost = httpx.Response(503, headers=AGAIN, json=LOST)
    assert outcome("long_job", accepted, lost, last).startswith(expected)
