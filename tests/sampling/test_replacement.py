"""Independent draws: unbiased by enumeration, from the current memory, with an incremental sum of rates."""

import math
from collections import Counter

import oracles
import pytest
import scipy.stats
import torch
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.replacement import IndependentVisits

UNEQUAL = [0.2, 1.0, 0.4, 3.0, math.nan, 0.7]


def memory_of(importance, momentum=0.0):
    memory = ImportanceMemory(len(importance), momentum)
    memory.load_state_dict({"importance": torch.as_tensor(importance)})
    return memory


def visits_from(importance, **settings):
    return IndependentVisits(memory_of(importance), **{"uniform_fraction": 0.3, **settings})


def draws(visits, number, at_once=1):
    """The next visits: examples and rates, as lists."""
    indices, rates = [], []
    while len(indices) < number:
        index, rate = visits.next(min(at_once, number - len(indices)))
        indices, rates = indices + index.tolist(), rates + rate.tolist()
    return indices, rates


def observe(visits, index, measured, batch=None):
    index, measured = torch.as_tensor(index), torch.as_tensor(measured)
    visits.observe(visits.memory.update(index, measured, batch), measured, torch.ones(len(index)))


def counts(index, n):
    return torch.bincount(tensor(index), minlength=n).double()


# ---- unbiased --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [UNEQUAL, [1.0, 5.0], [0.0, 0.0, 1.0], [2.0]])
def test_unbiased_at_every_draw(monkeypatch, importance):
    """N · P(draws i) · 1/r_i = 1 for every i: candidates one at a time, accepted up to an exact threshold."""
    n = len(importance)

    def accepts(candidate, uniform_number):
        visits = visits_from(importance)
        monkeypatch.setattr(torch, "randint", lambda *_, **__: tensor([candidate]))
        monkeypatch.setattr(torch, "rand", lambda *_, **__: tensor([uniform_number], dtype=torch.float64))
        monkeypatch.setattr(math, "ceil", lambda _: 1)  # one candidate at a time
        index, rate = visits.next(1)
        assert index.tolist() in ([], [candidate])
        return rate.tolist()

    wanted = oracles.rates(importance, 0.3)
    threshold = [r / max(wanted) for r in wanted]
    rates = []
    for i in range(n):
        rates += accepts(i, threshold[i] * (1 - 1e-6))
        assert len(rates) == i + 1
        assert threshold[i] > 1 - 1e-6 or not accepts(i, threshold[i] * (1 + 1e-6))
    probability = [t / sum(threshold) for t in threshold]  # candidates are uniform
    assert [n * p / r for p, r in zip(probability, rates, strict=True)] == pytest.approx([1.0] * n, rel=1e-6)
    if n > 1:
        wrong = [n * p / r**0.5 for p, r in zip(probability, rates, strict=True)]
        assert wrong != pytest.approx([1.0] * n, rel=1e-3), "control: other weights are biased"


def test_chi_square():
    """20 examples, 20,000 draws with one seed; a correct sampler fails for one seed in 10,000."""
    n = 20
    importance = torch.linspace(0.1, 4.0, n).tolist()
    index, rate = draws(visits_from(importance, seed=5), 20_000, at_once=50)
    wanted = oracles.rates(importance, 0.3)
    assert rate == pytest.approx([wanted[i] for i in index], rel=1e-5)
    expected = tensor(wanted, dtype=torch.float64) * 1000
    assert scipy.stats.chisquare(counts(index, n), expected).pvalue > 1e-4
    assert scipy.stats.chisquare(counts(index, n)).pvalue < 1e-4, "control: not uniform"
    pairs = Counter(zip(index[::2], index[1::2], strict=True))
    joint = torch.outer(expected, expected).flatten() * 10_000 / 20_000**2
    observed = [pairs[a, b] for a in range(n) for b in range(n)]
    assert scipy.stats.chisquare(observed, joint).pvalue > 1e-4, "draws are independent of each other"


def test_chi_square_after_updates():
    """Also in the middle of a pass, with incremental sum and maximum of the rates."""
    n = 20
    visits = visits_from(torch.linspace(0.1, 4.0, n).tolist(), seed=5)
    draws(visits, 3)
    mean = visits._mean
    observe(visits, [0, 1, 2, 19], [30.0, 8.0, 8.0, 0.1])
    now = [oracles.unnormalised_rate(q, mean, 0.3) for q in visits.memory.importances.tolist()]
    visits._visits = -(10**9)  # the pass does not end
    index, rate = draws(visits, 20_000, at_once=50)
    assert rate == pytest.approx([n * now[i] / sum(now) for i in index], rel=1e-5)
    assert scipy.stats.chisquare(counts(index, n), tensor(now).double() * 20_000 / sum(now)).pvalue > 1e-4
    before = tensor(oracles.rates(torch.linspace(0.1, 4.0, n).tolist(), 0.3)).double() * 1000
    assert scipy.stats.chisquare(counts(index, n), before).pvalue < 1e-4, "control"


