"""The page's limits and errors: known before sending, at their fields, in words for people."""

import re

import pytest
from playwright.sync_api import expect

from tests.serve.conftest import PHOTO, PausedEngine, file_of
from tests.serve.page.conftest import begin, choose, draw, pictures, ready, send

KEY = "a-key-of-the-test-0"


def sent(page):
    """Return how many drawings the page asked for."""
    return sum("/v1/images/" in url for url in page.urls)


def test_models_tell_the_limits_of_the_key_that_asks(serving, monkeypatch, tmp_path):
    path = tmp_path / "keys.yaml"
    other = "another-key-of-the-test"
    path.write_text(
        f"small: {{key: {other}, limits: {{images: 4, num_inference_steps: 20,"
        f" images_per_minute: 3}}}}\n"
    )
    monkeypatch.setenv("SDBATCH_API_KEYS", KEY)
    server = serving(serve={"keys": str(path), "queue": 7})

    def limits(key, path):
        answer = server.client.get(path, headers={"Authorization": f"Bearer {key}"}).json()
        return (answer["data"][0] if "data" in answer else answer)["limits"]

    own = limits(KEY, "/v1/models")
    assert own["num_inference_steps"] == {"minimum": 1, "maximum": 150}
    assert own["n"] == {"minimum": 1, "maximum": 4}  # the share of one of two keys in the queue
    assert own["pixels"] == {"maximum": 1024 * 1024}
    assert own["prompt"] == {"max_length": 4000}
    assert own["width"] == {"minimum": 8, "maximum": 4096, "multiple_of": 8}
    assert own["seed"] == {"minimum": 0, "maximum": 2**63 - 1}
    assert "images_per_minute" not in own
    small = limits(other, "/v1/models/tiny")
    assert small["num_inference_steps"]["maximum"] == 20
    assert small["n"]["maximum"] == 3
    assert small["images_per_minute"] == {"maximum": 3}


def test_models_tell_the_jobs_defaults(server):
    [model] = server.client.get("/v1/models").json()["data"]
    assert model["defaults"]["num_inference_steps"] == 4
    assert model["defaults"]["width"] == 64
    assert "seed" not in model["defaults"]  # random, unless it is given
    assert model["samplers"]["dpmpp_2m"] == "DPM++ 2M"


def test_limits_are_told_before_anything_is_sent(page):
    assert page.text_content("#num_inference_steps-help") == "up to 150"
    assert page.get_attribute("#num_inference_steps", "max") == "150"
    assert page.text_content("#n-help") == "up to 10 at once"
    assert "1,048,576, as 1024" in page.text_content("#size-help")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_inference_steps", "151", "Steps must be from 1 to 150."),
        ("num_inference_steps", "", "Steps must be a number from 1 to 150."),
        ("num_inference_steps", "2.5", "Steps must be a whole number."),
        ("n", "11", "Pictures must be from 1 to 10."),
        ("guidance_scale", "0", "Guidance must be from 1 to 1,000."),
        ("width", "100", "Width must be a multiple of 8, such as 96 or 104."),
        ("height", "5000", "Height must be from 8 to 4,096."),
        ("seed", "-1", "Seed must be a whole number from 0 to 9,223,372,036,854,775,807."),
        ("seed", str(2**63), "Seed must be a whole number from 0 to 9,223,372,036,854,775,807."),
        (
            "prompt",
            "😀" * 4001,
            "The text has 4,001 characters, and at most 4,000 are read. Shorten it.",
        ),
    ],
)
def test_a_value_beyond_a_limit_is_told_at_its_field_and_not_sent(page, name, value, text):
    page.fill(f"#{name}", value)
    page.click("#draw")
    expect(page.locator(f"#{name}-error")).to_have_text(text)
    assert page.text_content("#status") == text
    assert page.get_attribute(f"#{name}", "aria-invalid") == "true"
    assert f"{name}-error" in page.get_attribute(f"#{name}", "aria-describedby")
    assert page.evaluate("document.activeElement.id") == name
    assert sent(page) == 0
    page.fill(f"#{name}", "8")
    expect(page.locator(f"#{name}-error")).to_be_hidden()
    draw(page)


