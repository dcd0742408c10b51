"""What `DataLoader` and `Trainer` rely on: weights, lengths, shards; buffering and resuming, bit for bit."""

import copy
import itertools
import math
from collections import Counter

import oracles
import pytest
import scipy.stats
import torch
from torch import tensor

from hf_importance.record import VisitRecord
from hf_importance.sampling.draw import SKIPPED, Draw, Shard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler

UNEQUAL = [0.2, 1.0, 0.4, 3.0, math.nan, 0.7]
MODES = pytest.mark.parametrize("sampling", ["reshuffled", "replacement"])


def memory_of(importance, momentum=0.2):
    memory = ImportanceMemory(len(importance), momentum)
    memory.load_state_dict({"importance": torch.as_tensor(importance)})
    return memory


def sampler_of(importance, batch, **settings):
    return ImportanceBatchSampler(memory_of(importance), batch, **{"uniform_fraction": 0.3, **settings})


def drawn(sampler, epochs=1):
    return [draw for _ in range(epochs) for draw in sampler]


def visits_of(draws, length):
    return torch.bincount(tensor([i for draw in draws for i in draw.index]), minlength=length).double()


def same(a, b):
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


# ---- weights ---------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_draws_carry_index_rate_and_weight(sampling, exponent):
    wanted = oracles.rates(UNEQUAL, 0.3)
    draws = drawn(sampler_of(UNEQUAL, 3, sampling=sampling, weight_exponent=exponent), epochs=5)
    for draw in draws:
        assert draw.rate == pytest.approx([wanted[i] for i in draw.index], rel=1e-6)
        assert draw.weight == pytest.approx([r**-exponent for r in draw.rate], rel=1e-12)
        assert all(isinstance(x, float) for x in (*draw.rate, *draw.weight))
        assert all(isinstance(i, int) for i in draw.index)
    rates = [r for draw in draws for r in draw.rate]
    for other in {0.0, 0.5, 1.0} - {exponent}:
        weights = [w for draw in draws for w in draw.weight]
        assert weights != pytest.approx([r**-other for r in rates], rel=1e-2), "control: the exponent counts"


@MODES
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_weights_of_a_shard(sampling, exponent):
    shard = Shard.of(7, 1, 3, seed=0)
    assert shard.weight == pytest.approx(2 * 3 / 7)
    settings = {"shard": shard, "rank": 1, "sampling": sampling, "weight_exponent": exponent}
    for draw in drawn(sampler_of([1.0, 3.0], 2, **settings), epochs=3):
        assert set(draw.index) <= set(shard.index.tolist())
        assert draw.weight == pytest.approx([6 / 7 * r**-exponent for r in draw.rate], rel=1e-12)


@MODES
def test_weights_are_fixed_at_the_draw(sampling):
    sampler = sampler_of(UNEQUAL, 3, sampling=sampling)
    draw = next(iter(sampler))
    before = Draw(draw.number, list(draw.index), list(draw.rate), list(draw.weight))
    sampler.update(draw, tensor([[9.0, 8.0, 7.0]]))
    sampler.flush()
    assert draw == before
    now = oracles.rates(sampler.importances.tolist(), 0.3)
    assert [1 / now[i] for i in draw.index] != pytest.approx(draw.weight), "control"


@MODES
def test_what_was_measured_is_remembered(sampling):
    """At the positions in the training data, before the memory is read for the next draw."""
    shard = Shard(10, 2, tensor([1, 4, 5, 8, 9]))
    sampler = ImportanceBatchSampler(ImportanceMemory(5), 5, shard=shard, sampling=sampling, uniform_fraction=0.3)
    draw = next(iter(sampler))
    sampler.update(draw, tensor([[float(i) for i in draw.index]]))
    found = sampler.importances.tolist()
    for i, q in zip(shard.index.tolist(), found, strict=True):
        assert q == i if i in draw.index else math.isnan(q)


def test_replacement_reads_the_memory_as_it_is():
    sampler = sampler_of([1.0] * 6, 2, sampling="replacement", budget=2.0)
    draws = iter(sampler)
    first = next(draws)
    assert first.weight == [1.0, 1.0]
    sampler.update(first, tensor([[4.0, 4.0]]))
    rates = [0.7 * q + 0.3 for q in sampler.importances.tolist()]
    second = next(draws)
    assert second.rate == pytest.approx([6 * rates[i] / sum(rates) for i in second.index], rel=1e-6)
    assert second.weight != [1.0, 1.0], "control"


