"""Rows whose bits are their own, and rows of a family whose bits are not."""

import pytest
import torch

from sdbatch.engine.places import differences, hashes, make_rows
from tests.engine.faulty_family import FaultyFamily


class Leaking(FaultyFamily):
    """A family with one fault: what `denoise` or `decode` does to its rows."""

    def __init__(self, family, fault, call="denoise"):
        super().__init__(family)
        self.fault, self.call = fault, call

    def denoise(self, latents, timesteps, conditions):
        answer = super().denoise(latents, timesteps, conditions)
        return self.fault(answer, latents) if self.call == "denoise" else answer

    def decode(self, latents, dtype):
        latents = self.fault(latents, latents) if self.call == "decode" else latents
        return super().decode(latents, dtype)


@pytest.mark.parametrize("lanes", [2, 5, 20])
def test_no_change_of_a_call_changes_a_rows_bits_on_a_cpu(family, request_for, lanes):
    torch.set_num_threads(1)
    assert differences(family, request_for(height=16, width=16), lanes, 2) == []


def test_rows_are_as_they_are_in_an_engine_with_noise_and_timesteps_of_their_own(
    family, request_for
):
    rows = make_rows(family, request_for(num_inference_steps=4), 10)
    assert len(rows.latents) == len(rows.timesteps) == 10
    assert all(len(each) == 10 for each in rows.conditions.values())
    assert len(rows.latents.unique(dim=0)) == 10
    assert len(rows.timesteps.unique()) == 4


def shift_by_neighbours(answer, _):
    return answer + 0.5 * answer.mean(0)


def shift_by_place(answer, _):
    return answer + torch.arange(len(answer)).view(-1, 1, 1, 1)


def shift_the_last(answer, _):
    return torch.cat([answer[:-1], answer[-1:] + 0.5])


def shift_where_rows_are_empty(answer, latents):
    return answer + float((latents == 0).flatten(1).all(1).any())


@pytest.mark.parametrize("call", ["denoise", "decode"])
@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (shift_by_neighbours, {"other neighbours", "no neighbours"}),
        (shift_by_place, {f"rolled by {by}" for by in range(1, 6)}),
        (shift_the_last, {f"rolled by {by}" for by in range(1, 6)}),
        (shift_where_rows_are_empty, {"no neighbours"}),
    ],
)
def test_a_fault_is_found_by_the_change_that_shows_it(family, request_for, fault, changes, call):
    request = request_for(height=16, width=16)
    found = differences(Leaking(family, fault, call), request, 6, 6)
    assert {each.change for each in found} >= changes
    assert {each.call for each in found} == {"denoiser" if call == "denoise" else "decoder"}
    assert all(each.rows > 0 and each.greatest > 0 for each in found)


def test_a_call_that_gives_something_else_when_it_is_repeated_is_found(family, request_for):
    calls = []

    def drift(answer, _):
        calls.append(1)
        return answer + len(calls)

    found = differences(Leaking(family, drift), request_for(height=16, width=16), 2, 2)
    assert "repeated" in {each.change for each in found}


def test_hashes_are_equal_for_equal_bits_alone(family, kind, request_for):
    request = request_for(height=16, width=16)
    first = hashes(family, request, 4, 2)
    assert first.keys() == {"denoiser", "decoder"}
    assert hashes(kind.load(), request, 4, 2) == first
    assert hashes(Leaking(family, shift_the_last), request, 4, 2)["denoiser"] != first["denoiser"]
