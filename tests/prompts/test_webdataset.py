"""WebDataset tar files as prompt tables, and folders of images with their metadata."""

import io
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdbatch import storage
from sdbatch.errors import PromptTableError
from sdbatch.prompts.check import describe_table
from sdbatch.prompts.table import open_table
from tests.finished import SIDE, finish, read_stage, small_job
from tests.pictures import colours, save, sha256

PNG, OTHER = (save(colours(SIDE, SIDE, seed)) for seed in range(2))
JPG = save(colours(SIDE, SIDE, 2), "JPEG")
MASK = save(colours(SIDE, SIDE, 3)[..., 0])
MEMBERS = {
    "one/0001.jpg": JPG,
    "one/0001.json": json.dumps({"width": 16, "url": "a"}),
    "one/0001.txt": "a red dog\n",
    "one/0001.cls": "7",
    "one/0002.PNG": PNG,
    "one/0002.mask.png": MASK,
    "one/0002.caption": "a cat, v1.5",
    "./two.x.png": OTHER,
    "three.json": json.dumps({"prompt": "a bird", "width": None}),
    "four.txt": b"\xff\xfe",
    "five.json": "{",
}


def tar_of(members, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def read(job):
    _, stage, blocks = read_stage(job)
    return [row for block in blocks for row in stage(block).to_pylist()]


def job_of(make_job, tmp_path, path, **prompts):
    return small_job(make_job, tmp_path, prompts={"path": str(path), **prompts})


def test_a_sample_of_a_tar_is_a_row_with_its_picture_and_its_mask(make_job, tmp_path):
    job = job_of(make_job, tmp_path, tar_of(MEMBERS, tmp_path / "a.tar"))
    table = open_table(job.prompts)
    assert (table.rows, table.extras.names) == (6, ["__key__", "url"])
    rows = read(job)

    assert [row["__key__"] for row in rows] == ["one/0001", "one/0002", "two", "three", None, None]
    assert [row["prompt"] for row in rows[:4]] == ["a red dog", "a cat, v1.5", None, "a bird"]
    assert [row["width"] for row in rows[:4]] == [16, SIDE, SIDE, SIDE]
    assert [row["image_sha256"] for row in rows[:2]] == [sha256(JPG), sha256(PNG)]
    assert [row["mask_sha256"] for row in rows[:2]] == [None, sha256(MASK)]
    errors = [row["error"] for row in rows]
    assert errors[:2] == [None, None]
    assert "prompt = null" in errors[2]  # two.x.png has no prompt
    assert errors[3] is None
    assert "sample 'four' = 'utf-8' codec" in errors[4]
    assert "sample 'five' = Expecting property name" in errors[5]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_rows_of_tars_are_the_same_when_cut_otherwise(make_job, tmp_path, size):
    (tmp_path / "shards").mkdir()
    files = [save(colours(SIDE, SIDE, seed)) for seed in range(7)]
    for shard in range(2):
        numbers = range(4 * shard, min(7, 4 * shard + 4))
        members = {
            f"{n}.{kind}": data
            for n in numbers
            for kind, data in (("txt", f"dog {n}"), ("png", files[n]))
        }
        tar_of(members, tmp_path / f"shards/{shard:06d}.tar")
    job = job_of(make_job, tmp_path, tmp_path / "shards", columns={"id": "__key__"})
    rows = read(job.updated(output=job.output.updated(images_per_shard=size)))
    assert [row["row_key"] for row in rows] == list(map(str, range(7)))
    assert [row["image_sha256"] for row in rows] == list(map(sha256, files))


class _Counted(io.BytesIO):
    """A file that counts the bytes that are read."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        _Counted.count += len(data)
        return data


def test_a_tar_is_inspected_without_reading_its_pictures(make_job, tmp_path, monkeypatch):
    members = {}
    for number in range(20):
        members |= {f"{number}.jpg": bytes(200_000), f"{number}.txt": "a dog"}
    path = tar_of(members, tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    prompts = job_of(make_job, tmp_path, path).prompts
    monkeypatch.setattr(storage, "open_file", lambda url: _Counted(data))
    assert open_table(prompts).rows == 20
    assert 0 < _Counted.count < 200_000


BAD_TARS = {
    "compressed": lambda path: tar_of(MEMBERS, path, "w:gz"),
    "cut in a picture": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "overwritten": lambda path: path.write_bytes(path.read_bytes()[:2048] + b"x" * 4096),
    "a text": lambda path: path.write_text("a red dog\n" * 100),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", BAD_TARS.values(), ids=BAD_TARS)
def test_a_damaged_tar_is_an_error_and_no_shorter_table(make_job, tmp_path, damage):
    path = tmp_path / "a.tar"
    tar_of({"a.txt": "a dog", "a.png": PNG, "b.txt": "a cat"}, path)
    damage(path)
    with pytest.raises(PromptTableError, match=r"a\.tar = .*: must "):
        open_table(job_of(make_job, tmp_path, path).prompts)


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_an_output_of_sdbatch_as_a_table_says_that_its_images_are_drawn_from(
    make_job, tmp_path, output_format
):
    first = small_job(make_job, tmp_path, ("a dog", "a cat"), output={"format": output_format})
    data = tmp_path / "data"
    shutil.copytree(finish(first).folder / "data", data)
    with pytest.raises(PromptTableError, match=r"'key' of the table = .*prompts\.keep=\["):
        open_table(job_of(make_job, tmp_path, data).prompts)

    job = job_of(make_job, tmp_path, data, keep=[])
    notes = " ".join(describe_table(job, open_table(job.prompts)))
    assert "rows are drawn from their pictures in column 'image'" in notes
    assert [row["image_sha256"] is None for row in read(job)] == [False, False]
    off = job_of(make_job, tmp_path, data, keep=[], columns={"image": None})
    assert "from their pictures" not in " ".join(describe_table(off, open_table(off.prompts)))
    assert [row["image_sha256"] for row in read(off)] == [None, None]


ROWS = [
    {"file_name": "a.png", "text": "a dog", "mask_image_file_name": "masks/m.png"},
    {"file_name": "deep/b.png", "text": "a cat", "mask_image_file_name": None},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_folder_of_images_with_metadata_is_a_table(make_job, tmp_path, write, suffix):
    for name, file in {"a.png": PNG, "deep/b.png": OTHER, "masks/m.png": MASK}.items():
        write(f"pets/{name}", file)
    path = tmp_path / f"pets/metadata.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    elif suffix == "csv":
        lines = [",".join(cell or "" for cell in row.values()) for row in ROWS]
        path.write_text("\n".join([",".join(ROWS[0]), *lines]))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    job = job_of(make_job, tmp_path, tmp_path / "pets", columns={"prompt": "text"})
    table = open_table(job.prompts)
    assert (table.columns["image"], table.extras.names) == ("file_name", [])
    dog, cat = read(job)
    assert (dog["image_sha256"], dog["mask_sha256"]) == (sha256(PNG), sha256(MASK))
    assert (cat["image_sha256"], cat["mask_sha256"]) == (sha256(OTHER), None)

    off = job_of(
        make_job,
        tmp_path,
        tmp_path / "pets",
        columns={"prompt": "text", "image": None, "mask_image": None},
    )
    assert open_table(off.prompts).extras.names == ["file_name", "mask_image_file_name"]


def test_file_names_of_another_table_are_no_pictures(make_job, write, tmp_path):
    path = write("prompts.csv", "file_name,prompt\na.png,a dog\n")
    assert "image" not in open_table(job_of(make_job, tmp_path, path).prompts).columns
