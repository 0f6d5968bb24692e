"""The scores of an output: what holds of what the prompts ask for, image by image and in all."""

import io
import json
import random
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.output import receipts
from sdbatch.output.reader import open_images
from sdbatch.report import scores, where
from sdbatch.report.scores import SCORES, SCORES_FILE
from sdbatch.shapes import captions, judge, picture, world
from tests.fakes import Painter
from tests.finished import finish, small_job

RED = "one large plain red circle, center, plain blue background"
GREEN = RED.replace("red", "green")
CIRCLE = world.Group(shape="circle", colour="green", count=1, size="large", texture="plain")
# A picture of GREEN: all but the colour is as RED asks.
PICTURE = picture.paint("blue", "plain", [(CIRCLE, picture.Spot(64, 64, 26))])


def table(prompts, side=picture.SIZE):
    return pa.table(
        {"prompt": prompts, "height": [side] * len(prompts), "width": [side] * len(prompts)}
    )


def imagined(count):
    """Return prompts of imagined scenes and the pictures of these."""
    found = {}
    for seed in range(count):
        chance = random.Random(seed)
        scene = world.imagine(chance)
        found[captions.say(scene, chance)] = picture.render(scene, chance)
    return found


@pytest.fixture
def drawn(make_job, tmp_path):
    """Make a finished output that has the given picture for each prompt, in one shard."""

    def make(pictures, prompts=None, **output):
        settings = {"images_per_shard": 100, **output}
        job = small_job(make_job, tmp_path, table(prompts or list(pictures)), output=settings)
        return finish(job, lambda: Painter(pictures))

    return make


def scores_of(output):
    return pq.read_table(io.BytesIO(output.store.read(SCORES_FILE)))


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_score_is_full_when_the_pictures_show_what_is_asked(output_format, image_format, drawn):
    output = drawn(imagined(12), format=output_format, image_format=image_format)
    found = scores.score(output.store)

    assert (found.images, found.unread, found.fidelity) == (12, 0, 1.0)
    assert all(held == asked for held, asked in found.attributes.values())
    assert found.attributes["shape"] == (12, 12)
    assert found.output == output.store.url


def test_score_counts_for_each_attribute_where_it_holds_and_where_it_is_asked(drawn):
    pictures = {RED: PICTURE, GREEN: PICTURE, "a green circle": PICTURE}
    found = scores.score(drawn(pictures).store)

    assert found.attributes == {
        "background": (2, 2),
        "colour": (2, 3),
        "shape": (3, 3),
        "count": (3, 3),
        "position": (2, 2),
        "size": (2, 2),
        "texture": (2, 2),
    }
    assert found.fidelity == pytest.approx((6 / 7 + 1 + 1) / 3)


def test_scores_have_one_row_an_image_with_its_key_and_checksum(drawn):
    output = drawn({RED: PICTURE}, [RED, "fail", "a green circle", "a dog"])
    scores.score(output.store)
    found = scores_of(output)

    assert found.schema == SCORES
    images = list(open_images(output.store).rows(["key", "sha256"]))
    assert [(row["key"], row["sha256"]) for row in found.to_pylist()] == [
        (image["key"], image["sha256"]) for image in images
    ]
    assert found["key"].to_pylist() == ["000000-000000", "000000-000002", "000000-000003"]


def test_scores_say_for_each_attribute_whether_it_holds_or_null_where_it_is_left_open(drawn):
    output = drawn({RED: PICTURE, "a green circle": PICTURE, "a dog": PICTURE})
    scores.score(output.store)
    red, circle, dog = ({**row} for row in scores_of(output).to_pylist())

    assert red["fidelity"] == pytest.approx(6 / 7)
    assert [name for name in scores.COLUMNS[1:] if not red[name]] == ["fidelity_colour"]
    assert circle["fidelity"] == 1
    assert [name for name in scores.COLUMNS[1:] if circle[name] is not None] == [
        "fidelity_colour",
        "fidelity_shape",
        "fidelity_count",
    ]
    assert {dog[name] for name in scores.COLUMNS} == {None}


def test_score_leaves_out_of_the_mean_the_prompts_that_name_no_shape(drawn):
    found = scores.score(drawn({RED: PICTURE, "a dog": PICTURE, "": PICTURE}).store)

    assert (found.images, found.unread) == (3, 2)
    assert found.fidelity == pytest.approx(6 / 7)


def test_score_is_none_when_no_prompt_names_a_shape(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path))  # two prompts of six fail
    found = scores.score(output.store)

    assert (found.images, found.unread, found.fidelity, found.attributes) == (4, 4, None, {})
    assert found.text().splitlines() == [
        f"{output.store.url}: 0 of 4 images scored",
        "  4 not scored: their prompts name no shape of the world",
        f"  image by image: {output.store.url}/scores.parquet",
    ]
    assert scores_of(output)["fidelity"].to_pylist() == [None] * 4


