"""An S3 server on loopback, behind a proxy that answers some requests itself: faults by HTTP."""

import contextlib
import http.client
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moto.server import ThreadedMotoServer

from tests.stores.servers import Place, fresh, post, s3_settings

ANSWERS = {  # a fault -> status and S3's code
    "throttled": (503, "SlowDown"),
    "denied": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "full": (507, "XMinioStorageFull"),
}
FAULTS = (*ANSWERS, "reset", "slow")
PARTLY = ("throttled", "reset")  # these meet every second request, the others all
SLOW_SECONDS = 2.0


class FaultyStore(ThreadingHTTPServer):
    """The proxy. `fault` is what happens to requests now; None: they pass."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.target = target
        self.fault: str | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Print nothing: clients are killed."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault
        if fault in PARTLY and random.random() < 0.5:
            fault = None
        if fault == "full" and self.command != "PUT":
            fault = None
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault in ANSWERS:
            status, code = ANSWERS[fault]
            text = f"<Error><Code>{code}</Code><Message>chaos</Message></Error>"
            self._answer(status, [("Content-Type", "application/xml")], text.encode())
        else:
            self._forward(body)

    def _forward(self, body: bytes) -> None:
        with contextlib.closing(http.client.HTTPConnection(*self.server.target)) as server:
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length")
            ]
            length = answer.getheader("Content-Length")
            self._answer(answer.status, kept, answer.read(), length)

    def _answer(self, status, headers, body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        # of a HEAD request: that of the object
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_) -> None:
        """Print nothing."""


@contextlib.contextmanager
def faulty_s3() -> Iterator[tuple[Place, FaultyStore]]:
    """Start both; yield the bucket without the proxy, and the proxy."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it prints each request
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    target = moto.get_host_and_port()
    post(f"http://{target[0]}:{target[1]}/moto-api/reset")
    place = Place("s3://datasets", None)
    with FaultyStore(target) as proxy, fresh("s3"):
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        with place.with_settings(**s3_settings(f"{target[0]}:{target[1]}")):
            place.filesystem.mkdir("datasets")
            yield place, proxy
        proxy.shutdown()
    moto.stop()


def download(place: Place, url: str, folder: Path) -> None:
    """Copy all objects below a URL to a local folder, not through the proxy."""
    root = url.partition("://")[2]
    for key in place.filesystem.find(root):
        path = folder / key.removeprefix(f"{root}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(place.filesystem.cat_file(key))
