"""Images that are not safe for work: flagged, blank or dropped, and never taken for broken ones."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sdbatch import schema
from sdbatch.stages.draw import DrawImages
from tests.fakes import FakeEngine
from tests.finished import HereWatch, at_once, block, encoding

PROMPTS = ("a red dog", "nude", "fail")


class Checking(FakeEngine):
    """Flags the prompt "nude"."""

    def _draw(self, request):
        scores = (-0.1, 0.025) if request.prompt == "nude" else (-0.1, -0.2)
        return replace(super()._draw(request), nsfw=max(scores) > 0, nsfw_scores=scores)


def drawn(policy):
    stage = DrawImages(Checking, encoding("png"), HereWatch(), policy=policy)
    (finished,) = at_once(stage, [block(PROMPTS)])
    return schema.unpack(finished)[1].to_pylist()


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_a_flagged_image_is_kept_with_its_scores():
    safe, flagged, failed = drawn("flag")
    assert (safe["nsfw"], flagged["nsfw"], failed["nsfw"]) == (False, True, None)
    assert flagged["nsfw_scores"] == pytest.approx([-0.1, 0.025])
    assert flagged["error"] is None
    assert pixels(flagged).any()


def test_a_blank_image_is_black_and_says_why():
    safe, flagged, _ = drawn("blank")
    assert not pixels(flagged).any()
    assert (flagged["nsfw"], flagged["error"]) == (True, None)
    assert pixels(safe).any()


def test_a_dropped_image_is_a_failed_row_with_its_own_reason():
    safe, flagged, failed = drawn("drop")
    assert flagged["image"] is None
    assert flagged["error"] == "safety = nsfw by 0.025: dropped, as safety.policy says"
    assert failed["error"] == "ValueError: this prompt cannot be drawn"
    assert safe["error"] is None


def test_facts_of_a_shard_say_how_many_lanes_drew_it_and_how_its_engine_was_used():
    stage = DrawImages(FakeEngine, encoding(), HereWatch())
    (finished,) = at_once(stage, [block(("a", "fail", "b"))])
    facts = json.loads(schema.unpack(finished)[2])
    assert facts["lanes"] == {"2": 2}
    assert facts["engine"]["ticks"] == 3
    assert {"seconds", "idle_seconds", "rows", "filled", "shrunk"} <= facts["engine"].keys()
