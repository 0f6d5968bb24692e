"""The shared prefix: what both lanes of a guided image compute before the text, computed once.

Their input and timesteps are equal, and the text enters at the first cross-attention. All before
it is computed in a call of half the lanes for guided images, and of all lanes for others. So each
image's bits are its own. If only some images are guided, both calls are made, which takes longer.

C = channels of latents, h, w = height and width of latents, L = tokens, D = text width.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from sdbatch.engine.cuda import moved
from sdbatch.errors import ModelError
from sdbatch.models.identify import EDITING, USES
from sdbatch.models.sd1.blocks import Transformer
from sdbatch.models.sd1.row_loras import RowLoras

_PLAIN = {  # the configuration of a UNet that computes what is written here
    "center_input_sample": False,
    "time_embedding_act_fn": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


class SharedPrefix:
    """Calls a UNet in two parts, before and after its first cross-attention.

    Args:
        unet: with the blocks of blocks.py.
        row_loras: attached to its layers.

    Raises:
        ModelError: the UNet has other layers.
    """

    def __init__(self, unet: Any, row_loras: RowLoras) -> None:
        if not _is_plain(unet):
            raise ModelError(
                "engine.rewrites = 'shared_prefix': this model's UNet has other layers or inputs: "
                "must be Stable Diffusion 1.x, not for editing. Leave shared_prefix out."
            )
        self._unet = unet
        self._row_loras = row_loras
        self._level = unet.config["down_block_types"].index("CrossAttnDownBlock2D")

    def __call__(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        first_lanes: Sequence[int],
    ) -> torch.Tensor:
        """Return the UNet's answer, (lanes, C, h, w).

        Args:
            latents: (lanes, C, h, w), of the UNet's type and layout.
            timesteps: (lanes,).
            text: (lanes, L, D).
            first_lanes: see engine.family.Family.denoise.
        """
        pairs = [lane for lane, count in Counter(first_lanes).items() if count > 1]
        if not pairs:
            return self._after(text, *self._before(latents, timesteps))
        lanes, half = len(latents), len(latents) // 2
        own = _index([*pairs, *[0] * (half - len(pairs))], latents.device)
        with self._row_loras.of(own):
            values = self._before(_rows(latents, own), timesteps[own])
        places = {lane: place for place, lane in enumerate(pairs)}
        if 2 * len(pairs) < len(first_lanes):
            alone = self._before(latents, timesteps)
            values = [torch.cat(both) for both in zip(values, alone, strict=True)]
            places |= {lane: half + lane for lane in first_lanes if lane not in places}
        padding = [0] * (lanes - len(first_lanes))
        index = _index([*(places[lane] for lane in first_lanes), *padding], latents.device)
        return self._after(text, *(_rows(value, index) for value in values))

    def _before(self, latents: torch.Tensor, timesteps: torch.Tensor) -> list[torch.Tensor]:
        """Compute lanes up to the first cross-attention.

        Returns:
            For each lane: the embedding of the timestep, the input of the first transformer, its
            tokens after the first self-attention, and what skips the deep layers.
        """
        unet = self._unet
        time = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
        x = unet.conv_in(latents)
        skips = [x]
        for block in unet.down_blocks[: self._level]:
            x, outputs = block(hidden_states=x, temb=time)
            skips += outputs
        block = unet.down_blocks[self._level]
        x = block.resnets[0](x, time)
        tokens = block.attentions[0].tokens(x)
        first = block.attentions[0].transformer_blocks[0]
        tokens = first.attn1(first.norm1(tokens)) + tokens
        return [time, x, tokens, *skips]

    def _after(
        self,
        text: torch.Tensor,
        time: torch.Tensor,
        x: torch.Tensor,
        tokens: torch.Tensor,
        *skipped: torch.Tensor,
    ) -> torch.Tensor:
        """Return the UNet's answer for what `_before` returns, of all lanes."""
        unet, skips = self._unet, list(skipped)
        block = unet.down_blocks[self._level]
        first, *others = block.attentions[0].transformer_blocks
        tokens = first.attn2(first.norm2(tokens), encoder_hidden_states=text) + tokens
        tokens = first.ff(first.norm3(tokens)) + tokens
        for other in others:
            tokens = other(tokens, encoder_hidden_states=text)
        x = block.attentions[0].picture(tokens, x)
        skips.append(x)
        for resnet, transformer in zip(block.resnets[1:], block.attentions[1:], strict=True):
            (x,) = transformer(resnet(x, time), encoder_hidden_states=text)
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
            skips.append(x)
        for block in unet.down_blocks[self._level + 1 :]:
            x, outputs = block(hidden_states=x, temb=time, **_texts(block, text))
            skips += outputs
        x = unet.mid_block(x, time, encoder_hidden_states=text)
        for block in unet.up_blocks:
            count = len(block.resnets)
            skips, own = skips[:-count], tuple(skips[-count:])
            x = block(
                hidden_states=x,
                temb=time,
                res_hidden_states_tuple=own,
                upsample_size=skips[-1].shape[2:] if skips else None,
                **_texts(block, text),
            )
        answer: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return answer


def _is_plain(unet: Any) -> bool:
    config = unet.config
    down, up = config["down_block_types"], config["up_block_types"]
    if not {*down} <= {*_DOWN} or not {*up} <= {*_UP} or "CrossAttnDownBlock2D" not in down:
        return False
    transformer = unet.down_blocks[down.index("CrossAttnDownBlock2D")].attentions[0]
    return (
        USES[config["in_channels"]] != EDITING  # whose lanes differ in their picture
        and all(config[name] == value for name, value in _PLAIN.items())
        and isinstance(transformer, Transformer)
        and not transformer.transformer_blocks[0].only_cross_attention
    )


def _texts(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the text as an argument of a block that takes it."""
    return {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}


def _index(numbers: list[int], device: torch.device) -> torch.Tensor:
    return moved(torch.tensor(numbers), device)


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return some rows of `x` in its layout, which torch's index_select does not keep."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)
