"""Parts of a model that were distilled to few steps, recognised by their files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sdbatch.job import Model
from sdbatch.models.distilled import find_distilled
from tests.models.load import find

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def write_lora(path, **metadata):
    path.parent.mkdir(exist_ok=True)
    tensors = {
        f"{LAYER}.lora_up.weight": torch.zeros(32, 2),
        f"{LAYER}.lora_down.weight": torch.zeros(2, 768),  # as wide as Stable Diffusion 1.x's text
    }
    save_file(tensors, path, metadata)
    return str(path)


def distilled(model_path, **settings):
    files = find(model_path, **settings)
    return [str(each) for each in find_distilled(files.settings, files)]


def test_a_lora_is_recognised_by_the_name_of_its_file_or_folder(tiny_model, tmp_path):
    loras = [
        {"path": write_lora(tmp_path / "style.safetensors")},
        {"path": write_lora(tmp_path / "Hyper-SD15-4steps-lora.safetensors"), "name": "fast"},
        {"path": write_lora(tmp_path / "tcd" / "pytorch_lora_weights.safetensors")},
        {"path": write_lora(tmp_path / "lcm" / "fur.safetensors")},  # a folder of many
        {"path": write_lora(tmp_path / "lcm.safetensors"), "weight": 0},
    ]
    assert distilled(tiny_model, loras=loras) == [
        "model.loras.1, a Hyper-SD by its name",
        "model.loras.2, a TCD by its name",
    ]


@pytest.mark.parametrize("key", ["modelspec.title", "ss_output_name"])
def test_a_lora_is_recognised_by_the_title_in_its_metadata(tiny_model, tmp_path, key):
    path = write_lora(tmp_path / "renamed.safetensors", **{key: "LCM of my model"})
    assert distilled(tiny_model, loras=[{"path": path}]) == [f"model.loras.0, an LCM by its {key}"]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ("LCMScheduler", ["model.path, an LCM by its LCMScheduler"]),
        ("TCDScheduler", ["model.path, a TCD by its TCDScheduler"]),
        ("PNDMScheduler", []),
    ],
)
def test_a_model_is_recognised_by_its_scheduler(copied, scheduler, words):
    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler]
    (copied / "model_index.json").write_text(json.dumps(index))
    assert distilled(copied) == words


def test_names_alone_count_of_files_that_are_on_another_machine():
    model = Model(
        path="me/dreamshaper-lcm",
        loras=[{"path": "latent-consistency/lcm-lora-sdv1-5", "name": "l"}],
    )
    found = find_distilled(model, None)
    assert [str(each) for each in found] == [
        "model.path, an LCM by its name",
        "model.loras.0, an LCM by its name",
    ]
    assert [each.applies({}) for each in found] == [True, False]
    assert [each.applies({"l": 0.0}) for each in found] == [True, False]
    assert [each.applies({"l": 1.0}) for each in found] == [True, True]
