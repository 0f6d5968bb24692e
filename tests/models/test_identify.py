"""What a file of weights is, by the names and shapes that each tool writes."""

import pytest

from sdbatch.models import identify
from sdbatch.models.headers import Header, Tensor
from sdbatch.models.identify import (
    CHECKPOINT,
    EMBEDDING,
    FLUX,
    LORA,
    OTHER,
    REFINER,
    SD1,
    SD2,
    SD3,
    SDXL,
    TEXT_ENCODER,
    UNET,
    VAE,
)

LDM, TEXT = "model.diffusion_model.", "cond_stage_model."
FIRST_STAGE = "first_stage_model."
BLOCK = "input_blocks.1.1.transformer_blocks.0"


def unet(width, channels=4, prefix=LDM, **more):
    """Return some tensors of a UNet in the original layout."""
    tensors = {
        f"{prefix}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{prefix}time_embed.0.weight": (1280, 320),
        f"{prefix}{BLOCK}.attn2.to_k.weight": (320, width),
    }
    return tensors | {f"{prefix}{name}": shape for name, shape in more.items()}


def diffusers_unet(width, channels=4):
    return {
        "conv_in.weight": (320, channels, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, width),
    }


def vae(prefix="", channels=4):
    return {
        f"{prefix}encoder.conv_in.weight": (128, 3, 3, 3),
        f"{prefix}decoder.conv_in.weight": (512, channels, 3, 3),
    }


def clip(prefix, width=768):
    return {f"{prefix}embeddings.token_embedding.weight": (49408, width)}


