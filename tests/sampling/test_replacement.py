"""Independent draws: unbiasedness, current rates, the incremental sum of the rates, passes and pruning, state."""

import math
from collections import Counter

import oracles
import pytest
import scipy.stats
import torch
from sampling_helpers import UNEQUAL, memory_of
from torch import tensor

from hf_importance.sampling.replacement import IndependentVisits


def independent_visits(importance, **settings):
    return IndependentVisits(memory_of(importance), **{"uniform_fraction": 0.3, **settings})


def next_visits(visits, number, at_once=1):
    """The next visits, at most `at_once` per call: examples and rates, as lists."""
    indices, rates = [], []
    while len(indices) < number:
        index, rate = visits.plan(min(at_once, number - len(indices)))
        indices, rates = indices + index.tolist(), rates + rate.tolist()
    return indices, rates


def measure(visits, index, measured, batch=None):
    """Update the memory and the visits."""
    index, measured = torch.as_tensor(index), torch.as_tensor(measured)
    visits.observe(visits.memory.update(index, measured, batch), measured, torch.ones(len(index)))


def counts(index, n):
    return torch.bincount(tensor(index), minlength=n).double()


# ---- unbiasedness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [UNEQUAL, [1.0, 5.0], [0.0, 0.0, 1.0], [2.0]])
def test_every_draw_is_unbiased(monkeypatch, importance):
    """N · P(i is drawn) · 1/r_i = 1 for every i, from the threshold at which a candidate is accepted."""
    n = len(importance)

    def rates_if_accepted(candidate, uniform_number):
        visits = independent_visits(importance)
        monkeypatch.setattr(torch, "randint", lambda *_, **__: tensor([candidate]))
        monkeypatch.setattr(torch, "rand", lambda *_, **__: tensor([uniform_number], dtype=torch.float64))
        monkeypatch.setattr(math, "ceil", lambda _: 1)  # one candidate per call
        index, rate = visits.plan(1)
        assert index.tolist() in ([], [candidate])
        return rate.tolist()

    wanted = oracles.rates(importance, 0.3)
    threshold = [r / max(wanted) for r in wanted]
    rates = []
    for i in range(n):
        rates += rates_if_accepted(i, threshold[i] * (1 - 1e-6))
        assert len(rates) == i + 1
        assert threshold[i] > 1 - 1e-6 or not rates_if_accepted(i, threshold[i] * (1 + 1e-6))
    probability = [t / sum(threshold) for t in threshold]  # candidates are uniform
    assert [n * p / r for p, r in zip(probability, rates, strict=True)] == pytest.approx([1.0] * n, rel=1e-6)
    if n > 1:
        wrong = [n * p / r**0.5 for p, r in zip(probability, rates, strict=True)]
        assert wrong != pytest.approx([1.0] * n, rel=1e-3), "control: weights with exponent ½ are biased"


def test_draws_follow_the_rates_and_are_independent():
    """Chi-square tests with 20 examples, 20,000 draws and a fixed seed; one seed in 10,000 would fail."""
    n = 20
    importance = torch.linspace(0.1, 4.0, n).tolist()
    index, rate = next_visits(independent_visits(importance, seed=5), 20_000, at_once=50)
    wanted = oracles.rates(importance, 0.3)
    assert rate == pytest.approx([wanted[i] for i in index], rel=1e-5)
    expected = tensor(wanted, dtype=torch.float64) * 1000
    assert scipy.stats.chisquare(counts(index, n), expected).pvalue > 1e-4
    assert scipy.stats.chisquare(counts(index, n)).pvalue < 1e-4, "control: uniform rates"
    pairs = Counter(zip(index[::2], index[1::2], strict=True))
    joint = torch.outer(expected, expected).flatten() * 10_000 / 20_000**2
    observed = [pairs[a, b] for a in range(n) for b in range(n)]
    assert scipy.stats.chisquare(observed, joint).pvalue > 1e-4, "consecutive draws are independent"


def test_draws_follow_the_rates_after_updates_within_a_pass():
    """With the incremental sum and maximum of the rates."""
    n = 20
    visits = independent_visits(torch.linspace(0.1, 4.0, n).tolist(), seed=5)
    next_visits(visits, 3)
    mean = visits.state_dict()["mean"]
    measure(visits, [0, 1, 2, 19], [30.0, 8.0, 8.0, 0.1])
    now = [oracles.unnormalised_rate(q, mean, 0.3) for q in visits.memory.importances.tolist()]
    visits._visits = -(10**9)  # the pass does not end
    index, rate = next_visits(visits, 20_000, at_once=50)
    assert rate == pytest.approx([n * now[i] / sum(now) for i in index], rel=1e-5)
    assert scipy.stats.chisquare(counts(index, n), tensor(now).double() * 20_000 / sum(now)).pvalue > 1e-4
    before = tensor(oracles.rates(torch.linspace(0.1, 4.0, n).tolist(), 0.3)).double() * 1000
    assert scipy.stats.chisquare(counts(index, n), before).pvalue < 1e-4, "control: rates before the updates"


