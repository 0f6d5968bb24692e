"""The online path: the engine behind Ray Serve, for single requests.

    POST /v1/images/generations -> web -> openai | a1111 -> wanted (what is asked, resolved)
      -> service (a place in the queue, a time limit) -> drawer (one a replica, with its engine)

`application.build` puts both on Ray Serve, `run.serve_job` is the command. Only those two know Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: dict[str, Any]) -> "Application":
    """Return the application for `serve run sdbatch.serve:build job=jobs/dataset.yaml`."""
    from sdbatch.serve.application import build as build_application

    return build_application(args)
