"""Which images are chosen: the first, a random sample, those that match conditions."""

import datetime
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import SdbatchError
from sdbatch.output import names
from sdbatch.output.reader import open_images
from sdbatch.report import scores
from sdbatch.report.where import choose_rows, parse_condition
from tests.finished import finish, small_job

BIG = 2**53  # a float cannot hold BIG + 1
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


def choose_numbers(images, *where, count=100, seed=None):
    """Return the numbers of the table's rows whose images are chosen."""
    rows = choose_rows(images, count, seed, [parse_condition(text) for text in where])
    return [int(row["row_key"]) for row in rows]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_choice_is_the_first_images_without_a_condition(images, count):
    assert choose_numbers(images, count=count) == list(DRAWN[:count])


@pytest.mark.parametrize(
    ("where", "expected"),
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
def test_choice_is_the_images_that_match_every_condition(images, where, expected):
    assert choose_numbers(images, *where) == expected


def test_choice_is_the_first_images_that_match_when_more_do(images):
    assert choose_numbers(images, "sampler=euler", count=2) == [1, 4]


def test_choice_distinguishes_seeds_that_are_equal_as_floats(images):
    assert choose_numbers(images, f"seed={BIG}") == [0]
    assert choose_numbers(images, f"seed>{BIG}") == [1]


@pytest.mark.parametrize(
    ("column", "null", "texts"),
    [
        ("breed", [1, 4], ["=", "=None", "~", "<z", ">=A"]),
        ("age in years", [3], ["=0", "<99", ">=-1", "~n"]),
        ("good", [3], ["=false", "=true", "<true", "~none"]),
        ("nsfw", list(DRAWN), ["=false", "=true", "=maybe", "~none"]),
    ],
)
def test_null_matches_only_not_equal(images, column, null, texts):
    for text in texts:
        assert not set(null) & set(choose_numbers(images, f"{column}{text}")), text
    value = "true" if column == "good" else "1"
    assert set(null) <= set(choose_numbers(images, f"{column}!={value}"))


def test_random_choice_is_the_same_for_a_seed_and_in_order(images):
    numbers = choose_numbers(images, count=3, seed=1)

    assert numbers == choose_numbers(images, count=3, seed=1) == sorted(numbers)
    assert len(set(numbers)) == 3
    assert len({tuple(choose_numbers(images, count=3, seed=seed)) for seed in range(20)}) > 3


def test_random_choice_is_all_images_when_there_are_too_few(images):
    assert choose_numbers(images, count=50, seed=0) == list(DRAWN)


def test_random_choice_is_among_the_images_that_match(images):
    choices = {
        tuple(choose_numbers(images, "sampler=euler", count=2, seed=seed)) for seed in range(20)
    }

    assert choices == {(1, 4), (1, 5), (4, 5)}


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
def test_condition_that_cannot_be_parsed_raises_with_an_example(text):
    with pytest.raises(SdbatchError) as raised:
        parse_condition(text)
    message = f"--where = {text!r}: must be a column, an operator (<= >= != = < > ~) and a value."
    assert str(raised.value).startswith(message)
    assert "guidance_scale>=5" in str(raised.value)


def test_condition_on_an_unknown_column_raises_with_a_similar_name(images):
    with pytest.raises(
        SdbatchError, match=r"--where = 'widht': not a column .*Did you mean 'width'\?"
    ):
        choose_numbers(images, "widht=8")


@pytest.mark.parametrize("name", ["image", "error", "zzzzzz"])
def test_condition_on_an_unknown_column_raises_with_all_names(images, name):
    with pytest.raises(SdbatchError, match=f"--where = '{name}': not a column") as raised:
        choose_numbers(images, f"{name}=1", "sampler=ddim")
    assert "Columns: key, prompt, negative_prompt" in str(raised.value)
    assert "clip-score" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidance_scale>=high", r"compared with 5\.0, .*Use a value of the same type"),
        ("seed=", f"compared with {BIG}, .*Use a value of the same type"),
        ("good=1", "compared with True, .*Use a value of the same type"),
        ("tags=b", r"compared with \['a', 'b'\], .* `~` to search its text"),
    ],
)
def test_condition_with_a_value_of_another_type_raises(images, text, message):
    with pytest.raises(SdbatchError, match=f"--where = '{text}': cannot be {message}"):
        choose_numbers(images, text)


