"""AUTOMATIC1111's options, and the routes that load and unload its model.

They are the same for all clients and do not change while the service runs: what a client sets is
accepted if it changes nothing.
"""

import os
from typing import Any

from fastapi import APIRouter, Request
from pydantic import RootModel

from sdbatch.errors import one_line, short_repr
from sdbatch.serve.a1111_bodies import Settings
from sdbatch.serve.a1111_drawings import PREVIEW_STEPS
from sdbatch.serve.errors import ApiError, Faults, invalid_value, unknown_parameter
from sdbatch.serve.http import documented_body, documented_errors, json_body
from sdbatch.serve.requests import ServedModel

CHECKPOINT = "sd_model_checkpoint"
MOST_CHARACTERS = 100  # of an unknown option's name in an error
FIXED = {  # what the service does, by AUTOMATIC1111's names
    "sd_vae": "Automatic",
    "samples_save": False,
    "grid_save": False,
    "return_grid": False,
    "enable_pnginfo": True,
    "live_previews_enable": True,
    "show_progress_every_n_steps": PREVIEW_STEPS,
    "randn_source": "CPU",
    "eta_noise_seed_delta": 0,
    "inpainting_mask_weight": 1.0,
}


class Options(RootModel[dict[str, Any]]):
    """The body of POST /sdapi/v1/options: options and their values."""


def routes(model: ServedModel) -> APIRouter:
    """Return the routes over the options of `model`."""
    router = APIRouter(prefix="/sdapi/v1")
    options = current_options(model)

    @router.get("/options", responses=documented_errors())
    async def get_options() -> dict[str, Any]:
        """Return the options."""
        return options

    @router.post(
        "/options",
        responses=documented_errors(400, 404, 413, 415),
        openapi_extra=documented_body(Options),
    )
    async def set_options(request: Request) -> dict[str, str]:
        """Accept options that change nothing, and the name of the served model."""
        body = await json_body(request, Options)
        check_options(body.root, options, model)
        return {}

    @router.post("/reload-checkpoint", responses=documented_errors())
    async def reload_checkpoint() -> dict[str, str]:
        """Accept: the model is always loaded."""
        return {}

    @router.post("/unload-checkpoint", responses=documented_errors())
    async def unload_checkpoint() -> dict[str, str]:
        """Reject: the model serves all clients."""
        raise ApiError(
            403,
            "The model stays loaded, as it serves all clients. Leave this request out.",
            code="not_allowed",
        )

    @router.get("/memory", responses=documented_errors())
    async def memory() -> dict[str, Any]:
        """Return the memory of the machine that answers; the engines are other processes."""
        error = "unavailable: the engines are other processes, perhaps on other machines"
        return {"ram": _memory(), "cuda": {"error": error}}

    return router


def current_options(model: ServedModel) -> dict[str, Any]:
    """Return the options by their names; a request changes some by its override_settings."""
    sampling = model.job.sampling
    return {
        **FIXED,
        **Settings().model_dump(),
        "CLIP_stop_at_last_layers": sampling.clip_skip + 1,
        "eta_ddim": sampling.eta,
        CHECKPOINT: model.name,
        "sd_checkpoint_hash": model.job.model.sha256 or "",
    }


def check_options(given: dict[str, Any], options: dict[str, Any], model: ServedModel) -> None:
    """Raise an ApiError that names all options in `given` that would change something."""
    faults = Faults()
    for name, value in given.items():
        if value is not None:
            with faults.collect():
                _check_option(name, value, options, model)
    faults.raise_any()


def _check_option(name: str, value: Any, options: dict[str, Any], model: ServedModel) -> None:
    """Raise an ApiError if an option has another value."""
    if name not in options:
        raise unknown_parameter(one_line(name, MOST_CHARACTERS))
    if name == CHECKPOINT:
        model.check_name(name, value)
    elif value != options[name]:
        in_request = name in Settings.model_fields
        way_out = "Send it in override_settings of each request" if in_request else "Leave it out"
        text = f"must be {options[name]!r}, as options are those of all clients. {way_out}"
        raise invalid_value(name, f"{short_repr(value)}: {text}")


def _memory() -> dict[str, int]:
    """Return the memory of this machine in bytes."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return {"free": free, "used": total - free, "total": total}
