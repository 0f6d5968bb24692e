"""`sdbatch verify --redraw`: committed images have the bytes that drawing them again gives."""

import io
import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sdbatch import resolve, schema
from sdbatch.batch.redraw import redraw_images
from sdbatch.errors import StorageError
from sdbatch.job import parse
from sdbatch.models import find_model
from sdbatch.output import formats, identity, lease, names
from sdbatch.output.receipts import Writer
from sdbatch.output.record import require_record
from sdbatch.storage import Store
from tests.finished import finish
from tests.pictures import colours, save

KEYS = ["000000-000000", "000000-000001", "000000-000002"]


ROWS = [
    {"prompt": "a red circle", "seed": 5},
    {"prompt": "a blue square", "negative_prompt": "red", "guidance_scale": 3.0},
    {"prompt": "a green star", "sampler": "euler_a", "steps": 3, "breed": "none"},
]


def draw(folder, rows=ROWS, **output):
    """Draw three images with the embedded model into an output of one shard; return its path."""
    table = folder / "table.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = parse(
        {
            "prompts": {"path": str(table)},
            "model": "builtin:shapes",
            "sampling": {"height": 64, "width": 64, "num_inference_steps": 2},
            "engine": {"device": "cpu"},
            "output": {"path": str(folder / "out"), **output},
        }
    )
    files, job = resolve.find_model(job)
    resolved = resolve.resolve(job, files, 0, find_model.sha256(files))
    engine = resolved.make_engine(schema.OUTPUT_NAMES)()
    assert finish(resolved.job, lambda: engine).report.images == 3
    return folder / "out"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("parquet"))


@pytest.fixture
def output(original, tmp_path):
    """A copy of the output, to be changed."""
    return Store(str(shutil.copytree(original, tmp_path / "copy")))


def replace_images(store, change, versions=None):
    """Commit the shard again with other image files, as if `versions` of libraries drew it."""
    record = require_record(store)
    if versions is not None:
        fingerprint = identity.fingerprint(record.job, versions)
        values = yaml.safe_load(store.read(names.JOB))
        values.update(fingerprint=fingerprint, versions=versions)
        store.put(names.JOB, yaml.safe_dump(values).encode())
        record = require_record(store)
    (name,) = (f"data/{name}" for name in store.names("data"))
    rows = pq.read_table(io.BytesIO(store.read(name)))
    images = [{**image, "bytes": change(image["bytes"])} for image in rows["image"].to_pylist()]
    at = rows.schema.get_field_index("image")
    rows = rows.set_column(at, rows.schema.field(at), pa.array(images, rows.schema.field(at).type))
    writer = Writer(lease.take(store), record.fingerprint)
    files = {name: formats.write_shard(rows, record.job.output)}
    writer.commit(record.planned()[0], {}, files, {})


def encode_again(data):
    """Return nearly the same picture in other bytes."""
    sink = io.BytesIO()
    Image.open(io.BytesIO(data)).save(sink, "jpeg", quality=80)
    return sink.getvalue()


def test_images_drawn_again_have_the_same_bytes(original):
    redrawn = sorted(redraw_images(Store(str(original)), 3), key=lambda each: each.key)
    assert [each.key for each in redrawn] == KEYS
    for each in redrawn:
        assert (each.same_bytes, each.versions_differ, each.is_fault) == (True, False, False)
        assert each.psnr == math.inf
        assert each.text() == f"{each.key}: drawn again, the same bytes"


def test_images_of_another_format_drawn_again_have_the_same_bytes(tmp_path):
    path = draw(tmp_path, format="webdataset", image_format="png")
    assert [each.same_bytes for each in redraw_images(Store(str(path)), 3)] == [True] * 3


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (2, 2), (99, 3)])
def test_as_many_different_images_are_drawn_as_wanted_or_as_there_are(original, count, drawn):
    keys = [each.key for each in redraw_images(Store(str(original)), count)]
    assert len(set(keys)) == len(keys) == drawn
    assert set(keys) <= set(KEYS)


def test_an_image_whose_bytes_were_replaced_is_a_fault_with_its_psnr(output):
    replace_images(output, encode_again)
    for each in redraw_images(output, 3):
        assert (each.same_bytes, each.is_fault) == (False, True)
        assert 20 < each.psnr < 60
        assert each.text() == (
            f"{each.key}: drawn again with the same library versions, PSNR {each.psnr:.1f} dB"
        )


def test_an_image_in_place_of_another_is_a_fault_with_a_low_psnr(output):
    first = []

    def first_image(data):
        first.append(data)
        return first[0]

    replace_images(output, first_image)
    faults = {each.key: each for each in redraw_images(output, 3) if each.is_fault}
    assert sorted(faults) == KEYS[1:]
    assert all(fault.psnr < 25 for fault in faults.values())


