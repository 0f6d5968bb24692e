"""Network files: each kind against peft or its published formula, each name against its layer."""

import json
import re

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from sdbatch.models.sd1.layers import layers_of, plain_name
from sdbatch.models.sd1.networks import read_network
from tests import tiny

OUT, IN, R = 8, 12, 3  # outputs, inputs, rank
KERNELS = {"linear": (), "conv": (3, 3), "point": (1, 1)}


def make_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "linear": torch.nn.Linear(IN, OUT),
            "conv": torch.nn.Conv2d(IN, OUT, 3),
            "point": torch.nn.Conv2d(IN, OUT, 1),
            "bare": torch.nn.Linear(IN, OUT, bias=False),
            "norm": torch.nn.GroupNorm(2, OUT),
            "layer_norm": torch.nn.LayerNorm(OUT),
        }


@pytest.fixture
def layers():
    return make_layers()


@pytest.fixture
def read(tmp_path, layers):
    """Write a network's file and read it."""

    def read_file(tensors, metadata=None, name="network.safetensors"):
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, tmp_path / name, metadata)
        return read_network(str(tmp_path / name), layers)

    return read_file


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def named(layer, **tensors):
    """Name a layer's tensors as kohya's scripts do; "__" stands for a dot."""
    return {f"lora_unet_{layer}.{k.replace('__', '.')}": v for k, v in tensors.items()}


def lora_of(layer):
    kernel = KERNELS[layer]
    up, down = random(OUT, R, *[1] * len(kernel)), random(R, IN, *kernel)
    product = up.reshape(OUT, R) @ down.reshape(R, -1)
    return up, down, product.reshape(OUT, IN, *kernel)


@pytest.mark.parametrize("layer", KERNELS)
def test_a_lora_is_up_times_down_by_alpha_over_rank(read, layers, layer):
    up, down, product = lora_of(layer)
    names = {"lora_up__weight": up, "lora_down__weight": down, "alpha": torch.tensor(2.0)}
    delta, bias = read(named(layer, **names))[layers[layer]].delta(layers[layer])
    torch.testing.assert_close(delta, product * 2 / R)
    assert bias is None


def test_a_lora_of_float16_is_multiplied_in_float32(read, layers):
    up, down = torch.full((OUT, 128), 0.01).half(), torch.full((128, IN), 0.37).half()
    alpha = torch.tensor(1.0).half()
    found = read(named("linear", lora_up__weight=up, lora_down__weight=down, alpha=alpha))
    exact = (up.double() @ down.double() / 128).float()
    delta, _ = found[layers["linear"]].delta(layers["linear"])
    torch.testing.assert_close(delta, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_lora_of_three_factors_is_their_tucker_product(read, layers, with_bias):
    up, down, mid = random(OUT, R, 1, 1), random(R, IN, 1, 1), random(R, R, 3, 3)
    names = {"lora_up__weight": up, "lora_down__weight": down, "lora_mid__weight": mid}
    if with_bias:
        names["diff_b"] = random(OUT)
    network = read(named("conv", **names, alpha=torch.tensor(6.0)))[layers["conv"]]
    x = random(2, IN, 5, 5)
    steps = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid)
    expected = 2 * torch.nn.functional.conv2d(steps, up)
    delta, bias = network.delta(layers["conv"])
    torch.testing.assert_close(torch.nn.functional.conv2d(x, delta), expected, rtol=1e-3, atol=1e-3)
    assert (bias is not None) == with_bias


def with_adapter(config):
    """Return layers that peft has adapted at random, and the adapter's tensors."""
    parts = make_layers()
    adapted = torch.nn.ModuleDict({name: parts[name] for name in KERNELS})
    inject_adapter_in_model(config, adapted)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in adapted.named_parameters():
        if re.search("lora_|hada_|lokr_", key):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * 1.3 if "magnitude" in key else noise
    return adapted, get_peft_model_state_dict(adapted)


