"""`isolated_randomness` restores the state of all random number generators."""

import random

import numpy
import torch

from hf_importance.randomness import isolated_randomness


class Owner:
    """Like a collator with its own generators: one is created at the first draw, others are in a nested object."""

    def __init__(self, inner=None):
        self.torch = torch.Generator().manual_seed(1)
        self.numpy, self.legacy_numpy = numpy.random.default_rng(1), numpy.random.RandomState(1)
        self.python = random.Random(1)
        self.lazy, self.inner = None, inner

    def draw(self):
        if self.lazy is None:
            self.lazy = numpy.random.default_rng(2)
        generators = self.numpy, self.legacy_numpy, self.lazy
        found = [float(g.normal()) for g in generators] + [
            self.python.random(),
            torch.rand((), generator=self.torch).item(),
        ]
        return found + (self.inner.draw() if self.inner is not None else [])


def draw_all(owner):
    """One number from each global generator, then from those of the owner."""
    return [random.random(), float(numpy.random.rand()), torch.rand(()).item(), *owner.draw()]


def seeded():
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    return Owner(inner=Owner())


def test_random_state_is_restored():
    expected = draw_all(seeded())
    owner = seeded()
    with isolated_randomness(owners=(owner,)):
        inside = draw_all(owner)
    assert draw_all(owner) == expected
    assert inside[:3] != expected[:3]
    assert inside[3:] == expected[3:], "generators of the owner are not reseeded"


def test_control_generators_of_other_objects_are_not_restored():
    expected = draw_all(seeded())
    owner = seeded()
    with isolated_randomness():
        draw_all(owner)
    after = draw_all(owner)
    assert after[:3] == expected[:3]
    assert all(a != b for a, b in zip(after[3:], expected[3:], strict=True))


def test_random_numbers_inside_depend_only_on_the_seed():
    found = []
    for seed in (0, 0, 1):
        with isolated_randomness(seed=seed):
            found.append([random.random(), float(numpy.random.rand()), torch.rand(()).item()])
    assert found[0] == found[1] != found[2]


def test_random_state_is_restored_after_an_error():
    expected = draw_all(seeded())
    owner = seeded()
    try:
        with isolated_randomness(owners=(owner,)):
            draw_all(owner)
            raise KeyError
    except KeyError:
        pass
    assert draw_all(owner) == expected
