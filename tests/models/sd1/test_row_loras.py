"""LoRAs by row: as if they were fused, and without effect on other rows, bit for bit."""

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdbatch.engine.engine import Engine
from sdbatch.errors import ModelError
from sdbatch.job.sections import Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import LORAS, TEXT, StableDiffusion1
from tests.models.load import MOST_COUNTS, difference, draw, load

RANK = 4
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
ATTENTION = re.compile(r"(to_[qkv]|to_out\.0|ff\.net\.2|[qkv]_proj|fc1)$")


def write_network(path, model, make, chosen=ATTENTION, parts=("unet", "text_encoder"), seed=0):
    """Write a network, named as kohya's scripts do, with `make(layer, randn)` for each layer."""
    generator, file = torch.Generator().manual_seed(seed), {}

    def randn(*shape):
        return torch.randn(shape, generator=generator) * 0.1

    for part in parts:
        for name, layer in getattr(model, part).named_modules():
            if chosen.search(name):
                for key, tensor in make(layer, randn).items():
                    name_in_file = PREFIXES[part] + name.replace(".", "_")
                    file[f"{name_in_file}.{key}"] = tensor.contiguous()
    save_file(file, path)
    return str(path)


def plain(layer, randn):
    outputs, inputs, *kernel = layer.weight.shape
    up, down = randn(outputs, RANK, *[1] * len(kernel)), randn(RANK, inputs, *kernel)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(6.0)}


def tucker(layer, randn):
    outputs, inputs, *kernel = layer.weight.shape
    down, up = randn(RANK, inputs, 1, 1), randn(outputs, RANK, 1, 1)
    mid = 5 * randn(RANK, RANK, *kernel)
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}


def loha(layer, randn):
    outputs, rest = len(layer.weight), layer.weight[0].numel()
    sizes = {"w1_a": (outputs, 2), "w1_b": (2, rest), "w2_a": (outputs, 2), "w2_b": (2, rest)}
    return {f"hada_{name}": 3 * randn(*size) for name, size in sizes.items()}


