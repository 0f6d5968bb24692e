"""What kind of model a file of weights is, by the names and shapes of its tensors.

The names are those of CompVis' and Stability's releases, of diffusers, kohya, LyCORIS, peft and
AUTOMATIC1111, as their own loaders recognise them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sdbatch.models.headers import Header, Tensor

SD1, SD2, SDXL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "SDXL"
REFINER, SD3, FLUX = "SDXL refiner", "Stable Diffusion 3", "Flux"
CHECKPOINT, LORA, EMBEDDING, VAE = "checkpoint", "LoRA", "embedding", "VAE"
UNET, TEXT_ENCODER, OTHER = "UNet", "text encoder", ""
TEXT_TO_IMAGE, INPAINTING, EDITING = "", "inpainting", "editing"
USES = {  # by the channels of a UNet's input
    4: TEXT_TO_IMAGE,
    9: INPAINTING,
    8: EDITING,
    5: "depth",
    7: "upscaling",
}
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
)
AVERAGED_PREFIX = "model_ema."  # before the averaged weights of the original full checkpoints
_BY_WIDTH = {768: SD1, 1024: SD2, 2048: SDXL}  # of the text that a UNet attends to
_ARTICLES = {LORA: "a", CHECKPOINT: "a", EMBEDDING: "an", VAE: "a", UNET: "a"}
# Files of other kinds, by what their names contain.
_OTHERS = (
    ("a ControlNet", r"^control_model\.|(^|\.)input_hint_block\.|controlnet_|zero_convs\."),
    ("a ControlNet as LoRA", r"^lora_controlnet$"),
    ("an IP-Adapter", r"^ip_adapter\.|^image_proj\."),
    ("a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block\d|resnets|in_conv)"),
    ("a motion module of AnimateDiff", r"motion_modules\."),
    ("a safety checker", r"concept_embeds"),
    ("an image encoder of CLIP", r"(^|\.)vision_model\."),
    ("a T5 text encoder", r"encoder\.block\.0\.layer\.0\.SelfAttention"),
    ("an upscaler", r"RRDB_trunk|(^|\.)body\.\d+\.rdb\d|^(params_ema\.)?conv_first\."),
    ("an upscaler", r"model\.1\.sub\.|residual_group\.blocks|^params(_ema)?\."),
    ("a hypernetwork", r"^(320|640|768|1024|1280)\.[01]\.linear"),
)
# A convolution of a TAESD's block: diffusers has the layers of a part in `layers`.
TINY_VAE = r"^((en|de)coder\.layers\.|(taesd_(en|de)coder\.)?)\d+\.conv\.0\.weight$"
DORA = "DoRA"
_NETWORKS = (  # a LoRA's kinds, by the end of their names; the first that matches
    ("OFT", r"\.b?oft_\w+(\.|$)"),
    ("GLoRA", r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$"),
    ("VeRA", r"\.vera_lambda_\w+(\.|$)"),
    ("HRA", r"\.hra_u(\.|$)"),
    ("FourierFT", r"\.fourierft_spectrum(\.|$)"),
    (DORA, r"dora_scale$|lora_magnitude_vector"),
    ("LoHa", r"\.hada_w"),
    ("LoKr", r"\.lokr_w"),
    ("IA3", r"\.on_input$"),
    ("LoRA", r"lora_(down|up|mid|A|B)\b|lora\.(down|up)\.|_lora\.(down|up)|lora_linear"),
    ("full difference", r"\.(diff|diff_b|w_norm|b_norm)$"),
)
# The kinds that can be fused or chosen by row: those of models.sd1.networks.
NETWORKS = ("LoRA", DORA, "LoHa", "LoKr", "IA3", "full difference")
_METADATA = ("modelspec.architecture", "ss_base_model_version", "ss_v2")


@dataclass(frozen=True)
class Kind:
    """What a file is."""

    role: str  # CHECKPOINT, LORA, ...; OTHER
    base: str  # SD1, ...; "" if it does not tell
    words: str  # in an error, such as "an SDXL checkpoint"
    network: str = ""  # of a LoRA: LoRA, DoRA, LoHa, ...
    use: str = TEXT_TO_IMAGE  # of a UNet: what else than text its input is for; one of USES


def identify(header: Header) -> Kind:
    """Return what the file of a header is."""
    tensors = header.tensors
    if not tensors:
        return Kind(OTHER, "", "a file without tensors")
    network = _network_of(tensors)
    if network and not _is_unet(tensors):
        base = _base_of_network(tensors) or _base_of_metadata(header.metadata)
        return Kind(LORA, base, _words(base, LORA, network), network)
    if (kind := _other_architecture(tensors)) is not None:
        return kind
    if _is_unet(tensors):
        return _of_unet(tensors)
    for words, pattern in _OTHERS:
        if _first(tensors, pattern):
            return Kind(OTHER, "", words)
    return _small_vae(tensors) or _of_part(tensors)


def averaged_name(name: str) -> str:
    """Return the name of the averaged weight of a UNet's weight in the original layout."""
    return AVERAGED_PREFIX + name.removeprefix("model.").replace(".", "")


