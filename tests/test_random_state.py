"""The generators of torch, numpy and Python: saved, restored, kept and seeded together."""

from __future__ import annotations

import io

import pytest
import torch
from loaders import OwnNoise, global_noise

from lightning_januspipe.random_state import kept_random_state, random_state, seeded, set_random_state


def test_a_saved_state_is_read_with_weights_only_and_restored() -> None:
    file = io.BytesIO()
    torch.save(random_state(), file)
    first = global_noise()
    assert global_noise() != first
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert global_noise() == first


def test_what_is_drawn_inside_is_undone() -> None:
    held = {"transforms": [OwnNoise()]}
    own = held["transforms"][0]
    with kept_random_state(held):
        first, own_first = global_noise(), own()
    assert (global_noise(), own()) == (first, own_first)
    with kept_random_state():
        own_second = own()
    assert own() != own_second, "generators of objects that were not named go on"


def test_states_are_restored_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="drawn"), kept_random_state():
        raise ValueError(f"drawn {global_noise()}")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_decides_inside_and_leaves_nothing() -> None:
    state = random_state()
    with seeded(3):
        first = global_noise()
    with seeded(3):
        assert global_noise() == first
    with seeded(4):
        assert global_noise() != first
    following = global_noise()
    set_random_state(state)
    assert global_noise() == following
