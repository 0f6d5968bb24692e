"""Tables and outputs on an object store, through s3fs and a real server on loopback."""

import boto3
import pytest

from sdbatch.cli import main
from sdbatch.errors import StorageError
from sdbatch.output.verify import verify_output
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store
from tests.without_ray import without_ray


def objects(bucket, prefix):
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"].removeprefix(prefix) for entry in listed.get("Contents", [])]


def test_store_puts_lists_reads_and_removes(bucket):
    store = Store(f"s3://{bucket}/store")
    assert store.read_if_exists("data/a") is None
    assert store.names("data") == {}
    store.put("data/a", b"x" * 6_000_000)  # more than one part
    assert store.read("data/a") == b"x" * 6_000_000
    assert store.names("data") == {"a": 6_000_000}
    store.remove("data/a")
    store.remove("data/a")
    assert store.names("data") == {}


def test_errors_of_the_store_name_the_url_and_the_way_out(bucket):
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x/data/a"):
        Store("s3://no-such-bucket/x").put("data/a", b"")
    with pytest.raises(StorageError, match=r"s3://datasets/nothing = .*Check the path"):
        Store(f"s3://{bucket}/").read("nothing")


@pytest.fixture
def sdbatch(capfd):
    """Run a command that succeeds, in this process and without Ray; return what it prints."""

    def command(*arguments):
        capfd.readouterr()
        with without_ray(), pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capfd.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return command


def test_job_runs_from_a_table_on_s3_to_an_output_on_s3(bucket, sdbatch, tmp_path):
    client = boto3.client("s3")
    table = tmp_path / "local"
    table.mkdir()
    for name, lines in (("b.csv", "prompt,n\ndog,1\n"), ("a.csv", "prompt,n\ncat,2\ncow,3\n")):
        client.put_object(Bucket=bucket, Key=f"prompts/{name}", Body=lines.encode())
        (table / name).write_text(lines)
    job = tmp_path / "job.yaml"
    job.write_text(
        "prompts: {path: 's3://datasets/prompts/*.csv'}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\n"
        "output: {path: 's3://datasets/out'}\n"
    )
    assert "Finished: 3 images of 3" in sdbatch("run", str(job))
    fixed = "README.md gallery/index.html job.yaml manifest.parquet plan.parquet progress.json"
    shards = "data/000000.parquet data/000001.parquet receipts/000000.json receipts/000001.json"
    assert set(objects(bucket, "out/")) == {*fixed.split(), *shards.split()}
    assert list(verify_output(Store("s3://datasets/out"))) == []
    assert "finished" in sdbatch("status", "s3://datasets/out")
    assert "0 drawn by this run" in sdbatch("run", str(job))

    local = tmp_path / "out"
    sdbatch("run", str(job), "--set", f"prompts.path={table}", "--set", f"output.path={local}")
    for name in ("000000.parquet", "000001.parquet"):
        remote = client.get_object(Bucket=bucket, Key=f"out/data/{name}")["Body"].read()
        assert remote == (local / "data" / name).read_bytes()


def test_table_on_s3_is_looked_at_where_it_is(bucket, make_job):
    body = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    boto3.client("s3").put_object(Bucket=bucket, Key="lines/x.jsonl", Body=body)
    table = open_table(make_job(prompts={"path": f"s3://{bucket}/lines/"}).prompts)
    assert [(s.name, s.rows) for s in table.sources] == [("x.jsonl", 2)]
