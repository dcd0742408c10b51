"""`group_by_length`: the drawn examples are unchanged, batches have little padding, and it resumes exactly."""

from collections import Counter

import pytest
import torch
from torch import tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_importance.sampling.draw import Shard
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import relative_costs
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits

MODES = pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])


def lengths_of(n, seed=0):
    return torch.exp(3 + 0.8 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).ceil().long()


def memory_of(n, length=None):
    memory = ImportanceMemory(n, 0.2, None if length is None else relative_costs(length))
    hard = torch.rand(n, generator=torch.Generator().manual_seed(1))
    memory.load_state_dict({"importance": hard if length is None else hard * length.sqrt()})  # of a sum over tokens
    return memory


def sampler_of(length, batch, batches=1, shard=None, grouped=True, **settings):
    shard = Shard(len(length)) if shard is None else shard
    mine = length if shard.index is None else length[shard.index]
    groups = LengthGroups(mine, batch, batches, shard.length) if grouped else None
    settings = {"uniform_fraction": 0.3, **settings}
    return ImportanceBatchSampler(memory_of(len(mine), mine), batch, shard=shard, groups=groups, **settings)


def drawn(sampler, epochs):
    return [draw for _ in range(epochs) for draw in sampler]


def real_tokens(batches, length):
    """Share of padding in batches padded to their longest text."""
    real = sum(int(length[index].sum()) for index in batches)
    return real / sum(len(index) * int(length[index].max()) for index in batches)


def of_transformers(length, batch, batches, epochs):
    """Batches of `Trainer` on all processes."""
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        order = get_length_grouped_indices(length.tolist(), batch * batches, generator=g)
        found += [order[start : start + batch] for start in range(0, len(order), batch)]
    return found


