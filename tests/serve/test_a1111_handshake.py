"""What AUTOMATIC1111's clients ask before and while they draw: progress, interrupt, options, ..."""

import asyncio
import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from sdbatch.engine.request import Drawn, Request
from sdbatch.serve import a1111_drawings
from sdbatch.serve.a1111_drawings import KeyDrawings
from sdbatch.serve.drawer import Drawer, DrawRequest
from sdbatch.serve.requests import ImageRequest
from sdbatch.stages.safety import SafetyPolicy
from tests.fakes import FakeEngine
from tests.serve.conftest import (
    ENCODING,
    PHOTO,
    SECONDS,
    PausedEngine,
    Server,
    base64_of,
    pixels_of,
)
from tests.wait import wait_until

ALICE, BOB = "alice-" + "0" * 16, "bob-" + "1" * 16


def drawn(value, nsfw=None):
    """Return a preview of one grey value."""
    image = np.full((64, 64, 3), value, np.uint8)
    return Drawn(image=image, prompt_tokens=1, prompt_truncated=False, lanes=2, nsfw=nsfw)


class Client:
    """A client with a key, or on the service's own machine; draws in the background."""

    def __init__(self, server, threads, key=None):
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.server = server
        self._threads = threads

    def get(self, path, **query):
        return self.server.client.get(f"/sdapi/v1/{path}", params=query, headers=self.headers)

    def post(self, path, **body):
        return self.server.client.post(f"/sdapi/v1/{path}", json=body, headers=self.headers)

    def progress(self, **query):
        return self.get("progress", **query).json()

    def begin(self, path="txt2img", **body):
        values = {"prompt": "a dog", "seed": 7, **body}
        return self._threads.submit(self.post, path, **values)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def engine():
    return PausedEngine()


@pytest.fixture
def client(serving, engine, threads):
    return Client(serving(engine), threads)


@pytest.fixture
def alice_and_bob(serving, engine, threads, monkeypatch, write):
    keys = write("keys.yaml", f"alice: {ALICE}\nbob: {BOB}\n")
    server = serving(engine, serve={"keys": keys})
    return Client(server, threads, ALICE), Client(server, threads, BOB)


@pytest.fixture(scope="module")
def server():
    """A service that draws at once."""
    server = Server(Drawer(FakeEngine, SafetyPolicy("flag")))
    yield server
    server.close()


@pytest.fixture
def reader(server):
    """A client that draws nothing."""
    return Client(server, None)


@pytest.fixture
def webui(server):
    """The webuiapi package, as it connects to a service."""
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")


def _is_grey(b64, value):
    return b64 is not None and (pixels_of(b64) == value).all()


def draw_one(engine, index):
    """Draw one of the engine's images and leave the others."""
    future, request, _ = engine.waiting[index]
    future.set_running_or_notify_cancel()
    future.set_result(engine._draw(request))


def image_seeds(answer):
    return json.loads(answer.json()["info"])["all_seeds"]


# progress


IDLE = {
    "skipped": False,
    "interrupted": False,
    "stopping_generation": False,
    "job": "",
    "job_count": 0,
    "job_timestamp": "0",
    "job_no": 0,
    "sampling_step": 0,
    "sampling_steps": 0,
}


def test_progress_of_a_client_that_draws_nothing_is_zero(client):
    assert client.progress() == {
        "progress": 0,
        "eta_relative": 0,
        "state": IDLE,
        "current_image": None,
        "textinfo": None,
    }


def test_progress_counts_the_steps_of_the_current_image_and_the_images(client, engine):
    answer = client.begin(batch_size=2)
    engine.wait_for(waiting=2)
    begun = client.progress()
    assert begun["progress"] == pytest.approx(0.01)
    assert begun["state"]["job"] == "scripts_txt2img"
    assert len(begun["state"]["job_timestamp"]) == len("20261129173000")
    counts = {name: begun["state"][name] for name in ("job_count", "job_no", "sampling_step")}
    assert counts == {"job_count": 2, "job_no": 0, "sampling_step": 0}

    engine.waiting[0][2].step(3, 4)
    wait_until(lambda: client.progress()["state"]["sampling_step"] == 3)
    state = client.progress()
    assert state["state"]["sampling_steps"] == 4
    assert state["progress"] == pytest.approx(0.01 + 3 / 8)
    assert state["eta_relative"] > 0

    draw_one(engine, 0)
    wait_until(lambda: client.progress()["state"]["job_no"] == 1)
    assert client.progress()["state"]["sampling_step"] == 0
    draw_one(engine, 1)
    assert answer.result(SECONDS).status_code == 200
    assert client.progress()["state"] == IDLE


