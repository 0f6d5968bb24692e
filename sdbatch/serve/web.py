"""The HTTP application: who asks, how much, what is refused and how; what the log says of it."""

import json
import time
from importlib.resources import files

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdbatch.serve import a1111, long_jobs, openai
from sdbatch.serve.access import Access
from sdbatch.serve.errors import Refusal, internal
from sdbatch.serve.service import Service, log

LARGEST = 256 * 1024  # bytes of a body: two prompts of the longest kind, several times over
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")  # no key needed, nothing to learn
OPEN_BELOW = ("/static/", "/v1/images/files/")
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": _POLICY.encode(),
}


def application(service: Service, access: Access, *, log_prompts: bool) -> ASGIApp:
    """Return the whole HTTP application over `service`."""
    web = FastAPIOffline(  # whose page at /docs needs no other machine
        title="sdbatch",
        description="Images by Stable Diffusion 1.5 class models, one request at a time.",
        redoc_url=None,
        static_url="/static",
    )
    keys = [Depends(HTTPBearer(auto_error=False))]  # for the documents alone: Door looks at them
    for routes in (openai.routes, long_jobs.routes, a1111.routes):
        web.include_router(routes(service), dependencies=keys)
    web.include_router(_own(service))
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        web.add_exception_handler(kind, _refuse)
    return Door(web, service, access, log_prompts)


def _own(service: Service) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    page = (files("sdbatch.serve") / "page.html").read_text(encoding="utf-8")

    @router.get("/")
    async def look() -> Response:
        return HTMLResponse(page)

    @router.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz")
    async def ready() -> dict[str, str]:
        await service.check_ready()
        return {"status": "ready"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


async def _refuse(_: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else _as_refusal(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _as_refusal(error: Exception) -> Refusal:
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid")
        refusal = Refusal(error.status_code, f"{error.detail}.", code=code)
        refusal.headers = dict(error.headers or {})
        return refusal
    if isinstance(error, RequestValidationError):
        return Refusal(400, "path = not understood.", code="invalid_value")
    return internal()


class Door:
    """What every request passes: the key, the size of its body, headers, the log, the metrics."""

    def __init__(
        self, inside: ASGIApp, service: Service, access: Access, log_prompts: bool
    ) -> None:
        self._inside = inside
        self._service = service
        self._access = access
        self._log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._inside(scope, receive, send)
            return
        visit = _Visit(scope, receive, send)
        try:
            self._admit(scope)
            await self._inside(scope, visit.receive, visit.send)
        except Refusal as refusal:
            answer = JSONResponse(refusal.body, refusal.status, refusal.headers)
            await answer(scope, visit.receive, visit.send)
        except Exception:  # noqa: BLE001  of our own, and not its client's to read
            log.exception("%s %s failed", scope["method"], _route(scope))
            if visit.status is None:
                await JSONResponse(internal().body, 500)(scope, visit.receive, visit.send)
        finally:
            self._note(scope, visit)

    def _admit(self, scope: Scope) -> None:
        state = scope.setdefault("state", {})
        state.update(key=None, noted={}, prompt=None)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN or path.startswith(OPEN_BELOW):
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        client = scope.get("client")
        state["key"] = self._access.who(headers, client[0] if client else None)

    def _note(self, scope: Scope, visit: "_Visit") -> None:
        state = scope["state"]
        key = state["key"].name if state["key"] else "none"
        route, status = _route(scope), visit.status or 499
        self._service.metrics.requests.labels(route, str(status), key).inc()
        if scope["path"] in OPEN:
            return
        said = {
            "key": key,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(time.monotonic() - visit.began, 3),
            **{name: value for name, value in state["noted"].items() if value is not None},
        }
        if self._log_prompts and state["prompt"] is not None:
            said["prompt"] = state["prompt"]
        log.info("%s", json.dumps(said))


class _Visit:
    """One request's way in and out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began = time.monotonic()
        self.status: int | None = None
        self._receive = receive
        self._send = send
        self._size = 0
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._said = int(length) if length.isdigit() else 0

    async def receive(self) -> Message:
        """Pass a part of the body on, if it is not too much by now."""
        if self._said > LARGEST:
            raise _too_large()
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > LARGEST:
            raise _too_large()
        return message

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, with the headers that all have."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message["headers"]}
            own = [item for item in _HEADERS.items() if item[0] not in given]
            message = {**message, "headers": [*message["headers"], *own]}
        await self._send(message)


def _too_large() -> Refusal:
    text = f"body = more than {LARGEST} bytes: send less."
    return Refusal(413, text, code="request_too_large")


def _route(scope: Scope) -> str:
    """Return the route without what stands in its place: names of jobs and images are secrets."""
    route = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "other"
