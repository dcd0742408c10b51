"""The guard for visits of different cost: floors are compared at equal cost."""

import math

import oracles
import pytest
import torch
from sampling_helpers import lognormal_values

from hf_importance.sampling import rates as R
from hf_importance.sampling.guard import Guard


def relative(cost):
    return cost / cost.mean()


def guard_with_costs(q, cost, measured):
    """A guard after a visit of each example, and the mean importance per root cost."""
    guard, root = Guard(0.2), cost.sqrt()
    mean = (q / root).mean().item()
    guard.observe(q / root, mean, measured, torch.ones(len(q)), math.inf, cost)
    return guard, mean


def guard_without_costs(q, cost, mean):
    guard = Guard(0.2)
    guard.observe(q / cost.sqrt(), mean, q, torch.ones(len(q)), math.inf)
    return guard


def costs_of(guard):
    return guard.state_dict()["costs"]


def moments_times_costs(guard):
    """Second moment times cost of a visit, for each floor."""
    return guard.state_dict()["second_moments"] * costs_of(guard)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0], ids=["length^0", "length^0.5", "length^1"])
def test_floor_minimises_second_moment_times_cost(noise, power):
    """Among floors with a second moment not above that of uniform sampling, for importances ∝ length^power."""
    cost = relative(lognormal_values(500, 1))
    q = lognormal_values(500, scale=0.5) * cost**power
    measured = q * lognormal_values(500, 2, noise)
    floors = [0.2 + 0.1 * k for k in range(9)]
    guard, mean = guard_with_costs(q, cost, measured)
    lists = (q / cost.sqrt()).tolist(), mean, measured.tolist(), [1.0] * 500
    moments = oracles.second_moments(*lists, floors)
    costs = oracles.expected_costs(*lists, cost.tolist(), floors)
    allowed = [k for k in range(9) if moments[k] <= 1.01 * moments[-1]]
    least = min(moments[k] * costs[k] for k in allowed)
    wanted = next(floors[k] for k in allowed if moments[k] * costs[k] <= 1.01 * least)
    saves_enough = least <= 0.9 * moments[-1] * costs[-1]
    assert guard.next_floor() == pytest.approx(wanted if saves_enough else 1.0)


@pytest.mark.parametrize(("spread", "floor"), [(0.25, 1.0), (0.5, 0.2)])
def test_sampling_is_uniform_unless_a_tenth_is_saved(spread, floor):
    """Exact importances that differ little per root cost, with savings of 6 and 22 %."""
    cost = relative(lognormal_values(5000, 1, 0.3))
    q = lognormal_values(5000, 2, spread) * cost.sqrt()
    guard, mean = guard_with_costs(q, cost, q)
    spent = moments_times_costs(guard)
    assert (spent[0] < 0.9 * spent[-1]) == (floor < 1)
    assert spent[0] < 0.97 * spent[-1], "premise: sampling saves something"
    assert guard.next_floor() == pytest.approx(floor)
    assert guard_without_costs(q, cost, mean).next_floor() < 1, "control: with equal costs any saving is used"


def test_control_guard_without_costs_chooses_a_higher_floor():
    """If short texts are as important as long ones, rates are higher for the short ones."""
    cost = relative(lognormal_values(2000, 1))
    q = lognormal_values(2000, scale=0.3)
    guard, mean = guard_with_costs(q, cost, q)
    assert guard.next_floor() < guard_without_costs(q, cost, mean).next_floor()


def test_second_moment_is_not_above_that_of_uniform_sampling():
    """Equally important texts of different length: short ones are cheaper, but training would need more steps."""
    cost = relative(lognormal_values(2000, 1))
    q = torch.ones(2000, dtype=torch.float64)
    guard, _ = guard_with_costs(q, cost, q)
    spent = moments_times_costs(guard)
    assert spent[0] < 0.95 * spent[-1], "premise: at equal cost, the lowest floor is better"
    assert guard.next_floor() > 0.5
    rate = oracles.rates(R.per_cost(q, cost).tolist(), guard.next_floor())
    assert sum(1 / r for r in rate) / 2000 <= 1.012


def test_evidence_on_costs_decays_is_restored_and_independent_of_the_split_into_calls():
    cost, q = lognormal_values(60, 1), lognormal_values(60)
    guard, mean = guard_with_costs(q, cost, q)
    parts = Guard(0.2)
    for start in range(0, 60, 7):
        part = slice(start, start + 7)
        u = (q / cost.sqrt())[part]
        parts.observe(u, mean, q[part], torch.ones(len(u)), math.inf, cost[part])
    assert torch.equal(costs_of(parts), costs_of(guard))
    again = Guard(0.2)
    again.load_state_dict(guard.state_dict())
    assert torch.equal(costs_of(again), costs_of(guard))
    before = costs_of(guard)
    guard.next_floor()
    assert torch.equal(costs_of(guard), 0.9 * before)
    assert before.min() > 0, "premise: there is evidence"