def test_progress_adds_up_over_the_requests_of_a_key(client, engine):
    answers = [client.begin(), client.begin(batch_size=2)]
    engine.wait_for(waiting=3)
    assert client.progress()["state"]["job_count"] == 3
    engine.draw_all()
    assert [answer.result(SECONDS).status_code for answer in answers] == [200, 200]


def test_current_image_is_the_last_preview_of_the_current_image(client, engine):
    client.progress()
    answer = client.begin(batch_size=2)
    engine.wait_for(waiting=2)
    follows = [follow for _, _, follow in engine.waiting]
    follows[0].step(1, 4)
    wait_until(lambda: client.progress()["state"]["sampling_step"] == 1)
    follows[1].step(2, 4)
    wait_until(lambda: client.progress()["state"]["sampling_step"] == 2)
    follows[0].preview(drawn(10))
    assert client.progress()["current_image"] is None  # the second image is further
    for value in (30, 20):
        follows[1].preview(drawn(value))
    wait_until(lambda: _is_grey(client.progress()["current_image"], 20))
    shown = client.progress()["current_image"]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).format == "PNG"
    assert client.progress(skip_current_image=True)["current_image"] is None
    engine.draw_all()
    answer.result(SECONDS)
    assert client.progress()["current_image"] is None


def previews_of(client, engine, **body):
    answer = client.begin(**body)
    engine.wait_for(waiting=1)
    [(_, _, follow)] = engine.waiting
    engine.draw_all()
    assert answer.result(SECONDS).status_code == 200
    return follow.previews


def test_previews_are_drawn_for_clients_that_poll_alone(client, engine, monkeypatch):
    assert previews_of(client, engine) == 0
    client.progress(skip_current_image=True)
    assert previews_of(client, engine) == 0
    client.progress()
    assert previews_of(client, engine) == 1
    assert previews_of(client, engine, steps=25) == 2
    monkeypatch.setattr(a1111_drawings, "POLL_SECONDS", 0.0)
    assert previews_of(client, engine) == 0


def test_images_of_other_apis_are_not_counted(client, engine, threads):
    answer = threads.submit(client.server.post, prompt="a dog")
    engine.wait_for(waiting=1)
    assert client.progress()["state"] == IDLE
    assert client.post("interrupt").json() == {}
    engine.draw_all()
    assert answer.result(SECONDS).status_code == 200


def test_query_of_progress_must_be_a_switch(client):
    answer = client.get("progress", skip_current_image="perhaps")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


# interrupt and skip


def test_interrupted_request_returns_what_is_drawn_and_releases_the_lanes(client, engine):
    client.progress()
    answer = client.begin(batch_size=3)
    engine.wait_for(waiting=3)
    draw_one(engine, 0)
    engine.waiting[1][2].step(2, 4)
    engine.waiting[1][2].preview(drawn(99))
    wait_until(lambda: client.progress()["current_image"])
    assert client.post("interrupt").json() == {}
    answer = answer.result(SECONDS)
    assert answer.status_code == 200
    first, second = answer.json()["images"]
    assert not (pixels_of(first) == 99).all()
    assert (pixels_of(second) == 99).all()
    info = json.loads(answer.json()["info"])
    assert (info["all_seeds"], info["finished"]) == ([7, 8], [True, False])
    assert info["exact"] == [True, False]
    assert len(info["infotexts"]) == len(info["all_prompts"]) == 2
    engine.wait_for(waiting=3, cancelled=2)
    client.server.wait_for_pending(0)
    assert client.progress()["state"] == {**IDLE, "interrupted": True}


def test_preview_that_the_safety_policy_hides_stays_hidden(serving, engine, threads):
    client = Client(serving(engine, policy="drop"), threads)
    client.progress()
    answer = client.begin()
    engine.wait_for(waiting=1)
    engine.waiting[0][2].preview(drawn(99, nsfw=True))
    wait_until(lambda: _is_grey(client.progress()["current_image"], 0))
    client.post("interrupt")
    [image] = answer.result(SECONDS).json()["images"]
    assert _is_grey(image, 0)