def test_equal_importances_are_drawn_uniformly():
    for importance in ([math.nan] * 10, [0.7] * 10, [0.0] * 10):
        index, rate = next_visits(independent_visits(importance), 5000, at_once=50)
        assert rate == [1.0] * 5000
        assert scipy.stats.chisquare(counts(index, 10)).pvalue > 1e-4


# ---- current rates ---------------------------------------------------------------------------------------------------


def test_every_draw_uses_the_current_memory():
    visits = independent_visits([1.0] * 6, uniform_fraction=0.0)
    assert next_visits(visits, 2)[1] == [1.0, 1.0]
    measure(visits, range(6), torch.arange(1.0, 7.0))
    index, rate = next_visits(visits, 3)
    assert rate == pytest.approx([(i + 1) / 3.5 for i in index])
    assert rate != [1.0] * 3, "control"


def test_sum_and_maximum_of_rates_follow_updates():
    """After many updates, the sum equals a newly computed one, and no rate exceeds the maximum."""
    visits = independent_visits(torch.rand(50, generator=torch.Generator().manual_seed(0)))
    next_visits(visits, 1)
    initial, g = visits.state_dict()["total"], torch.Generator().manual_seed(1)
    for k in range(200):
        index, importance = torch.randint(50, (8,), generator=g), 3 * torch.rand(8, generator=g) ** 4
        importance[torch.rand(8, generator=g) < 0.05] = math.nan
        measure(visits, index, importance, torch.arange(2).repeat_interleave(4) if k % 2 else None)
        state = visits.state_dict()
        rates = [oracles.unnormalised_rate(q, state["mean"], 0.3) for q in visits.memory.importances.tolist()]
        assert state["total"] == pytest.approx(sum(rates), rel=1e-6)
        assert visits.rates(slice(None)).mean().item() == pytest.approx(1.0, rel=1e-9)
        assert max(rates) <= state["largest"] * (1 + 1e-6)
    assert abs(initial / state["total"] - 1) > 0.1, "control: the sum has changed"


def test_sum_of_rates_does_not_depend_on_the_split_into_updates():
    """Bit for bit; the rates differ so much that their sum is rounded."""
    g = torch.Generator().manual_seed(0)

    def importances(size):
        return 10 ** (-20 * torch.rand(size, generator=g))

    start = importances(30)
    batches = [(torch.randint(30, (6,), generator=g), importances(6)) for _ in range(60)]
    one_by_one, in_bulk = (independent_visits(start, uniform_fraction=0.0) for _ in range(2))
    next_visits(one_by_one, 1), next_visits(in_bulk, 1)
    for index, importance in batches:
        measure(one_by_one, index, importance)
    for k in range(0, 60, 4):
        index, importance = (torch.cat(part) for part in zip(*batches[k : k + 4], strict=True))
        measure(in_bulk, index, importance, torch.arange(4).repeat_interleave(6))
    assert torch.equal(one_by_one.memory.importances, in_bulk.memory.importances)
    for name in ("largest", "total"):
        assert one_by_one.state_dict()[name] == in_bulk.state_dict()[name]


def test_mean_importance_is_fixed_at_the_start_of_a_pass():
    visits = independent_visits([1.0, 3.0, 1.0, 3.0])
    next_visits(visits, 1)
    measure(visits, [0], [100.0])
    next_visits(visits, 2)
    assert visits.state_dict()["mean"] == 2.0
    next_visits(visits, 3)  # the pass ends with the fourth visit
    assert visits.passes == 2
    assert visits.state_dict()["mean"] == 107 / 4


def test_drawing_terminates_with_extreme_rates():
    """One example has all the importance, so 1 in 200,000 candidates is accepted."""
    importance = torch.zeros(200_000)
    importance[123] = 1.0
    index, rate = next_visits(independent_visits(importance, uniform_fraction=0.0), 4)
    assert index == [123] * 4
    assert rate == pytest.approx([200_000] * 4)


# ---- passes and pruning ----------------------------------------------------------------------------------------------


