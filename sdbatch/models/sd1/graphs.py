"""The UNet as CUDA graphs, one for each shape: its 700 kernels are one launch.

It can gain where launching takes longer than computing: small batches, small models. Predicted and
not measured yet. Where the kernels fill the device it gains nothing.
"""

from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 8  # shapes that are kept; clients of a service may ask for any size
_WARM_UPS = 3  # calls before a capture, in which libraries set up what a capture forbids


class GraphedUNet(nn.Module):
    """Calls a UNet by replaying the graph of its inputs' shapes, captured when they first come.

    Not for a UNet whose layers read more than its inputs, as LoRAs by row do.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self._graphs: dict[Any, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # no two of them run at a time

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **unused: Any,
    ) -> tuple[torch.Tensor]:
        """Return the UNet's answer in a tensor of its own."""
        inputs = (sample, timestep, encoder_hidden_states)
        key = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
        graph = self._graphs.pop(key, None) or _Graph(self.unet, inputs, self._pool)
        self._graphs[key] = graph  # the last that is dropped
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return (graph.replay(inputs),)


class _Graph:
    """The UNet's kernels for inputs of fixed shapes, in memory of fixed addresses."""

    def __init__(self, unet: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self._inputs = [each.clone() for each in inputs]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                _call(unet, self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that delivers images calls CUDA meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = _call(unet, self._inputs)

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next replay overwrites it


def _call(unet: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    sample, timestep, text = inputs
    answer: torch.Tensor = unet(sample, timestep, encoder_hidden_states=text, return_dict=False)[0]
    return answer
