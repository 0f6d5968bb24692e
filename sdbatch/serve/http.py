"""What all routes share of HTTP: bodies, answers, documents, clients that hang up."""

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from sdbatch.serve import responses
from sdbatch.serve.errors import Refusal
from sdbatch.serve.requests import Wanted

DRAWING = (400, 404, 413, 415, 429, 500, 503, 504)  # what a route that draws may answer
Result = TypeVar("Result")


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the refusals of a route."""
    return {status: {"model": responses.Error} for status in (401, 403, *statuses)}


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """Document a body that the route reads by itself."""
    schema = kind.model_json_schema()
    text = json.dumps({**schema, "$defs": None})
    for name, inner in schema.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(inner))
    schema = {key: value for key, value in json.loads(text).items() if key != "$defs"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def json_body(request: Request) -> bytes:
    """Return the request's body; raises a Refusal if it says that it is no JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = f"content-type = {kind!r}: must be application/json."
        raise Refusal(415, text, code="unsupported_media_type")
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise _client_gone() from error


def json_of(answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a pydantic model as the response."""
    return Response(
        answer.model_dump_json(), status, headers=headers, media_type="application/json"
    )


def base_url(request: Request) -> str:
    """Return the URL of the service as the client knows it, with a slash behind."""
    return str(request.base_url)


def note(request: Request, asked: Wanted) -> None:
    """Leave what the log says of a request."""
    request.state.noted = {"images": len(asked.asked), "user": asked.user}
    request.state.prompt = asked.first.prompt


async def unless_gone(request: Request, drawing: Awaitable[Result]) -> Result:
    """Wait for `drawing`; cancel it when the client hangs up."""
    task = asyncio.ensure_future(drawing)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _client_gone()
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _client_gone() -> Refusal:
    return Refusal(499, "client = gone: nobody waits for the answer.", code="client_gone")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
