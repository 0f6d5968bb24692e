"""txt2img as AUTOMATIC1111's clients send it, and the routes that they call first."""

import base64
import io
import json

import pytest
from PIL import Image

from tests.serve.conftest import Recorder

# What webuiapi 0.9.17 sends for a prompt, with its defaults for all that a test does not need.
USUAL_BODY = {
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "denoising_strength": 0.7,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "prompt": "a (red:1.2) dog",
    "styles": [],
    "seed": 7,
    "subseed": -1,
    "subseed_strength": 0.0,
    "seed_resize_from_h": 0,
    "seed_resize_from_w": 0,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 4,
    "cfg_scale": 5.0,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "negative_prompt": "blurry",
    "eta": 1.0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "sampler_index": "Euler a",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
}


def txt2img(server, **changes):
    return server.post("/sdapi/v1/txt2img", **{**USUAL_BODY, **changes})


def test_usual_request_of_a_client_draws_the_same_image_as_openais_api(server):
    answer = txt2img(server).json()
    [file] = [base64.b64decode(image) for image in answer["images"]]
    picture = Image.open(io.BytesIO(file))
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    same = server.post(
        prompt="a (red:1.2) dog",
        negative_prompt="blurry",
        seed=7,
        sampler="euler_a",
        num_inference_steps=4,
        guidance_scale=5,
        prompt_weights=True,
        chunk_prompts=True,
    ).json()["data"][0]
    assert base64.b64decode(same["b64_json"]) == file
    info = json.loads(answer["info"])
    assert (info["seed"], info["sampler_name"], info["steps"]) == (7, "Euler a", 4)
    assert info["infotexts"] == [picture.text["parameters"]]
    assert answer["parameters"]["cfg_scale"] == 5.0


def test_seeds_count_up_over_batches_and_rounds(server):
    info = json.loads(txt2img(server, batch_size=2, n_iter=2).json()["info"])
    assert info["all_seeds"] == [7, 8, 9, 10]


def test_seed_minus_one_is_random(server):
    seeds = {json.loads(txt2img(server, seed=-1).json()["info"])["seed"] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("fields", "title"),
    [
        ({"sampler_name": "DPM++ 2M Karras"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, "DPM++ 2M Karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "karras"}, "DPM++ 2M Karras"),
        ({"sampler_name": "Euler", "scheduler": "Automatic"}, "Euler"),
        ({"sampler_name": None, "sampler_index": "Heun"}, "Heun"),
        ({"sampler_name": "unipc"}, "UniPC"),
        ({"sampler_name": "Euler", "sampler_index": "DDIM"}, "Euler"),
        ({"sampler_name": "", "sampler_index": None}, "DPM++ 2M"),
        (
            {"sampler_name": "k_dpmpp_2m", "scheduler": "align_your_steps"},
            "DPM++ 2M Align Your Steps",
        ),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "Exponential"}, "DPM++ 2M Exponential"),
        ({"sampler_name": "DDIM", "scheduler": "normal"}, "DDIM"),
    ],
)
def test_sampler_and_schedule_are_read_from_one_field_or_two(server, fields, title):
    assert json.loads(txt2img(server, **fields).json()["info"])["sampler_name"] == title


def test_format_and_clip_skip_are_override_settings(server):
    settings = {"CLIP_stop_at_last_layers": 2, "samples_format": "webp"}
    answer = txt2img(server, override_settings=settings).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).format == "WEBP"
    assert json.loads(answer["info"])["clip_skip"] == 2


