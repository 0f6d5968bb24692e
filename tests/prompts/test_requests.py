"""What rows ask for: the job's values under the row's, seeds, copies, rows that cannot be drawn."""

import datetime
import decimal
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.job import MAX_SEED
from sdbatch.output import plan
from sdbatch.prompts import requests, table
from sdbatch.prompts.table import open_table


@pytest.fixture
def ask(make_job, tmp_path):
    """Return the requests of a table, given as rows, a pa.Table or CSV text, in order."""

    def requests_of(content, size="auto", sampling=None, **prompts) -> pa.Table:
        path = tmp_path / ("table.csv" if isinstance(content, str) else "table.parquet")
        if isinstance(content, str):
            path.write_text(content)
        else:
            found = content if isinstance(content, pa.Table) else pa.Table.from_pylist(content)
            pq.write_table(found, path, row_group_size=3)
        job = make_job(
            prompts={"path": str(path), **prompts},
            sampling=sampling or {},
            output={"images_per_shard": size},
        )
        planned = plan.make(job, open_table(job.prompts), None)
        return pa.concat_tables([resolve(planned, shard) for shard in planned.shards])

    return requests_of


def resolve(planned, shard):
    start, stop = shard.rows(planned.job.prompts.images_per_row)
    rows = table.read(planned.table.sources[0], start, stop, planned.table.schema)
    columns, extras = planned.table.columns, planned.table.extras
    return requests.resolve(rows, shard, planned.job, columns, extras)


def test_request_has_the_columns_of_the_schema_in_order(ask):
    asked = ask([{"prompt": "a", "own": 1}])
    assert asked.schema.equals(schema.requests(pa.schema([("own", pa.int64())])))


def test_row_asks_for_the_jobs_values_where_it_has_none(ask):
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
    first, second = ask(rows, sampling=sampling).to_pylist()
    assert {name: first[name] for name in sampling} == sampling
    assert {name: second[name] for name in sampling} == {**sampling, "width": 88}


def test_row_wins_over_the_job_with_every_column(ask):
    own = {
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "sampler": "ddim",
        "height": 128,
        "width": 192,
    }
    (asked,) = ask([{"prompt": "a", **own}], sampling={"negative_prompt": "blurry"}).to_pylist()
    assert {name: asked[name] for name in own} == own
    assert asked["error"] is None


def test_columns_are_taken_under_the_names_the_job_maps(ask):
    (asked,) = ask(
        [{"prompt": "not this", "caption": "a", "s": 7, "name": "x"}],
        columns={"id": "name", "prompt": "caption", "seed": "s"},
        keep=[],
    ).to_pylist()
    assert (asked["prompt"], asked["seed"], asked["row_key"]) == ("a", 7, "x")


@pytest.mark.parametrize("seeds", [[0, 41, 2**40], ["0", "41", "1099511627776"]])
def test_seed_column_is_taken_as_it_is_and_copies_count_up(ask, seeds):
    asked = ask([{"prompt": "a", "seed": seed} for seed in seeds], images_per_row=3)
    expected = [int(seed) + copy for seed in seeds for copy in range(3)]
    assert asked["seed"].to_pylist() == expected
    assert asked["sample_index"].to_pylist() == [0, 1, 2] * 3


def test_seed_that_leaves_no_room_for_the_copies_fails_alone(ask):
    rows = [{"prompt": "a", "seed": MAX_SEED - copy} for copy in (0, 1)]
    last, room = ask(rows, images_per_row=2)["error"].to_pylist()[::2]
    assert room is None
    assert last == f"seed = {MAX_SEED}: must leave room for the row's copies below 2**63"


def test_seed_without_a_column_is_a_function_of_the_jobs_seed_and_the_key(ask):
    rows = [{"prompt": "a", "name": key} for key in ("x", "y", "z")]
    ids = {"columns": {"id": "name"}}
    seeds = ask(rows, **ids)["seed"].to_pylist()
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert ask(rows[::-1], **ids)["seed"].to_pylist() == seeds[::-1]
    other = [{**row, "prompt": "b", "n": 1} for row in rows]
    assert ask(other, **ids)["seed"].to_pylist() == seeds
    assert set(ask(rows, sampling={"seed": 1}, **ids)["seed"].to_pylist()).isdisjoint(seeds)


