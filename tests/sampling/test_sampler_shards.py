"""Shards and ranks: partition of the data, weights, unbiasedness, equal numbers of batches."""

import math

import pytest
import torch
from sampling_helpers import SAMPLING_MODES, draws_of, permutation, sampler_of
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard


@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (7, 2), (8, 4), (9, 4), (5, 5)])
def test_shards_partition_the_data(length, ranks):
    shards = [Shard.of(length, rank, ranks, seed=3) for rank in range(ranks)]
    owned = [shard.part(torch.arange(length)) for shard in shards]
    assert sorted(torch.cat(owned).tolist()) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert sum(shard.weight for shard in shards) == pytest.approx(ranks)
    for shard, index in zip(shards, owned, strict=True):
        assert shard.local(index).tolist() == list(range(len(shard)))


def test_shards_are_random_and_fixed_by_the_seed():
    first = Shard.of(1000, 0, 2, seed=3).index
    assert torch.equal(first, Shard.of(1000, 0, 2, seed=3).index)
    assert not torch.equal(first, Shard.of(1000, 0, 2, seed=4).index)
    assert first.double().mean().item() == pytest.approx(500, abs=50), "not the first half"


@SAMPLING_MODES
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_weights_include_the_weight_of_the_shard(sampling, exponent):
    shard = Shard.of(7, 1, 3, seed=0)
    assert shard.weight == pytest.approx(2 * 3 / 7)
    settings = {"shard": shard, "rank": 1, "sampling": sampling, "weight_exponent": exponent}
    for draw in draws_of(sampler_of([1.0, 3.0], 2, **settings), epochs=3):
        assert set(draw.index) <= set(shard.index.tolist())
        assert draw.weight == pytest.approx([6 / 7 * r**-exponent for r in draw.rate], rel=1e-12)


@SAMPLING_MODES
def test_measurements_are_stored_at_positions_in_the_shard(sampling):
    """Draws have positions in the training data."""
    shard = Shard(10, 2, tensor([1, 4, 5, 8, 9]))
    sampler = ImportanceBatchSampler(ImportanceMemory(5), 5, shard=shard, sampling=sampling, uniform_fraction=0.3)
    draw = next(iter(sampler))
    sampler.update(draw, tensor([[float(i) for i in draw.index]]))
    found = sampler.memory.importances.tolist()
    for i, q in zip(shard.index.tolist(), found, strict=True):
        assert q == i if i in draw.index else math.isnan(q)


@pytest.mark.parametrize("ranks", [2, 3])
def test_mean_weighted_loss_over_all_ranks_is_the_mean_loss(monkeypatch, ranks):
    """Mean over the ranks of their means over a pass, by enumeration of all places; shards differ in size.

    With these rates, the pass ends at a twelfth of every stratum. Each place counts on its own in a sum over visits, so
    that all examples and strata may have the same.
    """
    losses = [3.0, -1.0, 0.5, 7.0, 2.0, 2.5, 11.0]
    rates_of_size = {2: [0.5, 1.5], 3: [2.0, 1 / 3, 2 / 3], 4: [0.25, 0.75, 2.25, 0.75]}
    n, mean, without_shard_weight, seen = 7, 0.0, 0.0, set()
    for rank, shard in enumerate([Shard.of(n, rank, ranks, seed=4) for rank in range(ranks)]):
        size = len(shard)
        for place in [(k + 0.5) / 12 for k in range(12)]:
            monkeypatch.setattr(torch, "rand", lambda number, place=place, **_: torch.full((number,), place))
            settings = {"shard": shard, "rank": rank, "uniform_fraction": 0.0, "guard": False}
            sampler = sampler_of(rates_of_size[size], size, **settings)
            visits = [(int(i), float(rate)) for i, rate in zip(*sampler.visits.plan(), strict=True)]
            seen.add((rank, len(visits)))
            for local, rate in visits:
                loss = losses[shard.index[local]]
                mean += shard.weight / rate * loss / size / ranks / 12
                without_shard_weight += 1 / rate * loss / size / ranks / 12
    assert mean == pytest.approx(sum(losses) / n, rel=1e-6)
    assert without_shard_weight != pytest.approx(sum(losses) / n, rel=1e-3), "control"
    assert len(seen) > ranks, "premise: the number of visits depends on the places"


def test_ranks_draw_equal_numbers_of_batches():
    """9 examples on 4 ranks, batches of 2: 3 visits on each rank, though three of them own only 2 examples."""
    found = {}
    for rank in range(4):
        shard = Shard.of(9, rank, 4, seed=0)
        sampler = ImportanceBatchSampler(ImportanceMemory(len(shard)), 2, shard=shard, rank=rank)
        draws = draws_of(sampler)
        assert len(draws) == len(sampler) == 2
        assert [len(draw.index) for draw in draws] == [2, 1]
        assert {w for draw in draws for w in draw.weight} == {len(shard) * 4 / 9}
        found[rank] = {i for draw in draws for i in draw.index}
    assert set.union(*found.values()) == set(range(9))


@SAMPLING_MODES
@pytest.mark.parametrize("passes", [0, 2])
def test_ranks_draw_independently(sampling, passes):
    """The same importances in two shards give different visits, in every pass, as with another seed."""
    importance = torch.linspace(0.1, 2.0, 40)
    found = []
    for rank in (0, 1, 0):
        shard = Shard(80, 2, torch.arange(40) + 40 * rank)
        sampler = sampler_of(importance, 40, shard=shard, rank=rank, sampling=sampling)
        sampler.restart(importance.repeat(2), passes=passes)
        found.append([i - 40 * rank for draw in draws_of(sampler, 2) for i in draw.index])
    assert found[0] != found[1]
    assert found[0] == found[2], "control: the same rank"


def test_ranks_have_their_own_places():
    """Rank r has those of the seed s + r; correlated places would visit similar examples of all shards at once."""
    places = []
    for rank in range(3):
        shard = Shard(6000, 3, torch.arange(2000) + 2000 * rank)
        sampler = sampler_of(torch.linspace(0.5, 1.5, 2000), 10, shard=shard, rank=rank, seed=4)
        next(iter(sampler))
        places.append(sampler.visits.state_dict()["strata"]["place"])
        alone = sampler_of(torch.linspace(0.5, 1.5, 2000), 10, seed=4 + rank)
        next(iter(alone))
        assert torch.equal(alone.visits.state_dict()["strata"]["place"], places[-1])
    assert (torch.corrcoef(torch.stack(places)) - torch.eye(3)).abs().max() < 0.1


def test_ranks_have_their_own_permutations_in_every_pass():
    """With equal importances, rank r of R takes that of the seed s + r + R·p in pass p, as accelerate does."""
    for rank in range(3):
        shard = Shard(60, 3, torch.arange(20) + 20 * rank)
        sampler = sampler_of([1.0] * 20, 20, shard=shard, rank=rank, seed=4)
        for number, draw in enumerate(draws_of(sampler, 4)):
            assert [i - 20 * rank for i in draw.index] == permutation(20, 4 + rank + 3 * number)