REJECTED = {
    "upscaler": (
        {"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"},
        "hr_upscaler = 'R-ESRGAN 4x+': must be one of Latent, Latent (antialiased)",
    ),
    "hires shape": (
        {"enable_hr": True, "hr_resize_x": 128, "hr_resize_y": 136},
        "hr_resize_x = 128, hr_resize_y = 136: must enlarge 64x64 alike",
    ),
    "hires size": (
        {"enable_hr": True, "width": 1024, "height": 512, "hr_scale": 2.5},
        "size = 2560x1280 after hires fix: must have 1048576 pixels at most",
    ),
    "hires steps": (
        {"enable_hr": True, "hr_second_pass_steps": 151},
        "hr_second_pass_steps = 151: must be 150 at most",
    ),
    "hires strength": (
        {"enable_hr": True, "denoising_strength": 0.0},
        "denoising_strength = 0.0: must be greater than 0",
    ),
    "hires scale": ({"enable_hr": True, "hr_scale": 9}, "hr_scale = 9.0: must be less than"),
    "steps": ({"steps": 151}, "steps = 151: must be 150 at most"),
    "first phase": ({"enable_hr": True, "firstphase_width": 64}, "firstphase_width = 64: must be"),
    "hires sampler": ({"enable_hr": True, "hr_sampler_name": "Euler"}, "hr_sampler_name"),
    "hires schedule": ({"enable_hr": True, "hr_scheduler": "Karras"}, "hr_scheduler = 'Karras'"),
    "hires model": ({"enable_hr": True, "hr_checkpoint_name": "x"}, "hr_checkpoint_name = 'x'"),
    "hires prompt": ({"enable_hr": True, "hr_prompt": "a cat"}, "hr_prompt = 'a cat': must be as"),
    "hires negative": ({"enable_hr": True, "hr_negative_prompt": "x"}, "hr_negative_prompt = 'x'"),
    "hires modules": ({"enable_hr": True, "hr_additional_modules": ["vae"]}, "hr_additional_modu"),
    "faces": ({"restore_faces": True}, "restore_faces"),
    "tiling": ({"tiling": True}, "tiling = True: must be false, the only supported value"),
    "tiling as number": ({"tiling": 0}, "tiling = 0: must be true or false"),
    "no images": ({"send_images": False}, "send_images = False: must be true, the only"),
    "styles": ({"styles": ["x"]}, "styles"),
    "script": ({"script_name": "x/y/z plot"}, "script_name"),
    "always on": (
        {"alwayson_scripts": {"ADetailer": {"args": [True]}, "refiner": {"args": []}}},
        "must be without ADetailer: there are no scripts here",
    ),
    "unit": ({"alwayson_scripts": {"ControlNet": {"args": [{"image": ""}]}}}, "ControlNet"),
    "churn": ({"s_churn": 5}, "s_churn = 5"),
    "noise": ({"s_noise": 1.01}, "s_noise = 1.01"),
    "unconditional": ({"s_min_uncond": 2}, "s_min_uncond = 2"),
    "eta": ({"eta": 0.5}, "eta = 0.5: must be 1 with Euler a, which adds all of its noise"),
    "no eta": ({"eta": 0, "sampler_name": "DPM++ SDE Karras"}, "must be 1 with DPM++ SDE Karras"),
    "refiner": ({"refiner_checkpoint": "xl", "refiner_switch_at": 0.8}, "refiner_checkpoint"),
    "networks": ({"disable_extra_networks": True}, "disable_extra_networks"),
    "infotext": ({"infotext": "Steps: 20"}, "infotext"),
    "first pass": ({"firstpass_image": "..."}, "firstpass_image"),
    "vae": ({"override_settings": {"sd_vae": "x.pt"}}, "override_settings.sd_vae = 'x.pt'"),
    "clip skip": (
        {"clip_skip": 1, "override_settings": {"CLIP_stop_at_last_layers": 2}},
        "clip_skip = 1: must equal override_settings.CLIP_stop_at_last_layers, 2",
    ),
    "text number": ({"steps": "many"}, "steps = 'many': must be a whole number"),
    "fraction": ({"steps": "4.5"}, "steps = 4.5: must be a whole number"),
    "switch as number": ({"steps": True}, "steps = True: must be a whole number"),
    "subseed strength": ({"subseed_strength": 1.5}, "subseed_strength = 1.5"),
    "last subseed": (
        {"subseed_strength": 0.5, "subseed": 2**63 - 1, "batch_size": 2},
        "must leave room for 2 images",
    ),
    "setting": ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
    "init image": ({"init_images": ["..."]}, "init_images: unknown parameter"),
    "sampler": ({"sampler_name": "Magic"}, "must be a name from GET /sdapi/v1/samplers"),
    "schedule": ({"sampler_name": "UniPC", "scheduler": "Align Your Steps"}, "no such schedule"),
    "scheduler": ({"scheduler": "Magic"}, "must be a label from GET /sdapi/v1/schedulers"),
    "guidance": ({"cfg_scale": 0.5}, "cfg_scale = 0.5"),
    "width": ({"width": 65}, "width = 65"),
    "many": ({"batch_size": 6, "n_iter": 2}, "n = 12: must be 10 at most"),
}


@pytest.mark.parametrize("fault", REJECTED)
def test_unsupported_fields_and_values_are_rejected(server, fault):
    fields, words = REJECTED[fault]
    answer = txt2img(server, **fields)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_loras_that_rows_can_choose_are_listed_and_written_into_the_text_with_their_weights(
    serving,
):
    loras = [{"path": "a.safetensors", "name": "ink", "weight": 0.8}, {"path": "b.safetensors"}]
    server = serving(model={"path": "m", "loras": loras}, sampling={"loras": "ink"})
    listed = server.client.get("/sdapi/v1/loras").json()
    assert [(lora["name"], lora["alias"]) for lora in listed] == [("ink", "ink")]
    info = json.loads(txt2img(server).json()["info"])
    assert info["infotexts"][0].startswith("a (red:1.2) dog<lora:ink:0.8>\nNegative prompt: ")


def test_a_tag_of_a_lora_that_the_service_does_not_have_is_rejected(server):
    answer = txt2img(server, prompt="a <lora:ink:1> dog")
    assert answer.status_code == 400
    assert "LoRAs belong in model.loras" in answer.json()["error"]["message"]


