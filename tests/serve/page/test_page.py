"""The page at /: what it draws, from words and from pictures."""

import base64
import io
import re

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import expect

from sdbatch.job import parse
from tests.serve.conftest import LEFT, PHOTO, PausedEngine, file_of
from tests.serve.page.conftest import begin, choose, draw, fill, pictures, pixels, ready, seed, send
from tests.wait import wait_until


def test_page_loads_nothing_from_other_machines(page, server):
    draw(page, "a red dog")
    assert [url for url in page.urls if not url.startswith((server.url, "data:", "blob:"))] == []


def test_page_has_no_inline_script_and_its_policy_allows_none(server):
    answer = server.client.get("/")
    assert "unsafe-inline" not in answer.headers["content-security-policy"]
    assert re.findall(r"<style|<script(?! type=\"module\" src)| on\w+=| style=", answer.text) == []


def test_files_of_the_page_are_stored_for_good_and_the_page_is_asked_for_each_time(server):
    answer = server.client.get("/")
    assert answer.headers["cache-control"] == "no-cache"
    unchanged = server.client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    [path] = re.findall(r'src="(page/\w+/page\.js)"', answer.text)
    script = server.client.get(f"/{path}")
    assert "immutable" in script.headers["cache-control"]
    assert script.headers["content-type"].startswith("text/javascript")
    other = httpx.URL(f"{server.url}/page/{'0' * 16}/page.js")  # of another version
    assert server.client.get(other).status_code == 404
    assert server.client.head("/").status_code == 200


def test_page_shows_the_jobs_own_values(page):
    assert page.input_value("#num_inference_steps") == "4"
    assert page.input_value("#guidance_scale") == "5"
    assert page.input_value("#sampler") == "dpmpp_2m"
    assert page.locator("#sampler option:checked").text_content() == "DPM++ 2M"
    assert page.text_content("#model") == "tiny"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_page_and_api_draw_the_same_image(page, server):
    assert draw(page, "a red dog", seed=2**62 + 1) == 2**62 + 1  # JavaScript's numbers hold less
    answer = server.post(prompt="a red dog", seed=2**62 + 1).json()["data"][0]
    ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))))
    assert np.array_equal(pixels(page), ours)


def test_page_shows_previews_and_progress_while_it_draws(page):
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => window.seen.push("
        "document.getElementById('steps').textContent)).observe("
        "document.getElementById('steps'), {childList: true}); window.pictures = new Set();"
        "new MutationObserver(() => window.pictures.add(document.getElementById('image').src))"
        ".observe(document.getElementById('image'), {attributes: true, attributeFilter: ['src']});"
        "}"
    )
    draw(page, "a red dog", num_inference_steps=30)
    assert "Step 30 of 30" in page.evaluate("window.seen")
    pictures = page.evaluate("[...window.pictures].filter((url) => url.startsWith('blob:'))")
    assert len(pictures) == 4  # three previews and the image


def test_progress_is_announced_seldom_and_shown_always(open_page, serving):
    """A screen reader reads all that changes in a live region."""
    engine = PausedEngine()
    page = ready(open_page(serving(engine)))
    page.evaluate(
        "() => { window.said = []; new MutationObserver(() => window.said.push("
        "document.getElementById('status').textContent)).observe("
        "document.getElementById('status'), {childList: true}); }"
    )
    begin(page)
    engine.wait_for(waiting=1)
    [(_, _, follow)] = engine.waiting
    for step in range(1, 20):
        follow.step(step, 20)
    expect(page.locator("#steps")).to_have_text("Step 19 of 20")
    assert page.get_attribute("#progress", "value") == "0.95"
    engine.draw_all()
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
    assert page.evaluate("window.said.slice(0, -1)") == ["Waiting …", "Drawing."]
    assert page.locator("#steps").text_content() == ""


def test_seed_changes_unless_it_is_kept(page):
    first = draw(page)
    second = draw(page)
    assert first != second
    page.check("#lock")
    assert draw(page) == second


