"""Stable Diffusion 1.x behind the engine's interface; see engine.family.Family.

n = images, C = 4 latent channels, H/W = image height/width in pixels, h/w = H/8 and W/8,
L = 77 text tokens a chunk, D = text width (768 for SD 1.5).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdbatch.engine.family import Conditions
from sdbatch.engine.request import Request
from sdbatch.models.schedulers import DiffusersScheduler, SchedulerCache
from sdbatch.models.sd1 import LIMITS, VAE_FACTOR
from sdbatch.models.sd1.loading import Model
from sdbatch.models.sd1.text import Chunk, TextEncoder, Tokenizer, Tokens

LATENT_CHANNELS = 4
TEXT = "text"  # the condition: the embedding of the prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests must have in common to be rows of one UNet call."""

    height: int  # pixels
    width: int  # pixels
    chunks: int  # of text, 77 tokens each


@dataclass(frozen=True, slots=True)
class Prompts:
    """The text of a request as tokens; both prompts have the same number of chunks."""

    prompt: tuple[Chunk, ...]
    negative: tuple[Chunk, ...]
    tokens: int
    truncated: bool


class StableDiffusion1:
    """A loaded Stable Diffusion 1.x."""

    limits = LIMITS
    keys = frozenset({"negative_prompt", "clip_skip", "prompt_weights", "chunk_prompts"})

    def __init__(self, model: Model) -> None:
        self.device = model.device
        self._model = model
        self._tokenizer = Tokenizer(model.tokenizer, has_embeddings=model.has_embeddings)
        self._text = TextEncoder(model.text_encoder)
        self._schedulers = SchedulerCache(model.scheduler_config)

    def read(self, request: Request) -> Prompts:
        """Return the tokens of the request's prompts.

        Raises:
            ValueError: a prompt or clip_skip cannot be drawn with this model.
        """
        layers = self._model.text_encoder.config.num_hidden_layers
        if request.clip_skip >= layers:
            raise ValueError(
                f"clip_skip = {request.clip_skip}: must be below {layers}, the layers of the text "
                f"encoder"
            )
        options = {"weighted": request.prompt_weights, "chunked": request.chunk_prompts}
        prompt = negative = self._tokens("prompt", request, options)
        if request.guided:
            negative = self._tokens("negative_prompt", request, options)
        blank = (self._tokenizer.blank_chunk(request.clip_skip),)
        chunks = max(len(prompt.chunks), len(negative.chunks))
        return Prompts(
            prompt.chunks + blank * (chunks - len(prompt.chunks)),
            negative.chunks + blank * (chunks - len(negative.chunks)),
            prompt.count,
            prompt.truncated or negative.truncated,
        )

    def _tokens(self, where: str, request: Request, options: dict[str, bool]) -> Tokens:
        try:
            return self._tokenizer.tokenize(getattr(request, where), request.clip_skip, **options)
        except ValueError as error:
            raise ValueError(f"{where} = {error}") from error

    def shape(self, request: Request, reading: Prompts) -> Shape:
        """See engine.family.Family."""
        return Shape(request.height, request.width, len(reading.prompt))

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        """Draw an image's starting noise from its own generator: (C, H/8, W/8), unit variance.

        On the CPU in float32, as CUDA's generator gives other numbers than the CPU's for a seed;
        the sampler goes on drawing from the generator.

        Source: Rombach et al. 2022, sec. 3.1, with SD 1.x's choice of f = 8, 4 channels.
        """
        shape = (1, LATENT_CHANNELS, request.height // VAE_FACTOR, request.width // VAE_FACTOR)
        return torch.randn(shape, generator=generator)[0]

    def ticks(self, request: Request) -> int:
        """See engine.family.Family."""
        return self._schedulers.ticks(request.sampler, request.num_inference_steps)

    def scheduler(
        self, requests: Sequence[Request], noise: torch.Tensor, generators: list[torch.Generator]
    ) -> DiffusersScheduler:
        """See engine.family.Family."""
        fresh = self._schedulers.make(requests[0].sampler, requests[0].num_inference_steps)
        return DiffusersScheduler(fresh, requests, noise, generators, self.device)

    def embed(
        self, readings: Sequence[Prompts], soon: Iterable[Prompts]
    ) -> tuple[Conditions, Conditions]:
        """Return the text embeddings, (n, chunks * L, D); see engine.family.Family."""
        rows = [*(each.prompt for each in readings), *(each.negative for each in readings)]
        later = (chunk for each in soon for chunk in (*each.prompt, *each.negative))
        flat = self._text.encode([chunk for row in rows for chunk in row], later)
        chunks = len(rows[0])
        joined = [torch.cat(flat[i : i + chunks]) for i in range(0, len(flat), chunks)]
        n = len(readings)
        return {TEXT: torch.stack(joined[:n])}, {TEXT: torch.stack(joined[n:])}

    def denoise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the UNet's answer: noise or velocity, as the scheduler's prediction type says."""
        latents = latents.to(self._model.dtype, memory_format=self._model.layout)
        answer: torch.Tensor = self._model.unet(
            latents, timesteps, encoder_hidden_states=conditions[TEXT], return_dict=False
        )[0]
        return answer

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See engine.family.Family."""
        model, vae = self._model, self._model.vae
        scaled = latents / vae.config.scaling_factor
        scaled = scaled.to(model.dtype, memory_format=model.layout)
        images: Any = vae.decode(scaled, return_dict=False)[0].float()
        images = (images / 2 + 0.5).clamp(0, 1).nan_to_num()
        pixels: torch.Tensor = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        return pixels.contiguous()
