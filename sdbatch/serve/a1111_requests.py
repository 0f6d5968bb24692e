"""The images that a body of AUTOMATIC1111's API requests.

The fields of hires fix have an effect where it is on, those of masks where there is one. One error
names all fields that cannot be honoured.
"""

import secrets
from collections.abc import Callable
from typing import Any

from sdbatch import samplers
from sdbatch.engine.request import Request
from sdbatch.errors import short_repr
from sdbatch.job import Limits, Sampling
from sdbatch.sampling import MOST_ENLARGED, SIDE_MULTIPLE
from sdbatch.serve import pictures, requests
from sdbatch.serve.a1111_bodies import (
    FILE_FORMATS,
    IMG2IMG_KEYS,
    PARAMETERS,
    SHARED_KEYS,
    UPSCALERS,
    Body,
    Img2ImgFields,
    Txt2ImgFields,
)
from sdbatch.serve.drawer import DrawRequest
from sdbatch.serve.errors import ApiError, Faults, combined, invalid_value
from sdbatch.serve.pictures import Pictures
from sdbatch.serve.requests import RANDOM_SEEDS, ImageRequest, ServedModel

FITS = ("stretch", "crop", "pad")  # by resize_mode
MASK_FILLS = ("fill", "original", "noise", "nothing")  # by inpainting_fill
DEFAULT_HIRES_SCALE, DEFAULT_MASK_BLUR = 2.0, 4  # AUTOMATIC1111's
MOST_BLUR = MOST_PADDING = 256  # pixels
# AUTOMATIC1111's names of the schedule that a sampler has by itself.
# Source: its modules/sd_schedulers.py
PLAIN_SCHEDULES = ("", "automatic", "uniform", "normal")
# AUTOMATIC1111's eta scales the noise of these; ours always add all of it.
# Source: its modules/sd_samplers_kdiffusion.py
NOISY_SAMPLERS = ("euler_a", "dpm2_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")

NAMES = {**PARAMETERS, "hires_strength": "denoising_strength"}  # our keys -> AUTOMATIC1111's fields