def test_a_prompt_of_the_greatest_length_is_drawn(page):
    draw(page, "😀" * 4000)  # as many characters, and twice as many of JavaScript's
    assert sent(page) == 1


def test_a_size_of_too_many_pixels_is_told_with_one_that_can_be_drawn(page):
    begin(page, width=2000, height=2000)
    expect(page.locator("#size-error")).to_have_text(
        "The picture is too large: width times height may be up to 1,048,576, so at this width "
        "the height may be up to 520."
    )
    assert sent(page) == 0
    page.fill("#height", "520")
    expect(page.locator("#size-error")).to_be_hidden()
    assert page.get_attribute("#width", "aria-invalid") is None


def test_all_wrong_fields_are_marked_at_once(page):
    begin(page, num_inference_steps=0, width=7, seed="x")
    assert page.text_content("#status") == "Please correct: Steps, Width, Seed."
    assert page.locator("[aria-invalid=true]").count() == 3


def test_wrong_fields_in_closed_settings_are_brought_into_sight(page):
    page.fill("#num_inference_steps", "0")
    page.evaluate("document.getElementById('settings').open = false")
    begin(page)
    expect(page.locator("#num_inference_steps-error")).to_be_visible()


@pytest.fixture
def old_page(open_page, server):
    """A page that knows other limits than the service has by now."""
    page = open_page(server)
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(
            body=route.fetch()
            .text()
            .replace('"maximum":150', '"maximum":900')
            .replace('"maximum":1048576', '"maximum":9999999')
        ),
    )
    page.reload()
    return ready(page)


@pytest.mark.parametrize(
    ("values", "field", "text"),
    [
        ({"num_inference_steps": 400}, "num_inference_steps", "Steps must be 150 at most."),
        ({"width": 2048, "height": 2048}, "size", "Size must have 1048576 pixels at most."),
    ],
)
def test_an_error_of_the_api_is_a_sentence_at_its_field(old_page, values, field, text):
    begin(old_page, **values)
    expect(old_page.locator(f"#{field}-error")).to_have_text(text)
    assert sent(old_page) == 1


def answer_with(page, status, error=None, headers=None, times=1):
    """Let the next drawings end with an error; `error` None: of a proxy, which sends HTML."""
    json = {"error": {"message": "", "type": "", "param": None, "code": None, **(error or {})}}
    page.route(
        re.compile("/v1/images/(generations|edits)"),
        lambda route: route.fulfill(
            status=status,
            headers=headers or {},
            **({"body": "<html>"} if error is None else {"json": json}),
        ),
        times=times,
    )


def test_all_faults_that_the_api_names_are_shown_at_their_fields(page):
    details = [
        {"message": "num_inference_steps = 4: must be 3 at most.", "param": "num_inference_steps"},
        {"message": "prompt = 'a: b': must be shorter.", "param": "prompt"},
        {"message": "clip_skip = 9: must be 2 at most.", "param": "clip_skip"},
    ]
    error = {"message": "3 faults.", "param": "num_inference_steps", "details": details}
    answer_with(page, 400, error)
    begin(page)
    expect(page.locator("#num_inference_steps-error")).to_have_text("Steps must be 3 at most.")
    expect(page.locator("#prompt-error")).to_have_text("What to draw must be shorter.")
    assert page.text_content("#status") == (
        "Please correct: Steps, What to draw. clip_skip = 9: must be 2 at most."
    )


def test_an_old_picture_does_not_stay_under_a_new_error(page):
    draw(page, "a cat")
    answer_with(page, 500, {"code": "internal"}, {"X-Request-ID": "abc-1"})
    begin(page, "a dog")
    expect(page.locator("#status")).to_have_text(
        "The service has a fault. Whoever runs it finds the reason in its log. Tell them this "
        "number: abc-1."
    )
    expect(page.locator("#image")).to_be_hidden()
    expect(page.locator("#caption")).to_be_hidden()
    expect(page.locator("#tools")).to_be_hidden()
    assert page.text_content("#empty") == "No picture was drawn."
    assert page.locator("#history li[aria-selected=true]").count() == 0
    pictures(page).click()  # it is still in the list
    expect(page.locator("#title")).to_have_text("a cat")


