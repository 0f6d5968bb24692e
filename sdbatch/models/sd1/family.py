"""What is peculiar to Stable Diffusion 1.x, and nothing else: the seam for other models.

Text to embeddings, what a lane carries beside its latents and timestep, the UNet call, decoding.
Lanes, cohorts and the engine know only what stands here. Every call has a fixed shape, padded and
never shrunk, so that a row's bits depend neither on its neighbours nor on its place.

n = images, C = 4 latent channels, H/W = image height/width in pixels, h/w = H/8 and W/8,
L = 77 text tokens a chunk, D = text width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdbatch.engine.request import Request
from sdbatch.models.sd1.loading import Model
from sdbatch.models.sd1.text import Chunk, TextEncoder, Tokenizer, Tokens

LATENT_CHANNELS = 4
VAE_FACTOR = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What requests must share to stand in one UNet call."""

    height: int  # pixels
    width: int  # pixels
    chunks: int  # of text, 77 tokens each


@dataclass(frozen=True, slots=True)
class Prompts:
    """The text of a request, as tokens; both prompts have the same number of chunks."""

    prompt: tuple[Chunk, ...]
    negative: tuple[Chunk, ...]
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded images, still on the device."""

    pixels: torch.Tensor  # (n, H, W, 3) uint8
    finite: torch.Tensor  # (n,) bool: False where the latents were not
    scores: torch.Tensor | None  # (n, concepts) of the safety checker


class StableDiffusion1:
    """A loaded Stable Diffusion 1.x. Only `read` and `shape` may be called from any thread."""

    def __init__(self, model: Model) -> None:
        self.device = model.device
        self._model = model
        self._tokenizer = Tokenizer(model.tokenizer, has_embeddings=model.has_embeddings)
        self._text = TextEncoder(model.text_encoder)

    def read(self, request: Request) -> Prompts:
        """Return the tokens of the request's prompts.

        Raises:
            ValueError: a prompt or clip_skip cannot be drawn with this model.
        """
        layers = self._model.text_encoder.config.num_hidden_layers
        if request.clip_skip >= layers:
            raise ValueError(f"clip_skip = {request.clip_skip}: the text encoder has {layers}")
        options = {"weighted": request.prompt_weights, "chunked": request.chunk_prompts}
        prompt = negative = self._tokens("prompt", request, options)
        if request.guided:
            negative = self._tokens("negative_prompt", request, options)
        blank = (self._tokenizer.blank(request.clip_skip),)
        chunks = max(len(prompt.chunks), len(negative.chunks))
        return Prompts(
            prompt.chunks + blank * (chunks - len(prompt.chunks)),
            negative.chunks + blank * (chunks - len(negative.chunks)),
            prompt.count,
            prompt.truncated or negative.truncated,
        )

    def _tokens(self, where: str, request: Request, options: dict[str, bool]) -> Tokens:
        try:
            return self._tokenizer.read(getattr(request, where), request.clip_skip, **options)
        except ValueError as error:
            raise ValueError(f"{where} = {error}") from error

    def shape(self, request: Request, prompts: Prompts) -> Shape:
        """Return what the request's lanes share with those beside them."""
        return Shape(request.height, request.width, len(prompts.prompt))

    def embed(
        self, prompts: Sequence[Prompts], soon: Iterable[Prompts]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the lanes of the prompts and of the negatives carry: (n, chunks * L, D).

        Those that will be asked for `soon` are encoded too where that costs nothing.
        """
        rows = [*(p.prompt for p in prompts), *(p.negative for p in prompts)]
        later = (chunk for p in soon for chunk in (*p.prompt, *p.negative))
        flat = self._text.encode([chunk for row in rows for chunk in row], later)
        chunks = len(rows[0])
        joined = [torch.cat(flat[i : i + chunks]) for i in range(0, len(flat), chunks)]
        return torch.stack(joined[: len(prompts)]), torch.stack(joined[len(prompts) :])

    def denoise(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        """Return the UNet's answer to a whole batch of lanes, (lanes, C, h, w).

        What it answers, noise or velocity, is the scheduler's prediction type to know.
        """
        latents = latents.to(self._model.dtype, memory_format=self._model.layout)
        noise: torch.Tensor = self._model.unet(
            latents, timesteps, encoder_hidden_states=context, return_dict=False
        )[0]
        return noise

    def decode(self, latents: torch.Tensor, group: int) -> Pictures:
        """Decode up to `group` latents (n, C, h, w) in a call of exactly so many."""
        model, vae, n = self._model, self._model.vae, len(latents)
        finite = torch.isfinite(latents).flatten(1).all(1)
        scaled = padded(latents / vae.config.scaling_factor, group)
        scaled = scaled.to(model.dtype, memory_format=model.layout)
        images: Any = vae.decode(scaled, return_dict=False)[0].float()
        images = (images / 2 + 0.5).clamp(0, 1).nan_to_num()
        pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous()
        scores = model.checker.scores(pixels)[:n] if model.checker else None
        return Pictures(pixels[:n], finite, scores)


def initial_noise(generator: torch.Generator, height: int, width: int) -> torch.Tensor:
    """Draw an image's starting noise from its own generator: (C, H/8, W/8), unit variance.

    On the CPU in float32, as CUDA's generator gives other numbers than the CPU's for a seed; the
    sampler goes on drawing from the generator.

    Source: Rombach et al. 2022, sec. 3.1, with SD 1.x's choice of f = 8, 4 channels.
    """
    shape = (1, LATENT_CHANNELS, height // VAE_FACTOR, width // VAE_FACTOR)
    return torch.randn(shape, generator=generator)[0]


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `rows` with zeros appended to `count` rows."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