def test_segments_read_what_was_measured_before_they_are_planned():
    """Rates use all previous measurements, also buffered ones, and recent first visits for unvisited examples."""
    true, remembered, fresh, first, stale = torch.linspace(0.1, 2.0, 80).tolist(), [math.nan] * 80, math.nan, [], 0
    sampler = ImportanceBatchSampler(ImportanceMemory(80, 0.0), 1, uniform_fraction=0.3, budget=1.5, guard=False)
    draws, known = iter(sampler), []
    for number in range(120):
        if not sampler.visits.planned:
            known, fresh, first = list(remembered), sum(first) / len(first) if first else fresh, []
        draw = next(draws)
        (i,), measured = draw.index, true[draw.index[0]] / (1 + number / 20)
        assert draw.rate == pytest.approx([oracles.rates(known, 0.3, fresh=fresh)[i]], rel=1e-5)
        stale += draw.rate != pytest.approx([oracles.rates(remembered, 0.3, fresh=fresh)[i]], rel=1e-3)
        first += [measured] if math.isnan(remembered[i]) else []
        oracles.remember(remembered, [i], [measured], 0.0)
        sampler.update(draw, tensor([[measured]]))
    assert sampler.importances.tolist() == pytest.approx(remembered, nan_ok=True)
    assert stale > 50, "control: the memory has moved on"


# ---- unbiased --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_together_are_unbiased(monkeypatch, ranks):
    """The mean over the ranks of their means over a pass, over every random start: Σ loss / N, of shards that differ.

    Rates such that visits · rate is whole, so that the expectation over the random starts is exact.
    """
    losses = [3.0, -1.0, 0.5, 7.0, 2.0, 2.5, 11.0]
    rates_of_size = {2: [0.5, 1.5], 3: [2.0, 1 / 3, 2 / 3], 4: [0.25, 0.75, 2.25, 0.75]}
    n, mean, of_equal_weight = 7, 0.0, 0.0
    for rank, shard in enumerate([Shard.of(n, rank, ranks, seed=4) for rank in range(ranks)]):
        size = len(shard)
        starts = list(itertools.permutations(range(size)))
        for start in starts:
            monkeypatch.setattr(torch, "randperm", lambda *_, s=start, **__: tensor(s, dtype=torch.int32))
            settings = {"shard": shard, "rank": rank, "uniform_fraction": 0.0, "guard": False}
            sampler = sampler_of(rates_of_size[size], size, **settings)
            visits = zip(*sampler.visits.next(2 * size), strict=True)
            for local, rate in [(int(i), float(r)) for i, r in visits]:
                loss = losses[shard.index[local]]
                mean += shard.weight / rate * loss / size / ranks / len(starts)
                of_equal_weight += 1 / rate * loss / size / ranks / len(starts)
    assert mean == pytest.approx(sum(losses) / n, rel=1e-6)
    assert of_equal_weight != pytest.approx(sum(losses) / n, rel=1e-3), "control: without the weight of the shard"


@MODES
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_mean_of_the_weighted_losses_is_the_mean_loss(sampling, ranks):
    """Over many epochs of the sampler, with drawn weights and learnt importances."""
    losses, total, unweighted = torch.linspace(0.1, 4.0, 50).square(), [], []
    for rank in range(ranks):
        shard = Shard.of(50, rank, ranks, seed=1)
        memory = ImportanceMemory(len(shard))
        settings = {"shard": shard, "rank": rank, "sampling": sampling, "uniform_fraction": 0.3}
        sampler = ImportanceBatchSampler(memory, 5, **settings)
        epochs = 60 if sampling == "reshuffled" else 100
        for draw in itertools.chain.from_iterable(sampler for _ in range(epochs)):
            found = losses[draw.index]
            sampler.update(draw, found[None] + 0.1)
            total.append((tensor(draw.weight) * found).mean().item())
            unweighted.append(found.mean().item())
    assert sum(total) / len(total) == pytest.approx(losses.mean().item(), rel=0.03)
    assert sum(unweighted) / len(unweighted) > 1.2 * losses.mean().item(), "control"