def test_an_old_picture_does_not_stay_while_a_new_one_is_drawn(open_page, serving):
    engine = PausedEngine()
    page = ready(open_page(serving(engine)))
    begin(page, "a cat")
    engine.wait_for(waiting=1)
    engine.draw_all()
    expect(page.locator("#title")).to_have_text("a cat")
    begin(page, "a dog")
    engine.wait_for(waiting=1)
    expect(page.locator("#image")).to_be_hidden()
    expect(page.locator("#title")).to_be_hidden()


def test_a_limit_by_the_minute_says_when_and_then_draws(open_page, serving):
    server = serving(serve={"limits": {"images_per_minute": 60}})
    page = ready(open_page(server))
    assert page.text_content("#n-help") == "up to 10 at once, 60 a minute"
    for _ in range(6):
        assert server.post(prompt="a dog", n=10).status_code == 200
    begin(page)
    expect(page.locator("#status")).to_have_text(
        "This key has drawn all the pictures that it may draw in a minute."
    )
    expect(page.locator("#retry")).to_be_visible()
    expect(page.locator("#retry")).to_be_enabled()  # when the time is up
    assert page.text_content("#countdown") == "You can try again now."
    page.click("#retry")
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
    expect(page.locator("#retry")).to_be_hidden()


def test_a_full_queue_says_when_and_counts_down(open_page, serving):
    engine = PausedEngine()
    server = serving(engine, serve={"queue": 1})
    page = open_page(server)
    page.clock.install()
    page.reload()
    ready(page)
    begin(page, "a cat")
    engine.wait_for(waiting=1)
    second = page.context.new_page()
    second.clock.install()
    second.goto(server.url)
    ready(second)
    begin(second)
    expect(second.locator("#status")).to_have_text("Too many pictures are waiting.")
    expect(second.locator("#countdown")).to_have_text(re.compile(r"^Try again in [45] s\.$"))
    expect(second.locator("#retry")).to_be_disabled()
    second.clock.run_for(2000)
    expect(second.locator("#countdown")).to_have_text(re.compile(r"^Try again in [23] s\.$"))
    engine.draw_all()
    server.wait_for_pending(0)
    second.clock.run_for(5000)
    expect(second.locator("#retry")).to_be_enabled()
    second.click("#retry")
    engine.wait_for(waiting=1)
    engine.draw_all()
    expect(second.locator("#status")).to_have_text(re.compile("^Drawn in"))


def test_of_several_pictures_those_that_failed_alone_are_drawn_again(page):
    answer_with(page, 503, {"code": "overloaded"}, {"Retry-After": "1"})
    begin(page, n=3)
    expect(page.locator("#status")).to_have_text(re.compile("^2 of 3 were drawn. Too many"))
    expect(pictures(page)).to_have_count(2)
    expect(page.locator("#image")).to_be_visible()
    expect(page.locator("#retry")).to_be_enabled()
    page.click("#retry")
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
    expect(pictures(page)).to_have_count(3)


@pytest.mark.parametrize(
    ("status", "error", "text", "retry"),
    [
        (429, {"code": "queue_share"}, "As many pictures of yours are waiting", True),
        (503, {"code": "stopping"}, "The service is being stopped or restarted.", True),
        (503, {"code": "replica_lost"}, "The machine that drew this picture has failed.", True),
        (503, {"code": "front_lost"}, "The service is being restarted.", True),
        (503, {"code": "new_word"}, "The service cannot draw at the moment.", True),
        (502, None, "The service cannot be reached at the moment.", True),
        (504, {"code": "timeout"}, "This took longer than the service allows. Try fewer", True),
        (408, {}, "The connection was too slow, and the service stopped waiting.", True),
        (413, None, "The picture's file is too large. Choose a smaller one.", False),
        (403, {"code": "metrics_only"}, "This key may not do that.", False),
        (418, None, "The service answered with the error 418.", False),
    ],
)
def test_errors_are_sentences_for_people(page, status, error, text, retry):
    answer_with(page, status, error)
    begin(page)
    expect(page.locator("#status")).to_have_text(re.compile(re.escape(text)))
    assert page.is_visible("#retry") == retry


