"""Requests: a row's values over the job's, seeds, copies, and rows that cannot be drawn."""

import datetime
import decimal
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.output import plan
from sdbatch.prompts import requests, table
from sdbatch.prompts.table import open_table
from sdbatch.sampling import MAX_SEED


@pytest.fixture
def requests_for(make_job, tmp_path):
    """Return a function from a table (rows, a pa.Table or CSV text) to its requests, in order."""

    def build(content, size="auto", sampling=None, **prompts) -> pa.Table:
        path = tmp_path / ("table.csv" if isinstance(content, str) else "table.parquet")
        if isinstance(content, str):
            path.write_text(content)
        else:
            rows = content if isinstance(content, pa.Table) else pa.Table.from_pylist(content)
            pq.write_table(rows, path, row_group_size=3)
        job = make_job(
            prompts={"path": str(path), **prompts},
            sampling=sampling or {},
            output={"images_per_shard": size},
        )
        planned = plan.make_plan(job, open_table(job.prompts), None)
        return pa.concat_tables([resolve(planned, shard) for shard in planned.shards])

    return build


def resolve(planned, shard):
    start, stop = shard.rows(planned.job.prompts.images_per_row)
    rows = table.read_rows(planned.table.sources[0], start, stop, planned.table.schema)
    columns, extras = planned.table.columns, planned.table.extras
    return requests.resolve_requests(rows, shard, planned.job, columns, extras)


def test_requests_have_the_columns_of_the_schema_in_order(requests_for):
    result = requests_for([{"prompt": "a", "own": 1}])
    assert result.schema.equals(schema.requests(pa.schema([("own", pa.int64())])))


def test_row_without_values_takes_those_of_the_job(requests_for):
    sampling = {
        "sampler": "euler",
        "num_inference_steps": 9,
        "guidance_scale": 3.5,
        "negative_prompt": "blurry",
        "height": 72,
        "width": 80,
    }
    null = dict.fromkeys(sampling)
    rows = [{"prompt": "a", **null}, {"prompt": "b", **sampling, "width": 88}]
    first, second = requests_for(rows, sampling=sampling).to_pylist()
    assert {name: first[name] for name in sampling} == sampling
    assert {name: second[name] for name in sampling} == {**sampling, "width": 88}


def test_row_wins_over_the_job_in_every_column(requests_for):
    own = {
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "sampler": "ddim",
        "height": 128,
        "width": 192,
    }
    (request,) = requests_for(
        [{"prompt": "a", **own}], sampling={"negative_prompt": "blurry"}
    ).to_pylist()
    assert {name: request[name] for name in own} == own
    assert request["error"] is None


def test_columns_are_read_under_the_names_that_the_job_maps(requests_for):
    (request,) = requests_for(
        [{"prompt": "not this", "caption": "a", "s": 7, "name": "x"}],
        columns={"id": "name", "prompt": "caption", "seed": "s"},
        keep=[],
    ).to_pylist()
    assert (request["prompt"], request["seed"], request["row_key"]) == ("a", 7, "x")


@pytest.mark.parametrize("seeds", [[0, 41, 2**40], ["0", "41", "1099511627776"]])
def test_seed_column_is_used_unchanged_and_copies_count_up(requests_for, seeds):
    result = requests_for([{"prompt": "a", "seed": seed} for seed in seeds], images_per_row=3)
    expected = [int(seed) + copy for seed in seeds for copy in range(3)]
    assert result["seed"].to_pylist() == expected
    assert result["sample_index"].to_pylist() == [0, 1, 2] * 3


def test_row_whose_seed_leaves_no_room_for_its_copies_fails_alone(requests_for):
    rows = [{"prompt": "a", "seed": MAX_SEED - copy} for copy in (0, 1)]
    last, room = requests_for(rows, images_per_row=2)["error"].to_pylist()[::2]
    assert room is None
    assert last == f"seed = {MAX_SEED}: must leave room for 2 images below 2**63"


def test_seed_without_a_seed_column_depends_on_the_jobs_seed_and_the_row_key_alone(requests_for):
    rows = [{"prompt": "a", "name": key} for key in ("x", "y", "z")]
    ids = {"columns": {"id": "name"}}
    seeds = requests_for(rows, **ids)["seed"].to_pylist()
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert requests_for(rows[::-1], **ids)["seed"].to_pylist() == seeds[::-1]
    other = [{**row, "prompt": "b", "n": 1} for row in rows]
    assert requests_for(other, **ids)["seed"].to_pylist() == seeds
    assert set(requests_for(rows, sampling={"seed": 1}, **ids)["seed"].to_pylist()).isdisjoint(
        seeds
    )


