"""Network files (LoRA, DoRA, LoHa, LoKr, IA3, full, norms): what they add to each layer.

Computed in float32 on the CPU, whatever the dtype of the file and the device of the model.
Sources: the names and formulas of LyCORIS (Yeh et al. 2023) and of AUTOMATIC1111's extension
"Lora"; Liu et al. 2024 (DoRA), eq. 5.

O, I = outputs and inputs of a layer, k = the sides of a convolution's kernel (none of a linear
layer), r = rank.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.functional import pad

from sdbatch.job.sections import ADAPTER_CONFIG
from sdbatch.models.identify import USES
from sdbatch.models.sd1 import LATENT_CHANNELS
from sdbatch.models.sd1.layers import Layer, plain_name
from sdbatch.models.weights import read_metadata, read_weights

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Formula: TypeAlias = Callable[[Tensors, torch.Tensor], torch.Tensor]

# The names of a layer's tensors, at the end of a key -> our names. The longest that fits counts.
_ENDINGS = {
    "up": r"lora_up\.weight|lora_B(?:\.\w+)?\.weight|lora(?:_linear_layer)?\.up\.weight",
    "down": r"lora_down\.weight|lora_A(?:\.\w+)?\.weight|lora(?:_linear_layer)?\.down\.weight",
    "mid": r"lora_mid\.weight",
    "magnitude": r"lora_magnitude_vector(?:\.\w+)?(?:\.weight)?",  # of DoRA, by peft
    "ia3": "weight",
    **{
        name: name
        for name in (
            *("alpha", "scale", "dora_scale", "on_input", "diff", "diff_b", "w_norm", "b_norm"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        )
    },
}
_KEY = re.compile(
    r"(?P<layer>.+?)[._](?:"
    + "|".join(f"(?P<{name}>{end})" for name, end in _ENDINGS.items())
    + ")"
)
_WITH_ALL = {"alpha", "scale", "dora_scale", "magnitude", "diff_b"}  # may go with any kind
_PEFT = "base_model.model."  # before the names in a file that peft saved
_ADAPTER_METADATA = "lora_adapter_metadata"  # of diffusers, in a file's metadata


@dataclass(frozen=True)
class Factors:
    """A plain LoRA of a layer: `scale` * up @ down."""

    down: torch.Tensor  # (r, I, *k)
    up: torch.Tensor  # (O, r)
    scale: float


@dataclass(frozen=True)
class LayerNetwork:
    """What a network adds to one layer."""

    name: str  # in the file
    tensors: Tensors
    formula: Formula
    scale: float  # alpha / rank

    @property
    def decomposed(self) -> bool:
        """Tell whether it is a DoRA, which depends on the weight that it changes."""
        return bool({"dora_scale", "magnitude"} & self.tensors.keys())

    def delta(self, layer: Layer) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what it adds to the weight and to the bias of `layer`, at weight 1, on the CPU.

        Raises:
            ValueError: its tensors do not fit the layer, or hold NaN.
        """
        weight = layer.weight.detach().to("cpu", torch.float32)
        try:
            delta = self.formula(self.tensors, weight) * self.scale
            if delta.shape[0] != weight.shape[0]:
                raise RuntimeError
            delta = _fit_inputs(delta, weight)
            if self.decomposed:
                delta = self._decompose(weight + delta) - weight
            bias = self.tensors.get("diff_b", self.tensors.get("b_norm"))
            if bias is not None:
                bias = bias.reshape(weight.shape[0])
        except (RuntimeError, IndexError) as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
            raise ValueError(
                f"{self.name} = {shapes}: must fit the layer's weight, {tuple(weight.shape)}"
            ) from error
        if not all(each.isfinite().all() for each in (delta, bias) if each is not None):
            raise ValueError(f"{self.name} holds numbers that are not finite")
        return delta, bias

    def factors(self, layer: Layer) -> Factors | None:
        """Return a plain LoRA's factors; None of other kinds, and of one that has a bias."""
        if self.formula is not _lora or "diff_b" in self.tensors:
            return None
        self.delta(layer)  # raises where they do not fit
        up, down = _flat(self.tensors["up"]), self.tensors["down"]
        if "mid" in self.tensors:
            down = torch.einsum("nm...,mi->ni...", self.tensors["mid"], _flat(down))
        return Factors(_fit_inputs(down, layer.weight), up, self.scale)

    def _decompose(self, changed: torch.Tensor) -> torch.Tensor:
        """Give the changed weight the magnitudes that were trained, by output or by input.

        peft trains one for each output. LyCORIS and kohya's form say it by their shape: (O, 1, ..)
        or, the older, (1, I, ..).
        """
        magnitude = self.tensors.get("magnitude")
        if magnitude is None:
            magnitude = self.tensors["dora_scale"]
            by_output = magnitude.ndim < 2 or magnitude.shape[0] == changed.shape[0]
        else:
            by_output = True
        axis = 0 if by_output else 1
        others = [i for i in range(changed.ndim) if i != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        norm = norm + torch.finfo(norm.dtype).eps
        scaled: torch.Tensor = changed * (magnitude.reshape(norm.shape) / norm)
        return scaled


def read_network(path: str, layers: Mapping[str, Layer]) -> dict[Layer, LayerNetwork]:
    """Return what the network in a file adds to each of a model's layers.

    Args:
        path: a file of any format that `headers` reads.
        layers: of the model, from `layers_of`.

    Raises:
        ValueError: a tensor fits no layer, or is of an unknown kind.
    """
    tensors, config = _read_file(path)
    names: dict[Layer, str] = {}
    parts: dict[Layer, dict[str, torch.Tensor]] = {}
    misfits = []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        layer = layers.get(plain_name(found["layer"])) if found else None
        if found is None or layer is None:
            misfits.append(key)
            continue
        name = next(name for name in _ENDINGS if found[name])
        if name in parts.setdefault(layer, {}):
            raise ValueError(f"{key} appears twice, under another name")
        names[layer] = found["layer"]
        parts[layer][name] = tensor.float()
    if misfits or not parts:
        raise ValueError(
            f"{len(misfits)} of its {len(tensors)} weights fit no layer"
            + (f", the first is {misfits[0]}" if misfits else "")
        )
    return {layer: _make(names[layer], parts[layer], config) for layer in parts}


def _read_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a file's tensors, and the configuration of peft that goes with it."""
    tensors = {k: v for k, v in read_weights(path).items() if isinstance(v, torch.Tensor)}
    metadata = read_metadata(path)
    if _ADAPTER_METADATA in metadata:
        return tensors, json.loads(metadata[_ADAPTER_METADATA])
    config = Path(path).with_name(ADAPTER_CONFIG)
    by_peft = Path(path).stem == "adapter_model" or any(key.startswith(_PEFT) for key in tensors)
    if by_peft and config.is_file():
        return tensors, json.loads(config.read_text(encoding="utf-8"))
    return tensors, {}


def _make(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> LayerNetwork:
    for needed, optional, formula, rank in _KINDS:
        if needed <= tensors.keys() <= needed | optional | _WITH_ALL:
            size = max((tensors[part].shape[0] for part in rank if part in tensors), default=None)
            return LayerNetwork(name, tensors, formula, _scale(name, tensors, size, config))
    raise ValueError(f"{name} has {', '.join(sorted(tensors))}, which is no known kind of network")


def _scale(name: str, tensors: Tensors, rank: int | None, config: dict[str, Any]) -> float:
    """Return alpha / rank; 1 without them, as of a LoKr without any factor (rank None)."""
    if "scale" in tensors:
        return float(tensors["scale"])
    if "alpha" in tensors:
        return float(tensors["alpha"]) / rank if rank else 1.0
    part = name.partition(".")[0]
    own = {  # diffusers writes unet.lora_alpha, peft itself lora_alpha, or alpha of LoHa and LoKr
        key.removeprefix(f"{part}."): value
        for key, value in config.items()
        if "." not in key or key.startswith(f"{part}.")
    }
    alpha, rank = own.get("lora_alpha", own.get("alpha")), rank or own.get("r")
    for pattern, value in (own.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            alpha = value
    if alpha is None or rank is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _fit_inputs(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return (n, *) in the shape (n, I, *k) of a weight.

    A network of a model for text to image has only the latents' channels of the first layer of one
    for inpainting or editing, which come first: it adds nothing to the others.
    """
    if weight.ndim == 4 and weight.shape[1] in USES:
        _, inputs, *kernel = weight.shape
        if tensor[0].numel() == LATENT_CHANNELS * math.prod(kernel):
            tensor = tensor.reshape(len(tensor), LATENT_CHANNELS, *kernel)
            return pad(tensor, (0, 0, 0, 0, 0, inputs - LATENT_CHANNELS))
    return tensor.reshape(len(tensor), *weight.shape[1:])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(len(tensor), -1)


def _tucker(core: torch.Tensor, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return (O, I, *k) of a core (r, r, *k), (r, O) and (r, I)."""
    return torch.einsum("nm...,no,mi->oi...", core, outputs, inputs)


def _lora(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    up, down = _flat(t["up"]), _flat(t["down"])
    return _tucker(t["mid"], up.T, down) if "mid" in t else up @ down


def _loha(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    halves = [
        _tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"])
        if f"hada_t{n}" in t
        else t[f"hada_w{n}_a"] @ _flat(t[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
    return halves[0] * halves[1]


def _lokr(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        two = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        two = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)


def _ia3(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    axis = 1 if t["on_input"] else 0
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    return weight * t["ia3"].reshape(shape)


def _full(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    return t["diff"]


def _norm(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    return t["w_norm"]


def _bias(t: Tensors, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight)


def _kinds() -> Iterable[tuple[set[str], set[str], Formula, tuple[str, ...]]]:
    """Yield each kind: the tensors it needs, those it may have, its formula, where its rank is."""
    yield {"up", "down"}, {"mid"}, _lora, ("down",)
    loha = {f"hada_w{n}_{side}" for n in (1, 2) for side in "ab"}
    yield loha, {"hada_t1", "hada_t2"}, _loha, ("hada_w1_b",)
    for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}):
        for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}):
            yield one | two, {"lokr_t2"}, _lokr, ("lokr_w1_b", "lokr_w2_b")
    yield {"ia3", "on_input"}, set(), _ia3, ()
    yield {"diff"}, set(), _full, ()
    yield {"w_norm"}, {"b_norm"}, _norm, ()
    yield {"b_norm"}, set(), _bias, ()
    yield {"diff_b"}, set(), _bias, ()


_KINDS = tuple(_kinds())
