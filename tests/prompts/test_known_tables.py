"""Tables that people have, in their own layout: PartiPrompts, DiffusionDB, COCO, Flickr30k."""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import without_ray

# metadata.parquet of DiffusionDB: https://huggingface.co/datasets/poloclub/diffusiondb
DIFFUSIONDB = pa.table(
    {
        "image_name": pa.array(["a1.png", "b2.png", "c3.png"]),
        "prompt": ["a renaissance portrait", "a cat, (oil:1.2)", "fog"],
        "part_id": pa.array([1, 1, 2], pa.uint16()),
        "seed": pa.array([2615452219, 0, 7], pa.uint32()),
        "step": pa.array([5, 4, 3], pa.uint16()),
        "cfg": pa.array([7.0, 7.5, 3.0], pa.float32()),
        "sampler": pa.array([8, 4, 9], pa.uint8()),
        "width": pa.array([64, 64, 64], pa.uint16()),
        "height": pa.array([64, 72, 64], pa.uint16()),
        "user_name": ["u1", "u2", None],
        "timestamp": pa.array(
            [datetime.datetime(2022, 8, 11, tzinfo=datetime.UTC)] * 3, pa.timestamp("us", "UTC")
        ),
        "image_nsfw": pa.array([0.1, 2.0, 0.2], pa.float32()),
        "prompt_nsfw": pa.array([0.001, 0.9, 0.0], pa.float32()),
    }
)


@pytest.fixture
def drawn(make_job, tmp_path):
    """Return a function that draws a table and returns the rows of data/ and failed/."""

    def draw(path, **prompts):
        without_ray.draw(make_job(prompts={"path": str(path), **prompts}))
        out = tmp_path / "out"
        folders = [sorted((out / folder).glob("*.parquet")) for folder in ("data", "failed")]
        return [
            pa.concat_tables(map(pq.read_table, files)).to_pylist() if files else []
            for files in folders
        ]

    return draw


def test_diffusiondb_is_drawn_with_its_own_values(drawn, tmp_path):
    path = tmp_path / "metadata.parquet"
    pq.write_table(DIFFUSIONDB, path)
    columns = {"id": "image_name", "num_inference_steps": "step", "guidance_scale": "cfg"}
    images, failed = drawn(path, columns=columns)
    names = ("row_key", "seed", "num_inference_steps", "guidance_scale", "sampler", "height")
    assert [tuple(row[name] for name in names) for row in images] == [
        ("a1.png", 2615452219, 5, 7.0, "lms", 64),
        ("b2.png", 0, 4, 7.5, "euler_a", 72),
    ]
    assert [row["image_nsfw"] for row in images] == [pytest.approx(0.1), 2.0]
    (other,) = failed  # 9 is "others"
    assert other["error"].startswith("sampler = 9: must be a sampler's name")


def test_partiprompts_is_drawn_from_its_tsv(drawn, write):
    path = write(
        "PartiPrompts.tsv",
        "Prompt\tCategory\tChallenge\tNote\n"
        'a sign that says "Deep Learning"\tArts\tWriting & Symbols\t\n'
        "a tree\tOutdoor Scenes\tBasic\t\n",
    )
    images, failed = drawn(path, columns={"prompt": "Prompt"})
    assert [row["prompt"] for row in images] == ['a sign that says "Deep Learning"', "a tree"]
    assert [row["Category"] for row in images] == ["Arts", "Outdoor Scenes"]
    assert failed == []


def test_coco_captions_are_drawn_by_their_ids_at_the_jobs_size(drawn, write):
    path = write(
        "captions.jsonl",
        '{"image_id": 179765, "id": 38, "caption": "A black motorcycle", "width": 640, '
        '"height": 427}\n'
        '{"image_id": 179765, "id": 182, "caption": "A room", "width": 640, "height": 427}\n',
    )
    columns = {"prompt": "caption", "id": "id", "width": None, "height": None}
    images, failed = drawn(path, columns=columns)
    assert [(row["row_key"], row["width"], row["id"]) for row in images] == [
        ("38", 64, 38),
        ("182", 64, 182),
    ]
    assert failed == []


def test_flickr30k_is_drawn_caption_by_caption(drawn, tmp_path):
    path = tmp_path / "flickr.parquet"
    rows = {
        "caption": [["Two young guys", "Two friends"], ["Several men"]],
        "sentids": [["0", "1"], ["5"]],
        "split": ["train", "train"],
        "img_id": ["0", "1"],
        "filename": ["1000092795.jpg", "10002456.jpg"],
    }
    pq.write_table(pa.table(rows), path)
    images, _ = drawn(path, columns={"prompt": "caption", "id": "filename"})
    assert [(row["row_key"], row["prompt"], row["sentids"]) for row in images] == [
        ("1000092795.jpg-0", "Two young guys", ["0", "1"]),
        ("1000092795.jpg-1", "Two friends", ["0", "1"]),
        ("10002456.jpg-0", "Several men", ["5"]),
    ]
