"""`serve.keep`: long jobs and images by URL outlive the process that accepted or drew them."""

import asyncio
import os
import re
import socket
import stat

import fsspec
import numpy as np
import pytest
import yaml

from sdbatch.cli import main
from sdbatch.errors import JobError
from sdbatch.job import Serve
from sdbatch.serve import keep
from sdbatch.storage import Store
from tests.serve.conftest import (
    LEFT,
    PHOTO,
    PausedEngine,
    Recorder,
    file_of,
    job_of,
    pixels_of,
)
from tests.serve.keep.conftest import (
    JOBS,
    begin,
    end_of,
    files_of,
    poll,
)


def test_a_job_that_was_accepted_is_drawn_by_the_next_process_with_the_same_seeds(place, front):
    engine = PausedEngine()
    first = front(place, engine)
    job = begin(first, n=2, seed=None, negative_prompt="b", user="ann", output_format="webp")
    engine.wait_for(waiting=2)
    [(_, request, _), (_, second, _)] = engine.waiting
    first.close()
    engine = Recorder()
    state = end_of(front(place, engine), job)
    assert (state["status"], state["progress"]) == ("completed", 1.0)
    assert engine.requests == [request, second]
    assert [image["seed"] for image in state["result"]["data"]] == [request.seed, second.seed]
    assert state["result"]["output_format"] == "webp"


def test_an_ended_job_is_the_same_after_a_restart(place, front):
    first = front(place)
    completed, failed = begin(first, n=2, seed=3), begin(first, prompt="fail")
    states = [end_of(first, job) for job in (completed, failed)]
    assert [state["status"] for state in states] == ["completed", "failed"]
    first.close()
    engine = Recorder()
    second = front(place, engine)
    seen = [poll(second, job) for job in (completed, failed)]
    for state in (*states, *seen):
        state.pop("poll_url")  # the port is another one
    assert seen == states
    assert engine.requests == []


def test_a_job_that_was_cancelled_stays_cancelled(place, front):
    engine = PausedEngine()
    first = front(place, engine)
    job = begin(first)
    engine.wait_for(waiting=1)
    assert first.post(f"{job}/cancel").json()["status"] == "cancelled"
    engine.wait_for(waiting=1, cancelled=1)
    first.close()
    engine = Recorder()
    second = front(place, engine)
    assert poll(second, job)["status"] == "cancelled"
    again = second.post(f"{job}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")
    assert engine.requests == []


def test_jobs_are_drawn_again_in_the_order_of_their_acceptance_even_if_the_queue_is_full(
    place, front
):
    engine = PausedEngine()
    first = front(place, engine, queue=6)
    accepted = [begin(first, seed=seed, n=2) for seed in (10, 20, 30)]
    first.close()
    engine = PausedEngine()
    second = front(place, engine, queue=4, limits={"images": 4})
    engine.wait_for(waiting=6)
    assert [request.seed for _, request, _ in engine.waiting] == [10, 11, 20, 21, 30, 31]
    assert [poll(second, job)["queue_position"] for job in accepted] == [0, 2, 4]
    refused = second.post(prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    engine.draw_all()
    assert [end_of(second, job)["status"] for job in accepted] == ["completed"] * 3
    second.wait_for_pending(0)


def test_the_pictures_of_a_job_are_drawn_again_exactly_and_then_removed(folder, front):
    engine = PausedEngine()
    first = front(folder, engine)
    files = {"image": file_of(PHOTO), "mask": file_of(np.dstack([PHOTO, 255 - LEFT]))}
    answer = first.client.post(JOBS, data={"prompt": "a dog", "exact": "true"}, files=files)
    job = f"{JOBS}/{answer.json()['id']}"
    engine.wait_for(waiting=1)
    [(_, request, _)] = engine.waiting
    first.close()
    assert files_of(folder, job) == [".json", ".pictures"]
    engine = Recorder()
    second = front(folder, engine)
    state = end_of(second, job)
    [again] = engine.requests
    assert again.model_dump(exclude={"inputs"}) == request.model_dump(exclude={"inputs"})
    assert again.inputs.keys() == request.inputs.keys() == {"image", "mask"}
    assert all(np.array_equal(again.inputs[name], request.inputs[name]) for name in again.inputs)
    [image] = state["result"]["data"]
    assert image["exact"]
    pixels = pixels_of(image["b64_json"])
    assert np.array_equal(pixels[:, 32:], PHOTO[:, 32:])
    assert np.array_equal(pixels[:, :31], 255 - PHOTO[:, :31])
    assert ".pictures" not in files_of(folder, job)


def test_images_by_url_are_fetched_from_any_process(place, front):
    first, other = front(place), front(place)
    image = first.post(prompt="a", response_format="url").json()["data"][0]
    [of_job] = end_of(first, begin(first, response_format="url"))["result"]["data"]
    paths = [each["url"].removeprefix(first.url) for each in (image, of_job)]
    fetched = [first.client.get(path).content for path in paths]
    first.close()
    for server in (other, front(place)):
        answers = [server.client.get(path) for path in paths]
        assert [answer.content for answer in answers] == fetched
        assert {answer.headers["content-type"] for answer in answers} == {"image/png"}


def test_a_name_that_was_never_given_reads_no_file(folder, front):
    server = front(folder, maintained=False)
    (folder / "images" / "x.png").write_bytes(b"secret")
    (folder / "secret.png").write_bytes(b"secret")
    job = begin(server).rpartition("/")[2]
    for name in ("", ".", "..", "../secret.png", "x.png", f"{'0' * 14}-{'a' * 24}.md"):
        assert asyncio.run(server.service.stored_images.fetch(name)) is None
        assert asyncio.run(server.service.jobs.find(name)) is None
        assert asyncio.run(server.service.jobs.find(f"{name}/../jobs/{job}")) is None


def test_a_job_is_found_by_the_name_of_its_key_alone(folder, front, monkeypatch, tmp_path):
    first_key, second_key = "k" * 16, "l" * 16
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"ann: {first_key}\nbob: {second_key}\n")

    def get(server, key, job):
        return server.client.get(job, headers={"Authorization": f"Bearer {key}"}).status_code

    first = front(folder, keys=str(keys))
    first.client.headers["Authorization"] = f"Bearer {first_key}"
    job = begin(first)
    end_of(first, job)
    assert (get(first, first_key, job), get(first, second_key, job)) == (200, 404)
    first.close()
    keys.write_text(f"bob: {second_key}\n")
    assert get(front(folder, keys=str(keys)), second_key, job) == 404
    keys.write_text(f"ann: {'m' * 16}\nbob: {second_key}\n")
    assert get(front(folder, keys=str(keys)), "m" * 16, job) == 200


