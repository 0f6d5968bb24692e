"""What AUTOMATIC1111's clients list before they draw: samplers, models, upscalers, extensions.

All of it is constant while the service runs. What this service does not have is an empty list.
"""

from typing import Any

from fastapi import APIRouter

from sdbatch import samplers
from sdbatch.sampling import LATENT_UPSCALERS, PICTURE_UPSCALERS
from sdbatch.serve.a1111_bodies import SCHEDULES, UPSCALERS
from sdbatch.serve.http import documented_errors
from sdbatch.serve.requests import ServedModel

EMPTY_LISTS = (
    "/sd-vae",
    "/sd-modules",  # of Forge, which its clients ask for together with /sd-vae
    "/hypernetworks",
    "/face-restorers",
    "/realesrgan-models",
    "/prompt-styles",
    "/script-info",
    "/extensions",
)
REFRESHES = ("/refresh-checkpoints", "/refresh-vae", "/refresh-loras", "/refresh-embeddings")


def routes(model: ServedModel, started: int) -> APIRouter:
    """Return the routes that describe `model`.

    Args:
        model: the one that is served.
        started: when the service started, in seconds since 1970.
    """
    router = APIRouter()
    documented = documented_errors()
    lists = {f"/sdapi/v1{path}": content for path, content in _lists(model).items()}
    for path, content in {**lists, **_page_routes(started)}.items():
        router.add_api_route(path, _constant_route(content), methods=["GET"], responses=documented)
    for path in REFRESHES:
        router.add_api_route(
            f"/sdapi/v1{path}", _constant_route({}), methods=["POST"], responses=documented
        )
    return router


def _lists(model: ServedModel) -> dict[str, Any]:
    """Return the responses by their paths."""
    files = {"model_name": None, "model_path": None, "model_url": None}
    return {
        "/samplers": [
            {"name": samplers.title(each), "aliases": [each], "options": {}}
            for each in samplers.NAMES
        ],
        "/schedulers": [
            {
                "name": schedule or "automatic",
                "label": label,
                "aliases": None,
                "default_rho": -1,
                "need_inner_model": False,
            }
            for schedule, label in SCHEDULES.items()
        ],
        "/sd-models": [_checkpoint(name, model) for name in model.names],
        "/embeddings": {
            "loaded": {each.token: {} for each in model.job.model.embeddings},
            "skipped": {},
        },
        "/loras": [
            {"name": lora, "alias": lora, "path": "", "metadata": {}}
            for lora in model.job.model.row_loras
        ],
        "/latent-upscale-modes": [{"name": UPSCALERS[name]} for name in LATENT_UPSCALERS],
        "/upscalers": [
            {"name": UPSCALERS[name], **files, "scale": 4} for name in PICTURE_UPSCALERS
        ],
        **{path: [] for path in EMPTY_LISTS},
        "/scripts": {"txt2img": [], "img2img": []},
        "/cmd-flags": {"api": True},
    }


def _checkpoint(name: str, model: ServedModel) -> dict[str, Any]:
    return {
        "title": name,
        "model_name": name,
        "hash": model.encoding.model_hash[:10] or None,
        "sha256": model.job.model.sha256,
        "filename": name,
        "config": None,
    }


def _page_routes(started: int) -> dict[str, Any]:
    """Return what AUTOMATIC1111's page, made with Gradio, answers to those who look for it."""
    return {
        "/app_id": {"app_id": started},
        "/user": None,
        "/login_check": None,
        "/internal/ping": {},
    }


def _constant_route(content: Any) -> Any:
    async def answer() -> Any:
        return content

    return answer
