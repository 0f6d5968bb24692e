"""The page at /, in a real Chromium."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import expect

from sdbatch.job import parse
from sdbatch.serve.drawer import Drawer
from sdbatch.stages.safety import SafetyPolicy
from tests.serve.conftest import LEFT, PHOTO, SECONDS, Server, file_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
expect.set_options(timeout=SECONDS * 1000)
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page of the service, with its network requests and its errors."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.urls, page.errors = [], []
    page.on("request", lambda request: page.urls.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda line: page.errors.append(line.text) if line.type == "error" else None)
    page.goto(server.url)
    expect(page.locator("#draw")).to_be_enabled()
    yield page
    context.close()


def draw(page, prompt, **values):
    page.fill("#prompt", prompt)
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.keyboard.press("Control+Enter")
    status = page.locator("#status")
    expect(status).to_have_text(re.compile("^Seed .* s, "))
    return status.text_content()


def pixels(page):
    """Return the image that the page shows, (H, W, 3)."""
    values = page.evaluate(
        "async () => { const image = document.getElementById('image'); await image.decode();"
        "const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data); }"
    )
    return np.array(values, np.uint8).reshape(64, 64, 4)[:, :, :3]


def test_page_loads_nothing_from_other_machines(page, server):
    draw(page, "a red dog")
    assert [url for url in page.urls if not url.startswith((server.url, "data:", "blob:"))] == []
    assert page.errors == []


def test_page_shows_the_jobs_own_values(page):
    assert page.input_value("#num_inference_steps") == "4"
    assert page.input_value("#guidance_scale") == "5"
    assert page.input_value("#sampler") == "dpmpp_2m"
    assert page.text_content("#model") == "tiny"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_page_and_api_draw_the_same_image(page, server):
    status = draw(page, "a red dog", seed=2**62 + 1)  # more than JavaScript's numbers hold
    assert f"Seed {2**62 + 1}," in status
    answer = server.post(prompt="a red dog", seed=2**62 + 1).json()["data"][0]
    ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))))
    assert np.array_equal(pixels(page), ours)


def test_page_shows_previews_and_progress_while_it_draws(page):
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => window.seen.push("
        "document.getElementById('status').textContent)).observe("
        "document.getElementById('status'), {childList: true}); window.pictures = new Set();"
        "new MutationObserver(() => window.pictures.add(document.getElementById('image').src))"
        ".observe(document.getElementById('image'), {attributes: true}); }"
    )
    draw(page, "a red dog", num_inference_steps=30)
    seen = page.evaluate("window.seen")
    assert "Step 30 of 30" in seen
    assert len(page.evaluate("[...window.pictures]")) == 4  # three previews and the image


def test_seed_changes_unless_it_is_kept(page):
    first = draw(page, "a dog")
    second = draw(page, "a dog")
    assert first.split(",")[0] != second.split(",")[0]
    page.check("#lock")
    assert draw(page, "a dog").split(",")[0] == second.split(",")[0]


def test_history_shows_an_image_again_and_its_values_can_be_used(page):
    draw(page, "a dog")
    first = pixels(page)
    draw(page, "a cat", num_inference_steps=6)
    assert page.locator("#history li").count() == 2
    page.locator("#history button").nth(1).click()
    assert np.array_equal(pixels(page), first)
    page.click("#again")
    assert page.input_value("#prompt") == "a dog"
    assert page.input_value("#num_inference_steps") == "4"
    assert page.is_checked("#lock")


def test_copied_job_file_describes_the_same_image(page):
    status = draw(page, "a 'red' dog: \"big\"\nline two")
    page.click("#copy")
    page.wait_for_selector("#job:not([hidden])")
    text = page.evaluate("navigator.clipboard.readText()")
    job = parse(yaml.safe_load(text))
    [row] = job.prompts.rows
    assert row["prompt"] == "a 'red' dog: \"big\"\nline two"
    assert f"Seed {row['seed']}," in status


def test_image_is_downloaded_under_its_seed(page):
    draw(page, "a dog", seed=77)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "sdbatch-77.png"


def test_escape_cancels_and_releases_the_lanes(page, server):
    page.fill("#prompt", "a dog")
    page.fill("#num_inference_steps", "150")
    page.fill("#width", "512")
    page.fill("#height", "512")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Step"))
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    server.wait_for_pending(0)


def test_page_shows_the_text_of_an_error(page):
    page.fill("#prompt", "a dog")
    page.fill("#num_inference_steps", "151")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status.bad")
    assert page.text_content("#status") == "num_inference_steps = 151: must be 150 at most."


def test_page_asks_for_a_key_if_the_service_has_keys(browser, tiny_engine, monkeypatch):
    monkeypatch.setenv("SDBATCH_API_KEYS", "a-key-of-the-test-0")
    server = Server(Drawer(lambda: tiny_engine, SafetyPolicy("flag")))
    try:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#for-key:not([hidden])")
        page.fill("#key", "a-key-of-the-test-0")
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#draw")).to_be_enabled()
        assert "Seed" in draw(page, "a dog")
    finally:
        server.close()


@pytest.fixture
def picture_page(browser, serving, recorder):
    """The page of a service that records its requests, with a picture to start from."""
    page = browser.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(serving(recorder).url)
    expect(page.locator("#draw")).to_be_enabled()
    choose(page, file_of(PHOTO))
    yield page
    assert page.errors == []
    page.close()


def choose(page, file):
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": file})
    expect(page.locator("#picture")).to_be_visible()


def paint_left_half(page):
    """Paint the left half of the picture with a brush that is half as wide as it."""
    page.fill("#brush", "50")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    side = min(box["width"], box["height"])
    left = box["x"] + (box["width"] - side) / 2
    page.mouse.move(left + side / 4, box["y"] + 1)
    page.mouse.down()
    page.mouse.move(left + side / 4, box["y"] + side - 1)
    page.mouse.up()


def test_page_draws_from_a_picture_with_its_strength(picture_page, recorder):
    draw(picture_page, "a dog", strength=0.35)
    [request] = recorder.requests
    assert np.array_equal(request.inputs["image"], PHOTO)
    assert (request.strength, request.prompt) == (0.35, "a dog")
    assert "mask" not in request.inputs
    assert np.array_equal(pixels(picture_page), 255 - PHOTO)
    assert picture_page.is_hidden("#copy")


def test_page_draws_anew_what_is_painted_until_it_is_cleared(picture_page, recorder):
    paint_left_half(picture_page)
    draw(picture_page, "a dog")
    picture_page.click("#clear")
    draw(picture_page, "a dog")
    painted, whole = recorder.requests
    assert ((painted.inputs["mask"] >= 128) == (LEFT >= 128)).mean() > 0.98
    assert "mask" not in whole.inputs
    picture_page.click("#remove")
    draw(picture_page, "a dog")
    assert recorder.requests[-1].inputs == {}


def test_page_keeps_the_shape_of_a_picture_and_can_draw_the_painted_part_alone(
    picture_page, recorder
):
    choose(picture_page, file_of(np.full((96, 192, 3), 90, np.uint8)))
    expect(picture_page.locator("#width")).to_have_value("88")  # about as many pixels as 64x64
    assert picture_page.input_value("#height") == "48"
    paint_left_half(picture_page)
    picture_page.check("#only_masked")
    draw(picture_page, "a dog")
    [request] = recorder.requests
    assert request.only_masked
    assert picture_page.evaluate("document.getElementById('image').naturalWidth") == 192


def test_an_image_can_be_the_picture_of_the_next(picture_page, recorder):
    draw(picture_page, "a dog")
    picture_page.click("#from")
    draw(picture_page, "a dog")
    assert np.array_equal(recorder.requests[1].inputs["image"], 255 - PHOTO)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_can_be_dropped_or_pasted(picture_page, recorder, event):
    picture_page.click("#remove")
    picture_page.evaluate(
        "([name, bytes]) => { const data = new DataTransfer();"
        "data.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'}));"
        "const kind = name === 'drop' ? DragEvent : ClipboardEvent;"
        "document.dispatchEvent(new kind(name, {dataTransfer: data, clipboardData: data})); }",
        [event, list(file_of(255 - PHOTO))],
    )
    expect(picture_page.locator("#picture")).to_be_visible()
    draw(picture_page, "a dog")
    assert np.array_equal(recorder.requests[0].inputs["image"], 255 - PHOTO)


def test_page_says_that_a_file_is_no_picture(picture_page):
    picture_page.set_input_files(
        "#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"<html>"}
    )
    expect(picture_page.locator("#status")).to_have_text(
        "This browser cannot read the picture. Save it as PNG or JPEG."
    )


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "desk"])
def test_page_fits_its_window_and_is_used_by_keyboard_alone(browser, server, size):
    page = browser.new_page(viewport=size)
    page.goto(server.url)
    expect(page.locator("#draw")).to_be_enabled()
    draw(page, "a dog " * 40)
    choose(page, file_of(PHOTO))
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('button, input:not([type=checkbox]), select, textarea')]"
        ".filter((element) => element.offsetParent && element.getBoundingClientRect().height < 44)"
        ".map((element) => element.id)"
    )
    assert small == []  # WCAG 2.2's enhanced target size
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    used = {"prompt", "negative_prompt", "seed", "sampler", "draw", "copy"}
    assert used | {"choose", "brush", "strength", "clear", "remove", "from"} <= reached