def test_all_alike_is_uniform():
    for importance in ([math.nan] * 10, [0.7] * 10, [0.0] * 10):
        index, rate = draws(visits_from(importance), 5000, at_once=50)
        assert rate == [1.0] * 5000
        assert scipy.stats.chisquare(counts(index, 10)).pvalue > 1e-4


# ---- the memory as it is ---------------------------------------------------------------------------------------------


def test_every_draw_reads_the_memory():
    visits = visits_from([1.0] * 6, uniform_fraction=0.0)
    assert visits.planned == 0
    assert draws(visits, 2)[1] == [1.0, 1.0]
    observe(visits, range(6), torch.arange(1.0, 7.0))
    index, rate = draws(visits, 3)
    assert rate == pytest.approx([(i + 1) / 3.5 for i in index])
    assert rate != [1.0] * 3, "control"


def test_the_sum_follows_updates():
    """After many updates, the sum equals a new sum, and no rate exceeds the maximum."""
    visits = visits_from(torch.rand(50, generator=torch.Generator().manual_seed(0)))
    draws(visits, 1)
    still, g = visits._total, torch.Generator().manual_seed(1)
    for k in range(200):
        index, importance = torch.randint(50, (8,), generator=g), 3 * torch.rand(8, generator=g) ** 4
        importance[torch.rand(8, generator=g) < 0.05] = math.nan
        observe(visits, index, importance, torch.arange(2).repeat_interleave(4) if k % 2 else None)
        rates = [oracles.unnormalised_rate(q, visits._mean, 0.3) for q in visits.memory.importances.tolist()]
        assert visits._total == pytest.approx(sum(rates), rel=1e-6)
        assert visits.rates().mean().item() == pytest.approx(1.0, rel=1e-9)
        assert max(rates) <= visits._largest * (1 + 1e-6)
    assert abs(still / visits._total - 1) > 0.1, "control: it has changed"


def test_the_sum_is_the_same_in_any_division():
    """Bit for bit: batches one by one or in bulk, with rates so different that their sum is rounded."""
    g = torch.Generator().manual_seed(0)

    def importances(size):
        return 10 ** (-20 * torch.rand(size, generator=g))

    start = importances(30)
    batches = [(torch.randint(30, (6,), generator=g), importances(6)) for _ in range(60)]
    one_by_one, at_once = (visits_from(start, uniform_fraction=0.0) for _ in range(2))
    draws(one_by_one, 1), draws(at_once, 1)
    for index, importance in batches:
        observe(one_by_one, index, importance)
    for k in range(0, 60, 4):
        index, importance = (torch.cat(part) for part in zip(*batches[k : k + 4], strict=True))
        observe(at_once, index, importance, torch.arange(4).repeat_interleave(6))
    assert torch.equal(one_by_one.memory.importances, at_once.memory.importances)
    assert one_by_one._largest == at_once._largest
    assert one_by_one._total == at_once._total


def test_the_mean_is_that_of_the_start_of_the_pass():
    visits = visits_from([1.0, 3.0, 1.0, 3.0])
    draws(visits, 1)
    observe(visits, [0], [100.0])
    draws(visits, 2)
    assert visits._mean == 2.0
    draws(visits, 3)  # the pass has ended with the fourth
    assert visits.passes == 2
    assert visits._mean == 107 / 4


def test_extreme_rates_end():
    """One example has all the importance: 1 in 200,000 candidates is accepted."""
    importance = torch.zeros(200_000)
    importance[123] = 1.0
    index, rate = draws(visits_from(importance, uniform_fraction=0.0), 4)
    assert index == [123] * 4
    assert rate == pytest.approx([200_000] * 4)


def test_large_data_are_gone_through_in_pieces(monkeypatch):
    importance = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 3
    importance[::9], importance[-1] = math.nan, 9.0

    def run():
        visits = visits_from(importance, prune_mass=0.05)
        visits.restart(1)
        found = draws(visits, 300)
        return [*found, visits._total, visits._largest, visits._mean]

    whole = run()
    monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", 64)
    found = run()
    assert found[0] == whole[0]
    assert found[1] == pytest.approx(whole[1], rel=1e-6)
    assert found[2:] == pytest.approx(whole[2:], rel=1e-6)
    monkeypatch.setattr(ImportanceMemory, "chunks", lambda _: iter([slice(0, 960)]))
    assert run()[2:] != pytest.approx(whole[2:], rel=1e-6), "control: a piece that is left out is missed"


