"""The routes that OpenAI's clients use: generations, at once or streamed, and models."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, format_sse_event

from sdbatch.serve import requests, responses
from sdbatch.serve.drawer import DrawRequest, EncodedImage, Progress
from sdbatch.serve.errors import ApiError, internal_error, model_not_found
from sdbatch.serve.http import (
    DRAW_ERRORS,
    base_url,
    cancel_on_disconnect,
    checked_json_body,
    documented_body,
    documented_errors,
    json_response,
    set_log_fields,
)
from sdbatch.serve.log import log
from sdbatch.serve.model_card import ModelCard, ModelCards, field_ranges, model_card
from sdbatch.serve.queue import Reservation
from sdbatch.serve.requests import ImageRequest, Streamable
from sdbatch.serve.service import Service

KEEP_ALIVE_SECONDS = 10.0  # proxies cut a stream that is silent for longer
FIRST_COMMENT_SECONDS = 1.0  # until a waiting client gets its queue position
EVENTS: dict[str, Any] = {"text/event-stream": {}}  # the response with `stream`
_NO_CACHE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter()
    served = service.model
    generation = requests.body_with_defaults(Streamable, served.job)
    ranges = field_ranges(generation)

    def card(request: Request, name: str) -> ModelCard:
        key = request.state.key
        images = min(key.limits.images, service.queue.most_images(key))
        limits = key.limits.model_copy(update={"images": images})
        return model_card(name, served, ranges, limits, service.started)

    @router.post(
        "/v1/images/generations",
        responses={
            200: {"model": responses.Images, "content": EVENTS},
            **documented_errors(*DRAW_ERRORS),
        },
        openapi_extra=documented_body(generation),
    )
    async def generate(request: Request) -> Response:
        """Draw images; streamed, with previews as server-sent events."""
        limits = request.state.key.limits
        _, image_request = await checked_json_body(
            request, generation, lambda body: requests.from_generation(body, served, limits)
        )
        set_log_fields(request, image_request)
        return await respond(request, service, image_request)

    @router.get("/v1/models", response_model_exclude_none=True, responses=documented_errors())
    async def models(request: Request) -> ModelCards:
        """List the names of the model that is served, with the limits of the key that asks."""
        return ModelCards(object="list", data=[card(request, name) for name in served.names])

    @router.get(
        "/v1/models/{name:path}",
        response_model_exclude_none=True,
        responses=documented_errors(404),
    )
    async def model(request: Request, name: str) -> ModelCard:
        """Describe the model that is served, with the limits of the key that asks."""
        if name not in served.names:
            raise model_not_found("model", name, served.names)
        return card(request, name)

    return router


async def respond(request: Request, service: Service, image_request: ImageRequest) -> Response:
    """Return the images of a request, or their stream of events."""
    reservation = service.reserve(image_request, request.state.key)
    if image_request.stream:
        [draw_request] = image_request.draw_requests
        stream = _stream(service, draw_request, reservation)
        return EventSourceResponse(stream, headers=_NO_CACHE)
    with reservation:
        images = await cancel_on_disconnect(request, service.draw(image_request, reservation))
    result = await service.stored_images.store(image_request, images)
    return json_response(responses.images(result, service.model.name, base_url(request)))


async def _stream(
    service: Service, draw_request: DrawRequest, reservation: Reservation
) -> AsyncIterator[bytes]:
    """Yield previews and the image as OpenAI's events; queue position and steps as comments."""
    events: asyncio.Queue[Progress | EncodedImage | None] = asyncio.Queue()

    async def draw() -> None:
        async for event in service.draw_events(draw_request, reservation):
            events.put_nowait(event)

    drawing = asyncio.ensure_future(draw())
    drawing.add_done_callback(lambda _: events.put_nowait(None))
    seconds, previews = FIRST_COMMENT_SECONDS, 0
    try:
        while True:
            try:
                async with asyncio.timeout(seconds):
                    event = await events.get()
            except TimeoutError:
                yield _comment(queue_position=service.queue.position(reservation))
                continue
            if event is None:
                drawing.result()  # raises what ended the drawing
                return
            if isinstance(event, Progress):
                yield _comment(step=event.step, steps=event.steps)
            elif event.preview:
                yield _event(responses.partial_image_event(draw_request, event, previews))
                seconds, previews = KEEP_ALIVE_SECONDS, previews + 1
            else:
                yield _event(responses.completed_event(draw_request, event))
    except ApiError as error:
        yield _error_event(error)
    except Exception:
        log.exception("a streamed image failed")
        yield _error_event(internal_error())
    finally:
        drawing.cancel()  # releases its lanes and its reservation


def _event(content: dict[str, object]) -> bytes:
    return format_sse_event(event=str(content["type"]), data_str=json.dumps(content))


def _error_event(error: ApiError) -> bytes:
    return format_sse_event(event="error", data_str=json.dumps(error.body))


def _comment(**values: int) -> bytes:
    return format_sse_event(comment=json.dumps(values))