def embedding_words(header: Header) -> list[str]:
    """Return the words of an embedding's file; none if the file does not name them."""
    names = [name for name in header.tensors if not name.startswith("string_to_")]
    return [] if names in ([""], ["emb_params"]) else names


def _is_unet(tensors: dict[str, Tensor]) -> bool:
    """Return whether a file holds a UNet's weights, and not changes to them."""
    begin = r"(^|\.)input_blocks\.0\.0\.weight$|^conv_in\.weight$"
    time = r"^time_embedding\.linear_1\.weight$|(^|\.)time_embed\.0\.weight$"
    return _first(tensors, begin) is not None and _first(tensors, time) is not None


def _of_unet(tensors: dict[str, Tensor]) -> Kind:
    whole = any(name.startswith((UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX)) for name in tensors)
    base = _base_of_unet(tensors)
    channels = _shape(tensors, r"(^|\.)input_blocks\.0\.0\.weight$|^conv_in\.weight$")[1:2]
    use = USES.get(channels[0], "other inputs") if channels else TEXT_TO_IMAGE
    more = f" for {use} ({channels[0]} channels)" if use else ""
    if _first(tensors, r"(^|\.)(control_model|input_hint_block|controlnet_\w+)\."):
        return Kind(OTHER, base, _words(base, "ControlNet"))
    has = {
        part: any(name.startswith(prefix) for name in tensors)
        for part, prefix in (("VAE", VAE_PREFIX), ("text encoder", "cond"))
    }
    if not whole or not any(has.values()):
        words = f"{_words(base, UNET)} alone{more}, without text encoder and VAE"
        return Kind(UNET, base, words, use=use)
    return Kind(CHECKPOINT, base, f"{_words(base, CHECKPOINT)}{more}", use=use)


def _base_of_unet(tensors: dict[str, Tensor]) -> str:
    if _first(tensors, r"^conditioner\.embedders\.1\."):
        return SDXL
    if _first(tensors, r"^cond_stage_model\.model\."):
        return SD2
    width = _shape(tensors, r"attn2\.to_k\.weight$")[1:2]
    if width == (1280,) or _first(tensors, r"^conditioner\."):
        return REFINER
    if _first(tensors, r"(^|\.)label_emb\.|^add_embedding\."):
        return SDXL
    return _BY_WIDTH.get(width[0], SD1) if width else SD1


