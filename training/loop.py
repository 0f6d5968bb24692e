"""The training loop of all networks, with a learning-rate schedule and averaged weights.

The data of a step depends only on the number of the step, and the saved state is complete: a
resumed training produces the same bits as an uninterrupted one.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch.optim.lr_scheduler import LambdaLR

from training.muon import Muon

REPORT_EVERY = 50  # steps; the curve has their mean loss
SAVE_EVERY = 250  # steps, a multiple of REPORT_EVERY
WEIGHT_DECAY = 0.01
RateSchedule = tuple[tuple[int, float], ...]
STATE_FILE, CURVE_FILE = "state.pt", "curve.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one network's training.

    The state file stores most of these names: a renamed field makes old states unusable.
    """

    steps: int  # a multiple of REPORT_EVERY
    batch: int  # pictures per step
    rate: float  # highest learning rate
    # Points (step, factor of the rate), with linear interpolation between them.
    rate_schedule: RateSchedule = ((0, 0.0), (200, 1.0))
    muon: bool = False  # Muon for weights of two or more dimensions, AdamW for the others
    average: float = 0.999  # decay of the averaged weights per step
    threads: int = 1  # torch's: with another number the sums differ in their last bits
    seed: int = 0

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate at `step`, 0 to 1."""
        steps, factors = zip(*self.rate_schedule, strict=True)
        return float(np.interp(step, steps, factors))

    def up_to(self, step: int) -> dict[str, Any]:
        """Return everything that the first `step` steps depend on, as stored in the state file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["steps"], values["rate_schedule"]
        return {**values, "shares": [self.rate_factor(earlier) for earlier in range(step)]}


BRANCH_OUTPUTS = ("conv2", "to_out.0", "ff.net.2")  # last layers of diffusers' residual branches


def initialize_weights(network: torch.nn.Module) -> None:
    """Initialize `network` so that signals keep their scale and residual branches output zero.

    torch's default weights halve the signal in each of the many layers between a picture and its
    reconstruction, until only the biases remain. Training is then very slow at the start.

    Source: He et al. 2015, without activation; Zhang et al. 2019 (Fixup) for the branches.
    """
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        if name.endswith(BRANCH_OUTPUTS):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def train(
    network: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    settings: Settings,
    folder: Path,
) -> None:
    """Train `network`, resuming from the state in `folder` if there is one.

    Args:
        network: contains the averaged weights afterwards.
        loss: returns the loss of a step, with its graph.
        settings: steps, learning rate and averaging.
        folder: receives state.pt, and curve.jsonl with one line every 50 steps.

    Raises:
        ValueError: the state in `folder` belongs to other settings.
    """
    torch.set_num_threads(settings.threads)
    folder.mkdir(parents=True, exist_ok=True)
    weights = list(network.parameters())
    optimizers = _build_optimizers(weights, settings)
    average = EMAModel(weights, decay=settings.average)
    components = {"network": network, "average": average}
    for name, optimizer in optimizers.items():
        components[name] = optimizer
        components[f"{name}_rate"] = LambdaLR(optimizer, settings.rate_factor)
    mean_loss, start_time = 0.0, time.monotonic()
    for step in range(_restore_state(components, settings, folder), settings.steps):
        step_loss = loss(step)
        network.zero_grad()
        torch.autograd.backward(step_loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for name, optimizer in optimizers.items():
            optimizer.step()
            components[f"{name}_rate"].step()
        average.step(weights)
        mean_loss += step_loss.item() / REPORT_EVERY
        step_count = step + 1
        if step_count % REPORT_EVERY == 0:
            seconds = (time.monotonic() - start_time) / REPORT_EVERY
            _report_progress(folder, step_count, mean_loss, seconds)
            mean_loss, start_time = 0.0, time.monotonic()
        if step_count % SAVE_EVERY == 0 or step_count == settings.steps:
            _save_state(components, settings.up_to(step_count), step_count, folder)
    average.copy_to(weights)


def _build_optimizers(
    weights: list[torch.nn.Parameter], settings: Settings
) -> dict[str, torch.optim.Optimizer]:
    muon_weights = [weight for weight in weights if settings.muon and weight.ndim > 1]
    adamw_weights = [weight for weight in weights if not settings.muon or weight.ndim < 2]
    adamw = torch.optim.AdamW(adamw_weights, lr=settings.rate, weight_decay=WEIGHT_DECAY)
    if not muon_weights:
        return {"adamw": adamw}
    return {
        "adamw": adamw,
        "muon": Muon(muon_weights, lr=settings.rate, weight_decay=WEIGHT_DECAY),
    }


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Read the curve of a training: step, mean loss of 50 steps and seconds per step."""
    path = folder / CURVE_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _report_progress(folder: Path, step_count: int, loss: float, seconds: float) -> None:
    """Print a line of the curve and append it to the curve file."""
    line = {"step": step_count, "loss": round(loss, 6), "seconds_a_step": round(seconds, 3)}
    print(folder.name, json.dumps(line), flush=True)
    with (folder / CURVE_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _save_state(
    components: dict[str, Any], past: dict[str, Any], step_count: int, folder: Path
) -> None:
    state = {name: component.state_dict() for name, component in components.items()}
    torch.save({**state, "past": past, "step": step_count}, folder / "state.tmp")
    (folder / "state.tmp").rename(folder / STATE_FILE)


def _restore_state(components: dict[str, Any], settings: Settings, folder: Path) -> int:
    """Load the saved state, if there is one; return how many steps it includes.

    Lines of the curve after these steps are removed.

    Raises:
        ValueError: its steps used other settings.
    """
    lines = read_curve(folder)
    state: dict[str, Any] = {"step": 0}
    if (folder / STATE_FILE).exists():
        state = torch.load(folder / STATE_FILE)
        if state["past"] != settings.up_to(state["step"]):
            raise ValueError(
                f"{folder} = {state['step']} steps with other settings: must be a training with "
                f"the same settings. Choose another folder."
            )
        for name, component in components.items():
            component.load_state_dict(state[name])
    lines = [line for line in lines if line["step"] <= state["step"]]
    (folder / CURVE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(state["step"])