@MODES
def test_larger_importance_is_drawn_more(sampling):
    counts = visits_of(drawn(sampler_of([0.5, 1.0, 2.0, 4.0], 4, sampling=sampling, budget=200.0)), 4)
    assert (counts.diff() > 0).all()
    wanted = tensor(oracles.rates([0.5, 1.0, 2.0, 4.0], 0.3)).double() * 200
    within = 30 if sampling == "reshuffled" else 60
    assert (counts - wanted).abs().max() < within
    equal = sampler_of([1.0] * 4, 4, sampling=sampling, budget=200.0)
    assert (visits_of(drawn(equal), 4) - 200).abs().max() < 60, "control"


def test_the_first_is_random():
    """Each of 4 equally important examples comes first equally often; 4,000 seeds, one in 10,000 fails."""
    first = Counter(next(iter(sampler_of([1.0] * 4, 1, seed=seed))).index[0] for seed in range(4000))
    assert scipy.stats.chisquare([first[i] for i in range(4)]).pvalue > 1e-4


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


@MODES
def test_ranks_shuffle_independently(sampling):
    """The same rates in two shards give different orders."""
    importance = torch.linspace(0.1, 2.0, 40).tolist()
    passes = []
    for rank in range(2):
        shard = Shard(80, 2, torch.arange(40) + 40 * rank)
        sampler = sampler_of(importance, 40, shard=shard, rank=rank, sampling=sampling)
        passes.append([i - 40 * rank for i in next(iter(sampler)).index])
    assert passes[0] != passes[1]


# ---- lengths ---------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("budget", [0.01, 0.5, 1.0, 1.37, 3.0])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (12, 4), (5, 8), (30, 1)])
def test_length_is_what_it_yields(sampling, drop_last, budget, length, batch):
    importance = [float(i % 5) for i in range(length)]
    settings = {"sampling": sampling, "budget": budget, "drop_last": drop_last, "prune_mass": 0.1}
    sampler = sampler_of(importance, batch, **settings)
    for _ in range(3):
        draws = drawn(sampler)
        assert len(draws) == len(sampler)
        sizes = [len(draw.index) for draw in draws]
        assert sizes == [len(draw.weight) for draw in draws] == [len(draw.rate) for draw in draws]
        assert all(size == batch for size in sizes[:-1])
        visits = max(1, round(budget * length))
        assert sum(sizes) == (visits // batch * batch if drop_last else visits)


@MODES
def test_no_visit_is_lost_between_epochs(sampling):
    """A pass continues in the next epoch: with 0.4 of 50 examples per epoch, all are visited twice in 5 epochs."""
    sampler = sampler_of([math.nan] * 50, 8, sampling=sampling, budget=0.4)
    counts = visits_of(drawn(sampler, epochs=5), 50)
    assert counts.sum() == 100
    assert (counts == 2).all() == (sampling == "reshuffled")


def test_draws_are_numbered():
    assert [draw.number for draw in drawn(sampler_of(UNEQUAL, 2), epochs=3)] == list(range(9))


@MODES
def test_nothing_is_drawn_after_the_end(sampling):
    sampler = sampler_of(UNEQUAL, 2, sampling=sampling)
    assert len(drawn(sampler)) == 3
    sampler.end()
    assert drawn(sampler) == []


@MODES
def test_pruned_examples_are_not_drawn(sampling):
    sampler = sampler_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0], 6, sampling=sampling, prune_mass=0.01)
    drawn(sampler, epochs=3)  # credits round: visits of the first pass may be left
    assert sampler.pruned.nonzero().flatten().tolist() == [0, 3]
    draws = drawn(sampler, epochs=10)
    assert visits_of(draws, 6)[[0, 3]].tolist() == [0.0, 0.0]
    assert visits_of(draws, 6).sum() == 60
    never = sampler_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0], 6, sampling=sampling)
    assert visits_of(drawn(never, epochs=13), 6)[[0, 3]].min() > 0, "control"
    assert not never.pruned.any()


# ---- randomness ------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("importance", [UNEQUAL, [1.0] * 6])
def test_own_generator(sampling, importance):
    def draws(seed):
        return drawn(sampler_of(importance, 2, sampling=sampling, seed=seed), epochs=3)

    before = torch.get_rng_state()
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before)


