"""The table of clients in sdbatch/serve/README.md: each row is a test, against a real server.

Packages that install are called. Of the others the whole bodies that they send are replayed, with
their default settings; the source and its version stand with each.
"""

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys

import aiohttp
import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

from tests.serve.conftest import LEFT, PHOTO, base64_of, file_of

PICTURE = file_of(PHOTO)
MASK = file_of(np.dstack([PHOTO, 255 - LEFT]))  # its left half is transparent
PROMPT = "a red circle"


@pytest.fixture
def aliased(serving, recorder):
    """A service whose operator lets clients ask for OpenAI's models."""
    return serving(recorder, serve={"aliases": ["gpt-image-1", "dall-e-2", "dall-e-3"]})


@pytest.fixture
def client(aliased):
    with openai.OpenAI(base_url=f"{aliased.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def webui(recording):
    port = int(recording.url.rpartition(":")[2])
    api = webuiapi.WebUIApi(port=port)
    yield api
    api.session.close()


def size_of(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


async def post_with_aiohttp(url, **arguments):
    async with aiohttp.ClientSession() as session, session.post(url, **arguments) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


# openai


def test_openai_draws_with_every_parameter_at_its_default(client, recorder):
    answer = client.images.generate(
        model="gpt-image-1",
        prompt=PROMPT,
        background="auto",
        moderation="auto",
        n=1,
        output_compression=100,
        output_format="png",
        partial_images=0,
        quality="auto",
        response_format=None,
        safety_identifier="somebody",
        size="auto",
        stream=False,
        style=None,
        user="somebody",
    )
    assert size_of(answer.data[0].b64_json) == (64, 64)
    assert recorder.requests[0].prompt == PROMPT


def test_openai_streams_generations_and_edits(client):
    for events in (
        client.images.generate(model="gpt-image-1", prompt=PROMPT, stream=True, partial_images=1),
        client.images.edit(
            model="gpt-image-1", image=PICTURE, prompt=PROMPT, stream=True, partial_images=1
        ),
    ):
        types = [event.type.rpartition(".")[2] for event in events]
        assert types == ["partial_image", "completed"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # variations, by OpenAI
def test_openai_edits_and_varies_with_every_parameter_at_its_default(client):
    answer = client.images.edit(
        model="gpt-image-1",
        image=[("a.png", PICTURE, "image/png")],
        mask=MASK,
        prompt=PROMPT,
        background="auto",
        input_fidelity="low",
        n=1,
        output_compression=100,
        output_format="png",
        partial_images=0,
        quality="auto",
        size="auto",
        stream=False,
        user="somebody",
    )
    assert size_of(answer.data[0].b64_json) == (64, 64)
    answer = client.images.create_variation(
        model="dall-e-2", image=PICTURE, n=1, response_format="b64_json", size="512x512", user="x"
    )
    assert size_of(answer.data[0].b64_json) == (512, 512)


# LiteLLM

LITELLM = """
import json, sys
import litellm
url, picture, mask = sys.argv[1], open(sys.argv[2], "rb"), open(sys.argv[3], "rb")
to = {"api_base": url, "api_key": "none"}
answers = [
    litellm.image_generation(
        model=f"openai/{model}", prompt="a red circle", n=2, size="64x72", quality=quality,
        user="x", **more, **to,
    )
    for model, quality, more in (
        ("tiny", "standard", {}),
        ("gpt-image-1", "auto", {"background": "auto", "moderation": "auto"}),
        ("dall-e-3", "standard", {}),
    )
]
answers.append(
    litellm.image_edit(
        model="openai/gpt-image-1", image=picture, mask=mask, prompt="a red circle", quality="auto",
        background="auto", n=2, **to,
    )
)
print(json.dumps([[each.b64_json or each.url for each in answer.data] for answer in answers]))
"""


def test_litellm_draws_and_edits(aliased, recorder, tmp_path):
    (tmp_path / "picture.png").write_bytes(PICTURE)
    (tmp_path / "mask.png").write_bytes(MASK)
    files = [str(tmp_path / name) for name in ("picture.png", "mask.png")]
    command = [sys.executable, "-c", LITELLM, f"{aliased.url}/v1", *files]
    # else it fetches prices from the network; a process of its own, as it changes warnings
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    own, gpt_image, dall_e, edit = json.loads(process.stdout.splitlines()[-1])
    assert {size_of(image) for image in own + gpt_image} == {(64, 72)}
    assert all(aliased.client.get(url).status_code == 200 for url in dall_e)
    assert {size_of(image) for image in edit} == {(64, 64)}
    assert len(recorder.requests) == 8


# webuiapi


def test_webuiapi_draws_with_its_defaults(webui, recorder):
    result = webui.txt2img(prompt=PROMPT)
    assert result.image.size == (512, 512)
    [request] = recorder.requests
    assert (request.prompt, request.sampler, request.num_inference_steps) == (PROMPT, "euler_a", 20)
    assert (request.guidance_scale, request.hires_scale, request.seed) == (
        7,
        1,
        result.info["seed"],
    )


def test_webuiapi_draws_with_hires_fix(webui, recorder):
    webui.txt2img(
        prompt=PROMPT,
        enable_hr=True,
        hr_scale=1.5,
        hr_upscaler=webuiapi.HiResUpscaler.LatentBicubic,
        denoising_strength=0.5,
        scheduler="karras",
        sampler_name="DPM++ 2M",
        eta=0,
    )
    [request] = recorder.requests
    assert (request.hires_scale, request.hires_upscaler) == (1.5, "latent_bicubic")
    assert (request.hires_strength, request.sampler) == (0.5, "dpmpp_2m_karras")


def test_webuiapi_draws_from_pictures_and_masks_with_its_defaults(webui, recorder):
    photo, mask = Image.fromarray(PHOTO), Image.fromarray(LEFT)
    assert webui.img2img(images=[photo], prompt=PROMPT).image.size == (512, 512)
    masked = webui.img2img(images=[photo], mask_image=mask, prompt=PROMPT, cfg_scale=6.5)
    assert masked.image.size == (64, 64)  # that of the picture, as only the masked part is drawn
    whole, part = recorder.requests
    assert (whole.strength, whole.only_masked) == (0.75, False)
    assert (part.only_masked, part.mask_blur, part.guidance_scale) == (True, 4, 6.5)


def test_webuiapi_draws_on_an_event_loop(webui):
    async def draw():
        return await webui.txt2img(prompt=PROMPT, width=64, height=64, use_async=True)

    assert asyncio.run(draw()).image.size == (64, 64)


def test_webuiapi_lists_what_it_can_ask_for(webui, recorder):
    assert webui.util_get_model_names() == ["tiny"]
    assert webui.util_get_current_model() == "tiny"
    for sampler in webui.util_get_sampler_names():
        webui.txt2img(prompt=PROMPT, sampler_name=sampler, width=64, height=64)
    for scheduler in webui.util_get_scheduler_names():
        sampler = "DDIM" if scheduler == "trailing" else "DPM++ 2M"
        webui.txt2img(prompt=PROMPT, sampler_name=sampler, scheduler=scheduler, width=64, height=64)
    assert {"euler", "dpmpp_2m_ays", "ddim_trailing"} <= {
        each.sampler for each in recorder.requests
    }


def test_webuiapi_is_told_of_scripts_that_are_not_here(webui):
    with pytest.raises(RuntimeError, match=r"alwayson_scripts = .*must be without ADetailer"):
        webui.txt2img(prompt=PROMPT, adetailer=[webuiapi.ADetailer()], alwayson_scripts={})


# Open WebUI 0.12.4, routers/images.py, with the defaults of its config.py


def test_open_webui_draws_by_openais_api(aliased, recorder):
    body = {"model": "dall-e-2", "prompt": PROMPT, "n": 1, "size": "512x512"}
    answer = aliased.post(**body, response_format="b64_json")
    assert size_of(answer.json()["data"][0]["b64_json"]) == (512, 512)
    answer = aliased.post(**{**body, "model": "gpt-image-1", "size": "auto"})
    assert size_of(answer.json()["data"][0]["b64_json"]) == (64, 64)


def test_open_webui_edits_by_openais_api(aliased):
    def edit(field, **fields):
        form = aiohttp.FormData()
        for name, value in fields.items():
            form.add_field(name, str(value))
        form.add_field(field, io.BytesIO(PICTURE), filename="a.png", content_type="image/png")
        return asyncio.run(post_with_aiohttp(f"{aliased.url}/v1/images/edits", data=form))

    fields = {"model": "", "prompt": PROMPT, "response_format": "b64_json"}  # no model is chosen
    plain = edit("image", **fields)
    assert size_of(plain["data"][0]["b64_json"]) == (64, 64)
    fields |= {"model": "gpt-image-1", "n": 1, "size": "64x72", "background": "auto"}
    assert size_of(edit("image[]", **fields)["data"][0]["b64_json"]) == (64, 72)


def test_open_webui_draws_by_a1111s_api(recording, recorder):
    body = {"prompt": PROMPT, "batch_size": 1, "width": 512, "height": 512, "steps": 50}
    headers = {"authorization": "Basic "}  # without api_auth
    url = f"{recording.url}/sdapi/v1/txt2img"
    for more in ({}, {"negative_prompt": "blurry"}):
        answer = asyncio.run(post_with_aiohttp(url, json={**body, **more}, headers=headers))
        assert size_of(answer["images"][0]) == (512, 512)
        assert json.loads(answer["info"])["steps"] == 50
    assert recorder.requests[1].negative_prompt == "blurry"


# LibreChat, api/app/clients/tools/structured/*.js of danny-avila/LibreChat


def test_librechat_draws_with_its_dalle_tool(aliased):
    """DALLE3.js at 37d31ec."""
    body = {"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "1024x1024"}
    url = aliased.post(**body, prompt=PROMPT, n=1).json()["data"][0]["url"]
    assert Image.open(io.BytesIO(aliased.client.get(url).content)).size == (1024, 1024)


def test_librechat_is_told_all_that_its_dalle_tool_cannot_have(aliased):
    body = {"model": "dall-e-3", "quality": "hd", "style": "natural", "size": "1792x1024"}
    error = aliased.post(**body, prompt=PROMPT, n=1).json()["error"]
    assert {each["param"] for each in error["details"]} == {"quality", "style", "size"}


def test_librechat_draws_and_edits_with_its_openai_tools(aliased):
    """OpenAIImageTools.js at 8731432; the edit is a form."""
    body = {"model": "gpt-image-1", "n": 1, "background": "auto", "quality": "auto", "size": "auto"}
    for output_format in ("png", "webp", "jpeg"):
        compression = {} if output_format == "png" else {"output_compression": 100}
        answer = aliased.post(**body, prompt=PROMPT, output_format=output_format, **compression)
        assert size_of(answer.json()["data"][0]["b64_json"]) == (64, 64)
    form = {"model": "gpt-image-1", "prompt": PROMPT, "quality": "auto", "size": "auto"}
    files = {"image[]": ("photo.png", PICTURE, "image/png")}
    answer = aliased.client.post("/v1/images/edits", data=form, files=files)
    assert size_of(answer.json()["data"][0]["b64_json"]) == (64, 64)


def test_librechat_draws_with_its_stable_diffusion_tool(recording, recorder):
    """StableDiffusion.js at 7cacd8a."""
    body = {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "sampler_index": "DPM++ 2M Karras",
        "cfg_scale": 4.5,
        "steps": 22,
        "width": 1024,
        "height": 1024,
    }
    answer = recording.post("/sdapi/v1/txt2img", **body).json()
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == size_of(answer["images"][0]) == (1024, 1024)
    assert "Steps: 22" in info["infotexts"][0].split("\n")[-1]
    assert recorder.requests[0].sampler == "dpmpp_2m_karras"


# SillyTavern 1.12.6, public/scripts/extensions/stable-diffusion/index.js at ba6f7b7


def test_sillytavern_draws_by_a1111s_api(recording, recorder):
    body = {
        "url": "http://localhost:7860",
        "auth": "",
        "prompt": PROMPT,
        "negative_prompt": "lowres, bad anatomy",
        "sampler_name": "DDIM",
        "scheduler": "normal",
        "steps": 20,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    answer = recording.post("/sdapi/v1/txt2img", **body)
    assert size_of(answer.json()["images"][0]) == (512, 512)
    assert recorder.requests[0].sampler == "ddim"


def test_sillytavern_draws_by_openais_api(aliased):
    body = {"prompt": PROMPT, "size": "1024x1024", "n": 1, "response_format": "b64_json"}
    for more in ({"model": "dall-e-3", "quality": "standard", "style": "vivid"}, {"model": "tiny"}):
        answer = aliased.post(**body, **more)
        assert size_of(answer.json()["data"][0]["b64_json"]) == (1024, 1024)


# LobeChat, packages/model-runtime/src/core/openaiCompatibleFactory/createImage.ts at d05cf92


def test_lobechat_draws(client):
    more = {"gpt-image-1": {}, "dall-e-3": {"response_format": "b64_json"}}
    for model, fields in more.items():
        answer = client.images.generate(model=model, n=1, prompt=PROMPT, **fields)
        assert answer.data[0].b64_json


def test_lobechat_is_told_that_edits_have_strength_instead_of_fidelity(client):
    with pytest.raises(openai.BadRequestError, match=r"input_fidelity = 'high'.* set strength"):
        client.images.edit(
            model="gpt-image-1", n=1, image=PICTURE, prompt=PROMPT, input_fidelity="high"
        )


# curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_draws_and_edits(recording, tmp_path):
    def curl(path, *arguments):
        command = ["curl", "--silent", "--show-error", "--fail-with-body"]
        process = subprocess.run(
            [*command, f"{recording.url}{path}", *arguments], capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return json.loads(process.stdout)

    (tmp_path / "photo.png").write_bytes(PICTURE)
    header = ("--header", "Content-Type: application/json")
    body = json.dumps({"prompt": PROMPT, "size": "64x64"})
    answer = curl("/v1/images/generations", *header, "--data", body)
    assert size_of(answer["data"][0]["b64_json"]) == (64, 64)
    form = ("--form", f"image=@{tmp_path}/photo.png", "--form", f"prompt={PROMPT}")
    assert size_of(curl("/v1/images/edits", *form)["data"][0]["b64_json"]) == (64, 64)
    body = json.dumps({"prompt": PROMPT, "init_images": [base64_of(PHOTO)], "steps": 4})
    assert size_of(curl("/sdapi/v1/img2img", *header, "--data", body)["images"][0]) == (64, 64)
