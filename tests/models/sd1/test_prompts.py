"""The prompts of a request over time, and between prompt and prompt_b."""

import pytest
import torch

from sdbatch import samplers
from sdbatch.models.sd1.family import TEXT, Row, StableDiffusion1
from sdbatch.models.sd1.text import TextEncoder

LONG = "a red dog runs after a blue cat " * 4  # 96 tokens of the tiny model: two chunks


@pytest.fixture(scope="module")
def family(model):
    return StableDiffusion1(model)


@pytest.fixture
def read(family, request_for):
    """Read a request whose prompts are AUTOMATIC1111's."""
    return lambda **values: family.read(request_for(**{"prompt_weights": True, **values})).prompts


@torch.inference_mode()
def embed(family, *readings):
    """Return the embeddings of the readings' prompts and of their negative prompts."""
    prompts, negatives = family.embed([Row(each, (64, 64)) for each in readings], soon=())
    return prompts[TEXT], negatives[TEXT]


def texts_of_calls(read, texts, reading, ticks, **values):
    """Return which of `texts` the prompt of a reading is, call by call."""
    plain = {read(prompt=text, **values).prompt: text for text in texts}
    return [plain[reading.at(tick).prompt] for tick in range(ticks)]


def test_a_text_is_used_in_one_call_more_than_its_number_says(read):
    # AUTOMATIC1111's reconstruct_cond_batch counts calls from 0 and takes the first text whose
    # last step is not below; the schedule numbers steps from 1.
    reading = read(prompt="[a:b:0.5]", num_inference_steps=6)
    assert texts_of_calls(read, "ab", reading, 6) == [*"aaaabb"]
    reading = read(prompt="[a|b|c]", num_inference_steps=6)
    assert texts_of_calls(read, "abc", reading, 6) == [*"aabcab"]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("heun", "aaaaabbbb"),  # 5 steps are 10 calls to AUTOMATIC1111, though the last has one
        ("dpm2_a_karras", "aaaaabbbb"),
        ("dpmpp_sde", "aaaaabbbb"),
        ("pndm", "aaabbb"),  # and 5 calls where 6 are made
        ("dpmpp_2m_karras", "aaabb"),
    ],
)
def test_calls_are_counted_as_automatic1111_counts_them(read, sampler, expected):
    reading = read(prompt="[a:b:0.4]", num_inference_steps=5, sampler=sampler)
    assert texts_of_calls(read, "ab", reading, len(expected)) == [*expected]


def test_later_texts_are_encoded_with_the_first_ones(model, new_engine, request_for, monkeypatch):
    calls, encode = [], TextEncoder._encode_group

    def count(self, chunks):
        calls.append(len(chunks))
        return encode(self, chunks)

    monkeypatch.setattr(TextEncoder, "_encode_group", count)
    request = request_for(prompt="[a:b:2] [c|d]", prompt_weights=True, num_inference_steps=5)
    new_engine().submit(request).result()
    assert calls == [5]  # ac, ad, bc or bd at each of the steps, and the negative prompt


@pytest.mark.parametrize("sampler", samplers.NAMES)
@pytest.mark.parametrize(
    "steps", [*(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 2)), 9]
)
def test_every_call_of_every_sampler_has_a_text(family, request_for, sampler, steps):
    request = request_for(sampler=sampler, num_inference_steps=steps)
    calls = steps * samplers.split(sampler)[0].calls_per_step
    assert calls - 1 <= len(family.sigmas(request)) <= calls + 1


def test_a_second_pass_goes_on_where_the_first_ended(family, request_for, read):
    request = request_for(
        prompt="[a:[b:c:1.5]:0.5]", num_inference_steps=6, hires_scale=2, hires_steps=4
    ).updated(prompt_weights=True)
    second = request.enlarged()
    assert texts_of_calls(read, "abc", family.read(request).prompts, 6) == [*"aaaabb"]
    assert texts_of_calls(read, "abc", family.read(second).prompts, 4) == [*"bbbc"]


def test_equal_texts_are_the_same_reading_and_a_plain_prompt_is_its_own(read):
    plain = read()
    assert all(plain.at(tick) is plain for tick in range(6))
    reading = read(prompt="[a|b]", negative_prompt="[c:d:3]", num_inference_steps=6)
    at = [reading.at(tick) for tick in range(6)]
    assert [at.index(each) for each in at] == [0, 0, 2, 0, 4, 5]
    assert at[0] is at[1] is at[3]
    assert at[2].at(5) is at[2]
    assert (reading.prompt, reading.negative) == (at[0].prompt, at[0].negative)


