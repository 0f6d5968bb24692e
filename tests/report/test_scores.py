"""The scores of an output: how well its images match their prompts; outputs that have none."""

import io
import json
import os
import random
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import StorageError
from sdbatch.output import names
from sdbatch.output.reader import open_images
from sdbatch.report.scores import (
    SCHEMA,
    SCORE_COLUMNS,
    _score_shard,
    read_scores,
    score_output,
    summarise_scores,
)
from sdbatch.report.where import choose_rows, parse_condition
from sdbatch.shapes import captions, judge, picture, world
from sdbatch.storage import Store
from tests.fakes import Painter
from tests.finished import PROMPTS, finish, small_job

RED_PROMPT = "one large plain red circle, center, plain blue background"
GREEN_PROMPT = RED_PROMPT.replace("red", "green")
CIRCLE = world.Group(shape="circle", colour="green", count=1, size="large", texture="plain")
# Shows GREEN_PROMPT; for RED_PROMPT the colour alone is wrong.
PICTURE = picture.paint("blue", "plain", [(CIRCLE, picture.Spot(64, 64, 26))])


def table(prompts, side=picture.PICTURE_SIZE):
    return pa.table(
        {"prompt": prompts, "height": [side] * len(prompts), "width": [side] * len(prompts)}
    )


def random_pictures(count):
    """Return prompts of random scenes, and their pictures."""
    pictures = {}
    for seed in range(count):
        rng = random.Random(seed)
        scene = world.random_scene(rng)
        pictures[captions.write_caption(scene, rng)] = picture.render(scene, rng)
    return pictures


@pytest.fixture
def make_output(make_job, tmp_path):
    """Make a finished output of one shard, with the given picture for each prompt."""

    def make(pictures, prompts=None, **output):
        settings = {"images_per_shard": 100, **output}
        job = small_job(make_job, tmp_path, table(prompts or list(pictures)), output=settings)
        return finish(job, lambda: Painter(pictures))

    return make


def read_table(output):
    return pq.read_table(io.BytesIO(output.store.read(names.SCORES)))


@pytest.mark.parametrize("image_format", ["jpg", "png", "webp"])
@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_score_is_one_when_the_pictures_match_their_prompts(
    output_format, image_format, make_output
):
    output = make_output(random_pictures(12), format=output_format, image_format=image_format)
    summary = score_output(output.store)

    assert (summary.images, summary.unread, summary.fidelity) == (12, 0, 1.0)
    assert all(holding == requested for holding, requested in summary.attributes.values())
    assert summary.attributes["shape"] == (12, 12)
    assert summary.output == output.store.url


def test_score_counts_the_images_where_an_attribute_holds_and_those_that_request_it(make_output):
    pictures = {RED_PROMPT: PICTURE, GREEN_PROMPT: PICTURE, "a green circle": PICTURE}
    summary = score_output(make_output(pictures).store)

    assert summary.attributes == {
        "background": (2, 2),
        "colour": (2, 3),
        "shape": (3, 3),
        "count": (3, 3),
        "position": (2, 2),
        "size": (2, 2),
        "texture": (2, 2),
    }
    assert summary.fidelity == pytest.approx((6 / 7 + 1 + 1) / 3)


def test_scores_have_one_row_per_image_with_its_key_and_checksum(make_output):
    output = make_output({RED_PROMPT: PICTURE}, [RED_PROMPT, "fail", "a green circle", "a dog"])
    score_output(output.store)
    table = read_table(output)

    assert table.schema == SCHEMA
    images = list(open_images(output.store).rows(["key", "sha256"]))
    assert [(row["key"], row["sha256"]) for row in table.to_pylist()] == [
        (image["key"], image["sha256"]) for image in images
    ]
    assert table["key"].to_pylist() == ["000000-000000", "000000-000002", "000000-000003"]


def test_scores_hold_a_boolean_for_each_requested_attribute_and_null_for_others(make_output):
    output = make_output({RED_PROMPT: PICTURE, "a green circle": PICTURE, "a dog": PICTURE})
    score_output(output.store)
    red, circle, dog = ({**row} for row in read_table(output).to_pylist())

    assert red["fidelity"] == pytest.approx(6 / 7)
    assert [name for name in SCORE_COLUMNS[1:] if not red[name]] == ["fidelity_colour"]
    assert circle["fidelity"] == 1
    assert [name for name in SCORE_COLUMNS[1:] if circle[name] is not None] == [
        "fidelity_colour",
        "fidelity_shape",
        "fidelity_count",
    ]
    assert {dog[name] for name in SCORE_COLUMNS} == {None}


