"""Visits with different costs: rates, guard, pruning and logs, by enumeration and reference implementations."""

import itertools
import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling import rates as R
from hf_importance.sampling.guard import Guard
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.progress import gain
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits


def some(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lognormal(n, seed=0, scale=0.8):
    return torch.exp(scale * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def memory_of(importance, cost=None, tokens=None):
    cost = None if cost is None else R.relative_costs(torch.as_tensor(cost))
    memory = ImportanceMemory(len(importance), 0.0, cost, None if tokens is None else torch.as_tensor(tokens).float())
    memory.load_state_dict({"importance": torch.as_tensor(importance).float()})
    return memory


# ---- costs and rates -------------------------------------------------------------------------------------------------


def test_costs_are_relative():
    cost = R.relative_costs(tensor([3, 5, 16]))
    assert cost.tolist() == pytest.approx([3 / 8, 5 / 8, 2.0])
    assert cost.dtype == torch.float32
    assert R.relative_costs(tensor([30, 50, 160])).tolist() == cost.tolist(), "in whatever unit"


def test_equal_costs_are_none():
    """Then nothing changes, bit for bit."""
    assert R.relative_costs(tensor([7, 7, 7])) is None
    assert R.relative_costs(tensor([7])) is None
    assert R.relative_costs(tensor([7, 7, 8])) is not None, "control"


def test_rates_under_costs_by_hand():
    q, c = tensor([2.0, 1.0, 3.0]), tensor([4.0, 1.0, 9.0])
    assert R.rates(R.per_cost(q, c), 0.0).tolist() == [1.0, 1.0, 1.0], "texts that are equally hard"
    assert R.rates(R.per_cost(q, None), 0.0).tolist() == pytest.approx([1.0, 0.5, 1.5]), "control"
    assert R.rates(R.per_cost(tensor([4.0, 1.0, 3.0]), c), 0.0).tolist() == pytest.approx([1.5, 0.75, 0.75])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_rates_have_less_variance_at_equal_cost(seed, batch):
    """Over all possible batches: variance × cost for gradients that sum to 0."""
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = lognormal(4, seed)[:, None] * (gradients - gradients.mean(0))
    gradients = gradients - gradients.mean(0)
    q, cost = gradients.norm(dim=1), lognormal(4, seed + 10)

    def spent(rate):
        mean, variance, cost_of_batch = oracles.moments_of_batches(gradients, cost.tolist(), rate.tolist(), batch)
        torch.testing.assert_close(mean, gradients.mean(0), atol=1e-12, rtol=0)
        return variance * cost_of_batch

    best = spent(R.rates(R.per_cost(q, cost), 0.0))
    assert best == pytest.approx((q * cost.sqrt()).mean().item() ** 2, rel=1e-9), "for a batch of any size"
    assert spent(R.rates(q, 0.0)) > 1.001 * best, "control: the importance alone is not the best"
    for other in range(20):
        rate = R.rates(some(4, other), 0.1)
        assert spent(rate) >= best
    with_floor = R.rates(R.per_cost(q, cost), 0.3)
    ratio = spent(with_floor) / spent(torch.ones(4, dtype=torch.float64))
    visits = (100_000 * with_floor).round().long()  # as often as the rates say
    visits = torch.arange(4).repeat_interleave(visits)
    arguments = q[visits], with_floor[visits], R.weights(with_floor)[visits]
    assert R.variance_ratio(*arguments, cost[visits]).item() == pytest.approx(ratio, rel=1e-4)
    assert R.variance_ratio(*arguments).item() != pytest.approx(ratio, rel=1e-2), "control: of a visit"


@pytest.mark.parametrize("kind", ["dear", "cheap"])
def test_what_a_step_teaches_does_not_depend_on_what_it_costs(kind):
    """Of a quadratic loss: with the best learning rate a step gains |g|⁴ / E|estimate|², over all batches, exactly.

    Against that of uniform sampling it is the gain of effective visits, by the variance ratio of a visit; not by that
    at equal cost, which would end training early where visits are cheap.
    """
    noise = lognormal(5, 3)[:, None] * torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    gradients = noise - noise.mean(0) + 0.1  # whose mean is small beside them, as of single examples
    q = gradients.norm(dim=1)
    cost = q**1.5 if kind == "dear" else q**-0.5
    cost = cost / cost.mean()
    rate, even = R.rates(R.per_cost(q, cost), 0.3), [1.0] * 5

    def square(rates):
        mean, variance, spent = oracles.moments_of_batches(gradients, cost.tolist(), rates, 3)
        return variance + mean.square().sum().item(), spent / 3

    (ours, kappa), (uniform, one) = square(rate.tolist()), square(even)
    assert one == pytest.approx(1.0)
    assert (kappa > 1.05) if kind == "dear" else (kappa < 0.95), "premise"
    signal = gradients.mean(0).square().sum().item() / ours
    ratio = (q.square() / rate).mean().item() / q.square().mean().item()
    assert ratio < 0.95, "premise"
    assert gain(ratio, signal) == pytest.approx(uniform / ours, rel=0.02)
    assert gain(ratio * kappa, signal) != pytest.approx(uniform / ours, rel=0.04), "control"


@pytest.mark.parametrize("seed", range(3))
def test_the_least_ratio_is_that_of_these_rates(seed):
    q, cost = lognormal(40, seed), lognormal(40, seed + 1)
    memory = memory_of(q, cost)
    rate = R.rates(R.per_cost(q, cost), 0.0)
    wanted = (q.square() / rate).mean() * (rate * cost).mean() / q.square().mean() / cost.mean()
    assert memory.least_variance_ratio() == pytest.approx(wanted.item(), rel=1e-5)
    assert memory_of(q).least_variance_ratio() != pytest.approx(wanted.item(), rel=1e-2), "control"
    assert memory_of(cost.sqrt(), cost).least_variance_ratio() == pytest.approx(1.0), "all alike per cost"


def test_the_least_ratio_is_of_what_is_known():
    q, cost = [1.0, math.nan, 3.0, math.nan], [1.0, 5.0, 4.0, 2.0]
    known = memory_of([1.0, 3.0], [1.0, 4.0]).least_variance_ratio()
    assert memory_of(q, cost).least_variance_ratio() == pytest.approx(known)
    assert memory_of([math.nan] * 2, [1.0, 4.0]).least_variance_ratio() == 1.0


def test_expected_costs_are_those_of_the_oracle():
    remembered, measured, rate, cost = some(30), some(30, 1), 0.3 + some(30, 2), lognormal(30)
    remembered[::7], measured[::5] = math.nan, math.inf
    fractions = tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    arguments = remembered, 0.5, measured, rate, cost, fractions
    found = R.expected_costs(*arguments, 1.4)
    lists = [x if isinstance(x, float) else x.tolist() for x in arguments]
    assert found.sum(0).tolist() == pytest.approx(oracles.expected_costs(*lists, 1.4), rel=1e-12)
    wrong = [*arguments[:4], cost.roll(1), fractions]
    assert R.expected_costs(*wrong, 1.4).sum(0).tolist() != pytest.approx(found.sum(0).tolist(), rel=1e-3), "control"


# ---- visits ----------------------------------------------------------------------------------------------------------


def segmented(memory, **settings):
    return SegmentedVisits(memory, 1, **{"uniform_fraction": 0.3, "guard": False, **settings})


def rates_of(visits, n, number=400):
    found = {}
    for _ in range(number):
        found |= {int(i): float(r) for i, r in zip(*visits.next(4), strict=True)}
    return [found.get(i, 0.0) for i in range(n)]


@pytest.mark.parametrize("cls", [SegmentedVisits, IndependentVisits])
def test_rates_of_visits_are_per_cost(cls):
    q, cost = [1.0, 0.5, 2.0, 4.0, 1.0], [1.0, 1.0, 4.0, 4.0, 9.0]
    visits = segmented(memory_of(q, cost)) if cls is SegmentedVisits else cls(memory_of(q, cost), uniform_fraction=0.3)
    wanted = oracles.rates([x / c**0.5 for x, c in zip(q, cost, strict=True)], 0.3)
    assert rates_of(visits, 5) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(oracles.rates(q, 0.3), rel=1e-2), "control"


def test_independent_visits_follow_what_is_measured():
    """The sum of the rates is updated incrementally."""
    q, cost = lognormal(12), lognormal(12, 1)
    visits = IndependentVisits(memory_of(q, cost), uniform_fraction=0.3)
    visits.next(1)
    mean = R.per_cost(q, cost / cost.mean()).mean().item()
    for seed in range(3):
        index, measured = tensor([1, 5, 5, seed]), lognormal(4, seed + 5).float()
        visits.observe(visits.memory.update(index, measured), measured, torch.ones(4))
    now = R.per_cost(visits.memory.importances, visits.memory.cost)
    wanted = [oracles.unnormalised_rate(x, mean, 0.3) for x in now.tolist()]
    assert visits.rates().tolist() == pytest.approx([12 * r / sum(wanted) for r in wanted], rel=1e-4)


@pytest.mark.parametrize("guard", [True, False])
def test_what_nobody_has_seen_is_visited_evenly(guard):
    """The first segment is uniform; then unvisited examples have the mean q/√c of recent first visits."""
    cost = lognormal(80)
    memory = memory_of([math.nan] * 80, cost)
    visits, q = segmented(memory, guard=guard), lognormal(80, 1)
    index, rate = visits.next(10)
    assert rate.tolist() == [1.0] * 10
    assert index.tolist() == torch.randperm(80, generator=torch.Generator().manual_seed(0)).tolist()[:10]
    measured = q[index].float()
    visits.observe(memory.update(index, measured), measured, rate)
    fresh = R.per_cost(measured, memory.cost[index]).mean().item()
    index, rate = visits.next(2**62)
    unseen = memory.importances[index].isnan()
    assert visits._fresh == pytest.approx(fresh)
    assert len(set(rate[unseen].tolist())) == 1, "whatever they cost"
    assert measured.mean().item() != pytest.approx(fresh, rel=1e-2), "control"


def test_texts_that_are_equally_hard_have_equal_rates():
    length = (20 * lognormal(200)).ceil()
    memory = memory_of(length.sqrt(), length)
    assert rates_of(segmented(memory), 200, 100) == pytest.approx([1.0] * 200, rel=1e-5)
    careless = tensor(rates_of(segmented(memory_of(length.sqrt())), 200, 400))
    assert torch.corrcoef(torch.stack([careless.log(), length.log().float()]))[0, 1] > 0.95, "control"


def test_unbiased_over_every_random_start(monkeypatch):
    """E Σ weight · 1[visits i] = visits / N in every segment, with rates that costs have changed."""
    cost, n = [0.25, 1.0, 2.25, 0.5], 4
    root = (tensor(cost) / tensor(cost).mean()).sqrt()
    schedule = [[1, 1, 1, 1], [2, 1, 1, 0], [0, 1, 0, 3], [3, 0, 1, 0], [0, 1, 1, 2]]  # of the rates
    counted = torch.zeros(len(schedule), n).double()
    careless = counted.clone()
    for start in itertools.permutations(range(n)):
        monkeypatch.setattr(torch, "randperm", lambda *_, s=start, **__: tensor(s, dtype=torch.int32))
        memory = memory_of([math.nan] * n, cost)
        visits = segmented(memory, uniform_fraction=0.0)
        for k, rates in enumerate(schedule):
            memory.importances[:] = tensor(rates) * root
            for i, r in zip(*visits.next(2**62), strict=True):
                counted[k, i] += 1 / r / 24
                careless[k, i] += 1 / (r * root[i]) / 24
    wanted = 0.25 * (tensor(schedule) > 0).double()
    torch.testing.assert_close(counted, wanted, rtol=1e-5, atol=1e-6)
    assert (careless - wanted).abs().max() > 0.05, "control"


def test_moments_have_the_costs():
    sampler = ImportanceBatchSampler(memory_of([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 10]), 2, uniform_fraction=0.3)
    draws = [draw for _ in range(5) for draw in sampler]
    for draw in draws:
        sampler.update(draw, torch.ones(1, len(draw.index)))
    sampler.flush()
    wanted = sum([0.25, 0.5, 0.75, 2.5][i] for draw in draws for i in draw.index)
    assert sampler.moments["cost"] == pytest.approx(wanted)
    assert wanted != pytest.approx(sampler.moments["visits"], rel=1e-2), "control"


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_losses_that_are_sums_are_pruned_by_the_mean_over_their_tokens():
    tokens = tensor([1.0, 1.0, 4.0, 9.0, 100.0, 100.0])
    hard = tensor([1.0, 0.01, 1.0, 0.01, 1.0, 0.01])
    memory = memory_of(hard * tokens.sqrt(), tokens=tokens)
    assert memory.unimportant(0.1).tolist() == [False, True, False, True, False, True]
    by_sum = memory_of(hard * tokens.sqrt()).unimportant(0.1)
    assert by_sum.tolist() == [True, True, False, True, False, True], "control: the shortest is left out"
    visits = segmented(memory, prune_mass=0.1)
    for _ in range(20):
        visits.next(2**62)
    assert visits.pruned.tolist() == memory.unimportant(0.1).tolist()


# ---- the guard -------------------------------------------------------------------------------------------------------


def guarded(q, cost, measured):
    guard, root = Guard(0.2), cost.sqrt()
    mean = (q / root).mean().item()
    guard.observe(q / root, mean, measured, torch.ones(len(q)), math.inf, cost)
    return guard, mean


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0], ids=["length tells nothing", "root", "length"])
def test_the_guard_compares_at_equal_cost(noise, power):
    """The guard rejects floors with a second moment above that of uniform sampling."""
    cost = lognormal(500, 1)
    cost = cost / cost.mean()
    q = lognormal(500, scale=0.5) * cost**power
    measured = q * lognormal(500, 2, noise)
    floors = [0.2 + 0.1 * k for k in range(9)]
    guard, mean = guarded(q, cost, measured)
    lists = (q / cost.sqrt()).tolist(), mean, measured.tolist(), [1.0] * 500
    moments = oracles.second_moments(*lists, floors)
    costs = oracles.expected_costs(*lists, cost.tolist(), floors)
    teach = [k for k in range(9) if moments[k] <= 1.01 * moments[-1]]
    least = min(moments[k] * costs[k] for k in teach)
    wanted = next(floors[k] for k in teach if moments[k] * costs[k] <= 1.01 * least)
    worth = least <= 0.9 * moments[-1] * costs[-1]
    assert guard.floor() == pytest.approx(wanted if worth else 1.0)


