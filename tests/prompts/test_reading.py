"""What the files of a table mean, whatever their layout: rows that fail, ranges, what is left."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sdbatch.errors import JobError, PromptTableError
from sdbatch.job import parse
from sdbatch.output import plan
from sdbatch.prompts import requests, table
from tests.prompts.test_layouts import (
    A1111,
    CARD,
    JOB,
    PNG,
    ROWS,
    SEEDS,
    SEMI,
    TEXTS,
    ipc,
    layout,
    lines,
    open_job,
    parquet,
    read_all,
    z,
)

PARTI = Path(__file__).parents[3] / "shared" / "prompts" / "PartiPrompts.tsv"


def requests_of(files, tmp_path, **prompts):
    job, opened = open_job(files, next(iter(files)), tmp_path, prompts)
    (shard,) = plan.make_plan(job, opened, None).shards
    rows = table.read_rows(
        opened.sources[0], 0, opened.rows, opened.schema, None, job.prompts.reader
    )
    return requests.resolve_requests(rows, shard, job, opened.columns, opened.extras).to_pylist()


def test_rows_that_cannot_be_read_fail_with_their_reason_and_the_others_do_not(tmp_path):
    content = lines({"prompt": "a"}) + "{\n" + lines({"prompt": ["b"]}, {"prompt": 5, "seed": "x"})
    rows = requests_of({"a.jsonl": content}, tmp_path)
    assert [row["prompt"] for row in rows] == ["a", None, None, None]
    assert [row["row_key"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[0]["error"] is None
    assert re.match("line 2 = .*: must be JSON$", rows[1]["error"])
    assert rows[2]["error"] == "prompt = ['b']: must be text"
    assert rows[3]["error"].startswith("prompt = 5: must be text; seed = 'x': must be")


def test_numbers_among_texts_are_text_and_seeds_may_be_text(tmp_path):
    content = lines({"prompt": 1984, "seed": "5"}, {"prompt": "b", "seed": 6})
    rows = requests_of({"a.jsonl": content}, tmp_path)
    assert [(row["prompt"], row["seed"], row["error"]) for row in rows] == [
        ("1984", 5, None),
        ("b", 6, None),
    ]


def test_empty_text_is_a_value_in_json_and_parquet_and_null_in_csv(tmp_path):
    row = {"prompt": "a", "negative_prompt": "", "x": ""}
    for name, content in (("a.jsonl", lines(row)), ("b.parquet", parquet([row]))):
        (request,) = requests_of({name: content}, tmp_path)
        assert (request["negative_prompt"], request["x"]) == ("", "")
    job = {"a.csv": "prompt,negative_prompt,x\na,,\n"}
    (request,) = requests_of(job, tmp_path)
    assert (request["negative_prompt"], request["x"]) == ("", None)  # the job's, which is empty


def test_a1111_lines_are_drawn_with_their_options(tmp_path):
    first, second, third = requests_of({"a.txt": A1111}, tmp_path)
    assert (first["seed"], first["num_inference_steps"], first["guidance_scale"]) == (5, 20, 7)
    assert (second["width"], second["height"], second["sampler"]) == (64, 72, "ddim")
    assert [row["error"] for row in (first, second, third)] == [None] * 3
    assert second["seed"] not in (0, None)  # -1 is a seed of its own


def test_parti_prompts_are_read_without_quoting():
    if not PARTI.exists():
        pytest.skip(f"{PARTI} is not here")
    job = parse({**JOB, "prompts": {"path": str(PARTI), "columns": {"prompt": "Prompt"}}})
    opened = table.open_table(job.prompts)
    rows = read_all(job, opened)
    expected = [line.split("\t") for line in PARTI.read_text().splitlines()[1:]]
    assert [[row[name] or "" for name in opened.schema.names] for row in rows] == expected
    assert '"G I G G L E" painted' in rows[1560]["Prompt"]


SERVED = {
    "/p.csv.zst?sig=1": z(SEMI),
    "/get?file=p.jsonl&sig=1": lines(*SEEDS).encode(),
    "/download?id=5": SEMI.replace(";", "\t").encode(),
    "/t?name=x.arrow": ipc(SEEDS),
}


class _Served(BaseHTTPRequestHandler):
    def do_GET(self):
        content = SERVED[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(SERVED[self.path])))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("path", SERVED)
def test_url_with_a_query_has_its_format_in_it_or_in_its_content(path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Served)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        job = parse({**JOB, "prompts": {"path": url}})
        rows = read_all(job, table.open_table(job.prompts))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert rows in (SEEDS, TEXTS)


WHAT_IS_LEFT = {
    "a.csv": SEMI,
    "README.md": "x",
    "LICENSE.txt": "MIT",
    ".hidden.csv": SEMI,
    "_tmp/b.csv": SEMI,
    "notes.docx": "x",
    "dataset_infos.json": "{}",
    **{f"images/{number}.png": PNG for number in range(5)},
}


def test_what_a_folder_holds_else_is_listed_with_the_reason(tmp_path):
    _, opened = open_job(WHAT_IS_LEFT, "", tmp_path, {})
    assert [source.name for source in opened.sources] == ["a.csv"]
    assert sorted(opened.left) == [
        ".hidden.csv: hidden",
        "LICENSE.txt: a document",
        "README.md: a document",
        "_tmp/b.csv: hidden",
        "dataset_infos.json: about the table, not of it",
        "images/*.png: a picture (5 files)",
        "notes.docx: unknown suffix",
    ]
    _, opened = open_job({}, "*", tmp_path, {})
    assert [source.name for source in opened.sources] == ["a.csv"]
    assert "LICENSE.txt: a document" in opened.left


def test_files_without_a_caption_of_their_name_are_left(tmp_path):
    _, opened = open_job({**CARD, "notes.txt": "a list", "x.json": "[]"}, "", tmp_path, {})
    assert [(source.name, source.rows) for source in opened.sources] == [
        ("*.txt", 2),
        ("x.json", 0),
    ]
    assert "notes.txt: no picture of its name, as the other captions have" in opened.left


@pytest.mark.parametrize("name", ["arrow file", "arrow stream", "captions", "quoted tsv of pandas"])
def test_any_range_of_rows_is_read(tmp_path, name):
    job, opened, expected = layout(ROWS[name], tmp_path)
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            part = table.read_rows(
                opened.sources[0], start, stop, opened.schema, None, job.prompts.reader
            )
            assert part.to_pylist() == expected[start:stop]


def test_a_changed_caption_changes_the_checksum(tmp_path):
    _, before = open_job(CARD, "", tmp_path, {})
    _, after = open_job({"2.txt": "a cow"}, "", tmp_path, {})
    assert before.sources[0].name == after.sources[0].name == "*.txt"
    assert before.sources[0].checksum != after.sources[0].checksum


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        ({"format": "xlsx"}, "prompts.reader.format = 'xlsx': must be 'parquet', 'arrow', 'csv'"),
        ({"encoding": "klingon"}, "prompts.reader.encoding.*must be an encoding of text"),
        ({"encoding": "base64"}, "prompts.reader.encoding.*must be an encoding of text"),
        ({"separator": ";;"}, "prompts.reader.separator"),
        ({"names": ["a", "a"]}, r"prompts.reader.names = \['a', 'a'\]: must differ"),
        (
            {"format": "json", "separator": ";"},
            "separator = ';': is for csv, tsv, and format is json",
        ),
        (
            {"format": "csv", "field": "x"},
            "field = 'x': is for json, and format is csv. Leave it out",
        ),
        ({"quote": True}, "prompts.reader.quote"),
    ],
)
def test_reader_keys_that_cannot_be_are_rejected(reader, words):
    with pytest.raises(JobError, match=words):
        parse({**JOB, "prompts": {"path": "a.csv", "reader": reader}})


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([-1], "a footer with 50 rows, and 51 in its row groups"),
        ([0, 1, 2], "ends before row 51: must have its rows"),
    ],
)
def test_a_row_count_that_lies_is_an_error_that_names_the_file(tmp_path, places, words):
    content = parquet([{"prompt": f"p{number}"} for number in range(50)])
    counts = [match.start() for match in re.finditer(b"\x16\x64", content)]  # 50, as Thrift has it
    changed = bytearray(content)
    for place in places:
        changed[counts[place] + 1] += 2
    with pytest.raises(PromptTableError, match=rf"a.parquet = {words}"):
        read_all(*open_job({"a.parquet": bytes(changed)}, "a.parquet", tmp_path, {}))


def test_json_object_of_many_keys_in_a_column_is_json_text(tmp_path):
    boxes = {f"id{number}": number for number in range(10_000)}
    content = lines(*[{"prompt": "a", "boxes": boxes}] * 20)
    rows = read_all(*open_job({"a.jsonl": content}, "a.jsonl", tmp_path, {}))
    assert [json.loads(row["boxes"]) for row in rows] == [boxes] * 20


def test_integers_that_no_float_is_are_text_in_a_column_with_floats(tmp_path):
    content = lines(*[{"prompt": "a", "x": 2**60 + 1}] * 10_000, {"prompt": "a", "x": 0.5})
    rows = read_all(*open_job({"a.jsonl": content}, "a.jsonl", tmp_path, {}))
    assert {row["x"] for row in rows} == {str(2**60 + 1), "0.5"}