def test_score_tells_people_the_parts_in_percent(drawn):
    output = drawn({RED: PICTURE, "a green circle": PICTURE, "a dog": PICTURE})

    assert scores.score(output.store).text().splitlines() == [
        f"{output.store.url}: 2 of 3 images scored",
        "  fidelity      92.9%  of all that was asked, on average",
        "  background   100.0%  of 1 images asked for it",
        "  colour        50.0%  of 2 images asked for it",
        "  shape        100.0%  of 2 images asked for it",
        "  count        100.0%  of 2 images asked for it",
        "  position     100.0%  of 1 images asked for it",
        "  size         100.0%  of 1 images asked for it",
        "  texture      100.0%  of 1 images asked for it",
        "  1 not scored: their prompts name no shape of the world",
        f"  image by image: {output.store.url}/scores.parquet",
    ]


def test_score_tells_machines_the_same(drawn):
    said = json.loads(json.dumps(asdict(scores.score(drawn({RED: PICTURE}).store))))

    assert (said["images"], said["unread"]) == (1, 0)
    assert said["attributes"]["colour"] == [0, 1]


def test_score_of_many_shards_by_many_processes_is_that_of_one(make_job, tmp_path):
    """Shards are judged side by side; one has no image, one an image that failed."""
    pictures = imagined(5)
    prompts = [*pictures, "fail", "fail", "fail"]
    job = small_job(make_job, tmp_path, table(prompts))
    output = finish(job, lambda: Painter(pictures))
    found = scores.score(output.store)
    table_of_scores = scores_of(output)

    assert len(output.receipts) == 4
    assert (found.images, found.unread, found.fidelity) == (5, 0, 1.0)
    assert table_of_scores["key"].to_pylist() == [
        row["key"] for row in open_images(output.store).rows()
    ]
    assert table_of_scores == pa.concat_tables(
        [scores._score(output.store, receipt) for receipt in output.receipts]
    )


def test_score_of_a_running_output_is_of_what_is_committed(make_job, tmp_path):
    job = small_job(make_job, tmp_path, table([RED, GREEN, "a dog"]))
    output = finish(job, lambda: Painter({RED: PICTURE, GREEN: PICTURE}))
    receipts.withdraw(output.store, output.receipts[1])
    found = scores.score(output.store)

    assert (found.images, found.unread) == (2, 0)


@pytest.mark.parametrize(
    "image",
    [
        np.full((8, 8, 3), (220, 40, 40), np.uint8),
        np.full((8, 512, 3), 255, np.uint8),
        np.full((600, 24, 3), 0, np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
    ],
    ids=["small", "wide", "high", "noise"],
)
def test_score_of_an_image_without_the_shape_is_less_whatever_its_size(image, drawn):
    found = scores.score(drawn({RED: image}).store)

    assert found.fidelity < 0.8
    assert found.attributes["shape"] == (0, 1)


@pytest.mark.parametrize("times", [2, 4])
def test_score_of_a_larger_picture_is_the_same(times, drawn):
    large = PICTURE.repeat(times, axis=0).repeat(times, axis=1)

    assert scores.score(drawn({GREEN: large}).store).fidelity == 1


def test_scores_are_found_by_the_image_and_not_by_its_place(drawn):
    """Drawn anew by another engine, the images are others, and the old scores none of theirs."""
    old = drawn({RED: PICTURE, "a green circle": PICTURE}, image_format="png")
    scores.score(old.store)
    red = picture.paint("blue", "plain", [])
    new = drawn({RED: red, "a green circle": PICTURE}, image_format="png")
    known, rows = scores.read(new.store), list(open_images(new.store).rows())

    assert [row["sha256"] in known for row in rows] == [False, True]
    chosen = where.choose(open_images(new.store), 9, None, [where.condition("fidelity>0")])
    assert [row["prompt"] for row in chosen] == ["a green circle"]
    scores.score(new.store)
    assert set(scores.read(new.store)) == {row["sha256"] for row in rows}


def test_scores_read_back_are_those_that_were_written(drawn):
    output = drawn({RED: PICTURE, "a dog": PICTURE})
    assert scores.read(output.store) == {}
    scores.score(output.store)

    assert list(scores.read(output.store).values()) == scores_of(output).to_pylist()


def test_summary_of_scores_that_hold_for_none_is_zero_and_not_absent():
    row = dict.fromkeys(SCORES.names) | {"fidelity": 0.0, "fidelity_shape": False}
    found = scores.summary("out", "builtin:shapes", pa.Table.from_pylist([row], SCORES))

    assert (found.fidelity, found.attributes) == (0.0, {"shape": (0, 1)})
    assert "  fidelity       0.0%  of all" in found.text()


def test_score_has_a_column_for_each_attribute_of_the_judge():
    assert list(scores.COLUMNS) == ["fidelity", *(f"fidelity_{name}" for name in judge.ATTRIBUTES)]


def test_score_says_when_another_model_drew_the_pictures(drawn):
    row = dict.fromkeys(SCORES.names) | {"fidelity": 1.0, "fidelity_shape": True}
    table = pa.Table.from_pylist([row], SCORES)
    assert "the judge reads" not in scores.summary("out", "builtin:shapes", table).text()
    assert "not models/sd15's" in scores.summary("out", "models/sd15", table).text()
