"""A child process and the actor that started it, on one GPU."""

import pytest
import torch

from sdbatch import resolve
from sdbatch.batch.blocks import unpack
from sdbatch.batch.drawing_actor import DrawingActor
from sdbatch.batch.metrics import Metrics
from sdbatch.engine import cuda
from sdbatch.stages.base import Needs, facts_of
from sdbatch.stages.draw import DrawImages
from tests.finished import HERE, LocalLiveness, at_once, block, encoding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


def test_a_shard_has_the_same_bytes_when_a_child_draws_it(tiny_model, make_job):
    model = {"path": str(tiny_model)}
    files, job = resolve.find_model(make_job(model=model, engine={"device": "cuda"}))
    make_engine = resolve.resolve(job, files, 1, None).make_engine()
    shards = []
    for deaths in range(2):
        liveness = LocalLiveness()
        for _ in range(deaths):
            liveness.state.begin(0, HERE)
        stage = DrawImages(make_engine, encoding(), needs=Needs(gpus=1))
        (shard,) = at_once(
            DrawingActor(stage, liveness, Metrics()), [block([f"dog {i}" for i in range(40)])]
        )
        stage.engine.close()
        shards.append(shard)
    alone, isolated = (unpack(shard) for shard in shards)
    assert facts_of(isolated)["isolated"]
    assert isolated.equals(alone)
    assert alone["error"].null_count == 40


def test_memory_that_torch_caches_is_free_for_other_processes_when_it_is_released():
    block_of_memory = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del block_of_memory
    cached = torch.cuda.memory_reserved()
    assert cached >= 2**28
    cuda.release_cached_memory()
    assert torch.cuda.memory_reserved() <= cached - 2**28
