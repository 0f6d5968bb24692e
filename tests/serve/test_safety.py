"""What the safety policy does to images and previews of single requests."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from sdbatch.engine.request import Drawn
from tests.fakes import FakeEngine


class FlaggedEngine(FakeEngine):
    """Draws what the safety checker flags."""

    def _draw(self, request):
        drawn = super()._draw(request)
        return Drawn(
            image=np.full_like(drawn.image, 200),
            prompt_tokens=1,
            prompt_truncated=False,
            lanes=2,
            nsfw=True,
            nsfw_scores=(-0.1, 0.05),
        )


def test_safety_policy_flags(serving):
    image = serving(FlaggedEngine(), "flag").post(prompt="a").json()["data"][0]
    assert (image["nsfw"], image["nsfw_scores"]) == (True, [-0.1, 0.05])


@pytest.mark.parametrize("previews", [0, 2])
def test_safety_policy_blanks_the_image_and_its_previews(serving, previews):
    server = serving(FlaggedEngine(), "blank")
    body = {"prompt": "a", "stream": True, "partial_images": previews, "num_inference_steps": 6}
    with server.client.stream("POST", "/v1/images/generations", json=body) as stream:
        sent = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    files = [base64.b64decode(json.loads(line)["b64_json"]) for line in sent]
    assert len(files) == previews + 1
    assert not any(np.asarray(Image.open(io.BytesIO(file))).any() for file in files)


def test_safety_policy_drops_with_openais_code(serving):
    answer = serving(FlaggedEngine(), "drop").post(prompt="a")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "content_policy_violation"
    assert "safety checker flagged the image with a score of 0.050" in error["message"]
