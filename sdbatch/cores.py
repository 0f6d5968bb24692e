"""The CPU cores that this process may use."""

import os


def cores() -> int:
    """Return their number: a cluster's job or a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
