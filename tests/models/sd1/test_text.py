"""Prompts: weights, chunks, clip_skip, against AUTOMATIC1111's documentation and diffusers."""

import copy
import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sdbatch.engine.engine import Engine
from sdbatch.models.sd1 import text
from sdbatch.models.sd1.family import TEXT, StableDiffusion1
from sdbatch.models.sd1.text import GROUP, TextEncoder, Tokenizer
from tests.models.load import assert_as_diffusers, load

LAYERS = 3  # of the text encoder here
ROOM = 75  # tokens of a chunk without its begin and end marks
LONG = "a red dog runs after a blue cat "  # 24 tokens of the tiny model: one a letter
SOME = ["", "a", "a red dog", LONG * 2, LONG * 4, "a (red:1.4) [dog]", "blue", "x" * 200, "(b)"]


@pytest.fixture(scope="module")
def model(tiny_model):
    """The tiny model with a deeper text encoder. As with CLIP, its embeddings' mean is not 0.

    With the tiny one's untrained layer norm the mean is rounding, and so is the effect of weights.
    """
    loaded = load(tiny_model)
    config = CLIPTextConfig(**{**loaded.text_encoder.config.to_dict(), "num_hidden_layers": LAYERS})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = CLIPTextModel(config)
        torch.nn.init.normal_(encoder.final_layer_norm.bias, mean=0.3)
    return replace(loaded, text_encoder=encoder.requires_grad_(False).eval())


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(StableDiffusion1(model), lanes=8, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def draw(engine):
    """Draw a request with the engine."""
    return lambda request: engine.submit(request).result()


@pytest.fixture
def draw_from(draw, pipeline, model):
    """Draw a request, assert that diffusers draws the same from these embeddings or its text."""

    def check(request, *embeddings):
        given = {}
        if embeddings:
            torch.testing.assert_close(embed(model, request), embeddings, rtol=1e-4, atol=1e-5)
            given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeddings, strict=True))
        drawn = draw(request)
        assert_as_diffusers(drawn, pipeline, request, model.scheduler_config, **given)
        return drawn

    return check


@torch.inference_mode()
def embed(model, request):
    """Return the embeddings of the request's prompt and of its negative prompt."""
    family = StableDiffusion1(model)
    prompts, negatives = family.embed([family.read(request)], soon=())
    return prompts[TEXT], negatives[TEXT]


@torch.inference_mode()
def encode_by_hand(model, words, clip_skip=0):
    """Encode a long text 75 tokens at a time; (1, 77 * chunks, D)."""
    tokenizer, encoder = model.tokenizer, model.text_encoder
    ids = tokenizer(words, add_special_tokens=False).input_ids
    rows = [ids[i : i + ROOM] for i in range(0, max(len(ids), 1), ROOM)]
    begin, end, fill = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[begin, *row, end, *[fill] * (ROOM - len(row))] for row in rows]
    states = [encoder(torch.tensor([row]), output_hidden_states=True) for row in rows]
    if clip_skip == 0:
        return torch.cat([state.last_hidden_state for state in states], dim=1)
    skipped = [state.hidden_states[LAYERS - clip_skip] for state in states]
    return torch.cat([encoder.final_layer_norm(state) for state in skipped], dim=1)


OTHER_SYNTAX = {"a <lora:fur:1>": "<lora:", "a cat AND a dog": "AND"}
OVER_TIME = ["a [cat:dog:0.5]", "a [dog: 5 ]", "a [cat|dog]", "a cat BREAK a dog"]


@pytest.mark.parametrize("prompt", OTHER_SYNTAX)
@pytest.mark.parametrize("where", ["prompt", "negative_prompt", "prompt_b"])
def test_syntax_that_is_not_supported_fails_the_row_with_the_way_out(
    engine, request_for, prompt, where
):
    future = engine.submit(request_for(**{where: prompt, "prompt_weights": True}))
    reason = re.escape(f"{where} = {OTHER_SYNTAX[prompt]!r}: networks and AND are not supported")
    with pytest.raises(ValueError, match=rf"^{reason}.*Remove it; LoRAs belong in model.loras"):
        future.result()


