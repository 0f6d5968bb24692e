"""What every request passes: the API key, its body, headers, CORS, the log, the metrics."""

import json
import time
from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbatch.serve import page
from sdbatch.serve.access import Access, ApiKey
from sdbatch.serve.bodies import Bodies, Client, has_body, replay
from sdbatch.serve.errors import ApiError, internal_error
from sdbatch.serve.exchange import (
    ACCEPTED,
    ANSWERED,
    OURS,
    REQUEST_ID,
    WITH_KEY,
    Headers,
    address_of,
    replaced,
    request_id_of,
)
from sdbatch.serve.log import log
from sdbatch.serve.metrics import key_name
from sdbatch.serve.service import Service

PUBLIC = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # need no key, reveal nothing
PUBLIC_FOLDERS = ("/static/", page.FOLDER, "/v1/images/files/")
REFUSALS = (401, 403, 408, 413, 429)  # whose log lines have the client's address
EXPOSED_HEADERS = ("Location", "Retry-After", "WWW-Authenticate", "X-Request-ID")
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
    """Wraps the application: authenticates a request, reads its body, logs and counts it."""

    def __init__(self, app: ASGIApp, service: Service, access: Access) -> None:
        self._app = app
        self._service = service
        self._access = access
        self._settings = service.model.job.serve
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if ACCEPTED in scope.get("extensions", {}):
            await send({"type": ACCEPTED})
        state = scope.setdefault("state", {})
        state.update(key=None, log_fields={}, prompt=None, public_url=self._settings.public_url)
        state.update(request_id=request_id_of(scope), client=address_of(scope))
        key_name.set("none")
        exchange = _Exchange(scope, send, by_origin=bool(self._settings.cors_origins))
        try:
            await self._with_cors(scope, exchange)(scope, receive, exchange.send)
        finally:
            self._record(scope, exchange)

    def _with_cors(self, scope: Scope, exchange: "_Exchange") -> ASGIApp:
        """Return what answers a request: also for pages of an origin that the job allows."""
        answer: ASGIApp = partial(self._answer, exchange)
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if origin not in self._settings.cors_origins:
            return answer
        return CORSMiddleware(
            answer,
            allow_origins=[origin],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )

    async def _answer(
        self, exchange: "_Exchange", scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request with the application's response, or with an error."""
        try:
            with self._bodies.incoming() as body:
                self._authenticate(scope)
                if has_body(scope):
                    content = await body.read(scope, receive, _client(scope))
                    receive = replay(content, receive)
                    del content
                await self._app(scope, receive, send)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], _route(scope))
            if exchange.status is None:
                await JSONResponse(internal_error().body, 500)(scope, receive, send)

    def _authenticate(self, scope: Scope) -> None:
        """Put the key of a request into its state; raise an ApiError if it may not pass."""
        path = _path(scope)
        if path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        client = scope.get("client")
        key = self._access.authenticate(headers, client[0] if client else None)
        self._access.check_route(key, path)
        scope["state"]["key"] = key
        key_name.set(key.name)

    def _record(self, scope: Scope, exchange: "_Exchange") -> None:
        """Count a request and log it."""
        state = scope["state"]
        key = state["key"].name if state["key"] else "none"
        route, status = _route(scope), exchange.status or 499
        self._service.metrics.requests.labels(route, str(status), key).inc()
        if _path(scope) in PUBLIC and status not in REFUSALS:
            return
        fields = {
            "request_id": state["request_id"],
            "key": key,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(time.monotonic() - exchange.started, 3),
            **({"client": state["client"]} if status in REFUSALS else {}),
            **{name: value for name, value in state["log_fields"].items() if value is not None},
        }
        if self._settings.log_prompts and state["prompt"] is not None:
            fields["prompt"] = state["prompt"]
        log.info("%s", json.dumps(fields))


class _Exchange:
    """The response to one request, as it passes.

    Args:
        scope: of the request.
        send: sends the response.
        by_origin: whether responses differ by the page that requests them.
    """

    def __init__(self, scope: Scope, send: Send, *, by_origin: bool) -> None:
        self.started = time.monotonic()
        self.status: int | None = None  # None: no response yet
        self._scope = scope
        self._send = send
        self._by_origin = by_origin

    async def send(self, message: Message) -> None:
        """Pass on a part of the response, with the headers that all responses have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": self._complete(message["headers"])}
        await self._send(message)

    def _complete(self, headers: Headers) -> Headers:
        state = self._scope["state"]
        names = {name.lower() for name, _ in headers}
        missing = [item for item in _HEADERS.items() if item[0] not in names]
        if self._by_origin and b"vary" not in names:  # or a cache gives one page's to another
            missing.append((b"vary", b"Origin"))
        own = [
            (REQUEST_ID, state["request_id"].encode()),
            (OURS, WITH_KEY if state["key"] else ANSWERED),
        ]
        return replaced([*headers, *missing], own)


def _client(scope: Scope) -> Client:
    """Return who sends a body: the API key, if the request has one."""
    key: ApiKey | None = scope["state"]["key"]
    return ("address", scope["state"]["client"]) if key is None else ("key", key.name)


def _path(scope: Scope) -> str:
    """Return the path below the prefix of the application; of the prefix alone, its page's."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _route(scope: Scope) -> str:
    """Return the route with its placeholders: the names of jobs and images are secret."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "other"
