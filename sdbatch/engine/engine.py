"""The engine: requests in, futures of drawn images out; one thread owns the device.

Every UNet, text encoder and VAE call has a fixed shape, padded and never shrunk: then a row's
bits depend neither on its neighbours nor on its place. (Other batch shapes differ in the last bit.)
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdbatch.engine.cohort import Cohort
from sdbatch.engine.loading import Model
from sdbatch.engine.request import Drawn, Request
from sdbatch.engine.samplers import make_scheduler
from sdbatch.engine.text import Text, TextEncoder
from sdbatch.errors import ModelError

VAE_GROUP = 4  # images a call of the VAE: always so many, padded


@dataclass(slots=True)
class _Waiting:
    request: Request
    future: Future[Drawn]


class Engine:
    """Draws requests on one device.

    Args:
        model: the loaded parts.
        lanes: rows of the UNet batch, at least 2; a guided image takes two.
        threads: of torch on a CPU; part of what decides the bits.
    """

    def __init__(self, model: Model, *, lanes: int, threads: int) -> None:
        self.lanes = lanes
        self.ticks = 0  # UNet calls so far: a sign of life
        self._model = model
        self._threads = threads
        self._text = TextEncoder(model.tokenizer, model.text_encoder)
        self._waiting: deque[_Waiting] = deque()
        self._closed = False
        self._reason = ModelError("engine = closed: takes no more requests.")
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sdbatch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Drawn]:
        """Queue `request`; its future ends with the image or with why it could not be drawn.

        A ModelError in the future is no fault of the row: the engine cannot go on.
        """
        waiting = _Waiting(request, Future())
        with self._changed:
            if self._closed:
                raise self._reason
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Draw what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        batch: list[_Waiting] = []
        try:
            with torch.inference_mode():
                while batch := self._admit():
                    self._draw(batch)
        finally:
            self._stop(batch, ModelError("engine = stopped by a fault of its own: see the log."))

    def _admit(self) -> list[_Waiting]:
        """Wait for requests; take the oldest and those of its kind that the lanes hold with it."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            taken: list[_Waiting] = []
            left: deque[_Waiting] = deque()
            lanes = self.lanes
            for waiting in self._waiting:
                need = 2 if waiting.request.guided else 1
                kind = taken[0].request.kind if taken else waiting.request.kind
                if need <= lanes and waiting.request.kind == kind:
                    if waiting.future.set_running_or_notify_cancel():
                        taken.append(waiting)
                        lanes -= need
                else:
                    left.append(waiting)
            self._waiting = left
        return taken if taken or self._closed else self._admit()

    def _draw(self, batch: list[_Waiting]) -> None:
        try:
            for waiting, drawn in zip(batch, self._images([w.request for w in batch]), strict=True):
                waiting.future.set_result(drawn)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            self._stop(batch, _cannot_go_on(error, self.lanes))
        except Exception as error:  # noqa: BLE001  of one row: found by drawing each alone
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for waiting in batch:
                self._draw([waiting])

    def _stop(self, batch: list[_Waiting], reason: ModelError) -> None:
        """Take no more requests; fail those that are unfinished, which is no fault of theirs."""
        with self._changed:
            if not self._closed:
                self._closed, self._reason = True, reason
            unfinished = [*batch, *self._waiting]
            self._waiting.clear()
        for waiting in unfinished:
            if not waiting.future.done():
                waiting.future.set_exception(reason)

    def _images(self, requests: list[Request]) -> list[Drawn]:
        prompts = self._text.encode([request.prompt for request in requests])
        negatives = self._text.encode([request.negative_prompt for request in requests])
        sampler, steps, _, _ = requests[0].kind
        scheduler = make_scheduler(sampler, self._model.scheduler_config, steps)
        cohort = Cohort(requests, prompts, negatives, scheduler, self._model.device)
        while not cohort.done:
            self._tick([cohort])
        _refuse_broken(cohort.latents)
        images = self._decode(cohort.latents)
        return [
            _drawn(*result) for result in zip(requests, images, prompts, negatives, strict=True)
        ]

    def _tick(self, cohorts: Sequence[Cohort]) -> None:
        """Advance the cohorts, which share a size, by one UNet call of exactly `lanes` rows."""
        model = self._model
        latents = _padded(torch.cat([c.model_input() for c in cohorts]), self.lanes)
        context = _padded(torch.cat([c.context for c in cohorts]), self.lanes)
        timesteps = torch.cat([c.timestep.expand(c.lanes).to(torch.float32) for c in cohorts])
        noise = model.unet(
            latents.to(model.dtype),
            _padded(timesteps, self.lanes).to(model.device),
            encoder_hidden_states=context,
            return_dict=False,
        )[0]
        start = 0
        for cohort in cohorts:
            cohort.advance(noise[start : start + cohort.lanes])
            start += cohort.lanes
        self.ticks += 1

    def _decode(self, latents: torch.Tensor) -> list[NDArray[np.uint8]]:
        """Turn (n, C, H, W) latents into n images of (8H, 8W, 3), as diffusers rounds them."""
        images: list[NDArray[np.uint8]] = []
        vae: Any = self._model.vae
        for start in range(0, len(latents), VAE_GROUP):
            group = latents[start : start + VAE_GROUP]
            scaled = _padded(group / vae.config.scaling_factor, VAE_GROUP).to(self._model.dtype)
            pixels = vae.decode(scaled, return_dict=False)[0][: len(group)].float()
            pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            images += list((pixels * 255).round().to(torch.uint8).cpu().numpy())
        return images


def _cannot_go_on(error: Exception, lanes: int) -> ModelError:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, torch.OutOfMemoryError):
        return ModelError(f"engine.lanes = {lanes}: out of memory ({text}). Set fewer lanes.")
    return ModelError(f"engine.device = failed ({text}): run the same command again to resume.")


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `rows` with zeros appended to `count` rows."""
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _refuse_broken(latents: torch.Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise ArithmeticError("latents = not finite: the model drew no picture for these values")


def _drawn(request: Request, image: NDArray[np.uint8], prompt: Text, negative: Text) -> Drawn:
    return Drawn(
        image=image,
        prompt_tokens=prompt.tokens,
        prompt_truncated=prompt.truncated or (request.guided and negative.truncated),
    )