def test_every_prompt_changes_by_itself(read):
    values = {"num_inference_steps": 4, "mix": 0.25}
    reading = read(prompt="[a:b:1]", negative_prompt="[c|d]", prompt_b="[e:2]", **values)
    expected = [("a", "c", ""), ("a", "c", ""), ("b", "d", ""), ("b", "c", "e")]
    for tick, (prompt, negative, prompt_b) in enumerate(expected):
        ours = reading.at(tick)
        assert ours.prompt == read(prompt=prompt).prompt
        assert ours.negative == read(negative_prompt=negative).negative
        assert ours.prompt_b == read(prompt=prompt_b).prompt


def test_a_call_has_the_embeddings_of_its_text_alone(read, family):
    reading = read(prompt="a [red:(blue:1.3):2] dog", negative_prompt="[x|y]")
    for tick, texts in enumerate([("a red dog", "x")] * 2 + [("a red dog", "y")]):
        alone = read(prompt=texts[0], negative_prompt=texts[1])
        for ours, theirs in zip(embed(family, reading.at(tick)), embed(family, alone), strict=True):
            assert torch.equal(ours, theirs)


def test_all_texts_of_a_request_have_the_chunks_of_the_longest(read, family, request_for):
    values = {"chunk_prompts": True, "negative_prompt": "bad"}
    reading = read(prompt=f"a [{LONG}:3] BREAK b", **values)
    at = [reading.at(tick) for tick in range(6)]
    assert {(len(each.prompt), len(each.negative)) for each in at} == {(3, 3)}
    assert {each.tokens for each in at} == {reading.tokens} == {98}
    assert family.shape(request_for(), Row(reading, (64, 64))) == family.shape(
        request_for(), Row(at[5], (64, 64))
    )
    assert not reading.truncated
    assert read(prompt=f"a [{LONG}:3] b").at(0).truncated


def test_without_prompt_weights_a_prompt_is_one_text(read):
    reading = read(prompt="[a|b] BREAK", prompt_weights=False)
    assert reading.over_time == ()
    assert reading.tokens == len("[a|b]BREAK")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "a BREAK b"}, "prompt = 'BREAK': must have chunk_prompts: true"),
        ({"negative_prompt": "[a:b BREAK c:3]"}, "negative_prompt = 'BREAK': must have chunk"),
        ({"prompt_b": "a [b|c"}, r"prompt_b = '\[b\|': must be \[before:after:when"),
        ({"prompt": "[a:b AND c:3]"}, "prompt = 'AND': networks and AND are not supported"),
    ],
)
def test_a_mistake_in_any_text_is_found_when_the_request_is_read(read, values, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        read(**values)


def test_mixed_embeddings_are_diffusers_lerp_and_the_negative_prompt_is_unchanged(read, family):
    # diffusers' examples/community/interpolate_stable_diffusion.py: torch.lerp(a, b, t)
    values = {"negative_prompt": "bad", "prompt_b": "two (blue:1.2) cats", "mix": 0.3}
    (one, negative), (other, _) = (
        embed(family, read(prompt=text, negative_prompt="bad"))
        for text in ("a red dog", "two (blue:1.2) cats")
    )
    ours, ours_negative = embed(family, read(**values))
    assert torch.equal(ours, torch.lerp(one, other, 0.3))
    assert torch.equal(ours_negative, negative)


def test_a_mixed_row_does_not_depend_on_its_neighbours(read, family):
    readings = [
        read(prompt=f"a dog {i}", prompt_b=f"a cat {i}" * (i % 2), mix=i / 5) for i in range(5)
    ]
    together = embed(family, *readings)
    for i, reading in enumerate(readings):
        for ours, alone in zip(together, embed(family, reading), strict=True):
            assert torch.equal(ours[i], alone[0])


@pytest.mark.parametrize(
    ("values", "alone"),
    [
        ({"prompt_b": LONG, "mix": 0}, {}),
        ({"prompt_b": "a cat", "mix": 1}, {"prompt": "a cat"}),
        ({"prompt": LONG, "prompt_b": "a cat", "mix": 1}, {"prompt": "a cat"}),
        ({"prompt_b": "", "mix": 0.5}, {}),
    ],
)
def test_the_ends_of_a_mix_are_read_as_one_prompt(read, values, alone):
    options = {"chunk_prompts": True, "negative_prompt": "bad"}
    assert read(**options, **values) == read(**options, **alone)


def test_between_its_ends_a_mix_has_the_chunks_of_the_longer_prompt(read):
    reading = read(chunk_prompts=True, prompt_b=LONG, mix=0.5)
    assert len(reading.prompt) == len(reading.prompt_b) == len(reading.negative) == 2
    assert reading.tokens == 96
