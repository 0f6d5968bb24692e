"""What runs in the process of Ray's HTTP proxy, in front of the Front.

Ray starts it if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is `sdbatch.serve.proxy:middlewares` in
the environment of its processes. It limits connections and bodies before they reach Ray, answers
/healthz itself, and turns Ray's own answers into the errors of the API. Neither the job nor the
model is known here, so all that needs them is in middleware.py.
"""

import asyncio
import hashlib
import json

from cachetools import LRUCache
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from sdbatch.serve.bodies import Bodies, Client, has_body, replay
from sdbatch.serve.connections import Connection
from sdbatch.serve.errors import ApiError, internal_error
from sdbatch.serve.exchange import (
    ACCEPTED,
    OURS,
    REQUEST_ID,
    WITH_KEY,
    Headers,
    address_of,
    read_header,
    replaced,
    request_id_of,
)
from sdbatch.serve.log import log

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "sdbatch.serve.proxy:middlewares"
FRONT_SECONDS = 30.0  # until the Front has a request; it starts again within that time
PROBE_SECONDS = 2.0  # the same of probes, whose callers do not wait for long
KNOWN_KEYS = 4096  # hashes of API keys that the Front has accepted; the least recent are forgotten
HEALTHZ, READYZ = "/healthz", "/readyz"
# By these, any client could tell Ray to keep drawing after it has left, to cut requests short, or
# where to route them.
_RAYS_HEADERS = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)


def middlewares() -> list[Middleware]:
    """Return what Ray's proxy puts around itself; called once in its process."""
    auto.AutoHTTPProtocol = Connection  # Ray has no setting for it, and starts uvicorn after this
    return [Middleware(Proxy)]


class Proxy:
    """Wraps Ray's proxy, an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._bodies = Bodies()
        self._known_keys: LRUCache[bytes, None] = LRUCache(KNOWN_KEYS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        answer = _Answer(scope, send, request_id)
        if scope["path"] == HEALTHZ and scope["method"] in ("GET", "HEAD"):
            await JSONResponse({"status": "ok"})(scope, receive, answer.send)
            return
        headers = [item for item in scope["headers"] if _is_for_the_front(item[0])]
        scope["headers"] = replaced(headers, [(REQUEST_ID, request_id.encode())])
        try:
            with self._bodies.incoming() as body:
                if has_body(scope):
                    content = await body.read(scope, receive, self._client(scope))
                    receive = replay(content, receive)
                    del content  # Ray has it from now on
                await self._forward(scope, receive, answer)
        except ApiError as error:
            if error.status != 499:  # no refusal: the client left
                _log_refusal(scope, request_id, error)
            await answer.send_error(error)
        except Exception:
            log.exception("request %s failed in the proxy", request_id)
            await answer.send_error(internal_error())
        key = _hash_of_key(scope)
        if answer.has_key and key is not None:
            self._known_keys[key] = None

    def _client(self, scope: Scope) -> Client:
        """Return who sends a body: its API key if the Front has accepted it before."""
        key = _hash_of_key(scope)
        if key is not None and key in self._known_keys:
            return "key", key.hex()
        return "address", address_of(scope)

    async def _forward(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Let the Front answer; raise an ApiError if there is none, or if it dies."""
        is_gone = False

        async def receive_until_gone() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "http.disconnect"
            return message

        scope["extensions"] = {**scope.get("extensions", {}), ACCEPTED: {}}
        call = asyncio.ensure_future(self._app(scope, receive_until_gone, answer.send))
        try:
            # endswith: the path may begin with an application's prefix
            is_probe = scope["path"].endswith((HEALTHZ, READYZ))
            seconds = PROBE_SECONDS if is_probe else FRONT_SECONDS
            await asyncio.wait(
                {call, answer.begun}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not call.done() and not answer.begun.done():
                raise front_lost()
            await call
        finally:
            call.cancel()
        if not answer.is_complete and not is_gone:
            raise front_lost()


class _Answer:
    """The response to one request, as it passes."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_key = False  # the Front has accepted the request's API key
        self.is_complete = False
        self._path: str = scope["path"]
        self._send = send
        self._own_headers: Headers = [(REQUEST_ID, request_id.encode())]
        self._status: int | None = None
        self._is_stream = False
        self._replacement: ApiError | None = None  # of an answer of Ray's own

    async def send(self, message: Message) -> None:
        """Pass on a part of the response; replace an error that is Ray's."""
        if not self.begun.done():
            self.begun.set_result(None)
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body":
            is_last = not message.get("more_body", False)
            if self._replacement is None:
                self.is_complete = is_last
                await self._send(message)
            elif is_last:
                error, self._replacement = self._replacement, None
                await self.send_error(error)
        elif message["type"] != ACCEPTED:
            await self._send(message)

    async def send_error(self, error: ApiError) -> None:
        """Send an error response, or end a stream that has begun with its error."""
        if self._status is None:
            response = JSONResponse(error.body, error.status, error.headers)
            await response({"type": "http"}, _receive_nothing, self._send_ours)
            self.is_complete = True
        elif self._is_stream and not self.is_complete:
            event = f"event: error\ndata: {json.dumps(error.body)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": event})
            self.is_complete = True
        # a response of another kind stays incomplete, and uvicorn closes its connection

    async def _start(self, message: Message) -> None:
        headers = dict(message["headers"])
        ours = headers.get(OURS)
        if ours is None and message["status"] >= 400:
            self._replacement = _own_error(message["status"], self._path)
            return
        self.has_key = ours == WITH_KEY
        self._status = message["status"]
        self._is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send_ours(message)

    async def _send_ours(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kept = [(name, value) for name, value in message["headers"] if name.lower() != OURS]
            message = {**message, "headers": replaced(kept, self._own_headers)}
        await self._send(message)


def front_lost() -> ApiError:
    """Return the error of a request whose Front died, or that found none."""
    text = "The process that answers requests has died, or it is starting. Send the request again."
    return ApiError(503, text, code="front_lost", retry_after=5)


def _own_error(status: int, path: str) -> ApiError:
    """Return the error that replaces an answer of Ray's proxy itself."""
    if path.startswith("/-/") and status == 503:
        text = "This machine is leaving the cluster, or no application runs yet. Retry later."
        return ApiError(503, text, code="stopping", retry_after=5)
    if status == 404:
        text = "No application is served at this path."
        return ApiError(404, text, code="not_found")
    if status == 408:
        text = "The request took longer than Ray Serve's request_timeout_s. Retry later."
        return ApiError(504, text, code="timeout", retry_after=10)
    if status < 500:
        return ApiError(status, "Ray Serve's proxy rejected the request.", code="invalid")
    return front_lost()


def _is_for_the_front(name: bytes) -> bool:
    return name.replace(b"_", b"-") not in _RAYS_HEADERS  # Ray takes both spellings


def _hash_of_key(scope: Scope) -> bytes | None:
    sent = read_header(scope, b"authorization").encode("latin-1")
    return hashlib.sha256(sent).digest() if sent else None


def _log_refusal(scope: Scope, request_id: str, error: ApiError) -> None:
    """Log a request that the proxy itself rejects; not its path, which may be a secret."""
    fields = {
        "request_id": request_id,
        "client": address_of(scope),
        "method": scope["method"],
        "status": error.status,
        "code": error.body["error"]["code"],
    }
    log.info("%s", json.dumps(fields))


async def _receive_nothing() -> Message:
    return {"type": "http.disconnect"}
