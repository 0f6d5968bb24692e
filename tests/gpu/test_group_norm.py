"""GroupNorm joined with SiLU in a whole model on a GPU."""

import pytest
import torch

from sdbatch.engine import bits
from sdbatch.engine.places import differences, make_rows
from sdbatch.models.build import Build
from sdbatch.models.sd1.family import StableDiffusion1
from tests.models.load import load
from tests.sd1 import build_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
JOINED = "group_norm_silu"
REQUEST = build_request(height=128, width=128)


def family_of(folder, *names, dtype="float16", channels_last=True):
    bits.pin_bits("cuda")
    build = Build("cuda", dtype, channels_last=channels_last, rewrites=names)
    return StableDiffusion1(load(folder, build))


@torch.inference_mode()
def answers(family):
    """Return the denoiser's answer for 16 rows, and the decoded pictures of four."""
    rows = make_rows(family, REQUEST, 16)
    answer = family.denoise(rows.latents, rows.timesteps, rows.conditions)
    return answer.float(), family.decode(rows.latents[:4], family.dtype).pixels.float()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_model_with_joined_norms_is_as_near_to_float32(tiny_model, channels_last):
    exact = answers(family_of(tiny_model, dtype="float32"))
    errors = [
        [
            (one - other).abs().mean()
            for one, other in zip(
                answers(family_of(tiny_model, *names, channels_last=channels_last)),
                exact,
                strict=True,
            )
        ]
        for names in ((), (JOINED,))
    ]
    for without, joined in zip(*errors, strict=True):
        assert 0 < joined <= 1.5 * without


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("lanes", [2, 16, 32])
def test_a_rows_bits_do_not_depend_on_its_place_with_joined_norms(tiny_model, lanes, channels_last):
    family = family_of(tiny_model, JOINED, channels_last=channels_last)
    assert differences(family, REQUEST, lanes, 4) == []


def test_graphs_with_joined_norms_answer_the_same_bits(tiny_model):
    launched, graphed = (
        answers(family_of(tiny_model, *names)) for names in ((JOINED,), ("graphs", JOINED))
    )
    assert all(torch.equal(*pair) for pair in zip(launched, graphed, strict=True))
