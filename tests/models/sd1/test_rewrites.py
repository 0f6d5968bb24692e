"""Rewrites: the same numbers but for rounding, and rows that do not depend on their neighbours."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import LORAS, TEXT, StableDiffusion1
from sdbatch.models.sd1.rewrites import REWRITES, PhaseUpsample
from sdbatch.registry import REWRITES as NAMES
from tests.models.load import MOST_COUNTS, difference, draw, load
from tests.models.sd1.test_row_loras import by_row, plain, write_network

ON_A_CPU = ("phase_upsample", "shared_prefix", "text_kv")
COMPILED = ("phase_upsample", "text_kv")
LAYOUTS = {"channels_last": True, "contiguous": False}


def built(folder, names=(), dtype="float64", channels_last=True, **settings):
    build = Build("cpu", dtype, channels_last=channels_last, rewrites=tuple(names))
    return load(folder, build, **settings)


@torch.inference_mode()
def outputs(model, request_for, size=8, **values):
    """Return the denoiser's answer for two guided images, and pictures of their latents."""
    family = StableDiffusion1(model)
    readings = [family.read(request_for(prompt=p, **values)) for p in ("a red dog", "two cats")]
    prompts, negatives = family.embed(readings, [])
    conditions = {name: torch.cat([prompts[name], negatives[name]]) for name in prompts}
    latents = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([900.0, 40.0])
    lanes = torch.cat([latents, latents]), times.repeat(2), conditions
    answer = family.denoise(*lanes, first_lanes=[0, 1, 0, 1])
    scaled = latents.to(model.dtype, memory_format=model.layout)
    return answer, model.vae.decode(scaled, return_dict=False)[0]


def assert_equal_but_for_rounding(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


def test_a_job_can_name_each_rewrite():
    assert tuple(REWRITES) == NAMES


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_rewrite_computes_the_same_in_float64(tiny_model, request_for, name, layout):
    expected = outputs(built(tiny_model, channels_last=layout), request_for)
    rewritten = built(tiny_model, [name], channels_last=layout)
    assert_equal_but_for_rounding(outputs(rewritten, request_for), expected)


def test_prompts_are_mixed_the_same_after_their_projection(tiny_model, request_for):
    mixed = {"prompt_b": "a blue cat", "mix": 0.3}
    expected = outputs(built(tiny_model), request_for, **mixed)
    ours = outputs(built(tiny_model, ["text_kv"]), request_for, **mixed)
    assert_equal_but_for_rounding(ours, expected)
    assert not torch.equal(ours[0], outputs(built(tiny_model, ["text_kv"]), request_for)[0])


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(tiny_model, request_for, name, dtype):
    model = built(tiny_model, [name], dtype)
    requests = [
        request_for(seed=i, guidance_scale=(1, 6)[i % 2], prompt=f"a {i}", height=(64, 72)[i // 4])
        for i in range(6)
    ]
    for one, alone in zip(draw(model, requests[::-1])[::-1], requests, strict=True):
        assert np.array_equal(one.image, draw(model, [alone])[0].image)


def flops(model, request_for):
    with FlopCounterMode(display=False) as counter:
        outputs(model, request_for)
    return counter.get_total_flops()


def test_upsampling_by_phases_takes_fewer_products(tiny_model, request_for):
    before, after = (
        flops(built(tiny_model, names), request_for) for names in ((), ["phase_upsample"])
    )
    assert after < 0.9 * before


@torch.inference_mode()
def test_a_tick_projects_no_text_that_is_projected_once(tiny_model, request_for):
    calls = []
    model = built(tiny_model, ["text_kv"])
    for layer in model.text_projection._layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    outputs(model, request_for)
    assert len(calls) == len(model.text_projection._layers) > 0


def test_the_same_text_is_projected_once(tiny_model, request_for):
    model = built(tiny_model, ["text_kv"])
    texts = [torch.randn(77, 32, dtype=torch.float64) for _ in range(3)]
    seen = []
    model.text_projection._layers[0].register_forward_hook(lambda *call: seen.append(call[1][0]))
    model.text_projection.project([texts[0]] * 20 + texts, [()] * 23)
    assert [len(each) for each in seen] == [8]


def test_a_size_that_is_not_doubled_is_upsampled_as_before(tiny_model, request_for):
    plain_model, rewritten = (built(tiny_model, names) for names in ((), ["phase_upsample"]))
    assert any(isinstance(module, PhaseUpsample) for module in rewritten.unet.modules())
    ours, theirs = (outputs(model, request_for, size=9) for model in (rewritten, plain_model))
    assert_equal_but_for_rounding(ours, theirs)


@pytest.mark.parametrize("layers", [r"to_[kv]$", r"upsamplers\.0\.conv$"])
def test_loras_by_row_add_the_same_to_a_rewritten_model(
    tiny_model, model, tmp_path, request_for, layers
):
    files = {
        name: write_network(
            tmp_path / f"{name}.safetensors", model, plain, re.compile(layers), seed=seed
        )
        for seed, name in enumerate(("ink", "fur"))
    }
    both = [built(tiny_model, names, loras=by_row(files)) for names in ((), ON_A_CPU)]
    ours, theirs = (outputs(each, request_for, loras="ink:0.7, fur") for each in both)
    assert_equal_but_for_rounding(ours, theirs)
    without = outputs(both[1], request_for)
    assert not torch.allclose(without[0], ours[0], rtol=1e-3)


def test_rows_of_a_call_keep_their_own_loras(tiny_model, model, tmp_path, request_for):
    file = write_network(tmp_path / "ink.safetensors", model, plain, re.compile(r"attn2\.to_[kv]$"))
    rewritten = built(tiny_model, ["text_kv"], "float32", loras=[Lora(path=file, name="ink")])
    requests = [request_for(loras=loras) for loras in ("", "ink", "ink:-0.5")]
    drawn = draw(rewritten, requests)
    for one, request in zip(drawn, requests, strict=True):
        assert np.array_equal(one.image, draw(rewritten, [request])[0].image)
    fused = built(tiny_model, ["text_kv"], "float32", loras=[Lora(path=file, weight=-0.5)])
    assert difference(draw(fused, requests[:1])[0].image, drawn[2].image) <= MOST_COUNTS
    assert difference(drawn[0].image, drawn[1].image) > MOST_COUNTS


def test_the_text_of_a_lane_is_the_keys_and_values_of_all_layers(tiny_model, request_for):
    family = StableDiffusion1(built(tiny_model, ["text_kv"], "float32"))
    prompts, _ = family.embed([family.read(request_for())], [])
    # keys and values of a layer below, one in the middle, two above
    assert prompts[TEXT].shape == (1, 77, 2 * (32 + 64 + 32 + 32))
    assert LORAS not in prompts


@torch.inference_mode()
def test_pictures_are_decoded_again_in_float32(tiny_model):
    family = StableDiffusion1(built(tiny_model, ["phase_upsample"], "bfloat16"))
    latents = torch.randn(1, 4, 8, 8)
    wide, own = (family.decode(latents, dtype).pixels for dtype in (torch.float32, torch.bfloat16))
    assert difference(wide.numpy(), own.numpy()) < 20


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, of its own
def test_a_rewritten_model_is_one_graph_for_the_compiler(tiny_model, request_for):
    model = built(tiny_model, COMPILED)
    expected = outputs(model, request_for)
    how = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}  # without a C++ compiler
    compiled = replace(model, unet=torch.compile(model.unet, **how))
    compiled.vae.decode = torch.compile(model.vae.decode, **how)
    assert_equal_but_for_rounding(outputs(compiled, request_for), expected)