@pytest.mark.parametrize(("spread", "floor"), [(0.25, 1.0), (0.5, 0.2)])
def test_where_a_tenth_is_not_saved_visits_are_uniform(spread, floor):
    """Stable importances per cost that differ little: savings of 6 and 22 %."""
    cost = lognormal(5000, 1, 0.3)
    cost = cost / cost.mean()
    q = lognormal(5000, 2, spread) * cost.sqrt()
    guard, mean = guarded(q, cost, q)
    spent = guard._second_moments * guard._costs
    assert (spent[0] < 0.9 * spent[-1]) == (floor < 1)
    assert spent[0] < 0.97 * spent[-1], "premise: there is something to gain"
    assert guard.floor() == pytest.approx(floor)
    free = Guard(0.2)
    free.observe(q / cost.sqrt(), mean, q, torch.ones(5000), math.inf)
    assert free.floor() < 1, "control: where all visits cost the same what there is is taken"


def test_the_guard_without_costs_would_choose_otherwise():
    """Control: if short texts are as important as long ones, rates prefer the short ones."""
    cost = lognormal(2000, 1)
    cost = cost / cost.mean()
    q = lognormal(2000, scale=0.3)
    guard, mean = guarded(q, cost, q)
    careless = Guard(0.2)
    careless.observe(q / cost.sqrt(), mean, q, torch.ones(2000), math.inf)
    assert guard.floor() < careless.floor()


