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
from tests.serve.conftest import SECONDS, Server

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


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "desk"])
def test_page_fits_its_window_and_is_used_by_keyboard_alone(browser, server, size):
    page = browser.new_page(viewport=size)
    page.goto(server.url)
    expect(page.locator("#draw")).to_be_enabled()
    draw(page, "a dog " * 40)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('button, input:not([type=checkbox]), select, textarea')]"
        ".filter((element) => element.offsetParent && element.getBoundingClientRect().height < 44)"
        ".map((element) => element.id)"
    )
    assert small == []  # WCAG 2.2's enhanced target size
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "negative_prompt", "seed", "sampler", "draw", "copy"} <= reached