def test_row_seed_keeps_the_value_that_datasets_were_drawn_with():
    # python -c "import hashlib; print(hashlib.blake2b(b'0\nx', digest_size=4).hexdigest())"
    assert requests.row_seed(0, "x") == int.from_bytes(bytes.fromhex("633ed71d"), "little")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 14, 1000])
def test_row_asks_for_the_same_however_the_table_is_cut(ask, size):
    rows = [{"prompt": str(i), "own": i, "width": 64 if i % 3 else 65} for i in range(7)]
    whole = ask(rows, size=100, images_per_row=2)
    cut = ask(rows, size=size, images_per_row=2)
    assert cut.drop_columns(["key"]).equals(whole.drop_columns(["key"]))
    expected = [schema.key(i // size, i % size) for i in range(14)]
    assert cut["key"].to_pylist() == expected


def test_row_key_is_the_id_or_else_the_number_in_the_table(ask, make_job, tmp_path):
    rows = [{"prompt": "a", "id": 12}, {"prompt": "b", "id": 7}]
    assert ask(rows)["row_key"].to_pylist() == ["0", "1"]
    assert ask(rows, columns={"id": "id"})["row_key"].to_pylist() == ["12", "7"]
    (tmp_path / "t").mkdir()
    for name in ("a", "b"):
        (tmp_path / "t" / f"{name}.txt").write_text("x\ny\n")
    job = make_job(prompts={"path": str(tmp_path / "t")})
    planned = plan.make(job, open_table(job.prompts), None)
    rows = pa.table({"prompt": ["x", "y"]})
    second = requests.resolve(rows, planned.shards[1], job, planned.table.columns, pa.schema([]))
    assert second["row_key"].to_pylist() == ["2", "3"]


def test_shard_that_begins_in_the_middle_of_a_row_goes_on_with_its_copies(ask):
    asked = ask([{"prompt": "a"}, {"prompt": "b"}], size=3, images_per_row=4).to_pylist()
    assert [(row["key"], row["prompt"], row["sample_index"]) for row in asked[3:6]] == [
        ("000001-000000", "a", 3),
        ("000001-000001", "b", 0),
        ("000001-000002", "b", 1),
    ]
    assert asked[3]["seed"] == asked[0]["seed"] + 3


def test_own_columns_travel_with_every_copy_and_keep_their_types(ask):
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
    asked = ask(own.append_column("prompt", [["a", "b"]]), size=3, images_per_row=2)
    travelled = asked.select(own.column_names)
    assert travelled.schema.equals(own.schema)
    assert travelled.to_pylist() == own.take([0, 0, 1, 1]).to_pylist()


def test_empty_prompt_is_legal_in_every_kind_of_table(ask):
    assert ask([{"prompt": ""}])["error"].to_pylist() == [None]
    assert ask('prompt\n""\n')["error"].to_pylist() == [None]


def test_empty_cells_of_csv_ask_for_nothing_but_an_empty_negative_prompt(ask):
    sampling = {"negative_prompt": "blurry", "width": 72, "seed": 3}
    header = "prompt,negative_prompt,seed,num_inference_steps,guidance_scale,sampler,height,width"
    (asked,) = ask(f"{header}\na,,,,,,,\n", sampling=sampling).to_pylist()
    (plain,) = ask("prompt\na\n", sampling=sampling).to_pylist()
    assert asked == {**plain, "negative_prompt": ""}
    assert plain["error"] is None


def test_numbers_may_be_text_or_integral_floats_or_decimals(ask):
    text = ask("prompt,seed,width,guidance_scale\na,5,72.0,3\n").to_pylist()
    floats = ask([{"prompt": "a", "seed": 5.0, "width": 72.0, "guidance_scale": 3.0}]).to_pylist()
    exact = {"seed": 5, "width": 72, "guidance_scale": 3}
    decimals = ask([{"prompt": "a", **{key: decimal.Decimal(n) for key, n in exact.items()}}])
    assert text == floats == decimals.to_pylist()
    assert {name: text[0][name] for name in exact} == exact
    assert text[0]["error"] is None


def test_prompt_of_20_000_characters_is_asked_for_whole(ask):
    (asked,) = ask([{"prompt": "ä dog " * 3334}]).to_pylist()
    assert (asked["prompt"], asked["error"]) == ("ä dog " * 3334, None)


# column, what the row asks for, the reason, what the request keeps of it
BAD = {
    "null prompt": ("prompt", None, "prompt = null: must be text; an empty prompt is legal", None),
    "width": ("width", 513, "width = 513: must be a multiple of 8, the VAE's factor", 513),
    "steps": ("num_inference_steps", 0, "num_inference_steps = 0: must be greater than or", 0),
    "sampler": ("sampler", "magic", "sampler = 'magic': must be a sampler. Known: ddim", "magic"),
    "seed": ("seed", -1, "seed = -1: must be greater than or equal to 0", -1),
    "great seed": ("seed", MAX_SEED + 1, f"seed = {MAX_SEED + 1}: must be less than or", None),
    "nan": ("guidance_scale", math.nan, "guidance_scale = nan: must be a number", math.nan),
    "guidance": ("guidance_scale", 0.5, "guidance_scale = 0.5: must be greater than or", 0.5),
    "half": ("num_inference_steps", 2.5, "num_inference_steps = 2.5: must be", None),
    "text": ("num_inference_steps", "many", "num_inference_steps = 'many': must be", None),
    "float": ("width", 513.0, "width = 513.0: must be a multiple of 8", 513),
    "eta": ("eta", 0.5, "eta = 0.5: must be 0, as dpmpp_2m has none", 0.5),
    "rescale": ("guidance_rescale", -1.0, "guidance_rescale = -1.0: must be greater", -1.0),
    "decimal": ("guidance_scale", decimal.Decimal("0.5"), "guidance_scale = ", 0.5),
}


@pytest.mark.parametrize("kind", BAD)
def test_row_that_cannot_be_drawn_fails_alone_with_the_reason_and_what_was_asked(ask, kind):
    name, value, reason, kept = BAD[kind]
    good = [{name: None, "prompt": prompt, "own": prompt.upper()} for prompt in ("a", "b", "c")]
    expected = ask(good).to_pylist()
    cells = [None, value, None] if name != "prompt" else ["a", None, "c"]
    column = pa.array(cells, pa.uint64() if kind == "great seed" else None)
    asked = ask(pa.Table.from_pylist(good).drop_columns([name]).append_column(name, column))
    first, bad, last = asked.to_pylist()
    assert [first, last] == [expected[0], expected[2]]
    assert bad["error"].startswith(reason)
    assert repr(bad[name]) == repr(kept)  # repr, as nan is not nan
    changed = {name: None, "error": None}
    assert {**bad, **changed} == {**expected[1], **changed}


def test_row_of_csv_that_cannot_be_drawn_keeps_the_numbers_it_asked_for(ask):
    header = "prompt,seed,num_inference_steps,guidance_scale,height,width"
    (bad,) = ask(f"{header}\na,5,0,3.5,72,80\n").to_pylist()
    assert bad["error"] == "num_inference_steps = '0': must be greater than or equal to 1"
    names = header.split(",")[1:]
    assert [bad[name] for name in names] == [5, 0, 3.5, 72, 80]


def test_copies_of_a_row_that_cannot_be_drawn_are_all_kept_with_their_seeds(ask):
    asked = ask([{"prompt": "a", "seed": 5, "width": 65}], images_per_row=3).to_pylist()
    assert [row["sample_index"] for row in asked] == [0, 1, 2]
    assert len({row["error"] for row in asked}) == 1
    assert [row["seed"] for row in asked] == [5, 6, 7]


@pytest.mark.parametrize("ids", [[None, "x"], ["", "x"]])
def test_row_without_an_id_fails_as_nothing_could_tell_its_seed(ask, ids):
    rows = pa.table({"prompt": ["a", "b"], "name": ids})
    errors = ask(rows, columns={"id": "name"})["error"].to_pylist()
    assert errors[0] is not None
    assert errors[0].startswith("id = ")
    assert errors[1] is None


def test_row_with_several_faults_names_the_prompts_and_the_values(ask):
    (error,) = ask([{"prompt": None, "width": 65}], sampling={})["error"].to_pylist()
    assert error.startswith("prompt = null")
    assert "; width = 65: must be a multiple of 8" in error
