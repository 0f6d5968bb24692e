"""The log of the service: Ray Serve writes what is below its own name."""

import logging

log = logging.getLogger("ray.serve.sdbatch")
