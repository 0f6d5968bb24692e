"""Stable Diffusion 1.x behind the engine's interface; see engine.family.Family.

n = images, C = 4 latent channels, K = channels that join them (see picture_channels.py), H/W =
image height/width in pixels, h/w = H/8 and W/8, L = 77 text tokens a chunk, D = text width (768
for SD 1.5).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray

from sdbatch.engine.attention import attention_by
from sdbatch.engine.cuda import moved
from sdbatch.engine.family import Cache, Conditions, Original, Pictures
from sdbatch.engine.noise import stream
from sdbatch.engine.request import Request
from sdbatch.models.identify import EDITING, INPAINTING, TEXT_TO_IMAGE, USES
from sdbatch.models.schedulers import DiffusersScheduler, Kind, SchedulerCache
from sdbatch.models.sd1 import LATENT_CHANNELS, LAYOUT, LIMITS, VAE_FACTOR, picture_channels
from sdbatch.models.sd1.deep_cache import DeepCache
from sdbatch.models.sd1.loading import Model
from sdbatch.models.sd1.picture_channels import GREY, MASKED
from sdbatch.models.sd1.prompts import Prompts, read_prompts
from sdbatch.models.sd1.text import TextEncoder, Tokenizer
from sdbatch.models.sd1.tiling import wrap_edges
from sdbatch.sampling import PICTURE_UPSCALERS

TEXT = "text"  # the condition: the embedding of the prompt
CHANNELS = "channels"  # the condition: what joins the latents, if the UNet sees a picture
LORAS = "loras"  # the condition: the weights of the LoRAs by row, if the job declares any
BLANK_SIZES = 64  # image sizes for which the channels of no picture are kept


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests must have in common to be rows of one UNet call."""

    height: int  # pixels
    width: int  # pixels
    chunks: int  # of text, 77 tokens each
    cache_interval: int


@dataclass(frozen=True, slots=True)
class Row:
    """A request as the model reads it; see engine.family.Reading."""

    prompts: Prompts
    size: tuple[int, int]  # height and width of the image, in pixels
    lanes: int = 2
    pictures: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)  # to encode
    original: Original | None = field(default=None, compare=False)
    channels: torch.Tensor | None = field(default=None, compare=False)  # (K, h, w); None: blank

    @property
    def tokens(self) -> int:
        """See engine.family.Reading."""
        return self.prompts.tokens

    @property
    def truncated(self) -> bool:
        """See engine.family.Reading."""
        return self.prompts.truncated

    def at(self, tick: int) -> "Row":
        """See engine.family.Reading."""
        now = self.prompts.at(tick)
        return self if now is self.prompts else replace(self, prompts=now)


