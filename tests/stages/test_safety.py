"""Images that are not safe for work: flagged, blank or dropped."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdbatch.batch.blocks import BlockStage, unpack
from sdbatch.batch.metrics import Metrics
from sdbatch.output.image_file import read_parameters
from sdbatch.stages.safety import ApplySafety, SafetyPolicy
from tests.fakes import FakeEngine
from tests.finished import SIDE, block, draw, encoding

PROMPTS = ("a red dog", "nude", "fail")


class Checking(FakeEngine):
    """Flags the prompt "nude", and enlarges its image as hires fix does."""

    def _draw(self, request):
        drawn = super()._draw(request)
        if request.prompt != "nude":
            return replace(drawn, nsfw=False, nsfw_scores=(-0.1, -0.2))
        enlarged = drawn.image.repeat(2, axis=0).repeat(3, axis=1)
        return replace(drawn, image=enlarged, nsfw=True, nsfw_scores=(-0.1, 0.025))


def drawn(policy):
    (block_,) = draw(block(PROMPTS), engine=Checking, image_format="png")
    stage = BlockStage(ApplySafety(SafetyPolicy(policy), encoding("png")), Metrics())
    return unpack(stage(block_)).to_pylist()


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_a_flagged_image_is_kept_with_its_scores():
    safe, flagged, failed = drawn("flag")
    assert (safe["nsfw"], flagged["nsfw"], failed["nsfw"]) == (False, True, None)
    assert flagged["nsfw_scores"] == pytest.approx([-0.1, 0.025])
    assert flagged["error"] is None
    assert pixels(flagged).any()


def test_a_blank_image_is_black_has_its_size_and_says_why():
    safe, flagged, _ = drawn("blank")
    assert pixels(flagged).shape == (2 * SIDE, 3 * SIDE, 3)
    assert not pixels(flagged).any()
    assert flagged["sha256"] == hashlib.sha256(flagged["image"]["bytes"]).hexdigest()
    assert read_parameters(flagged["image"]["bytes"])["prompt"] == "nude"
    assert (flagged["nsfw"], flagged["error"]) == (True, None)
    assert pixels(safe).any()


def test_a_dropped_image_is_a_failed_row_with_its_own_reason():
    safe, flagged, failed = drawn("drop")
    assert flagged["image"] is None
    assert flagged["error"] == "The safety checker flagged the image with a score of 0.025."
    assert [flagged[name] for name in ("nsfw", "nsfw_scores", "sha256")] == [None] * 3
    assert failed["error"] == "ValueError: this prompt cannot be drawn"
    assert safe["error"] is None