def test_several_pictures_are_drawn_at_once_with_seeds_that_count_up(page):
    draw(page, n=6, seed=100)
    assert page.text_content("#status").startswith("6 pictures drawn in")
    items = pictures(page)
    expect(items).to_have_count(6)
    seeds = []
    for i in range(6):
        items.nth(i).click()
        seeds.append(seed(page))
    assert seeds == [100, 101, 102, 103, 104, 105]


def test_several_pictures_leave_connections_for_other_tabs(open_page, serving):
    engine = PausedEngine()
    server = serving(engine)
    page = ready(open_page(server))
    begin(page, n=8)
    engine.wait_for(waiting=4)
    second = page.context.new_page()
    second.goto(server.url)
    ready(second)  # a browser opens six connections to a service
    assert len(engine.waiting) == 4
    expect(pictures(page)).to_have_count(8)
    engine.draw_all()
    engine.wait_for(waiting=4)
    expect(page.locator("#steps")).to_have_text(re.compile("^$|4 of 8 are drawn"))
    engine.draw_all()
    expect(page.locator("#status")).to_have_text(re.compile("^8 pictures drawn"))


def test_copied_job_file_describes_the_same_image(page):
    drawn = draw(page, "a 'red' dog: \"big\"\nline two")
    page.click("#copy")
    expect(page.locator("#job")).to_be_visible()
    text = page.evaluate("navigator.clipboard.readText()")
    job = parse(yaml.safe_load(text))
    [row] = job.prompts.rows
    assert row["prompt"] == "a 'red' dog: \"big\"\nline two"
    assert row["seed"] == drawn


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red dog, 'big'!", "a-red-dog-big-seed-77.png"),
        ("../ein Hünd: 犬", "ein-hünd-犬-seed-77.png"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-seed-77.png"),
        ("", "sdbatch-seed-77.png"),
    ],
)
def test_a_download_is_named_by_its_prompt_and_its_seed(page, prompt, name):
    draw(page, prompt, seed=77)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == name


@pytest.mark.parametrize("how", ["escape", "button"])
def test_cancelling_releases_the_lanes_and_shows_the_picture_from_before(open_page, serving, how):
    engine = PausedEngine()
    server = serving(engine)
    page = ready(open_page(server))
    begin(page, "a cat")
    engine.wait_for(waiting=1)
    engine.draw_all()
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
    begin(page, n=3)
    engine.wait_for(waiting=3)
    if how == "escape":
        page.keyboard.press("Escape")
    else:
        page.click("#cancel")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    engine.wait_for(waiting=3, cancelled=3)
    server.wait_for_pending(0)
    expect(pictures(page)).to_have_count(1)
    assert page.text_content("#title") == "a cat"
    expect(page.locator("#image")).to_be_visible()
    begin(page)
    engine.wait_for(waiting=4)


def test_keys_draw_once_however_long_they_are_held(open_page, serving):
    engine = PausedEngine()
    page = ready(open_page(serving(engine)))
    fill(page, "a dog")
    page.focus("#draw")
    page.keyboard.down("Enter")
    engine.wait_for(waiting=1)
    for _ in range(5):
        page.keyboard.down("Enter")  # repeats, as a key that is held
    page.keyboard.press("Meta+Enter")
    expect(pictures(page)).to_have_count(1)
    assert page.evaluate("document.activeElement.id") == "draw"
    assert engine.cancelled == 0
    assert len(engine.waiting) == 1


def paint_left_half(page):
    """Paint the left half of the picture with a brush that is half as wide as it."""
    page.fill("#brush", "50")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    side = min(box["width"], box["height"])
    page.mouse.move(box["x"] + side / 4, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + side / 4, box["y"] + side - 2)
    page.mouse.up()


def test_page_draws_from_a_picture_with_its_strength(picture_page, recorder):
    draw(picture_page, strength=0.35)
    [request] = recorder.requests
    assert np.array_equal(request.inputs["image"], PHOTO)
    assert (request.strength, request.prompt) == (0.35, "a dog")
    assert "mask" not in request.inputs
    assert np.array_equal(pixels(picture_page), 255 - PHOTO)
    assert picture_page.is_hidden("#copy")