TARGETS = {"target_modules": list(KERNELS)}
PEFT = {
    "lora": LoraConfig(r=R, lora_alpha=7, **TARGETS),
    "rslora": LoraConfig(r=R, lora_alpha=7, use_rslora=True, **TARGETS),
    "patterns": LoraConfig(
        r=R, lora_alpha=7, rank_pattern={"conv": 2}, alpha_pattern={"point": 5}, **TARGETS
    ),
    "dora": LoraConfig(r=R, lora_alpha=7, use_dora=True, **TARGETS),
    "loha": LoHaConfig(r=R, alpha=7, **TARGETS),
    "loha_tucker": LoHaConfig(r=R, alpha=7, use_effective_conv2d=True, **TARGETS),
    "lokr": LoKrConfig(r=1, alpha=7, decompose_both=True, **TARGETS),
    "lokr_tucker": LoKrConfig(r=1, alpha=7, use_effective_conv2d=True, **TARGETS),
    "lokr_full": LoKrConfig(r=R, alpha=7, **TARGETS),
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_network_of_peft_changes_the_weights_as_peft_merges_it(tmp_path, layers, kind):
    adapted, tensors = with_adapter(PEFT[kind])
    tensors = {f"base_model.model.{key}": w.contiguous() for key, w in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {k: v for k, v in PEFT[kind].to_dict().items() if not isinstance(v, set)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, default=str))
    network = read_network(str(tmp_path / "adapter_model.safetensors"), layers)
    for name in KERNELS:
        adapted[name].merge()
        delta, _ = network[layers[name]].delta(layers[name])
        merged = adapted[name].get_base_layer().weight
        torch.testing.assert_close(layers[name].weight + delta, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", KERNELS)
@pytest.mark.parametrize("by", ["output", "input", "output_flat"])
def test_a_dora_has_the_trained_magnitudes_by_output_or_by_input(read, layers, layer, by):
    up, down, product = lora_of(layer)
    weight = layers[layer].weight.detach()
    ones = [1] * (weight.ndim - 2)
    shape = {"output": (OUT, 1, *ones), "input": (1, IN, *ones), "output_flat": (OUT,)}[by]
    magnitude = random(*shape).abs() + 1
    names = {"lora_up__weight": up, "lora_down__weight": down, "dora_scale": magnitude}
    delta, _ = read(named(layer, **names))[layers[layer]].delta(layers[layer])
    changed = weight + product
    axis = 1 if by == "input" else 0
    for i, size in enumerate(magnitude.flatten()):
        expected = changed.select(axis, i) * size / changed.select(axis, i).norm()
        torch.testing.assert_close((weight + delta).select(axis, i), expected)


def test_a_loha_and_a_lokr_of_lycoris_have_their_alphas_in_the_file(read, layers):
    a, b, c, d = random(OUT, R), random(R, IN * 9), random(OUT, R) + 1, random(R, IN * 9) - 1
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    one, two = random(2, 3), random(4, 4)
    file = named("conv", **loha, alpha=torch.tensor(1.5))
    file |= named("linear", lokr_w1=one, lokr_w2=two, alpha=torch.tensor(5e9))
    left, right = random(4, 1), random(1, 4)
    file |= named(
        "bare", lokr_w1=one.clone(), lokr_w2_a=left, lokr_w2_b=right, alpha=torch.tensor(0.5)
    )
    network = read(file)
    delta, _ = network[layers["conv"]].delta(layers["conv"])
    torch.testing.assert_close(delta, (0.5 * (a @ b) * (c @ d)).reshape(OUT, IN, 3, 3))
    delta, _ = network[layers["linear"]].delta(layers["linear"])
    blocks = [torch.cat([one[i, j] * two for j in range(3)], 1) for i in range(2)]
    torch.testing.assert_close(delta, torch.cat(blocks))  # no factor has a rank: alpha is unused
    delta, _ = network[layers["bare"]].delta(layers["bare"])
    torch.testing.assert_close(delta, 0.5 * torch.kron(one, left @ right))


@pytest.mark.parametrize("layer", KERNELS)
@pytest.mark.parametrize("on_input", [0, 1])
def test_an_ia3_scales_inputs_or_outputs(read, layers, layer, on_input):
    size = IN if on_input else OUT
    shape = (size,) if layer == "linear" else (1, size, 1, 1)
    scales = random(*shape)
    delta, _ = read(named(layer, weight=scales, on_input=torch.tensor(on_input)))[
        layers[layer]
    ].delta(layers[layer])
    side = "oi...,i->oi..." if on_input else "oi...,o->oi..."
    torch.testing.assert_close(delta, torch.einsum(side, layers[layer].weight, scales.flatten()))


def test_full_differences_norms_and_biases_are_added_as_they_are(read, layers):
    file = named("conv", diff=random(OUT, IN, 3, 3), diff_b=random(OUT))
    file |= named("norm", w_norm=random(OUT), b_norm=random(OUT) + 1)
    file |= named("layer_norm", b_norm=random(OUT) + 2)
    file |= named("linear", diff_b=random(OUT) + 3)
    network = read(file)
    for name, weight, bias in [
        ("conv", "diff", "diff_b"),
        ("norm", "w_norm", "b_norm"),
        ("layer_norm", None, "b_norm"),
        ("linear", None, "diff_b"),
    ]:
        delta, delta_bias = network[layers[name]].delta(layers[name])
        expected = file[f"lora_unet_{name}.{weight}"] if weight else torch.zeros_like(delta)
        assert torch.equal(delta, expected)
        assert torch.equal(delta_bias, file[f"lora_unet_{name}.{bias}"])


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (
            {"lora_unet_other.lora_up.weight": (OUT, R)},
            "1 of its 1 weights fit no layer, the first is",
        ),
        ({"lora_te2_text_model_linear.alpha": ()}, "lora_te2_text_model_linear.alpha"),
        ({"emb_params": (2, 32)}, "emb_params"),
        ({}, "0 of its 0 weights fit no layer"),
        ({"linear.lora_up.weight": (OUT, R)}, "linear has up, which is no known kind"),
        ({"linear.oft_blocks": (2, 4, 4)}, "linear.oft_blocks"),
        (
            {"linear.lora_up.weight": (OUT, R), "linear.lora_down.weight": (R, 99)},
            r"linear = .*\(3, 99\).*must fit the layer's weight, \(8, 12\)",
        ),
        (
            {"linear.lora_up.weight": (IN, R), "linear.lora_down.weight": (R, OUT)},
            "must fit the layer's weight",
        ),
        (
            {"linear.lora_up.weight": (OUT, R), "linear.lora_down.weight": (2, IN)},
            "must fit the layer's weight",
        ),
        ({"linear.diff": (OUT, IN), "linear.dora_scale": (5, 1)}, "must fit the layer's weight"),
        ({"linear.diff": (OUT, IN), "lora_unet_linear.diff": (OUT, IN)}, "appears twice"),
    ],
)
def test_a_file_that_does_not_fit_is_rejected_by_the_name_in_it(read, tensors, reason):
    def read_and_use():
        for layer, network in read({key: random(*s) for key, s in tensors.items()}).items():
            network.delta(layer)

    with pytest.raises(ValueError, match=reason):
        read_and_use()


