"""Unbiased by enumeration; one seeded chi-square per stream; and what `DataLoader` and `Trainer` rely on."""

import math
from collections import Counter

import oracles
import pytest
import scipy.stats
import torch
from torch import tensor

from hf_importance.memory import ImportanceMemory
from hf_importance.sampler import Draw, ImportanceBatchSampler, Shard

UNEQUAL = [0.2, 1.0, 0.4, 3.0, math.nan, 0.7]


def memory_of(importance, **settings):
    memory = ImportanceMemory(len(importance), **{"uniform_fraction": 0.3, "max_rate": math.inf, **settings})
    memory.update(torch.arange(len(importance)), tensor(importance))
    return memory


def one_pass(sampler):
    """The visits of the first pass, as (index, weight); `sampler` has batches of 1 and a budget for several passes."""
    passes = 0
    begin_pass = sampler.memory.begin_pass

    def counted(*args):
        nonlocal passes
        passes += 1
        begin_pass(*args)

    sampler.memory.begin_pass = counted
    visits = []
    for draw in sampler:
        if passes == 2:
            return visits
        visits.append((draw.index[0], draw.weight[0]))
    raise AssertionError("the budget ended before the pass")


def drawn(sampler, epochs=1):
    return [draw for _ in range(epochs) for draw in sampler]


def visits_of(draws, length):
    return torch.bincount(tensor([i for draw in draws for i in draw.index]), minlength=length).double()


# ---- unbiased: every outcome in turn ---------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [UNEQUAL, [1.0, 5.0], [0.0, 0.0, 1.0], [2.0], [math.nan, 1.0, 8.0, 0.1, 3.0]])
@pytest.mark.parametrize("settings", [{}, {"uniform_fraction": 0.05}, {"max_rate": 1.4}], ids=str)
def test_reshuffled_is_unbiased_over_a_pass(monkeypatch, importance, settings):
    """E Σ weight · 1[visits example i] = 1 for every i: over all outcomes of the rounding of the rates."""
    n = len(importance)
    memory = memory_of(importance, **settings)
    memory.begin_pass()
    fractions = (memory.rates() - memory.rates().floor()).tolist()
    expected, expected_of_wrong, total, probability_of_all = [0.0] * n, [0.0] * n, 0.0, 0.0
    for happened, probability in oracles.outcomes(fractions):
        monkeypatch.setattr(torch, "rand", lambda *_, h=happened, **__: 1.0 - tensor(h, dtype=torch.float64))
        sampler = ImportanceBatchSampler(memory_of(importance, **settings), 1, budget=3.0 + 1 / n)
        probability_of_all += probability
        for index, weight in one_pass(sampler):
            expected[index] += probability * weight
            expected_of_wrong[index] += probability * weight**0.5
            total += probability
    assert probability_of_all == pytest.approx(1.0, rel=1e-12)
    assert expected == pytest.approx([1.0] * n, rel=1e-12)
    assert total == pytest.approx(n, rel=1e-12), "a pass has as many visits as there are examples, on average"
    if n > 1:
        assert expected_of_wrong != pytest.approx([1.0] * n, rel=1e-3), "control: other weights are biased"


@pytest.mark.parametrize("importance", [UNEQUAL, [1.0, 5.0], [0.0, 0.0, 1.0], [2.0]])
def test_replacement_is_unbiased_at_every_draw(monkeypatch, importance):
    """E weight · 1[draws i] = 1/N for every i: candidates one at a time, accepted up to an exact threshold."""
    n = len(importance)

    def first_accepted(candidate, uniform_number):
        """Offer the candidate with this random number; should it be refused, another one that is taken for sure."""
        offers = iter([(candidate, uniform_number), ((candidate + 1) % n, 0.0)])
        offer = [None]

        def randint(*_, **__):
            offer[0] = next(offers)
            return tensor([offer[0][0]])

        monkeypatch.setattr(torch, "randint", randint)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: tensor([offer[0][1]], dtype=torch.float64))
        monkeypatch.setattr(math, "ceil", lambda _: 1)  # one candidate at a time
        return next(iter(ImportanceBatchSampler(memory_of(importance), 1, sampling="replacement")))

    memory = memory_of(importance)
    memory.begin_pass()
    threshold = (memory.rates() / memory.largest_rate).tolist()
    weight = []
    for i in range(n):
        draw = first_accepted(i, threshold[i] * (1 - 1e-13))
        assert draw.index == [i]
        weight += draw.weight
        if threshold[i] < 1 and n > 1:
            assert first_accepted(i, threshold[i] * (1 + 1e-13)).index == [(i + 1) % n]
    probability = [t / sum(threshold) for t in threshold]
    assert [n * p * w for p, w in zip(probability, weight, strict=True)] == pytest.approx([1.0] * n, rel=1e-12)
    if n > 1:
        wrong = [n * p * w**0.5 for p, w in zip(probability, weight, strict=True)]
        assert wrong != pytest.approx([1.0] * n, rel=1e-3), "control: other weights are biased"