def test_interrupt_ends_all_requests_of_a_key_also_those_that_wait(client, engine):
    answers = [client.begin(), client.begin(batch_size=2)]
    engine.wait_for(waiting=3)
    client.post("interrupt")
    for answer in answers:
        error = answer.result(SECONDS)
        assert error.status_code == 409
        assert error.json()["error"]["code"] == "interrupted"
        assert "interrupted before it had an image" in error.json()["error"]["message"]
    engine.wait_for(waiting=3, cancelled=3)
    client.server.wait_for_pending(0)


def test_interrupt_of_a_client_that_draws_nothing_ends_nothing_later(client, engine):
    assert client.post("interrupt").json() == {}
    assert client.post("skip").json() == {}
    answer = client.begin()
    engine.wait_for(waiting=1)
    assert client.progress()["state"]["interrupted"] is False
    engine.draw_all()
    assert answer.result(SECONDS).status_code == 200


def test_skip_ends_the_current_image_alone(client, engine):
    answer = client.begin(batch_size=3)
    engine.wait_for(waiting=3)
    engine.waiting[1][2].step(3, 4)
    wait_until(lambda: client.progress()["state"]["sampling_step"] == 3)
    assert client.post("skip").json() == {}
    engine.wait_for(waiting=3, cancelled=1)
    assert client.progress()["state"]["skipped"] is True
    assert client.progress()["state"]["job_no"] == 1
    engine.draw_all()
    answer = answer.result(SECONDS)
    assert (answer.status_code, image_seeds(answer)) == (200, [7, 9])


def test_each_skip_ends_one_image(client, engine):
    answer = client.begin(batch_size=3)
    engine.wait_for(waiting=3)
    client.post("skip")
    client.post("skip")
    engine.wait_for(waiting=3, cancelled=2)
    engine.draw_all()
    assert image_seeds(answer.result(SECONDS)) == [9]


@pytest.mark.parametrize("turns", [0, 1])
def test_interrupt_ends_images_that_have_not_begun(turns):
    draw_request = DrawRequest(Request(prompt="a dog"), ENCODING)

    async def draw(*_):
        raise AssertionError("it was interrupted before")

    async def interrupted():
        drawings = KeyDrawings()
        with drawings.running("", ImageRequest((draw_request, draw_request))) as drawing:
            drawn = asyncio.ensure_future(drawing.run(draw))
            for _ in range(turns):
                await asyncio.sleep(0)
            drawings.interrupt()
            return await drawn

    assert asyncio.run(interrupted()) == []


def test_variations_that_were_skipped_leave_the_others_their_seeds(client, engine):
    answer = client.begin(batch_size=2, subseed=40, subseed_strength=0.5)
    engine.wait_for(waiting=2)
    client.post("skip")
    engine.wait_for(waiting=2, cancelled=1)
    engine.draw_all()
    info = json.loads(answer.result(SECONDS).json()["info"])
    assert (info["subseed"], info["all_subseeds"], info["all_seeds"]) == (41, [41], [7])


def test_interrupt_reaches_img2img(client, engine):
    answer = client.begin("img2img", init_images=[base64_of(PHOTO)])
    engine.wait_for(waiting=1)
    assert client.progress()["state"]["job"] == "scripts_img2img"
    client.post("interrupt")
    assert answer.result(SECONDS).status_code == 409


def test_image_that_cannot_be_drawn_ends_the_others_of_its_request(client, engine):
    answer = client.begin(batch_size=2)
    engine.wait_for(waiting=2)
    engine.waiting[0][0].set_exception(ValueError("this prompt cannot be drawn"))
    answer = answer.result(SECONDS)
    assert answer.status_code == 400
    assert "this prompt cannot be drawn" in answer.json()["error"]["message"]
    engine.wait_for(waiting=2, cancelled=1)
    assert client.progress()["state"] == IDLE


def test_images_of_a_client_that_disconnects_are_not_drawn_any_further(client, engine):
    with pytest.raises(httpx.ReadTimeout):
        client.server.client.post("/sdapi/v1/txt2img", json={"batch_size": 2}, timeout=0.5)
    engine.wait_for(waiting=2, cancelled=2)
    wait_until(lambda: client.progress()["state"] == IDLE)


def test_time_limit_holds_for_all_images(serving, engine, threads):
    client = Client(serving(engine, serve={"timeout_s": 0.5}), threads)
    answer = client.begin(batch_size=2).result(SECONDS)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    engine.wait_for(waiting=2, cancelled=2)