def test_time_is_searched_as_text(make_job, tmp_path):
    times = [datetime.datetime(2024, 2, 29), datetime.datetime(2025, 1, 1)]
    table = pa.table({"prompt": ["a", "b"], "taken": times})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert choose_numbers(images, "taken~2024-02") == [0]
    with pytest.raises(SdbatchError, match="`~` to search its text"):
        choose_numbers(images, "taken>2024-02")


def test_condition_on_a_column_with_a_dot_in_its_name(make_job, tmp_path):
    table = pa.table({"prompt": ["a", "b"], "box.x": [1, 2], "box": [{"x": 5}, {"x": 6}]})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert choose_numbers(images, "box.x>1") == [1]
    assert choose_numbers(images, "box~5") == [0]


@pytest.fixture
def images_without_scores(make_job, tmp_path):
    """The images of an output without scores."""
    return open_images(finish(small_job(make_job, tmp_path)).store)


def write_scores(images, fidelity, **values):
    """Write scores of all images as `sdbatch score` does; `fidelity` by image."""
    rows = [
        {"key": row["key"], "sha256": row["sha256"], "fidelity": part, **values}
        for row, part in zip(images.rows(), fidelity, strict=True)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, scores.SCHEMA), sink)
    images.store.put(names.SCORES, sink.getvalue())


@pytest.mark.parametrize("name", scores.SCORE_COLUMNS)
def test_condition_on_a_score_raises_when_there_are_no_scores(images_without_scores, name):
    with pytest.raises(
        SdbatchError, match=f"'{name}': the output has no scores yet.*`sdbatch score .*/out`"
    ):
        choose_numbers(images_without_scores, f"{name}=1")


def test_condition_on_a_score_chooses_images(images_without_scores):
    write_scores(images_without_scores, [1.0, 0.5, None, 0.25], fidelity_count=True)

    assert choose_numbers(images_without_scores, "fidelity<1") == [2, 5]
    assert choose_numbers(images_without_scores, "fidelity<1", "prompt~cat") == [2]
    assert choose_numbers(images_without_scores, "fidelity!=1") == [2, 4, 5]
    assert choose_numbers(images_without_scores, "fidelity_count=true", count=2) == [0, 2]
    assert choose_numbers(images_without_scores, "fidelity_shape=true") == []


def test_condition_on_a_misspelt_score_raises_with_a_similar_name(images_without_scores):
    write_scores(images_without_scores, [1.0] * 4)

    with pytest.raises(SdbatchError, match="Did you mean 'fidelity_colour'"):
        choose_numbers(images_without_scores, "fidelity_color=true")


def test_condition_on_a_score_excludes_images_that_were_drawn_again_since(images_without_scores):
    """A score belongs to the image file that was scored, not to its key."""
    write_scores(images_without_scores, [0.5] * 4)
    rows = pq.read_table(io.BytesIO(images_without_scores.store.read("scores.parquet"))).to_pylist()
    rows[0]["sha256"] = "0" * 64
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, scores.SCHEMA), sink)
    images_without_scores.store.put(names.SCORES, sink.getvalue())

    assert choose_numbers(images_without_scores, "fidelity<1") == [2, 4, 5]
    assert choose_numbers(images_without_scores, "fidelity!=1") == [0, 2, 4, 5]


def test_condition_on_a_table_column_ignores_a_score_of_the_same_name(make_job, tmp_path):
    table = pa.table({"prompt": ["a", "b"], "fidelity": [0.1, 0.9]})
    images = open_images(finish(small_job(make_job, tmp_path, table)).store)

    assert choose_numbers(images, "fidelity>0.5") == [1]
    write_scores(images, [1.0, 0.0])
    assert choose_numbers(images, "fidelity>0.5") == [1]
