"""Secrets in the URLs of a job: used to connect, and in nothing that is shown or written."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from sdbatch.batch import pipeline
from sdbatch.cli import main
from sdbatch.errors import JobError, SdbatchError
from sdbatch.job import load, parse
from sdbatch.output import identity
from sdbatch.report.progress import JsonDisplay
from sdbatch.submit import SubmitOptions, make_submission
from tests import without_ray

SECRETS = ("hunter2", "c2lnbmVk")
CSV = "prompt,n\na red dog,1\nfail,2\n"


class _Handler(BaseHTTPRequestHandler):
    """Serves CSV to a user with the password, or for the signature."""

    def do_GET(self):
        word = base64.b64encode(b"me:hunter2").decode()
        by_password = self.headers.get("Authorization") == f"Basic {word}"
        if (by_password and self.path == "/p.csv") or self.path == "/p.csv?n=1&sig=c2lnbmVk":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CSV)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(CSV.encode())
        else:
            self.send_response(403)
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def job_file(tmp_path, host):
    """Write a job file with a prompts.path of the host."""
    (tmp_path / "out").mkdir()

    def write(path: str) -> Path:
        values = {
            "prompts": {"path": path.format(host)},
            "model": "builtin:shapes",
            "sampling": {"height": 64, "width": 64, "num_inference_steps": 2},
            "output": {"path": str(tmp_path / "out")},
        }
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return write


def assert_no_secret(text: str | bytes) -> None:
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    assert [secret for secret in SECRETS if secret in text] == []


def run(path: Path):
    """Run a job file without Ray, with the fake engine."""
    return without_ray.draw(load(path), display=JsonDisplay(sys.stdout))


URLS = ("http://me:hunter2@{}/p.csv", "http://{}/p.csv?n=1&sig=c2lnbmVk")


@pytest.mark.parametrize("url", URLS, ids=["password", "signature"])
def test_no_file_and_no_line_of_a_run_holds_a_secret(job_file, tmp_path, capsys, url):
    path = job_file(url)
    assert run(path).images == 1
    for command in ("status", "verify", "sheet"):
        with pytest.raises(SystemExit):
            main([command, str(tmp_path / "out")])
    for arguments in (["plan", str(path)], ["plan", str(path), "--json"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr()
    assert_no_secret(printed.out + printed.err)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) >= 9
    for file in files:
        assert_no_secret(file.read_bytes())


@pytest.mark.parametrize("url", URLS, ids=["password", "signature"])
def test_resume_needs_the_secret_again_as_the_record_has_none(job_file, tmp_path, host, url):
    path = job_file(url)
    run(path)
    assert pipeline.find_work(pipeline.prepare(load(path))).todo == []
    recorded = yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())["job"]
    shown = {URLS[0]: "http://{}/p.csv", URLS[1]: "http://{}/p.csv?n=1"}[url]
    assert recorded["prompts"]["path"] == shown.format(host)
    with pytest.raises(SdbatchError, match=r"p\.csv"):  # which is refused without it
        pipeline.prepare(parse(recorded))


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@{}/nothing/*.csv",
        "http://me:hunter2@{}/p.docx",
        "http://me:hunter2@127.0.0.1:1/p.csv",
        "http://me:hunter2@127.0.0.1:99999/p.csv",
        "http://me:hunter2@/p.csv",
        "http://wrong:hunter2@{}/p.csv",
        "http://{}/p.csv?sig=hunter2",
        "s3://me:hunter2@bucket/p.csv",
        "s3://me:hun/hunter2@bucket/p.csv",
        "s3://bucket/nothing.csv?X-Amz-Signature=hunter2",
        "foo://me:hunter2@host/p.csv",
        "ftp://me:hunter2@127.0.0.1:1/p.csv",
        "sftp://me:hunter2@127.0.0.1:1/p.csv",
        "simplecache::s3://me:hunter2@bucket/p.csv",
    ],
)
def test_error_about_a_url_is_one_line_without_its_secret(job_file, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SdbatchError) as caught:
        pipeline.prepare(load(job_file(url)))
    assert_no_secret(str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["prompts.path", "model.path", "output.path", "model.vae", "model.config"]
)
def test_no_key_is_recorded_or_identified_with_a_secret(make_job, key):
    section, name = key.split(".")
    model = {"path": "builtin:shapes"} if section == "model" else {}
    job = make_job(**{section: {**model, name: "http://me:hunter2@host/x?token=c2lnbmVk&n=1"}})
    assert_no_secret(json.dumps(job.model_dump(mode="json")))
    assert_no_secret(json.dumps(identity.identity(job, {})))
    assert_no_secret(job.title)
    assert "hunter2" in str(dict(job)[section])  # which connects


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": {"path": 3}, "model": {"path": ["s3://me:hunter2@bucket/" + "x" * 99]}},
        {
            "prompts": {"path": "a.csv"},
            "model": "m",
            "output": {"path": ["http://me:hunter2@host"]},
        },
        {"prompts": "http://me:hunter2@host/p.csv", "model": "m", "output": {"path": "out"}},
        {"output": {"path": "ftp://me:hunter2@"}, "prompts": {"path": "a.csv"}, "model": "m"},
    ],
)
def test_error_about_the_type_of_a_key_holds_no_secret_nor_does_its_cause(values):
    with pytest.raises(JobError) as caught:
        parse(values)
    assert_no_secret(f"{caught.value} {caught.value.__cause__}")


def test_traceback_of_a_command_holds_no_secret():
    probe = (
        "import sdbatch.cli as cli, sdbatch.job as job\n"
        "def fail(*_): raise ZeroDivisionError('http://me:hunter2@host/x?sig=c2lnbmVk')\n"
        "job.load = fail\n"
        "cli.main(['plan', 'job.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "ZeroDivisionError: http://host/x" in done.stderr
    assert_no_secret(done.stderr.partition("ZeroDivisionError: ")[2])


def test_submission_shows_the_dashboard_no_secret(job_file):
    path = str(job_file("s3://bucket/p.csv"))
    options = SubmitOptions(path)
    assert make_submission(options, {}, "s3://me:hunter2@bucket/x").output == "s3://bucket/x"
    options = SubmitOptions(path, ("prompts.path=http://me:hunter2@host/p.csv",))
    with pytest.raises(JobError, match="holds a password or key") as caught:
        make_submission(options, {}, "s3://bucket/x")
    assert_no_secret(str(caught.value))
    options = SubmitOptions(str(job_file(URLS[0])), image="sdbatch:cpu")
    with pytest.raises(JobError, match="dashboard would show the job file"):
        make_submission(options, {}, "s3://bucket/x")