def test_pruned_examples_are_not_drawn():
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    visits, unpruned = (independent_visits(q, prune_mass=mass) for mass in (0.01, 0.0))
    next_visits(visits, 6)
    assert visits.pruned is None, "nothing is pruned in the first pass"
    index, rate = next_visits(visits, 600)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 3]
    assert set(index) == {1, 2, 4, 5}
    wanted = dict(zip([1, 2, 4, 5], oracles.rates([1.0, 2.0, 1.0, 3.0], 0.3), strict=True))
    assert rate == pytest.approx([wanted[i] for i in index], rel=1e-6)
    assert visits.rates(slice(None))[[0, 3]].tolist() == [0.0, 0.0]
    assert {0, 3} <= set(next_visits(unpruned, 600)[0]), "control"


def test_updates_of_pruned_examples_do_not_change_the_sum_of_rates():
    visits = independent_visits([0.001, 1.0, 2.0, 0.001, 1.0, 3.0], prune_mass=0.01)
    next_visits(visits, 7)
    assert visits.pruned.any()
    before = visits.state_dict()["total"]
    measure(visits, [0], [0.5])
    assert visits.state_dict()["total"] == before
    measure(visits, [1, 3], [0.5, 0.5])
    assert visits.state_dict()["total"] < before, "control"
    assert visits.rates(slice(None))[[1, 2, 4, 5]].mean().item() == pytest.approx(1.0)


def test_pruned_examples_return_when_others_become_less_important():
    visits = independent_visits([0.1, 0.1] + [1.0] * 8, prune_mass=0.05)
    next_visits(visits, 20)
    assert visits.pruned.nonzero().flatten().tolist() == [0, 1]
    measure(visits, range(2, 10), [0.05] * 8)
    assert visits.pruned.any(), "the current pass is unchanged"
    index, _ = next_visits(visits, 100)
    assert {0, 1} <= set(index)
    assert visits.pruned is None


def test_unknown_examples_are_never_pruned():
    visits = independent_visits([math.nan, 0.001, math.nan, *[1.0] * 7], prune_mass=0.2)
    index, _ = next_visits(visits, 200)
    assert visits.pruned.nonzero().flatten().tolist() == [1]
    assert {0, 2} <= set(index)


def test_pruning_ends_after_resuming_without_prune_mass():
    """All examples are drawn again from the next pass on."""
    q = [0.001, 1.0, 2.0, 0.001, 1.0, 3.0]
    for mass in (0.0, 0.01):
        pruning = independent_visits(q, prune_mass=0.01)
        for _ in range(2):
            next_visits(pruning, 6)
        assert pruning.pruned.sum() == 2
        visits = independent_visits(q, prune_mass=mass)
        visits.load_state_dict(pruning.state_dict())
        for _ in range(2):
            next_visits(visits, 6)
        assert (visits.pruned is None) == (mass == 0)


def test_increment_makes_examples_of_importance_0_drawable():
    for increment, drawn in ((0.1, True), (0.0, False)):
        visits = independent_visits([0.0, 1.0, 1.0], uniform_fraction=0.0, increment=increment)
        index, _ = next_visits(visits, 150)
        assert (0 in index) == drawn
        assert visits.memory.importances[1].item() == pytest.approx(1.0 + increment * (visits.passes - 1), rel=1e-5)


def test_draws_depend_only_on_the_seed_of_the_pass():
    """Not on previous draws or the global generator, which is not used either."""
    before = torch.get_rng_state()

    def run(seed, stride=1, passes=0):
        visits = independent_visits(UNEQUAL, seed=seed, stride=stride)
        visits.restart(passes)
        return next_visits(visits, 6)

    assert run(1) == run(1) == run(0, passes=1) == run(-5, stride=3, passes=2)
    assert run(1) != run(2)
    assert run(1) != run(1, passes=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, 5, 17, 60])
def test_independent_visits_state_dict_restores_exactly(before):
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0))

    def new_visits():
        return independent_visits([math.nan] * 50, prune_mass=0.02, increment=0.001)

    def draw_and_measure(visits, steps):
        found = []
        for k in range(steps):
            index, rate = visits.plan(3)
            found.append((index.tolist(), rate.tolist()))
            measure(visits, index, importance[index] * (1 + k % 3))
        return found

    visits = new_visits()
    draw_and_measure(visits, before)
    state, memory = visits.state_dict(), visits.memory.state_dict()
    wanted = draw_and_measure(visits, 80)
    for _ in range(2):  # twice, because the state must not change
        again = new_visits()
        again.memory.load_state_dict(memory)
        again.load_state_dict(state)
        assert draw_and_measure(again, 80) == wanted
    without_state = new_visits()
    without_state.memory.load_state_dict(memory)
    if before:
        assert draw_and_measure(without_state, 80) != wanted, "control"
