"""What all routes share: bodies, JSON responses, the OpenAPI documents, disconnected clients."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from sdbatch.serve import responses
from sdbatch.serve.errors import ApiError, client_disconnected, invalid_body
from sdbatch.serve.requests import ImageRequest

DRAW_ERRORS = (400, 404, 413, 415, 429, 500, 503, 504)  # the statuses of a route that draws
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI documentation of a route's error responses."""
    return {status: {"model": responses.Error} for status in (401, 403, *statuses)}


def documented_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI documentation of a body that the route parses itself."""
    schema = kind.model_json_schema()
    text = json.dumps({**schema, "$defs": None})
    for name, inner in schema.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(inner))
    schema = {key: value for key, value in json.loads(text).items() if key != "$defs"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def json_body(request: Request, kind: type[Body]) -> Body:
    """Return the request's body as `kind`; raises an ApiError if it is not one in JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        text = f"content-type = {content_type!r}: must be application/json."
        raise ApiError(415, text, code="unsupported_media_type")
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_body(error) from error
    except ClientDisconnect as error:
        raise client_disconnected() from error


def json_response(
    content: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a pydantic model as the response."""
    return Response(
        content.model_dump_json(), status, headers=headers, media_type="application/json"
    )


def base_url(request: Request) -> str:
    """Return the URL of the service as the client knows it, with a slash at its end."""
    return str(request.base_url)


def set_log_fields(request: Request, image_request: ImageRequest) -> None:
    """Set what the log line of this request says about its images."""
    images = len(image_request.draw_requests)
    request.state.log_fields = {"images": images, "user": image_request.user}
    request.state.prompt = image_request.first.prompt


async def cancel_on_disconnect(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for `work`; cancel it and raise an ApiError when the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise client_disconnected()
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