def test_the_expected_weighted_loss_is_the_mean_loss(monkeypatch):
    """The two facts above, put together for a pass and its losses."""
    loss = [3.0, -1.0, 0.5, 7.0, 2.0, 2.5]
    memory = memory_of(UNEQUAL)
    memory.begin_pass()
    fractions = (memory.rates() - memory.rates().floor()).tolist()
    mean = 0.0
    for happened, probability in oracles.outcomes(fractions):
        monkeypatch.setattr(torch, "rand", lambda *_, h=happened, **__: 1.0 - tensor(h, dtype=torch.float64))
        visits = one_pass(ImportanceBatchSampler(memory_of(UNEQUAL), 1, budget=4.0))
        mean += probability * sum(weight * loss[index] for index, weight in visits) / len(loss)
    assert mean == pytest.approx(sum(loss) / len(loss), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_together_are_unbiased(monkeypatch, ranks):
    """The mean over the ranks of their means over a pass: E = Σ loss / N, also where shards differ in size."""
    losses = [3.0, -1.0, 0.5, 7.0, 2.0, 2.5, 11.0]
    importance = [*UNEQUAL, 2.0]
    n, mean, of_equal_weight = len(importance), 0.0, 0.0
    for rank in range(ranks):
        shard = Shard.of(n, rank, ranks, seed=4)
        mine = [importance[i] for i in shard.index]
        memory = memory_of(mine)
        memory.begin_pass()
        fractions = (memory.rates() - memory.rates().floor()).tolist()
        for happened, probability in oracles.outcomes(fractions):
            monkeypatch.setattr(torch, "rand", lambda *_, h=happened, **__: 1.0 - tensor(h, dtype=torch.float64))
            sampler = ImportanceBatchSampler(memory_of(mine), 1, shard=shard, rank=rank, budget=4.0 * ranks)
            visits = one_pass(sampler)
            mean += probability * sum(weight * losses[i] for i, weight in visits) / len(shard) / ranks
            of_equal_weight += probability * sum(w / shard.weight * losses[i] for i, w in visits) / len(shard) / ranks
    assert mean == pytest.approx(sum(losses) / n, rel=1e-12)
    assert of_equal_weight != pytest.approx(sum(losses) / n, rel=1e-3), "control: without the weight of the shard"


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "ranks"), [(1, 1), (7, 2), (8, 4), (9, 4), (5, 5)])
def test_shards_divide_the_data(length, ranks):
    shards = [Shard.of(length, rank, ranks, seed=3) for rank in range(ranks)]
    owned = [shard.positions(torch.arange(len(shard))) for shard in shards]
    assert sorted(torch.cat(owned).tolist()) == list(range(length))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert sum(shard.weight for shard in shards) == pytest.approx(ranks)
    for shard, index in zip(shards, owned, strict=True):
        assert shard.local(index).tolist() == list(range(len(shard)))


def test_shards_are_random_and_the_same_for_all_ranks():
    first = Shard.of(1000, 0, 2, seed=3).index
    assert torch.equal(first, Shard.of(1000, 0, 2, seed=3).index)
    assert not torch.equal(first, Shard.of(1000, 0, 2, seed=4).index)
    assert first.double().mean().item() == pytest.approx(500, abs=50), "not the first half"


def test_batches_of_ranks():
    """9 examples on 4 ranks, batches of 2: 3 visits each, though three of the ranks own only 2 examples."""
    found = {}
    for rank in range(4):
        shard = Shard.of(9, rank, 4, seed=0)
        sampler = ImportanceBatchSampler(ImportanceMemory(len(shard)), 2, shard=shard, rank=rank)
        draws = drawn(sampler)
        assert len(draws) == len(sampler) == 2
        assert [len(draw.index) for draw in draws] == [2, 1]
        assert {w for draw in draws for w in draw.weight} == {len(shard) * 4 / 9}
        found[rank] = {i for draw in draws for i in draw.index}
    assert set.union(*found.values()) == set(range(9))


