"""What the sampler holds and does: bytes per example between draws, and the size of tensor operations."""

from collections import deque

import numpy as np
import pytest
import torch
from sampling_helpers import memory_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler

N = 100_000


def lognormal(n):
    return torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(0)))


def sampler_in_strata(n=N, batch=100, **settings):
    """A sampler that has just planned a segment in the third pass, with visits that were measured."""
    sampler = ImportanceBatchSampler(memory_of(lognormal(n)), batch, uniform_fraction=0.3, **settings)
    while sampler.visits.passes < 3:
        sampler._next_visits(batch)
    sampler.mark_used(next(iter(sampler)))
    return sampler


# ---- bytes -----------------------------------------------------------------------------------------------------------


def tensors_of(thing, seen):
    """All tensors and arrays that can be reached from a thing, as tensors, without those of a record."""
    if id(thing) in seen or isinstance(thing, VisitRecord):
        return
    seen[id(thing)] = thing  # kept, so that no other gets its identity
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, np.ndarray):
        yield torch.from_numpy(whole_array(thing))
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, list | tuple | deque):
        for value in thing:
            yield from tensors_of(value, seen)
    elif type(thing).__module__.startswith("hf_importance"):
        yield from tensors_of(vars(thing), seen)


def whole_array(array):
    """The array whose elements are viewed."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def bytes_held(sampler):
    """Bytes of all storages, each once and whole, also if only a part of it is viewed."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(sampler, {})}
    return sum(storages.values())


VISITS = 16 * 4 * (N / 8) ** 0.5
"""Bytes of visits by which a segment may differ from N/8: four standard deviations, .06 bytes per example."""


def test_at_most_22_bytes_per_example_in_strata():
    """Memory 4, first passes 4, strata 12, visits of a segment 2; another 1 for those pruned. Without a record."""
    sampler = sampler_in_strata(record=VisitRecord(N))
    assert 21.9 * N < bytes_held(sampler) <= 22 * N + VISITS
    pruning = sampler_in_strata(prune_mass=0.02)
    assert pruning.pruned.any(), "premise"
    assert bytes_held(pruning) <= 23 * N + VISITS
    sampler.visits._strata.more = torch.zeros(2 * N)[:1]
    assert bytes_held(sampler) > 28 * N, "control: also the storage of a view counts"


def test_at_most_10_bytes_per_example_before_strata():
    """Memory 4, permutation 4, visits of a segment 2."""
    sampler = ImportanceBatchSampler(ImportanceMemory(N), 100)
    sampler.mark_used(next(iter(sampler)))
    assert 9.9 * N < bytes_held(sampler) <= 10 * N + 1000


# ---- operations ------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Numbers of elements that tensor operations return, without views; writing by index returns what is written to."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.index_put_.default:
            outputs = found if isinstance(found, list | tuple) else [found]
            self.elements += [x.numel() for x in outputs if isinstance(x, Tensor)]
        return found


def elements_of(do):
    with Operations() as operations:
        do()
    return operations.elements


@pytest.mark.parametrize("prune_mass", [0.0, 0.02])
def test_draws_between_plans_are_independent_of_the_number_of_examples(prune_mass):
    def held(sampler):
        return len(sampler.state_dict()["planned"]["index"])

    sampler = sampler_in_strata(prune_mass=prune_mass)
    stream, found = iter(sampler), []
    for _ in range(50):
        assert held(sampler) >= 100, "premise: no plan"
        found += elements_of(lambda: sampler.mark_used(next(stream)))
    assert max(found, default=0) <= 100, "the batch"
    control = elements_of(lambda: [sampler.mark_used(next(stream)) for _ in range(150)])
    assert max(control) >= N, "control: with the next plan"


def test_measurements_between_plans_are_independent_of_the_number_of_examples():
    sampler, found = sampler_in_strata(), []
    draw = next(iter(sampler))
    measured = torch.ones(1, 100)

    def measure():
        sampler.update(draw, measured)
        sampler.flush()

    for _ in range(20):
        found += elements_of(measure)
    assert 0 < max(found) <= 101 * 9, "a row for each floor of the guard, or each moment, and their sum so far"


@pytest.mark.parametrize("prune_mass", [0.0, 0.02])
def test_planning_is_linear_in_the_number_of_examples(prune_mass):
    """Elements of a whole pass, relative to the examples."""
    found = []
    for n in (20_000, 80_000):
        sampler = sampler_in_strata(n, prune_mass=prune_mass)
        sampler.visits.plan()
        found.append(sum(elements_of(lambda visits=sampler.visits: [visits.plan() for _ in range(8)])) / n)
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] < 8 * 110, "in each segment"


def test_start_takes_a_permutation():
    """What a sampler does when it is made, and its first draw: 9.8 elements per example."""
    elements = elements_of(lambda: next(iter(ImportanceBatchSampler(ImportanceMemory(N), 100))))
    assert N < sum(elements) < 9.8 * N