def test_mean_score_excludes_prompts_that_name_no_shape(make_output):
    summary = score_output(make_output({RED_PROMPT: PICTURE, "a dog": PICTURE, "": PICTURE}).store)

    assert (summary.images, summary.unread) == (3, 2)
    assert summary.fidelity == pytest.approx(6 / 7)


def test_score_is_none_when_no_prompt_names_a_shape(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path))  # two prompts of six fail
    summary = score_output(output.store)

    assert (summary.images, summary.unread, summary.fidelity, summary.attributes) == (
        4,
        4,
        None,
        {},
    )
    assert summary.text().splitlines() == [
        f"{output.store.url}: 0 of 4 images scored",
        "  4 not scored: their prompts name no known shape",
        f"  scores of each image: {output.store.url}/scores.parquet",
    ]
    assert read_table(output)["fidelity"].to_pylist() == [None] * 4


def test_score_text_has_percentages(make_output):
    output = make_output({RED_PROMPT: PICTURE, "a green circle": PICTURE, "a dog": PICTURE})

    assert score_output(output.store).text().splitlines() == [
        f"{output.store.url}: 2 of 3 images scored",
        "  fidelity      92.9%  of the requested attributes, on average",
        "  background   100.0%  of 1 images whose prompt requests it",
        "  colour        50.0%  of 2 images whose prompt requests it",
        "  shape        100.0%  of 2 images whose prompt requests it",
        "  count        100.0%  of 2 images whose prompt requests it",
        "  position     100.0%  of 1 images whose prompt requests it",
        "  size         100.0%  of 1 images whose prompt requests it",
        "  texture      100.0%  of 1 images whose prompt requests it",
        "  1 not scored: their prompts name no known shape",
        f"  scores of each image: {output.store.url}/scores.parquet",
    ]


def test_score_can_be_printed_as_json(make_output):
    values = json.loads(json.dumps(asdict(score_output(make_output({RED_PROMPT: PICTURE}).store))))

    assert (values["images"], values["unread"]) == (1, 0)
    assert values["attributes"]["colour"] == [0, 1]


def test_score_does_not_depend_on_the_number_of_processes(make_job, tmp_path):
    """One shard has no image, one a failed row."""
    pictures = random_pictures(5)
    prompts = [*pictures, "fail", "fail", "fail"]
    job = small_job(make_job, tmp_path, table(prompts))
    output = finish(job, lambda: Painter(pictures))
    summary = score_output(output.store)
    scores = read_table(output)

    assert len(output.receipts) == 4
    assert (summary.images, summary.unread, summary.fidelity) == (5, 0, 1.0)
    assert scores["key"].to_pylist() == [row["key"] for row in open_images(output.store).rows()]
    assert scores == pa.concat_tables(
        [_score_shard(output.store, receipt) for receipt in output.receipts]
    )


def test_score_of_a_running_output_is_of_committed_shards(make_job, tmp_path):
    job = small_job(make_job, tmp_path, table([RED_PROMPT, GREEN_PROMPT, "a dog"]))
    output = finish(job, lambda: Painter({RED_PROMPT: PICTURE, GREEN_PROMPT: PICTURE}))
    output.store.remove(names.receipt_file(1))
    summary = score_output(output.store)

    assert (summary.images, summary.unread) == (2, 0)


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
def test_score_of_an_image_without_the_shape_is_low_at_any_size(image, make_output):
    summary = score_output(make_output({RED_PROMPT: image}).store)

    assert summary.fidelity < 0.8
    assert summary.attributes["shape"] == (0, 1)


@pytest.mark.parametrize("times", [2, 4])
def test_score_of_a_larger_picture_is_the_same(times, make_output):
    large = PICTURE.repeat(times, axis=0).repeat(times, axis=1)

    assert score_output(make_output({GREEN_PROMPT: large}).store).fidelity == 1


