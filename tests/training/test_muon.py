"""Muon: its steps are orthogonal, and it learns what AdamW learns."""

import pytest
import torch

from training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 1, 8), (2, 24, 24)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    projections = (left.mT @ result @ right.mT).diagonal(dim1=1, dim2=2)
    assert torch.allclose(projections.sort().values, values.sort().values, atol=1e-3)


def test_the_length_of_a_step_depends_on_the_rate_and_not_on_the_gradient():
    for scale in (1e-3, 1e3):
        weight = torch.nn.Parameter(torch.zeros(32, 8, 3, 3))
        weight.grad = scale * torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=0.1, weight_decay=0).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)  # 0.2 x rate


def test_weights_decay():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))


def test_muon_trains_a_convolution():
    torch.manual_seed(0)
    target, network = (torch.nn.Conv2d(4, 8, 3, bias=False) for _ in range(2))
    optimizer = Muon(network.parameters(), lr=0.02, weight_decay=0)
    losses = []
    for _ in range(300):
        x = torch.randn(8, 4, 6, 6)
        loss = (network(x) - target(x).detach()).square().mean()
        network.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
