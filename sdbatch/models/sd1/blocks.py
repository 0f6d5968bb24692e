"""diffusers' blocks with fewer passes over memory and the same bits.

Activations and sums are in place, nothing is divided by a scale of 1, and a transformer's tokens
are a view of its picture where the layout allows it. The layers and their names remain, and so do
weights, LoRAs and their hooks.

B = images, C = channels, H/W = height and width of latents, L = tokens, D = width.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional as F


class Resnet(nn.Module):
    """A ResnetBlock2D of Stable Diffusion 1.x."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.time_emb_proj = block.time_emb_proj  # None in the VAE
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut  # None where the channels remain
        self.act1, self.act2 = nn.SiLU(inplace=True), nn.SiLU(inplace=True)  # after the norms

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Return the block's output, (B, C, H, W)."""
        hidden: torch.Tensor = self.conv1(self.act1(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert temb is not None, "a block of the UNet needs the embedding of the timestep"
            hidden = hidden.add_(self.time_emb_proj(F.silu(temb))[:, :, None, None])
        hidden = self.conv2(self.act2(self.norm2(hidden)))
        return hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Transformer(nn.Module):
    """A Transformer2DModel of Stable Diffusion 1.x, with convolutions as projections."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.proj_in = block.norm, block.proj_in
        self.transformer_blocks = block.transformer_blocks
        self.proj_out = block.proj_out

    def forward(
        self, x: torch.Tensor, encoder_hidden_states: torch.Tensor, **unused: Any
    ) -> tuple[torch.Tensor]:
        """Return the block's output, (B, C, H, W), for the text (B, L, D)."""
        tokens = self.tokens(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        return (self.picture(tokens, x),)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return what enters the first of its blocks, (B, H * W, D)."""
        projected: torch.Tensor = self.proj_in(self.norm(x))
        return projected.permute(0, 2, 3, 1).reshape(len(x), x.shape[2] * x.shape[3], -1)

    def picture(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output for what leaves the last of its blocks."""
        picture = tokens.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        if not x.is_contiguous(memory_format=torch.channels_last):
            picture = picture.contiguous()
        output: torch.Tensor = self.proj_out(picture)
        return output.add_(x)


class PlainAttention:
    """The attention of Stable Diffusion 1.x, as a processor of diffusers' Attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output in the shape of `hidden_states`: (B, L, D), or (B, C, H, W)."""
        x = hidden_states
        if hidden_states.ndim == 4:  # of the VAE, with a norm of its own
            x = attn.group_norm(x.flatten(2)).transpose(1, 2)
        text = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            each.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for each in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: torch.Tensor = attn.to_out[0](x)
        if hidden_states.ndim == 4:
            return output.transpose(1, 2).reshape(hidden_states.shape) + hidden_states
        return output


def replace(part: nn.Module) -> None:
    """Replace the blocks of a UNet or of a decoder where they are those of Stable Diffusion 1.x."""
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ResnetBlock2D) and _is_plain_resnet(child):
                setattr(module, name, Resnet(child))
            elif isinstance(child, Transformer2DModel) and _is_plain_transformer(child):
                setattr(module, name, Transformer(child))
        if isinstance(module, Attention) and _is_plain_attention(module):
            module.set_processor(PlainAttention())


def _is_plain_resnet(block: Any) -> bool:
    has_no_time = block.time_emb_proj is None
    return (
        block.output_scale_factor == 1
        and (has_no_time or block.time_embedding_norm == "default")
        and isinstance(block.nonlinearity, nn.SiLU)
        and not (block.up or block.down or block.skip_time_act)
    )


def _is_plain_transformer(block: Any) -> bool:
    return block.is_input_continuous and not block.use_linear_projection


def _is_plain_attention(attn: Any) -> bool:
    own = (attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    is_in_vae = attn.group_norm is not None
    return (
        isinstance(attn.processor, AttnProcessor2_0)
        and not any(own)
        and attn.rescale_output_factor == 1
        and attn.residual_connection == is_in_vae
    )
