"""The pictures of rows: where a table's cells have them, and what cannot be read."""

import base64
import contextlib
import errno
import json
import os
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import retries, storage
from sdbatch.errors import PromptTableError, StorageError
from sdbatch.inputs.prepare import Prepared
from sdbatch.prompts import parquet, pictures
from sdbatch.prompts.check import check_rows, describe_table
from sdbatch.prompts.table import open_table
from sdbatch.schema import INPUTS
from sdbatch.stages.base import shard_of
from tests.finished import SIDE, read_stage, small_job
from tests.pictures import colours, save, sha256

PIXELS = colours(SIDE, SIDE)
PNG = save(PIXELS)
HALF = np.zeros((SIDE, SIDE), np.uint8)
HALF[:, SIDE // 2 :] = 255
MASK = save(HALF)
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(job):
    """Return the requests of a job's table, as rows."""
    _, stage, blocks = read_stage(job)
    return [row for block in blocks for row in stage(block).to_pylist()]


def of_table(make_job, tmp_path, table, **sections):
    return read(small_job(make_job, tmp_path, table, **sections))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.requests, self.ending = files, Counter(), threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.lstrip("/").partition("?")[0]
        self.server.requests[name] += 1
        found = self.server.files.get(name, 404)
        if found == "silence":
            self.server.ending.wait()
            return
        self.send_response(found if isinstance(found, int) else 200)
        self.end_headers()
        if isinstance(found, bytes):
            self.wfile.write(found)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Print nothing."""


@contextlib.contextmanager
def serving(**files):
    """Serve files, or answers with a status, by their names; counts the requests of each."""
    with _Server(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.ending.set()
        server.shutdown()


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([{"bytes": PNG, "path": "elsewhere.png"}, None], IMAGE),
        pa.array([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}], IMAGE),
        pa.array([{"bytes": None, "path": "a.png"}, None]),
        pa.array([PNG, None], pa.binary()),
        pa.array([PNG, b""], pa.large_binary()),
        pa.array([PNG, None], pa.binary(len(PNG))),
        pa.array([PNG, None], pa.binary_view()),
        pa.array(["a.png", ""], pa.string()),
        pa.array(["a.png", None], pa.large_string()),
        pa.array(["./a.png", None], pa.string_view()),
        pa.array([URI, None]),
        pa.array([PNG, None]).dictionary_encode(),
        pa.array(["a.png", None]).dictionary_encode(),
    ],
    ids=lambda cells: str(cells.type).replace(" ", ""),
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_cell_of_any_kind_gives_the_picture(make_job, tmp_path, cells, suffix):
    (tmp_path / "a.png").write_bytes(PNG)
    path = tmp_path / f"pictures.{suffix}"
    table = pa.table({"prompt": ["a dog", "a cat"], "image": cells})
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    job = small_job(make_job, tmp_path, prompts={"path": str(path)})
    dog, cat = read(job)

    assert (dog["error"], dog["image_sha256"], dog["mask_sha256"]) == (None, sha256(PNG), None)
    assert np.array_equal(Prepared.from_bytes(dog[INPUTS.name]).arrays["image"], PIXELS)
    assert (cat["error"], cat["image_sha256"], cat[INPUTS.name]) == (None, None, None)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "tsv"])
def test_text_tables_name_pictures_by_path_by_url_and_as_data_uri(make_job, write, suffix):
    with serving(a=PNG) as server:
        write("photos/a.png", PNG)
        absolute = write("other/a.png", PNG)
        cells = ["photos/a.png", absolute, f"file://{absolute}", server.url("a"), URI, ""]
        if suffix in ("csv", "tsv"):
            comma, quote = {"csv": (",", '"'), "tsv": ("\t", "")}[suffix]
            lines = [f"{quote}{cell}{quote}{comma}a dog" for cell in cells]
            text = "\n".join([f"image{comma}prompt", *lines])
        else:
            text = str([{"prompt": "a dog", "image": cell} for cell in cells]).replace("'", '"')
            text = text[1:-1].replace("}, ", "}\n") if suffix == "jsonl" else text
        path = write(f"table.{suffix}", text)
        rows = read(make_job(prompts={"path": path}, sampling={"height": SIDE, "width": SIDE}))

    assert [row["error"] for row in rows] == [None] * 6
    assert [row["image_sha256"] for row in rows] == [sha256(PNG)] * 5 + [None]


def test_paths_are_relative_to_the_file_of_the_table_wherever_it_is(make_job, write, monkeypatch):
    write("tables/one/a.png", PNG)
    write("tables/two/a.png", MASK)
    for folder in ("one", "two"):
        path = write(f"tables/{folder}/t.csv", "prompt,image\na dog,a.png\n")
    rows = read(make_job(prompts={"path": path.removesuffix("/two/t.csv")}))
    assert [row["image_sha256"] for row in rows] == [sha256(PNG), sha256(MASK)]

    files = fsspec.filesystem("memory")
    files.pipe({"/far/t.csv": b"prompt,image\na dog,photos/a.png\n", "/far/photos/a.png": PNG})
    (row,) = read(make_job(prompts={"path": "memory://far/t.csv"}))
    assert row["image_sha256"] == sha256(PNG)

    monkeypatch.chdir(path.removesuffix("/t.csv"))
    job = make_job(prompts={"path": None, "rows": [{"prompt": "a dog", "image": "a.png"}]})
    _, stage, (block,) = read_stage(job)
    monkeypatch.chdir("/")  # where a task of Ray has another folder
    assert stage(block).to_pylist()[0]["image_sha256"] == sha256(MASK)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([[PNG], []]),
        pa.array([True, None]),
        pa.array([{"path": "a.png"}, None]),
        pa.array([{"bytes": 1, "path": "a.png"}, None]),
        pa.array([{"bytes": b"", "path": "", "size": 1}, None]),
    ],
    ids=lambda column: str(column.type).replace(" ", ""),
)
@pytest.mark.parametrize("ours", ["image", "mask_image"])
def test_a_column_of_another_type_is_refused(make_job, tmp_path, column, ours):
    table = pa.table({"prompt": ["a dog", "a cat"], "image": [PNG, PNG]})
    table = table.drop_columns(["image"] if ours == "image" else []).append_column(ours, column)
    words = rf"column '{ours}' = .*: must hold pictures to be used as {ours}: binary.*{ours}=null"
    with pytest.raises(PromptTableError, match=words):
        of_table(make_job, tmp_path, table)


FAILURES = {
    "a missing file": ("no.png", r"image = 'no\.png': No such file.*must be there"),
    "a folder": ("folder", r"image = 'folder': Is a directory"),
    "no picture": ("a.txt", r"image = a text .*must be a picture file"),
    "no file at the URL": ("URL/no.png", r"image = 'http.*no\.png': .*must be there"),
    "no permission": ("URL/closed", r"image = 'http.*closed': 403.*must be readable"),
    "a page": ("URL/page", r"image = an HTML page: must be a picture file"),
    "no server": (
        "NOBODY/a.png",
        r"image = 'http.*a\.png': Connect call failed.*must be reachable. Check the address",
    ),
    "silence": ("URL/silent", r"image = 'http.*silent': .*[Tt]imeout.*must be reachable"),
    "no base64": ("data:image/png;base64,a", r"image = 'data:.*must be a data URI in base64"),
    "percents": ("data:image/svg+xml,%3Csvg", r"image = 'data:.*must be a data URI in base64"),
    "an unknown protocol": ("ftpx://a/b.png", r"image = 'ftpx://a/b.png': .*must be a local path"),
}


def test_what_cannot_be_read_is_the_failure_of_its_row_alone(make_job, write, monkeypatch):
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(storage, "FILE_SECONDS", 0)
    write("a.png", PNG)
    write("a.txt", "no picture")
    write("folder/a.png", PNG)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    answers = {"closed": 403, "page": b"<html>Not found</html>", "silent": "silence"}
    with serving(**answers) as server:
        cells = [cell.replace("URL/", server.url("")) for cell, _ in FAILURES.values()]
        cells = [cell.replace("NOBODY", nobody) for cell in [*cells, "a.png"]]
        path = write("table.csv", "\n".join(["image,prompt", *(f'"{c}",a dog' for c in cells)]))
        *failed, good = read(make_job(prompts={"path": path}))

    for row, words in zip(failed, [words for _, words in FAILURES.values()], strict=True):
        with pytest.raises(ValueError, match=words):
            raise ValueError(row["error"])
        assert row[INPUTS.name] is None
    assert (good["error"], good["image_sha256"]) == (None, sha256(PNG))


class _Strange(fsspec.AbstractFileSystem):
    """A filesystem whose errors nobody knows."""

    protocol = "strange"

    def _open(self, path, mode="rb", **_):
        raise RuntimeError("no answer")


def test_a_filesystem_may_raise_any_error_for_a_picture(make_job, write):
    fsspec.register_implementation("strange", _Strange, clobber=True)
    path = write(
        "t.jsonl",
        "".join(
            json.dumps({"prompt": "a dog", "image": cell}) + "\n"
            for cell in ("strange://a", "a\0b", URI)
        ),
    )
    strange, null, good = read(make_job(prompts={"path": path}))
    assert strange["error"] == (
        "image = 'strange://a': no answer: must be reachable. Check the address"
    )
    assert null["error"].startswith("image = 'a\\x00b': embedded null byte: must be reachable")
    assert good["error"] is None


def test_cells_of_mixed_types_are_each_read_as_what_they_are(make_job, write):
    write("a.png", PNG)
    cells = [
        "a.png",
        {"bytes": None, "path": "a.png"},
        {"bytes": "abc", "path": "a.png"},
        {"path": "a.png"},
        ["a.png"],
        0,
        None,
    ]
    lines = [json.dumps({"prompt": "a dog", "image": cell}) for cell in cells]
    rows = read(make_job(prompts={"path": write("t.jsonl", "\n".join(lines))}))
    assert [row["image_sha256"] for row in rows] == [sha256(PNG)] * 2 + [None] * 5
    no_binary, *others, empty = [row["error"] for row in rows[2:]]
    assert no_binary.startswith("image.bytes = 'abc': must be binary")
    assert all(": must be a path, a URL or a data URI of a picture" in error for error in others)
    assert empty is None


def test_the_column_of_pictures_may_also_be_the_id(make_job, write):
    write("a.png", PNG)
    path = write("t.csv", "image,prompt\na.png,a dog\n")
    job = make_job(prompts={"path": path, "columns": {"id": "image"}})
    (row,) = read(job)
    assert (row["row_key"], row["image_sha256"]) == ("a.png", sha256(PNG))
    assert not check_rows(job, open_table(job.prompts), whole=True).faults


def test_a_mask_is_read_with_its_image_and_fails_without_one(make_job, tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c", "d"],
            "image": [PNG, None, PNG, PNG],
            "mask_image": [MASK, MASK, None, b"no picture"],
        }
    )
    whole, alone, without, damaged = of_table(make_job, tmp_path, table)

    assert (whole["image_sha256"], whole["mask_sha256"]) == (sha256(PNG), sha256(MASK))
    assert np.array_equal(Prepared.from_bytes(whole[INPUTS.name]).arrays["mask"], HALF)
    assert alone["error"] == "mask_image = given without an image: must have one"
    assert without["error"] is without["mask_sha256"] is None
    assert "mask_image = a text" in damaged["error"]
    assert damaged["image_sha256"] is None


def test_nothing_is_fetched_twice_for_a_shard(make_job, write):
    with serving(a=PNG, b=PNG, mask=MASK) as server:
        a, b, mask, gone = map(server.url, ["a", "b", "mask", "gone"])
        rows = [(a, mask), (b, mask), (a, ""), (a, mask), (URI, mask), (gone, ""), (gone, mask)]
        lines = [f'"{image}","{of}",dog {i}' for i, (image, of) in enumerate([*rows, (b, gone)])]
        path = write("table.csv", "\n".join(["image,mask_image,prompt", *lines]))
        prompts = {"path": path, "images_per_row": 3}
        rows = read(make_job(prompts=prompts, sampling={"height": SIDE, "width": SIDE}))

        assert server.requests == {"a": 1, "b": 1, "mask": 1, "gone": 2}  # as image and as mask
    assert [row["image_sha256"] is None for row in rows[::3]] == [False] * 5 + [True] * 3
    assert [row["mask_sha256"] is None for row in rows[::3]] == [
        *[False] * 2,
        True,
        *[False] * 2,
        *[True] * 3,
    ]
    assert "mask_image = " in rows[-1]["error"]


def test_a_full_disk_ends_the_run_in_one_line(make_job, write, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pictures, "open", full, raising=False)
    with serving(a=PNG) as server:
        url = server.url("a")
        path = write("table.csv", f"image,mask_image,prompt\n{url},{url},a dog\n")
        with pytest.raises(StorageError, match=r"= No space left on device: must have.*TMPDIR"):
            read(make_job(prompts={"path": path}))


def test_a_busy_server_is_asked_again(make_job, write, monkeypatch, caplog):
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    with serving(a=503) as server:
        url = f"{server.url('a')}?X-Amz-Signature=hush"
        path = write("table.csv", f"image,prompt\n{url},a dog\n")
        answer = _Handler.do_GET

        def recover(handler):
            answer(handler)
            if handler.server.requests["a"] == 2:
                handler.server.files["a"] = PNG

        monkeypatch.setattr(_Handler, "do_GET", recover)
        (row,) = read(make_job(prompts={"path": path}))
        assert row["error"] is None
        assert server.requests == {"a": 3}
        assert "Trying again" in caplog.text
        assert "hush" not in caplog.text


def test_rows_with_one_picture_and_other_sizes_have_it_in_their_own(make_job, write):
    write("a.png", save(colours(32, 32)))
    path = write("t.csv", "prompt,image,height,width\na,a.png,16,8\nb,a.png,8,8\nc,a.png,9,8\n")
    first, second, failed = read(make_job(prompts={"path": path}))
    shapes = [
        Prepared.from_bytes(row[INPUTS.name]).arrays["image"].shape for row in (first, second)
    ]
    assert shapes == [(16, 8, 3), (8, 8, 3)]
    assert "height = '9': must be a multiple of 8" in failed["error"]


def test_captions_of_a_row_share_its_picture(make_job, tmp_path):
    table = pa.table({"prompt": [["a", "b"], ["c"], ["d", "e"]], "image": [PNG, None, MASK]})
    rows = of_table(make_job, tmp_path, table)
    expected = [sha256(PNG), sha256(PNG), None, sha256(MASK), sha256(MASK)]
    assert [row["prompt"] for row in rows] == list("abcde")
    assert [row["image_sha256"] for row in rows] == expected


@pytest.mark.parametrize("size", [1, 2, 5])
def test_pictures_are_the_same_when_the_table_is_cut_otherwise(make_job, tmp_path, size):
    files = [save(colours(SIDE, SIDE, seed)) for seed in range(5)]
    table = pa.table({"prompt": list("abcde"), "image": files})
    job = small_job(make_job, tmp_path, table, output={"images_per_shard": size})
    assert [row["image_sha256"] for row in read(job)] == list(map(sha256, files))


def test_a_picture_is_no_column_of_the_output_unless_it_is_kept(make_job, tmp_path):
    table = pa.table({"prompt": ["a"], "photo": pa.array([{"bytes": PNG, "path": "p"}]), "n": [1]})
    columns = {"image": "photo"}
    job = small_job(make_job, tmp_path, table, prompts={"columns": columns})
    assert open_table(job.prompts).extras.names == ["n"]
    (row,) = of_table(make_job, tmp_path, table, prompts={"columns": columns, "keep": ["photo"]})
    assert row["photo"]["bytes"] == PNG
    assert row["image_sha256"] == sha256(PNG)


def test_a_note_says_that_rows_are_drawn_from_pictures_and_how_to_turn_it_off(make_job, tmp_path):
    table = pa.table({"prompt": ["a"], "image": [PNG], "mask_image": [MASK]})
    job = small_job(make_job, tmp_path, table)
    (note,) = describe_table(job, open_table(job.prompts))
    assert note == (
        "rows are drawn from their pictures in column 'image'; prompts.columns.image=null turns "
        "it off"
    )
    off = {"columns": {"image": None, "mask_image": None}}
    job = small_job(make_job, tmp_path, table, prompts=off)
    notes = [*describe_table(job, open_table(job.prompts))]
    assert [note.partition(":")[0] for note in notes] == [
        "column 'image' is not used and not copied",
        "column 'mask_image' is not used and not copied",
    ]
    assert read(job)[0][INPUTS.name] is None


def test_a_parquet_file_of_pictures_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    files = [bytes([i]) * 1000 for i in range(100)]
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": files}), path, row_group_size=40, use_dictionary=False)
    monkeypatch.setattr(parquet, "PHOTO_BYTES", 5000)
    parts = [*parquet.iter_rows(path, (15, 93), pa.schema([("image", pa.binary())]))]
    assert max(len(part) for part in parts) <= 5
    assert [cell for part in parts for cell in part["image"].to_pylist()] == files[15:93]


def test_the_shards_of_pictures_keep_their_numbers(make_job, tmp_path):
    job = small_job(make_job, tmp_path, pa.table({"prompt": ["a"] * 3, "image": [PNG] * 3}))
    plan, stage, blocks = read_stage(job)
    assert [shard_of(stage(block)) for block in blocks] == list(plan.shards)


SIZED = {
    "a.png": (save(colours(17, 30)), (16, 24)),  # height and width
    "turned.jpg": (
        save(
            colours(40, 16),
            "JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\6\0\0\0\0\0\0",
        ),
        (16, 40),
    ),
    "long.png": (
        save(colours(8, 4104)),
        "image = 4104 x 8 pixels.*width = 4104: must be less than or equal to 4096",
    ),
    "broken.png": (PNG[:20], "image = a truncated PNG file"),
}


def test_rows_have_the_size_of_their_picture_where_the_job_asks_and_they_set_none(make_job, write):
    for name, (file, _) in SIZED.items():
        write(name, file)
    lines = [f"{name},," for name in SIZED] + ["a.png,8,", "a.png,24,32", ",,"]
    path = write(
        "t.csv", "\n".join(["image,height,width,prompt", *(f"{line},a" for line in lines)])
    )
    prompts = {"path": path, "size_from_image": True, "images_per_row": 2}
    rows = read(make_job(prompts=prompts, sampling={"height": 64, "width": 48}))[::2]

    for row, (_, expected) in zip(rows, SIZED.values(), strict=False):
        if isinstance(expected, tuple):
            assert (row["height"], row["width"], row["error"]) == (*expected, None)
            shape = Prepared.from_bytes(row[INPUTS.name]).arrays["image"].shape
            assert shape == (*expected, 3)
        else:
            with pytest.raises(ValueError, match=expected):
                raise ValueError(row["error"])
    assert [(row["height"], row["width"]) for row in rows[4:]] == [(8, 48), (24, 32), (64, 48)]


def test_a_size_from_a_picture_that_the_rows_other_values_forbid_fails_it_in_one_line(
    make_job, tmp_path
):
    table = pa.table({"prompt": ["a"], "image": [save(colours(8, 4096))], "hires_scale": [4.0]})
    (row,) = of_table(make_job, tmp_path, table, prompts={"size_from_image": True})
    assert row["error"].startswith("hires_scale = 4: must leave sides of at most 8192 pixels")
    assert "\n" not in row["error"]


def test_no_column_of_a_table_has_the_name_of_the_pictures_on_their_way(make_job, write):
    path = write("t.csv", f"prompt,{INPUTS.name}\na dog,1\n")
    with pytest.raises(PromptTableError, match=f"column '{INPUTS.name}' of the table = the name"):
        open_table(make_job(prompts={"path": path}).prompts)


def test_a_size_from_pictures_needs_a_column_of_them(make_job):
    with pytest.raises(PromptTableError, match=r"size_from_image = true: .*columns\.image=NAME"):
        open_table(make_job(prompts={"size_from_image": True}).prompts)
