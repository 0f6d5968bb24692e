"""The training loop: a resumed training gives the same bits as an uninterrupted one."""

from dataclasses import replace

import pytest
import torch

from training import denoiser, loop
from training.loop import BRANCH_OUTPUTS, SAVE_EVERY, Settings

SCHEDULE = ((0, 0.0), (20, 1.0))
SETTINGS = Settings(steps=2 * SAVE_EVERY, batch=1, rate=1e-2, rate_schedule=SCHEDULE)


@pytest.fixture(autouse=True)
def threads():
    """Restore torch's number of threads, which a training changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(folder, settings=SETTINGS, stop_at=None):
    """Train a linear layer; return its weights."""
    torch.manual_seed(settings.seed)
    network = torch.nn.Linear(4, 1)

    def loss(step):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    loop.train(network, loss, settings, folder)
    return network.weight


def steps(folder):
    return [line["step"] for line in loop.read_curve(folder)]


def test_the_loss_falls_and_is_written_to_the_curve(tmp_path):
    weights = train(tmp_path)
    losses = [line["loss"] for line in loop.read_curve(tmp_path)]
    assert steps(tmp_path) == list(range(50, SETTINGS.steps + 1, 50))
    assert losses[-1] < 0.1 * losses[0]
    assert torch.allclose(weights, torch.ones(1, 4), atol=0.1)


@pytest.mark.parametrize("stop_at", [SAVE_EVERY, SAVE_EVERY + 70])
@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_training_gives_the_same_bits(tmp_path, stop_at, muon):
    settings = replace(SETTINGS, muon=muon)
    whole = train(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", settings, stop_at=stop_at)
    assert torch.equal(train(tmp_path / "stopped", settings), whole)
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole")
    losses = [
        [line["loss"] for line in loop.read_curve(tmp_path / name)] for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]


def test_the_rate_rises_stays_constant_and_falls():
    settings = replace(SETTINGS, rate_schedule=(*SCHEDULE, (400, 1.0), (500, 0.0)))
    factors = [settings.rate_factor(step) for step in (0, 10, 20, 399, 400, 450, 499)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0.01])


def test_a_finished_training_continues_when_it_gets_more_steps(tmp_path):
    train(tmp_path / "more", replace(SETTINGS, steps=SAVE_EVERY))
    assert torch.equal(train(tmp_path / "more"), train(tmp_path / "whole"))


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"batch": 2}, {"rate_schedule": ((0, 0.0), (40, 1.0))}, {"muon": True}]
)
def test_a_training_does_not_resume_with_other_settings(tmp_path, changes):
    train(tmp_path)
    with pytest.raises(
        ValueError, match=r"500 steps with other settings: .* Choose another folder"
    ):
        train(tmp_path, replace(SETTINGS, **changes))


def test_the_rate_schedule_of_future_steps_may_change(tmp_path):
    first = replace(SETTINGS, steps=SAVE_EVERY)
    falling = replace(SETTINGS, rate_schedule=(*SCHEDULE, (SAVE_EVERY, 1.0), (SETTINGS.steps, 0.0)))
    train(tmp_path / "changed", first)
    assert torch.equal(train(tmp_path / "changed", falling), train(tmp_path / "whole", falling))


def test_another_seed_gives_other_weights(tmp_path):
    first, second = (train(tmp_path / str(seed), replace(SETTINGS, seed=seed)) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_initial_weights_keep_the_scale_of_a_signal():
    torch.manual_seed(0)
    chain = torch.nn.Sequential(
        *(torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular") for _ in range(10))
    )
    signal = torch.randn(4, 16, 16, 16)
    constant = chain(torch.zeros_like(signal))
    assert (chain(signal) - constant).std() < 0.1  # torch's default weights
    loop.initialize_weights(chain)
    assert 0.5 < chain(signal).std() < 2


def test_residual_branches_start_at_zero():
    unet = denoiser.build_unet()
    outputs = [module for name, module in unet.named_modules() if name.endswith(BRANCH_OUTPUTS)]
    assert len(outputs) > 20
    assert not any(weights.any() for output in outputs for weights in output.parameters())
