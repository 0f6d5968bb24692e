"""The noise of DPM++ SDE: torchsde's numbers, drawn for all images at once, and ahead."""

import threading

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbatch.models.brownian import Background, NoiseSampler, noise_queries
from sdbatch.models.schedulers import make_scheduler
from sdbatch.samplers import NAMES

CPU = torch.device("cpu")
SHAPE = (4, 2, 3)
SEEDS = [7, 0, 2**53 + 1]
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = [name for name in NAMES if name.startswith("dpmpp_sde")]


def own_noise(sigmas):
    return NoiseSampler(sigmas, SEEDS, SHAPE, CPU)


def torchsde_noise(sigmas):
    low, high = sigmas[sigmas > 0].min().item(), sigmas.max().item()
    return BrownianTreeNoiseSampler(torch.zeros(len(SEEDS), *SHAPE), low, high, SEEDS)


def assert_same(ours, theirs, queries):
    for query in queries:
        assert torch.equal(ours(*query), theirs(*query))


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
@pytest.mark.parametrize("sampler", SDE)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_noise_is_that_of_torchsde_bit_by_bit(sampler, steps):
    scheduler = make_scheduler(sampler, CONFIG, steps)
    queries = noise_queries(scheduler, scheduler.timesteps)
    assert len(queries) == 2 * (steps - 1)
    assert_same(own_noise(scheduler.sigmas), torchsde_noise(scheduler.sigmas), queries)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(29, 14_601)] * 2), min_size=1, max_size=4))
def test_any_queries_in_any_order_return_what_torchsde_returns(thousandths):
    sigmas = torch.tensor([14.6, 3.0, 0.03, 0.0])
    pairs = [torch.tensor(pair) / 1000 for pair in thousandths if pair[0] != pair[1]]
    assert_same(own_noise(sigmas), torchsde_noise(sigmas), pairs)


@pytest.mark.parametrize("sampler", SDE)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_calls_of_a_scheduler_are_known_before_it_steps(sampler, prediction):
    scheduler = make_scheduler(sampler, {**CONFIG, "prediction_type": prediction}, 9)
    foreseen, queries = noise_queries(scheduler, scheduler.timesteps), []
    noise = own_noise(scheduler.sigmas)
    scheduler.noise_sampler = lambda *query: queries.append(query) or noise(*query)
    latents = torch.randn(len(SEEDS), *SHAPE, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        latents = scheduler.step(torch.tanh(latents), timestep, latents).prev_sample
    assert queries == foreseen
    assert scheduler.noise_sampler is not None


def test_noise_that_is_drawn_ahead_is_the_same():
    scheduler = make_scheduler("dpmpp_sde", CONFIG, 8)
    queries, ahead = noise_queries(scheduler, scheduler.timesteps), own_noise(scheduler.sigmas)
    ahead.draw_ahead(queries, Background())
    assert_same(ahead, own_noise(scheduler.sigmas), queries)


def test_a_call_that_was_not_foreseen_is_answered_all_the_same():
    scheduler = make_scheduler("dpmpp_sde", CONFIG, 8)
    queries, ahead = noise_queries(scheduler, scheduler.timesteps), own_noise(scheduler.sigmas)
    ahead.draw_ahead(queries, Background())
    assert_same(ahead, own_noise(scheduler.sigmas), [queries[0], *queries[3:]])


def test_an_error_in_the_thread_is_raised_where_the_noise_is_needed():
    scheduler = make_scheduler("dpmpp_sde", CONFIG, 8)
    noise = own_noise(scheduler.sigmas)
    query = (torch.zeros(2), torch.zeros(2))  # no two levels
    noise.draw_ahead([query], Background())
    with pytest.raises(ValueError, match="only one element"):
        noise(*noise_queries(scheduler, scheduler.timesteps)[0])


def test_the_thread_makes_its_calls_in_order_and_ends_when_none_waits():
    background, made, go = Background(), [], threading.Event()
    futures = [background.submit(go.wait)]
    futures += [background.submit(lambda i=i: made.append(i)) for i in range(3)]
    threads = [each for each in threading.enumerate() if each.name == "sdbatch-noise"]
    assert len(threads) == 1
    go.set()
    assert [future.result() for future in futures][1:] == [None] * 3
    threads[0].join()
    assert made == [0, 1, 2]
    assert background.submit(lambda: 5).result() == 5  # in a new thread