def from_txt2img(body: Txt2ImgFields, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests; raises as requests.from_generation does."""
    faults = Faults()
    sampling = model.job.sampling
    values = {
        **_shared_values(body, sampling, faults),
        **_hires_values(body, model, faults),
    }
    return _image_request(body, values, model, limits, faults)


def from_img2img(body: Img2ImgFields, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the images that `body` requests, without their pictures; raises as from_txt2img."""
    faults = Faults()
    values = {
        **_shared_values(body, model.job.sampling, faults),
        **_given(body, IMG2IMG_KEYS),
        "compat": "a1111",
        "hires_scale": 1.0,  # AUTOMATIC1111 has no hires fix for pictures
    }
    if body.resize_mode is not None:
        values["fit"] = FITS[body.resize_mode]
    if body.mask:
        values |= _mask_values(body, faults)
    return _image_request(body, values, model, limits, faults)


def pictures_of(body: Img2ImgFields) -> Pictures:
    """Return the pictures that `body` holds; raises an ApiError if they are not in base64."""
    invert = bool(body.inpainting_mask_invert)
    faults = Faults()
    image, mask = b"", None
    with faults.collect():
        image = pictures.from_base64(body.init_images[0], "init_images")
    with faults.collect():
        mask = pictures.from_base64(body.mask, "mask") if body.mask else None
    faults.raise_any()
    return Pictures(
        image, mask, lambda mask: pictures.light_parts(mask, invert), image_param="init_images"
    )


def _image_request(
    body: Body, values: dict[str, Any], model: ServedModel, limits: Limits, faults: Faults
) -> ImageRequest:
    settings = body.override_settings
    with faults.collect():
        model.check_name("override_settings.sd_model_checkpoint", settings.sd_model_checkpoint)
    encoding = model.encoding_for(FILE_FORMATS[settings.samples_format])
    images = body.batch_size * body.n_iter

    def images_of(first: Request) -> tuple[DrawRequest, ...]:
        # as AUTOMATIC1111 counts: variations of an image share its seed
        counted = "variation_seed" if first.variation_strength else "seed"
        return requests.repeat(DrawRequest(first, encoding), images, counted)

    try:
        return ImageRequest(
            requests.all_images(values, images, model.job, limits, faults, images_of)
        )
    except ApiError as error:
        raise combined([_with_their_name(each) for each in error.parts]) from error


def _with_their_name(error: ApiError) -> ApiError:
    """Return the error with AUTOMATIC1111's name of the field, which the client has sent."""
    ours = error.param or ""
    name = NAMES.get(ours, ours)
    text = f"{name}{str(error).removeprefix(ours)}"
    return ApiError(error.status, text, code=error.code, param=name or None)


def _shared_values(body: Body, sampling: Sampling, faults: Faults) -> dict[str, Any]:
    """Return the values that both bodies give; those that they leave out are the job's."""
    values = {**sampling.model_dump(), **_given(body, SHARED_KEYS)}
    if values["variation_strength"]:
        values["variation_seed"] = _seed(body.subseed)
    with faults.collect():
        values["sampler"] = _sampler(body, sampling.sampler)
    with faults.collect():
        values["eta"] = _eta(body, values)
    with faults.collect():
        values["clip_skip"] = _clip_skip(body, sampling)
    return {
        **values,
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "seed": _seed(body.seed),
        "prompt_weights": True,
        "chunk_prompts": True,
    }


def _given(body: Body, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of sampling keys that `body` has."""
    values = {key: getattr(body, PARAMETERS[key]) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _seed(value: int) -> int:
    return secrets.randbelow(RANDOM_SEEDS) if value == -1 else value


def _eta(body: Body, values: dict[str, Any]) -> float:
    """Return eta, for the samplers that have it; it does not change what the others draw."""
    given: float | None = getattr(body, PARAMETERS["eta"])
    name = values["sampler"]
    if samplers.split(name)[0].takes_eta:
        setting = body.override_settings.eta_ddim
        eta: float = values["eta"] if given is not None or setting is None else setting
        return eta
    is_noisy = name in NOISY_SAMPLERS or name.rpartition("_")[0] in NOISY_SAMPLERS
    if is_noisy and given not in (None, 1):
        raise invalid_value(
            "eta",
            f"{given:g}: must be 1 with {samplers.title(name)}, which adds all of its noise. Leave "
            f"it out, or choose DDIM, which has eta",
        )
    return 0.0


def _clip_skip(body: Body, sampling: Sampling) -> int:
    """Return how many layers of the text encoder are left out, which two fields may say."""
    setting = body.override_settings.CLIP_stop_at_last_layers
    if None not in (setting, body.clip_skip) and setting != body.clip_skip:
        raise invalid_value(
            "clip_skip",
            f"{body.clip_skip}: must equal override_settings.CLIP_stop_at_last_layers, {setting}",
        )
    layers = setting if body.clip_skip is None else body.clip_skip
    return sampling.clip_skip if layers is None else layers - 1


def _hires_values(body: Txt2ImgFields, model: ServedModel, faults: Faults) -> dict[str, Any]:
    """Return the values of hires fix; without it, its fields have no effect."""
    sampling = model.job.sampling
    in_job = sampling.hires_scale > 1
    if not (in_job if body.enable_hr is None else body.enable_hr):
        return {"hires_scale": 1.0}
    given: dict[str, Any] = {
        "hires_scale": body.hr_scale,
        "hires_steps": body.hr_second_pass_steps,
        "hires_strength": body.denoising_strength,
    }
    values = {key: value for key, value in given.items() if value is not None}
    _check_second_pass(body, model, faults)
    with faults.collect():
        if body.hr_upscaler:
            values["hires_upscaler"] = _upscaler(body.hr_upscaler)
    with faults.collect():
        if body.hr_resize_x or body.hr_resize_y:
            values["hires_scale"] = _resize_scale(body, sampling)
        elif not in_job:
            values.setdefault("hires_scale", DEFAULT_HIRES_SCALE)
    return values


def _check_second_pass(body: Txt2ImgFields, model: ServedModel, faults: Faults) -> None:
    """Add what a second pass cannot do: it draws the same as the first one, only larger."""
    allowed: dict[str, tuple[Any, ...]] = {
        "firstphase_width": (0,),
        "firstphase_height": (0,),
        "hr_checkpoint_name": ("", "Use same checkpoint", *model.names),
        "hr_sampler_name": ("", "Use same sampler", body.sampler_name or body.sampler_index),
        "hr_scheduler": ("", "Use same scheduler", body.scheduler),
        "hr_prompt": ("", body.prompt),
        "hr_negative_prompt": ("", body.negative_prompt),
        "hr_additional_modules": ([], ["Use same choices"]),
    }
    for name, values in allowed.items():
        given = getattr(body, name)
        if given is not None and given not in values:
            text = f"{short_repr(given)}: must be as without hires fix. Leave it out"
            faults.add(invalid_value(name, text))


def _resize_scale(body: Txt2ImgFields, sampling: Sampling) -> float:
    """Return the scale that gives the size which `body` names."""
    values = {**sampling.model_dump(), **_given(body, ("height", "width"))}
    sides = [(body.hr_resize_x or 0, values["width"]), (body.hr_resize_y or 0, values["height"])]
    [(larger, smaller), *_] = [(after, before) for after, before in sides if after]
    if larger > MOST_ENLARGED:
        name = "hr_resize_x" if body.hr_resize_x else "hr_resize_y"
        raise invalid_value(name, f"{short_repr(larger)}: must be {MOST_ENLARGED} at most")
    scale: float = larger / smaller
    for after, before in sides:
        if after and int(before * scale) // SIDE_MULTIPLE * SIDE_MULTIPLE != after:
            raise invalid_value(
                "hr_resize_x",
                f"{body.hr_resize_x}, hr_resize_y = {body.hr_resize_y}: must enlarge "
                f"{values['width']}x{values['height']} alike in both directions, to multiples of "
                f"{SIDE_MULTIPLE}",
            )
    return scale


def _upscaler(title: str) -> str:
    """Return our name of an upscaler."""
    names = {title.lower(): name for name, title in UPSCALERS.items()}
    if title.lower() not in names:
        raise invalid_value(
            "hr_upscaler", f"{short_repr(title)}: must be one of {', '.join(UPSCALERS.values())}"
        )
    return names[title.lower()]


def _mask_values(body: Img2ImgFields, faults: Faults) -> dict[str, Any]:
    """Return the values of how the mask is used."""
    values: dict[str, Any] = {}

    def add(key: str, name: str, most: int, value_of: Callable[[int], Any] = int) -> None:
        given = getattr(body, name)
        if given is None:
            return
        if 0 <= given <= most:
            values[key] = value_of(given)
        else:
            faults.add(invalid_value(name, f"{given}: must be 0 to {most}"))

    add("mask_fill", "inpainting_fill", len(MASK_FILLS) - 1, MASK_FILLS.__getitem__)
    add("only_masked", "inpaint_full_res", 1, bool)
    add("only_masked_padding", "inpaint_full_res_padding", MOST_PADDING)
    if body.mask_blur is None:  # else it wins over both
        add("mask_blur", "mask_blur_y", MOST_BLUR)
        add("mask_blur", "mask_blur_x", MOST_BLUR)
        x, y = (
            DEFAULT_MASK_BLUR if blur is None else blur
            for blur in (body.mask_blur_x, body.mask_blur_y)
        )
        if x != y:
            faults.add(invalid_value("mask_blur_x", f"{x}: must equal mask_blur_y, {y}"))
    add("mask_blur", "mask_blur", MOST_BLUR)
    return values


def _sampler(body: Body, default: str) -> str:
    """Return our name of the sampler, which AUTOMATIC1111 names in one field or in two."""
    title, label = body.sampler_name or body.sampler_index, body.scheduler or ""
    name = samplers.find(title) if title else default
    faults = Faults()
    if name is None:
        text = f"{short_repr(title)}: must be a name from GET /sdapi/v1/samplers"
        faults.add(invalid_value("sampler_name", text))
    known = any(_with_schedule(plain, label) for plain in samplers.SAMPLERS)
    if not known and label.lower() not in PLAIN_SCHEDULES:
        text = f"{short_repr(label)}: must be a label from GET /sdapi/v1/schedulers"
        faults.add(invalid_value("scheduler", text))
    faults.raise_any()
    assert name is not None, "an unknown sampler is a fault"
    if not known:
        return name
    plain = name if name in samplers.SAMPLERS else name.rpartition("_")[0]
    full_name = _with_schedule(plain, label)
    if full_name is None:
        raise invalid_value(
            "scheduler", f"{short_repr(label)}: {samplers.title(plain)} has no such schedule"
        )
    return full_name


def _with_schedule(plain: str, label: str) -> str | None:
    """Return the name of a sampler with a schedule; None if it has none of this label."""
    found = samplers.find(f"{plain} {label}")
    if found is None or found in samplers.SAMPLERS or not found.startswith(f"{plain}_"):
        return None
    return found
