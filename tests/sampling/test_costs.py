"""Visits of different cost: rates, planned visits, moments and pruning."""

import math

import oracles
import pytest
import torch
from sampling_helpers import lognormal_values, memory_of, random_values, segmented_visits, used
from torch import tensor

from hf_importance.sampling import rates as R
from hf_importance.sampling.effective_steps import gain
from hf_importance.sampling.replacement import IndependentVisits
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits

# ---- costs and rates -------------------------------------------------------------------------------------------------


def test_relative_costs_have_mean_one_in_any_unit():
    cost = R.relative_costs(tensor([3, 5, 16]))
    assert cost.tolist() == pytest.approx([3 / 8, 5 / 8, 2.0])
    assert cost.dtype == torch.float32
    assert R.relative_costs(tensor([30, 50, 160])).tolist() == cost.tolist(), "independent of the unit"


def test_equal_lengths_have_no_relative_costs():
    """With None, sampling is the same as without costs, bit for bit."""
    assert R.relative_costs(tensor([7, 7, 7])) is None
    assert R.relative_costs(tensor([7])) is None
    assert R.relative_costs(tensor([7, 7, 8])) is not None, "control"


def test_rates_with_costs_by_hand():
    q, c = tensor([2.0, 1.0, 3.0]), tensor([4.0, 1.0, 9.0])
    assert oracles.rates_of(R.per_cost(q, c), 0.0).tolist() == [1.0, 1.0, 1.0], "equal importances per root cost"
    assert oracles.rates_of(R.per_cost(q, None), 0.0).tolist() == pytest.approx([1.0, 0.5, 1.5]), "control"
    assert oracles.rates_of(R.per_cost(tensor([4.0, 1.0, 3.0]), c), 0.0).tolist() == pytest.approx([1.5, 0.75, 0.75])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_rates_with_costs_minimise_variance_times_cost(seed, batch):
    """By enumeration of all batches, for gradients with sum 0."""
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = lognormal_values(4, seed)[:, None] * (gradients - gradients.mean(0))
    gradients = gradients - gradients.mean(0)
    q, cost = gradients.norm(dim=1), lognormal_values(4, seed + 10)

    def variance_times_cost(rate):
        mean, variance, cost_of_batch = oracles.moments_of_batches(gradients, cost.tolist(), rate.tolist(), batch)
        torch.testing.assert_close(mean, gradients.mean(0), atol=1e-12, rtol=0)
        return variance * cost_of_batch

    best = variance_times_cost(oracles.rates_of(R.per_cost(q, cost), 0.0))
    assert best == pytest.approx((q * cost.sqrt()).mean().item() ** 2, rel=1e-9), "the same for any batch size"
    assert variance_times_cost(oracles.rates_of(q, 0.0)) > 1.001 * best, "control: rates in proportion to q alone"
    for other in range(20):
        rate = oracles.rates_of(random_values(4, other), 0.1)
        assert variance_times_cost(rate) >= best
    with_floor = oracles.rates_of(R.per_cost(q, cost), 0.3)
    ratio = variance_times_cost(with_floor) / variance_times_cost(torch.ones(4, dtype=torch.float64))
    visits = torch.arange(4).repeat_interleave((100_000 * with_floor).round().long())  # in proportion to the rates
    arguments = q[visits], with_floor[visits], R.weights(with_floor)[visits]
    assert oracles.variance_ratio(*arguments, cost[visits]).item() == pytest.approx(ratio, rel=1e-4)
    assert oracles.variance_ratio(*arguments).item() != pytest.approx(ratio, rel=1e-2), "control: without costs"


@pytest.mark.parametrize("kind", ["expensive", "cheap"])
def test_progress_of_a_step_does_not_depend_on_its_cost(kind):
    """The gain in effective steps follows from the variance ratio per visit, not from that at equal cost.

    On a quadratic loss, a step with the best learning rate reduces the loss by |g|⁴ / E|estimate|², here by enumeration
    of all batches. The variance ratio at equal cost would end training too early where visits are cheap.
    """
    noise = lognormal_values(5, 3)[:, None] * torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
    gradients = noise - noise.mean(0) + 0.1  # the mean is small relative to the gradients of single examples
    q = gradients.norm(dim=1)
    cost = q**1.5 if kind == "expensive" else q**-0.5
    cost = cost / cost.mean()
    rate = oracles.rates_of(R.per_cost(q, cost), 0.3)

    def second_moment_and_cost(rates):
        mean, variance, cost_of_batch = oracles.moments_of_batches(gradients, cost.tolist(), rates, 3)
        return variance + mean.square().sum().item(), cost_of_batch / 3

    ours, relative_cost = second_moment_and_cost(rate.tolist())
    uniform, cost_of_uniform = second_moment_and_cost([1.0] * 5)
    assert cost_of_uniform == pytest.approx(1.0)
    assert (relative_cost > 1.05) if kind == "expensive" else (relative_cost < 0.95), "premise"
    signal = gradients.mean(0).square().sum().item() / ours
    ratio = (q.square() / rate).mean().item() / q.square().mean().item()
    assert ratio < 0.95, "premise"
    assert gain(ratio, signal) == pytest.approx(uniform / ours, rel=0.02)
    assert gain(ratio * relative_cost, signal) != pytest.approx(uniform / ours, rel=0.04), "control"


