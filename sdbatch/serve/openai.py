"""The routes that OpenAI's clients know: generations, at once or streamed, and models."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from sdbatch.serve import requests, responses
from sdbatch.serve.drawer import Step
from sdbatch.serve.errors import Refusal, internal
from sdbatch.serve.http import (
    DRAWING,
    base_url,
    documented,
    documented_errors,
    json_body,
    json_of,
    note,
    unless_gone,
)
from sdbatch.serve.requests import Streamable, Wanted
from sdbatch.serve.service import Place, Service, log

_EVENTS: dict[str, Any] = {"text/event-stream": {}}  # with `stream`
SECONDS_BETWEEN_SIGNS = 10.0  # of life on a stream: proxies cut those that are silent


def routes(service: Service) -> APIRouter:
    """Return the routes over `service`."""
    router = APIRouter()
    offer = service.offer
    generation = requests.body_of(Streamable, offer.job)

    @router.post(
        "/v1/images/generations",
        responses={
            200: {"model": responses.Images, "content": _EVENTS},
            **documented_errors(*DRAWING),
        },
        openapi_extra=documented(generation),
    )
    async def generate(request: Request) -> Response:
        """Draw images; streamed, with previews on the way as server-sent events."""
        asked = requests.read(
            requests.parse(generation, await json_body(request)), offer, request.state.key.limits
        )
        note(request, asked)
        place = service.take(len(asked.asked), request.state.key)
        if asked.previews is not None:
            stream = _stream(service, asked, place)
            return StreamingResponse(stream, media_type="text/event-stream", headers=_UNCACHED)
        with place:
            pictures = await unless_gone(request, service.draw(asked))
        return json_of(responses.images(asked, pictures, service, base_url(request)))

    @router.get("/v1/models", responses=documented_errors())
    async def models() -> dict[str, Any]:
        """Name the model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}", responses=documented_errors(404))
    async def model(name: str) -> dict[str, Any]:
        """Describe the model that is served."""
        if name != offer.model:
            text = f"model = {name!r}: only {offer.model} is served here."
            raise Refusal(404, text, code="model_not_found", param="model")
        return _model(service)

    return router


async def _stream(service: Service, asked: Wanted, place: Place) -> AsyncIterator[str]:
    """Send previews and the image as OpenAI does, and how far it is as comments between."""
    events = service.follow(asked.asked[0], place)
    following: asyncio.Future[Any] | None = None
    previews = 0
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            await asyncio.wait({following}, timeout=SECONDS_BETWEEN_SIGNS if previews else 1.0)
            if not following.done():
                yield f": {json.dumps({'queue_position': service.ahead(place)})}\n\n"
                continue
            happened, following = following.result(), None
            if isinstance(happened, Step):
                yield f": {json.dumps({'step': happened.done, 'steps': happened.of})}\n\n"
            elif happened.preview:
                yield _sent(responses.event("partial_image", asked, happened, previews))
                previews += 1
            else:
                yield _sent(responses.event("completed", asked, happened, None))
                return
    except Refusal as refusal:
        yield f"event: error\ndata: {json.dumps(refusal.body)}\n\n"
    except Exception:  # noqa: BLE001  the answer has begun: its end says that it is none
        log.exception("a streamed image failed")
        yield f"event: error\ndata: {json.dumps(internal().body)}\n\n"
    finally:
        # beside this task: what is cancelled here may not wait
        ending = asyncio.ensure_future(_end(events, following))
        _ENDING.add(ending)
        ending.add_done_callback(_ENDING.discard)


_ENDING: set[asyncio.Future[None]] = set()  # or they could be collected while they run


async def _end(events: AsyncGenerator[Any], following: asyncio.Future[Any] | None) -> None:
    if following is not None:
        following.cancel()
        await asyncio.wait({following})
    await events.aclose()


def _sent(event: dict[str, object]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


_UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.offer.model,
        "object": "model",
        "created": service.began,
        "owned_by": "sdbatch",
    }
