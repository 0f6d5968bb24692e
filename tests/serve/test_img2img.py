"""img2img as AUTOMATIC1111's clients send it."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import LEFT, PHOTO, base64_of, pixels_of
from tests.serve.test_a1111 import USUAL_BODY as OF_TXT2IMG

# What webuiapi 0.9.17 sends, with its defaults.
OF_HIRES_FIX = ("enable_hr", "hr_", "firstphase_")
USUAL_BODY = {
    **{name: value for name, value in OF_TXT2IMG.items() if not name.startswith(OF_HIRES_FIX)},
    "init_images": [base64_of(PHOTO)],
    "resize_mode": 0,
    "denoising_strength": 0.75,
    "image_cfg_scale": 1.5,
    "mask_blur": 4,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1,
    "include_init_images": False,
}
MASKED = {
    "mask": base64_of(LEFT),
    "mask_blur": 0,
    "inpaint_full_res": False,
    "inpainting_fill": 1,
}


def img2img(server, **changes):
    return server.post("/sdapi/v1/img2img", **{**USUAL_BODY, **changes})


def test_usual_request_of_a_client_is_drawn_from_its_picture(recording, recorder):
    answer = img2img(recording).json()
    [request] = recorder.requests
    assert np.array_equal(request.inputs["image"], PHOTO)
    assert "mask" not in request.inputs
    assert (request.strength, request.compat, request.fit) == (0.75, "a1111", "stretch")
    assert (request.image_guidance_scale, request.sampler) == (1.5, "euler_a")
    assert np.array_equal(pixels_of(answer["images"][0]), 255 - PHOTO)
    info = json.loads(answer["info"])
    assert (info["denoising_strength"], info["width"], info["height"]) == (0.75, 64, 64)
    file = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert info["infotexts"] == [file.text["parameters"]]
    assert answer["parameters"]["init_images"] is None


def test_only_what_is_white_in_the_mask_is_drawn_anew(recording, recorder):
    for changes, drawn in (({}, LEFT), ({"inpainting_mask_invert": 1}, 255 - LEFT)):
        answer = img2img(recording, **MASKED, **changes).json()
        pixels = pixels_of(answer["images"][0])
        assert np.array_equal(pixels[drawn > 0], 255 - PHOTO[drawn > 0])
        assert np.array_equal(pixels[drawn == 0], PHOTO[drawn == 0])
    opacity = np.dstack([np.full((64, 64, 3), 255, np.uint8), LEFT])
    answer = img2img(recording, **{**MASKED, "mask": base64_of(opacity)}).json()
    assert np.array_equal(pixels_of(answer["images"][0])[:, 32:], PHOTO[:, 32:])


def test_fields_of_inpainting_reach_the_engine(recording, recorder):
    fields = {
        "resize_mode": 2,
        "inpainting_fill": 3,
        "inpaint_full_res": 0,
        "inpaint_full_res_padding": 12,
        "mask_blur_x": 6,
        "mask_blur_y": 6,
        "mask_blur": None,
    }
    assert img2img(recording, mask=base64_of(LEFT), **fields).status_code == 200
    [request] = recorder.requests
    assert (request.fit, request.mask_fill, request.mask_blur) == ("pad", "nothing", 6)
    assert (request.only_masked, request.only_masked_padding) == (False, 12)


def test_fields_of_masks_have_no_effect_without_one(recording, recorder):
    fields = {"mask_blur": -3, "inpainting_fill": 9, "inpaint_full_res_padding": 999}
    assert img2img(recording, **fields).status_code == 200
    [request] = recorder.requests
    assert (request.mask_blur, request.mask_fill, request.only_masked) == (0, "original", False)


def test_only_masked_returns_the_whole_picture_in_its_own_size(recording, recorder):
    photo = np.random.default_rng(5).integers(0, 256, (96, 128, 3), np.uint8)
    mask = np.zeros((96, 128), np.uint8)
    mask[32:64, 32:64] = 255
    answer = img2img(
        recording, init_images=[base64_of(photo)], mask=base64_of(mask), mask_blur=0
    ).json()
    pixels = pixels_of(answer["images"][0])
    assert pixels.shape == (96, 128, 3)
    assert np.array_equal(pixels[mask == 0], photo[mask == 0])
    assert json.loads(answer["info"])["width"] == 128


def test_what_a_request_leaves_out_is_the_jobs(serving, recorder):
    sampling = {"strength": 0.4, "fit": "pad", "mask_fill": "noise", "width": 72}
    server = serving(recorder, sampling=sampling)
    body = {"prompt": "a dog", "init_images": [base64_of(PHOTO)]}
    assert server.post("/sdapi/v1/img2img", **body).status_code == 200
    [request] = recorder.requests
    assert {name: getattr(request, name) for name in sampling} == sampling
    assert request.inputs["image"].shape == (64, 72, 3)


def test_images_of_a_request_share_its_picture_and_have_their_own_seeds(recording, recorder):
    info = json.loads(img2img(recording, batch_size=2, n_iter=2).json()["info"])
    assert info["all_seeds"] == [7, 8, 9, 10]
    first, *others = recorder.requests
    assert all(each.inputs["image"] is first.inputs["image"] for each in others)


def test_picture_may_be_a_data_uri_and_is_in_the_response_on_request(recording):
    picture = f"data:image/png;base64,{base64_of(PHOTO)}"
    answer = img2img(recording, init_images=[picture], include_init_images=True).json()
    assert np.array_equal(pixels_of(answer["images"][0]), 255 - PHOTO)
    assert answer["parameters"]["init_images"] == [picture]


REJECTED = {
    "none": ({"init_images": []}, "init_images = []: must be a list of one picture"),
    "several": (
        {"init_images": [base64_of(PHOTO)] * 2},
        "must be a list of one picture. Send a request for each",
    ),
    "url": ({"init_images": ["https://example.com/a.png"]}, "URLs are not fetched"),
    "no base64": ({"init_images": ["data:image/png,xx"]}, "must be a data URI with ;base64"),
    "no picture": ({"init_images": ["eHh4"]}, "init_images = "),
    "mask": ({"mask": "eHh4"}, "mask = "),
    "latent upscale": ({"resize_mode": 3}, "resize_mode = 3"),
    "blurs": (
        {**MASKED, "mask_blur": None, "mask_blur_x": 2},
        "mask_blur_x = 2: must equal mask_blur_y, 4",
    ),
    "blur": ({**MASKED, "mask_blur": 257}, "mask_blur = 257: must be 0 to 256"),
    "fill": ({**MASKED, "inpainting_fill": 4}, "inpainting_fill = 4: must be 0 to 3"),
    "padding": ({**MASKED, "inpaint_full_res_padding": -1}, "padding = -1: must be 0 to 256"),
    "rounding": ({"mask_round": False}, "mask_round = False"),
    "noise": ({"initial_noise_multiplier": 1.1}, "initial_noise_multiplier = 1.1"),
    "strength": ({"denoising_strength": 1.5}, "denoising_strength = 1.5"),
    "hires": ({"enable_hr": True}, "enable_hr: unknown parameter"),
    "large": ({"width": 2048, "height": 1024}, "must have 1048576 pixels at most"),
}


@pytest.mark.parametrize("fault", REJECTED)
def test_invalid_pictures_and_values_are_rejected_by_name(recording, fault):
    fields, words = REJECTED[fault]
    answer = img2img(recording, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"] in (*fields, "size")