def test_scores_belong_to_an_image_file_and_not_to_its_key(make_output):
    """Another engine may draw another image for the same key: the old score does not apply."""
    old = make_output({RED_PROMPT: PICTURE, "a green circle": PICTURE}, image_format="png")
    score_output(old.store)
    red = picture.paint("blue", "plain", [])
    new = make_output({RED_PROMPT: red, "a green circle": PICTURE}, image_format="png")
    scores, rows = read_scores(new.store), list(open_images(new.store).rows())

    assert [row["sha256"] in scores for row in rows] == [False, True]
    rows_by_score = choose_rows(open_images(new.store), 9, None, [parse_condition("fidelity>0")])
    assert [row["prompt"] for row in rows_by_score] == ["a green circle"]
    score_output(new.store)
    assert set(read_scores(new.store)) == {row["sha256"] for row in rows}


def test_read_scores_returns_the_rows_of_the_file(make_output):
    output = make_output({RED_PROMPT: PICTURE, "a dog": PICTURE})
    assert read_scores(output.store) == {}
    score_output(output.store)

    assert list(read_scores(output.store).values()) == read_table(output).to_pylist()


def test_summary_is_zero_and_not_null_when_nothing_holds():
    row = dict.fromkeys(SCHEMA.names) | {"fidelity": 0.0, "fidelity_shape": False}
    summary = summarise_scores("out", "builtin:shapes", pa.Table.from_pylist([row], SCHEMA))

    assert (summary.fidelity, summary.attributes) == (0.0, {"shape": (0, 1)})
    assert "  fidelity       0.0%  of the requested attributes" in summary.text()


def test_scores_have_a_column_for_each_attribute():
    assert list(SCORE_COLUMNS) == ["fidelity", *(f"fidelity_{name}" for name in judge.ATTRIBUTES)]


def test_score_text_warns_when_another_model_drew_the_pictures():
    row = dict.fromkeys(SCHEMA.names) | {"fidelity": 1.0, "fidelity_shape": True}
    table = pa.Table.from_pylist([row], SCHEMA)
    assert "the scorer is made for" not in summarise_scores("out", "builtin:shapes", table).text()
    assert "not of models/sd15" in summarise_scores("out", "models/sd15", table).text()


def test_score_checks_that_the_output_is_writable_before_it_scores_an_image(
    make_job, tmp_path, monkeypatch
):
    output = finish(small_job(make_job, tmp_path))
    output.store.put("data/000000.parquet", b"PAR1 and no more PAR1")  # scoring it would fail
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StorageError, match="must be writable"):
        score_output(output.store)


def test_score_raises_and_writes_nothing_when_there_is_no_output(tmp_path):
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        score_output(Store(str(tmp_path / "nothing")))
    assert list(tmp_path.iterdir()) == []


def test_score_raises_when_the_output_has_no_image(make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["fail", "fail"]))
    with pytest.raises(StorageError, match="has no image yet"):
        score_output(output.store)
    assert names.SCORES not in output.store.names()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one process", "many processes"])
def test_score_names_the_file_that_is_damaged_and_writes_nothing(prompts, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, prompts))
    output.store.put("data/000000.parquet", b"PAR1 and no more PAR1")
    with pytest.raises(StorageError, match=r"data/000000\.parquet: cannot be read .*verify"):
        score_output(output.store)
    assert names.SCORES not in output.store.names()


def parquet_bytes(**columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no table",
        b"PAR1 and no more PAR1",
        parquet_bytes(key=["a"], aesthetic=[0.5]),
        parquet_bytes(**{name: ["text"] for name in SCHEMA.names}),
        parquet_bytes(**{name: [[1]] for name in SCHEMA.names}),
    ],
    ids=["empty", "text", "cut", "other columns", "other types", "lists"],
)
def test_damaged_scores_raise_an_error_with_the_way_out(data, make_job, tmp_path):
    output = finish(small_job(make_job, tmp_path, ["a red circle"]))
    output.store.put(names.SCORES, data)
    with pytest.raises(StorageError) as raised:
        choose_rows(open_images(output.store), 1, None, [parse_condition("fidelity<1")])
    assert str(raised.value).startswith(f"{output.store.url}/scores.parquet = ")
    assert ": must be as `sdbatch score` wrote it" in str(raised.value)
    assert f"Run `sdbatch score {output.store.url}` again" in str(raised.value)
    assert "\n" not in str(raised.value)

    score_output(output.store)
    assert len(read_scores(output.store)) == 1