@pytest.mark.parametrize("prompt", ["a (red:1.5) [dog]", *OTHER_SYNTAX, *OVER_TIME, "\\(a\\)"])
def test_without_prompt_weights_brackets_are_text_as_in_diffusers(draw_from, request_for, prompt):
    draw_from(request_for(prompt=prompt, negative_prompt="[a] (b"))


@pytest.mark.parametrize("prompt", ["a red dog", "(a red dog:1)", "a (red:1.0) dog"])
def test_weights_of_1_give_the_bits_of_no_weights(draw, request_for, prompt):
    one = draw(request_for(prompt=prompt, negative_prompt="(blurry:1)", prompt_weights=True))
    two = draw(request_for(negative_prompt="blurry"))
    assert np.array_equal(one.image, two.image)
    assert one.prompt_tokens == two.prompt_tokens == 7


def test_weights_keep_the_scale_where_the_mean_is_rounding(tiny_model, request_for):
    untrained = load(tiny_model)
    for prompt in ("a (red:1.3) dog", "a [red] dog", "(a:1.1) dog"):
        embedding, _ = embed(untrained, request_for(prompt=prompt, prompt_weights=True))
        assert 0.8 < embedding.std() < 1.3  # about 1: the layer norm's


def test_weights_scale_the_rows_of_their_tokens_and_keep_the_mean(
    model, draw_from, draw, request_for
):
    plain = request_for(prompt="a red dog", negative_prompt="blurry fur")
    request = plain.updated(
        prompt="a (red:1.6) [dog]", negative_prompt="((blurry)) fur", prompt_weights=True
    )
    prompt, negative = (states.clone() for states in embed(model, plain))
    means = prompt.mean(), negative.mean()
    prompt[0, 2:5] *= 1.6  # after the begin mark and the a
    prompt[0, 5:8] /= 1.1
    negative[0, 1:7] *= 1.21
    prompt *= means[0] / prompt.mean()  # as A1111's sd_hijack_clip does
    negative *= means[1] / negative.mean()
    for ours, mean in zip(embed(model, request), means, strict=True):
        torch.testing.assert_close(ours.mean(), mean, rtol=1e-4, atol=1e-7)
    drawn = draw_from(request, prompt, negative)
    assert (drawn.image != draw(plain).image).any()
    assert drawn.prompt_tokens == 7


