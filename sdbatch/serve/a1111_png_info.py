"""AUTOMATIC1111's png-info: the parameters of generation that an image's file carries."""

import json
import re

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from sdbatch.inputs.picture import USER_COMMENT, read_texts
from sdbatch.serve.errors import invalid_value
from sdbatch.serve.http import documented_body, documented_errors, json_body, json_response
from sdbatch.serve.pictures import from_base64
from sdbatch.serve.service import Service

LEAST_PARAMETERS = 3  # of a last line, else it belongs to the prompt: as AUTOMATIC1111 reads it
NEGATIVE = "Negative prompt:"
_PARAMETER = re.compile(r'\s*(\w[\w /-]{0,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


class PngInfo(BaseModel):
    """The body of POST /sdapi/v1/png-info."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str = Field(description="a picture in base64, or a data URI")


class PngInfoResponse(BaseModel):
    """What the file of an image says of itself."""

    info: str = Field(description="the parameters, in AUTOMATIC1111's form; empty: there are none")
    items: dict[str, str] = Field(description="all other texts of the file, by their names")
    parameters: dict[str, str] = Field(description="the parameters of `info` by their names")


def routes(service: Service) -> APIRouter:
    """Return the route, which reads files in the few threads of `service` for that."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.post(
        "/png-info",
        responses={200: {"model": PngInfoResponse}, **documented_errors(400, 413, 415, 503)},
        openapi_extra=documented_body(PngInfo),
    )
    async def png_info(request: Request) -> Response:
        """Return the parameters of generation that an image's file carries."""
        body = await json_body(request, PngInfo)
        return json_response(await service.decode(_read, body.image, request.state.key))

    return router


def parse_infotext(text: str) -> dict[str, str]:
    """Return the parts of parameters in AUTOMATIC1111's form by their names.

    A size such as 512x768 becomes two, `Size-1` and `Size-2`. Source of the form:
    AUTOMATIC1111's modules/infotext_utils.py, parse_generation_parameters; its defaults for what a
    text does not say are left out.
    """
    *lines, last_line = text.strip().split("\n")
    parameters = _parse_line(last_line)
    if len(parameters) < LEAST_PARAMETERS:
        lines, parameters = [*lines, last_line], []
    lines = [line.strip() for line in lines]
    begin = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    parts = {
        "Prompt": "\n".join(lines[:begin]),
        "Negative prompt": "\n".join(lines[begin:]).removeprefix(NEGATIVE).strip(),
    }
    for name, value in parameters:
        size = _SIZE.fullmatch(value)
        parts |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: value}
    return parts


def _parse_line(line: str) -> list[tuple[str, str]]:
    """Return the parameters of a line, in time that grows as its length."""
    parameters, position = [], 0
    while position < len(line):
        match = _PARAMETER.match(line, position)
        if match:
            parameters.append((match[1], _unquoted(match[2].strip())))
            position = match.end()
        else:
            comma = line.find(",", position)
            position = len(line) if comma < 0 else comma + 1
    return parameters


def _unquoted(value: str) -> str:
    """Return a value as it was before image_file quoted it."""
    try:
        text = str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value
    return text.encode("utf-8", "replace").decode()  # without halves of surrogate pairs


def _read(image: str) -> PngInfoResponse:
    try:
        texts = read_texts(from_base64(image, "image"))
    except ValueError as error:
        raise invalid_value("image", str(error).removeprefix("image = ")) from error
    comment, chunk = texts.pop(USER_COMMENT, ""), texts.pop("parameters", "")
    info = comment or chunk
    return PngInfoResponse(info=info, items=texts, parameters=parse_infotext(info) if info else {})
