"""Memories, samplers and segments with given importances, and what is drawn from them."""

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import relative_costs
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits
from hf_importance.sampling.strata import Strata

UNEQUAL = [0.2, 1.0, 0.4, 3.0, float("nan"), 0.7]
"""Unequal importances, one of them unknown."""
SAMPLING_MODES = pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])


def random_values(n, seed=0):
    """Uniform in [0, 1), float64."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lognormal_values(n, seed=0, scale=0.8):
    return torch.exp(scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def random_importance(n, seed, power=2):
    """Random importances in [0, 1), as a list."""
    return (torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed)) ** power).tolist()


def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def equal_with_nan(a, b):
    """Equal bit for bit, with NaN equal to NaN."""
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


# ---- memories and samplers -------------------------------------------------------------------------------------------


def memory_of(importance, momentum=0.0, cost=None, tokens=None):
    """A memory with these importances; `cost` in any unit."""
    cost = None if cost is None else relative_costs(torch.as_tensor(cost))
    tokens = None if tokens is None else torch.as_tensor(tokens).float()
    memory = ImportanceMemory(len(importance), momentum, cost, tokens)
    memory.load_state_dict({"importance": torch.as_tensor(importance).float()})
    return memory


def sampler_of(importance, batch, **settings):
    return ImportanceBatchSampler(memory_of(importance, 0.2), batch, **{"uniform_fraction": 0.3, **settings})


def used(sampler):
    """The draws of an epoch, each of which is used at once."""
    for draw in sampler:
        sampler.mark_used(draw)
        yield draw


def draws_of(sampler, epochs=1):
    return [draw for _ in range(epochs) for draw in used(sampler)]


def visit_counts(draws, length):
    return torch.bincount(tensor([i for draw in draws for i in draw.index]), minlength=length).double()


# ---- segments --------------------------------------------------------------------------------------------------------


def segmented_visits(memory, batch=1, **settings):
    return SegmentedVisits(memory, batch, **{"uniform_fraction": 0.3, "guard": False, **settings})


def next_segment(visits):
    """The whole next segment: examples and rates, as lists."""
    index, rate = visits.plan()
    return index.tolist(), rate.tolist()


def in_batches(visits, size):
    """The visits of all segments, at most `size` at a time: examples int64 and rates."""
    while True:
        index, rate = visits.plan()
        for start in range(0, len(index), size):
            yield index[start : start + size].long(), rate[start : start + size]


def next_segments(visits, number):
    return [next_segment(visits) for _ in range(number)]


def visited_examples(visits, number):
    """Examples of the next `number` segments, in order."""
    return [i for index, _ in next_segments(visits, number) for i in index]


def next_by_reference(visits, size, seed, floor=0.3, pruned=None, now=None):
    """Visits (when, example, rate) of the next segment of this length, and places and positions after it, by oracle.

    Args:
        seed: seed of the permutation of the next pass, from which strata begin if they have not yet.
        pruned: mask of the pruned examples, as a list.
        now: importances when the segment is planned, by default those of the memory.
    """
    memory, state = visits.memory, visits.state_dict()["strata"]
    if state is None:
        state = Strata(memory.importances if now is None else tensor(now), seed + 2**31).state_dict()
    rng = torch.Generator()
    rng.set_state(state["rng"])
    begun, now = state["importance"].tolist(), memory.importances.tolist() if now is None else now
    if visits.prior is not None:
        begun, now = (oracles.assumed(q, now, visits.prior.tolist()) for q in (begun, now))
    return oracles.plan_visits(
        begun,
        now,
        list(zip(state["place"].tolist(), state["position"].tolist(), strict=True)),
        size,
        floor,
        pruned,
        None if memory.cost is None else memory.cost.tolist(),
        rand=lambda number: torch.rand(number, generator=rng).tolist(),
    )