def test_page_draws_anew_what_is_painted_until_it_is_cleared(picture_page, recorder):
    paint_left_half(picture_page)
    draw(picture_page)
    picture_page.click("#clear")
    draw(picture_page)
    painted, whole = recorder.requests
    assert ((painted.inputs["mask"] >= 128) == (LEFT >= 128)).mean() > 0.98
    assert "mask" not in whole.inputs
    picture_page.click("#remove")
    draw(picture_page)
    assert recorder.requests[-1].inputs == {}


def test_a_second_finger_does_not_continue_the_line_of_the_first(picture_page, recorder):
    """Nor does the mouse's second button paint."""
    picture_page.fill("#brush", "2")
    picture_page.evaluate(
        "() => { const canvas = document.getElementById('canvas');"
        "canvas.setPointerCapture = () => {}; canvas.hasPointerCapture = () => true;"
        "const box = canvas.getBoundingClientRect();"
        "const at = (name, x, values) => canvas.dispatchEvent(new PointerEvent(name, {clientX:"
        "box.x + x * box.width, clientY: box.y + box.height / 2, bubbles: true, ...values}));"
        "at('pointerdown', 0.1, {pointerId: 1, isPrimary: true, button: 0});"
        "at('pointerdown', 0.9, {pointerId: 2, isPrimary: false, button: 0});"
        "at('pointerdown', 0.9, {pointerId: 3, isPrimary: true, button: 2}); }"
    )
    draw(picture_page)
    mask = recorder.requests[0].inputs["mask"] >= 128
    assert mask[:, :16].any()
    assert not mask[:, 16:].any()


def test_page_keeps_the_shape_of_a_picture_and_can_draw_the_painted_part_alone(
    picture_page, recorder
):
    choose(picture_page, file_of(np.full((96, 192, 3), 90, np.uint8)))
    expect(picture_page.locator("#width")).to_have_value("88")  # about as many pixels as 64x64
    assert picture_page.input_value("#height") == "48"
    paint_left_half(picture_page)
    picture_page.check("#only_masked")
    draw(picture_page)
    [request] = recorder.requests
    assert request.only_masked
    assert picture_page.evaluate("document.getElementById('image').naturalWidth") == 192
    assert "192 \u00d7 96" in picture_page.text_content("#values")


def test_a_very_wide_picture_leaves_both_sides_within_their_limits(picture_page, recorder):
    choose(picture_page, file_of(np.full((8, 4000, 3), 90, np.uint8)))
    expect(picture_page.locator("#height")).to_have_value("8")
    draw(picture_page)
    assert recorder.requests[0].height == 8


def test_an_image_can_be_the_picture_of_the_next(picture_page, recorder):
    draw(picture_page)
    picture_page.click("#from")
    begin(picture_page)  # at once: it waits until the picture is read
    wait_until(lambda: len(recorder.requests) == 2)
    assert np.array_equal(recorder.requests[0].inputs["image"], PHOTO)
    assert np.array_equal(recorder.requests[1].inputs["image"], 255 - PHOTO)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_or_pasted(picture_page, recorder, event):
    picture_page.click("#remove")
    send(picture_page, event, file_of(255 - PHOTO))
    expect(picture_page.locator("#picture")).to_be_visible()
    draw(picture_page)
    assert np.array_equal(recorder.requests[0].inputs["image"], 255 - PHOTO)


def test_a_paste_of_text_with_a_picture_into_a_field_stays_text(page):
    """Office programs put a picture of the text next to the text."""
    send(page, "paste", file_of(PHOTO), text="a dog", target="#prompt")
    send(page, "paste", file_of(PHOTO), target="#prompt")  # a picture alone
    expect(page.locator("#picture")).to_be_visible()
    page.click("#remove")
    send(page, "paste", file_of(PHOTO), text="a dog", target="#prompt")
    draw(page)
    assert page.is_hidden("#picture")
