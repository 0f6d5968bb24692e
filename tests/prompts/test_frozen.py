"""Files that are added to a table whose output was begun: their columns have the output's types."""

import json

import pyarrow as pa
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.output import plan
from sdbatch.output.record import read_record, write_record
from sdbatch.prompts import table
from sdbatch.storage import Store


@pytest.fixture
def resume(make_job, write, tmp_path):
    """Begin an output with one file, add another, and read the column x of all rows."""

    def resumed(first, second):
        def planned(record):
            job = make_job(prompts={"path": str(tmp_path / "t")})
            return plan.make_plan(job, table.open_table(job.prompts), record)

        put(write, "t/b", first)
        begun, store = planned(None), Store(str(tmp_path / "out"))
        store.begin()
        write_record(store, begun.job, begun.shards, begun.table.extras)
        put(write, "t/a", second)
        again = planned(read_record(store))
        assert again.shards[: len(begun.shards)] == begun.shards
        assert again.table.extras.equals(begun.table.extras)
        parts = [table.read_rows(s, 0, s.rows, again.table.schema) for s in again.table.sources]
        assert all(
            part.schema.field("x").type == begun.table.extras.field("x").type for part in parts
        )
        return [value for part in parts for value in part["x"].to_pylist()]

    return resumed


def put(write, name, values):
    if isinstance(values, pa.Array):
        write(f"{name}.parquet", pa.table({"prompt": ["a"] * len(values), "x": values}))
    elif isinstance(values, str):
        write(f"{name}.csv", f"prompt,x\na,{values}\n")
    else:
        rows = ({"prompt": "a", "x": value} for value in values)
        write(f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        ([9], [9.0, None], [9, 9, None]),
        ([9], "10", [9, 10]),
        ([9.5], [9], [9.5, 9.0]),
        ([9.5], "0.25", [9.5, 0.25]),
        ([[]], [["x"]], [[], ["x"]]),
        ([[]], [[1]], [[], ["1"]]),
        ([None], [5], [None, "5"]),
        ([None], ["t"], [None, "t"]),
        (["t"], [5, 0.5, True], ["t", "5", "0.5", "true"]),
        ("007", [8], ["007", "8"]),
        ([{"k": None}], [{"k": 1}], [{"k": None}, {"k": "1"}]),
        (pa.array([1], pa.int32()), [2], [1, 2]),
        (pa.array(["t"]).dictionary_encode(), ["u"], ["t", "u"]),
        (pa.nulls(1), [5], [None, "5"]),
    ],
)
def test_values_of_an_added_file_take_the_types_of_the_output(resume, first, second, values):
    assert resume(first, second) == values


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([9], [9.5], "column 'x' = double: must be int64, as in the existing output"),
        ([9], "nine", "column 'x' = string: must be int64, as in the existing output"),
        ([9], "007", "column 'x' = string: must be int64"),
        (
            [9.5],
            [2**53 + 1],
            "column 'x' = Integer value 9007199254740993 .*: must be double, as in",
        ),
        (pa.array([1], pa.int32()), [2**40], "column 'x' = int64: must be int32"),
        (pa.array([0.5], pa.float32()), [0.1], "column 'x' = double: must be float"),
        ([[]], [[[1]]], "column 'x' = list<item: list<item: int64>>: must be list<item: string>"),
    ],
)
def test_value_that_the_outputs_type_cannot_hold_is_an_error_with_both_types(
    resume, first, second, words
):
    with pytest.raises(PromptTableError, match=rf"t/a\.\w+ {words}"):
        resume(first, second)


@pytest.mark.parametrize("values", [[None], [[]], [[None]], [{"k": None}], [[{"k": []}]]])
def test_no_type_of_an_output_is_null(resume, values):
    assert resume(values, values) == [*values, *values]