def lokr(layer, randn):
    outputs, inputs, *kernel = layer.weight.shape
    return {"lokr_w1": randn(4, 4), "lokr_w2": 5 * randn(outputs // 4, inputs // 4, *kernel)}


def ia3(layer, randn):
    return {"weight": 5 * randn(len(layer.weight)), "on_input": torch.tensor(0)}


def full(layer, randn):
    return {"diff": randn(*layer.weight.shape), "diff_b": randn(len(layer.weight))}


def norm(layer, randn):
    return {"w_norm": 3 * randn(len(layer.weight)), "b_norm": 3 * randn(len(layer.weight))}


def dora(layer, randn):
    return {**plain(layer, randn), "dora_scale": randn(len(layer.weight), 1)}


KINDS = {
    "lora": (plain, ATTENTION),
    "lora_of_convolutions": (plain, re.compile(r"conv\d?$|time_emb_proj$|proj_in$|sampl.*conv$")),
    "lora_of_three_factors": (tucker, re.compile("resnets.*conv1$")),
    "loha": (loha, re.compile(r"resnets.*conv1$|to_q$|q_proj$")),
    "lokr": (lokr, re.compile(r"resnets.*conv1$|to_q$|fc1$")),
    "ia3": (ia3, re.compile(r"to_k$|k_proj$")),
    "full": (full, re.compile(r"resnets.*conv2$|to_out\.0$|fc2$")),
    "norm": (norm, re.compile(r"norm\d?$|layer_norm\d?$")),
}


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Three LoRAs, the last of the UNet alone."""
    folder = tmp_path_factory.mktemp("row-loras")
    return {
        "ink": write_network(folder / "ink.safetensors", model, plain, seed=1),
        "fur": write_network(folder / "fur.safetensors", model, plain, seed=2),
        "wet": write_network(
            folder / "wet.safetensors", model, plain, re.compile("to_v$"), ["unet"], seed=3
        ),
    }


def by_row(files, **weights):
    return [Lora(path=path, name=name, weight=weights.get(name, 1)) for name, path in files.items()]


@pytest.fixture(scope="module")
def adapted(tiny_model, files):
    return load(tiny_model, loras=by_row(files, fur=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_draws_as_if_its_lora_were_fused(tiny_model, model, tmp_path, request_for, kind):
    make, chosen = KINDS[kind]
    file = write_network(tmp_path / "lora.safetensors", model, make, chosen)
    for weight in (0.8, -0.5):
        [fused] = draw(load(tiny_model, loras=[Lora(path=file, weight=weight)]), [request_for()])
        named = load(tiny_model, loras=[Lora(path=file, name="ink")])
        [drawn, without] = draw(named, [request_for(loras=f"ink:{weight}"), request_for()])
        assert difference(drawn.image, fused.image) <= MOST_COUNTS
        assert difference(without.image, drawn.image) > 3 * MOST_COUNTS
        assert np.array_equal(without.image, draw(model, [request_for()])[0].image)


def test_several_loras_of_a_row_are_as_if_all_were_fused(tiny_model, files, adapted, request_for):
    weights = {"ink": 0.7, "wet": -1.2}
    fused = load(tiny_model, loras=[Lora(path=files[k], weight=w) for k, w in weights.items()])
    [expected] = draw(fused, [request_for()])
    [drawn] = draw(adapted, [request_for(loras="wet:-1.2, ink:.7")])
    assert difference(drawn.image, expected.image) <= MOST_COUNTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_a_row_do_not_depend_on_the_loras_of_its_neighbours(
    tiny_model, files, request_for, dtype
):
    model = load(tiny_model, build=Build("cpu", dtype), loras=by_row(files))
    choices = ["", "ink", "fur:0.3", "ink:0.5, wet", "", "wet:-1"]
    requests = [
        request_for(loras=loras, seed=seed, guidance_scale=(1, 6)[seed % 2], prompt=f"a {seed}")
        for seed, loras in enumerate(choices)
    ]
    together = draw(model, requests)
    alone = [draw(model, [request])[0] for request in requests]
    plain = load(tiny_model, build=Build("cpu", dtype))
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.image, other.image)
    for i in (0, 4):  # rows without a LoRA, which an engine without any draws alike
        assert np.array_equal(draw(plain, [requests[i]])[0].image, together[i].image)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lanes_without_a_lora_have_the_bits_of_a_call_without_any(tiny_model, files, dtype):
    model = load(tiny_model, build=Build("cpu", dtype), loras=by_row(files))
    family = StableDiffusion1(model)
    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 77, 32, dtype=model.dtype)
    weights, times = torch.zeros(4, len(files)), torch.full((4,), 500)
    skipped = family.denoise(latents, times, {TEXT: text, LORAS: weights.clone()})
    weights[2:, 1] = 1.0
    computed = family.denoise(latents, times, {TEXT: text, LORAS: weights})
    assert torch.equal(skipped[:2], computed[:2])
    assert not torch.isclose(skipped[2:], computed[2:]).all()


def test_a_lora_that_overflows_harms_no_row_without_it(tiny_model, model, tmp_path, request_for):
    def overflowing(layer, randn):
        down, up = (
            torch.full((1, layer.weight.shape[1]), 3e38),
            torch.full((len(layer.weight), 1), 1e-38),
        )
        return {"lora_up.weight": up, "lora_down.weight": down}

    file = write_network(tmp_path / "big.safetensors", model, overflowing)
    other = write_network(tmp_path / "ink.safetensors", model, plain)
    both = load(tiny_model, loras=by_row({"big": file, "ink": other}))
    alone = load(tiny_model, loras=by_row({"ink": other}))
    [drawn] = draw(both, [request_for(loras="ink")])
    assert difference(drawn.image, draw(alone, [request_for(loras="ink")])[0].image) <= MOST_COUNTS


def test_tags_of_a_prompt_choose_loras_and_are_no_text(adapted, request_for):
    requests = [
        request_for(loras="ink:0.7, fur", negative_prompt="bad"),
        request_for(prompt="a <lora:ink:0.7>red dog<lora:fur>", negative_prompt="bad"),
        request_for(prompt="a red <lora:ink:0.4>dog", loras="fur, ink:0.3", negative_prompt="bad"),
        request_for(prompt="(a red dog:1)<lyco:ink:.7> <lora:fur:0.5>", negative_prompt="bad"),
        request_for(negative_prompt="bad"),
    ]
    requests[3] = requests[3].updated(prompt_weights=True)
    one, two, three, four, without = draw(adapted, requests)
    assert np.array_equal(one.image, two.image)
    assert difference(one.image, three.image) <= MOST_COUNTS  # 0.4 + 0.3 is 0.7 but for rounding
    assert np.array_equal(one.image, four.image)
    assert difference(one.image, without.image) > 3 * MOST_COUNTS
    assert {each.prompt_tokens for each in (one, two, three, four)} == {len("areddog")}


def test_tags_are_removed_before_a_prompt_is_read_over_time(adapted, request_for):
    family = StableDiffusion1(adapted)
    options = {"loras": "fur:1", "prompt_weights": True, "prompt_b": "a cat", "mix": 0.5}
    tagged = request_for(prompt="[<lora:ink:2>a dog|b]<lora:fur:1>", **options)
    plain = request_for(prompt="[a dog|b]", **{**options, "loras": "fur:2, ink:2"})
    assert family.read(tagged) == family.read(plain)


def test_a_tag_is_text_if_the_job_names_no_lora(model, request_for):
    [drawn] = draw(model, [request_for(prompt="a <lora:ink:1>")])
    assert drawn.prompt_tokens == len("a<lora:ink:1>")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            {"loras": "inc"},
            "loras = 'inc': 'inc' is not the name of a LoRA. Did you mean 'ink'? model.loras "
            "names ink, fur, wet",
        ),
        ({"prompt": "a <lora:sky:1>"}, "prompt = '<lora:sky:1>': 'sky' is not the name of a LoRA"),
        ({"prompt": "<lora:ink:1:0.5>"}, "prompt = '<lora:ink:1:0.5>': must be <lora:NAME:WEIGHT>"),
        ({"prompt": "a <lora:ink:much>"}, "prompt = '<lora:ink:much>': must hold NAME or NAME:WEI"),
        ({"prompt": "<lora:ink:11>"}, "a weight from -10 to 10"),
        (
            {"negative_prompt": "bad <lora:ink:1>"},
            "negative_prompt = '<lora:ink:1>': a LoRA changes the whole image. Move it to the",
        ),
        (
            {"prompt_b": "a <lora:ink:1>cat"},
            "prompt_b = '<lora:ink:1>': a LoRA changes the whole image. Move it to the prompt",
        ),
    ],
)
def test_a_lora_that_cannot_be_drawn_fails_its_row_with_the_way_out(
    adapted, request_for, values, reason
):
    engine = Engine(StableDiffusion1(adapted), lanes=4, threads=1)
    failed, drawn = (engine.submit(request_for(**each)) for each in (values, {}))
    with pytest.raises(ValueError, match=re.escape(reason)):
        failed.result()
    assert drawn.result().image.std() > 0
    engine.close()


def test_a_job_without_named_loras_says_so(model, request_for):
    engine = Engine(StableDiffusion1(model), lanes=4, threads=1)
    future = engine.submit(request_for(loras="ink"))
    with pytest.raises(ValueError, match=r"'ink' is unknown, as model.loras has no LoRA with a n"):
        future.result()
    engine.close()


def test_a_dora_is_fused_and_cannot_be_chosen_by_row(tiny_model, model, tmp_path):
    file = write_network(tmp_path / "dora.safetensors", model, dora, re.compile("to_q$"))
    fused, magnitudes = load(tiny_model, loras=[Lora(path=file, weight=1)]), load_file(file)
    for name, layer in fused.unet.named_modules():
        if name.endswith("to_q"):  # the magnitudes that were trained, by output
            norms = layer.weight.norm(dim=1)
            trained = magnitudes[f"lora_unet_{name.replace('.', '_')}.dora_scale"].flatten()
            torch.testing.assert_close(norms, trained.abs(), rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ModelError, match=r"^model.loras.0.name = 'ink': .*is a DoRA.*cannot be chosen by row"
    ):
        load(tiny_model, loras=[Lora(path=file, name="ink")])


def test_a_fused_and_a_chosen_lora_work_together(tiny_model, files, request_for):
    both = [Lora(path=files["ink"], weight=0.5), Lora(path=files["fur"], weight=0.6)]
    [expected] = draw(load(tiny_model, loras=both), [request_for()])
    mixed = load(tiny_model, loras=[both[0], both[1].updated(name="fur")])
    [drawn] = draw(mixed, [request_for(loras="fur")])
    assert difference(drawn.image, expected.image) <= MOST_COUNTS


def test_a_lora_of_the_unet_alone_shares_the_text_of_other_rows(adapted, request_for):
    family = StableDiffusion1(adapted)
    wet, without, ink = (family.read(request_for(loras=each)) for each in ("wet", "", "ink"))
    assert wet.prompts.prompt == without.prompts.prompt != ink.prompts.prompt


@pytest.mark.slow  # a minute: torch compiles a UNet and a VAE
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # torch's own, of its own
def test_compiling_changes_no_row(tiny_model, adapted, files, request_for):
    build = Build("cpu", "float32", compile=True)
    compiled = load(tiny_model, build=build, loras=by_row(files, fur=0.5))
    requests = [request_for(loras=each, seed=1) for each in ("ink", "", "fur, wet:2")]
    expected = draw(adapted, requests)
    together = draw(compiled, requests)
    for one, other in zip(together, expected, strict=True):
        assert difference(one.image, other.image) <= MOST_COUNTS
    assert np.array_equal(together[1].image, draw(compiled, [requests[1]])[0].image)