def test_numbers_that_are_not_finite_are_rejected(read, layers):
    diff = random(OUT, IN)
    diff[1, 1] = float("nan")
    with pytest.raises(ValueError, match="linear holds numbers that are not finite"):
        read({"linear.diff": diff})[layers["linear"]].delta(layers["linear"])


def test_a_file_of_torch_save_is_read_like_another(tmp_path, layers):
    up, down, product = lora_of("linear")
    file = {"unet.linear.lora.up.weight": up, "unet.linear.lora.down.weight": down}
    torch.save(file, tmp_path / "pytorch_lora_weights.bin")
    network = read_network(str(tmp_path / "pytorch_lora_weights.bin"), layers)
    torch.testing.assert_close(network[layers["linear"]].delta(layers["linear"])[0], product)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "encoder.layers.1.self_attn"
NAMES = {  # the layer of a file -> the layer of the model
    f"lora_unet_{ATTENTION.replace('.', '_')}_to_q": f"unet.{ATTENTION}.to_q",
    f"lycoris_{ATTENTION.replace('.', '_')}_to_out_0": f"unet.{ATTENTION}.to_out.0",
    f"unet.{ATTENTION}.to_k": f"unet.{ATTENTION}.to_k",
    f"unet.{ATTENTION}.processor.to_v": f"unet.{ATTENTION}.to_v",
    f"{ATTENTION}.processor.to_out": f"unet.{ATTENTION}.to_out.0",
    f"base_model.model.{ATTENTION}.to_q": f"unet.{ATTENTION}.to_q",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": f"unet.{ATTENTION}.to_q",
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": f"unet.{ATTENTION}.to_q",
    "model.diffusion_model.input_blocks.1.1.proj_in": "unet.down_blocks.0.attentions.0.proj_in",
    "lora_te_text_model_encoder_layers_1_self_attn_q_proj": f"text_encoder.{TEXT}.q_proj",
    f"text_encoder.text_model.{TEXT}.k_proj": f"text_encoder.{TEXT}.k_proj",
    f"text_encoder.text_model.{TEXT}.to_out": f"text_encoder.{TEXT}.out_proj",
    f"text_encoders.clip_l.transformer.text_model.{TEXT}.v_proj": f"text_encoder.{TEXT}.v_proj",
    f"cond_stage_model.transformer.text_model.{TEXT}.v_proj": f"text_encoder.{TEXT}.v_proj",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_encoder.encoder.layers.0.mlp.fc1",
    "lora_te_text_model_final_layer_norm": "text_encoder.final_layer_norm",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_known_by_the_names_of_all_trainers(model, name):
    part, _, rest = NAMES[name].partition(".")
    expected = getattr(model, part).get_submodule(rest)
    assert layers_of(model.unet, model.text_encoder)[plain_name(name)] is expected


def test_each_layer_of_the_unet_is_known_by_its_name_in_the_original_release(model):
    layers = layers_of(model.unet, model.text_encoder)
    config = model.unet.config
    for name, module in model.unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm)):
            original = tiny._unet_key(
                f"{name}.weight", config.layers_per_block, len(config.block_out_channels)
            )
            assert layers[plain_name(original.removesuffix(".weight"))] is module
