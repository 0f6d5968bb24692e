"""Promise 1, by property: pixels depend on the row alone, whatever is drawn with it and when."""

import threading
from functools import lru_cache, partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdbatch.engine.engine import Engine
from sdbatch.engine.request import Request
from sdbatch.models.build import Build
from tests.engine.faulty_family import FaultyFamily


@lru_cache(None)
def pictures(seed, height, masked):
    """Return the inputs of a request: always the same objects, as arrays have no equality."""
    chance = np.random.default_rng(seed)
    inputs = {"image": chance.integers(0, 256, (height, 16, 3), np.uint8)}
    if masked:
        inputs["mask"] = chance.choice(np.array([0, 255], np.uint8), (height, 16))
    return inputs


def with_pictures(kind, request, seed, mode):
    """Return a request in one of the modes: text, hires, image, mask."""
    if mode == "hires":
        return request.model_copy(update={"hires_scale": 1.5})
    if mode in ("image", "mask") and kind.draws_from_pictures:
        inputs = pictures(seed, request.height, mode == "mask")
        return request.model_copy(update={"inputs": inputs})
    return request


def requests_of(kind):
    """Return a strategy for the requests of a family, in all modes.

    Small on purpose: 2 latents a side cost no less Python than 64, and much less arithmetic.
    """
    modes = st.sampled_from(["text", "text", "hires", "image", "mask"])
    plain = st.builds(
        Request,
        prompt=st.sampled_from(
            ["", "a dog", "a (red:1.3) dog", "a cat and a dog " * 6, "[a:b:0.5]", "a [b|c|d]"]
        ),
        negative_prompt=st.sampled_from(["", "blurry"]),
        seed=st.integers(0, 50),
        sampler=st.sampled_from(kind.samplers),
        num_inference_steps=st.integers(1, 7),
        guidance_scale=st.sampled_from([1.0, 3.0, 7.5]),
        guidance_rescale=st.sampled_from([0.0, 0.0, 0.7]),
        guidance_start=st.sampled_from([0.0, 0.0, 0.3]),
        guidance_stop=st.sampled_from([1.0, 1.0, 0.6]),
        guidance_sigma_low=st.sampled_from([0.0, 0.0, 0.4]),
        guidance_sigma_high=st.sampled_from([1000.0, 1000.0, 3.0]),
        height=st.sampled_from([16, 16, 24]),
        width=st.just(16),
        variation_strength=st.sampled_from([0.0, 0.0, 0.4]),
        variation_seed=st.integers(0, 3),
        seed_b=st.sampled_from([-1, 5]),
        mix=st.sampled_from([0.0, 0.0, 0.3]),
        hires_upscaler=st.sampled_from(["latent", "latent_bicubic", "lanczos"]),
        hires_steps=st.integers(0, 3),
        **{name: st.sampled_from(values) for name, values in kind.keys.items()},
    )
    return st.builds(partial(with_pictures, kind), plain, st.integers(0, 3), modes)


LANES = (2, 3, 5, 8)


class Engines:
    """An engine for every number of lanes, and what each draws of a request alone."""

    def __init__(self, kind, dtype, channels_last):
        family = FaultyFamily(kind.load(Build("cpu", dtype, channels_last)))
        family.on_denoise = self.count
        self.kind, self.dtype = kind, dtype
        self.by_lanes = {lanes: Engine(family, lanes=lanes, threads=1) for lanes in LANES}
        self._alone = {}
        self._ticks, self._changed = 0, threading.Condition()

    def alone(self, lanes, request):
        """Return what a request is alone, drawn once; its pictures are known by their identity."""
        key = lanes, request.model_dump_json(exclude={"inputs"}), id(request.inputs)
        if key not in self._alone:
            self._alone[key] = outcome(self.by_lanes[lanes].submit(request)), request.inputs
        return self._alone[key][0]

    def count(self, *_):
        with self._changed:
            self._ticks += 1
            self._changed.notify()

    def wait_for(self, ticks, futures):
        """Wait until that many more ticks began, or until all futures are done."""
        until = self._ticks + ticks
        for future in futures:
            future.add_done_callback(self._notify)
        with self._changed:
            self._changed.wait_for(
                lambda: self._ticks >= until or all(future.done() for future in futures)
            )

    def _notify(self, _):
        with self._changed:
            self._changed.notify()


def outcome(future):
    """Return the image's bytes, or the text of the error."""
    error = future.exception()
    return future.result().image.tobytes() if error is None else f"{type(error)}: {error}"


@pytest.fixture(
    scope="module",
    params=[("float32", True), ("float32", False), ("bfloat16", True), ("bfloat16", False)],
    ids=["float32-nhwc", "float32-nchw", "bfloat16-nhwc", "bfloat16-nchw"],
)
def engines(kind, request):
    dtype, channels_last = request.param
    if kind.name == "flow" and not channels_last:
        pytest.skip("the flow-matching family has one memory layout")
    engines = Engines(kind, dtype, channels_last)
    yield engines
    for engine in engines.by_lanes.values():
        engine.close()


@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_among_any_others_and_whenever_it_arrives(engines, examples):
    drawn = 0
    # Each request, and the ticks after which it arrives: 0 arrives with the one before.
    requests = requests_of(engines.kind)
    arrivals = st.lists(st.tuples(requests, st.integers(0, 4)), min_size=2, max_size=7)

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
    @given(arrivals, st.sampled_from(LANES), st.randoms(use_true_random=False))
    def check(coming, lanes, order):
        nonlocal drawn
        engine = engines.by_lanes[lanes]
        order.shuffle(coming)
        futures = []
        for request, ticks in coming:
            engines.wait_for(ticks, futures)
            futures.append(engine.submit(request))
        for (request, _), future in zip(coming, futures, strict=True):
            assert outcome(future) == engines.alone(lanes, request), request
        drawn += len(coming)

    check()
    assert drawn >= 2 * examples


def test_a_row_drawn_in_other_lanes_is_the_same_to_a_count(engines):
    """Across configurations promise 1 allows a tolerance: in float32 it is one count of 255."""
    if engines.dtype != "float32":
        pytest.skip("bfloat16 differs by more, which benchmarks/parity.py shows")
    request = Request(
        prompt="a dog",
        seed=3,
        **engines.kind.defaults,
        num_inference_steps=10,
        guidance_scale=7.5,
        height=24,
        width=16,
    )
    images = [engine.submit(request).result().image for engine in engines.by_lanes.values()]
    for image in images:
        assert np.abs(image.astype(int) - images[0]).max() <= 1
