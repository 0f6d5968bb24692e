"""The starting noise of a request: its seed's, on the way to another seed's, or between two seeds.

C = latent channels, h/w = latent height/width.
"""

import hashlib

import torch

from sdbatch.engine.family import Family
from sdbatch.engine.request import Request

_PARALLEL = 0.9995  # the cosine above which two noises are mixed by a straight line


def stream(seed: int, name: str) -> torch.Generator:
    """Return the generator of a random stream of its own, such as that of a picture's posterior.

    The starting noise and then a sampler's steps draw from the seed itself.
    """
    digest = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def start_noise(family: Family, request: Request, generator: torch.Generator) -> torch.Tensor:
    """Return the starting noise of a request, (C, h, w), unit variance, on the CPU.

    Args:
        family: says its shape.
        request: with its seeds.
        generator: of the request's seed, at its start; the sampler goes on drawing from it.
    """
    noise = family.noise(request, generator)
    if request.variation_strength:
        other = _noise_of(family, request, request.variation_seed)
        noise = slerp_columns(request.variation_strength, noise, other)
    if request.mix and request.seed_b not in (-1, request.seed):
        noise = slerp(request.mix, noise, _noise_of(family, request, request.seed_b))
    return noise


def slerp(share: float, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return the point between two tensors on the arc that joins them; share 0 is the first.

    Source: Shoemake 1985, eq. 4.
    """
    cosine = (one * two).sum() / (one.norm() * two.norm())
    if cosine.abs() > _PARALLEL:
        return (1 - share) * one + share * two
    return _on_arc(share, one, two, torch.acos(cosine))


def slerp_columns(share: float, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return the same for each channel and column of (C, h, w), as AUTOMATIC1111's variations do.

    Source: AUTOMATIC1111's modules/rng.py, `slerp`, which takes the norms along h, and where the
    noises are nearly parallel swaps the weights.
    """
    cosine = (one / one.norm(dim=1, keepdim=True) * (two / two.norm(dim=1, keepdim=True))).sum(1)
    if cosine.mean() > _PARALLEL:
        return share * one + (1 - share) * two
    return _on_arc(share, one, two, torch.acos(cosine).unsqueeze(1))


def _on_arc(
    share: float, one: torch.Tensor, two: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    sine = torch.sin(angle)
    weight_one, weight_two = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return weight_one / sine * one + weight_two / sine * two


def _noise_of(family: Family, request: Request, seed: int) -> torch.Tensor:
    return family.noise(request, torch.Generator().manual_seed(seed))