def test_one_key_neither_sees_nor_ends_the_images_of_another(alice_and_bob, engine):
    alice, bob = alice_and_bob
    bob.progress()
    answer = alice.begin(batch_size=2)
    engine.wait_for(waiting=2)
    assert engine.waiting[0][2].previews == 0  # another key polls
    assert bob.progress()["state"] == IDLE
    assert bob.post("interrupt").json() == bob.post("skip").json() == {}
    assert alice.progress()["state"]["interrupted"] is False
    assert alice.progress()["state"]["job_count"] == 2
    assert engine.cancelled == 0
    engine.draw_all()
    assert image_seeds(answer.result(SECONDS)) == [7, 8]


def test_routes_of_the_handshake_need_a_key(alice_and_bob):
    alice, _ = alice_and_bob
    alice.headers = {}
    for method, path in (
        (alice.get, "progress"),
        (alice.get, "memory"),
        (alice.post, "interrupt"),
        (alice.post, "skip"),
        (alice.post, "options"),
        (alice.post, "png-info"),
    ):
        assert method(path).status_code == 401


# options


def test_options_name_the_served_model_and_what_the_service_does(reader):
    options = reader.get("options").json()
    assert options["sd_model_checkpoint"] == "tiny"
    assert (options["samples_format"], options["CLIP_stop_at_last_layers"]) == ("png", 1)
    assert (options["live_previews_enable"], options["samples_save"]) == (True, False)
    assert "forge_preset" not in options  # by which clients know Forge


def test_options_that_change_nothing_are_accepted(reader):
    options = reader.get("options").json()
    assert reader.post("options", **options).json() == {}  # as Open WebUI sends them back
    assert reader.post("options", sd_model_checkpoint="tiny").json() == {}
    assert reader.post("options", sd_model_checkpoint=None, samples_format=None).json() == {}
    assert reader.post("options").json() == {}
    assert reader.get("options").json() == options


def test_another_model_is_not_found(reader):
    answer = reader.post("options", sd_model_checkpoint="v1-5-pruned")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "only tiny is served here" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            {"samples_format": "jpg"},
            "samples_format = 'jpg': must be 'png', as options are those of all clients. Send it "
            "in override_settings of each request.",
        ),
        ({"samples_save": True}, "samples_save = True: must be False"),
        ({"ESRGAN_tile": 192}, "ESRGAN_tile: unknown parameter. It would have no effect."),
        ({"sd_vae": {"a": [1]}}, "sd_vae = {'a': [1]}: must be 'Automatic'"),
        ({"x" * 1000 + "\n": 1}, "x" * 100 + ": unknown parameter"),
    ],
)
def test_an_option_that_would_change_something_is_refused(reader, option, words):
    answer = reader.post("options", **option)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


