"""The bodies of requests while they arrive: limited in size, in time and in number.

Middleware reads bodies with this in front of the application, and proxy.py in Ray's proxy, so that
a request reaches the Front only when its body is complete.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from starlette.types import Receive, Scope

from sdbatch.serve.errors import ApiError, client_disconnected

MAX_BODY_BYTES = 256 * 1024  # several times two prompts of the greatest length
MAX_PICTURE_BODY_BYTES = 32 * 2**20  # a photo and a mask, in base64
MAX_BODIES_BYTES = 512 * 2**20  # of all requests that are not answered yet
PICTURE_ROUTES = (
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/images/jobs",
    "/sdapi/v1/img2img",
    "/sdapi/v1/png-info",
)
QUICK_SECONDS = 1.0  # a body that arrives within these needs no slot
BODY_SECONDS = 20.0  # for any body, in addition to the time that MIN_BYTES_PER_SECOND gives
MIN_BYTES_PER_SECOND = 32 * 1024
MAX_BODY_SECONDS = 600.0  # 32 MiB at half a megabit a second
CLIENT_SLOTS, ALL_SLOTS = 32, 256  # bodies that still arrive: of one client; of a kind of clients

# Who sends a body. Clients with API keys share no slots with those that are known by address only.
Client = tuple[Literal["key", "address"], str]


class Bodies:
    """The bodies of all requests that are not answered yet. Belongs to one event loop."""

    def __init__(self) -> None:
        self._sizes: Counter[Client] = Counter()  # bytes
        self._slots: Counter[Client] = Counter()

    @contextmanager
    def incoming(self) -> Iterator["IncomingBody"]:
        """Yield the body of a request; it counts among all bodies until the request is answered."""
        body = IncomingBody(self)
        try:
            yield body
        finally:
            self._remove(body)

    def add(self, client: Client, size: int) -> None:
        """Count bytes that arrived; raise an ApiError if there is no room for them.

        As in the queue, a client may have as many bytes as are free, so there is always room for
        another one.
        """
        self._sizes[client] += size
        free = MAX_BODIES_BYTES - _sum(self._sizes, client)
        if not size:
            return
        if free < 0:
            text = "Too many pictures are being received. Retry later."
            raise _closing(ApiError(503, text, code="overloaded", retry_after=5))
        if self._sizes[client] > free:
            text = "Too many pictures of this client are being received. Send fewer at a time."
            raise _closing(ApiError(429, text, code="too_many_bodies", retry_after=5))

    @contextmanager
    def slot(self, client: Client) -> Iterator[None]:
        """Hold a slot for a body that takes long; raise an ApiError if none is free."""
        if self._slots[client] >= CLIENT_SLOTS:
            text = f"{CLIENT_SLOTS} other bodies of this client still arrive. Send fewer at a time."
            raise _closing(ApiError(429, text, code="too_many_bodies", retry_after=1))
        if _sum(self._slots, client) >= ALL_SLOTS:
            text = "Too many bodies still arrive. Retry later."
            raise _closing(ApiError(503, text, code="overloaded", retry_after=5))
        self._slots[client] += 1
        try:
            yield
        finally:
            self._slots[client] -= 1
            if not self._slots[client]:
                del self._slots[client]

    def _remove(self, body: "IncomingBody") -> None:
        if body.client is not None:
            self._sizes[body.client] -= body.size
            if not self._sizes[body.client]:
                del self._sizes[body.client]


class IncomingBody:
    """The body of one request."""

    def __init__(self, bodies: Bodies) -> None:
        self.size = 0  # bytes that arrived
        self.client: Client | None = None  # once it is read
        self._bodies = bodies

    async def read(self, scope: Scope, receive: Receive, client: Client) -> bytes:
        """Return the whole body once it has arrived.

        Raises:
            ApiError: 408, 413, 429 or 503 if it takes too long, is too large, or too many bodies
                arrive; 499 if the client disconnects.
        """
        self.client = client
        most = _most_bytes(scope)
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise _too_large(most)
        clock = asyncio.get_running_loop().time
        started, limit = clock(), QUICK_SECONDS
        parts: list[bytes] = []
        with ExitStack() as slot:
            while True:
                try:
                    async with asyncio.timeout_at(started + limit):
                        message = await receive()
                except TimeoutError:
                    if limit != QUICK_SECONDS:
                        raise _too_slow() from None
                    slot.enter_context(self._bodies.slot(client))
                    limit = self._seconds()
                    continue
                if message["type"] == "http.disconnect":
                    raise client_disconnected()
                part = message.get("body", b"")
                self.size += len(part)
                self._bodies.add(client, len(part))
                if self.size > most:
                    raise _too_large(most)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
                if limit != QUICK_SECONDS:
                    limit = self._seconds()

    def _seconds(self) -> float:
        """Return the seconds from its start in which the next part must arrive."""
        return min(MAX_BODY_SECONDS, BODY_SECONDS + self.size / MIN_BYTES_PER_SECOND)


def has_body(scope: Scope) -> bool:
    """Tell whether a request has a body; one without has arrived with its headers."""
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the whole body, and then what follows it: a disconnect."""
    left: list[bytes] = [body]

    async def receive_body() -> dict[str, object]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return dict(await receive())

    return receive_body


def _sum(counts: Counter[Client], client: Client) -> int:
    """Return what all clients of the same kind have together."""
    return sum(count for (kind, _), count in counts.items() if kind == client[0])


def _most_bytes(scope: Scope) -> int:
    """Return the size limit of a body; the path may begin with the application's prefix."""
    is_picture = scope["path"].endswith(PICTURE_ROUTES)
    return MAX_PICTURE_BODY_BYTES if is_picture else MAX_BODY_BYTES


def _too_large(most: int) -> ApiError:
    text = f"The body is larger than {most} bytes. Send a smaller one."
    return ApiError(413, text, code="request_too_large")


def _too_slow() -> ApiError:
    text = (
        f"The body took too long to arrive: {BODY_SECONDS:g} s, and a second for each "
        f"{MIN_BYTES_PER_SECOND // 1024} KiB. Send the request again, or a smaller one."
    )
    return _closing(ApiError(408, text, code="request_timeout"))


def _closing(error: ApiError) -> ApiError:
    """Close the connection after the response, as the rest of the body is not read."""
    error.headers["Connection"] = "close"
    return error
