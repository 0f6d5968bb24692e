"""A Drawer says what it drew with, also for a Front that expects another version."""

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image

from sdbatch.serve.drawer import Drawer, DrawRequest, Version
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.sd1 import build_request
from tests.serve.conftest import ENCODING

OLD = Version(settings="old", defaults="", model="the-old-model", model_hash="1111222233334444")
NEW = Version(settings="new", defaults="", model="tiny", model_hash="0123456789abcdef")


def drawn_by(version, expected):
    """Return the image that a Drawer of `version` gives to a Front that expects another one."""
    drawer = Drawer(FakeEngine, SafetyPolicy("flag"), version=version)
    request = DrawRequest(build_request(), ENCODING, exact=True, version=expected)
    return asyncio.run(drawer.draw(request))


@pytest.mark.parametrize(
    ("version", "expected", "model"),
    [(None, None, "tiny"), (NEW, NEW, "tiny"), (OLD, None, "the-old-model")],
)
def test_an_image_of_the_expected_version_is_exact(version, expected, model):
    image = drawn_by(version, expected)
    assert image.facts.exact
    assert f"Model: {model}" in Image.open(io.BytesIO(image.file)).text["parameters"]


def test_during_an_update_the_file_names_the_model_that_drew_it():
    image = drawn_by(OLD, NEW)
    assert not image.facts.exact
    text = Image.open(io.BytesIO(image.file)).text["parameters"]
    assert "Model: the-old-model" in text
    assert f"Model hash: {OLD.model_hash[:10]}" in text


def test_other_defaults_of_the_job_change_no_request():
    other = replace(NEW, defaults="20 steps")
    assert drawn_by(NEW, other).facts.exact
    drawer = Drawer(FakeEngine, SafetyPolicy("flag"), version=NEW)
    assert asyncio.run(drawer.has_version(NEW))
    assert not asyncio.run(drawer.has_version(other))


def test_other_settings_of_the_same_model_are_not_exact():
    assert not drawn_by(NEW, replace(NEW, settings="another dtype")).facts.exact
