"""The table's own columns: types that every reader of the output opens, values as they were."""

import datetime
import decimal
import io
import json
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch.errors import PromptTableError
from sdbatch.job import Output
from sdbatch.output.formats import parquet
from sdbatch.prompts.extras import output_field, to_output
from sdbatch.prompts.table import open_table
from tests import without_ray
from tests.finished import drawn

PAIRS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.int64())]))
EIGHT = decimal.Decimal("1.25")

# the table's column, the type in the output, its values there
CASES = {
    "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())), PAIRS),
    "map in a list": (
        pa.array([[[("a", 1)]], None], pa.list_(pa.map_(pa.string(), pa.int64()))),
        pa.list_(PAIRS),
    ),
    "text views in a list": (
        pa.array([["x", None], None], pa.list_(pa.string_view())),
        pa.list_(pa.string()),
    ),
    "text views in a struct": (
        pa.array([{"a": "x"}, None], pa.struct([("a", pa.string_view())])),
        pa.struct([("a", pa.string())]),
    ),
    "list view": (pa.array([[1], None], pa.list_view(pa.int64())), pa.list_(pa.int64())),
    "large list view": (
        pa.array([None, [1, 2]], pa.large_list_view(pa.int64())),
        pa.large_list(pa.int64()),
    ),
    "runs": (
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["x", None])),
        pa.string(),
    ),
    "uuid": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, None], pa.binary(16))),
        pa.binary(16),
    ),
    "uuid in a list": (
        pa.ListArray.from_arrays(
            [0, 1, 2],
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, None], pa.binary(16))),
        ),
        pa.list_(pa.binary()),
    ),
    "tensor": (
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2]),
            pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
        ),
        pa.list_(pa.float32(), 2),
    ),
    "decimal32": (pa.array([EIGHT, None]).cast(pa.decimal32(5, 2)), pa.decimal128(5, 2)),
    "decimal256": (pa.array([EIGHT, None]).cast(pa.decimal256(38, 2)), pa.decimal128(38, 2)),
    "zone that nobody knows": (
        pa.array([1, None], pa.timestamp("us", "Mars/Olympus")),
        pa.timestamp("us", "UTC"),
    ),
    "zone by its offset": (
        pa.array([1, None], pa.timestamp("us", "+05:30")),
        pa.timestamp("us", "UTC"),
    ),
    "nanoseconds of a day": (pa.array([1, None], pa.time64("ns")), pa.string()),
    "dictionary of views": (
        pa.DictionaryArray.from_arrays([0, None], pa.array(["x"], pa.string_view())),
        pa.string(),
    ),
    # as they are
    "dictionary": (pa.array(["x", None]).dictionary_encode(), None),
    "uint64": (pa.array([2**64 - 1, None], pa.uint64()), None),
    "float16": (pa.array([1.5, None], pa.float16()), None),
    "duration": (pa.array([5, None], pa.duration("ms")), None),
    "date64": (pa.array([86_400_000, None], pa.date64()), None),
    "zone": (pa.array([1, None], pa.timestamp("us", "Europe/Berlin")), None),
    "large binary": (pa.array([b"x", None], pa.large_binary()), None),
}
REFUSED = {
    "month and days": pa.array([pa.MonthDayNano([1, 2, 3])]).type,
    "union": pa.sparse_union([pa.field("a", pa.int64()), pa.field("b", pa.string())]),
    "empty struct": pa.struct([]),
    "list view in a list": pa.list_(pa.list_view(pa.int64())),
    "60 digits": pa.decimal256(60, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_column_becomes_a_type_that_every_reader_opens(name, tmp_path):
    import datasets
    import duckdb
    import pandas
    import polars

    column, kind = CASES[name]
    field = output_field(pa.field("own", column.type))
    assert field.type == (kind or column.type)
    twice = pa.chunked_array(
        [pa.concat_arrays([column, column]).slice(1, 2)] if kind is None else [column]
    )
    values = to_output(twice, field.type)
    values.validate(full=True)
    path = tmp_path / "data.parquet"
    path.write_bytes(parquet.write(drawn(["a dog", "a cat"], own=values), Output(path="unused")))
    assert pq.read_table(path)["own"].to_pylist() == values.to_pylist()
    assert len(pandas.read_parquet(path)) == 2
    assert len(duckdb.execute(f"select own from '{path}'").fetchall()) == 2
    assert polars.read_parquet(path).height == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
        )
    assert len(found[:]["own"]) == 2


@pytest.mark.parametrize("name", ["map", "list view", "large list view", "runs", "uuid in a list"])
def test_the_values_of_a_column_stay_when_its_type_changes(name):
    column, kind = CASES[name]
    storage = column
    if name == "uuid in a list":
        expected = [[b"x" * 16], [None]]
    elif name == "map":
        expected = [[{"key": "a", "value": 1}], None]
    else:
        expected = storage.to_pylist()
    assert to_output(pa.chunked_array([column]), kind).to_pylist() == expected
    sliced = to_output(pa.chunked_array([column.slice(1)]), kind)
    assert sliced.to_pylist() == expected[1:]


def test_an_instant_in_an_unknown_zone_stays_the_same_instant():
    column = pa.chunked_array([pa.array([1_000_000], pa.timestamp("us", "Mars/Olympus"))])
    kind = output_field(pa.field("own", column.type)).type
    (value,) = to_output(column, kind).to_pylist()
    assert value == datetime.datetime(1970, 1, 1, 0, 0, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_no_reader_opens_is_refused_when_the_job_is_planned(name):
    with pytest.raises(
        PromptTableError, match=r"^column 'own' = .*Leave it out with prompts\.keep"
    ):
        output_field(pa.field("own", REFUSED[name]))


OWN = {
    "far": pa.array([2**61, None], pa.timestamp("us")),
    "zone": pa.array([1, None], pa.timestamp("us", "Mars/Olympus")),
    "views": pa.array([["x"], None], pa.list_(pa.string_view())),
    "great": pa.array([2**64 - 1, None], pa.uint64()),
    "blob": pa.array([b"\xff" * 100_000, None]),
    "pairs": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
}


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
def test_columns_that_python_cannot_hold_pass_through_a_run(make_job, tmp_path, file_format):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": ["a dog", "fail"], **OWN}), path)
    job = make_job(prompts={"path": str(path)}, output={"format": file_format})
    report = without_ray.draw(job)
    assert (report.images, report.failed) == (1, 1)
    failed = pq.read_table(tmp_path / "out/failed/000000.parquet")
    assert failed["views"].to_pylist() == [None]
    if file_format == "parquet":
        data = pq.read_table(tmp_path / "out/data/000000.parquet")
        assert data["far"].cast(pa.int64()).to_pylist() == [2**61]
        assert data["pairs"].to_pylist() == [[{"key": "a", "value": 1}]]
        assert data["blob"].to_pylist() == [b"\xff" * 100_000]
        rows = list(parquet.read(io.BytesIO((tmp_path / "out/data/000000.parquet").read_bytes())))
        assert rows[0]["far"] == "75039-04-04T19:00:13.693952"


def test_features_of_datasets_stay_with_the_columns_that_are_copied(make_job, tmp_path):
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "photo": datasets.Image(),
            "n": datasets.Value("int32"),
        }
    )
    rows = {"prompt": ["a"], "label": [1], "photo": [{"bytes": b"x", "path": None}], "n": [3]}
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    job = make_job(prompts={"path": str(path)})
    without_ray.draw(job)
    found = datasets.Features.from_arrow_schema(
        pq.read_schema(tmp_path / "out/data/000000.parquet")
    )
    assert found["label"] == features["label"]
    assert isinstance(found["photo"], datasets.Image)
    assert isinstance(found["image"], datasets.Image)


def test_a_feature_that_files_do_not_agree_on_is_dropped(make_job, tmp_path):
    (tmp_path / "t").mkdir()
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        feature = {"label": {"names": classes, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
        rows = pa.table({"prompt": ["x"], "label": [1]}).replace_schema_metadata(metadata)
        pq.write_table(rows, tmp_path / "t" / f"{name}.parquet")
    whole = open_table(make_job(prompts={"path": str(tmp_path / "t")}).prompts).extras
    one = open_table(make_job(prompts={"path": str(tmp_path / "t/a.parquet")}).prompts).extras
    assert one.field("label").metadata
    assert not whole.field("label").metadata
