"""A proxy on loopback that breaks connections, answers itself, or never answers."""

import contextlib
import math
import socket
import socketserver
import threading
from collections.abc import Iterator

CHUNK = 65536


class Proxy(socketserver.ThreadingTCPServer):
    """Forward every connection to `target`, as long as the limit of uploaded bytes allows."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target: tuple[str, int]
        self.broken = threading.Event()  # the limit was reached
        self._left = math.inf
        self._lock = threading.Lock()
        self.own_answer: bytes | None = None  # instead of the target's; empty: none at all

    @property
    def address(self) -> str:
        host, port = self.server_address
        return f"{host}:{port}"

    @contextlib.contextmanager
    def breaks_after(self, size: int) -> Iterator[None]:
        """Break every connection once clients have sent `size` bytes in this context."""
        self._left = size
        self.broken.clear()
        yield
        assert self.broken.is_set(), "less was sent"
        self._left = math.inf

    def answer(self, status: int, body: str) -> None:
        """Answer every request from now on, until `forward`."""
        head = f"HTTP/1.1 {status} \r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.own_answer = f"{head}{body}".encode()

    def fall_silent(self) -> None:
        """Accept every connection from now on and never answer, until `forward`."""
        self.own_answer = b""

    def forward(self) -> None:
        """Be a proxy again."""
        self.own_answer = None

    def allows(self, size: int) -> bool:
        """Count bytes of an upload; return whether they may pass."""
        if self.own_answer is not None:
            return False
        with self._lock:
            self._left -= size
            if self._left < 0:
                self.broken.set()
            return self._left >= 0

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        if self.server.own_answer is not None:
            self._answer(self.server.own_answer)
            return
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as server:
            back = threading.Thread(target=_forward, args=(server, self.request), daemon=True)
            back.start()
            _forward(self.request, server, self.server.allows)
            back.join()

    def _answer(self, answer: bytes) -> None:
        """Read all that the client sends; answer once its first request has begun."""
        with contextlib.suppress(OSError):
            while self.request.recv(CHUNK):
                self.request.sendall(answer)
                answer = b""


def _forward(source, target, allows=lambda size: True) -> None:
    """Copy bytes from one socket to another until it ends or a limit; then end both."""
    with contextlib.suppress(OSError):
        while (data := source.recv(CHUNK)) and allows(len(data)):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