def test_all_options_that_would_change_something_are_named_at_once(reader):
    answer = reader.post(
        "options", sd_vae="x.pt", samples_format="png", sd_model_checkpoint="other", ESRGAN_tile=1
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("The request has 3 faults. sd_vae = 'x.pt': must be")
    assert (error["param"], error["code"]) == ("sd_vae", "invalid_value")
    named = [(each["param"], each["code"]) for each in error["details"]]
    assert named == [
        ("sd_vae", "invalid_value"),
        ("sd_model_checkpoint", "model_not_found"),
        ("ESRGAN_tile", "unknown_parameter"),
    ]
    assert all(each["message"] in error["message"] for each in error["details"])


def test_options_must_be_an_object_in_json(reader):
    for content, kind, status in (
        (b"[1]", "application/json", 400),
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
    ):
        answer = reader.server.client.post(
            "/sdapi/v1/options", content=content, headers={"Content-Type": kind}
        )
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_model_can_be_reloaded_and_lists_refreshed_but_it_is_not_unloaded(reader):
    for path in ("reload-checkpoint", "refresh-checkpoints", "refresh-vae", "refresh-loras"):
        assert reader.post(path).json() == {}
    answer = reader.post("unload-checkpoint")
    assert answer.status_code == 403
    assert "The model stays loaded" in answer.json()["error"]["message"]


def test_memory_is_that_of_the_machine_that_answers(reader):
    memory = reader.get("memory").json()
    assert 0 < memory["ram"]["free"] + memory["ram"]["used"] == memory["ram"]["total"]
    assert "other processes" in memory["cuda"]["error"]


# what clients do


def test_webuiapi_connects_and_lists_what_it_draws_with(webui):
    assert (webui.has_controlnet, webui.has_adetailer) == (False, False)
    assert webui.util_get_model_names() == ["tiny"]
    assert webui.util_get_current_model() == "tiny"
    assert "Euler a" in webui.util_get_sampler_names()
    assert "karras" in webui.util_get_scheduler_names()
    assert webui.get_cmd_flags() == {"api": True}
    for get in (
        webui.get_sd_vae,
        webui.get_hypernetworks,
        webui.get_face_restorers,
        webui.get_realesrgan_models,
        webui.get_prompt_styles,
        webui.get_loras,
    ):
        assert get() == []
    assert webui.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert webui.get_upscalers()[0]["name"] == "Lanczos"
    assert webui.get_latent_upscale_modes()[0]["name"] == "Latent"
    assert webui.get_memory()["ram"]["total"] > 0
    assert webui.refresh_checkpoints() == {}


def test_webuiapi_chooses_the_model_and_waits_until_nothing_is_drawn(webui, capsys):
    webui.util_set_model("Tiny")
    assert "model changed to tiny" in capsys.readouterr().out
    assert webui.set_options({"sd_model_checkpoint": "tiny"}) == {}
    webui.util_wait_for_ready()
    assert webui.get_progress()["state"] == IDLE


def test_webuiapi_interrupts_skips_and_reads_parameters(webui, server):
    assert webui.interrupt() == webui.skip() == {}
    answer = server.post("/sdapi/v1/txt2img", prompt="a dog", seed=7).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    result = webui.png_info(image)
    assert result.info.startswith("a dog\nSteps: 4")
    assert result.parameters["Seed"] == "7"


def test_webuiapi_with_a_key_sends_it_as_its_password(alice_and_bob):
    alice, _ = alice_and_bob
    webui = webuiapi.WebUIApi(
        baseurl=f"{alice.server.url}/sdapi/v1", username="anyone", password=ALICE
    )
    assert webui.util_get_current_model() == "tiny"


# Source: SillyTavern's src/endpoints/stable-diffusion.js, Open WebUI 0.12.4's routers/images.py,
# AI Render's sd_backends/automatic1111_api.py, aiyabot's core/settings.py, Auto-Photoshop's
# sdapi_py_re.js; what Gradio and Forge have besides AUTOMATIC1111's API.
GETS = {
    "SillyTavern": "options upscalers latent-upscale-modes sd-vae sd-modules samplers schedulers "
    "sd-models progress",
    "Open WebUI": "options sd-models",
    "AI Render": "upscalers",
    "aiyabot": "cmd-flags samplers sd-models prompt-styles face-restorers embeddings hypernetworks "
    "loras upscalers latent-upscale-modes",
    "Auto-Photoshop": "options sd-models samplers progress?skip_current_image=false",
    "browsers of the API": "script-info scripts extensions realesrgan-models memory",
}


@pytest.mark.parametrize("program", GETS)
def test_routes_that_a_client_reads_before_it_draws_are_there(server, program):
    for path in GETS[program].split():
        answer = server.client.get(f"/sdapi/v1/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-type"] == "application/json"
    for path in ("/internal/ping", "/app_id", "/user", "/login_check"):
        assert server.client.get(path).status_code == 200


def test_sillytavern_aborts_its_request_and_interrupts(alice_and_bob, engine):
    alice, _ = alice_and_bob
    answer = alice.begin()
    engine.wait_for(waiting=1)
    basic = base64.b64encode(f"anyone:{ALICE}".encode()).decode()
    interrupted = alice.server.client.post(
        "/sdapi/v1/interrupt", headers={"Authorization": f"Basic {basic}"}
    )
    assert (interrupted.status_code, interrupted.json()) == (200, {})
    assert answer.result(SECONDS).status_code == 409
    engine.wait_for(waiting=1, cancelled=1)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "interrupt", "POST"),
        ("POST", "progress", "GET"),
        ("PUT", "options", "GET, POST"),
        ("HEAD", "skip", "POST"),
    ],
)
def test_wrong_method_is_refused_as_everywhere(server, method, path, allowed):
    answer = server.client.request(method, f"/sdapi/v1/{path}")
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert answer.json()["error"]["code"] == "method_not_allowed"
