"""The gallery: one page with the first images that is safe to open and loads no other file."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdbatch.output import names
from sdbatch.report import gallery
from tests.finished import PROMPTS, SIDE, finish, small_job

FORMATS = ("parquet", "webdataset")
VOID_TAGS = ("meta", "img", "br")
SPECIAL_PROMPTS = (
    "<script>alert('dogs')</script>",
    '"><img src=x onerror=alert(1)>',
    "</figcaption></main></html>",
    "cats &amp; dogs &lt;3",
    "{prompt} %s 犬 🐕",
)


class Page(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.captions, self.pictures = [], [], [], []
        self.title, self.links = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "figcaption":
            self.captions.append("")
        if tag == "img":
            self.pictures.append(values)
        self.links += [values[key] for key in ("src", "href") if key in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions[-1] += data
        if self.open and self.open[-1] == "title":
            self.title += data


def read_page(output):
    return Page(output.store.read(names.GALLERY).decode())


def thumbnail(attributes):
    head, _, data = attributes["src"].partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_gallery_shows_every_image_that_was_drawn(output_format, image_format, make_job, tmp_path):
    settings = {"format": output_format, "image_format": image_format}
    page = read_page(finish(small_job(make_job, tmp_path, output=settings)))

    assert page.captions == [prompt for prompt in PROMPTS if prompt != "fail"]
    assert [thumbnail(each).size for each in page.pictures] == [(SIDE, SIDE)] * 4
    assert [each["alt"] for each in page.pictures] == [
        "000000-000000",
        "000001-000000",
        "000002-000000",
        "000002-000001",
    ]


@pytest.mark.parametrize("count", [1, gallery.MAX_IMAGES, gallery.MAX_IMAGES + 5])
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
    page = read_page(output)
    count_on_page = min(count, gallery.MAX_IMAGES)

    assert page.tags.count("figure") == count_on_page
    assert page.captions == prompts[:count_on_page]
    assert (
        f"The first {count_on_page} of {count} images" in output.store.read(names.GALLERY).decode()
    )


@pytest.mark.parametrize("output_format", FORMATS)
def test_gallery_shows_a_prompt_as_it_is_when_it_holds_markup(output_format, make_job, tmp_path):
    output = finish(
        small_job(make_job, tmp_path, SPECIAL_PROMPTS, output={"format": output_format})
    )
    page = read_page(output)

    assert page.captions == list(SPECIAL_PROMPTS)
    assert "script" not in page.tags
    assert len(page.pictures) == len(SPECIAL_PROMPTS)
    assert "<script" not in output.store.read(names.GALLERY).decode()


def test_gallery_shows_a_dataset_name_as_it_is_when_it_holds_markup(make_job, tmp_path):
    page = read_page(finish(small_job(make_job, tmp_path, name="<script>dogs</script> & cats")))

    assert page.title == "<script>dogs</script> & cats"
    assert "script" not in page.tags


def test_gallery_loads_no_other_file(make_job, tmp_path):
    page = read_page(finish(small_job(make_job, tmp_path)))

    assert all(link.startswith("data:") for link in page.links)
    assert "link" not in page.tags
    assert page.open == []


def test_gallery_describes_how_each_image_was_drawn_and_by_which_model(make_job, tmp_path):
    text = finish(small_job(make_job, tmp_path, ["a dog"])).store.read(names.GALLERY).decode()

    assert "drawn by builtin:shapes, a trained model" in text
    assert "dpmpp_2m 4 steps, guidance 7.5" in text
    assert "000000-000000, seed " in text


def test_gallery_is_in_order_when_the_receipts_are_not(make_job, tmp_path):
    """A cluster commits shards as they are done."""
    output = finish(small_job(make_job, tmp_path))
    page = gallery.gallery_page(output.store, output.plan.job, output.receipts[::-1])

    assert output.store.read(names.GALLERY) == page


def test_gallery_is_a_page_without_images_when_every_row_failed(make_job, tmp_path):
    page = read_page(finish(small_job(make_job, tmp_path, ["fail", "fail"])))

    assert page.pictures == []
    assert page.title == "out"


def test_gallery_shrinks_an_image_that_is_larger_than_a_thumbnail(make_job, tmp_path):
    job = small_job(make_job, tmp_path, ["a dog"])
    sampling = job.sampling.model_copy(update={"height": 512, "width": 256})
    page = read_page(finish(job.model_copy(update={"sampling": sampling})))

    assert thumbnail(page.pictures[0]).size == (gallery.THUMBNAIL_SIDE // 2, gallery.THUMBNAIL_SIDE)


def test_page_cuts_long_prompts_and_names_with_a_mark(make_job, tmp_path):
    (tmp_path / "out").mkdir()
    output = finish(small_job(make_job, tmp_path, ("<dog> " * 1000,), name="n" * 100_000))
    page = read_page(output)
    [caption] = page.captions
    assert caption == "<dog> " * 83 + "<d ..."
    assert len(page.title) == gallery.MAX_CHARACTERS + 4
