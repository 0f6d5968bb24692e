"""What the page keeps: the pictures and the form, over a reload and over tabs."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serve.conftest import PausedEngine
from tests.serve.page.conftest import DESK, begin, draw, fill, pictures, pixels, ready, seed


def chosen(page):
    """Return the places of the options that are marked as chosen."""
    return page.evaluate(
        "[...document.querySelectorAll('#history li')]"
        ".flatMap((each, i) => each.getAttribute('aria-selected') === 'true' ? [i] : [])"
    )


def test_history_shows_an_image_again_and_its_values_can_be_used(page):
    draw(page)
    first = pixels(page)
    draw(page, "a cat", num_inference_steps=6)
    expect(pictures(page)).to_have_count(2)
    pictures(page).nth(1).click()
    assert np.array_equal(pixels(page), first)
    page.click("#again")
    assert page.input_value("#prompt") == "a dog"
    assert page.input_value("#num_inference_steps") == "4"
    assert page.is_checked("#lock")


def test_pictures_and_form_survive_a_reload(page):
    first = draw(page, "a cat", num_inference_steps=6)
    image = pixels(page)
    draw(page, "a dog")
    fill(page, "a horse", n=2, negative_prompt="a rider", width=72)
    page.select_option("#sampler", "euler")
    page.reload()
    ready(page)
    assert page.input_value("#prompt") == "a horse"
    assert page.input_value("#negative_prompt") == "a rider"
    assert [page.input_value(f"#{name}") for name in ("n", "width", "sampler")] == [
        "2",
        "72",
        "euler",
    ]
    expect(pictures(page)).to_have_count(2)
    expect(page.locator("#title")).to_have_text("a dog")
    assert chosen(page) == [0]
    pictures(page).nth(1).click()
    assert seed(page) == first
    assert np.array_equal(pixels(page), image)
    page.click("#copy")
    expect(page.locator("#job")).to_be_visible()
    page.click("#reset")
    assert [page.input_value(f"#{name}") for name in ("n", "width", "prompt")] == [
        "1",
        "64",
        "a horse",
    ]


def test_the_form_of_another_model_keeps_its_words_alone(page):
    fill(page, "a cat", num_inference_steps=9)
    page.evaluate(
        "() => { for (const [name, text] of Object.entries(localStorage))"
        " localStorage[name] = text.replace('tiny', 'other'); }"
    )
    page.reload()
    ready(page)
    assert page.input_value("#prompt") == "a cat"
    assert page.input_value("#num_inference_steps") == "4"


def test_arrow_keys_move_through_the_pictures_and_the_chosen_one_is_marked(page):
    seeds = [draw(page, f"dog {i}") for i in range(3)][::-1]  # the newest first
    assert chosen(page) == [0]
    page.locator("#download").focus()  # outside of the list left and right move
    page.keyboard.press("ArrowRight")
    assert (chosen(page), seed(page)) == ([1], seeds[1])
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == [0]
    pictures(page).nth(0).focus()
    for key, place in [
        ("ArrowRight", 1),
        ("End", 2),
        ("ArrowRight", 2),
        ("Home", 0),
        ("ArrowDown", 0),
    ]:
        page.keyboard.press(key)
        assert (chosen(page), seed(page)) == ([place], seeds[place])
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.locator("#prompt").focus()  # in a text the keys move in the text
    page.keyboard.press("ArrowRight")
    assert chosen(page) == [0]


def test_arrow_keys_move_between_rows(page):
    for _ in range(2):
        draw(page, n=6)
    rows = page.evaluate(
        "new Set([...document.querySelectorAll('#history li')].map((e) => e.offsetTop)).size"
    )
    columns = -(-12 // rows)
    pictures(page).nth(0).click()
    page.keyboard.press("ArrowDown")
    assert chosen(page) == [columns]
    page.keyboard.press("ArrowUp")
    assert chosen(page) == [0]


def test_the_list_is_one_stop_of_the_tab_key(page):
    draw(page, n=3)
    assert page.locator("#history li[tabindex='0']").count() == 1
    assert page.get_by_role("listbox", name="Your pictures").count() == 1


def test_another_picture_can_be_looked_at_while_one_is_drawn(open_page, serving):
    engine = PausedEngine()
    page = ready(open_page(serving(engine)))
    begin(page, "a cat")
    engine.wait_for(waiting=1)
    engine.draw_all()
    expect(page.locator("#title")).to_have_text("a cat")
    begin(page)
    engine.wait_for(waiting=1)
    pictures(page).nth(1).click()
    expect(page.locator("#title")).to_have_text("a cat")
    engine.draw_all()
    expect(page.locator("#status")).to_have_text(re.compile("^Drawn in"))
    assert page.text_content("#title") == "a cat"
    assert chosen(page) == [1]


def test_pictures_can_be_deleted_one_by_one_and_all_at_once(page):
    draw(page, "a cat")
    draw(page, n=3)
    page.click("#forget")
    expect(pictures(page)).to_have_count(3)
    assert chosen(page) == [0]
    page.click("#clear-history")
    page.get_by_role("button", name="Keep them").click()
    expect(pictures(page)).to_have_count(3)
    page.click("#clear-history")
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(pictures(page)).to_have_count(0)
    expect(page.locator("#past")).to_be_hidden()
    expect(page.locator("#image")).to_be_hidden()
    page.reload()
    ready(page)
    expect(pictures(page)).to_have_count(0)


def test_page_says_where_the_pictures_are_kept(page):
    draw(page)
    assert re.search("This browser alone keeps them.* 100", page.text_content("#past-help"))


def test_tabs_share_the_pictures(page, server):
    draw(page, "a cat")
    other = page.context.new_page()
    other.goto(server.url)
    ready(other)
    expect(pictures(other)).to_have_count(1)
    draw(page)
    expect(pictures(other)).to_have_count(2)
    assert other.text_content("#title") == "a cat"  # what is shown there stays
    draw(other, "a horse", n=2)
    expect(pictures(page)).to_have_count(4)
    expect(pictures(page).nth(0)).to_have_text("a horse")
    page.click("#clear-history")
    page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(pictures(other)).to_have_count(0)
    expect(other.locator("#image")).to_be_hidden()


def test_the_oldest_pictures_beyond_the_bound_are_removed(page):
    """Fill the store as an older page would have, up to the bound."""
    draw(page, "the first")
    page.evaluate(
        "async () => { const open = indexedDB.open('sdbatch pictures /');"
        "await new Promise((done) => { open.onsuccess = done; });"
        "const table = () => open.result.transaction('pictures', 'readwrite')"
        ".objectStore('pictures'); const all = table().getAll();"
        "await new Promise((done) => { all.onsuccess = done; }); const store = table();"
        "for (let i = 0; i < 99; i++) store.put({...all.result[0],"
        "id: String(9e14 + i), body: {...all.result[0].body, prompt: 'number ' + i}});"
        "await new Promise((done) => { store.transaction.oncomplete = done; }); }"
    )
    page.reload()
    ready(page)
    expect(pictures(page)).to_have_count(100)
    draw(page, "the last")
    expect(pictures(page)).to_have_count(100)
    assert "the first" not in pictures(page).all_text_contents()


def test_a_browser_that_keeps_nothing_says_so_and_draws(open_page, server):
    page = open_page(server)
    page.add_init_script(
        "indexedDB.open = () => { throw new DOMException('no', 'SecurityError'); }"
    )
    page.reload()
    ready(page)
    draw(page)
    expect(pictures(page)).to_have_count(1)
    assert "a reload removes them" in page.text_content("#past-help")


def test_a_reload_during_a_drawing_is_told(open_page, serving):
    engine = PausedEngine()
    server = serving(engine)
    page = ready(open_page(server))
    begin(page, "a cat")
    engine.wait_for(waiting=1)
    page.reload()
    ready(page)
    expect(page.locator("#status")).to_have_text(re.compile("The page was left while it drew"))
    assert page.input_value("#prompt") == "a cat"
    engine.wait_for(waiting=1, cancelled=1)
    server.wait_for_pending(0)
    page.reload()
    ready(page)
    expect(page.locator("#status")).to_have_text("Ready.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chosen_picture_stands_out_from_the_others(open_page, server, scheme):
    page = ready(open_page(server, **DESK, color_scheme=scheme, reduced_motion="reduce"))
    draw(page, n=2)
    assert chosen(page) == [0]
    marks = page.evaluate(
        "[...document.querySelectorAll('#history li')].map((e) => getComputedStyle(e).boxShadow)"
    )
    assert marks[0] != marks[1] == "none"