def test_an_image_of_another_size_is_a_fault_without_a_psnr(output):
    def shrink(data):
        sink = io.BytesIO()
        Image.open(io.BytesIO(data)).resize((8, 8)).save(sink, "jpeg")
        return sink.getvalue()

    replace_images(output, shrink)
    assert [(each.is_fault, each.psnr) for each in redraw_images(output, 3)] == [(True, 0.0)] * 3


@pytest.mark.parametrize("versions", [None, {**identity.versions(), "torch": "0.9"}])
def test_an_image_that_cannot_be_decoded_is_a_fault(output, versions):
    replace_images(output, lambda data: b"no image", versions)
    faults = list(redraw_images(output, 3))
    assert [(each.is_fault, each.psnr) for each in faults] == [(True, None)] * 3
    for each in faults:
        assert each.text() == (
            f"{each.key}: drawn again, but the image of the output cannot be decoded"
        )


def test_images_of_other_library_versions_have_a_psnr_and_are_no_fault(output):
    versions = {**identity.versions(), "torch": "0.9"}
    replace_images(output, encode_again, versions)
    for each in redraw_images(output, 3):
        assert (each.same_bytes, each.versions_differ, each.is_fault) == (False, True, False)
        assert 20 < each.psnr < 60
        assert each.text() == (
            f"{each.key}: drawn again with other library versions, PSNR {each.psnr:.1f} dB"
        )


def test_the_same_bytes_of_other_library_versions_are_the_same_bytes(output):
    replace_images(output, lambda data: data, {**identity.versions(), "torch": "0.9"})
    assert next(redraw_images(output, 1)).text().endswith(", the same bytes")


def test_an_output_without_an_image_is_an_error(output, tmp_path):
    output.remove(names.receipt_file(0))
    with pytest.raises(StorageError, match="has no image yet"):
        list(redraw_images(output, 1))
    with pytest.raises(StorageError, match=r"no job\.yaml: must be the output of a job"):
        list(redraw_images(Store(str(tmp_path / "nothing")), 1))


@pytest.fixture(scope="module")
def from_pictures(tmp_path_factory):
    """An output of which two images were drawn from a picture, one around a mask."""
    folder = tmp_path_factory.mktemp("pictures")
    half = np.repeat([0, 255], 32)[None].repeat(64, 0).astype(np.uint8)
    (folder / "picture.png").write_bytes(save(colours(64, 64)))
    (folder / "mask.png").write_bytes(save(half))
    files = [{}, {"image": "picture.png"}, {"image": "picture.png", "mask_image": "mask.png"}]
    rows = [{"prompt": "a red circle", **each} for each in files]
    draw(folder, rows, image_format="png")
    return folder


def texts(folder):
    return {each.key: each.text() for each in redraw_images(Store(str(folder / "out")), 3)}


def test_images_drawn_from_pictures_have_them_again(from_pictures):
    assert texts(from_pictures) == {key: f"{key}: drawn again, the same bytes" for key in KEYS}


def test_a_picture_that_is_gone_or_changed_is_said_of_its_images_alone(from_pictures, monkeypatch):
    mask, picture = from_pictures / "mask.png", from_pictures / "picture.png"
    original, pixels = mask.read_bytes(), picture.read_bytes()
    mask.write_bytes(save(np.full((64, 64), 255, np.uint8)))
    found = texts(from_pictures)
    assert "the same bytes" in found[KEYS[0]]
    assert "the same bytes" in found[KEYS[1]]
    assert re.search("not drawn again: mask_sha256 = .*: must be .*Restore it", found[KEYS[2]])
    mask.unlink()
    assert "not drawn again: mask_image = 'mask.png': No such file" in texts(from_pictures)[KEYS[2]]
    mask.write_bytes(original)
    picture.unlink()
    assert ["not drawn" in text for _, text in sorted(texts(from_pictures).items())] == [
        False,
        True,
        True,
    ]
    picture.write_bytes(pixels)


def test_a_table_that_is_gone_is_said_of_images_drawn_from_pictures(from_pictures):
    table = from_pictures / "table.jsonl"
    table.rename(from_pictures / "moved.jsonl")
    redrawn = [*redraw_images(Store(str(from_pictures / "out")), 3)]
    (from_pictures / "moved.jsonl").rename(table)
    assert {each.key: each.obstacle is not None for each in redrawn} == dict(
        zip(KEYS, [False, True, True], strict=True)
    )
    assert not any(each.is_fault for each in redrawn)
    assert "table.jsonl: no such file" in redrawn[0].text()
