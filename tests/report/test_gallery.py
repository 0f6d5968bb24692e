"""The gallery: one page with the first images, safe to open, nothing loaded from elsewhere."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdbatch.report import gallery
from tests.finished import PROMPTS, SIDE, finish, small_job

FORMATS = ("parquet", "webdataset")
VOID = ("meta", "img", "br")
NASTY = (
    "<script>alert('dogs')</script>",
    '"><img src=x onerror=alert(1)>',
    "</figcaption></main></html>",
    "cats &amp; dogs &lt;3",
    "{prompt} %s 犬 🐕",
)


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.captions, self.pictures = [], [], [], []
        self.title, self.links = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figcaption":
            self.captions.append("")
        if tag == "img":
            self.pictures.append(values)
        self.links += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions[-1] += data
        if self.open and self.open[-1] == "title":
            self.title += data


def page(output):
    return Page(output.store.read(gallery.PAGE).decode())


def picture(attributes):
    head, _, data = attributes["src"].partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_gallery_shows_every_image_that_was_drawn(output_format, image_format, make_job, tmp_path):
    settings = {"format": output_format, "image_format": image_format}
    found = page(finish(small_job(make_job, tmp_path, output=settings)))

    assert found.captions == [prompt for prompt in PROMPTS if prompt != "fail"]
    assert [picture(each).size for each in found.pictures] == [(SIDE, SIDE)] * 4
    assert [each["alt"] for each in found.pictures] == [
        "000000-000000",
        "000001-000000",
        "000002-000000",
        "000002-000001",
    ]


@pytest.mark.parametrize("count", [1, gallery.IMAGES, gallery.IMAGES + 5])
@pytest.mark.parametrize("output_format", FORMATS)
def test_gallery_shows_the_first_images_when_there_are_many(
    output_format, count, make_job, tmp_path
):
    prompts = [f"dog {number}" for number in range(count)]
    output = finish(
        small_job(
            make_job, tmp_path, prompts, output={"format": output_format, "images_per_shard": 25}
        )
    )
    found = page(output)
    shown = min(count, gallery.IMAGES)

    assert found.tags.count("figure") == shown
    assert found.captions == prompts[:shown]
    assert f"The first {shown} of {count} images" in output.store.read(gallery.PAGE).decode()


@pytest.mark.parametrize("output_format", FORMATS)
def test_gallery_shows_a_prompt_as_it_is_when_it_holds_markup(output_format, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, NASTY, output={"format": output_format}))
    found = page(output)

    assert found.captions == list(NASTY)
    assert "script" not in found.tags
    assert len(found.pictures) == len(NASTY)
    assert "<script" not in output.store.read(gallery.PAGE).decode()


def test_gallery_shows_the_datasets_name_as_it_is_when_it_holds_markup(make_job, tmp_path):
    found = page(finish(small_job(make_job, tmp_path, name="<script>dogs</script> & cats")))

    assert found.title == "<script>dogs</script> & cats"
    assert "script" not in found.tags


def test_gallery_loads_nothing_from_elsewhere(make_job, tmp_path):
    found = page(finish(small_job(make_job, tmp_path)))

    assert all(link.startswith("data:") for link in found.links)
    assert "link" not in found.tags
    assert found.open == []


def test_gallery_says_how_each_image_was_drawn_and_by_what(make_job, tmp_path):
    text = finish(small_job(make_job, tmp_path, ["a dog"])).store.read(gallery.PAGE).decode()

    assert "drawn by builtin:shapes, a trained model" in text
    assert "dpmpp_2m 4 steps, guidance 7.5" in text
    assert "000000-000000, seed " in text


def test_gallery_is_in_order_when_the_receipts_came_in_another(make_job, tmp_path):
    """A cluster commits shards as they are done."""
    output = finish(small_job(make_job, tmp_path))
    ended = output.store.read(gallery.PAGE)
    gallery.write(output.store, output.plan.job, output.receipts[::-1])

    assert output.store.read(gallery.PAGE) == ended


def test_gallery_is_a_page_without_images_when_every_row_failed(make_job, tmp_path):
    found = page(finish(small_job(make_job, tmp_path, ["fail", "fail"])))

    assert found.pictures == []
    assert found.title == "out"


def test_gallery_shrinks_an_image_that_is_larger_than_a_thumbnail(make_job, tmp_path):
    job = small_job(make_job, tmp_path, ["a dog"])
    sampling = job.sampling.model_copy(update={"height": 512, "width": 256})
    found = page(finish(job.model_copy(update={"sampling": sampling})))

    assert picture(found.pictures[0]).size == (gallery.SIDE // 2, gallery.SIDE)