def test_ranks_round_and_shuffle_independently():
    """Same rates at the same places of two shards: yet other visits, in another order."""
    importance = torch.linspace(0.1, 2.0, 40).tolist()
    passes = []
    for rank in range(2):
        shard = Shard(80, 2, torch.arange(40) + 40 * rank)
        sampler = ImportanceBatchSampler(memory_of(importance), 40, shard=shard, rank=rank)
        passes.append([i - 40 * rank for i in next(iter(sampler)).index])
    assert passes[0] != passes[1]
    assert sorted(passes[0]) != sorted(passes[1])


# ---- distribution ----------------------------------------------------------------------------------------------------


def test_chi_square_of_replacement():
    """20 examples, 20,000 draws with one seed; a right sampler fails for one seed in 10,000."""
    n = 20
    importance = torch.linspace(0.1, 4.0, n).tolist()
    sampler = ImportanceBatchSampler(memory_of(importance), 50, sampling="replacement", budget=1000.0, seed=5)
    counts = visits_of(drawn(sampler), n)
    assert counts.sum() == 20_000
    expected = tensor(oracles.rates(importance, 0.3, math.inf)) * 1000
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-4
    assert scipy.stats.chisquare(counts).pvalue < 1e-4, "control: not uniform"
    pairs = Counter((a, b) for draw in drawn(sampler) for a, b in zip(draw.index[::2], draw.index[1::2], strict=True))
    joint = torch.outer(expected, expected).flatten() * 10_000 / 20_000**2
    observed = [pairs[a, b] for a in range(n) for b in range(n)]
    assert scipy.stats.chisquare(observed, joint).pvalue > 1e-4, "draws are independent of each other"


def test_chi_square_of_reshuffled():
    """2,000 passes over 20 examples: each is visited ⌊r⌋ times or once more; fails for one seed in 10,000."""
    n, passes = 20, 2000
    importance = torch.linspace(0.1, 4.0, n).tolist()
    memory = memory_of(importance)
    memory.begin_pass()
    rate = memory.rates()
    sampler = ImportanceBatchSampler(memory, 1, budget=passes, seed=5)
    counts, low, high = torch.zeros(n), rate.floor(), rate.floor() + 1
    for _ in range(passes):
        sampler._index = sampler._index[:0]  # straight to the next pass
        visits = torch.bincount(tensor(sampler._draw(1).index + sampler._index.tolist()), minlength=n)
        assert (visits >= low).all()
        assert (visits <= high).all()
        counts += visits
    fraction = rate - rate.floor()
    chi2 = ((counts - passes * rate).square() / (passes * fraction * (1 - fraction))).sum().item()
    assert scipy.stats.chi2.sf(chi2, n) > 1e-4
    shifted = (counts - passes * rate.roll(1)).square() / (passes * fraction * (1 - fraction))
    assert scipy.stats.chi2.sf(shifted.sum().item(), n) < 1e-4, "control"


def test_order_within_a_pass_is_random():
    """Each of 4 equally important examples comes first equally often; 4,000 passes, one seed in 10,000 fails."""
    first = Counter()
    for seed in range(4000):
        first[next(iter(ImportanceBatchSampler(memory_of([1.0, 1.0, 1.0, 1.0]), 1, seed=seed))).index[0]] += 1
    assert scipy.stats.chisquare([first[i] for i in range(4)]).pvalue > 1e-4


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_larger_importance_is_drawn_more(sampling):
    sampler = ImportanceBatchSampler(memory_of([0.5, 1.0, 2.0, 4.0]), 4, sampling=sampling, budget=200.0)
    counts = visits_of(drawn(sampler), 4)
    assert (counts.diff() > 0).all()
    equal = ImportanceBatchSampler(memory_of([1.0] * 4), 4, sampling=sampling, budget=200.0)
    assert (visits_of(drawn(equal), 4) - 200).abs().max() < 60, "control"


# ---- reshuffling is not lost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [[math.nan] * 23, [0.1] * 23, [0.0] * 23], ids=["unknown", "equal", "zero"])
def test_equal_importances_are_plain_reshuffling(importance):
    sampler = ImportanceBatchSampler(memory_of(importance), 5, seed=3)
    for epoch in range(3):
        draws = drawn(sampler)
        assert visits_of(draws, 23).tolist() == [1.0] * 23
        assert [i for draw in draws for i in draw.index] == torch.randperm(
            23, generator=torch.Generator().manual_seed(3 + epoch)
        ).tolist()
        assert {w for draw in draws for w in draw.weight} == {1.0}
    unequal = ImportanceBatchSampler(memory_of([0.1] * 22 + [0.3]), 5, seed=3)
    assert {w for draw in drawn(unequal) for w in draw.weight} != {1.0}, "control"


