"""What all routes share: bodies, JSON responses, the OpenAPI documents, disconnected clients."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sdbatch.serve import responses
from sdbatch.serve.errors import (
    MOST_FAULTS,
    ApiError,
    Faults,
    client_disconnected,
    invalid_body,
    invalid_value,
    sentence,
    unknown_parameter,
)
from sdbatch.serve.requests import ImageRequest
from sdbatch.serve.validation import check

MAX_FIELDS, MAX_FIELD_BYTES = 100, 64 * 1024  # of a form, without its files
DRAW_ERRORS = (400, 404, 408, 413, 415, 429, 500, 503, 504)  # the statuses of a route that draws
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI documentation of a route's error responses."""
    return {status: {"model": responses.Error} for status in (401, 403, *statuses)}


def documented_body(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI documentation of a body in JSON that the route parses itself."""
    return _documented({"application/json": {"schema": _schema(kind)}})


def documented_form(kind: type[BaseModel], *files: str) -> dict[str, Any]:
    """Return the OpenAPI documentation of a form that the route parses itself.

    Args:
        kind: its fields.
        files: the names of its files; the first one is required.
    """
    schema = _schema(kind)
    binary = {name: {"type": "string", "format": "binary"} for name in files}
    schema["properties"] = {**binary, **schema["properties"]}
    schema["required"] = [files[0], *schema.get("required", [])]
    return _documented({"multipart/form-data": {"schema": schema}})


def documented_either(*bodies: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI documentation of a body that has one of several content types."""
    contents = (body["requestBody"]["content"] for body in bodies)
    return _documented({kind: schema for each in contents for kind, schema in each.items()})


async def json_body(request: Request, kind: type[Body]) -> Body:
    """Return the request's body as `kind`; raises an ApiError if it is not one in JSON."""
    try:
        return kind.model_validate_json(await _json_text(request))
    except ValidationError as error:
        raise invalid_body(error) from error


async def checked_json_body(
    request: Request, kind: type[Body], build: Callable[[Body], Result]
) -> tuple[Body, Result]:
    """Return the request's body as `kind`, and what `build` makes of it.

    Raises:
        ApiError: the body is not one in JSON; or it names all faults, those that `build` finds too.
    """
    text = await _json_text(request)
    try:
        body = kind.model_validate_json(text)
    except ValidationError as error:
        if error.error_count() > MOST_FAULTS:
            raise invalid_body(error) from error
        is_json = error.errors()[0]["type"] != "json_invalid"
        values = json.loads(text) if is_json else None
        if not isinstance(values, dict):
            raise invalid_body(error) from error
        return check(kind, values, build, Faults())
    return body, build(body)


@dataclass(frozen=True)
class Form:
    """A form as it was sent: fields, files, and what is wrong with its structure."""

    values: dict[str, Any]
    files: dict[str, bytes]
    faults: Faults


async def read_form(request: Request, kind: type[BaseModel], *names: str) -> Form:
    """Return a form whose fields are not checked yet, see validation.check.

    Args:
        request: has the form as its body.
        kind: says which of its fields are numbers and switches.
        names: of the files; the first one is required.

    Raises:
        ApiError: the body is not a form.
    """
    _check_content_type(request, "multipart/form-data")
    faults = Faults()
    limits = {"max_files": MAX_FIELDS, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
    try:
        async with request.form(**limits) as form:
            texts = _texts(form, names, faults)
            files = await _files(form, names, faults)
    except HTTPException as error:
        text = f"The body must be a form: {sentence(error.detail)}"
        raise ApiError(400, text, code="invalid_value") from error
    except ClientDisconnect as error:
        raise client_disconnected() from error
    return Form(_typed(texts, kind), files, faults)


def json_response(
    content: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a pydantic model as the response."""
    return Response(
        content.model_dump_json(), status, headers=headers, media_type="application/json"
    )


def base_url(request: Request) -> str:
    """Return the URL of the service as the client knows it, with a slash at its end."""
    public_url: str | None = request.state.public_url
    return str(request.base_url) if public_url is None else f"{public_url}/"


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


def _documented(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a body without references."""
    schema = kind.model_json_schema()
    text = json.dumps({**schema, "$defs": None})
    for name, inner in schema.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(inner))
    return {key: value for key, value in json.loads(text).items() if key != "$defs"}


def _check_content_type(request: Request, required: str) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != required:
        text = f"content-type = {content_type!r}: must be {required}."
        raise ApiError(415, text, code="unsupported_media_type")


async def _json_text(request: Request) -> bytes:
    _check_content_type(request, "application/json")
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise client_disconnected() from error


def _texts(form: FormData, names: tuple[str, ...], faults: Faults) -> dict[str, str]:
    """Return the fields of a form that are no files."""
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name in names:
            text = "text: must be a file, a part of the form with a filename"
            faults.add(invalid_value(name, text))
        elif name in texts:
            faults.add(invalid_value(name, "two values: must be given once"))
        else:
            texts[name] = value
    return texts


async def _files(form: FormData, names: tuple[str, ...], faults: Faults) -> dict[str, bytes]:
    """Return the files of a form; a list of one, which clients call `name[]`, is a file too."""
    files: dict[str, bytes] = {}
    for field, value in form.multi_items():
        if not isinstance(value, UploadFile):
            continue
        name = field.removesuffix("[]")
        if name not in names:
            faults.add(unknown_parameter(name))
        elif name in files:
            faults.add(invalid_value(name, "several files: must be one. Send a request for each"))
        else:
            files[name] = await value.read()
    if names[0] not in files and names[0] not in (each.param for each in faults.errors):
        text = f"{names[0]} = nothing: must be given, as a file of the form."
        code = "missing_required_parameter"
        faults.add(ApiError(400, text, code=code, param=names[0]))
    return files


def _typed(texts: dict[str, str], kind: type[BaseModel]) -> dict[str, Any]:
    """Return the values of a form's fields: numbers and switches where `kind` has no text."""
    properties = kind.model_json_schema()["properties"]
    return {
        name: value if _is_text(properties.get(name, {})) else _number_or_switch(value)
        for name, value in texts.items()
    }


def _is_text(schema: dict[str, Any]) -> bool:
    return any(each.get("type") == "string" for each in schema.get("anyOf", [schema]))


def _number_or_switch(text: str) -> Any:
    if not re.fullmatch(r"true|false|-?\d{1,100}(\.\d{1,100})?([eE][-+]?\d{1,3})?", text):
        return text
    try:
        return json.loads(text)
    except ValueError:  # zeros before the number
        return text