def test_an_error_in_the_stream_is_a_sentence_too(open_page, serving):
    page = ready(open_page(serving()))
    begin(page, "fail")
    expect(page.locator("#status")).to_have_text(re.compile("this prompt cannot be drawn"))
    assert page.text_content("#empty") == "No picture was drawn."


def test_a_stream_that_ends_early_is_told_and_can_be_drawn_again(page):
    page.route(
        "**/v1/images/generations",
        lambda route: route.fulfill(body=': {"step": 1, "steps": 4}\n\n'),
        times=1,
    )
    begin(page)
    expect(page.locator("#status")).to_have_text(
        "The connection was lost before the picture was finished."
    )
    page.click("#retry")
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))


def test_a_lost_connection_is_told_and_can_be_tried_again(page):
    page.context.set_offline(True)
    begin(page)
    expect(page.locator("#status")).to_have_text(re.compile("^There is no connection"))
    page.context.set_offline(False)
    page.click("#retry")
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))


def test_a_page_whose_service_does_not_answer_can_be_started_again(open_page, server):
    page = open_page(server)
    page.route("**/v1/models", lambda route: route.abort(), times=1)
    page.reload()
    expect(page.locator("#status")).to_have_text(re.compile("^There is no connection"))
    expect(page.locator("#draw")).to_be_disabled()
    page.click("#retry")
    ready(page)
    draw(page)


@pytest.fixture
def locked(serving, monkeypatch):
    """A service with a key."""
    monkeypatch.setenv("SDBATCH_API_KEYS", KEY)
    return serving()


def enter_key(page, key):
    page.fill("#key", key)
    page.press("#key", "Enter")


def test_page_asks_for_a_key_and_keeps_it_over_a_reload(open_page, locked):
    page = open_page(locked)
    expect(page.locator("#for-key")).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    assert page.text_content("#status") == "This service needs a key."
    enter_key(page, f" {KEY}\n")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#for-key")).to_be_hidden()
    draw(page)
    page.reload()
    ready(page)
    expect(page.locator("#for-key")).to_be_hidden()


def test_the_error_of_a_wrong_key_does_not_stay_after_the_right_one(open_page, locked):
    page = open_page(locked)
    enter_key(page, "not the key")
    expect(page.locator("#key-error")).to_have_text(
        "A key has only letters, digits and signs without accents."
    )
    enter_key(page, "another-key-of-the-test")
    expect(page.locator("#key-error")).to_have_text(re.compile("does not know this key"))
    assert page.locator("#news.bad").count() == 1
    enter_key(page, KEY)
    ready(page)
    expect(page.locator("#key-error")).to_be_hidden()
    assert page.text_content("#status") == "Ready."
    assert page.locator("#news.bad").count() == 0


def test_a_revoked_key_is_asked_for_and_the_form_stays(open_page, locked):
    page = open_page(locked)
    enter_key(page, KEY)
    ready(page)
    page.route(
        "**/v1/images/generations",
        lambda route: route.continue_(
            headers={**route.request.headers, "authorization": "Bearer a-revoked-key-000"}
        ),
        times=1,
    )
    begin(page, "a cat")
    expect(page.locator("#key-error")).to_have_text(re.compile("no longer accepts it"))
    expect(page.locator("#key")).to_be_focused()
    enter_key(page, KEY)
    expect(page.locator("#for-key")).to_be_hidden()
    assert page.input_value("#prompt") == "a cat"
    draw(page, "a cat")


def test_page_says_that_a_file_is_no_picture(page):
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"<html>"})
    expect(page.locator("#status")).to_have_text(
        "This browser cannot read the picture. Save it as PNG or JPEG."
    )
    send(page, "drop", b"words", mime="text/plain")
    expect(page.locator("#status")).to_have_text("That is not a picture's file.")


def test_a_picture_that_the_service_refuses_is_marked(page):
    choose(page, file_of(PHOTO))
    answer_with(page, 400, {"message": "image = 9x9: must be larger.", "param": "image"})
    begin(page)
    expect(page.locator("#canvas-error")).to_have_text("Picture must be larger.")
    draw(page)
    assert page.is_hidden("#canvas-error")
