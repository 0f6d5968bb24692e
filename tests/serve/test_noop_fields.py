"""Fields that change nothing are accepted, and draw the same image; null means left out."""

import base64
import json

import numpy as np
import openai
import pytest

from sdbatch import samplers
from sdbatch.serve import a1111_bodies, a1111_requests
from sdbatch.serve.requests import Generation
from tests.serve.conftest import LEFT, PHOTO, Recorder, base64_of, file_of, pixels_of
from tests.serve.test_a1111 import USUAL_BODY

PICTURE = file_of(PHOTO)
ALIASES = {"aliases": ["gpt-image-1", "dall-e-3"]}


@pytest.fixture
def aliased(serving, recorder):
    return serving(recorder, serve=ALIASES)


OPENAI = {
    "quality": ["auto", "standard", "medium"],
    "style": ["vivid"],
    "background": ["auto", "opaque"],
    "moderation": ["auto"],
    "input_fidelity": ["low"],
    "safety_identifier": ["somebody", ""],
    "output_compression": [100],
    "partial_images": [0],
    "stream": [False],
}


@pytest.mark.parametrize("name", OPENAI)
def test_values_of_openais_fields_that_change_nothing_are_accepted(recording, name):
    plain = recording.post(prompt="a dog", seed=5).json()["data"]
    for value in OPENAI[name]:
        answer = recording.post(prompt="a dog", seed=5, **{name: value})
        assert answer.json()["data"] == plain, answer.text
        text = value if isinstance(value, str) else json.dumps(value)
        form = {"prompt": "a dog", name: text}
        edit = recording.client.post("/v1/images/edits", data=form, files={"image": PICTURE})
        assert edit.status_code == 200, edit.text


def test_every_optional_field_of_openais_api_may_be_null(recording, recorder):
    fields = dict.fromkeys(Generation.model_fields, None)
    answer = recording.post(**{**fields, "prompt": "a dog", "stream": None, "partial_images": None})
    assert answer.status_code == 200, answer.text
    job = recording.post("/v1/images/jobs", **{**fields, "prompt": "a dog"})
    assert job.status_code == 202, job.text
    recording.wait_for_pending(0)
    assert [request.height for request in recorder.requests] == [64, 64]  # the job's


def test_null_prompt_is_rejected(recording):
    assert "prompt = None: must be text" in recording.post(prompt=None).text


def test_every_optional_field_of_a1111s_api_may_be_null(recording, recorder):
    for kind, path, needed in (
        (a1111_bodies.Txt2Img, "txt2img", {}),
        (a1111_bodies.Img2Img, "img2img", {"init_images": [base64_of(PHOTO)]}),
    ):
        fields = {**dict.fromkeys(kind.model_fields, None), **needed}
        answer = recording.post(f"/sdapi/v1/{path}", **fields)
        assert answer.status_code == 200, answer.text
    assert [request.num_inference_steps for request in recorder.requests] == [4, 4]  # the job's


A1111 = {
    "text": {"steps": "4", "cfg_scale": "5.0", "width": "64", "seed": "7", "batch_size": "1"},
    "floats": {"steps": 4.0, "width": 64.0, "height": 64.0, "seed": 7.0, "subseed": -1.0},
    "settings": {"override_settings": None},
    "setting": {"override_settings": {"sd_vae": "Automatic", "eta_noise_seed_delta": "0"}},
    "checkpoint": {"override_settings": {"sd_model_checkpoint": ""}},
    "styles": {"styles": ["", ""]},
    "script": {"script_name": "None", "script_args": ["", 3]},
    "off": {
        "alwayson_scripts": {
            "ADetailer": {"args": [False]},
            "ControlNet": {"args": [{"enabled": False, "model": "canny"}]},
            "animatediff": {},
        }
    },
    "saving": {"save_images": True, "do_not_save_samples": True, "do_not_save_grid": True},
    "comments": {"comments": {"a": 1}},
    "noise": {"s_churn": 0.0, "s_noise": "1", "s_tmin": 0.4, "s_tmax": 999, "s_min_uncond": 0},
    "refiner": {"refiner_checkpoint": "None", "refiner_switch_at": 0.8},
    "networks": {"disable_extra_networks": False},
    "task": {"force_task_id": "task(1)", "infotext": "", "firstpass_image": None},
    "next": {"clip_skip": 1, "override_settings": {"CLIP_stop_at_last_layers": 1}},
    "client": {"url": "http://127.0.0.1:7860", "auth": "user:password"},
    "hires": {"hr_additional_modules": [], "hr_upscaler": "4x-UltraSharp", "hr_scale": "1.5"},
}