# ---- waiting ---------------------------------------------------------------------------------------------------------


class Training:
    """Measures each draw `delay` draws later, like a prefetching dataloader."""

    def __init__(self, sampling, n, batch, delay=0, bad=0.02, seed=0, exponent=1.0, arrives=False):
        settings = {"prune_mass": 0.01, "increment": 1e-3, "weight_exponent": exponent, "seed": seed}
        record = VisitRecord(n)
        memory = ImportanceMemory(n, 0.3)
        self.sampler = ImportanceBatchSampler(
            memory, batch, sampling=sampling, record=record, budget=1.37, uniform_fraction=0.2, **settings
        )
        self.true = 10 ** (4 * torch.rand(n, generator=torch.Generator().manual_seed(9)) - 3)
        self.delay, self.bad, self.arrives, self.waiting = delay, bad, arrives, []
        self.draws, self.stream = [], self._stream()

    def _stream(self):
        while True:
            yield from (draw for draw in self.sampler if draw is not SKIPPED)
            while self.waiting:  # a loader does not draw ahead of an epoch
                self.measure(self.waiting.pop(0))

    def measure(self, draw):
        """A function of the draw alone."""
        g = torch.Generator().manual_seed(draw.number)
        rows = torch.rand(5, len(draw.index), generator=g)
        rows[0] = self.true[draw.index] * (0.5 + rows[0]) * 300 / (300 + draw.number)
        rows[0, torch.rand(len(draw.index), generator=g) < self.bad] = math.nan
        self.sampler.mark_used(draw)
        self.sampler.update(draw, rows, Arrival() if self.arrives else None)

    def step(self):
        draw = next(self.stream)
        self.draws.append(draw)
        self.waiting.append(draw)
        if len(self.waiting) > self.delay:
            self.measure(self.waiting.pop(0))

    def run(self, steps, flush=False):
        for _ in range(steps):
            self.step()
            if flush:
                self.sampler.flush()
        return self

    def figures(self):
        """All that is known."""
        sampler = self.sampler
        sampler.flush(everything=True)
        visits = sampler.visits.state_dict()
        guard = (visits.get("guard") or {}).get("second_moments", torch.zeros(1))
        numbers = [visits.get(name, 0.0) for name in ("fresh_sum", "fresh_count", "fresh", "mean", "total", "largest")]
        return {
            "importance": sampler.importances,
            "guard": guard,
            "moments": tensor(list(sampler.moments.values()), dtype=torch.float64),
            "numbers": tensor(numbers, dtype=torch.float64),
            **sampler.record.columns(),
        }


class Arrival:
    """An event as for rows transferred from a GPU."""

    def synchronize(self):
        pass


@MODES
@pytest.mark.parametrize(
    ("n", "batch", "delay", "arrives", "steps"),
    [
        (60, 4, 0, False, 200),
        (1000, 7, 3, False, 300),
        (1000, 7, 3, True, 300),
        (2000, 1, 5, True, 600),
        (300, 33, 1, False, 100),
    ],
)
def test_when_it_is_remembered_has_no_effect(sampling, n, batch, delay, arrives, steps):
    """Bit for bit: updates after every batch, or only when needed."""
    at_once = Training(sampling, n, batch, delay, arrives=arrives).run(steps, flush=True)
    late = Training(sampling, n, batch, delay, arrives=arrives).run(steps)
    assert at_once.draws == late.draws
    wanted, found = at_once.figures(), late.figures()
    for name, value in wanted.items():
        if name == "mean_loss":  # for people to look at; a sum that is rounded as it comes
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=0, equal_nan=True)
        else:
            assert same(value, found[name]), name
    assert (found["moments"] > 0).all()
    at_once.run(1), late.run(2)
    for name in ("importance", "moments"):
        assert not same(at_once.figures()[name], late.figures()[name]), "control: a batch more is seen"


def test_many_updates_between_draws_have_no_effect_either():
    """As with gradient accumulation: a few draws, then as many updates."""
    for sampling in ("reshuffled", "replacement"):
        found = []
        for flush in (True, False):
            training = Training(sampling, 200, 5)
            for _ in range(60):
                draws = [next(training.stream) for _ in range(4)]
                training.draws += draws
                for draw in draws:
                    training.measure(draw)
                    if flush:
                        training.sampler.flush()
            found.append(training)
        assert found[0].draws == found[1].draws
        for (name, a), b in zip(found[0].figures().items(), found[1].figures().values(), strict=True):
            assert name == "mean_loss" or same(a, b), name