def test_a_visit_never_teaches_less_than_a_uniform_one():
    """Equally important texts of different length: short ones are cheaper, but would need more steps."""
    cost = lognormal(2000, 1)
    cost = cost / cost.mean()
    q = torch.ones(2000, dtype=torch.float64)
    guard, _ = guarded(q, cost, q)
    spent = guard._second_moments * guard._costs
    assert spent[0] < 0.95 * spent[-1], "premise: it would pay per cost"
    assert guard.floor() > 0.5
    after = oracles.rates(R.per_cost(q, cost).tolist(), guard.floor())
    assert sum(1 / r for r in after) / 2000 <= 1.012


def test_evidence_on_costs_is_forgotten_kept_and_the_same_in_any_division():
    cost, q = lognormal(60, 1), lognormal(60)
    guard, mean = guarded(q, cost, q)
    parts = Guard(0.2)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        u = (q / cost.sqrt())[part]
        parts.observe(u, mean, q[part], torch.ones(len(u)), math.inf, cost[part])
    assert torch.equal(parts._costs, guard._costs)
    again = Guard(0.2)
    again.load_state_dict(guard.state_dict())
    assert torch.equal(again._costs, guard._costs)
    before = guard.state_dict()["costs"]
    guard.floor()
    assert torch.equal(guard._costs, 0.9 * before)
    assert before.min() > 0, "control"
