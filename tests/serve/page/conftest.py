"""A real Chromium on the page of a real service, and what its user does."""

import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serve.conftest import PHOTO, SECONDS, file_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DESK = {"viewport": {"width": 1280, "height": 800}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}
expect.set_options(timeout=SECONDS * 1000)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/serve/page/" in item.path.as_posix():
            item.add_marker(
                pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
            )
            item.add_marker(
                pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
            )


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, serving):
    """Open pages, each in a browser of its own; at the end none may have had an error.

    It depends on `serving` so that pages are closed before their services, which wait for them.
    """
    contexts, errors = [], []

    def open_page(server, **options):
        context = browser.new_context(
            permissions=["clipboard-read", "clipboard-write"], **{**DESK, **options}
        )
        contexts.append(context)
        page = context.new_page()
        page.urls = []
        page.on("request", lambda request: page.urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if is_error(line) else None)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def is_error(line):
    """Tell whether a line of the console is an error; error responses are written there too."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


@pytest.fixture
def page(open_page, server):
    """The page of the service with the tiny model."""
    return ready(open_page(server))


def ready(page):
    """Return the page once it knows the model."""
    expect(page.locator("#draw")).to_be_enabled()
    return page


def fill(page, prompt, **values):
    page.fill("#prompt", prompt)
    for name, value in values.items():
        page.fill(f"#{name}", str(value))


def begin(page, prompt="a dog", **values):
    """Fill the form in and draw, by the keyboard."""
    fill(page, prompt, **values)
    page.keyboard.press("Control+Enter")


def draw(page, prompt="a dog", **values):
    """Draw, wait for the end, and return the seed of the picture that is shown."""
    begin(page, prompt, **values)
    expect(page.locator("#status")).to_have_text(re.compile(r"drawn in .* s\.$", re.I))
    return seed(page)


def seed(page):
    """Return the seed of the picture that is shown."""
    return int(re.search(r"seed (\d+)", page.text_content("#values"))[1])


def pictures(page):
    """Return the pictures in the list."""
    return page.locator("#history li")


def pixels(page):
    """Return the image that the page shows, (H, W, 3)."""
    height, width, values = page.evaluate(
        "async () => { const image = document.getElementById('image'); await image.decode();"
        "const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "return [canvas.height, canvas.width,"
        "Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)]; }"
    )
    return np.array(values, np.uint8).reshape(height, width, 4)[:, :, :3]


def is_in_sight(page, selector):
    """Tell whether all of an element is in the window, and nothing is over its middle."""
    return page.evaluate(
        "(selector) => { const element = document.querySelector(selector);"
        "const box = element.getBoundingClientRect();"
        "const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);"
        "return box.width > 0 && box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight"
        " && box.right <= innerWidth && (element === top || element.contains(top)); }",
        selector,
    )


@pytest.fixture
def picture_page(open_page, serving, recorder):
    """The page of a service that records its requests, with a picture to start from."""
    page = ready(open_page(serving(recorder)))
    choose(page, file_of(PHOTO))
    return page


def choose(page, file):
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": file})
    expect(page.locator("#picture")).to_be_visible()


def send(page, event, file=None, mime="image/png", text=None, target="document"):
    """Drop or paste a file, a text, or both."""
    page.evaluate(
        "([name, bytes, mime, text, target]) => { const data = new DataTransfer();"
        "if (bytes) data.items.add(new File([new Uint8Array(bytes)], 'a', {type: mime}));"
        "if (text) data.items.add(text, 'text/plain');"
        "const kind = name === 'drop' ? DragEvent : ClipboardEvent;"
        "const where = target === 'document' ? document : document.querySelector(target);"
        "where.dispatchEvent(new kind(name, {dataTransfer: data, clipboardData: data,"
        "bubbles: true, cancelable: true})); }",
        [event, file and list(file), mime, text, target],
    )
