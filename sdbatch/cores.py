"""The CPU cores that this process may use, and what they can do."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Of a cgroup: the files that hold its quota and its period, in version 2 and in version 1.
_QUOTA_FILES = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def cores(root: Path = Path("/")) -> int:
    """Return their number: a cluster's job or a container may have fewer than the machine.

    A quota of 1.5 cores counts as 2: a quota limits time, and one process would leave a third of
    this one unused.

    Args:
        root: the folder that holds /proc and /sys.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return min([count, *map(math.ceil, _quotas(root))])


def have_bfloat16(root: Path = Path("/")) -> bool:
    """Return whether the cores multiply bfloat16 in hardware, as x86 does with AVX512-BF16.

    Others compute it with float32, which is slower than float32 alone.

    Args:
        root: the folder that holds /proc.
    """
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return any(
        line.startswith("flags") and "avx512_bf16" in line.split() for line in text.splitlines()
    )


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of this process's cgroup and of those that it is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # none: version 2
        group = mount / path.lstrip("/")
        # In a container the path may be the host's. The files of its cgroup are at the mount then.
        for each in (group, *group.parents):
            if each.is_relative_to(mount):
                yield from _quota(each)


def _quota(group: Path) -> Iterator[float]:
    for names in _QUOTA_FILES:
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
        except OSError:  # the other version, the host's path, or the first cgroup of the machine
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