def test_it_waits():
    """Control: measurements are buffered, at most 64 batches."""
    training = Training("reshuffled", 5000, 2)
    training.run(63)
    assert training.sampler._memory.known == 0
    training.run(1)
    assert training.sampler._memory.known > 100
    training.run(1)
    assert len(training.sampler._measured) == 1
    training.sampler.flush()
    assert not training.sampler._measured


def test_what_is_on_its_way_is_not_waited_for():
    """The last rows from a GPU are remembered one batch later, or on a full flush."""

    class Unhurried(Arrival):
        asked = 0

        def synchronize(self):
            type(self).asked += 1

    sampler = sampler_of([math.nan] * 20, 2)
    draws = drawn(sampler)[:3]
    for draw in draws:
        sampler.update(draw, torch.ones(1, 2), Unhurried())
    sampler.flush()
    assert Unhurried.asked == 2
    assert sampler.memory.known == 4
    sampler.flush(everything=True)
    assert Unhurried.asked == 3
    assert sampler.memory.known == 6
    sampler.update(draws[0], torch.ones(1, 2))
    sampler.flush()
    assert not sampler._measured, "what is there is remembered"


def test_moments_are_the_sums_of_the_visits():
    sampler = sampler_of(UNEQUAL, 2, weight_exponent=0.5, shard=Shard(10, 2, torch.arange(6)), budget=1.2)
    assert sampler.shard.weight == 1.2, "premise: no part of the weights here"
    measured, draws = [[1.0, 2.0], [math.nan, 4.0], [3.0, 0.5]], drawn(sampler)
    for draw, importance in zip(draws, measured, strict=True):
        sampler.update(draw, tensor([importance]))
    sampler.flush()
    rate = [r for draw in draws for r in draw.rate]
    q = [x for row in measured for x in row]
    known = [(r, x) for r, x in zip(rate, q, strict=True) if not math.isnan(x)]
    assert sampler.moments == pytest.approx(
        {
            "visits": 6.0,
            "weight": sum(r**-0.5 for r in rate),
            "weight_square": sum(1 / r for r in rate),
            "inverse_rate": sum(1 / r for r, _ in known),
            "importance": sum(x / r for r, x in known),
            "uniform": sum(x * x / r for r, x in known),
            "ours": sum(x * x / r for r, x in known),  # (r^−½)² = 1/r
            "cost": 6.0,
        },
        rel=1e-12,
    )
    full = sampler_of(UNEQUAL, 2)
    for draw, importance in zip(drawn(full), measured, strict=True):
        full.update(draw, tensor([importance]))
    full.flush()
    assert full.moments["ours"] != pytest.approx(full.moments["uniform"], rel=1e-3), "control"


# ---- large data ------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("piece", [16, 64])
def test_large_data_are_gone_through_in_pieces(monkeypatch, sampling, piece):
    whole = Training(sampling, 150, 4).run(300)
    monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", piece)
    pieces = Training(sampling, 150, 4).run(300)
    assert [draw.index for draw in pieces.draws] == [draw.index for draw in whole.draws]
    for a, b in zip(pieces.draws, whole.draws, strict=True):
        assert a.rate == pytest.approx(b.rate, rel=1e-5)
    assert same(pieces.sampler.importances, whole.sampler.importances)
    assert whole.sampler.visits.passes > 5, "premise"


# ---- going on after an interruption ----------------------------------------------------------------------------------


def resumed(state, sampling, n, batch, delay, skip, **settings):
    """Resume into new objects."""
    again = Training(sampling, n, batch, delay, **settings)
    assert again.sampler.matches(state)
    again.sampler.load_state_dict(copy.deepcopy(state), skip)
    return again


def goes_on(training, again, steps=50):
    """Whether the next draws and the state after them are equal bit for bit."""
    used = len(training.draws) - len(training.waiting)
    again.run(steps + len(training.waiting))
    training.run(steps)
    names = [name for name in training.figures() if name != "mean_loss"]
    wanted, found = training.figures(), again.figures()
    return training.draws[used:] == again.draws and all(same(wanted[name], found[name]) for name in names)