@pytest.mark.parametrize("length", [ROOM - 1, ROOM, ROOM + 1, 2 * ROOM, 2 * ROOM + 1])
def test_a_long_prompt_is_truncated_to_75_tokens_and_the_row_records_it(
    draw_from, draw, request_for, length
):
    letters = (LONG * 8).replace(" ", "")
    drawn = draw_from(request_for(prompt=" ".join(letters[:length])))
    assert (drawn.prompt_tokens, drawn.prompt_truncated) == (length, length > ROOM)
    whole = draw(request_for(prompt=" ".join(letters[:ROOM])))
    assert np.array_equal(drawn.image, whole.image) == (length >= ROOM)


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize(
    "prompts",
    [("a dog", "blurry"), (LONG * 3, ""), (LONG * 4, "blur " * 20), (LONG * 4, ""), ("", LONG * 7)],
)
def test_chunks_of_75_tokens_are_encoded_one_by_one_and_the_shorter_prompt_gets_blank_chunks(
    model, draw_from, request_for, prompts, clip_skip
):
    options = {"chunk_prompts": True, "clip_skip": clip_skip}
    embeddings = [encode_by_hand(model, words, clip_skip) for words in prompts]
    chunks = max(states.shape[1] // 77 for states in embeddings)
    for i, states in enumerate(embeddings):
        blank = [encode_by_hand(model, "", clip_skip)] * (chunks - states.shape[1] // 77)
        embeddings[i] = torch.cat([states, *blank], dim=1)
    request = request_for(prompt=prompts[0], negative_prompt=prompts[1], **options)
    drawn = draw_from(request, *embeddings)
    assert not drawn.prompt_truncated
    assert drawn.prompt_tokens == len(prompts[0].replace(" ", ""))


def test_weights_apply_to_the_tokens_of_every_chunk(model, request_for):
    weighted = request_for(
        prompt=f"{'x' * ROOM}(y:2)", prompt_weights=True, chunk_prompts=True, guidance_scale=1.0
    )
    first, second = StableDiffusion1(model).read(weighted).prompts.prompt
    assert first.weights is None
    assert second.weights == (1.0, 2.0, *[1.0] * ROOM)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_that_many_layers_for_both_prompts(
    model, draw_from, draw, request_for, clip_skip
):
    request = request_for(negative_prompt="blurry", clip_skip=clip_skip)
    embeddings = [encode_by_hand(model, words, clip_skip) for words in ("a red dog", "blurry")]
    drawn = draw_from(request, *embeddings)
    without = draw(request_for(negative_prompt="blurry"))
    assert np.array_equal(drawn.image, without.image) == (clip_skip == 0)


# Worked by hand from AUTOMATIC1111's rule: a chunk has 75 tokens; if a token that is no comma finds
# it full, and the last of its commas is at place 55 or later (from 0: the last 20 tokens), what
# follows that comma moves to the next chunk. "W" is a word of 8 vectors, "V" one of 60; each other
# letter and each comma is a token. Prompt -> the tokens of its chunks.
CUTS = {
    "": [0],
    "x" * 74: [74],
    "x" * 75: [75],
    "x" * 76: [75, 1],
    "x" * 150: [75, 75],
    "x" * 151: [75, 75, 1],
    **{  # a comma after n of 75 tokens, then text that does not fit
        "x" * n + "," + "x" * (80 - n): [n + 1, 80 - n] if n >= 55 else [75, 6]
        for n in range(52, 75)
    },
    "x" * 60 + "," + "x" * 14: [75],  # exactly full
    "x" * 60 + "," + "x" * 15: [61, 15],
    "x" * 75 + "," + "x" * 4: [75, 5],  # a comma finds it full
    "x" * 60 + "," + "x" * 14 + "," + "x" * 4: [75, 5],  # so does this one: nothing moves
    "x" * 40 + "," + "x" * 20 + "," + "x" * 30: [62, 30],  # the last comma counts
    "x" * 74 + ",": [75],
    "x" * 74 + ",,": [75, 1],
    "x" * 74 + "," + "x" * 75 + "y": [75, 75, 1],
    "x" * 60 + "," + "x" * 75: [61, 75],
    "x" * 60 + "," + "x" * 76: [61, 75, 1],  # the comma of the first chunk counts there alone
    ("x" * 59 + ",") * 3: [60, 60, 60],
    # a comma that begins a chunk after a full one does not count; at place 55 it would not anyway
    "x" * 75 + "," + "x" * 74 + "y": [75, 75, 1],
    "x" * 67 + "W": [75],
    "x" * 68 + "W": [68, 8],
    "x" * 74 + "W": [74, 8],
    "x" * 75 + "W": [75, 8],
    "x" * 60 + "," + "x" * 9 + "W": [70, 8],  # there was room, though not enough: nothing moves
    "x" * 60 + "," + "x" * 14 + "W": [61, 22],  # it was full
    "x" * 60 + "," + "x" * 14 + "V": [61, 74],
    "x" * 57 + "," + "x" * 17 + "V": [58, 17, 60],  # and what moved leaves too little room
    "x" * 55 + "," + "x" * 11 + "W" + "x": [56, 20],  # a word moves whole
    "W" * 10: [72, 8],
    "x" * 50 + "," + "W" * 3 + "x" * 9: [75, 9],
    "x" * 66 + "W" + "," + "W": [75, 8],  # a comma exactly last
}


@pytest.fixture(scope="module")
def words_of_vectors(model):
    tokenizer = copy.deepcopy(model.tokenizer)
    for word, vectors in (("<w>", 8), ("<v>", 60), ("<huge>", 76)):
        tokenizer.add_tokens([word, *(f"{word}_{i}" for i in range(1, vectors))])
    return tokenizer


def spaced(prompt):
    """Spell a prompt of CUTS so that each letter is a token."""
    return " ".join({"W": "<w>", "V": "<v>"}.get(letter, letter) for letter in prompt)


@pytest.mark.parametrize("prompt", CUTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunk_prompts_cuts_where_automatic1111_does(words_of_vectors, prompt, weighted):
    tokenizer = Tokenizer(words_of_vectors)
    tokens = tokenizer.tokenize(spaced(prompt), 0, weighted=weighted, chunked=True)
    end = words_of_vectors.eos_token_id
    assert [chunk.ids.index(end) - 1 for chunk in tokens.chunks] == CUTS[prompt]
    assert (tokens.count, tokens.truncated) == (sum(CUTS[prompt]), False)
    begin, fill = words_of_vectors.bos_token_id, words_of_vectors.pad_token_id
    rows = [
        (chunk.ids[1 : length + 1], chunk.ids)
        for chunk, length in zip(tokens.chunks, CUTS[prompt], strict=True)
    ]
    for row, ids in rows:
        assert ids == (begin, *row, end, *[fill] * (ROOM - len(row)))
    whole = [token for row, _ in rows for token in row]
    pieces = {"W": 8, "V": 60}
    assert [words_of_vectors.convert_ids_to_tokens(token) for token in whole] == [
        token
        for letter in prompt
        for token in (
            [f"<{letter.lower()}>{f'_{i}' if i else ''}" for i in range(pieces[letter])]
            if letter in pieces
            else [f"{letter}</w>"]
        )
    ]


# Prompt -> the tokens of its chunks; by AUTOMATIC1111's tokenize_line: BREAK ends a chunk, also an
# empty one, and at the end it begins none.
BREAKS = {
    "x BREAK y y": [1, 2],
    "x BREAK": [1],
    "BREAK x": [0, 1],
    "BREAK": [0],
    "x BREAK BREAK y": [1, 0, 1],
    "x " * 75 + "BREAK y": [75, 1],
    "x " * 76 + "BREAK y": [75, 1, 1],
    "x " * 60 + ", " + "x " * 9 + "BREAK" + " y" * 10: [70, 10],  # no comma counts before it
}


@pytest.mark.parametrize("prompt", BREAKS)
def test_break_begins_a_new_chunk(model, prompt):
    tokens = Tokenizer(model.tokenizer).tokenize(prompt, 0, weighted=True, chunked=True)
    end = model.tokenizer.eos_token_id
    assert [chunk.ids.index(end) - 1 for chunk in tokens.chunks] == BREAKS[prompt]
    assert tokens.count == sum(BREAKS[prompt])


def test_what_moves_to_the_next_chunk_keeps_its_weights(model):
    prompt = f"{'x ' * 60}, {'y ' * 10}(z:1.5) {'y ' * 8}"
    first, second = (
        Tokenizer(model.tokenizer).tokenize(prompt, 0, weighted=True, chunked=True).chunks
    )
    assert first.weights is None
    assert second.weights[11] == 1.5
    assert sum(second.weights) == 77.5


def test_without_chunk_prompts_a_comma_and_a_word_are_cut_at_75_tokens(words_of_vectors):
    tokenizer = Tokenizer(words_of_vectors)
    for prompt in ("x" * 60 + "," + "x" * 30, "x" * 70 + "W", "x" * 20 + "V"):
        tokens = tokenizer.tokenize(spaced(prompt), 0, weighted=False, chunked=False)
        (chunk,) = tokens.chunks
        assert chunk.ids.index(words_of_vectors.eos_token_id) == ROOM + 1
        assert tokens.truncated


def test_a_word_that_no_chunk_can_hold_is_rejected_with_the_way_out(words_of_vectors):
    tokenizer = Tokenizer(words_of_vectors)
    with pytest.raises(ValueError, match=r"'<huge>': has 76 vectors: must have at most 75.*false"):
        tokenizer.tokenize("a <huge>", 0, weighted=False, chunked=True)
    assert tokenizer.tokenize("a <huge>", 0, weighted=False, chunked=False).truncated


@pytest.mark.parametrize("clip_skip", [LAYERS, LAYERS + 1])
def test_clip_skip_of_all_layers_is_rejected(engine, request_for, clip_skip):
    with pytest.raises(ValueError, match=f"clip_skip = {clip_skip}: must be below 3"):
        engine.submit(request_for(clip_skip=clip_skip)).result()


def test_an_embedding_does_not_depend_on_the_others_in_its_call(model):
    tokenizer = Tokenizer(model.tokenizer)
    chunks = [
        chunk
        for skip in (0, 1, 0)
        for text in SOME
        for chunk in tokenizer.tokenize(text, skip, weighted=True, chunked=True).chunks
    ]
    assert len(set(chunks)) > 2 * GROUP
    rows = set()
    hook = model.text_encoder.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
    with torch.inference_mode(), hook:
        together = TextEncoder(model.text_encoder, model.row_loras).encode(chunks)
        backwards = TextEncoder(model.text_encoder, model.row_loras).encode(chunks[::-1])[::-1]
        for chunk, one, two in zip(chunks, together, backwards, strict=True):
            (alone,) = TextEncoder(model.text_encoder, model.row_loras).encode([chunk])
            (first,) = TextEncoder(model.text_encoder, model.row_loras).encode([chunk], soon=chunks)
            assert all(torch.equal(other, alone) for other in (one, two, first))
    assert rows == {GROUP}  # bits can depend on it: libraries choose kernels by the number of rows


def test_a_cached_embedding_is_the_one_that_was_encoded(model, monkeypatch):
    monkeypatch.setattr(text, "CACHE_SIZE", 3)
    tokenizer, encoder = (
        Tokenizer(model.tokenizer),
        TextEncoder(model.text_encoder, model.row_loras),
    )
    chunks = [
        tokenizer.tokenize(prompt, 0, weighted=False, chunked=False).chunks[0] for prompt in SOME
    ]
    with torch.inference_mode():
        first = encoder.encode(chunks)
        for chunk, embedding in zip(chunks * 2, first * 2, strict=True):
            assert torch.equal(encoder.encode([chunk])[0], embedding)


@pytest.mark.parametrize("has_embeddings", [False, True])
def test_eight_threads_read_the_tokens_that_one_reads(model, has_embeddings):
    prompts = [f"{prompt} {i} <style>" for i in range(60) for prompt in SOME]
    options = {"weighted": True, "chunked": True}
    tokenizer = copy.deepcopy(model.tokenizer)
    if has_embeddings:
        tokenizer.add_tokens(["<style>", "<style>_1", "<style>_2"])
    alone = Tokenizer(tokenizer)
    expected = {prompt: alone.tokenize(prompt, 0, **options) for prompt in prompts}
    shared = Tokenizer(tokenizer)

    def read(seed):
        order = random.Random(seed).sample(prompts, len(prompts))
        return {prompt: shared.tokenize(prompt, 0, **options) for prompt in order}

    with ThreadPoolExecutor(8) as threads:
        for tokens in threads.map(read, range(8)):
            assert tokens == expected