CLIP_1 = clip(f"{TEXT}transformer.text_model.")
OPEN_CLIP = {f"{TEXT}model.token_embedding.weight": (49408, 1024)}
SDXL_TEXT = {
    **clip("conditioner.embedders.0.transformer.text_model."),
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
}
SDXL_UNET = unet(2048, **{"label_emb.0.0.weight": (1280, 2816)})
SD15 = unet(768) | CLIP_1 | vae(FIRST_STAGE)
CHECKPOINTS = {
    "sd15": (SD15, CHECKPOINT, SD1, "a Stable Diffusion 1.x checkpoint"),
    "sd15 with averages": (
        SD15 | {"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3)},
        CHECKPOINT,
        SD1,
        "a Stable Diffusion 1.x checkpoint",
    ),
    "nai": (
        unet(768) | clip(f"{TEXT}transformer.") | vae(FIRST_STAGE),
        CHECKPOINT,
        SD1,
        "a Stable Diffusion 1.x checkpoint",
    ),
    "sd15 without vae": (unet(768) | CLIP_1, CHECKPOINT, SD1, "a Stable Diffusion 1.x checkpoint"),
    "sd15 in small": (
        unet(32) | CLIP_1 | vae(FIRST_STAGE),
        CHECKPOINT,
        SD1,
        "a Stable Diffusion 1.x checkpoint",
    ),
    "sd15 inpainting": (
        unet(768, 9) | CLIP_1,
        CHECKPOINT,
        SD1,
        "a Stable Diffusion 1.x checkpoint for inpainting (9 channels)",
    ),
    "sd15 instruct-pix2pix": (unet(768, 8) | CLIP_1, CHECKPOINT, SD1, "for editing (8 channels)"),
    "depth": (unet(768, 5) | CLIP_1, CHECKPOINT, SD1, "for depth (5 channels)"),
    "sd2 depth": (unet(1024, 5) | OPEN_CLIP, CHECKPOINT, SD2, "for depth (5 channels)"),
    "x4 upscaler": (unet(1024, 7) | OPEN_CLIP, CHECKPOINT, SD2, "for upscaling (7 channels)"),
    "6 channels": (unet(768, 6) | CLIP_1, CHECKPOINT, SD1, "for other inputs (6 channels)"),
    "sd21": (
        unet(1024) | OPEN_CLIP | vae(FIRST_STAGE),
        CHECKPOINT,
        SD2,
        "a Stable Diffusion 2.x checkpoint",
    ),
    "sd2 inpainting": (
        unet(1024, 9) | OPEN_CLIP,
        CHECKPOINT,
        SD2,
        "a Stable Diffusion 2.x checkpoint for inpainting",
    ),
    "sdxl": (SDXL_UNET | SDXL_TEXT | vae(FIRST_STAGE), CHECKPOINT, SDXL, "an SDXL checkpoint"),
    "sdxl inpainting": (
        unet(2048, 9, **{"label_emb.0.0.weight": (1280, 2816)}) | SDXL_TEXT,
        CHECKPOINT,
        SDXL,
        "an SDXL checkpoint for inpainting",
    ),
    "sdxl refiner": (
        unet(1280, **{"label_emb.0.0.weight": (1536, 2560)})
        | {"conditioner.embedders.0.model.token_embedding.weight": (49408, 1280)},
        CHECKPOINT,
        REFINER,
        "an SDXL refiner checkpoint",
    ),
    "sd3": ({f"{LDM}joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, OTHER, SD3, "Diffusion 3"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, OTHER, FLUX, "a Flux model"),
    "flux of comfyui": ({f"{LDM}double_blocks.0.img_attn.qkv.weight": (1, 1)}, OTHER, FLUX, "Flux"),
    "pixart": ({"adaln_single.linear.weight": (1, 1)}, OTHER, "PixArt", "a PixArt model"),
    "wan": ({"blocks.0.self_attn.k.weight": (1, 1)}, OTHER, "", "a video or image transformer"),
}
PARTS = {
    "unet of sd15": (unet(768), UNET, SD1, "a Stable Diffusion 1.x UNet alone"),
    "unet of sdxl": (SDXL_UNET, UNET, SDXL, "an SDXL UNet alone"),
    "bare unet of sd15": (unet(768, prefix=""), UNET, SD1, "UNet alone"),
    "diffusers unet": (diffusers_unet(768), UNET, SD1, "a Stable Diffusion 1.x UNet alone"),
    "diffusers unet of sd2": (diffusers_unet(1024), UNET, SD2, "a Stable Diffusion 2.x UNet"),
    "diffusers unet of sdxl": (
        diffusers_unet(2048) | {"add_embedding.linear_1.weight": (1280, 2816)},
        UNET,
        SDXL,
        "an SDXL UNet alone",
    ),
    "diffusers inpainting unet": (
        diffusers_unet(768, 9),
        UNET,
        SD1,
        "UNet alone for inpainting (9 channels), without",
    ),
    "vae": (vae(), VAE, "", "a VAE"),
    "vae with its prefix": (vae(FIRST_STAGE), VAE, "", "a VAE"),
    "vae with its loss": (vae() | {"loss.logvar": ()}, VAE, "", "a VAE"),
    "vae of sd3": (vae(channels=16), VAE, SD3, "a VAE of 16 latent channels"),
    "clip of sd1": (clip("text_model."), TEXT_ENCODER, SD1, "a text encoder of Stable Diffusion 1"),
    "clip of sd2": (clip("text_model.", 1024), TEXT_ENCODER, SD2, "a text encoder of"),
    "clip of sdxl": (clip("text_model.", 1280), TEXT_ENCODER, SDXL, "a text encoder of SDXL alone"),
    "flat clip": (clip(""), TEXT_ENCODER, SD1, "a text encoder"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.k.weight": (1, 1)}, OTHER, "", "a T5"),
    "clip vision": ({"vision_model.embeddings.x": (1,)}, OTHER, "", "an image encoder of CLIP"),
    "safety checker": (
        {"concept_embeds": (17, 768), "vision_model.vision_model.x": (1,)},
        OTHER,
        "",
        "a safety checker",
    ),
    "controlnet": (
        {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3), "control_model.zero_convs.0": ()},
        OTHER,
        "",
        "a ControlNet",
    ),
    "controlnet of diffusers": (
        diffusers_unet(768) | {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
        OTHER,
        SD1,
        "a Stable Diffusion 1.x ControlNet",
    ),
    "t2i adapter": ({"adapter.body.0.resnets.0.block1.weight": (1,)}, OTHER, "", "a T2I-Adapter"),
    "ip adapter": ({"image_proj.proj.weight": (1,)}, OTHER, "", "an IP-Adapter"),
    "motion module": (
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (1,)},
        OTHER,
        "",
        "a motion module",
    ),
    "esrgan": ({"model.1.sub.0.RDB1.conv1.0.weight": (1,)}, OTHER, "", "an upscaler"),
    "new esrgan": ({"body.0.rdb1.conv1.weight": (1,)}, OTHER, "", "an upscaler"),
    "real esrgan": ({"params_ema.conv_first.weight": (1,)}, OTHER, "", "an upscaler"),
    "taesd": (
        {"decoder.layers.0.weight": (64, 4, 3, 3), "decoder.layers.2.conv.0.weight": (1,)},
        VAE,
        "",
        "a small VAE (TAESD)",
    ),
    "taesd's decoder": (
        {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)},
        VAE,
        "",
        "a small VAE (TAESD)",
    ),
    "taesd's encoder": (
        {"0.weight": (64, 3, 3, 3), "1.conv.0.weight": (64, 64, 3, 3)},
        OTHER,
        "",
        "an encoder of a small VAE (TAESD), without its decoder",
    ),
    "taesd of sd3": (
        {"1.weight": (64, 16, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)},
        VAE,
        SD3,
        "a small VAE (TAESD) of 16 latent channels",
    ),
    "hypernetwork": ({"768.0.linear.0.weight": (1,)}, OTHER, "", "a hypernetwork"),
    "nothing": ({}, OTHER, "", "a file without tensors"),
    "unknown": ({"layer.3.gamma": (1,), "layer.3.beta": (1,)}, OTHER, "", "no model of a known"),
}
K1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
Q1 = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
ATTN1 = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
LORAS = {
    "kohya sd1": ({f"{K1}.lora_down.weight": (8, 768)}, SD1, "a LoRA of Stable Diffusion 1.x"),
    "kohya sd2": ({f"{K1}.lora_down.weight": (8, 1024)}, SD2, "a LoRA of Stable Diffusion 2.x"),
    "kohya sdxl": ({f"{K1}.lora_down.weight": (8, 2048)}, SDXL, "a LoRA of SDXL"),
    "kohya text of sd1": ({f"{Q1}.lora_down.weight": (8, 768)}, SD1, "a LoRA of"),
    "kohya text of sd2": ({f"{Q1}.lora_down.weight": (8, 1024)}, SD2, "a LoRA of"),
    "kohya text of sdxl": ({f"{Q1}.lora_down.weight".replace("te", "te1", 1): (8, 768)}, SDXL, "a"),
    "kohya sdxl of sgm names": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 2048)},
        SDXL,
        "a LoRA of SDXL",
    ),
    "kohya sdxl without cross attention": (
        {"lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_up.weight": (1280, 8)},
        SDXL,
        "a LoRA of SDXL",
    ),
    "no layer that tells": ({f"{ATTN1}.lora_down.weight": (8, 1280)}, "", "a LoRA"),
    "convolution with mid": ({f"{K1}.lora_mid.weight": (8, 8, 3, 3)}, "", "a LoRA"),
    "diffusers": ({f"unet.{PEFT}.lora_A.weight": (8, 768)}, SD1, "a LoRA of"),
    "diffusers sdxl": ({f"unet.{PEFT}.lora_A.weight": (8, 2048)}, SDXL, "a LoRA of SDXL"),
    "old diffusers": ({f"unet.{PEFT}.lora.down.weight": (8, 768)}, SD1, "a LoRA of"),
    "oldest diffusers": (
        {
            "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (
                4,
                768,
            )
        },
        SD1,
        "a LoRA of",
    ),
    "peft": ({f"base_model.model.{PEFT}.lora_A.weight": (8, 768)}, SD1, "a LoRA of"),
    "peft with an adapter's name": ({f"unet.{PEFT}.lora_A.default.weight": (8, 768)}, SD1, "a"),
    "comfyui": (
        {f"diffusion_model.{BLOCK}.attn2.to_k.lora_down.weight": (8, 768)},
        SD1,
        "a LoRA of",
    ),
    "second text encoder": (
        {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": (8, 1280)},
        SDXL,
        "a LoRA of SDXL",
    ),
    "flux of kohya": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (8, 1)},
        FLUX,
        "",
    ),
    "flux of diffusers": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (8, 1)},
        FLUX,
        "a LoRA of Flux",
    ),
    "sd3": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (8, 1)}, SD3, ""),
    "dora": (
        {f"{K1}.lora_down.weight": (8, 768), f"{K1}.dora_scale": (1, 768)},
        SD1,
        "a LoRA (DoRA) of Stable Diffusion 1.x",
    ),
    "dora of peft": (
        {f"unet.{PEFT}.lora_A.weight": (8, 768), f"unet.{PEFT}.lora_magnitude_vector": (320,)},
        SD1,
        "a LoRA (DoRA) of",
    ),
    "loha": ({f"{K1}.hada_w1_a": (320, 8), f"{K1}.hada_w1_b": (8, 768)}, SD1, "a LoRA (LoHa)"),
    "loha sdxl": ({f"{K1}.hada_w1_b": (8, 2048)}, SDXL, "a LoRA (LoHa) of SDXL"),
    "lokr": ({f"{K1}.lokr_w1": (4, 8), f"{K1}.lokr_w2": (80, 96)}, SD1, "a LoRA (LoKr)"),
    "lokr in factors": (
        {f"{K1}.lokr_w1": (4, 16), f"{K1}.lokr_w2_a": (80, 8), f"{K1}.lokr_w2_b": (8, 128)},
        SDXL,
        "a LoRA (LoKr) of SDXL",
    ),
    "ia3": ({f"{K1}.weight": (320,), f"{K1}.on_input": ()}, "", "a LoRA (IA3)"),
    "oft": ({f"{K1}.oft_blocks": (4, 80, 80)}, "", "a LoRA (OFT)"),
    "full": (
        {f"{K1}.diff": (320, 768), f"{K1}.diff_b": (320,)},
        SD1,
        "(full difference) of Stable",
    ),
    "norms": ({"lora_unet_conv_norm_out.w_norm": (320,)}, "", "a LoRA (full difference)"),
}
EMBEDDINGS = {
    "diffusers": ({"<cat-toy>": (768,)}, SD1, "an embedding of Stable Diffusion 1.x"),
    "diffusers of sd2": ({"<cat-toy>": (1024,)}, SD2, "an embedding of Stable Diffusion 2.x"),
    "a1111 safetensors": ({"emb_params": (8, 768)}, SD1, "an embedding of"),
    "a1111 pt": ({"string_to_param.*": (8, 768)}, SD1, "an embedding of"),
    "of sd2": ({"emb_params": (8, 1024)}, SD2, "an embedding of Stable Diffusion 2.x"),
    "of sdxl": ({"clip_l": (8, 768), "clip_g": (8, 1280)}, SDXL, "an embedding of SDXL"),
    "half of sdxl": ({"clip_g": (8, 1280)}, SDXL, "an embedding of SDXL"),
    "two words": ({"<a>": (1, 768), "<b>": (768,)}, SD1, "an embedding of"),
    "a bare tensor": ({"": (768,)}, SD1, "an embedding of"),
    "of a small model": ({"emb_params": (2, 32)}, "", "an embedding"),
}
ALL = {
    **CHECKPOINTS,
    **PARTS,
    **{f"lora: {name}": (t, LORA, base, words) for name, (t, base, words) in LORAS.items()},
    **{
        f"embedding: {name}": (t, EMBEDDING, base, words)
        for name, (t, base, words) in EMBEDDINGS.items()
    },
}