# ---- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("budget", [0.01, 0.5, 1.0, 1.37, 3.0])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (12, 4), (5, 8), (30, 1)])
def test_length_is_what_it_yields(sampling, drop_last, budget, length, batch):
    importance = [float(i % 5) for i in range(length)]
    sampler = ImportanceBatchSampler(
        memory_of(importance), batch, sampling=sampling, budget=budget, drop_last=drop_last, prune_mass=0.1
    )
    for _ in range(3):
        draws = drawn(sampler)
        assert len(draws) == len(sampler)
        sizes = [len(draw.index) for draw in draws]
        assert sizes == [len(draw.weight) for draw in draws]
        assert all(size == batch for size in sizes[:-1])
        visits = max(1, round(budget * length))
        assert sum(sizes) == (visits // batch * batch if drop_last else visits)


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_no_visit_is_lost_between_epochs(sampling):
    """A pass goes on in the next epoch: 0.4 of 50 examples, 5 epochs, all seen twice over 5 passes' worth of visits."""
    sampler = ImportanceBatchSampler(memory_of([math.nan] * 50), 8, sampling=sampling, budget=0.4)
    counts = visits_of(drawn(sampler, epochs=5), 50)
    assert counts.sum() == 100
    assert (counts == 2).all() == (sampling == "reshuffled")


def test_draws_are_numbered():
    sampler = ImportanceBatchSampler(memory_of(UNEQUAL), 2)
    assert [draw.number for draw in drawn(sampler, epochs=3)] == list(range(9))


# ---- what changes meanwhile ------------------------------------------------------------------------------------------


def test_weights_are_fixed_at_the_draw():
    for sampling in ("reshuffled", "replacement"):
        memory = memory_of(UNEQUAL)
        sampler = ImportanceBatchSampler(memory, 3, sampling=sampling)
        draw = next(iter(sampler))
        before = Draw(draw.number, list(draw.index), list(draw.weight))
        memory.update(torch.arange(6), torch.arange(6.0))
        assert draw == before
        memory.begin_pass()
        assert (1 / memory.rates(tensor(draw.index))).tolist() != pytest.approx(draw.weight), "control"


def test_replacement_reads_the_memory_as_it_is():
    memory = memory_of([1.0] * 6)
    draws = iter(ImportanceBatchSampler(memory, 2, sampling="replacement", budget=2.0))
    assert next(draws).weight == [1.0, 1.0]
    memory.update(torch.arange(6), torch.arange(1.0, 7.0))
    draw = next(draws)
    assert draw.weight == pytest.approx((1 / memory.rates(tensor(draw.index))).tolist())
    assert draw.weight != [1.0, 1.0]


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_pruned_examples_are_not_drawn(sampling):
    memory = memory_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0])
    sampler = ImportanceBatchSampler(memory, 6, sampling=sampling, prune_mass=0.01)
    drawn(sampler, epochs=2)
    assert memory.pruned.nonzero().flatten().tolist() == [0, 3]
    draws = drawn(sampler, epochs=10)
    assert visits_of(draws, 6)[[0, 3]].tolist() == [0.0, 0.0]
    assert visits_of(draws, 6).sum() == 60


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_pruning_ends_at_a_share_of_the_training(sampling):
    """Of 10 epochs; a pass that has begun goes on."""
    for until, last in ((0.5, 5), (1.0, 10), (0.25, 3)):
        memory = memory_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0])
        sampler = ImportanceBatchSampler(memory, 6, sampling=sampling, prune_mass=0.01, prune_until=until, seed=3)
        sampler.plan(epochs=10)
        epochs = [visits_of(drawn(sampler), 6)[[0, 3]].sum().item() for _ in range(10)]
        assert epochs[2:last] == [0.0] * (last - 2)
        assert sum(epochs[last:]) > 0 or last == 10


