"""A store that fails in the middle of a run, and one that never answers."""

import socket
import threading
from contextlib import contextmanager, suppress

import pytest

from sdbatch import retries, storage
from sdbatch.cli import main
from sdbatch.errors import StorageError
from sdbatch.output.verify import verify_output
from sdbatch.report.progress import SilentDisplay, SteadyDisplay
from sdbatch.storage import Store
from tests.fakes import FakeEngine
from tests.stores import servers
from tests.without_ray import draw

EXPIRED = (
    "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)


@pytest.fixture
def place(monkeypatch):
    """An S3 server behind a proxy, with connections that wait half a second for an answer."""
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.5)
    with servers.start("s3") as place:
        yield place


@pytest.fixture
def job(make_job, place):
    """A job of six shards with an output on S3."""
    return make_job(
        sampling={"height": 8, "width": 8},
        output={"path": f"{place.url}/out", "images_per_shard": 1},
    )


class Failing(FakeEngine):
    """Calls `fail` before it draws the third image."""

    def __init__(self, fail):
        super().__init__()
        self._fail = fail

    def _draw(self, request):
        if self.usage.ticks == 2:
            self._fail()
        return super()._draw(request)


class Shown(SilentDisplay):
    """Counts how often it is shown something."""

    def __init__(self):
        self.times = 0

    def show(self, progress):
        self.times += 1


def committed(place):
    return [name for name in place.keys("out") if name.startswith("receipts/")]


def test_a_token_that_expires_in_mid_run_stops_the_run_with_one_line_about_keys(place, job):
    report = draw(job, make_engine=lambda: Failing(lambda: place.proxy.answer(400, EXPIRED)))
    assert report.exit_code == 1
    assert report.stopped.startswith(f"{place.url}/out")
    assert "The provided token has expired" in report.stopped
    assert report.stopped.endswith("Check permissions and keys.")
    assert "\n" not in report.stopped
    assert "resume:      run the same command again" in report.text()
    place.proxy.forward()
    assert len(committed(place)) < 6
    assert draw(job).exit_code == 0
    assert list(verify_output(Store(job.output.path))) == []


def test_a_store_that_does_not_answer_any_more_stops_the_run_while_it_is_still_shown(place, job):
    shown = Shown()
    seen = []

    def fall_silent():
        place.proxy.fall_silent()
        seen.append(shown.times)

    display = SteadyDisplay(shown)
    report = draw(job, make_engine=lambda: Failing(fall_silent), display=display)
    assert report.exit_code == 1
    assert report.stopped.startswith(f"{place.url}/out")
    assert "must be reachable" in report.stopped
    assert "\n" not in report.stopped
    assert shown.times > seen[0]
    place.proxy.forward()
    assert draw(job).exit_code == 0
    assert list(verify_output(Store(job.output.path))) == []


@contextmanager
def silent_server():
    """Accept connections and never answer; yield the address and the number of connections."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            with suppress(OSError):
                while True:
                    connections.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        host, port = listener.getsockname()
        yield f"{host}:{port}", connections
        listener.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(("budget", "most"), [(0.0, 1), (1.0, 2)])
def test_an_upload_to_a_server_that_never_answers_ends(place, monkeypatch, budget, most):
    """After BUDGET_SECONDS, and ANSWER_SECONDS of the last attempt: three minutes."""
    monkeypatch.setattr(retries, "BUDGET_SECONDS", budget)
    with silent_server() as (address, connections):
        with (
            place.with_settings(**servers.s3_settings(address)),
            pytest.raises(StorageError, match=rf"^{place.url}/out/a = .*must be reachable"),
        ):
            Store(f"{place.url}/out").put("a", b"1")
        assert len(connections) <= most


def test_a_wrong_endpoint_is_reported_while_the_run_waits_for_it(place, monkeypatch, capfd, write):
    monkeypatch.setattr(retries, "BUDGET_SECONDS", 6.0)
    job = write(
        "job.yaml",
        "prompts: {rows: [{prompt: a dog}]}\nmodel: builtin:shapes\n"
        f"output: {{path: '{place.url}/out'}}\n",
    )
    with (
        place.with_settings(**servers.s3_settings(servers.NOWHERE)),
        pytest.raises(SystemExit) as ended,
    ):
        main(["run", job])
    assert ended.value.code == 2
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith(f"{place.url}/out/job.yaml: ")
    assert servers.NOWHERE in first
    assert "Trying again in" in first
    assert last.startswith(f"Error: {place.url}/out/job.yaml = ")
