"""The example of Ray Serve's documentation for Stable Diffusion, on the embedded model.

An ingress that answers GET /imagine with a PNG, and a deployment whose `generate` calls diffusers'
pipeline for one prompt at a time, here on the CPU. benchmarks/serve.py compares sdbatch with it:

    python benchmarks/serve_example.py PORT REPLICAS
"""

import io
import sys
import threading

import ray
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from fastapi import FastAPI
from fastapi.responses import Response
from ray import serve

from sdbatch.job import Model, Safety
from sdbatch.models import find_model
from sdbatch.registry import EMBEDDED_MODEL

STEPS, GUIDANCE, SIDE = 25, 2.5, 128
app = FastAPI()


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Ingress:
    """Answers over HTTP."""

    def __init__(self, model) -> None:  # noqa: ANN001  a handle
        self.model = model

    @app.get("/imagine", response_class=Response)
    async def imagine(self, prompt: str) -> Response:
        """Return the image of a prompt."""
        image = await self.model.generate.remote(prompt)
        file = io.BytesIO()
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")


# One call at a time, unlike in the documentation: Ray Serve runs `generate` in threads, and calls
# that share a pipeline share its scheduler and fail.
@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=1)
class Pipeline:
    """diffusers' pipeline; Ray gives it as many threads as it has CPUs: one."""

    def __init__(self) -> None:
        folder = find_model.find_model(Model(path=EMBEDDED_MODEL), Safety(checker="none")).root
        self.pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            self.pipe.scheduler.config, algorithm_type="dpmsolver++"
        )
        self.pipe.set_progress_bar_config(disable=True)

    def generate(self, prompt: str):  # noqa: ANN201  PIL's image
        """Draw one image."""
        return self.pipe(
            prompt,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images[0]


def main(port: int, replicas: int) -> None:
    """Serve until the process is ended."""
    ray.init("local", num_cpus=replicas + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Ingress.bind(Pipeline.options(num_replicas=replicas).bind()))
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
