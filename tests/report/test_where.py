"""Which images are looked at: the first, a random set, those that fulfil conditions."""

import datetime
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import SdbatchError
from sdbatch.output.reader import open_images
from sdbatch.report import scores
from sdbatch.report.where import choose, condition
from tests.finished import finish, small_job

BIG = 2**53  # the first whole number whose next one a float has no room for
TABLE = pa.table(
    {
        "prompt": ["a red dog", "a Red cat", "fail", "a blue dog", "a green bird", "猫 = cat"],
        "seed": [BIG, BIG + 1, 2, 3, 4, 5],
        "guidance_scale": [5.0, 7.5, 7.5, 7.5, 10.0, 1.0],
        "sampler": ["ddim", "euler", "ddim", "ddim", "euler", "euler"],
        "breed": ["pug", None, "pug", "", None, "two\nlines"],
        "age in years": [1, 2, 3, None, 5, 6],
        "clip-score": [0.1, 0.2, 0.3, 0.4, None, float("nan")],
        "good": [True, False, True, None, True, False],
        "tags": [["a", "b"], [], None, ["b"], ["c"], None],
    }
)
DRAWN = (0, 1, 3, 4, 5)  # rows of the table


@pytest.fixture(scope="module", params=["parquet", "webdataset"])
def images(request, tmp_path_factory):
    """The images of a finished output of 3 shards; no test changes it."""
    from sdbatch.job import parse

    folder = tmp_path_factory.mktemp("choose")
    output = {"path": str(folder / "out"), "format": request.param}
    job = small_job(lambda **values: parse({"model": "x", **values}), folder, TABLE, output=output)
    return open_images(finish(job).store)


def chosen(images, *where, count=100, seed=None):
    """Return the rows of the table whose images were chosen."""
    rows = choose(images, count, seed, [condition(text) for text in where])
    return [int(row["row_key"]) for row in rows]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_choice_is_the_first_images_when_nothing_is_asked(images, count):
    assert chosen(images, count=count) == list(DRAWN[:count])


@pytest.mark.parametrize(
    ("where", "fitting"),
    [
        (["sampler=ddim"], [0, 3]),
        ([" sampler = ddim "], [0, 3]),
        (["sampler!=ddim"], [1, 4, 5]),
        (["sampler>ddim"], [1, 4, 5]),
        (["guidance_scale>7.5"], [4]),
        (["guidance_scale>=7.5"], [1, 3, 4]),
        (["guidance_scale<7.5"], [0, 5]),
        (["guidance_scale<=7.5"], [0, 1, 3, 5]),
        (["guidance_scale=7.50"], [1, 3]),
        (["num_inference_steps=25"], [0, 1, 3, 4, 5]),
        (["prompt~red"], [0, 1]),
        (["prompt~RED"], [0, 1]),
        (["prompt=a red dog"], [0]),
        (["prompt~猫"], [5]),
        (["prompt~ = cat"], [5]),
        (["key~000001-"], [3]),
        (["width=8"], [0, 1, 3, 4, 5]),
        (["seed~90071"], [0, 1]),
        (["negative_prompt="], [0, 1, 3, 4, 5]),
        (["nsfw=true"], []),
        (["prompt_truncated=FALSE"], [0, 1, 3, 4, 5]),
        (["good=true"], [0, 4]),
        (["good!=true"], [1, 3, 5]),
        (["good=False"], [1, 5]),
        (["age in years>=2"], [1, 4, 5]),
        (["clip-score>0.15"], [1, 3]),
        (["tags~'b'"], [0, 3]),
        (["sampler=euler", "guidance_scale>=5"], [1, 4]),
        (["sampler=euler", "sampler=ddim"], []),
    ],
)
def test_choice_is_the_images_that_fulfil_every_condition(images, where, fitting):
    assert chosen(images, *where) == fitting


def test_choice_is_the_first_images_that_fit_when_more_do(images):
    assert chosen(images, "sampler=euler", count=2) == [1, 4]


def test_choice_tells_seeds_apart_that_are_one_as_floats(images):
    assert chosen(images, f"seed={BIG}") == [0]
    assert chosen(images, f"seed>{BIG}") == [1]


@pytest.mark.parametrize(
    ("column", "null", "texts"),
    [
        ("breed", [1, 4], ["=", "=None", "~", "<z", ">=A"]),
        ("age in years", [3], ["=0", "<99", ">=-1", "~n"]),
        ("good", [3], ["=false", "=true", "<true", "~none"]),
        ("nsfw", list(DRAWN), ["=false", "=true", "=maybe", "~none"]),
    ],
)
def test_null_fulfils_only_that_it_is_not_a_value(images, column, null, texts):
    for text in texts:
        assert not set(null) & set(chosen(images, f"{column}{text}")), text
    value = "true" if column == "good" else "1"
    assert set(null) <= set(chosen(images, f"{column}!={value}"))


def test_random_choice_is_the_same_for_a_seed_and_in_order(images):
    found = chosen(images, count=3, seed=1)

    assert found == chosen(images, count=3, seed=1) == sorted(found)
    assert len(set(found)) == 3
    assert len({tuple(chosen(images, count=3, seed=seed)) for seed in range(20)}) > 3


def test_random_choice_is_all_images_when_there_are_no_more(images):
    assert chosen(images, count=50, seed=0) == list(DRAWN)


