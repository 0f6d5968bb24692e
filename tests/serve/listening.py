"""An ASGI application behind uvicorn on loopback, in a thread of its own; and raw connections."""

import asyncio
import socket
import threading
from concurrent.futures import Future

import uvicorn

SECONDS = 60  # the longest wait for what another thread does


class Uvicorn(uvicorn.Server):
    """Tells when it accepts connections, and on which event loop."""

    def __init__(self, config):
        super().__init__(config)
        self.started_on: Future[asyncio.AbstractEventLoop] = Future()

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.started_on.set_result(asyncio.get_running_loop())


class Listening:
    """An application that accepts connections at `url` until it is closed.

    Args:
        application: any ASGI application.
        http: uvicorn's protocol class.
    """

    def __init__(self, application, http="auto"):
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(
            application,
            http=http,
            log_level="error",
            lifespan="off",
            # longer than the client's 5 s, or the client may send on a connection that just closes
            timeout_keep_alive=3600,
        )
        self._uvicorn = Uvicorn(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()
        self.loop = self._uvicorn.started_on.result(SECONDS)

    def connect(self, sent=b""):
        """Return a connection on which `sent` is sent; raises TimeoutError if a read takes long."""
        connection = socket.create_connection(self._listener.getsockname(), SECONDS)
        connection.sendall(sent)
        return connection

    def close(self):
        self._uvicorn.should_exit = True
        self._thread.join()
        self._listener.close()


def read_all(connection):
    """Return all that a connection receives until the server closes it."""
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))
