"""Drain the Ray node of this spot machine when its cloud is about to reclaim the machine.

aws.yaml and gcp.yaml start this script on their workers, because Ray does not watch for these
notices. A drained node takes no more shards and finishes what it can. Needs only Python and Ray.
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
SECONDS = {"aws": 120, "gcp": 30}  # from the notice to the end of the machine
POLL_SECONDS = 2.0


def ask(url: str, method: str = "GET", **headers: str) -> str:
    """Return the response of the metadata service; empty if it has none or does not respond."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, TimeoutError):
        return ""


def is_going(cloud: str, base: str) -> bool:
    """Tell whether the cloud has announced that it reclaims this machine."""
    if cloud == "gcp":
        path = "/computeMetadata/v1/instance/preempted"
        return ask(base + path, Metadata_Flavor="Google").strip() == "TRUE"
    token = ask(base + "/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    notice = ask(base + "/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token)
    return bool(notice) and json.loads(notice)["action"] in ("stop", "terminate", "hibernate")


def main(cloud: str, base: str) -> int:
    """Wait for the notice, then drain the node."""
    while not is_going(cloud, base):
        time.sleep(POLL_SECONDS)
    drain = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", f"{cloud} reclaims this spot machine"]
    drain += ["--deadline-remaining-seconds", str(SECONDS[cloud])]
    return subprocess.run(drain, check=False).returncode


if __name__ == "__main__":
    where = {"aws": AWS, "gcp": GCP}[sys.argv[1]]
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else where))