def test_row_seed_never_changes_between_versions():
    # python -c "import hashlib; print(hashlib.blake2b(b'0\nx', digest_size=4).hexdigest())"
    assert requests.row_seed(0, "x") == int.from_bytes(bytes.fromhex("633ed71d"), "little")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 14, 1000])
def test_requests_do_not_depend_on_the_size_of_shards(requests_for, size):
    rows = [{"prompt": str(i), "own": i, "width": 64 if i % 3 else 65} for i in range(7)]
    whole = requests_for(rows, size=100, images_per_row=2)
    cut = requests_for(rows, size=size, images_per_row=2)
    assert cut.drop_columns(["key"]).equals(whole.drop_columns(["key"]))
    expected = [schema.key(i // size, i % size) for i in range(14)]
    assert cut["key"].to_pylist() == expected


def test_row_key_is_the_id_or_else_the_row_number_in_the_table(requests_for, make_job, tmp_path):
    rows = [{"prompt": "a", "id": 12}, {"prompt": "b", "id": 7}]
    assert requests_for(rows)["row_key"].to_pylist() == ["0", "1"]
    assert requests_for(rows, columns={"id": "id"})["row_key"].to_pylist() == ["12", "7"]
    (tmp_path / "t").mkdir()
    for name in ("a", "b"):
        (tmp_path / "t" / f"{name}.txt").write_text("x\ny\n")
    job = make_job(prompts={"path": str(tmp_path / "t")})
    planned = plan.make_plan(job, open_table(job.prompts), None)
    rows = pa.table({"prompt": ["x", "y"]})
    second = requests.resolve_requests(
        rows, planned.shards[1], job, planned.table.columns, pa.schema([])
    )
    assert second["row_key"].to_pylist() == ["2", "3"]


def test_shard_that_begins_inside_a_row_continues_with_its_copies(requests_for):
    result = requests_for([{"prompt": "a"}, {"prompt": "b"}], size=3, images_per_row=4).to_pylist()
    assert [(row["key"], row["prompt"], row["sample_index"]) for row in result[3:6]] == [
        ("000001-000000", "a", 3),
        ("000001-000001", "b", 0),
        ("000001-000002", "b", 1),
    ]
    assert result[3]["seed"] == result[0]["seed"] + 3


def test_extras_are_repeated_for_every_copy_and_keep_their_types(requests_for):
    own = pa.table(
        {
            "list": pa.array([[1, 2], None], pa.list_(pa.int16())),
            "struct": pa.array([{"a": 1, "b": ["x"]}, {"a": None, "b": []}]),
            "time": pa.array([datetime.datetime(2024, 2, 29), None], pa.timestamp("us", "UTC")),
            "text": pa.array(["x", "y"], pa.large_string()),
            "word": pa.array(["y", "x"]).dictionary_encode(),
            "cost": pa.array([decimal.Decimal("1.20"), None]),
            "blob": pa.array([b"\xff", b""]),
        }
    )
    result = requests_for(own.append_column("prompt", [["a", "b"]]), size=3, images_per_row=2)
    extras = result.select(own.column_names)
    assert extras.schema.equals(own.schema)
    assert extras.to_pylist() == own.take([0, 0, 1, 1]).to_pylist()


def test_empty_prompt_is_allowed_but_an_empty_cell_of_csv_is_null(requests_for):
    assert requests_for([{"prompt": ""}])["error"].to_pylist() == [None]
    (error,) = requests_for('prompt\n""\n')["error"].to_pylist()
    assert error == "prompt = null: must be text; an empty prompt is allowed"


def test_empty_cells_of_csv_set_nothing(requests_for):
    sampling = {"negative_prompt": "blurry", "width": 72, "seed": 3}
    header = "prompt,negative_prompt,seed,num_inference_steps,guidance_scale,sampler,height,width"
    (request,) = requests_for(f"{header}\na,,,,,,,\n", sampling=sampling).to_pylist()
    (plain,) = requests_for("prompt\na\n", sampling=sampling).to_pylist()
    assert request == plain
    assert plain["error"] is None


def test_numbers_may_be_text_integral_floats_or_decimals(requests_for):
    text = requests_for("prompt,seed,width,guidance_scale\na,5,72.0,3\n").to_pylist()
    floats = requests_for(
        [{"prompt": "a", "seed": 5.0, "width": 72.0, "guidance_scale": 3.0}]
    ).to_pylist()
    exact = {"seed": 5, "width": 72, "guidance_scale": 3}
    decimals = requests_for(
        [{"prompt": "a", **{key: decimal.Decimal(n) for key, n in exact.items()}}]
    )
    assert text == floats == decimals.to_pylist()
    assert {name: text[0][name] for name in exact} == exact
    assert text[0]["error"] is None


def test_prompt_of_20_000_characters_is_kept_whole(requests_for):
    (request,) = requests_for([{"prompt": "ä dog " * 3334}]).to_pylist()
    assert (request["prompt"], request["error"]) == ("ä dog " * 3334, None)


# column, its value in the row, the reason, its value in the request
BAD = {
    "null prompt": (
        "prompt",
        None,
        "prompt = null: must be text; an empty prompt is allowed",
        None,
    ),
    "width": ("width", 513, "width = 513: must be a multiple of 8. Nearest: 512", 513),
    "steps": ("num_inference_steps", 0, "num_inference_steps = 0: must be greater than or", 0),
    "sampler": ("sampler", "magic", "sampler = 'magic': must be a sampler. Known: ddim", "magic"),
    "seed": ("seed", -1, "seed = -1: must be greater than or equal to 0", -1),
    "great seed": ("seed", MAX_SEED + 1, f"seed = {MAX_SEED + 1}: must be less than or", None),
    "nan": ("guidance_scale", math.nan, "guidance_scale = nan: must be a number", math.nan),
    "guidance": ("guidance_scale", 0.5, "guidance_scale = 0.5: must be greater than or", 0.5),
    "half": ("num_inference_steps", 2.5, "num_inference_steps = 2.5: must be", None),
    "text": ("num_inference_steps", "many", "num_inference_steps = 'many': must be", None),
    "float": ("width", 513.0, "width = 513.0: must be a multiple of 8", 513),
    "eta": ("eta", 0.5, "eta = 0.5: must be 0, dpmpp_2m has no eta", 0.5),
    "rescale": ("guidance_rescale", -1.0, "guidance_rescale = -1.0: must be greater", -1.0),
    "decimal": ("guidance_scale", decimal.Decimal("0.5"), "guidance_scale = ", 0.5),
}


@pytest.mark.parametrize("kind", BAD)
def test_row_that_cannot_be_drawn_fails_alone_with_its_reason_and_values(requests_for, kind):
    name, value, reason, recorded = BAD[kind]
    good = [{name: None, "prompt": prompt, "own": prompt.upper()} for prompt in ("a", "b", "c")]
    expected = requests_for(good).to_pylist()
    cells = [None, value, None] if name != "prompt" else ["a", None, "c"]
    column = pa.array(cells, pa.uint64() if kind == "great seed" else None)
    result = requests_for(
        pa.Table.from_pylist(good).drop_columns([name]).append_column(name, column)
    )
    first, bad, last = result.to_pylist()
    assert [first, last] == [expected[0], expected[2]]
    assert bad["error"].startswith(reason)
    assert repr(bad[name]) == repr(recorded)  # repr, as nan is not nan
    changed = {name: None, "error": None}
    assert {**bad, **changed} == {**expected[1], **changed}


def test_row_of_csv_that_cannot_be_drawn_keeps_its_numbers(requests_for):
    header = "prompt,seed,num_inference_steps,guidance_scale,height,width"
    (bad,) = requests_for(f"{header}\na,5,0,3.5,72,80\n").to_pylist()
    assert bad["error"] == "num_inference_steps = '0': must be greater than or equal to 1"
    names = header.split(",")[1:]
    assert [bad[name] for name in names] == [5, 0, 3.5, 72, 80]


def test_row_that_cannot_be_drawn_keeps_all_its_copies_with_their_seeds(requests_for):
    result = requests_for([{"prompt": "a", "seed": 5, "width": 65}], images_per_row=3).to_pylist()
    assert [row["sample_index"] for row in result] == [0, 1, 2]
    assert len({row["error"] for row in result}) == 1
    assert [row["seed"] for row in result] == [5, 6, 7]


@pytest.mark.parametrize("ids", [[None, "x"], ["", "x"]])
def test_row_without_an_id_fails_because_its_seed_depends_on_the_id(requests_for, ids):
    rows = pa.table({"prompt": ["a", "b"], "name": ids})
    errors = requests_for(rows, columns={"id": "name"})["error"].to_pylist()
    assert errors[0] is not None
    assert errors[0].startswith("id = ")
    assert errors[1] is None


def test_row_with_several_errors_names_each(requests_for):
    (error,) = requests_for([{"prompt": None, "width": 65}], sampling={})["error"].to_pylist()
    assert error.startswith("prompt = null")
    assert "; width = 65: must be a multiple of 8" in error
