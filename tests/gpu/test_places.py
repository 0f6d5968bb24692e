"""A row's bits on a GPU: at every place, among other neighbours, in a second process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from sdbatch.engine import bits
from sdbatch.engine.places import differences, hashes
from sdbatch.models.build import Build
from sdbatch.models.identify import EDITING, INPAINTING
from sdbatch.models.sd1.family import StableDiffusion1
from tests.models.load import load
from tests.sd1 import build_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
DTYPES = ("float32", "float16")
REQUEST = build_request(height=128, width=128)


def family_of(folder, dtype: str) -> StableDiffusion1:
    bits.pin_bits("cuda")
    return StableDiffusion1(load(folder, Build("cuda", dtype)))


def draw(folder: str, dtype: str) -> dict[str, str]:
    return hashes(family_of(folder, dtype), REQUEST, 16, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [2, 16, 32])
def test_a_rows_bits_do_not_depend_on_its_place_on_a_gpu(tiny_model, dtype, lanes):
    assert differences(family_of(tiny_model, dtype), REQUEST, lanes, 4) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use", [INPAINTING, EDITING])
def test_a_rows_bits_do_not_depend_on_its_place_where_the_unet_sees_a_picture(
    folders_by_use, use, dtype
):
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    request = REQUEST.model_copy(update={"inputs": {"image": picture}})
    assert differences(family_of(folders_by_use[use], dtype), request, 16, 4) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_process_draws_the_same_bits_on_a_gpu(tiny_model, dtype):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        other = processes.submit(draw, str(tiny_model), dtype).result()
    assert other == draw(str(tiny_model), dtype)
