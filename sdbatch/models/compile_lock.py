"""One process of a machine compiles at a time; the others then read what it left in torch's cache.

torch.compile keeps its results in a folder of the machine (TORCHINDUCTOR_CACHE_DIR, by default in
the folder for temporary files), so of many actors the first compiles, for minutes and with all its
threads, and the next ones find its work.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FILE = "sdbatch.lock"  # in torch's cache
_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
_LOG = logging.getLogger(__name__)


def bound_threads() -> None:
    """Let torch compile with the threads of this process, which in an actor are its CPUs.

    Before torch's compiler is imported, which reads the variable then. Its own choice is a process
    for each core of the machine, for each actor. A variable that is set remains.
    """
    os.environ.setdefault(_THREADS, str(torch.get_num_threads()))


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Wait until no other process of this machine is in such a block; hold them off meanwhile.

    The lock ends with its process, however that ends.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with (Path(cache_dir()) / FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process of this machine that compiles the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
