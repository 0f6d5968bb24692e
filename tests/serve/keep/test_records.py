"""Long jobs as files of a store: what is read is what was written, or is refused."""

import io
import json
import pickle
import zipfile

import pytest

from sdbatch.engine.request import Request
from sdbatch.inputs.prepare import prepare
from sdbatch.serve import records
from sdbatch.serve.drawer import DrawRequest, ImageFacts
from sdbatch.serve.errors import internal_error
from sdbatch.serve.jobs import JobEnd, LongJob
from sdbatch.serve.records import DamagedRecord
from sdbatch.serve.requests import ImageRequest, repeat
from sdbatch.serve.results import Result, ResultImage, secret_name
from tests.serve.conftest import ENCODING, LEFT, PHOTO, file_of

SAMPLING = {
    "seed": 2**63 - 9,
    "negative_prompt": "blurry",
    "num_inference_steps": 50,
    "guidance_scale": 7.1,
    "sampler": "euler_karras",
    "guidance_sigma_low": 0.1,
    "loras": "ink:0.3",
    "prompt_weights": True,
    "variation_seed": 2**53 + 1,
    "variation_strength": 0.1,
    "hires_scale": 1.7,
}
FACTS = ImageFacts(64, 64, 2, True, 9, False, True, nsfw=True, nsfw_scores=(0.25, -1.5), sha256="0")


def job_of(request, n=1, **options):
    template = DrawRequest(request, ENCODING, exact=True, previews=2)
    return LongJob(secret_name(), ImageRequest(repeat(template, n), **options), "ann")


def read(job):
    pictures = records.pictures_of(job)
    return records.read_accepted(records.write_accepted(job)).request(pictures)


@pytest.mark.parametrize("values", [{}, SAMPLING])
def test_a_request_is_the_same_when_it_is_read_again(values):
    request = Request.model_validate({"prompt": 'a "dog"\n\u2603 \U0001f415', **values})
    job = job_of(request, n=3, by_url=True, user="ann")
    assert read(job) == job.request


def test_pictures_are_the_same_when_they_are_read_again():
    request = Request(prompt="a dog", height=64, width=64)
    job = job_of(request, n=2)
    job.request = job.request.with_pictures(prepare(request, file_of(PHOTO), file_of(LEFT)))
    again = read(job)
    assert again.pictures_size == job.request.pictures_size
    for drawn, written in zip(again.draw_requests, job.request.draw_requests, strict=True):
        assert drawn.prepared == written.prepared
        assert drawn.hashes == written.hashes
        for name, pixels in written.request.inputs.items():
            assert (drawn.request.inputs[name] == pixels).all()


def test_an_end_is_the_same_when_it_is_read_again():
    job = job_of(Request(prompt="a"))
    result = Result(job.request, (ResultImage(FACTS, b"file"),), created=5)
    name = f"{secret_name()}.png"
    ended = records.read_ended(records.write_ended(JobEnd("completed", result, at=7.5), [name]))
    assert (ended.status, ended.at, ended.images_created, ended.error) == (
        "completed",
        7.5,
        5,
        None,
    )
    [image] = ended.images
    assert (image.facts, image.file) == (FACTS, name)
    error = internal_error().body["error"]
    ended = records.read_ended(records.write_ended(JobEnd("failed", error=error), []))
    assert (ended.status, ended.images, ended.error) == ("failed", [], error)


def test_a_record_that_was_not_written_so_is_refused():
    record = json.loads(records.write_accepted(job_of(Request(prompt="a"))))
    changed = [
        {**record, "more": 1},
        {**record, "requests": []},
        {**record, "exact": "yes"},
        {**record, "encoding": {**record["encoding"], "image_format": "exe"}},
        {**record, "requests": [{**record["requests"][0], "num_inference_steps": 0}]},
    ]
    files = [json.dumps(each).encode() for each in changed]
    for data in (*files, b"", b"null", pickle.dumps(record)):
        with pytest.raises(DamagedRecord, match="the record of the job"):
            records.read_accepted(data)
    with pytest.raises(DamagedRecord, match="the record of its end"):
        records.read_ended(b"{}")


def test_inputs_in_a_record_are_not_used():
    record = json.loads(records.write_accepted(job_of(Request(prompt="a"))))
    record["requests"][0]["inputs"] = {"image": "anything"}
    assert records.read_accepted(json.dumps(record).encode()).request(None).first.inputs == {}


def zipped(compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as members_file:
        for name, data in members.items():
            members_file.writestr(name, data)
    return file.getvalue()


FACTS_OF_PICTURES = json.dumps(
    {"sha256": {}, "box": [], "part": [], "keep_alpha": False, "resample": "box"}
)


@pytest.mark.parametrize(
    "file",
    [
        b"",
        pickle.dumps({}),
        zipped(image=file_of(PHOTO)),
        zipped(facts="null"),
        zipped(facts="{"),
        zipped(facts='{"box": [], "part": [], "other": 1}'),
        zipped(facts=FACTS_OF_PICTURES, image="no picture"),
        zipped(zipfile.ZIP_DEFLATED, facts=FACTS_OF_PICTURES, image=bytes(10**6)),
    ],
)
def test_a_file_of_pictures_that_was_not_written_so_is_refused(file):
    record = records.read_accepted(records.write_accepted(job_of(Request(prompt="a"))))
    with pytest.raises(DamagedRecord, match="the file of its pictures"):
        record.request(file)
