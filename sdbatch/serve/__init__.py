"""The engine behind Ray Serve, for single requests.

    POST /v1/images/generations -> middleware (API key, size of the body, log)
      -> openai | a1111 | long_jobs -> requests (validated, as images to draw)
      -> service (queue, time limit, results) -> drawer (one a replica, with its engine)

`application.build` deploys this on Ray Serve; `application.serve_job` is the command. No other
module of the folder knows Ray.
"""

from typing import Any


def build(args: dict[str, Any]) -> Any:
    """Return the Ray Serve application for `serve run sdbatch.serve:build job=JOB.yaml`."""
    from sdbatch.serve.application import build as build_application

    return build_application(args)