# ---- the groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch", "size"), [(96, 3, 24), (2400, 4, 200), (1000, 5, 250)])
def test_mega_batches_are_those_of_transformers(n, batch, size):
    """For a permutation; the mega-batch of transformers with the longest text is not sorted again."""
    length, permutation = lengths_of(n), torch.randperm(n, generator=torch.Generator().manual_seed(5))
    theirs = get_length_grouped_indices(length.tolist(), batch, generator=torch.Generator().manual_seed(5))
    groups = LengthGroups(length, batch, 1, n)
    assert groups.size == size
    groups.add(permutation, torch.rand(n))
    ours = torch.cat([groups.take(batch)[0] for _ in range(n // batch)]).tolist()
    assert len(groups) == 0
    assert ours[0] == theirs[0] == length.argmax()
    same = 0
    for start in range(0, n, size):
        part = slice(start, start + size)
        assert set(ours[part]) == set(theirs[part])
        assert (length[ours[part]].diff() <= 0).all()
        same += ours[part] == theirs[part]
    assert same >= n // size - 1
    assert ours != permutation.tolist(), "control"


def test_accumulated_batches_make_larger_groups():
    assert LengthGroups(lengths_of(10), 4, 3, 10**6).size == 50 * 12
    assert LengthGroups(lengths_of(10), 4, 3, 1000).size == 20 * 12
    assert LengthGroups(lengths_of(10), 4, 3, 10).size == 12


def test_rates_stay_with_their_visits():
    length = lengths_of(100)
    groups = LengthGroups(length, 4, 1, 100)
    index = torch.arange(100).roll(31)
    groups.add(index, index.float())
    for _ in range(25):
        index, rate = groups.take(4)
        assert rate.tolist() == index.tolist()


def test_what_fills_no_batch_comes_first_in_the_next_group():
    """No visit waits long, not even the shortest."""
    length = torch.arange(1, 61)
    groups = LengthGroups(length, 4, 1, 16)
    for part in range(10):
        index = torch.arange(6 * part, 6 * part + 6)
        waited = groups._waiting[0].tolist()
        groups.add(index, torch.ones(6))
        found = []
        while len(groups) >= 4:
            found += groups.take(4)[0].tolist()
        assert set(waited) <= set(found)
        assert len(groups) < 4


# ---- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(100, 4), (403, 5), (30, 8), (5, 8)])
def test_what_is_drawn_is_what_was_planned(n, batch):
    """With the same rates and weights; only the order differs."""
    length = lengths_of(n)
    sampler = sampler_of(length, batch, guard=False, weight_exponent=0.5)
    draws = drawn(sampler, 6)
    found = Counter((i, r) for draw in draws for i, r in zip(draw.index, draw.rate, strict=True))
    assert all(draw.weight == pytest.approx([r**-0.5 for r in draw.rate]) for draw in draws)
    visits = SegmentedVisits(memory_of(n, length), LengthGroups(length, batch, 1, n).size, guard=False)
    planned, order = Counter(), []
    while sum(planned.values()) < sum(found.values()):
        index, rate = visits.next(2**62)
        planned.update(zip(index.tolist(), rate.double().tolist(), strict=True))
        order += index.tolist()
    assert found - planned == Counter()
    assert (planned - found).total() == len(sampler._groups)
    if n > 8:
        assert order[:n] != [i for draw in draws for i in draw.index][:n], "control: the order is another one"


@MODES
def test_an_epoch_has_its_batches(sampling):
    sampler = sampler_of(lengths_of(103), 8, sampling=sampling)
    for _ in range(4):
        draws = list(sampler)
        assert [len(draw.index) for draw in draws] == [8] * 12 + [7]
        assert len(draws) == len(sampler)


def test_visits_are_as_even_as_without_groups():
    """With equal rates, every example is visited once per pass, except those waiting for a full batch."""
    n = 203
    memory, length = ImportanceMemory(n), lengths_of(n)
    sampler = ImportanceBatchSampler(memory, 8, groups=LengthGroups(length, 8, 1, n))
    counts = torch.zeros(n, dtype=torch.int64)
    for epochs in range(1, 9):
        counts += torch.bincount(tensor([i for draw in sampler for i in draw.index]), minlength=n)
        assert counts.min() >= epochs - 1
        assert counts.max() <= epochs + 1
        assert (counts != epochs).sum() < 16


@pytest.mark.parametrize(
    ("n", "batch", "batches"), [(203, 8, 1), (203, 8, 2), (1603, 4, 1), (4003, 8, 1), (5005, 4, 3), (40, 8, 1)]
)
def test_padding_is_no_worse_than_that_of_trainer(n, batch, batches):
    length = lengths_of(n)
    ours = real_tokens([draw.index for draw in drawn(sampler_of(length, batch, batches), 4)], length)
    theirs = real_tokens(of_transformers(length, batch, batches, 4), length)
    alone = real_tokens([draw.index for draw in drawn(sampler_of(length, batch, grouped=False), 4)], length)
    assert ours > theirs - 0.01
    assert alone < theirs - 0.05 or n == 40, "control: without groups"


@pytest.mark.parametrize(("n", "ranks"), [(4003, 2), (2003, 4)])
def test_padding_of_ranks_is_no_worse_either(n, ranks):
    """Each process groups its own part of the data, as tightly as `Trainer` groups all of it."""
    length, found = lengths_of(n), []
    for rank in range(ranks):
        shard = Shard.of(n, rank, ranks, seed=0)
        draws = drawn(sampler_of(length, 8, shard=shard, rank=rank), 4)
        assert set(draws[0].index) <= set(shard.index.tolist())
        found += [draw.index for draw in draws]
    assert real_tokens(found, length) > real_tokens(of_transformers(length, 8, 1, 4), length) - 0.015


@pytest.mark.parametrize(("n", "segments"), [(400, 4), (4800, 8), (1200, 6)])
def test_rates_are_never_older_than_a_segment(n, segments):
    """A segment is at least as long as a mega-batch."""
    sampler = sampler_of(lengths_of(n), 4)
    assert sampler.visits._segments == segments
    read = 0
    for _ in range(3):
        for draw in sampler:
            before = sampler.visits._segment, sampler.visits.passes
            sampler.update(draw, torch.rand(1, len(draw.index)))
            read += before != getattr(sampler, "seen", None)
            sampler.seen = before
    assert abs(read - 3 * segments) <= 2


# ---- going on after an interruption ----------------------------------------------------------------------------------


def walk(sampler, stream, steps):
    found = []
    for _ in range(steps):
        draw = next(stream)
        g = torch.Generator().manual_seed(draw.number)
        sampler.mark_used(draw)
        sampler.update(draw, torch.rand(1, len(draw.index), generator=g))
        found.append(draw)
    return found


def epochs(sampler):
    while True:
        yield from sampler


@MODES
@pytest.mark.parametrize("before", [0, 1, 13, 40])
def test_it_goes_on_exactly(sampling, before):
    length = lengths_of(203)
    sampler = sampler_of(length, 8, sampling=sampling)
    stream = epochs(sampler)
    walk(sampler, stream, before)
    state = sampler.state_dict()
    wanted = walk(sampler, stream, 60)
    for cut in (False, True):
        again = sampler_of(length, 8, sampling=sampling)
        groups = again._groups.state_dict() if cut else state["groups"]
        assert again.matches(state)
        skip = before % len(again)
        again.load_state_dict({**state, "groups": groups}, skip)
        stream = epochs(again)
        for _ in range(skip):
            next(stream)
        assert (walk(again, stream, 60) == wanted) == (not cut or not before), "control: the groups are part of it"


def test_it_does_not_go_on_from_another_order():
    state = sampler_of(lengths_of(50), 4).state_dict()
    assert not sampler_of(lengths_of(50), 4, grouped=False).matches(state)
    assert sampler_of(lengths_of(50), 4).matches(state), "control"