def test_random_choice_is_among_the_images_that_fit(images):
    found = {tuple(chosen(images, "sampler=euler", count=2, seed=seed)) for seed in range(20)}

    assert found == {(1, 4), (1, 5), (4, 5)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sampler",
        "=ddim",
        "sampler==ddim",
        "prompt~= cat",
        "is ddim",
        "<=5",
        "~",
        "a!b=5",
        " =5",
    ],
)
def test_condition_that_cannot_be_read_is_refused_and_shows_how(text):
    with pytest.raises(SdbatchError) as raised:
        condition(text)
    assert f"--where {text!r}: must be a column, one of <= >= != = < > ~, and a value" in str(
        raised.value
    )
    assert "guidance_scale>=5" in str(raised.value)


def test_condition_on_an_unknown_column_is_refused_with_the_one_that_was_meant(images):
    with pytest.raises(SdbatchError, match=r"widht = no such column: .*Did you mean 'width'\?"):
        chosen(images, "widht=8")


@pytest.mark.parametrize("name", ["image", "error", "zzzzzz"])
def test_condition_on_an_unknown_column_is_refused_with_those_that_there_are(images, name):
    with pytest.raises(SdbatchError, match=f"--where {name} = no such column") as raised:
        chosen(images, f"{name}=1", "sampler=ddim")
    assert "There are: key, prompt, negative_prompt" in str(raised.value)
    assert "clip-score" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("guidance_scale>=high", "compared with 5.0: must be a value of the same kind"),
        ("seed=", f"compared with {BIG}: must be a value of the same kind"),
        ("good=1", "compared with True: must be a value of the same kind"),
        ("tags=b", r"compared with \['a', 'b'\]: .* `~` looks for a part of its text"),
    ],
)
def test_value_of_another_kind_than_the_columns_is_refused(images, text, found):
    with pytest.raises(SdbatchError, match=f"--where {text} = {found}"):
        chosen(images, text)


def test_time_is_looked_into_as_text(make_job, tmp_path):
    taken = [datetime.datetime(2024, 2, 29), datetime.datetime(2025, 1, 1)]
    table = pa.table({"prompt": ["a", "b"], "taken": taken})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert chosen(images, "taken~2024-02") == [0]
    with pytest.raises(SdbatchError, match="`~` looks for a part of its text"):
        chosen(images, "taken>2024-02")


def test_column_is_found_when_its_name_has_a_dot(make_job, tmp_path):
    table = pa.table({"prompt": ["a", "b"], "box.x": [1, 2], "box": [{"x": 5}, {"x": 6}]})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert chosen(images, "box.x>1") == [1]
    assert chosen(images, "box~5") == [0]


@pytest.fixture
def unscored(make_job, tmp_path):
    """The images of an output without scores."""
    return open_images(finish(small_job(make_job, tmp_path)).store)


def give_scores(images, fidelity, **values):
    """Write scores of all images as `sdbatch score` does; `fidelity` by image."""
    rows = [
        {"key": row["key"], "sha256": row["sha256"], "fidelity": part, **values}
        for row, part in zip(images.rows(), fidelity, strict=True)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, scores.SCORES), sink)
    images.store.put(scores.SCORES_FILE, sink.getvalue())


@pytest.mark.parametrize("name", scores.COLUMNS)
def test_condition_on_a_score_is_refused_before_there_are_scores(unscored, name):
    with pytest.raises(SdbatchError, match=f"{name} = no scores yet: .*`sdbatch score .*/out`"):
        chosen(unscored, f"{name}=1")


def test_condition_on_a_score_chooses_by_it(unscored):
    give_scores(unscored, [1.0, 0.5, None, 0.25], fidelity_count=True)

    assert chosen(unscored, "fidelity<1") == [2, 5]
    assert chosen(unscored, "fidelity<1", "prompt~cat") == [2]
    assert chosen(unscored, "fidelity!=1") == [2, 4, 5]
    assert chosen(unscored, "fidelity_count=true", count=2) == [0, 2]
    assert chosen(unscored, "fidelity_shape=true") == []


def test_condition_on_a_misspelt_score_names_the_one_that_was_meant(unscored):
    give_scores(unscored, [1.0] * 4)

    with pytest.raises(SdbatchError, match="Did you mean 'fidelity_colour'"):
        chosen(unscored, "fidelity_color=true")


def test_condition_on_a_score_leaves_out_images_that_were_drawn_anew_since(unscored):
    """A score is of the image file that was judged, not of the place in the output."""
    give_scores(unscored, [0.5] * 4)
    rows = pq.read_table(io.BytesIO(unscored.store.read("scores.parquet"))).to_pylist()
    rows[0]["sha256"] = "0" * 64
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, scores.SCORES), sink)
    unscored.store.put(scores.SCORES_FILE, sink.getvalue())

    assert chosen(unscored, "fidelity<1") == [2, 4, 5]
    assert chosen(unscored, "fidelity!=1") == [0, 2, 4, 5]


def test_condition_on_a_column_of_the_tables_own_wins_over_a_score_of_its_name(make_job, tmp_path):
    table = pa.table({"prompt": ["a", "b"], "fidelity": [0.1, 0.9]})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert chosen(images, "fidelity>0.5") == [1]
    give_scores(images, [1.0, 0.0])
    assert chosen(images, "fidelity>0.5") == [1]
