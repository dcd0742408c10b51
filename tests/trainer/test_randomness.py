"""Random numbers drawn inside do not affect the state outside."""

import random

import numpy
import torch

from hf_importance.randomness import isolated_randomness


class Owner:
    """Like a collator with its own generators, one of them created lazily, and one in a nested object."""

    def __init__(self, inner=None):
        self.torch = torch.Generator().manual_seed(1)
        self.numpy, self.old = numpy.random.default_rng(1), numpy.random.RandomState(1)
        self.python = random.Random(1)
        self.later, self.inner = None, inner

    def draw(self):
        if self.later is None:
            self.later = numpy.random.default_rng(2)
        generators = self.numpy, self.old, self.later
        found = [float(g.normal()) for g in generators] + [
            self.python.random(),
            torch.rand((), generator=self.torch).item(),
        ]
        return found + (self.inner.draw() if self.inner is not None else [])


def drawn(owner):
    return [random.random(), float(numpy.random.rand()), torch.rand(()).item(), *owner.draw()]


def seeded():
    random.seed(3)
    numpy.random.seed(3)
    torch.manual_seed(3)
    return Owner(inner=Owner())


def test_nothing_was_drawn():
    expected = drawn(seeded())
    owner = seeded()
    with isolated_randomness(owners=(owner,)):
        inside = drawn(owner)
    assert drawn(owner) == expected
    assert inside[:3] != expected[:3]
    assert inside[3:] == expected[3:], "generators of its own go on from where they are"


def test_control_without_owners_they_have_moved():
    expected = drawn(seeded())
    owner = seeded()
    with isolated_randomness():
        drawn(owner)
    after = drawn(owner)
    assert after[:3] == expected[:3]
    assert all(a != b for a, b in zip(after[3:], expected[3:], strict=True))


def test_inside_it_is_the_same_each_time():
    found = []
    for seed in (0, 0, 1):
        with isolated_randomness(seed=seed):
            found.append([random.random(), float(numpy.random.rand()), torch.rand(()).item()])
    assert found[0] == found[1] != found[2]


def test_an_error_inside_restores_as_well():
    expected = drawn(seeded())
    owner = seeded()
    try:
        with isolated_randomness(owners=(owner,)):
            drawn(owner)
            raise KeyError
    except KeyError:
        pass
    assert drawn(owner) == expected