def test_fresh_are_the_importances_at_the_end_of_the_first_pass(monkeypatch):
    """40 examples in batches of 4: of the first pass those with a visit from the 31st on, numbers 7 to 9."""
    memory = ImportanceMemory(40, uniform_below=0.3)
    sampler = ImportanceBatchSampler(memory, 4)
    found = []
    begin_pass = memory.begin_pass
    monkeypatch.setattr(memory, "begin_pass", lambda *a: (found.append(a[-1]), begin_pass(*a)))
    for number, draw in enumerate(drawn(sampler, epochs=2)[:12]):
        importance = torch.full((4,), float(number))
        importance[0] = math.nan
        sampler.update(draw, importance)
    drawn(sampler, epochs=2)
    assert all(map(math.isnan, found[:2])), "nothing is known before"
    assert found[-1] == 8.0
    again = ImportanceBatchSampler(ImportanceMemory(40), 4)
    again.load_state_dict(sampler.state_dict())
    assert again._fresh_sum / again._fresh_weight == found[-1]


@pytest.mark.parametrize("batch", [1, 7, 40, 64])
def test_fresh_is_known_for_any_batch(batch):
    memory = ImportanceMemory(40)
    sampler = ImportanceBatchSampler(memory, batch)
    for draw in drawn(sampler):
        sampler.update(draw, torch.full((len(draw.index),), 3.0))
    assert sampler._fresh_sum / sampler._fresh_weight == pytest.approx(3.0)


def test_fresh_is_the_mean_of_all_even_if_some_are_preferred():
    """As after a resume with another batch size: what is known is drawn by its rate, and the weights undo it."""
    importance = [0.1, 0.2, 0.5, 4.0, math.nan, math.nan, 3.0, 0.2] * 200
    true = tensor([0.1, 0.2, 0.5, 4.0, 2.0, 1.0, 3.0, 0.2] * 200)
    sampler = ImportanceBatchSampler(memory_of(importance), 1600)
    (draw,) = drawn(sampler)
    sampler.update(draw, true[draw.index])
    assert sampler._fresh_sum / sampler._fresh_weight == pytest.approx(true.mean().item(), rel=0.05)
    assert true[draw.index].mean().item() > 1.2 * true.mean().item(), "control"


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_plan_counts_the_visits_there_are(drop_last):
    """40 examples in batches of 16: 40 visits per epoch, or 32."""
    sampler = ImportanceBatchSampler(ImportanceMemory(40), 16, prune_until=0.5, drop_last=drop_last)
    sampler.plan(epochs=3)
    assert sampler._prune_before == 0.5 * sum(len(draw.index) for draw in drawn(sampler, epochs=3))


def test_a_pass_is_planned_in_pieces(monkeypatch):
    """Visits are the rate, rounded down or up, and weights its inverse, also across the pieces."""
    monkeypatch.setattr("hf_importance.sampler.CHUNK", 16)
    memory = memory_of(torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist())
    sampler = ImportanceBatchSampler(memory, 1, budget=3.0)
    visits = one_pass(sampler)
    counts = torch.bincount(tensor([i for i, _ in visits]), minlength=100)
    memory.begin_pass()
    rates = memory.rates()
    assert ((counts == rates.floor()) | (counts == rates.ceil())).all()
    assert [weight for _, weight in visits] == pytest.approx([1 / rates[i].item() for i, _ in visits])
    assert counts[96:].sum() > 0, "the last piece, too"
    assert [i for i, _ in visits] != sorted(i for i, _ in visits), "shuffled across the pieces"


def test_increment_brings_forgotten_examples_back():
    for increment, comes_back in ((0.1, True), (0.0, False)):
        memory = memory_of([0.0, 1.0, 1.0], uniform_fraction=0.0)
        sampler = ImportanceBatchSampler(memory, 3, sampling="replacement", increment=increment)
        assert (visits_of(drawn(sampler, epochs=50), 3)[0] > 0) == comes_back


def test_extreme_rates_end():
    """One example holds everything: 1 in 200,000 candidates is accepted."""
    importance = torch.zeros(200_000)
    importance[123] = 1.0
    memory = ImportanceMemory(200_000, uniform_fraction=0.0, max_rate=math.inf)
    memory.update(torch.arange(200_000), importance)
    draw = next(iter(ImportanceBatchSampler(memory, 4, sampling="replacement")))
    assert draw.index == [123] * 4
    assert draw.weight == pytest.approx([1 / 200_000] * 4)


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])
def test_own_generator(sampling):
    def draws(seed):
        return drawn(ImportanceBatchSampler(memory_of(UNEQUAL), 2, sampling=sampling, seed=seed), epochs=3)

    before = torch.get_rng_state()
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before)
