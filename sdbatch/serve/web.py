"""The HTTP application: all routes behind the middleware, and errors in OpenAI's shape."""

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp

from sdbatch.serve import a1111, edits, long_jobs, openai, page
from sdbatch.serve.access import METRICS, Access
from sdbatch.serve.errors import ApiError, internal_error, sentence
from sdbatch.serve.middleware import Middleware
from sdbatch.serve.service import Service

_GET_AND_HEAD = ["GET", "HEAD"]  # load balancers ask with either
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")  # RFC 9110, RFC 5789


def application(service: Service, access: Access) -> ASGIApp:
    """Return the whole HTTP application over `service`."""
    public_url = service.model.job.serve.public_url
    web = FastAPIOffline(  # its page at /docs loads nothing from other machines
        title="sdbatch",
        description="Images by Stable Diffusion 1.5 class models, one request at a time.",
        redoc_url=None,
        static_url="/static",
        servers=[{"url": public_url}] if public_url else None,
        root_path_in_servers=public_url is None,
    )
    keys = [Depends(HTTPBearer(auto_error=False))]  # for the documents: Middleware checks the keys
    for routes in (openai.routes, edits.routes, long_jobs.routes, a1111.routes):
        web.include_router(routes(service), dependencies=keys)
    web.include_router(page.routes())
    web.include_router(_own_routes(service))
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        web.add_exception_handler(kind, _error_response)
    return Middleware(web, service, access)


def _own_routes(service: Service) -> APIRouter:
    """Return the health checks and the metrics."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/healthz", methods=_GET_AND_HEAD)
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @router.api_route("/readyz", methods=_GET_AND_HEAD)
    async def ready() -> dict[str, str]:
        await service.check_ready()
        return {"status": "ready"}

    @router.get(METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


async def _error_response(request: Request, error: Exception) -> Response:
    api_error = error if isinstance(error, ApiError) else _as_api_error(error)
    if api_error.status == 405:
        api_error.headers["Allow"] = _allowed_methods(request)
    return JSONResponse(api_error.body, api_error.status, api_error.headers)


def _allowed_methods(request: Request) -> str:
    """Return the methods of all routes of a path; Starlette names those of the first alone."""
    allowed = [
        method
        for method in METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]
    return ", ".join(allowed)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid")
        api_error = ApiError(error.status_code, sentence(error.detail), code=code)
        api_error.headers = dict(error.headers or {})
        return api_error
    if isinstance(error, RequestValidationError):
        text = "The path or the query of the request is invalid. See /docs."
        return ApiError(400, text, code="invalid_value")
    return internal_error()
