"""What diffusers and transformers import but few jobs use, left out while they are imported.

    scipy.stats, scipy.integrate  diffusers' schedulers, for beta schedules and for LMS
    scipy.optimize                transformers' losses, for training detectors
    torch._dynamo                 decorators of both, for torch.compile
    torch.distributed.tensor      transformers, for models on several devices
    peft                          diffusers, for its own loading of LoRAs

They take a large part of an engine's start. The first three are imported when they are used.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

_DECORATORS = ("allow_in_graph", "assume_constant_result", "disable")  # of torch._dynamo


@contextmanager
def deferred_imports(*, compile: bool) -> Iterator[None]:
    """Leave the modules above out of what is imported in the block.

    Only what a process imports first is left out: nothing, if it has imported diffusers before.

    Args:
        compile: whether torch.compile will be used, so that torch._dynamo is needed.
    """
    members: dict[str, dict[str, Any]] = {
        "scipy.stats": {},
        "scipy.integrate": _later("scipy.integrate", "quad"),
        "scipy.optimize": _later("scipy.optimize", "linear_sum_assignment"),
    }
    if not compile:
        members["torch._dynamo"] = dict.fromkeys(_DECORATORS, _undecorated)
    stand_ins: dict[str, Any] = {
        name: _StandIn(name, members[name]) for name in members if name not in sys.modules
    }
    if "peft" not in sys.modules:
        stand_ins["peft"] = None  # Python's way to say that there is no such module
    distributed = torch.distributed.is_available
    sys.modules.update(stand_ins)
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = distributed
        for name, module in stand_ins.items():
            if sys.modules[name] is module:
                del sys.modules[name]


class _StandIn(ModuleType):
    """Stands for a module; what is not in `members` is taken from the module, imported then."""

    def __init__(self, name: str, members: dict[str, Any]) -> None:
        super().__init__(name)
        spec = find_spec(name)
        assert spec is not None
        self.__spec__ = spec
        self.__path__ = spec.submodule_search_locations or []  # its submodules are the real ones
        vars(self).update(members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def _later(module: str, name: str) -> dict[str, Callable[..., Any]]:
    """Return a function of a module that imports it when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return {name: call}


def _undecorated(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return the function as it is, which the decorators change for torch.compile alone."""
    return function if function is not None else _undecorated
