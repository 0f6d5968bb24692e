"""A Ray cluster of several nodes on this machine, in processes of its own; ends with its stdin.

    python -m tests.nodes HEAD_CPUS NODE_CPUS...

Prints the dashboard's address and the cluster's, as JSON, when all nodes are there.
"""

import json
import sys


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
    said = {"dashboard": f"http://{cluster.webui_url}", "address": cluster.address}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
