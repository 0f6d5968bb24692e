"""GroupNorm joined with SiLU: on this machine's GPU, else by Triton's interpreter."""

import os
import re
import subprocess
import sys
from importlib.metadata import distributions

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from sdbatch.errors import ModelError
from sdbatch.models.build import Build
from sdbatch.models.sd1 import rewrites
from tests.models.load import load
from tests.models.sd1.test_rewrites import LAYOUTS, built
from tests.models.sd1.test_row_loras import by_row, norm, write_network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of conftest.py: then interpreted
# The interpreters before 3.7 fail with numpy 2.4
LEAST = Version("3.7" if DEVICE == "cpu" else "3.6")
needs_triton = pytest.mark.skipif(
    all(Version(each.version) < LEAST for each in distributions(name="triton")),
    reason=f"triton {LEAST} is not installed",
)
by_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu draws a model on the GPU")
# where SiLU of a large negative number is one divided by infinity, and so zero
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
# Of Stable Diffusion 1.5's UNet and decoder, with other pictures; the last two are the tiny model's
SHAPES = [
    (2, 320, 9, 7),
    (1, 640, 16, 16),
    (1, 1280, 8, 8),
    (1, 2560, 3, 3),
    (2, 128, 33, 17),
    (1, 512, 20, 12),
    (1, 8, 96, 96),  # more chunks than are combined at a time
    (3, 16, 1, 1),
]
GROUPS = {8: 4, 16: 4}  # else 32
# The interpreter cuts float32 to bfloat16, a GPU rounds it: an error of 1 or 1/2 of the last place.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def fused(plain, *, silu=True):
    from sdbatch.models.sd1.group_norm import FusedGroupNorm

    return FusedGroupNorm(plain, silu=silu)


def make(shape, dtype=torch.float32, *, channels_last=True, mean=1.0):
    """Return a norm with random weights and a picture."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.GroupNorm(GROUPS.get(shape[1], 32), shape[1]).requires_grad_(False)
    plain.weight.normal_(generator=generator)
    plain.bias.normal_(generator=generator)
    picture = torch.randn(shape, generator=generator) * 3 + mean
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return plain.to(DEVICE, dtype), picture.to(DEVICE, dtype).contiguous(memory_format=layout)


def exact(plain, x, *, silu=True):
    weight, bias = plain.weight.double(), plain.bias.double()
    y = F.group_norm(x.double(), plain.num_groups, weight, bias, plain.eps)
    return F.silu(y) if silu else y


def random_latents(model):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents.contiguous(memory_format=model.layout)


@torch.inference_mode()
def denoise(model, loras=None):
    """Return the UNet's answer for one image, with weights of LoRAs."""
    text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    with model.row_loras.apply(loras and torch.tensor(loras)):
        call = model.unet(random_latents(model), 500.0, encoder_hidden_states=text)
    return call.sample


@torch.inference_mode()
def decode(model):
    return model.vae.decode(random_latents(model)).sample


def assert_near(ours, expected, rounding):
    scale = expected.abs().clamp(min=1)
    assert ((ours.double() - expected).abs() / scale).max() <= 1.05 * rounding + 2e-6


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_joined_norm_computes_the_same_in_the_layout_of_its_picture(shape, layout):
    plain, x = make(shape, channels_last=layout)
    ours = fused(plain)(x)
    assert ours.stride() == x.stride()
    assert_near(ours, exact(plain, x), ROUNDING[torch.float32])


@needs_triton
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_only_the_result_is_rounded(dtype, silu):
    plain, x = make((1, 320, 12, 12), dtype)
    ours = fused(plain, silu=silu)(x)
    assert ours.dtype == dtype
    assert_near(ours, exact(plain, x, silu=silu), ROUNDING[dtype])


@needs_triton
def test_a_large_mean_costs_no_more_precision_than_the_picture_has():
    plain, x = make((1, 320, 24, 24), mean=3000.0)
    assert_near(fused(plain)(x), exact(plain, x), 3e-4)  # half of the last place of 3000 is 1.2e-4


@needs_triton
def test_silu_of_large_numbers_is_finite():
    plain, x = make((1, 64, 4, 4), torch.float16)
    plain.weight.fill_(300.0)
    assert_near(fused(plain)(x), exact(plain, x), ROUNDING[torch.float16])


@needs_triton
def test_a_picture_of_other_strides_is_normalized_as_its_copy():
    plain, x = make((1, 64, 12, 12))
    wide = torch.cat([x, x], 3)[..., ::2]
    assert torch.equal(fused(plain)(wide), fused(plain)(wide.contiguous()))


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_bits_of_an_image_depend_on_no_other(layout):
    plain, x = make((3, 128, 13, 11), torch.float16, channels_last=layout)
    joined = fused(plain)
    together = joined(x)
    assert torch.equal(joined(x.roll(1, 0)), together.roll(1, 0))
    for image, alone in zip(x.split(1), together, strict=True):
        assert torch.equal(joined(image)[0], alone)


@needs_triton
@by_interpreter
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_model_with_joined_norms_answers_as_without(tiny_model, layout):
    plain, joined = (
        built(tiny_model, names, "float32", layout) for names in ((), ["group_norm_silu"])
    )
    answers = [(denoise(each), decode(each)) for each in (joined, plain)]
    for ours, theirs in zip(*answers, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    left = [name for name, each in joined.unet.named_modules() if isinstance(each, nn.GroupNorm)]
    assert left == []
    for part in ("unet", "vae"):
        names = [getattr(model, part).state_dict().keys() for model in (plain, joined)]
        assert names[0] == names[1]


@needs_triton
@by_interpreter
def test_norms_to_which_loras_by_row_add_are_not_joined(tiny_model, model, tmp_path):
    chosen = re.compile(r"resnets\.0\.norm1$|attentions\.0\.norm$|conv_norm_out$")
    file = write_network(tmp_path / "ink.safetensors", model, norm, chosen, ["unet"])
    build = Build("cpu", "float32", channels_last=True)
    loras = by_row({"ink": file})
    plain = load(tiny_model, build, loras=loras)
    joined = built(tiny_model, ["group_norm_silu"], "float32", loras=loras)
    ours, theirs = (denoise(each, loras=[[0.7]]) for each in (joined, plain))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not torch.allclose(denoise(plain, loras=[[0.0]]), ours, rtol=1e-3)
    left = [name for name, each in joined.unet.named_modules() if isinstance(each, nn.GroupNorm)]
    adapted = [name for name, _ in plain.unet.named_modules() if chosen.search(name)]
    assert left == adapted != []


def test_without_triton_the_error_says_what_brings_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "sdbatch.models.sd1.group_norm", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    fault = "engine.rewrites = 'group_norm_silu': triton is not installed. Install a torch wheel"
    with pytest.raises(ModelError, match=f"^{fault} for CUDA.* or leave group_norm_silu out"):
        rewrites.group_norm_silu({}, ())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdbatch.models.sd1 import group_norm

TYPES = {"x": "*fp16", "y": "*fp16", "weight": "*fp16", "bias": "*fp16", "parts": "*fp32",
         "factors": "*fp32", "channels": "i32", "pixels": "i32", "eps": "fp32"}
CONSTANTS = {"LAST": True, "SILU": True, "OF_GROUP": 10, "PADDED": 16}
for kernel in (group_norm._measure, group_norm._combine, group_norm._apply):
    types = {name: TYPES.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: CONSTANTS[name] for name in kernel.arg_names if name in CONSTANTS}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = group_norm._OPTIONS
    print("cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm)
"""


@needs_triton
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr
