"""The training loop: what was stopped goes on with the bits that it would have had."""

from dataclasses import replace

import pytest
import torch

from training import denoiser, loop
from training.loop import SAVE_EVERY, Settings

COURSE = ((0, 0.0), (20, 1.0))
SETTINGS = Settings(steps=2 * SAVE_EVERY, batch=1, rate=1e-2, course=COURSE)


@pytest.fixture(autouse=True)
def threads():
    """Leave torch's number of threads as it was: a training sets its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(folder, settings=SETTINGS, stop=None):
    """Fit a line; return its weights."""
    torch.manual_seed(settings.seed)
    network = torch.nn.Linear(4, 1)

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    loop.train(network, loss, settings, folder)
    return network.weight


def steps(folder):
    return [line["step"] for line in loop.curve(folder)]


def test_the_loss_falls_and_the_curve_shows_it(tmp_path):
    weights = train(tmp_path)
    losses = [line["loss"] for line in loop.curve(tmp_path)]
    assert steps(tmp_path) == list(range(50, SETTINGS.steps + 1, 50))
    assert losses[-1] < 0.1 * losses[0]
    assert torch.allclose(weights, torch.ones(1, 4), atol=0.1)


@pytest.mark.parametrize("stop", [SAVE_EVERY, SAVE_EVERY + 70])
@pytest.mark.parametrize("muon", [False, True])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, stop, muon):
    settings = replace(SETTINGS, muon=muon)
    whole = train(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", settings, stop=stop)
    assert torch.equal(train(tmp_path / "stopped", settings), whole)
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole")
    losses = [
        [line["loss"] for line in loop.curve(tmp_path / name)] for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]


def test_the_rate_rises_stays_and_falls():
    settings = replace(SETTINGS, course=(*COURSE, (400, 1.0), (500, 0.0)))
    rates = [settings.share_of_rate(step) for step in (0, 10, 20, 399, 400, 450, 499)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0.01])


def test_more_steps_go_on_from_a_finished_training(tmp_path):
    train(tmp_path / "more", replace(SETTINGS, steps=SAVE_EVERY))
    assert torch.equal(train(tmp_path / "more"), train(tmp_path / "whole"))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"batch": 2}, {"course": ((0, 0.0), (40, 1.0))}, {"muon": True}]
)
def test_a_training_goes_on_under_no_other_settings(tmp_path, other):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"500 steps under other settings: .* Give another folder"):
        train(tmp_path, replace(SETTINGS, **other))


def test_a_training_may_be_given_another_future(tmp_path):
    first = replace(SETTINGS, steps=SAVE_EVERY)
    falling = replace(SETTINGS, course=(*COURSE, (SAVE_EVERY, 1.0), (SETTINGS.steps, 0.0)))
    train(tmp_path / "changed", first)
    assert torch.equal(train(tmp_path / "changed", falling), train(tmp_path / "whole", falling))


def test_another_seed_gives_other_weights(tmp_path):
    one, other = (train(tmp_path / str(seed), replace(SETTINGS, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_fresh_weights_let_a_signal_through():
    torch.manual_seed(0)
    chain = torch.nn.Sequential(
        *(torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular") for _ in range(10))
    )
    signal = torch.randn(4, 16, 16, 16)
    constant = chain(torch.zeros_like(signal))
    assert (chain(signal) - constant).std() < 0.1  # torch's own weights
    loop.let_through(chain)
    assert 0.5 < chain(signal).std() < 2


def test_branches_begin_at_zero():
    unet = denoiser.build()
    ends = [part for name, part in unet.named_modules() if name.endswith(loop.LAST_OF_BRANCH)]
    assert len(ends) > 20
    assert not any(weights.any() for end in ends for weights in end.parameters())