# ---- passes ----------------------------------------------------------------------------------------------------------


def test_pruned_examples_are_not_drawn_for_a_pass():
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    visits, without = (visits_from(q, prune_mass=mass) for mass in (0.01, 0.0))
    draws(visits, 6)
    assert visits.pruned is None, "the first pass knows nothing"
    index, rate = draws(visits, 600)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 3]
    assert set(index) == {1, 2, 4, 5}
    wanted = dict(zip([1, 2, 4, 5], oracles.rates([1.0, 2.0, 1.0, 3.0], 0.3), strict=True))
    assert rate == pytest.approx([wanted[i] for i in index], rel=1e-6)
    assert visits.rates()[[0, 3]].tolist() == [0.0, 0.0]
    assert {0, 3} <= set(draws(without, 600)[0]), "control"


def test_an_update_of_a_pruned_example_leaves_the_sum():
    visits = visits_from([0.001, 1.0, 2.0, 0.001, 1.0, 3.0], prune_mass=0.01)
    draws(visits, 7)
    assert visits.pruned.any()
    before = visits._total
    observe(visits, [0], [0.5])
    assert visits._total == before
    observe(visits, [1, 3], [0.5, 0.5])
    assert visits._total < before, "control"
    assert visits.rates()[[1, 2, 4, 5]].mean().item() == pytest.approx(1.0)


def test_pruned_examples_come_back_when_others_have_become_less_important():
    visits = visits_from([0.1, 0.1] + [1.0] * 8, prune_mass=0.05)
    draws(visits, 20)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1]
    observe(visits, range(2, 10), [0.05] * 8)
    assert visits.pruned.any(), "the current pass is unchanged"
    index, _ = draws(visits, 100)
    assert {0, 1} <= set(index)
    assert visits.pruned is None


def test_unknown_examples_are_never_pruned():
    visits = visits_from([math.nan, 0.001, math.nan, *[1.0] * 7], prune_mass=0.2)
    index, _ = draws(visits, 200)
    assert visits.pruned.nonzero().flatten().tolist() == [1]
    assert {0, 2} <= set(index)


def test_pruning_ends_where_it_is_switched_off():
    """Resuming without `prune_mass` restores all examples in the next pass."""
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    for mass in (0.0, 0.01):
        visits_before = visits_from(q, prune_mass=0.01)
        for _ in range(2):
            draws(visits_before, 6)
        assert visits_before.pruned.sum() == 2
        visits = visits_from(q, prune_mass=mass)
        visits.load_state_dict(visits_before.state_dict())
        for _ in range(2):
            draws(visits, 6)
        assert (visits.pruned is None) == (mass == 0)


def test_increment_brings_forgotten_examples_back():
    for increment, comes_back in ((0.1, True), (0.0, False)):
        visits = visits_from([0.0, 1.0, 1.0], uniform_fraction=0.0, increment=increment)
        index, _ = draws(visits, 150)
        assert (0 in index) == comes_back
        assert visits.memory.importances[1].item() == pytest.approx(1.0 + increment * (visits.passes - 1), rel=1e-5)


def test_seeds():
    """Draws depend on the seed of the pass only, not on previous draws or a global generator."""
    before = torch.get_rng_state()

    def run(seed, stride=1, passes=0):
        visits = visits_from(UNEQUAL, seed=seed, stride=stride)
        visits.restart(passes)
        return draws(visits, 6)

    assert run(1) == run(1) == run(0, passes=1) == run(-5, stride=3, passes=2)
    assert run(1) != run(2)
    assert run(1) != run(1, passes=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- going on after an interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 5, 17, 60])
def test_it_goes_on_exactly(before):
    true = torch.rand(50, generator=torch.Generator().manual_seed(0))

    def fresh():
        return visits_from([math.nan] * 50, prune_mass=0.02, increment=0.001)

    def walk(visits, steps):
        found = []
        for k in range(steps):
            index, rate = visits.next(3)
            found.append((index.tolist(), rate.tolist()))
            observe(visits, index, true[index] * (1 + k % 3))
        return found

    visits = fresh()
    walk(visits, before)
    state, memory = visits.state_dict(), visits.memory.state_dict()
    wanted = walk(visits, 80)
    for _ in range(2):  # also a second time: a state stays what it was
        again = fresh()
        again.memory.load_state_dict(memory)
        again.load_state_dict(state)
        assert walk(again, 80) == wanted
    without = fresh()
    without.memory.load_state_dict(memory)
    if before:
        assert walk(without, 80) != wanted, "control"
