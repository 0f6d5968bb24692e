"""DeepCache: denoiser calls that compute the UNet's outermost layers and reuse the deep ones.

What enters the last layer of the UNet changes little from step to step. A whole call keeps it. A
shallow call computes only what is outside of it: the first convolution, whose answer skips all deep
layers, and the last layer.

Source: Ma et al. 2023 (DeepCache, arXiv 2312.00858), uniform 1:N inference, the shallowest branch.

C = channels of latents, h, w = height and width of latents, L = text tokens, D = text width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sdbatch.engine.family import Cache
from sdbatch.models.sd1.loading import Model

DEEP = "deep"  # in the cache: what enters the last layer, (lanes, channels, h, w)
_LAST_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


class DeepCache:
    """The whole and the shallow calls of a model's UNet."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._unet = model.unet
        self._layout = model.layout
        self._build = model.build

    def check(self, interval: int) -> None:
        """Raise a ValueError if the UNet cannot be called with a `cache_interval` above 1."""
        must = f"cache_interval = {interval}: must be 1"
        if self._build.compile:
            raise ValueError(f"{must} if the UNet is compiled. Set engine.compile to false")
        if "graphs" in self._build.rewrites:
            raise ValueError(f"{must} with graphs in engine.rewrites. Leave graphs out")
        config = self._unet.config
        if (
            config["up_block_types"][-1] not in _LAST_BLOCKS
            or config["center_input_sample"]
            or config["time_embedding_act_fn"]
        ):
            raise ValueError(f"{must}, this model's UNet has other outer layers")

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        cache: Cache,
        first_lanes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the UNet's answer, (lanes, C, h, w).

        Args:
            latents: (lanes, C, h, w), of the UNet's type and layout.
            timesteps: (lanes,).
            text: (lanes, L, D).
            cache: if empty, the call is whole and fills it; otherwise it is shallow.
            first_lanes: see engine.family.Family.denoise.
        """
        if cache:
            return self._call_outer(latents, timesteps, text, cache[DEEP])

        def keep(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            joined = inputs[0]  # with the answer of the first convolution, at its end
            skipped = self._unet.conv_in.out_channels
            cache[DEEP] = joined[:, :-skipped].contiguous(memory_format=self._layout)

        hook = self._unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep)
        try:
            return self._model.call_unet(latents, timesteps, text, first_lanes)
        finally:
            hook.remove()

    def _call_outer(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, deep: torch.Tensor
    ) -> torch.Tensor:
        unet = self._unet
        time = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
        deep = deep.contiguous(memory_format=self._layout)  # also if padding was added to it
        hidden = torch.cat([deep, unet.conv_in(latents)], dim=1)
        last = unet.up_blocks[-1]
        hidden = last.resnets[-1](hidden, time)
        if hasattr(last, "attentions"):
            hidden = last.attentions[-1](hidden, encoder_hidden_states=text, return_dict=False)[0]
        answer: torch.Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        return answer
