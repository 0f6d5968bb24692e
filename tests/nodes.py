"""A Ray cluster of several nodes on this machine, in processes of its own; ends with its stdin.

    python -m tests.nodes HEAD_CPUS NODE_CPUS...

Prints the dashboard's address and the cluster's, as JSON, when all nodes are there. A line of its
stdin, CPUs, adds a node; then it prints the node's id and the process of its raylet, as JSON.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def running(*cpus: int, **settings: str) -> Iterator[subprocess.Popen]:
    """Run this program with other settings in its environment; end it and all its processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.nodes", *map(str, cpus)],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **settings},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    yield process
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def main() -> None:
    from ray.cluster_utils import Cluster

    head, *others = (int(cpus) for cpus in sys.argv[1:])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": head, "include_dashboard": True, "dashboard_port": 0},
    )
    for cpus in others:
        cluster.add_node(num_cpus=cpus)
    cluster.wait_for_nodes()
    say(dashboard=f"http://{cluster.webui_url}", address=cluster.address)
    for line in sys.stdin:
        node = cluster.add_node(num_cpus=int(line))
        (raylet,) = node.all_processes["raylet"]
        say(id=node.node_id, raylet=raylet.process.pid)
    cluster.shutdown()


def say(**facts: str | int) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
