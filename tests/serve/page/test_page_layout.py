"""The page in a browser of a desk and of a phone, light and dark: all that matters is in sight."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serve.conftest import PHOTO, PausedEngine, file_of
from tests.serve.page.conftest import DESK, PHONE, begin, choose, draw, is_in_sight, pictures, ready

SCREENS = pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
SMALL = {**PHONE, "viewport": {"width": 360, "height": 640}}


@pytest.mark.parametrize("screen", [DESK, PHONE, SMALL], ids=["desk", "phone", "small"])
def test_buttons_progress_and_picture_are_in_sight_while_it_is_drawn(open_page, serving, screen):
    """With the first picture, and with later ones."""
    engine = PausedEngine()
    page = ready(open_page(serving(engine), **screen))
    assert is_in_sight(page, "#draw")
    for drawn in range(3):
        page.fill("#prompt", "a dog")
        page.click("#draw")
        engine.wait_for(waiting=1)
        engine.waiting[0][2].step(1, 4)
        expect(page.locator("#steps")).to_have_text("Step 1 of 4")
        wait_until_in_sight(page, "#frame")
        for name in ("#cancel", "#draw", "#steps"):
            assert is_in_sight(page, name), (drawn, name)
        engine.draw_all()
        expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
        wait_until_in_sight(page, "#image")


@SCREENS
def test_the_chosen_picture_comes_into_sight_from_the_end_of_the_list(open_page, server, screen):
    page = ready(open_page(server, **screen))
    page.evaluate("document.getElementById('settings').open = true")
    for _ in range(3):
        draw(page, n=10)
    pictures(page).last.scroll_into_view_if_needed()
    assert not is_in_sight(page, "#image")
    pictures(page).last.click()
    wait_until_in_sight(page, "#image")


def wait_until_in_sight(page, selector):
    """Wait for the end of a smooth scroll."""
    page.wait_for_function(
        "(selector) => { const box = document.querySelector(selector).getBoundingClientRect();"
        "const bar = document.getElementById('bar').getBoundingClientRect();"
        "const end = bar.left > 0 || box.left > bar.right ? innerHeight : bar.top;"
        "return box.height > 0 && box.top >= 0 && box.bottom <= end; }",
        arg=selector,
    )


@SCREENS
def test_draw_and_cancel_stay_in_sight_wherever_the_page_is_scrolled(open_page, server, screen):
    page = ready(open_page(server, **screen))
    page.evaluate("document.getElementById('settings').open = true")
    draw(page, n=10)
    draw(page, n=10)
    for selector in ("#exact", "#history", "#past-help", "h1", "#prompt"):
        page.locator(selector).scroll_into_view_if_needed()
        assert is_in_sight(page, "#draw")
        assert is_in_sight(page, "#cancel")


@SCREENS
@pytest.mark.parametrize("size", [(1024, 64), (64, 1024)], ids=["wide", "tall"])
def test_a_picture_of_any_shape_is_shown_whole(open_page, serving, screen, size):
    page = ready(open_page(serving(), **screen))
    width, height = size
    page.evaluate("document.getElementById('settings').open = true")
    draw(page, width=width, height=height)
    wait_until_in_sight(page, "#image")
    box = page.locator("#frame").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.01)


@SCREENS
def test_nothing_is_wider_than_the_window(open_page, server, screen):
    page = ready(open_page(server, **screen))
    page.evaluate("document.getElementById('settings').open = true")
    draw(page, "a dog " * 40)
    draw(page, "x" * 600)
    choose(page, file_of(PHOTO))
    page.click("#copy")
    expect(page.locator("#job")).to_be_visible()
    page.fill("#num_inference_steps", "999")
    begin(page)
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('body *')].filter((e) => e.offsetParent)"
        ".map((e) => e.getBoundingClientRect().right))"
    )
    assert widest <= screen["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= screen["viewport"]["width"]


@SCREENS
def test_every_target_is_large_enough_for_a_finger(open_page, server, screen):
    page = ready(open_page(server, **screen))
    page.evaluate("document.getElementById('settings').open = true")
    draw(page)
    choose(page, file_of(PHOTO))
    small = page.evaluate(
        "[...document.querySelectorAll('button, a, input:not([type=checkbox]), select, textarea,"
        "summary, label.check')].filter((e) => e.offsetParent"
        " && e.getBoundingClientRect().height < 44).map((e) => e.id || e.textContent)"
    )
    assert small == []  # WCAG 2.2's enhanced target size


@SCREENS
def test_page_is_used_by_keyboard_alone(open_page, server, screen):
    page = ready(open_page(server, **screen))
    draw(page)
    choose(page, file_of(PHOTO))
    if screen is PHONE:
        page.focus("summary")
        page.keyboard.press("Enter")
    page.focus("#prompt")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    used = {"prompt", "negative_prompt", "seed", "sampler", "draw", "copy", "n", "cancel"}
    assert used | {"choose", "brush", "strength", "clear", "remove", "from"} <= set(reached)
    assert reached.index("seed") < reached.index("draw") < reached.index("download")


CONTRAST = """() => {
  const FIELDS =
    "input:not([type=checkbox], [type=range]), select, textarea, button:not(.plain)";
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((value) => value / 255)
      .map((value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const back = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return luminance(colour);
    }
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.offsetParent || element.closest("[aria-disabled=true]")) continue;
    const style = getComputedStyle(element);
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (own && ratio(luminance(style.color), back(element)) < 4.5) low.push(element.id + " text");
    if (element.matches(FIELDS)
      && ratio(luminance(style.borderTopColor), back(element.parentElement)) < 3)
      low.push(element.id + " border");
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_fields_have_enough_contrast(open_page, server, scheme):
    """WCAG 2.2: 4.5 to 1 for texts, 3 to 1 for the borders of fields and buttons."""
    page = ready(open_page(server, color_scheme=scheme))
    draw(page)
    choose(page, file_of(PHOTO))
    page.fill("#num_inference_steps", "999")
    begin(page)
    expect(page.locator("#news.bad")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


def test_a_mask_can_be_painted_by_a_finger_and_the_page_scrolled_next_to_it(
    open_page, serving, recorder
):
    page = ready(open_page(serving(recorder), **PHONE))
    choose(page, file_of(np.full((512, 64, 3), 90, np.uint8)))  # tall
    box = page.locator("#canvas").bounding_box()
    assert box["height"] < PHONE["viewport"]["height"] / 2
    page.locator("#canvas").tap()
    draw(page)
    assert recorder.requests[0].inputs["mask"].any()


def test_a_long_prompt_grows_its_field_up_to_a_bound(page):
    before = page.locator("#prompt").bounding_box()["height"]
    page.fill("#prompt", "a dog\n" * 8)
    assert page.locator("#prompt").bounding_box()["height"] > before
    page.fill("#prompt", "a dog\n" * 100)
    assert page.locator("#prompt").bounding_box()["height"] < 400
