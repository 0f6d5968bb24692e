"""A job from a table on an object store to an output there, on each store."""

import os
import re

import pytest

from sdbatch.cli import main
from sdbatch.errors import PromptTableError, StorageError
from sdbatch.job import Prompts
from sdbatch.output import lifecycle
from sdbatch.output.verify import verify_output
from sdbatch.prompts.table import open_table
from sdbatch.storage import Store
from tests.without_ray import without_ray

TABLES = {"b.csv": b"prompt,n\ndog,1\n", "a.csv": b"prompt,n\ncat,2\ncow,3\n"}


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


def test_job_runs_from_a_table_on_the_store_to_an_output_there(place, sdbatch, write, tmp_path):
    for name, lines in TABLES.items():
        place.filesystem.pipe_file(f"{place.url}/prompts/{name}", lines)
        tables = os.path.dirname(write(f"tables/{name}", lines))
    job = write(
        "job.yaml",
        f"prompts: {{path: '{place.url}/prompts/*.csv'}}\nmodel: builtin:shapes\n"
        "sampling: {height: 64, width: 64, num_inference_steps: 2}\n"
        f"output: {{path: '{place.url}/out'}}\n",
    )
    assert "Finished: 3 images of 3" in sdbatch("run", job)
    fixed = "README.md gallery/index.html job.yaml manifest.parquet plan.parquet progress.json"
    fixed += " runs/000001.json"
    shards = "data/000000.parquet data/000001.parquet receipts/000000.json receipts/000001.json"
    assert place.keys("out") == sorted([*fixed.split(), *shards.split()])
    store = Store(f"{place.url}/out")
    assert list(verify_output(store)) == []
    assert "finished" in sdbatch("status", store.url)
    assert "0 drawn by this run" in sdbatch("run", job)

    store.remove("receipts/000001.json")
    assert "1 drawn by this run" in sdbatch("run", job)
    assert list(verify_output(store)) == []

    local = Store(str(tmp_path / "out"))
    local.begin()
    sdbatch("run", job, "--set", f"prompts.path={tables}", "--set", f"output.path={local.url}")
    for name in ("data/000000.parquet", "data/000001.parquet"):
        assert store.read(name) == local.read(name)


def test_table_on_the_store_is_found_in_its_folder(place, make_job):
    place.filesystem.pipe_file(f"{place.url}/lines/x.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n')
    table = open_table(make_job(prompts={"path": f"{place.url}/lines/"}).prompts)
    assert [(s.name, s.rows) for s in table.sources] == [("x.jsonl", 2)]


def test_a_missing_table_is_named_with_the_way_out(place, make_job):
    for name in ("nothing/*.csv", "nothing.csv"):
        url = f"{place.url}/{name}"
        with pytest.raises(PromptTableError, match=rf"{re.escape(url)}: no such.*Check the path"):
            open_table(make_job(prompts={"path": url}).prompts)


def test_output_may_be_next_to_its_prompts_but_not_inside_them(place):
    for path in ("prompts", "prompts/*.csv"):
        prompts = Prompts(path=f"{place.url}/{path}")
        lifecycle.check_output(Store(f"{place.url}/prompts2/out"), prompts)
    with pytest.raises(StorageError, match=r"must not be inside prompts\.path"):
        lifecycle.check_output(
            Store(f"{place.url}/prompts/out"), Prompts(path=f"{place.url}/prompts/**")
        )
