"""The read stage: a shard of the plan to its requests."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import schema
from sdbatch.batch.blocks import pack
from sdbatch.errors import PromptTableError, StorageError
from sdbatch.job import Output
from sdbatch.output.formats import parquet
from sdbatch.prompts.requests import row_seed
from sdbatch.stages.base import facts_of, shard_of
from tests.finished import draw_rows, read_stage, small_job

TABLE = pa.table(
    {
        "prompt": ["a red dog", "a blue dog", None, "a green dog", "a grey dog"],
        "height": [None, 13, 16, 24, None],
        "breed": pa.array(["pug", None, "pug", "lab", "lab"]).dictionary_encode(),
    }
)


def read(job):
    """Return the shards' requests as (shard number, table, facts)."""
    _, stage, blocks = read_stage(job)
    shards = [stage(block) for block in blocks]
    return [
        (shard_of(rows).shard, rows.replace_schema_metadata(), facts_of(rows)) for rows in shards
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_read_packs_each_image_of_the_table_once_and_in_order(size, make_job, tmp_path):
    output = {"images_per_shard": size}
    shards = read(
        small_job(make_job, tmp_path, TABLE, prompts={"images_per_row": 3}, output=output)
    )
    rows = [row for _, table, _ in shards for row in table.to_pylist()]

    assert [number for number, _, _ in shards] == list(range(-(-15 // size)))
    assert [(row["row_key"], row["sample_index"]) for row in rows] == [
        (str(row), sample) for row in range(5) for sample in range(3)
    ]
    assert [row["prompt"] for row in rows] == [
        p for p in TABLE["prompt"].to_pylist() for _ in "123"
    ]


def test_read_gives_the_columns_of_requests_and_the_tables_own(make_job, tmp_path):
    (_, table, facts), *_ = read(small_job(make_job, tmp_path, TABLE))

    assert table.schema == schema.requests(pa.schema([TABLE.schema.field("breed")]))
    assert facts == {}


def test_read_gives_the_shard_as_the_plan_has_it(make_job, tmp_path):
    plan, stage, blocks = read_stage(small_job(make_job, tmp_path, TABLE))

    assert [shard_of(stage(block)) for block in blocks] == list(plan.shards)


def test_read_keys_a_shards_rows_from_zero(make_job, tmp_path):
    for number, table, _ in read(small_job(make_job, tmp_path, TABLE)):
        keys = [schema.key(number, index) for index in range(table.num_rows)]
        assert table["key"].to_pylist() == keys


def test_read_resolves_each_row_over_the_jobs_sampling(make_job, tmp_path):
    rows = [
        row
        for _, table, _ in read(small_job(make_job, tmp_path, TABLE))
        for row in table.to_pylist()
    ]

    assert [row["height"] for row in rows] == [8, 13, 16, 24, 8]
    assert {row["width"] for row in rows} == {8}
    assert [row["seed"] for row in rows] == [row_seed(0, str(number)) for number in range(5)]


LORAS = {
    "model": {
        "path": "builtin:shapes",
        "loras": [
            {"path": "ink.safetensors", "name": "ink", "weight": 0.8},
            {"path": "fur.safetensors", "name": "fur"},
        ],
    }
}


def test_read_writes_the_loras_of_each_row_with_their_weights(make_job, tmp_path):
    loras = ["fur", None, "", "ink, fur:0.5", "ink:much", "sky"]
    table = pa.table({"prompt": ["a"] * len(loras), "loras": loras})
    job = small_job(make_job, tmp_path, table, **LORAS)
    job = job.updated(sampling=job.sampling.updated(loras="ink"))
    rows = [row for _, shard, _ in read(job) for row in shard.to_pylist()]

    assert [row["loras"] for row in rows] == [
        "fur:1",
        "ink:0.8",
        "",
        "ink:0.8, fur:0.5",
        "ink:much",
        "sky",
    ]
    errors = [row["error"] for row in rows]
    assert "loras = 'ink:much': must be NAME or NAME:WEIGHT" in errors[4]
    assert [errors[i] for i in (0, 1, 2, 3, 5)] == [None] * 5  # the model knows which names exist


def test_a_column_of_lists_cannot_be_the_loras(make_job, tmp_path):
    table = pa.table({"prompt": ["a"], "loras": [["ink"]]})
    with pytest.raises(PromptTableError, match=r"column 'loras' = list.*: must hold text to be us"):
        read(small_job(make_job, tmp_path, table, **LORAS))


def test_read_keeps_a_row_that_cannot_be_drawn_with_its_error(make_job, tmp_path):
    rows = [
        row
        for _, table, _ in read(small_job(make_job, tmp_path, TABLE))
        for row in table.to_pylist()
    ]
    errors = [row["error"] for row in rows]

    assert [error is None for error in errors] == [True, False, False, True, True]
    assert "height = 13: must be a multiple of 8" in errors[1]
    assert "prompt = null" in errors[2]
    assert rows[1]["breed"] is None
    assert rows[2]["breed"] == "pug"


def test_read_gives_the_same_requests_when_the_table_is_cut_otherwise(make_job, tmp_path):
    def without_keys(size):
        job = small_job(make_job, tmp_path, TABLE, output={"images_per_shard": size})
        return [row for _, table, _ in read(job) for row in table.drop_columns(["key"]).to_pylist()]

    assert without_keys(1) == without_keys(2) == without_keys(5)


def test_read_numbers_rows_over_all_files_of_the_table(make_job, tmp_path):
    folder = tmp_path / "table"
    folder.mkdir()
    for name, prompts in (("a.txt", "one\ntwo\nthree\n"), ("b.txt", "four\nfive\n")):
        (folder / name).write_text(prompts)
    shards = read(small_job(make_job, tmp_path, prompts={"path": str(folder)}))

    assert [table["row_key"].to_pylist() for _, table, _ in shards] == [
        ["0", "1"],
        ["2"],
        ["3", "4"],
    ]
    assert [table["prompt"].to_pylist() for _, table, _ in shards] == [
        ["one", "two"],
        ["three"],
        ["four", "five"],
    ]


@pytest.mark.parametrize("size", [2, 5])  # all of the last shard is gone; some of it
@pytest.mark.parametrize("left", [4, 3, 0])
@pytest.mark.parametrize("suffix", ["parquet", "txt"])
def test_read_raises_when_the_tables_file_has_shrunk_since_the_plan(
    suffix, left, size, make_job, tmp_path
):
    path = tmp_path / f"table.{suffix}"

    def write(count):
        prompts = [f"dog {number}" for number in range(count)]
        if suffix == "parquet":
            pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), path)
        else:
            path.write_text("\n".join(prompts))

    write(5)
    sections = {"prompts": {"path": str(path)}, "output": {"images_per_shard": size}}
    _, stage, blocks = read_stage(small_job(make_job, tmp_path, **sections))
    write(left)

    with pytest.raises(
        PromptTableError, match=f"table.{suffix} = .*changed since the job was planned"
    ):
        stage(blocks[-1])


@pytest.mark.parametrize("prompts", [TABLE, ("a", "b")], ids=["parquet", "txt"])
def test_read_raises_when_the_tables_file_has_vanished_since_the_plan(prompts, make_job, tmp_path):
    job = small_job(make_job, tmp_path, prompts)
    _, stage, blocks = read_stage(job)
    os.remove(job.prompts.path)

    with pytest.raises(StorageError, match=r"table\.\w+ = .*must be there"):
        stage(blocks[0])


def test_read_raises_when_the_tables_file_is_no_longer_parquet(make_job, tmp_path):
    job = small_job(make_job, tmp_path, TABLE)
    _, stage, blocks = read_stage(job)
    with open(job.prompts.path, "wb") as file:
        file.write(b"a red dog\n" * 10)

    with pytest.raises(PromptTableError, match=r"table.parquet = .*must be a Parquet file"):
        stage(blocks[0])


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", None, "y"], pa.string_view()),
        pa.array(["x", None, "y"], pa.large_string()),
        pa.array([[{"a": 1}], [], None]),
        pa.array(["x", None, "y"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_read_lets_a_column_of_any_type_travel(column, make_job, tmp_path):
    table = pa.table({"prompt": ["a", "b", "c"], "own": column})
    shards = read(small_job(make_job, tmp_path, table, prompts={"images_per_row": 2}))
    values = [value for _, rows, _ in shards for value in rows["own"].to_pylist()]

    assert values == [value for value in column.to_pylist() for _ in range(2)]


@pytest.mark.parametrize("value", ["{}", "[{}]", '{"a": {}}', "[]", "null"])
def test_read_gives_what_can_be_written_when_json_holds_an_empty_object(value, make_job, tmp_path):
    """Parquet has no struct without fields; found in writing, it is found after all is drawn."""
    path = tmp_path / "table.jsonl"
    path.write_text(f'{{"prompt": "a dog", "own": {value}}}\n')
    _, stage, (block,) = read_stage(small_job(make_job, tmp_path, prompts={"path": str(path)}))
    (rows,) = draw_rows(pack(stage(block)))

    file = parquet.write(rows.drop_columns(["error"]), Output(path="unused"))
    assert file[:4] == b"PAR1"


def test_rows_in_the_job_file_are_read_like_those_of_a_table(make_job, tmp_path):
    rows = [{"prompt": f"dog {i}", "height": 16, "when": i} for i in range(7)]
    from_file = small_job(make_job, tmp_path, pa.Table.from_pylist(rows))
    in_job = from_file.updated(prompts={"rows": rows})
    assert [table.to_pylist() for _, table, _ in read(in_job)] == [
        table.to_pylist() for _, table, _ in read(from_file)
    ]
