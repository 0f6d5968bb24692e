"""Latents that begin with a picture, and that keep it where a mask says so.

n = requests of a cohort, m = those with a mask, C = latent channels, h/w = latent height/width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sdbatch.engine.cuda import moved
from sdbatch.engine.family import Scheduler

if TYPE_CHECKING:
    from sdbatch.engine.cohort import Ticket


class Painting:
    """The pictures of a cohort's requests; requests without one are not touched.

    Args:
        tickets: of the cohort, n.
        noise: unit noise (n, C, h, w), on the CPU.
        scheduler: of the cohort, at its start.
    """

    def __init__(
        self, tickets: Sequence["Ticket"], noise: torch.Tensor, scheduler: Scheduler
    ) -> None:
        self._scheduler = scheduler
        self._begun: dict[int, torch.Tensor] = {}  # number of a request -> its first latents
        self._masked: dict[bool, _Masked] = {}  # by whether the clean latents are blended
        pictured = [i for i, ticket in enumerate(tickets) if ticket.original is not None]
        if not pictured:
            return
        noise = moved(noise, scheduler.timesteps.device)
        originals = {i: _filled(tickets[i], noise[i]) for i in pictured}
        for i in pictured:
            if not tickets[i].begins_with_noise:
                self._begun[i] = scheduler.noised(originals[i], noise[i], 0)
        for by_clean in (False, True):
            rows = [
                i
                for i in pictured
                if _mask(tickets[i]) is not None
                and (tickets[i].request.compat == "a1111") == by_clean
            ]
            if rows:
                at = moved(torch.tensor(rows), noise.device)
                masks = torch.stack([_mask(tickets[i]) for i in rows])  # type: ignore[misc]
                kept = torch.stack([originals[i] for i in rows])
                self._masked[by_clean] = _Masked(at, masks, kept, noise[at])

    def begin(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the first latents (n, C, h, w) with those of pictures in their places."""
        if not self._begun:
            return latents
        return torch.stack([self._begun.get(i, each) for i, each in enumerate(latents)])

    def restore(self, latents: torch.Tensor, step: int) -> torch.Tensor:
        """Return latents (n, C, h, w) before a step with the picture's outside of the masks.

        Source: Avrahami et al. 2023 (Blended Latent Diffusion), sec. 4.1.
        """
        if False not in self._masked:
            return latents
        each = self._masked[False]
        proper = self._scheduler.noised(each.kept, each.noise, step)
        return latents.index_copy(0, each.rows, each.blend(proper, latents[each.rows]))

    def blend_answers(
        self, answers: torch.Tensor, model_input: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Return answers (n, C, h, w) that imply the picture outside of the masks.

        Source: AUTOMATIC1111's modules/sd_samplers_cfg_denoiser.py, which blends the denoised
        latents of every call.
        """
        if True not in self._masked:
            return answers
        each = self._masked[True]
        seen = model_input[each.rows]
        clean = self._scheduler.clean(seen, answers[each.rows], step)
        blended = self._scheduler.answer(seen, each.blend(each.kept, clean), step)
        return answers.index_copy(0, each.rows, blended)


class _Masked:
    """The requests with a mask whose pictures are kept in one way."""

    def __init__(
        self, rows: torch.Tensor, masks: torch.Tensor, kept: torch.Tensor, noise: torch.Tensor
    ) -> None:
        self.rows = rows  # (m,), their numbers
        self.masks = masks  # (m, 1, h, w): 1 where latents are drawn anew
        self.kept = kept  # (m, C, h, w), noise-free
        self.noise = noise  # (m, C, h, w), of unit variance

    def blend(self, outside: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Return (m, C, h, w), one inside of the masks and the other outside."""
        return (1 - self.masks) * outside + self.masks * inside


def _mask(ticket: "Ticket") -> torch.Tensor | None:
    return None if ticket.original is None else ticket.original.mask


def _filled(ticket: "Ticket", noise: torch.Tensor) -> torch.Tensor:
    """Return the latents that a request begins with, (C, h, w): its mask may be filled.

    Source: AUTOMATIC1111's modules/processing.py, "latent noise" and "latent nothing".
    """
    original = ticket.original
    assert original is not None, "it has a picture"
    fill = ticket.request.mask_fill
    if original.mask is None or fill not in ("noise", "nothing"):
        return original.latents
    kept = original.latents * (1 - original.mask)
    return kept + noise * original.mask if fill == "noise" else kept
