"""Whether a row's bits depend on its place in a call, on its neighbours, or on the process.

On a CPU they do not, as each call has a fixed shape. A GPU's library may sum the rows of a matrix
product differently, so `tune` and tests/gpu try it. For any family.

n = rows of a call, C = latent channels, h/w = latent height/width.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from sdbatch.engine.cuda import moved
from sdbatch.engine.family import Conditions, Family
from sdbatch.engine.lanes import padded
from sdbatch.engine.request import Request

PROMPTS = 8  # different ones in a call; its rows repeat them
EVERY_PLACE = 16  # up to so many rows, a row is tried at each place


@dataclass(frozen=True)
class Rows:
    """The inputs of a denoiser call, each row with its own noise, timestep and prompt."""

    latents: torch.Tensor  # (n, C, h, w)
    timesteps: torch.Tensor  # (n,)
    conditions: Conditions

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """Return the rows after a change of each tensor."""
        return Rows(
            change(self.latents),
            change(self.timesteps),
            {name: change(each) for name, each in self.conditions.items()},
        )


@dataclass(frozen=True)
class Difference:
    """A change of a call that has changed bits of rows which were given the same."""

    call: str  # "denoiser", "decoder"
    change: str  # of the call, such as "rolled by 3"
    rows: int  # that differ
    greatest: float  # difference of two values


def make_rows(family: Family, request: Request, count: int, seed: int = 0) -> Rows:
    """Return the inputs of a denoiser call of `count` rows.

    Args:
        family: makes them.
        request: whose size, sampler and prompt they have.
        count: of the rows.
        seed: of the first row; each other has the next.
    """
    prompts = [f"{request.prompt} {i}" for i in range(min(count, PROMPTS))]
    readings = [family.read(request.model_copy(update={"prompt": each})) for each in prompts]
    requests = [request.model_copy(update={"seed": seed + i}) for i in range(count)]
    generators = [torch.Generator().manual_seed(each.seed) for each in requests]
    noise = torch.stack(
        [family.noise(each, g) for each, g in zip(requests, generators, strict=True)]
    )
    scheduler = family.scheduler(requests, noise, generators)
    latents = scheduler.model_input(scheduler.start(noise), 0)
    conditions, *_ = family.embed(readings, ())
    order = moved(torch.arange(count), latents.device)
    steps = scheduler.timesteps
    return Rows(
        latents,
        steps[order.flip(0) % len(steps)],
        {name: each[order % len(prompts)] for name, each in conditions.items()},
    )


@torch.inference_mode()
def differences(family: Family, request: Request, lanes: int, group: int) -> list[Difference]:
    """Return the changes of a call that change a row's bits; none: a row's bits are its own.

    Args:
        family: draws.
        request: an example, of the size to be tried.
        lanes: rows of the denoiser call.
        group: images of the decoder call.
    """
    rows, others = (make_rows(family, request, lanes, seed) for seed in (0, lanes))

    def denoise(rows: Rows) -> torch.Tensor:
        return family.denoise(rows.latents, rows.timesteps, rows.conditions)

    def decode(rows: Rows) -> torch.Tensor:
        return family.decode(rows.latents, family.dtype).pixels

    images, other_images = (each.changed(lambda tensor: tensor[:group]) for each in (rows, others))
    return [
        *_compare("denoiser", denoise, rows, others),
        *_compare("decoder", decode, images, other_images),
    ]


@torch.inference_mode()
def hashes(family: Family, request: Request, lanes: int, group: int) -> dict[str, str]:
    """Return the hash of what a denoiser and a decoder call give, to compare with a process's."""
    rows = make_rows(family, request, lanes)
    answer = family.denoise(rows.latents, rows.timesteps, rows.conditions)
    pixels = family.decode(rows.latents[:group], family.dtype).pixels
    return {"denoiser": _hash(answer), "decoder": _hash(pixels)}


def _compare(
    call: str, draw: Callable[[Rows], torch.Tensor], rows: Rows, others: Rows
) -> Iterator[Difference]:
    """Yield the changes of a call that change bits."""
    plain = draw(rows)
    for change, changed, by, kept in _changes(rows, others):
        answer, expected = draw(changed).roll(-by, 0)[:kept], plain[:kept]
        number = int((answer != expected).flatten(1).any(1).sum())
        if number:
            greatest = float((answer.float() - expected.float()).abs().max())
            yield Difference(call, change, number, greatest)


def _changes(rows: Rows, others: Rows) -> Iterator[tuple[str, Rows, int, int]]:
    """Yield changes of a call: name, inputs, places that rows move by, rows that are the same."""
    count = len(rows.latents)
    yield "repeated", rows, 0, count
    for by in _rolls(count):
        yield f"rolled by {by}", rows.changed(partial(torch.roll, shifts=by, dims=0)), by, count
    yield "other neighbours", _first_among(rows, others), 0, 1
    yield "no neighbours", rows.changed(lambda each: padded(each[:1], count)), 0, 1


def _first_among(rows: Rows, others: Rows) -> Rows:
    """Return other rows, of which the first is replaced."""

    def first(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([own[:1], other[1:]])

    return Rows(
        first(rows.latents, others.latents),
        first(rows.timesteps, others.timesteps),
        {name: first(own, others.conditions[name]) for name, own in rows.conditions.items()},
    )


def _rolls(count: int) -> list[int]:
    """Return by how many places the rows of a call are rolled."""
    if count <= EVERY_PLACE:
        return list(range(1, count))
    return sorted({1, 2, 3, count // 4, count // 2, count - 1})


def _hash(tensor: torch.Tensor) -> str:
    """Return the hash of a tensor's values."""
    return hashlib.sha256(tensor.contiguous().float().cpu().numpy().tobytes()).hexdigest()[:16]
