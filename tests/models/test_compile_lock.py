"""The lock around torch.compile: one process at a time, also after one was killed."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest
import torch

from sdbatch.models import compile_lock

HOLD = """
import sys
from sdbatch.models.compile_lock import compiling_alone
with compiling_alone():
    print("in", flush=True)
    sys.stdin.readline()
    print("out", flush=True)
"""
COMPILE = """
import torch
from torch._dynamo.utils import counters
from sdbatch.models.compile_lock import bound_threads, compiling_alone
bound_threads()
with compiling_alone():
    print(torch.compile(lambda x: (x + 1).sin())(torch.ones(7)).sum().item())
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.fixture
def start(tmp_path):
    """Start Python programs that share an empty cache; end them."""
    started = []

    def run(program: str) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", ["leaves", pytest.param("is killed", marks=pytest.mark.slow)])
def test_a_process_waits_until_the_one_that_compiles_is_done(start, tmp_path, end):
    first = start(HOLD)
    assert first.stdout.readline() == "in\n"
    second = start(HOLD)
    with (tmp_path / compile_lock.FILE).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if end == "leaves":
        first.communicate("\n")
    else:
        first.kill()
    assert second.stdout.readline() == "in\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.slow  # two processes import torch's compiler, which takes some seconds each
def test_the_second_process_reads_what_the_first_compiled(start):
    outputs = [start(COMPILE).communicate()[0].splitlines() for _ in range(2)]
    assert outputs[0][0] == outputs[1][0]
    assert [line[1].split() for line in outputs] == [["0", "1"], ["1", "0"]]


@pytest.mark.parametrize(("given", "expected"), [(None, str(torch.get_num_threads())), ("7", "7")])
def test_the_threads_of_the_compiler_are_those_of_the_process(monkeypatch, given, expected):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    compile_lock.bound_threads()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == expected