@MODES
@pytest.mark.parametrize(("delay", "arrives"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize(("n", "batch", "before"), [(90, 4, 7), (90, 4, 100), (700, 6, 50), (2000, 3, 700), (90, 4, 0)])
def test_it_goes_on_exactly(sampling, n, batch, before, delay, arrives):
    """In the middle of a segment, with outstanding draws and buffered measurements."""
    settings = {"arrives": arrives}
    training = Training(sampling, n, batch, delay, **settings).run(before)
    state = training.sampler.state_dict()
    if before:
        assert len(state["outstanding"]) == delay, "premise"
        assert state["measured"], "premise"
        assert sampling == "replacement" or training.sampler.visits.planned > 0, "premise: within a segment"
    skip = max(0, before - delay) % len(training.sampler)
    again = resumed(state, sampling, n, batch, delay, skip, **settings)
    assert again.sampler._lags == training.sampler._lags
    assert goes_on(training, again)


@MODES
@pytest.mark.parametrize("replaced", ["measured", "outstanding", "memory", "visits", "moments"])
def test_all_of_the_state_counts(sampling, replaced):
    """Control of the test above."""
    training = Training(sampling, 700, 6, delay=3).run(50)
    state, other = training.sampler.state_dict(), Training(sampling, 700, 6, delay=3).sampler.state_dict()
    again = resumed({**state, replaced: other[replaced]}, sampling, 700, 6, 3, skip=47)
    assert not goes_on(training, again, steps=150)


@MODES
def test_the_epoch_that_was_interrupted_is_as_long_as_any(sampling):
    training = Training(sampling, 90, 4, delay=3).run(10)
    again = resumed(training.sampler.state_dict(), sampling, 90, 4, 3, skip=7)
    epoch = drawn(again.sampler)
    assert len(epoch) == len(again.sampler)
    assert epoch[:7] == [SKIPPED] * 7
    assert epoch[7:10] == training.draws[7:]
    assert [draw.number for draw in epoch[7:]] == list(range(7, len(epoch)))
    assert len(drawn(again.sampler)) == len(again.sampler), "and the next one skips nothing"


@pytest.mark.parametrize(
    ("other", "matches"),
    [
        ({}, True),
        ({"batch": 3}, False),
        ({"shard": Shard(8, 2, tensor([0, 1, 2, 3]))}, False),
        ({"shard": Shard(9, 2, tensor([0, 1, 2, 4]))}, False),
        ({"shard": None}, False),
        ({"sampling": "replacement"}, False),
    ],
)
def test_it_goes_on_only_with_the_same_examples_batches_and_sampling(other, matches):
    def sampler(batch=2, shard=Shard(8, 2, tensor([0, 1, 2, 4])), sampling="reshuffled"):  # noqa: B008
        return ImportanceBatchSampler(ImportanceMemory(4), batch, shard=shard, sampling=sampling)

    assert sampler(**other).matches(sampler().state_dict()) == matches


@MODES
def test_a_restart_takes_what_was_remembered_elsewhere(sampling):
    """Given importances of all examples, a rank takes its own and begins a pass."""
    whole, record = torch.rand(10, generator=torch.Generator().manual_seed(0)), VisitRecord(10)
    record.update(torch.arange(10), torch.arange(40.0).view(4, 10))
    shard = Shard(10, 2, tensor([1, 2, 5, 7, 9]))
    settings = {"shard": shard, "rank": 1, "sampling": sampling, "uniform_fraction": 0.3, "record": VisitRecord(5)}
    sampler = ImportanceBatchSampler(ImportanceMemory(5), 1, **settings)
    sampler.restart(whole, passes=2, skip=2, record=record.state_dict())
    assert torch.equal(sampler.importances, whole[shard.index])
    assert sampler.record.columns()["loss"].tolist() == [11.0, 12.0, 15.0, 17.0, 19.0]
    epoch = drawn(sampler)
    assert len(epoch) == len(sampler)
    assert epoch[:2] == [SKIPPED] * 2
    assert sampler.visits.passes == 3
    wanted = oracles.rates(whole[shard.index].tolist(), 0.3)
    for draw in epoch[2:]:
        assert draw.rate == pytest.approx([wanted[shard.index.tolist().index(i)] for i in draw.index], rel=1e-5)