def test_another_checkpoint_is_not_found(server):
    answer = txt2img(server, override_settings={"sd_model_checkpoint": "v1-5-pruned"})
    assert answer.status_code == 404


def test_routes_that_clients_call_first_describe_the_service(server):
    lists = {
        path: server.client.get(f"/sdapi/v1/{path}").json()
        for path in (
            "samplers",
            "schedulers",
            "sd-models",
            "options",
            "loras",
            "upscalers",
            "latent-upscale-modes",
            "embeddings",
            "sd-vae",
            "hypernetworks",
            "face-restorers",
            "prompt-styles",
            "scripts",
            "cmd-flags",
        )
    }
    assert "DPM++ 2M Karras" in [sampler["name"] for sampler in lists["samplers"]]
    assert {"name": "karras", "label": "Karras"}.items() <= lists["schedulers"][1].items()
    assert lists["sd-models"][0]["title"] == lists["options"]["sd_model_checkpoint"] == "tiny"
    assert lists["embeddings"] == {"loaded": {}, "skipped": {}}
    assert [each["name"] for each in lists["upscalers"]] == ["Lanczos", "Nearest"]
    assert "Latent (nearest-exact)" in [each["name"] for each in lists["latent-upscale-modes"]]
    assert lists["loras"] == []


def requests_of(serving, fields, **sections):
    """Return the engine's requests of a body, and what the response says of them."""
    engine = Recorder()
    server = serving(engine, **sections)
    answer = txt2img(server, **fields)
    assert answer.status_code == 200, answer.text
    return engine.requests, json.loads(answer.json()["info"])


HIRES = {
    "usual": ({}, (2.0, "latent", 0, 0.7)),
    "all": (
        {
            "hr_scale": 1.5,
            "hr_upscaler": "Lanczos",
            "hr_second_pass_steps": 3,
            "denoising_strength": 0.5,
        },
        (1.5, "lanczos", 3, 0.5),
    ),
    "by width": ({"hr_resize_x": 96, "hr_scale": 4}, (1.5, "latent", 0, 0.7)),
    "by both": ({"hr_resize_x": 192, "hr_resize_y": 192}, (3.0, "latent", 0, 0.7)),
}


@pytest.mark.parametrize("fields", HIRES)
def test_hires_fix_reaches_the_engine(serving, fields):
    fields, values = HIRES[fields]
    [request], info = requests_of(serving, {"enable_hr": True, **fields})
    assert (
        request.hires_scale,
        request.hires_upscaler,
        request.hires_steps,
        request.hires_strength,
    ) == values
    assert info["denoising_strength"] == values[3]


def test_second_pass_of_hires_fix_may_be_told_to_be_as_the_first(serving):
    fields = {
        "enable_hr": True,
        "hr_prompt": USUAL_BODY["prompt"],
        "hr_negative_prompt": USUAL_BODY["negative_prompt"],
        "hr_sampler_name": USUAL_BODY["sampler_name"],
        "hr_scheduler": USUAL_BODY["scheduler"],
        "hr_checkpoint_name": "tiny",
        "hr_additional_modules": ["Use same choices"],
    }
    [request], _ = requests_of(serving, fields)
    assert request.hires_scale == 2


def test_hires_fix_draws_at_its_second_size(server):
    answer = txt2img(server, enable_hr=True, hr_scale=1.5, hr_second_pass_steps=2).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == (96, 96)
    info = json.loads(answer["info"])
    assert (info["width"], info["height"]) == (96, 96)


def test_fields_of_hires_fix_have_no_effect_without_it(serving):
    fields = {
        "denoising_strength": 0,
        "hr_scale": 9,
        "hr_upscaler": "R-ESRGAN 4x+",
        "hr_resize_x": -1,
        "hr_checkpoint_name": "v1-5-pruned",
        "hr_sampler_name": "Magic",
        "firstphase_width": 65,
        "hr_prompt": "a cat",
        "hr_additional_modules": ["vae"],
    }
    [request], _ = requests_of(serving, fields, sampling={"hires_scale": 2})
    assert request.hires_scale == 1
    [request], _ = requests_of(serving, {"enable_hr": None}, sampling={"hires_scale": 2})
    assert request.hires_scale == 2  # the job's own


def test_variations_of_an_image_share_its_seed_and_count_the_variation_seeds(serving):
    fields = {"batch_size": 3, "subseed": 40, "subseed_strength": 0.25}
    requests, info = requests_of(serving, fields)
    assert [request.seed for request in requests] == info["all_seeds"] == [7, 7, 7]
    assert [request.variation_seed for request in requests] == [40, 41, 42]
    assert info["all_subseeds"] == [40, 41, 42]
    assert info["subseed_strength"] == 0.25
    fields = {"subseed": -1, "subseed_strength": 0.25}
    seeds = {requests_of(serving, fields)[0][0].variation_seed for _ in range(2)}
    assert len(seeds) == 2