@pytest.mark.parametrize("seed", range(3))
def test_least_variance_ratio_is_that_of_rates_without_floor(seed):
    q, cost = lognormal_values(40, seed), lognormal_values(40, seed + 1)
    memory = memory_of(q, cost=cost)
    rate = oracles.rates_of(R.per_cost(q, cost), 0.0)
    wanted = (q.square() / rate).mean() * (rate * cost).mean() / q.square().mean() / cost.mean()
    assert memory.least_variance_ratio() == pytest.approx(wanted.item(), rel=1e-5)
    assert memory_of(q).least_variance_ratio() != pytest.approx(wanted.item(), rel=1e-2), "control"
    equal_per_root_cost = memory_of(cost.sqrt(), cost=cost)
    assert equal_per_root_cost.least_variance_ratio() == pytest.approx(1.0)


def test_least_variance_ratio_ignores_unknown_importances():
    q, cost = [1.0, math.nan, 3.0, math.nan], [1.0, 5.0, 4.0, 2.0]
    known = memory_of([1.0, 3.0], cost=[1.0, 4.0]).least_variance_ratio()
    assert memory_of(q, cost=cost).least_variance_ratio() == pytest.approx(known)
    assert memory_of([math.nan] * 2, cost=[1.0, 4.0]).least_variance_ratio() == 1.0


def test_expected_costs_match_reference():
    remembered, measured, rate = random_values(30), random_values(30, 1), 0.3 + random_values(30, 2)
    cost = lognormal_values(30)
    remembered[::7], measured[::5] = math.nan, math.inf
    fractions = tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    arguments = remembered, 0.5, measured, rate, cost, fractions
    found = R.expected_costs(*arguments, 1.4)
    lists = [x if isinstance(x, float) else x.tolist() for x in arguments]
    assert found.sum(0).tolist() == pytest.approx(oracles.expected_costs(*lists, 1.4), rel=1e-12)
    wrong = [*arguments[:4], cost.roll(1), fractions]
    assert R.expected_costs(*wrong, 1.4).sum(0).tolist() != pytest.approx(found.sum(0).tolist(), rel=1e-3), "control"


# ---- visits ----------------------------------------------------------------------------------------------------------


def rates_of_visits(visits, n, number=400):
    """The last rate of each example within `number` batches of 4 visits; 0 without a visit."""
    found, drawn = {}, 0
    while drawn < 4 * number:
        index, rate = visits.plan(4)
        found |= dict(zip(index.tolist(), rate.tolist(), strict=True))
        drawn += len(index)
    return [found.get(i, 0.0) for i in range(n)]


@pytest.mark.parametrize("cls", [SegmentedVisits, IndependentVisits])
def test_visits_have_rates_in_proportion_to_importance_per_root_cost(cls):
    q, cost = [1.0, 0.5, 2.0, 4.0, 1.0], [1.0, 1.0, 4.0, 4.0, 9.0]
    memory = memory_of(q, cost=cost)
    visits = segmented_visits(memory) if cls is SegmentedVisits else cls(memory, uniform_fraction=0.3)
    wanted = oracles.rates([x / c**0.5 for x, c in zip(q, cost, strict=True)], 0.3)
    assert rates_of_visits(visits, 5) == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(oracles.rates(q, 0.3), rel=1e-2), "control"


def test_independent_visits_with_costs_follow_updates():
    """The sum of the rates is updated incrementally."""
    q, cost = lognormal_values(12), lognormal_values(12, 1)
    visits = IndependentVisits(memory_of(q, cost=cost), uniform_fraction=0.3)
    visits.plan(1)
    mean = R.per_cost(q, cost / cost.mean()).mean().item()
    for seed in range(3):
        index, measured = tensor([1, 5, 5, seed]), lognormal_values(4, seed + 5).float()
        visits.observe(visits.memory.update(index, measured), measured, torch.ones(4))
    now = R.per_cost(visits.memory.importances, visits.memory.cost)
    wanted = [oracles.unnormalised_rate(x, mean, 0.3) for x in now.tolist()]
    assert visits.rates(slice(None)).tolist() == pytest.approx([12 * r / sum(wanted) for r in wanted], rel=1e-4)


