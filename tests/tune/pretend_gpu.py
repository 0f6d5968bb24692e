"""A family that draws on the CPU whatever device its build names, to try the order on a GPU.

It has the faults that a GPU may have: its memory ends, kernels are missing, rows leak.
"""

import torch

from tests import flow_family
from tests.flow_family import LAYOUT, LIMITS, REWRITES

__all__ = ["LAYOUT", "LIMITS", "REWRITES", "load"]
MOST_ROWS = 64  # that its memory holds
faults: set[str] = set()  # "split_k": rows leak while it is allowed; "always": they leak


def load(files, build):
    if build.compile and "compile" in faults:
        raise RuntimeError("no C compiler")
    if not build.channels_last and "layout" in faults:
        raise RuntimeError("no kernel for this layout")
    plain = type(build)("cpu", "float32")
    model = flow_family.load(files, plain)
    return PretendGpu(model._denoiser, model.device, model.dtype)


class PretendGpu(flow_family.TinyFlow):
    def denoise(self, latents, timesteps, conditions):
        if len(latents) > MOST_ROWS:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        answer = super().denoise(latents, timesteps, conditions)
        split_k = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        if "always" in faults or ("split_k" in faults and split_k):
            answer = answer + 0.5 * answer.mean(0)
        return answer
