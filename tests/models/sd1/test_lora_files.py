"""LoRA files of every kind and naming: what a plan lets pass is loaded, the rest is refused."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from sdbatch.errors import ModelError
from sdbatch.job import Job
from sdbatch.job.sections import Embedding, Lora
from sdbatch.models.build import Build
from sdbatch.models.sd1.layers import layers_of, plain_name
from sdbatch.models.sd1.networks import read_network
from sdbatch.submit.pack import files_to_send
from tests.models.load import find, load, unhashed

R = 2
LORA_OF_PEFT = "lora/adapter_model.safetensors"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
LAYERS = {
    "kohya": f"lora_unet_{LAYER.replace('.', '_')}",
    "kohya of the original names": f"lora_unet_{ORIGINAL.replace('.', '_')}",
    "lycoris": f"lycoris_{LAYER.replace('.', '_')}",
    "diffusers": f"unet.{LAYER}",
    "peft": f"base_model.model.{LAYER}",
    "comfyui": f"diffusion_model.{ORIGINAL}",
    "checkpoint": f"model.diffusion_model.{ORIGINAL}",
}
KINDS = {  # the tensors of a layer of O outputs and I inputs
    "LoRA": {"lora_up.weight": "OR", "lora_down.weight": "RI", "alpha": ""},
    "LoRA of peft": {"lora_B.weight": "OR", "lora_A.weight": "RI"},
    "LoRA of diffusers": {"lora.up.weight": "OR", "lora.down.weight": "RI"},
    "DoRA": {"lora_up.weight": "OR", "lora_down.weight": "RI", "dora_scale": "O1"},
    "DoRA of peft": {"lora_B.weight": "OR", "lora_A.weight": "RI", "lora_magnitude_vector": "O"},
    "LoHa": {"hada_w1_a": "OR", "hada_w1_b": "RI", "hada_w2_a": "OR", "hada_w2_b": "RI"},
    "LoKr": {"lokr_w1": "11", "lokr_w2": "OI"},
    "LoKr of factors": {"lokr_w1": "11", "lokr_w2_a": "OR", "lokr_w2_b": "RI"},
    "IA3": {"weight": "O", "on_input": ""},
    "full difference": {"diff": "OI", "diff_b": "O"},
}
OTHER_KINDS = {
    "OFT": {"oft_blocks": "ROO"},
    "OFT of LyCORIS": {"oft_diag": "ROO"},
    "OFT of peft": {"oft_R.weight": "ROO"},
    "BOFT of peft": {"boft_R": "ROO", "boft_s": "O1"},
    "GLoRA": {"a1.weight": "RI", "a2.weight": "IR", "b1.weight": "RI", "b2.weight": "OR"},
    "a file of two kinds": {"lora_up.weight": "OR", "lora_down.weight": "RI", "oft_diag": "ROO"},
}
FIRST_OF_SDXL = "unet.down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_q"
OTHER_MODELS = {  # a layer's name, the inputs of a LoRA for it -> the words
    "the second text encoder": ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 32, "of SDXL"),
    "the second transformer": (FIRST_OF_SDXL.format(1), 640, "of SDXL"),
    "its names of lycoris": (f"lycoris_{FIRST_OF_SDXL[5:].format(9)}".replace(".", "_"), 9, "SDXL"),
    "its names of comfyui": (
        "diffusion_model.middle_block.1.transformer_blocks.3.attn1.to_q",
        1280,
        "of SDXL",
    ),
    "text of width 2048": (f"unet.{LAYER.replace('attn1.to_q', 'attn2.to_k')}", 2048, "of SDXL"),
    "text of width 1024": (f"unet.{LAYER.replace('attn1.to_q', 'attn2.to_k')}", 1024, "n 2.x"),
    "flux": ("diffusion_model.double_blocks.0.img_attn.qkv", 64, "of Flux"),
    "sd3": ("transformer.transformer_blocks.0.attn.to_q", 64, "of Stable Diffusion 3"),
}


@pytest.fixture
def layer(model):
    return model.unet.get_submodule(LAYER)


def write(path, name, kind, layer):
    """Write what a kind has for a layer of the model, under its name in the file."""
    sides = {"O": layer.out_features, "I": layer.in_features, "R": R, "1": 1}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{end}": torch.rand([sides[i] for i in shape], generator=generator) + 0.1
        for end, shape in kind.items()
    }
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return [Lora(path=str(path))]


@pytest.mark.parametrize("name", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_plan_lets_every_kind_and_naming_pass_that_is_fused(
    tiny_model, model, tmp_path, kind, name
):
    layers = layers_of(model.unet, model.text_encoder)
    layer = layers[plain_name(LAYER)]
    for suffix in ("safetensors", "pt"):
        loras = write(tmp_path / f"x.{suffix}", name, kind, layer)
        (found,) = find(tiny_model, loras=loras).settings.loras
        delta, _ = read_network(found.path, layers)[layer].delta(layer)
        assert delta.abs().max() > 0


@pytest.mark.parametrize("name", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_plan_names_a_kind_that_cannot_be_fused(tiny_model, tmp_path, layer, kind, name):
    shapes = OTHER_KINDS[kind]
    loras = write(tmp_path / "x.safetensors", name, shapes, layer)
    word = "GLoRA" if kind == "GLoRA" else "OFT"
    reason = (
        rf"^model.loras.0.path = .*: is a LoRA \({word}\).*: must be one of the kinds LoRA, DoRA"
    )
    with pytest.raises(ModelError, match=reason) as refused:
        find(tiny_model, loras=loras)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_plan_names_the_model_that_a_lora_is_for(tiny_model, tmp_path, case):
    name, inputs, words = OTHER_MODELS[case]
    tensors = {f"{name}.lora_up.weight": torch.ones(8, R)}
    tensors[f"{name}.lora_down.weight"] = torch.ones(R, inputs)
    save_file(tensors, tmp_path / "x.safetensors")
    reason = f"^model.loras.0.path = .*: is a LoRA .*{words}.*must be a LoRA of Stable Diffusion 1"
    with pytest.raises(ModelError, match=reason):
        find(tiny_model, loras=[Lora(path=str(tmp_path / "x.safetensors"))])


def write_peft(folder, layer, suffix="safetensors"):
    """Write a LoRA of peft with the scale 3, as its configuration says."""
    folder.mkdir()
    write(folder / f"adapter_model.{suffix}", LAYERS["peft"], KINDS["LoRA of peft"], layer)
    (folder / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": 3 * R}))
    return folder / f"adapter_model.{suffix}"


@pytest.mark.parametrize("name", ["adapter_model", "style"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_configuration_of_peft_scales_a_lora_and_belongs_to_its_identity(
    tiny_model, model, tmp_path, layer, name, suffix
):
    file = write_peft(tmp_path / "lora", layer, suffix)
    file = file.rename(file.with_stem(name))
    layers = layers_of(model.unet, model.text_encoder)
    assert read_network(str(file), layers)[layer].scale == 3
    files = find(tiny_model, loras=[Lora(path=str(file))])
    assert unhashed(files, (tmp_path / "lora").iterdir()) == []


def test_a_file_that_links_into_the_hubs_cache_has_the_configuration_next_to_the_link(
    tiny_model, model, tmp_path, layer
):
    blob = write_peft(tmp_path / "lora", layer).rename(tmp_path / "0123abcd")
    link = tmp_path / "lora" / "adapter_model.safetensors"
    link.symlink_to(os.path.relpath(blob, link.parent))
    (found,) = find(tiny_model, loras=[Lora(path=str(link))]).settings.loras
    layers = layers_of(model.unet, model.text_encoder)
    assert read_network(found.path, layers)[layer].scale == 3


def test_the_configuration_of_peft_is_sent_with_a_job(tmp_path, monkeypatch, layer):
    monkeypatch.chdir(tmp_path)
    write_peft(tmp_path / "lora", layer)
    job = Job.model_validate(
        {
            "prompts": {"rows": [{"prompt": "a"}]},
            "model": {"path": "builtin:shapes", "loras": [{"path": LORA_OF_PEFT}]},
            "output": {"path": "s3://bucket/out"},
        }
    )
    assert set(files_to_send(job)) == {LORA_OF_PEFT, "lora/adapter_config.json"}


def test_a_pickle_may_hold_more_than_the_tensors_of_a_lora(tmp_path, model, layer):
    weights = {f"{LAYERS['kohya']}.diff": torch.ones(layer.weight.shape)}
    torch.save({"state_dict": weights | {"version": "1"}, "epoch": 3}, tmp_path / "x.pt")
    network = read_network(str(tmp_path / "x.pt"), layers_of(model.unet, model.text_encoder))
    assert torch.equal(network[layer].delta(layer)[0], weights[f"{LAYERS['kohya']}.diff"])


def test_a_lora_or_an_embedding_that_leaves_the_range_of_the_dtype_is_named(
    tiny_model, tmp_path, layer
):
    build = Build("cpu", "float16")
    save_file(
        {f"{LAYERS['kohya']}.diff": torch.full(layer.weight.shape, 7e4)},
        tmp_path / "x.safetensors",
    )
    loras = [Lora(path=str(tmp_path / "x.safetensors"))]
    reason = rf"^model.loras = .*unet.{LAYER}.weight holds values that are not finite in float16"
    with pytest.raises(ModelError, match=reason):
        load(tiny_model, build, loras=loras)
    save_file({"<a>": torch.full((32,), math.nan)}, tmp_path / "word.safetensors")
    word = Embedding(path=str(tmp_path / "word.safetensors"), token="<a>")
    with pytest.raises(ModelError, match=r"^model.embeddings.0.path = .*text_encoder.*not finite"):
        load(tiny_model, build, embeddings=[word])