@pytest.mark.parametrize("guard", [True, False])
def test_unvisited_examples_have_equal_rates(guard):
    """The first pass is uniform; then examples that were not measured have the mean q/√c, whatever they cost."""
    cost = lognormal_values(80)
    memory = memory_of([math.nan] * 80, cost=cost)
    visits, q, rates = segmented_visits(memory, guard=guard), lognormal_values(80, 1).float(), {}
    for number in range(10):
        index, rate = visits.plan()
        index = index.long()
        if number < 8:
            assert rate.tolist() == [1.0] * 10
            index = index[index < 40]
            visits.observe(memory.update(index, q[index]), q[index], torch.ones(len(index)))
        else:
            rates |= dict(zip(index.tolist(), rate.tolist(), strict=True))
    unvisited = [r for i, r in rates.items() if i >= 40]
    assert len(unvisited) > 4
    assert unvisited == pytest.approx([unvisited[0]] * len(unvisited), rel=0.02)
    visited = [i for i in rates if i < 40]
    known = R.per_cost(q, memory.cost)[:40]
    wanted = [0.7 * known[i].item() / known.mean().item() + 0.3 for i in visited]
    assert [rates[i] / unvisited[0] for i in visited] == pytest.approx(wanted, rel=0.02)
    assert wanted != pytest.approx([1.0] * len(wanted), rel=0.1), "control"


def test_equally_hard_texts_have_equal_rates():
    """Importances in proportion to the root of the length are equal per root cost."""
    length = (20 * lognormal_values(200)).ceil()
    memory = memory_of(length.sqrt(), cost=length)
    assert rates_of_visits(segmented_visits(memory), 200, 100) == pytest.approx([1.0] * 200, rel=1e-5)
    without_costs = tensor(rates_of_visits(segmented_visits(memory_of(length.sqrt())), 200, 400))
    assert torch.corrcoef(torch.stack([without_costs.log(), length.log().float()]))[0, 1] > 0.95, "control"


def test_segments_with_costs_are_unbiased():
    """Mean Σ weight · 1[visits i] = visits / N in every segment, for every cost; 5,000 examples of each."""
    cost = tensor([0.25, 1.0, 2.25, 0.5]).repeat(5000)
    root = (cost / cost.mean()).sqrt()
    schedule = [[1.1, 1, 1, 1], [2, 1, 1, 0.5], [0.5, 1, 0.3, 3], [3, 0.5, 1, 1], [0.5, 1, 1, 2]]  # before each segment
    memory = memory_of(root, cost=cost)
    visits, wrongly = segmented_visits(memory, uniform_fraction=0.0), 0.0
    for rates in schedule * 3:
        memory.importances[:] = tensor(rates).repeat(5000) * root
        index, rate = visits.plan()
        weight = torch.zeros(20_000).index_add_(0, index, 1 / rate).view(-1, 4).mean(0)
        assert weight.tolist() == pytest.approx([0.125] * 4, abs=0.02)
        wrong = torch.zeros(20_000).index_add_(0, index, 1 / (rate * root[index])).view(-1, 4).mean(0)
        wrongly = max(wrongly, (wrong - 0.125).abs().max().item())
    assert wrongly > 0.06, "control: weights of rates without costs"


def test_moments_include_the_costs():
    sampler = ImportanceBatchSampler(memory_of([1.0, 2.0, 3.0, 4.0], cost=[1, 2, 3, 10]), 2, uniform_fraction=0.3)
    draws = [draw for _ in range(5) for draw in used(sampler)]
    for draw in draws:
        sampler.update(draw, torch.ones(1, len(draw.index)))
    sampler.flush()
    wanted = sum([0.25, 0.5, 0.75, 2.5][i] for draw in draws for i in draw.index)
    assert sampler.moments["cost"] == pytest.approx(wanted)
    assert wanted != pytest.approx(sampler.moments["visits"], rel=1e-2), "control"


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_summed_losses_are_pruned_by_importance_per_token():
    tokens = tensor([1.0, 1.0, 4.0, 9.0, 100.0, 100.0])
    per_token = tensor([1.0, 0.01, 1.0, 0.01, 1.0, 0.01])
    memory = memory_of(per_token * tokens.sqrt(), tokens=tokens)
    assert memory.unimportant(0.1).tolist() == [False, True, False, True, False, True]
    by_sum = memory_of(per_token * tokens.sqrt()).unimportant(0.1)
    assert by_sum.tolist() == [True, True, False, True, False, True], "control: the shortest text is pruned"
    visits = segmented_visits(memory, prune_mass=0.1)
    for _ in range(20):
        visits.plan()
    assert visits.pruned.tolist() == memory.unimportant(0.1).tolist()
