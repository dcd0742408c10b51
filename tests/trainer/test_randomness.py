"""`isolated_randomness` restores the state of the global random number generators."""

import random

import numpy
import torch

from hf_importance.randomness import isolated_randomness


def draw_all():
    """One number from each global generator."""
    return [random.random(), float(numpy.random.rand()), torch.rand(()).item()]


def seed_all():
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)


def test_random_state_is_restored():
    seed_all()
    expected = draw_all()
    seed_all()
    with isolated_randomness():
        inside = draw_all()
    assert draw_all() == expected
    assert all(a != b for a, b in zip(inside, expected, strict=True))


def test_control_numbers_differ_without_isolation():
    seed_all()
    expected = draw_all()
    seed_all()
    draw_all()
    assert all(a != b for a, b in zip(draw_all(), expected, strict=True))


def test_random_numbers_inside_depend_only_on_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        with isolated_randomness(seed=seed):
            drawn.append(draw_all())
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_state_is_restored_after_an_error():
    seed_all()
    expected = draw_all()
    seed_all()
    try:
        with isolated_randomness():
            draw_all()
            raise KeyError
    except KeyError:
        pass
    assert draw_all() == expected
