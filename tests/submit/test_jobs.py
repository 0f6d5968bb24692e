"""Ray's job API behind a proxy that cuts connections; a real cluster is in tests/ray."""

import json
import logging
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sdbatch import retries
from sdbatch.errors import JobError
from sdbatch.submit.jobs import DIGEST, Jobs, Submission

SUBMISSION = Submission("sdbatch run job.yaml", {}, "s3://b/out", "content", 0)


class Dashboard(ThreadingHTTPServer):
    """The part of Ray's dashboard that submits jobs, with the first answers cut."""

    def __init__(self, cuts):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts = cuts  # answers of each method and path
        self.requests = Counter()
        self.jobs = []

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        jobs = self.server.jobs
        self.answer({"ray_version": "2.60.0"} if self.path == "/api/version" else jobs)

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = sent["submission_id"]
        if any(job["submission_id"] == name for job in self.server.jobs):
            self.send_error(500, f"Job with submission_id {name} already exists.")
            return
        self.server.jobs.append(
            {
                "type": "SUBMISSION",
                "status": "PENDING",
                "entrypoint": sent["entrypoint"],
                "submission_id": name,
                "metadata": sent["metadata"],
            }
        )
        self.answer({"job_id": name, "submission_id": name})

    def answer(self, value):
        request = f"{self.command} {self.path}"
        self.server.requests[request] += 1
        if self.server.requests[request] <= self.server.cuts:
            self.connection.close()
            return
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard(monkeypatch):
    """Return a function that starts a dashboard whose first answers are cut."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.01)
    servers = []

    def start(cuts):
        server = Dashboard(cuts)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_request_whose_answer_was_cut_is_sent_again_and_the_job_is_submitted_once(
    dashboard, caplog
):
    server, address = dashboard(cuts=2)
    with caplog.at_level(logging.WARNING):
        jobs = Jobs(address)
        assert jobs.find_active(SUBMISSION.output) is None
        name = jobs.submit(SUBMISSION, None)
    assert [job["submission_id"] for job in server.jobs] == [name]
    assert jobs.find_active(SUBMISSION.output) == name
    assert "Trying again" in caplog.text


def test_another_job_of_the_same_name_is_not_taken_for_ones_own(dashboard):
    server, address = dashboard(cuts=0)
    jobs = Jobs(address)
    name = jobs.submit(SUBMISSION, None)
    server.jobs[0]["metadata"][DIGEST] = "another"
    server.jobs[0]["submission_id"] = name[:-1] + "2"  # taken between listing and submitting
    with pytest.raises(JobError, match="already exists"):
        jobs.submit(SUBMISSION, None)


def test_an_address_where_nothing_listens_is_an_error_at_once(dashboard):
    server, address = dashboard(cuts=0)
    server.shutdown()
    server.server_close()
    with pytest.raises(JobError, match="Must be the reachable dashboard"):
        Jobs(address)