def test_a_job_of_another_process_that_is_polled_here_is_drawn_here_too_and_has_one_result(
    place, front
):
    old_engine, new_engine = PausedEngine(), PausedEngine()
    old, new = front(place, old_engine), front(place, new_engine, maintained=False)
    job = begin(old)
    old_engine.wait_for(waiting=1)
    assert poll(new, job)["status"] == "queued"
    new_engine.wait_for(waiting=1)
    new_engine.draw_all()
    state = end_of(new, job)
    old_engine.draw_all()
    old.wait_for_pending(0)
    for server in (old, new):
        assert poll(server, job)["result"] == state["result"]
    names = Store(f"{place}/jobs").names()
    assert sum(name.endswith(".png") for name in names) == 1


def test_a_job_that_is_cancelled_in_one_process_stays_so_when_another_has_drawn_it(place, front):
    engine = PausedEngine()
    old, new = front(place, engine), front(place, PausedEngine(), maintained=False)
    job = begin(old)
    engine.wait_for(waiting=1)
    assert new.post(f"{job}/cancel").json()["status"] == "cancelled"
    engine.draw_all()
    old.wait_for_pending(0)
    assert [poll(server, job)["status"] for server in (old, new)] == ["cancelled"] * 2


def test_only_the_services_user_can_read_the_folders(folder, front):
    old = os.umask(0)
    try:
        end_of(server := front(folder), begin(server))
        server.post(prompt="a", response_format="url")
    finally:
        os.umask(old)
    for path in (folder, folder / "jobs", folder / "images"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_folders_that_others_could_read_are_closed_or_refused(folder, monkeypatch):
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs").chmod(0o755)
    keep.prepare(Serve(keep=str(folder)))
    assert stat.S_IMODE((folder / "jobs").stat().st_mode) == 0o700
    (folder / "jobs").chmod(0o755)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    words = rf"^serve.keep = {folder}/jobs: others may read it \(mode 755\): must be a folder of"
    with pytest.raises(JobError, match=words):
        keep.prepare(Serve(keep=str(folder)))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "kept").write_text("")
    words = r"^serve.keep = .*/kept/images: .*: must be a folder that the service can create"
    with pytest.raises(JobError, match=words):
        keep.prepare(Serve(keep=str(tmp_path / "kept")))


def test_a_store_that_cannot_be_written_is_refused(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    words = r"^serve.keep = memory://kept/images: Permission denied: must be readable"
    with pytest.raises(JobError, match=words):
        keep.prepare(Serve(keep="memory://kept"))


def test_a_local_folder_is_the_same_one_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Serve(keep="kept").keep == str(tmp_path / "kept")
    assert Serve(keep="s3://bucket/kept").keep == "s3://bucket/kept"


def test_a_folder_that_was_removed_while_the_service_runs_is_not_created_again(
    folder, front, caplog
):
    """It would be readable by others."""
    server = front(folder, maintained=False)
    (folder / "jobs").rmdir()
    answer = server.post(JOBS, prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert not (folder / "jobs").exists()
    assert re.search(rf"serve.keep: {folder}/jobs/[0-9a-f]{{14}}-\.\.\.\.json = No", caplog.text)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_service_does_not_start_on_a_folder_that_it_cannot_write(tmp_path, capfd):
    (tmp_path / "kept").write_text("")
    job = job_of(model={"path": "builtin:shapes"}, serve={"keep": str(tmp_path / "kept")})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path / "job.yaml"), "--port", str(free_port())])
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"Error: serve.keep = {tmp_path}/kept/images: ")