def _other_architecture(tensors: dict[str, Tensor]) -> Kind | None:
    for base, pattern in (
        (SD3, r"(^|\.)joint_blocks\.|context_embedder\.|transformer_blocks\.0\.attn\.add_k"),
        (FLUX, r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\."),
        ("Stable Cascade", r"effnet_mapper|clip_txt_pooled_mapper"),
        ("PixArt", r"(^|\.)adaln_single\.|(^|\.)t_block\."),
    ):
        if _first(tensors, pattern):
            return Kind(OTHER, base, f"a {base} model")
    if _first(tensors, r"^(model\.diffusion_model\.)?blocks\.0\.(self_)?attn"):
        return Kind(OTHER, "", "a video or image transformer")
    return None


def _small_vae(tensors: dict[str, Tensor]) -> Kind | None:
    """Return the kind of a TAESD, of diffusers' names or of the original release's; None of others.

    A file of the original release holds one of its two parts, whose layers have numbers alone.
    """
    if not _first(tensors, TINY_VAE):
        return None
    first = _shape(tensors, r"^(decoder\.layers\.0|(taesd_decoder\.)?1)\.weight$")
    if len(first) != 4:
        return Kind(OTHER, "", "an encoder of a small VAE (TAESD), without its decoder")
    if first[1] == 4:
        return Kind(VAE, "", "a small VAE (TAESD)")
    return Kind(VAE, SD3, f"a small VAE (TAESD) of {first[1]} latent channels")


def _of_part(tensors: dict[str, Tensor]) -> Kind:
    """Return the kind of a file that holds one part, or no known part."""
    latents = _shape(tensors, r"(^|\.)decoder\.conv_in\.weight$")[1:2]
    if latents:
        if latents == (4,):
            return Kind(VAE, "", "a VAE")
        return Kind(VAE, SD3, f"a VAE of {latents[0]} latent channels (Stable Diffusion 3 or Flux)")
    token = _shape(tensors, r"(^|\.)(token_embedding\.weight)$")
    if token or _first(tensors, r"(^|\.)encoder\.layers\.0\.self_attn\."):
        base = {768: SD1, 1024: SD2, 1280: SDXL}.get(token[-1], "") if token else ""
        return Kind(TEXT_ENCODER, base, f"{_words(base, TEXT_ENCODER)} alone")
    if _is_embedding(tensors):
        if {"clip_l", "clip_g"} & tensors.keys():
            base = SDXL
        else:
            width = next(iter(tensors.values())).shape[-1]
            base = {768: SD1, 1024: SD2, 1280: SDXL}.get(width, "")
        return Kind(EMBEDDING, base, _words(base, EMBEDDING))
    return Kind(OTHER, "", "no model of a known kind")


def _is_embedding(tensors: dict[str, Tensor]) -> bool:
    named = {"emb_params", "clip_l", "clip_g"} & tensors.keys()
    if named or any(name.startswith("string_to_param.") for name in tensors):
        return True
    words = all("." not in name for name in tensors) and len(tensors) <= 64
    return words and all(len(tensor.shape) in (1, 2) for tensor in tensors.values())


def _network_of(tensors: dict[str, Tensor]) -> str:
    return next((name for name, pattern in _NETWORKS if _first(tensors, pattern)), "")


def _base_of_network(tensors: dict[str, Tensor]) -> str:
    """Return what model a LoRA is for: by its parts, then by the widths of its layers."""
    for base, pattern in (
        (FLUX, r"(double|single)_blocks|single_transformer_blocks"),
        (SD3, r"joint_blocks|^(lora_)?transformer[._]transformer_blocks"),
        (SDXL, r"^lora_te[12]_|text_encoder_2|clip_g[._]|^conditioner[._]embedders[._]"),
        (SDXL, r"\d[._]transformer_blocks[._][1-9]|[._]label_emb[._]|[._]add_embedding[._]"),
    ):
        if _first(tensors, pattern):
            return base
    width = _input_width(tensors, r"attn2[._](processor\.)?to_k")
    if width is not None:
        return _BY_WIDTH.get(width, "")
    width = _input_width(tensors, r"self_attn[._](q|k|v)_proj")
    return {768: SD1, 1024: SD2, 1280: SDXL}.get(width or 0, "")


def _input_width(tensors: dict[str, Tensor], layer: str) -> int | None:
    """Return the inputs of a layer that a LoRA changes, however it stores the change."""
    end = (
        r"(\.(lora_down|lora_A(\.\w+)?|lora\.down)\.weight|_lora\.down\.weight|\.hada_w1_b|\.diff)$"
    )
    shape = _shape(tensors, layer + end)
    if shape:
        return shape[1] if len(shape) > 1 else None
    one = _shape(tensors, layer + r"\.lokr_w1(_b)?$")
    two = _shape(tensors, layer + r"\.lokr_w2(_b)?$")
    return one[1] * two[1] if len(one) > 1 and len(two) > 1 else None


def _base_of_metadata(metadata: dict[str, str]) -> str:
    said = " ".join(str(metadata.get(name, "")) for name in _METADATA).lower()
    for base, pattern in (
        (SDXL, r"sdxl|diffusion-xl"),
        (FLUX, r"flux"),
        (SD3, r"sd3|diffusion-3"),
        (SD2, r"sd_v2|diffusion-v2|\btrue\b"),
        (SD1, r"sd_v1|sd_1|diffusion-v1"),
    ):
        if re.search(pattern, said):
            return base
    return ""


def _words(base: str, role: str, network: str = "") -> str:
    kind = f"{role} ({network})" if network not in ("", LORA) else role
    if not base:
        return f"{_ARTICLES.get(role, 'a')} {kind}"
    article = "an" if base.startswith("SDXL") else "a"
    of = f" {role}" if role in (CHECKPOINT, UNET, "ControlNet") else ""
    return f"{article} {base}{of}" if of else f"{_ARTICLES.get(role, 'a')} {kind} of {base}"


def _first(tensors: Iterable[str], pattern: str) -> str | None:
    search = re.compile(pattern).search
    return next((name for name in tensors if search(name)), None)


def _shape(tensors: dict[str, Tensor], pattern: str) -> tuple[int, ...]:
    name = _first(tensors, pattern)
    return () if name is None else tensors[name].shape