def header_of(shapes, **metadata):
    return Header({name: Tensor("F16", shape) for name, shape in shapes.items()}, metadata)


@pytest.mark.parametrize(("shapes", "role", "base", "words"), ALL.values(), ids=ALL)
def test_a_file_is_known_by_the_names_and_shapes_of_its_tensors(shapes, role, base, words):
    kind = identify.identify(header_of(shapes))
    assert (kind.role, kind.base) == (role, base), kind
    assert words in kind.words


@pytest.mark.parametrize(
    ("channels", "use"), [(4, ""), (9, "inpainting"), (8, "editing"), (5, "depth")]
)
def test_the_channels_of_a_unets_input_say_what_it_is_for(channels, use):
    for shapes in (unet(768, channels) | CLIP_1, diffusers_unet(768, channels)):
        assert identify.identify(header_of(shapes)).use == use


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, SD1),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, SD2),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, SDXL),
        ({"ss_base_model_version": "sd_v1"}, SD1),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, SDXL),
        ({"ss_base_model_version": "sd_v2_768_v"}, SD2),
        ({"ss_v2": "True"}, SD2),
        ({"ss_v2": "False"}, ""),
    ],
)
def test_the_metadata_says_what_a_lora_is_for_where_its_layers_do_not(metadata, base):
    shapes = {f"{ATTN1}.lora_down.weight": (8, 1280)}
    assert identify.identify(header_of(shapes, **metadata)).base == base