class StableDiffusion1:
    """A loaded Stable Diffusion 1.x."""

    keys = frozenset(
        {
            "negative_prompt",
            "clip_skip",
            "prompt_weights",
            "chunk_prompts",
            "loras",
            "cache_interval",
            "prompt_b",
        }
    )

    def __init__(self, model: Model) -> None:
        self._use = use = USES[model.unet.config.in_channels]
        self.limits = replace(LIMITS, image_lanes=LAYOUT.image_lanes[use])
        self.keys = self.keys | picture_channels.KEYS[use]
        self.device = model.device
        self.dtype = model.dtype
        self.compiled = model.build.compile
        self._model = model
        self._deep_cache = DeepCache(model)
        self._vaes = {model.dtype: model.vae}
        self._tokenizer = Tokenizer(model.tokenizer)
        self._text = TextEncoder(model.text_encoder, model.row_loras)
        self._schedulers = SchedulerCache(model.scheduler_config, model.device)
        self._blank_channels = lru_cache(BLANK_SIZES)(self._make_blank_channels)

    def read(self, request: Request) -> Row:
        """Return the tokens of the request's prompts, and its pictures.

        Raises:
            ValueError: a prompt, clip_skip, a LoRA, cache_interval or a picture cannot be drawn
                with it.
        """
        if request.cache_interval > 1:
            self._deep_cache.check(request.cache_interval)
        self._check_pictures(request)
        layers = self._model.text_encoder.config.num_hidden_layers
        if request.clip_skip >= layers:
            raise ValueError(
                f"clip_skip = {request.clip_skip}: must be below {layers}, the layers of the text "
                f"encoder"
            )
        prompts = read_prompts(request, self._tokenizer, self._model.row_loras)
        return Row(
            prompts,
            (request.height, request.width),
            self.limits.image_lanes,
            picture_channels.to_encode(request, self._use),
        )

    def _check_pictures(self, request: Request) -> None:
        """Raise a ValueError if the model cannot draw from the request's pictures."""
        picture_channels.check(request, self._use)
        if "mask" in request.inputs and request.hires_scale > 1:
            raise ValueError(
                f"hires_scale = {request.hires_scale:g}: must be 1 where a row has a mask"
            )
        enlarges_pictures = request.hires_scale > 1 and request.hires_upscaler in PICTURE_UPSCALERS
        if not request.inputs and not enlarges_pictures and self._use == TEXT_TO_IMAGE:
            return
        if self._model.vae.encoder is None:
            raise ValueError(
                "image = a picture: this model's VAE has a decoder alone, so it can draw from no "
                "picture. Choose another model.vae"
            )
        is_tiny = isinstance(self._model.vae, AutoencoderTiny)
        if request.sample_posterior and is_tiny:
            raise ValueError("sample_posterior = true: must be false, a tiny VAE has no posterior")
        if self._use == EDITING and is_tiny:
            raise ValueError(
                "image = a picture: a tiny VAE's latents have another scale than a model for "
                "editing sees. Choose another model.vae"
            )

    def shape(self, request: Request, reading: Row) -> Shape:
        """See engine.family.Family."""
        chunks = len(reading.prompts.prompt)
        return Shape(request.height, request.width, chunks, request.cache_interval)

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        """Draw an image's starting noise from its own generator: (C, H/8, W/8), unit variance.

        On the CPU in float32, as CUDA's generator gives other numbers than the CPU's for a seed;
        the sampler goes on drawing from the generator.

        Source: Rombach et al. 2022, sec. 3.1, with SD 1.x's choice of f = 8, 4 channels.
        """
        shape = (1, LATENT_CHANNELS, request.height // VAE_FACTOR, request.width // VAE_FACTOR)
        return torch.randn(shape, generator=generator)[0]

    def sigmas(self, request: Request) -> NDArray[np.float64]:
        """See engine.family.Family."""
        return self._schedulers.sigmas(self._kind(request))

    def _kind(self, request: Request) -> Kind:
        whole = self._use == EDITING and request.compat == "diffusers"
        if request.second_pass or ("image" in request.inputs and not whole):
            return Kind(request.sampler, *request.steps_from_picture())
        return Kind(request.sampler, request.num_inference_steps, 0)

    def scheduler(
        self, requests: Sequence[Request], noise: torch.Tensor, generators: list[torch.Generator]
    ) -> DiffusersScheduler:
        """See engine.family.Family."""
        kind = self._kind(requests[0])
        return DiffusersScheduler(self._schedulers, kind, requests, noise, generators)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the mean and the log variance of pictures' latents, unscaled: (n, 8, H/8, W/8).

        A tiny VAE has the mean alone, (n, 4, H/8, W/8). Source: Rombach et al. 2022, sec. 3.1.
        """
        values = 2.0 * (moved(pixels, self.device).permute(0, 3, 1, 2).float() / 255.0) - 1.0
        values = values.to(self._model.dtype, memory_format=self._model.layout)
        vae: Any = self._model.vae
        encoded = vae.encode(values, return_dict=False)[0]
        latents: torch.Tensor = getattr(encoded, "parameters", encoded)
        return latents.float()

    def with_pictures(
        self, request: Request, reading: Row, encoded: Mapping[str, torch.Tensor]
    ) -> Row:
        """See engine.family.Family."""
        mask, original, channels = None, None, None
        if "mask" in request.inputs:
            mask = self._latent_mask(request.inputs["mask"])
        starts = picture_channels.begins_with_picture(request, self._use)
        # where the UNet sees the mask itself, diffusers does not blend latents by it
        blends = self._use == TEXT_TO_IMAGE or request.compat == "a1111"
        if "image" in encoded and (starts or blends):
            latents = self._latents(request, "image", encoded["image"])
            original = Original(latents, mask if blends else None, starts)
        if self._use == EDITING:
            channels = encoded["image"][:LATENT_CHANNELS]
        if mask is not None and self._use == INPAINTING:
            masked = self._latents(request, MASKED, encoded[MASKED])
            channels = torch.cat([mask, masked])
        return replace(reading, pictures={}, original=original, channels=channels)

    def _make_blank_channels(self, height: int, width: int) -> torch.Tensor:
        """Return the channels of an image without a picture, or wholly drawn anew: (K, h, w)."""
        if self._use == EDITING:  # of an example, with which an engine warms up
            size = (LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
            return moved(torch.zeros(size), self.device)
        latents = self.encode(torch.full((1, height, width, 3), GREY))[0, :LATENT_CHANNELS]
        return torch.cat([torch.ones_like(latents[:1]), self._scaled(latents)])

    def _latents(self, request: Request, name: str, moments: torch.Tensor) -> torch.Tensor:
        """Return an encoded picture as the UNet's latents, (C, h, w): the mean, or a sample."""
        mean = moments[:LATENT_CHANNELS]
        if request.sample_posterior:
            noise = torch.randn(mean.shape, generator=stream(request.seed, f"posterior {name}"))
            # bounds of diffusers' DiagonalGaussianDistribution
            deviation = torch.exp(0.5 * moments[LATENT_CHANNELS:].clamp(-30.0, 20.0))
            mean = mean + deviation * moved(noise, self.device)
        return self._scaled(mean)

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = latents * self._model.vae.config.scaling_factor
        return scaled

    def _latent_mask(self, mask: NDArray[np.uint8]) -> torch.Tensor:
        """Return a mask for latents, (1, H/8, W/8): the nearest pixel's, as diffusers does."""
        drawn = torch.from_numpy((mask[::VAE_FACTOR, ::VAE_FACTOR] >= 128).astype(np.float32))
        return moved(drawn[None], self.device)

    def embed(self, readings: Sequence[Row], soon: Iterable[Row]) -> tuple[Conditions, ...]:
        """Return the text embeddings, (n, chunks * L, D), and the weights of LoRAs by row.

        See engine.family.Family. All lanes of a guided image have the LoRAs of its row. With the
        rewrite text_kv the first are the keys and values of all layers, in the place of D. These
        are linear in the text, so to mix them is the same but for rounding. Where the UNet sees a
        picture, also what joins the latents, (n, K, h, w).

        Source of mixing: diffusers' examples/community/interpolate_stable_diffusion.py, `walk`.
        """
        n, texts = len(readings), [each.prompts for each in readings]
        mixed = [i for i, each in enumerate(texts) if each.prompt_b]
        rows = [*(each.prompt for each in texts), *(each.negative for each in texts)]
        rows += [texts[i].prompt_b for i in mixed]
        later = (chunk for each in soon for chunk in each.prompts.chunks)
        flat = self._text.encode([chunk for row in rows for chunk in row], later)
        chunks = len(rows[0])
        if self._model.text_projection is not None:
            owners = [*texts, *texts, *(texts[i] for i in mixed)]
            loras = [each.loras for each in owners for _ in range(chunks)]
            flat = self._model.text_projection.project(flat, loras)
        joined = [torch.cat(flat[i : i + chunks]) for i in range(0, len(flat), chunks)]
        for i, other in zip(mixed, joined[2 * n :], strict=True):  # one by one, as bits need it
            joined[i] = torch.lerp(joined[i], other, texts[i].mix)
        both: Conditions = {}
        if self._model.row_loras.weights:
            both[LORAS] = moved(torch.tensor([each.loras for each in texts]), self.device)
        if self._use != TEXT_TO_IMAGE:
            both[CHANNELS] = torch.stack([self._channels(each) for each in readings])
        prompts, negatives = (
            {TEXT: torch.stack(part), **both} for part in (joined[:n], joined[n : 2 * n])
        )
        if self._use != EDITING:
            return prompts, negatives
        return prompts, negatives, {**negatives, CHANNELS: torch.zeros_like(both[CHANNELS])}

    def _channels(self, reading: Row) -> torch.Tensor:
        return self._blank_channels(*reading.size) if reading.channels is None else reading.channels

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        cache: Cache | None = None,
        first_lanes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the UNet's answer: noise or velocity, as the scheduler's prediction type says."""
        if CHANNELS in conditions:
            latents = torch.cat([latents, conditions[CHANNELS]], 1)
        latents = latents.to(self._model.dtype, memory_format=self._model.layout)
        loras = self._model.row_loras.apply(conditions.get(LORAS))
        text = conditions[TEXT]
        with attention_by(self._model.build.attention), loras:
            if cache is not None:
                return self._deep_cache.denoise(latents, timesteps, text, cache, first_lanes)
            return self._model.call_unet(latents, timesteps, text, first_lanes)

    def decode(self, latents: torch.Tensor, dtype: torch.dtype) -> Pictures:
        """See engine.family.Family."""
        if dtype not in self._vaes:
            self._vaes[dtype] = self._copy_vae(dtype)
        vae = self._vaes[dtype]
        scaled = latents / vae.config.scaling_factor
        scaled = scaled.to(dtype, memory_format=self._model.layout)
        images: Any = vae.decode(scaled, return_dict=False)[0].float()
        finite = images.isfinite().flatten(1).all(1)
        images = (images / 2 + 0.5).clamp(0, 1).nan_to_num()  # NaN as uint8 is undefined
        pixels: torch.Tensor = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        return Pictures(pixels.contiguous(), finite)

    def _copy_vae(self, dtype: torch.dtype) -> Any:
        """Return the VAE with its weights in another type; not compiled, as it is rarely used."""
        own = self._model.vae
        with torch.device("meta"):  # no memory, no random values
            copied = type(own).from_config(own.config)
        if own.encoder is None:  # of a VAE whose file holds its decoder alone
            copied.encoder = None
        if self._model.tiling:
            wrap_edges(copied)
        weights = {name: weight.to(dtype) for name, weight in own.state_dict().items()}
        copied.load_state_dict(weights, assign=True)
        return copied.requires_grad_(False).eval()
