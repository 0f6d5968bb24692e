"""Every sampler against diffusers' own pipeline on the same weights and seeds."""

from dataclasses import replace

import diffusers
import pytest
import torch

from sdbatch.engine.cohort import Cohort, Ticket
from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Follow
from sdbatch.models.schedulers import DiffusersScheduler, Kind, SchedulerCache, make_scheduler
from sdbatch.models.sd1.family import StableDiffusion1
from sdbatch.samplers import NAMES, SAMPLERS
from tests.models.load import assert_as_diffusers, draw
from tests.sd1 import build_request


@pytest.fixture(scope="module")
def engine(model):
    """An engine of few lanes, as most of more would be padding here."""
    engine = Engine(StableDiffusion1(model), lanes=4, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def matches(engine, pipeline, model):
    """Draw a request, assert that diffusers draws the same picture; returns it."""

    def check(request):
        drawn = engine.submit(request).result()
        assert_as_diffusers(drawn, pipeline, request, model.scheduler_config)
        assert drawn.image.std() > 1  # a picture of something, not of nothing
        return drawn.image

    return check


PLAIN_FIRST = [
    pytest.param(name, marks=[] if name in SAMPLERS else pytest.mark.slow) for name in NAMES
]
UNGUIDED = [
    pytest.param(name, 1.0, marks=[] if name in SAMPLERS else pytest.mark.slow) for name in NAMES
]


@pytest.mark.parametrize(
    ("sampler", "guidance_scale"), [*((name, 7.5) for name in NAMES), *UNGUIDED]
)
def test_engine_draws_what_diffusers_draws(matches, request_for, sampler, guidance_scale):
    matches(
        request_for(
            sampler=sampler,
            guidance_scale=guidance_scale,
            negative_prompt="blurry",
            num_inference_steps=10,
        )
    )


@pytest.mark.parametrize("sampler", ["ddim", "tcd"])
def test_eta_adds_the_noise_that_diffusers_adds(matches, request_for, sampler):
    without = matches(request_for(sampler=sampler))
    assert (matches(request_for(sampler=sampler, eta=0.6)) != without).any()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_guidance_rescale_is_that_of_diffusers(matches, request_for, sampler):
    without = matches(request_for(sampler=sampler))
    assert (matches(request_for(sampler=sampler, guidance_rescale=0.7)) != without).any()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm", "tcd"])
def test_v_prediction_models_of_zero_terminal_snr_match_diffusers(
    model, pipeline, request_for, sampler
):
    config = {
        **model.scheduler_config,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    request = request_for(sampler=sampler)
    (drawn,) = draw(replace(model, scheduler_config=config), [request])
    assert_as_diffusers(drawn, pipeline, request, config)


@pytest.mark.parametrize("sampler", ["heun", "lms", "dpm2", "dpmpp_sde", "pndm", "deis"])
def test_samplers_that_ignore_zero_terminal_snr_are_rejected(model, sampler):
    config = {**model.scheduler_config, "rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match=r"zero terminal SNR. Use euler, dpmpp_2m"):
        make_scheduler(sampler, config, 10)


@pytest.mark.parametrize("sampler", PLAIN_FIRST)
def test_seeds_draw_different_images(engine, request_for, sampler):
    one, two = (engine.submit(request_for(sampler=sampler, seed=seed)) for seed in (1, 2))
    assert (one.result().image != two.result().image).any()


@pytest.mark.parametrize("size", [(64, 96), (72, 64)])
def test_sizes_that_are_not_square_match_diffusers(matches, request_for, size):
    drawn = matches(request_for(height=size[0], width=size[1]))
    assert drawn.shape == (*size, 3)


@pytest.mark.parametrize("sampler", PLAIN_FIRST)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 50])
def test_any_number_of_steps_draws_or_fails_with_a_reason(model, sampler, num_inference_steps):
    try:
        scheduler = make_scheduler(sampler, model.scheduler_config, num_inference_steps)
    except ValueError as error:
        assert "steps" in str(error)  # noqa: PT017  diffusers' own text
    else:
        assert len(scheduler.timesteps) >= num_inference_steps


def test_align_your_steps_is_published_for_ten_steps_and_interpolated_for_others(model):
    ten = make_scheduler("dpmpp_2m_ays", model.scheduler_config, 10).timesteps.tolist()
    assert ten == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    more = make_scheduler("dpmpp_2m_ays", model.scheduler_config, 19).timesteps.tolist()
    assert all(abs(a - b) <= 1 for a, b in zip(more[::2], ten, strict=True))
    assert more == sorted(set(more), reverse=True)
    with pytest.raises(ValueError, match="num_inference_steps = 999: too many"):
        make_scheduler("euler_ays", model.scheduler_config, 999)


LEAVES_NOISE = {"pndm"}  # diffusers takes its second call for a repeated one, as at the beginning


def distance_from_the_truth(schedulers, sampler, first_step):
    """Return how far a sampler ends from the latents that the denoiser always finds."""
    generator = torch.Generator().manual_seed(2)
    truth, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    request = build_request(sampler=sampler, num_inference_steps=10)
    kind = Kind(sampler, request.num_inference_steps, first_step)
    scheduler = DiffusersScheduler(schedulers, kind, [request], noise, [generator])
    latents = scheduler.noised(truth, noise, 0) if first_step else scheduler.start(noise)
    for step in range(len(scheduler.timesteps)):
        answer = scheduler.answer(scheduler.model_input(latents, step), truth, step)
        latents = scheduler.step(answer, step, latents)
    return float((latents - truth).abs().max())


@pytest.mark.parametrize("sampler", PLAIN_FIRST)
def test_a_sampler_ends_where_the_denoiser_leads_from_any_step_on(model, sampler):
    schedulers = SchedulerCache(model.scheduler_config, torch.device("cpu"))
    # not 0: ddim, tcd and deis end at the last noise level of the training
    whole = distance_from_the_truth(schedulers, sampler, 0)
    assert whole < 0.1
    from_pictures = max(distance_from_the_truth(schedulers, sampler, first) for first in (5, 8))
    assert (from_pictures < whole + 0.02) == (sampler not in LEAVES_NOISE)


@pytest.mark.parametrize("sampler", [name for name in NAMES if name.endswith("_beta")])
def test_schedules_with_equal_timesteps_after_rounding_are_stepped_to_the_end(model, sampler):
    scheduler = make_scheduler(sampler, model.scheduler_config, 60)
    latents = torch.zeros(1, 4, 2, 2)
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(torch.zeros_like(latents), timestep, latents).prev_sample
    assert torch.isfinite(latents).all()


def test_sampling_keys_in_a_models_configuration_do_not_change_what_a_samplers_name_means(model):
    preferred = {"use_karras_sigmas": True, "solver_order": 3, "thresholding": True}
    for sampler in ("euler", "dpmpp_2m", "unipc", "euler_ays", "dpmpp_2m_beta"):
        plain = make_scheduler(sampler, model.scheduler_config, 8)
        other = make_scheduler(sampler, {**model.scheduler_config, **preferred}, 8)
        assert torch.equal(plain.timesteps, other.timesteps)
        assert plain.config == other.config


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_preview_is_diffusers_own_estimate_of_the_image(model, request_for, sampler, prediction):
    config = {**model.scheduler_config, "prediction_type": prediction}
    family = StableDiffusion1(replace(model, scheduler_config=config))
    request = request_for(guidance_scale=1.0, sampler=sampler, num_inference_steps=8)
    ticket = Ticket(request, family.read(request), follow=Follow(print, print, previews=7))
    ticket.sigmas = family.sigmas(request)
    cohort = Cohort([ticket], family)
    reference = make_scheduler(sampler, config, 8)
    for step in range(7):
        cohort.model_input()
        answer = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
        timestep = reference.timesteps[step]
        reference.scale_model_input(cohort.latents, timestep)
        theirs = reference.step(answer, timestep, cohort.latents)
        cohort.advance(answer)
        [(_, ours)] = cohort.previews
        torch.testing.assert_close(ours, theirs.pred_original_sample[0], rtol=2e-4, atol=2e-4)
        assert torch.equal(cohort.latents, theirs.prev_sample)


@pytest.mark.parametrize("sampler", ["ddim", "euler_karras", "heun", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_answer_that_implies_latents_is_found_from_them(model, sampler, prediction):
    config = {**model.scheduler_config, "prediction_type": prediction}
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    request = build_request(sampler=sampler, num_inference_steps=10)
    schedulers = SchedulerCache(config, torch.device("cpu"))
    scheduler = DiffusersScheduler(schedulers, Kind(sampler, 10, 4), [request], noise, [generator])
    seen = scheduler.model_input(scheduler.noised(truth, noise, 0), 0)
    answer = scheduler.answer(seen, truth, 0)
    assert torch.allclose(scheduler.clean(seen, answer, 0), truth, atol=1e-5)
    if prediction == "epsilon":  # the noise itself
        assert torch.allclose(answer, noise, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "timesteps"),
    [
        ("ddim", [751, 501, 251, 1]),  # as Stable Diffusion 1.5's configuration spaces them
        ("ddim_trailing", [999, 749, 499, 249]),  # as Hyper-SD was distilled
        ("tcd", [999, 759, 499, 259]),  # every 20th timestep, and of these every 12th or 13th
        ("lcm", [999, 759, 499, 259]),
    ],
)
def test_few_steps_begin_where_the_model_was_distilled_to_begin(model, sampler, timesteps):
    assert make_scheduler(sampler, model.scheduler_config, 4).timesteps.tolist() == timesteps


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_the_steps_of_a_models_own_distillation_count(model, sampler):
    config = {**model.scheduler_config, "original_inference_steps": 10}
    theirs = getattr(diffusers, SAMPLERS[sampler].scheduler).from_config(config)
    theirs.set_timesteps(3)
    assert torch.equal(make_scheduler(sampler, config, 3).timesteps, theirs.timesteps)
    with pytest.raises(ValueError, match=f"num_inference_steps = 11: {sampler} takes at most 10"):
        make_scheduler(sampler, config, 11)