@pytest.mark.parametrize("fields", A1111)
def test_values_of_a1111s_fields_that_change_nothing_are_accepted(recording, fields):
    plain = recording.post("/sdapi/v1/txt2img", **USUAL_BODY).json()["images"]
    answer = recording.post("/sdapi/v1/txt2img", **{**USUAL_BODY, **A1111[fields]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["images"] == plain


def test_password_of_the_client_is_not_sent_back(recording):
    answer = recording.post("/sdapi/v1/txt2img", **USUAL_BODY, **A1111["client"])
    assert "password" not in answer.text


@pytest.mark.parametrize("seed", [None, -1.0, "-1"])
def test_seed_minus_one_is_random_however_it_is_written(recording, recorder, seed):
    for _ in range(2):
        body = {**USUAL_BODY, "seed": seed}
        assert recording.post("/sdapi/v1/txt2img", **body).status_code == 200
    assert recorder.requests[0].seed != recorder.requests[1].seed


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M Karras", "UniPC", "PLMS", "LCM"])
def test_eta_changes_nothing_where_the_sampler_has_none(serving, sampler):
    recorder = Recorder()
    server = serving(recorder, sampling={"sampler": "ddim", "eta": 0.5})
    for eta in (0, 1.0, None):
        body = {**USUAL_BODY, "sampler_name": sampler, "eta": eta}
        answer = server.post("/sdapi/v1/txt2img", **body)
        assert answer.status_code == 200, answer.text
    assert {request.eta for request in recorder.requests} == {0}


def test_eta_is_that_of_the_request_where_the_sampler_has_one(recording, recorder):
    for eta in (0, 1.0):
        body = {**USUAL_BODY, "sampler_name": "DDIM", "eta": eta}
        assert recording.post("/sdapi/v1/txt2img", **body).status_code == 200
    assert [request.eta for request in recorder.requests] == [0, 1]


def test_noisy_samplers_are_ours():
    assert {*a1111_requests.NOISY_SAMPLERS} == {
        name for name in samplers.SAMPLERS if name.endswith(("_a", "_sde"))
    }


def test_model_has_other_names_if_the_job_says_so(aliased, recorder):
    with openai.OpenAI(base_url=f"{aliased.url}/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == ["tiny", "gpt-image-1", "dall-e-3"]
        assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
        for name in names:
            client.images.generate(model=name, prompt="a dog")
            client.images.edit(model=name, image=PICTURE, prompt="a dog")
        with pytest.raises(openai.NotFoundError, match="only tiny, gpt-image-1 and dall-e-3 are"):
            client.images.generate(model="gpt-image-2", prompt="a dog")
    settings = {"sd_model_checkpoint": "dall-e-3"}
    answer = aliased.post("/sdapi/v1/txt2img", override_settings=settings)
    assert answer.status_code == 200
    assert aliased.post(prompt="a dog", model="gpt-image-1").json()["model"] == "tiny"
    titles = [each["title"] for each in aliased.client.get("/sdapi/v1/sd-models").json()]
    assert titles == names
    assert len(recorder.requests) == 8


def test_model_named_as_dall_e_answers_by_url_unless_told_otherwise(aliased):
    url = aliased.post(prompt="a dog", seed=3, model="dall-e-3").json()["data"][0]["url"]
    body = {"prompt": "a dog", "seed": 3, "response_format": "b64_json", "model": "dall-e-3"}
    inline = aliased.post(**body).json()["data"][0]["b64_json"]
    assert aliased.client.get(url).content == base64.b64decode(inline)
    assert aliased.post(prompt="a dog", model="gpt-image-1").json()["data"][0]["b64_json"]


MANY_FAULTS = {
    "generation": (
        "/v1/images/generations",
        {
            "prompt": 3,
            "model": "other",
            "n": 11,
            "size": "65x64",
            "guidance": 2,
            "quality": "hd",
            "num_inference_steps": 500,
            "guidance_start": 0.9,
            "guidance_stop": 0.1,
            "output_compression": 5,
        },
        {
            "prompt",
            "model",
            "n",
            "size",
            "guidance",
            "quality",
            "num_inference_steps",
            "guidance_start",
            "output_compression",
        },
    ),
    "missing prompt": ("/v1/images/jobs", {"model": "other", "n": 11}, {"prompt", "model", "n"}),
    "stream": (
        "/v1/images/generations",
        {"prompt": "a", "stream": True, "n": 2, "response_format": "url", "seed": -1},
        {"seed", "n", "response_format"},
    ),
    "what depends on a fault": (
        "/v1/images/generations",
        {"prompt": "a", "sampler": "magic", "eta": 0.5, "width": "wide", "height": 4096},
        {"sampler", "width"},
    ),
    "job file": ("/v1/images/job_file", {"prompt": "a", "n": 0, "user": 3}, {"n", "user"}),
    "txt2img": (
        "/sdapi/v1/txt2img",
        {
            "sampler_name": "magic",
            "scheduler": "magic",
            "override_settings": {"sd_model_checkpoint": "other", "sd_vae": "x"},
            "n_iter": 11,
            "steps": "many",
            "restore_faces": True,
            "alwayson_scripts": {"ADetailer": {"args": [True]}},
            "unknown": 1,
        },
        {
            "sampler_name",
            "scheduler",
            "override_settings.sd_vae",
            "n",
            "steps",
            "restore_faces",
            "alwayson_scripts",
            "unknown",
        },
    ),
    "hires fix": (
        "/sdapi/v1/txt2img",
        {
            "enable_hr": True,
            "hr_upscaler": "4x-UltraSharp",
            "hr_prompt": "a cat",
            "firstphase_width": 64,
            "denoising_strength": 0,
            "override_settings": {"sd_model_checkpoint": "other"},
        },
        {"hr_upscaler", "hr_prompt", "firstphase_width", "denoising_strength", "override_settings"},
    ),
    "img2img": (
        "/sdapi/v1/img2img",
        {"mask": "eHh4", "inpainting_fill": 7, "mask_blur": 999, "denoising_strength": 2},
        {"init_images", "inpainting_fill", "mask_blur", "denoising_strength"},
    ),
    "pictures": (
        "/sdapi/v1/img2img",
        {"init_images": ["https://example.com/a.png"], "mask": "?"},
        {"init_images", "mask"},
    ),
}


@pytest.mark.parametrize("case", MANY_FAULTS)
def test_one_answer_names_every_field_that_cannot_be_honoured(recording, case):
    path, body, params = MANY_FAULTS[case]
    answer = recording.post(path, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert {detail["param"] for detail in error["details"]} == params
    assert len(error["details"]) == len(params)
    assert error["message"].startswith(f"The request has {len(params)} faults. ")
    assert all(detail["message"] in error["message"] for detail in error["details"])
    first = error["details"][0]
    assert (error["param"], error["code"]) == (first["param"], first["code"])


@pytest.mark.parametrize("path", ["edits", "variations", "jobs"])
def test_one_answer_names_every_fault_of_a_form(recording, path):
    fields = {"prompt": "a", "n": ["1", "2"], "quality": "hd", "model": "other", "size": "65x64"}
    files = [("picture", PICTURE), ("image", PICTURE), ("image", PICTURE)]
    answer = recording.client.post(f"/v1/images/{path}", data=fields, files=files)
    assert answer.status_code == 400
    details = answer.json()["error"]["details"]
    params = {"n", "quality", "model", "size", "picture", "image"}
    assert {detail["param"] for detail in details} == params
    assert len(details) == len(params)


def test_one_fault_has_one_detail_and_no_count(recording):
    error = recording.post(prompt="a dog", n=11).json()["error"]
    assert error["message"] == "n = 11: must be 10 at most."
    assert error["details"] == [
        {"message": error["message"], "param": "n", "code": "invalid_value"}
    ]


def test_other_errors_have_no_details(recording):
    error = recording.post(prompt="a dog", model="other").json()["error"]
    assert (error["code"], "details" in error) == ("model_not_found", False)


def test_pictures_of_an_edit_are_both_named(recording):
    files = {"image": b"<html>", "mask": b"<html>"}
    answer = recording.client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
    assert [detail["param"] for detail in answer.json()["error"]["details"]] == ["mask", "image"]


def test_picture_that_cannot_be_read_does_not_hide_other_faults(recording):
    form = {"prompt": "a dog", "quality": "hd"}
    answer = recording.client.post("/v1/images/edits", data=form, files={"image": b"<html>"})
    assert {each["param"] for each in answer.json()["error"]["details"]} == {"image", "quality"}


def test_mask_of_another_format_is_still_used(recording):
    mask = base64_of(np.dstack([np.full((64, 64, 3), 255, np.uint8), LEFT]))
    body = {"init_images": [base64_of(PHOTO)], "mask": mask, "inpaint_full_res": "0"}
    answer = recording.post("/sdapi/v1/img2img", **body)
    assert np.array_equal(pixels_of(answer.json()["images"][0])[:, 32:], PHOTO[:, 32:])


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_an_answer_names_a_limited_number_of_faults(recording, path):
    some = recording.post(path, prompt="a", **{f"field{i}": 1 for i in range(10)})
    assert len(some.json()["error"]["details"]) == 10
    for fields in (100, 10_000):  # these within the limit of all fields, and beyond it
        many = recording.post(path, prompt="a", **{str(i): 1 for i in range(fields)})
        assert many.status_code == 400
        assert len(many.content) < 1000
        assert "50 faults" in many.text or "10001 fields: must be 200 at most" in many.text


def test_long_lists_are_one_fault(recording):
    answer = recording.post("/sdapi/v1/txt2img", prompt="a", styles=["x"] * 10_000)
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert answer.json()["error"]["param"] == "styles"


def test_a_number_of_images_beyond_the_limit_is_one_fault(recording):
    answer = recording.post("/sdapi/v1/txt2img", prompt="a", batch_size=100, n_iter=100)
    assert [each["param"] for each in answer.json()["error"]["details"]] == ["n"]


def test_sides_of_any_size_are_rejected(recording):
    sides = {"enable_hr": True, "hr_resize_x": 10**400, "hr_resize_y": 10**400}
    answer = recording.post("/sdapi/v1/txt2img", prompt="a", **sides)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "hr_resize_x"


def test_clip_skip_and_eta_of_the_job_hold_unless_the_request_has_its_own(serving, recorder):
    server = serving(recorder, sampling={"clip_skip": 1, "eta": 0.5, "sampler": "ddim"})
    for settings, values in (
        ({}, (1, 0.5)),
        ({"CLIP_stop_at_last_layers": 1, "eta_ddim": 0}, (0, 0.0)),
        ({"CLIP_stop_at_last_layers": 3, "eta_ddim": 1}, (2, 1.0)),
    ):
        answer = server.post("/sdapi/v1/txt2img", prompt="a", override_settings=settings)
        assert answer.status_code == 200, answer.text
        drawn = recorder.requests[-1]
        assert (drawn.clip_skip, drawn.eta) == values
