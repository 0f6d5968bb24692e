"""What every request passes: the API key, the size of its body, headers, the log, the metrics."""

import json
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbatch.serve.access import Access
from sdbatch.serve.errors import ApiError, internal_error
from sdbatch.serve.service import Service, log

MAX_BODY_BYTES = 256 * 1024  # several times two prompts of the greatest length
MAX_PICTURE_BODY_BYTES = 32 * 2**20  # a photo and a mask, in base64
MAX_BODIES_BYTES = 512 * 2**20  # of all requests that are not answered yet
PICTURE_ROUTES = (
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/images/jobs",
    "/sdapi/v1/img2img",
)
PUBLIC = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # need no key, reveal nothing
PUBLIC_FOLDERS = ("/static/", "/v1/images/files/")
_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": _CONTENT_POLICY.encode(),
}


class Middleware:
    """Wraps the application: authenticates a request, limits its body, logs and counts it."""

    def __init__(self, app: ASGIApp, service: Service, access: Access, log_prompts: bool) -> None:
        self._app = app
        self._service = service
        self._access = access
        self._log_prompts = log_prompts
        self._bodies = _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MAX_PICTURE_BODY_BYTES if _path(scope) in PICTURE_ROUTES else MAX_BODY_BYTES
        exchange = _Exchange(scope, receive, send, self._bodies, most)
        try:
            self._authenticate(scope)
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            response = JSONResponse(error.body, error.status, error.headers)
            await response(scope, exchange.receive, exchange.send)
        except Exception:  # noqa: BLE001  an internal error; details stay in the log
            log.exception("%s %s failed", scope["method"], _route(scope))
            if exchange.status is None:
                response = JSONResponse(internal_error().body, 500)
                await response(scope, exchange.receive, exchange.send)
        finally:
            self._bodies.size -= exchange.received_bytes
            self._record(scope, exchange)

    def _authenticate(self, scope: Scope) -> None:
        """Put the key of a request into its state; raise an ApiError if it may not pass."""
        state = scope.setdefault("state", {})
        state.update(key=None, log_fields={}, prompt=None)
        path = _path(scope)
        if path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        client = scope.get("client")
        state["key"] = self._access.authenticate(headers, client[0] if client else None)

    def _record(self, scope: Scope, exchange: "_Exchange") -> None:
        """Count a request and log it."""
        state = scope["state"]
        key = state["key"].name if state["key"] else "none"
        route, status = _route(scope), exchange.status or 499
        self._service.metrics.requests.labels(route, str(status), key).inc()
        if scope["path"] in PUBLIC:
            return
        fields = {
            "key": key,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(time.monotonic() - exchange.started, 3),
            **{name: value for name, value in state["log_fields"].items() if value is not None},
        }
        if self._log_prompts and state["prompt"] is not None:
            fields["prompt"] = state["prompt"]
        log.info("%s", json.dumps(fields))


class _Bodies:
    """The bytes of the bodies of all requests that are not answered yet."""

    size = 0


class _Exchange:
    """One request and its response, as they pass."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, bodies: _Bodies, most_bytes: int
    ) -> None:
        self.started = time.monotonic()
        self.status: int | None = None  # None: no response yet
        self.received_bytes = 0
        self._receive = receive
        self._send = send
        self._bodies = bodies
        self._most_bytes = most_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._declared_bytes = int(length) if length.isdigit() else 0

    async def receive(self) -> Message:
        """Pass on a part of the body; raise an ApiError if there is too much."""
        if self._declared_bytes > self._most_bytes:
            raise _body_too_large(self._most_bytes)
        message = await self._receive()
        size = len(message.get("body", b""))
        self.received_bytes += size
        self._bodies.size += size
        if self.received_bytes > self._most_bytes:
            raise _body_too_large(self._most_bytes)
        if size and self._bodies.size > MAX_BODIES_BYTES:
            text = "Too many pictures are being received. Retry later."
            raise ApiError(503, text, code="overloaded", retry_after=5)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the response, with the headers that all responses have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name.lower() for name, _ in message["headers"]}
            missing = [item for item in _HEADERS.items() if item[0] not in names]
            message = {**message, "headers": [*message["headers"], *missing]}
        await self._send(message)


def _body_too_large(most_bytes: int) -> ApiError:
    text = f"The body is larger than {most_bytes} bytes. Send a smaller one."
    return ApiError(413, text, code="request_too_large")


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _route(scope: Scope) -> str:
    """Return the route with its placeholders: the names of jobs and images are secret."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "other"
