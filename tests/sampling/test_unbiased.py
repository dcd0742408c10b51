"""Adaptive unbiasedness through the sampler: weights have mean 1 in every pass, though visits change the importances.

Figures of one run are means over 40,000 examples: their standard error is .001 for a visit and .007 for a quarter.
"""

import copy
from dataclasses import astuple

import pytest
import torch
from adaptive import (
    AdaptiveTraining,
    Credits,
    FollowsMemory,
    Lived,
    LivedInStrata,
    PrunesByMemory,
    WithoutScaling,
    relative_to_time,
)

from hf_importance.sampling.draw import SKIPPED
from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.rates import relative_costs
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.segments import SegmentedVisits
from hf_importance.sampling.shard import Shard
from hf_importance.sampling.suspects import SuspectWeights

WITHIN = torch.tensor([0.005, 0.03, 0.03, 0.03, 0.03])
"""Bounds of the mean weight of a visit, and of an example by quarter of hardness. At most .02 and .03 are asked for."""
FACTORS = pytest.mark.parametrize(("factor", "noise"), [(f, s) for f in (0.5, 0.7, 1.5) for s in (0.0, 0.5)])


def assert_unbiased(found):
    """Mean weights `[epochs, 5]` are 1, and do not change over the epochs."""
    assert ((found - 1).abs() <= WITHIN).all(), found
    if found.dim() > 1:
        assert (found.mean(0) - 1).abs().max() < 0.015, found


def is_biased(found):
    return bool(((found - 1).abs() > WITHIN).any())


@pytest.mark.parametrize("guard", [True, False])
@FACTORS
def test_mean_weight_is_one_in_every_pass(factor, noise, guard):
    """In the first pass it is exactly 1."""
    training = AdaptiveTraining(factor=factor, noise=noise, guard=guard)
    found = training.run()
    assert torch.equal(found[0], torch.ones(5, dtype=torch.float64))
    assert_unbiased(found)
    if factor == 0.5 and noise == 0:
        rates = torch.tensor([draw.rate for draw in training.draws[40:]])
        assert rates.max() > 2 > 0.6 > rates.min(), "premise: importances are used"


def test_mean_weight_is_one_while_the_guard_raises_the_floor():
    training = AdaptiveTraining(factor=0.7, noise=2.0, guard=True)
    assert_unbiased(training.run())
    assert training.sampler.visits.floor > 0.5, "premise"


@pytest.mark.parametrize(
    ("kind", "factor", "mean"),
    [(Credits, 0.5, 0.91), (Credits, 0.7, 0.96), (FollowsMemory, 0.5, 0.87), (WithoutScaling, 0.5, 1.016)],
)
def test_control_biased_designs_are_found(kind, factor, mean):
    """The mean weight in the fourth and fifth passes, in which it is 1 with strata."""
    found = AdaptiveTraining(factor=factor, kind=kind, guard=False).run(5)
    assert is_biased(found)
    assert found[3:, 0].mean().item() == pytest.approx(mean, abs=0.012)


@pytest.mark.parametrize("kind", [Credits, FollowsMemory])
def test_control_rising_importances(kind):
    """The bias ends when all that rise are at the floor or are known to be equal."""
    assert is_biased(AdaptiveTraining(factor=1.5, kind=kind, guard=False).run(3))


@pytest.mark.parametrize("kind", [Credits, FollowsMemory])
def test_control_without_feedback_all_designs_are_unbiased(kind):
    """Rates fixed in advance, as in the tests of 0.2; without the passes in which importances become known."""
    assert_unbiased(AdaptiveTraining(factor=1.0, kind=kind, guard=False).run(5)[2:])


# ---- pruning, suspects, costs and groups -----------------------------------------------------------------------------


class LivedPrunedByMemory(Lived, PrunesByMemory):
    """The control."""


def pruned_training(kind, factor):
    """Mean weights of 8 passes, in the time in which examples were not pruned."""
    training = AdaptiveTraining(factor=factor, noise=0.5, kind=kind, guard=False, prune_mass=0.1)
    found = relative_to_time(training, sum(training.weights_of_epoch()[0] for _ in range(8)))
    time = training.sampler.visits.lived
    assert (time < 0.8 * time.max()).float().mean() > 0.1, "premise: many are pruned for a while"
    return found


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5])
def test_weights_of_pruned_examples_follow_the_time_in_which_they_are_drawn(factor):
    assert_unbiased(pruned_training(LivedInStrata, factor))


def test_control_pruning_by_the_memory_ends_strata_after_their_visit():
    """The visit has its weight, but what is left of the stratum does not take place."""
    found = pruned_training(LivedPrunedByMemory, 0.5)
    assert is_biased(found)
    assert found[0].item() == pytest.approx(1.017, abs=0.005)


class SuspectTraining(AdaptiveTraining):
    """Every tenth example has a large loss at its visits but every fifth, and is suspect meanwhile."""

    def measure(self, draw, index, measured):
        wrong = (index % 10 == 0) & (self.visited[index] % 5 > 0)
        loss = torch.where(wrong, 9.0, 0.1)
        label = index // 10 % 4  # so that all classes have some of them
        rows = [measured.float(), label, loss, label, torch.full_like(loss, 0.5)]
        self.sampler.update(draw, torch.stack([row.float() for row in rows]))


@pytest.mark.parametrize(("weight", "prune_mass"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.05)])
def test_weights_of_suspects_divided_by_their_factor_are_unbiased(weight, prune_mass):
    n = 40_000
    suspects = SuspectWeights(n, weight, 0.0, lambda: 1.0)
    settings = {"record": VisitRecord(n), "suspects": suspects}
    training = SuspectTraining(n, 0.7, 0.3, kind=LivedInStrata, settings=settings, prune_mass=prune_mass)
    flagged, unscaled, scaled = [], torch.zeros(n).double(), torch.zeros(n).double()
    for _ in range(6):
        scaled += training.weights_of_epoch()[0]
        flagged.append(suspects.flagged.sum().item())
    for draw in training.draws:
        index, rate, drawn = (torch.tensor(x, dtype=torch.float64) for x in (draw.index, draw.rate, draw.weight))
        factor = drawn * rate
        assert ((factor - 1).abs() < 1e-9).logical_or((factor - weight).abs() < 1e-9).all()
        unscaled.index_add_(0, index.long(), 1 / rate)
    assert max(flagged) > 1000 > flagged[0] == 0, "premise: suspects come and go"
    assert_unbiased(relative_to_time(training, unscaled))
    tenth, time = torch.arange(n) % 10 == 0, training.sampler.visits.lived
    assert (unscaled[tenth].sum() / time[tenth].sum()).item() == pytest.approx(1.0, abs=0.02)
    assert scaled[tenth].sum() < 0.97 * time[tenth].sum(), "control: with their factor"


class DoubtsAtOnce(SegmentedVisits):
    """Doubts take effect within the stratum, so that the rest of it depends on what its visit has measured."""

    def _plan_visits(self, visits):
        if self.memory.doubted is not None:
            self._strata.importance = self.memory.trusted.clone()
        return super()._plan_visits(visits)


def doubted_training(kind, factor):
    """Mean weights of visits, and of examples by quarter, in each epoch; every tenth example is doubted for a while."""
    n = 40_000
    training = SuspectTraining(n, factor, 0.3, kind=kind, settings={"record": VisitRecord(n)})
    training.importance[::10] *= 5
    found, doubts = [], []
    for _ in range(6):
        found.append(training.relative(*training.weights_of_epoch()))
        doubted = training.sampler.memory.doubted
        doubts.append(0 if doubted is None else int(doubted.sum()))
    assert max(doubts) > 2000 > 0 == doubts[0], "premise: doubts come and go"
    return torch.stack(found)


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5])
def test_mean_weight_is_one_while_examples_become_doubted_and_are_cleared(factor):
    assert_unbiased(doubted_training(SegmentedVisits, factor))


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_control_doubts_within_the_stratum_are_biased(factor):
    assert is_biased(doubted_training(DoubtsAtOnce, factor))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_mean_weight_is_one_with_costs_and_length_groups(factor, grouped):
    n = 40_000
    length = torch.exp(3 + 0.8 * torch.randn(n, generator=torch.Generator().manual_seed(5))).ceil()
    groups = LengthGroups(length, 200, 1, n) if grouped else None
    settings = {"settings": {"groups": groups}, "cost": relative_costs(length), "guard": False}
    training = AdaptiveTraining(n, factor, 0.3, 200, **settings)
    training.hardness = (training.importance / training.sampler.memory.cost.sqrt()).argsort().argsort() * 4 // n
    assert_unbiased(training.run(5))
    assert grouped == all(length[draw.index].diff().max() <= 0 for draw in training.draws[5:10]), "premise"


# ---- ranks and checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5])
def test_mean_weight_over_all_ranks_is_one(factor):
    """The shards together, which differ in size."""
    n, weight, visits, without = 40_001, torch.zeros(5, 40_001).double(), torch.zeros(5), torch.zeros(5).double()
    for rank in range(3):
        shard = Shard.of(n, rank, 3, seed=0)
        training = AdaptiveTraining(n, factor, batch=400, settings={"shard": shard, "rank": rank})
        for epoch in range(5):
            found, drawn = training.weights_of_epoch()
            assert torch.isin(found.nonzero().flatten(), shard.index).all(), "premise"
            weight[epoch] += found
            visits[epoch] += drawn
            without[epoch] += found.sum() if rank else 0
    found = torch.stack([training.relative(w, k) for w, k in zip(weight, visits, strict=True)])
    assert_unbiased(found)
    assert (without / visits - 1).abs().min() > 0.3, "control: without a rank"


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_mean_weight_is_one_after_exact_resume(factor):
    """From fresh objects, in the middle of the third pass."""
    training = AdaptiveTraining(factor=factor, noise=0.3)
    training.run(2)
    iterator = iter(training.sampler)
    for _ in range(17):  # drawn, but neither used nor measured
        next(iterator)
    state = copy.deepcopy(training.sampler.state_dict())
    again = AdaptiveTraining(factor=factor, noise=0.3)
    again.sampler.load_state_dict(state)
    again.importance, again.visited = training.importance.clone(), training.visited.clone()
    again.waiting = [copy.deepcopy(waiting) for waiting in training.waiting]
    found = again.run(4)
    assert_unbiased(found)


def test_draws_after_exact_resume_are_those_without_interruption():
    """In the middle of the third pass: 12 draws were used, and 5 more were made."""
    training = AdaptiveTraining(factor=0.5, noise=0.3)
    initial = training.sampler.visits.state_dict()
    training.run(2)
    iterator = iter(training.sampler)
    for number in range(17):
        draw = next(iterator)
        if number < 12:
            training.sampler.mark_used(draw)
    state = copy.deepcopy(training.sampler.state_dict())
    wanted = [*state["outstanding"], *map(astuple, iterator)]

    def resumed(state):
        again = AdaptiveTraining(factor=0.5, noise=0.3)
        again.sampler.load_state_dict(state)
        again.sampler.skip(12)
        return [astuple(draw) for draw in again.sampler if draw is not SKIPPED]

    assert resumed(state) == wanted
    assert resumed({**state, "visits": initial}) != wanted, "control"


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5])
def test_mean_weight_is_one_after_restart(factor):
    """From the importances alone: strata begin again, with the first pass."""
    training = AdaptiveTraining(factor=factor, noise=0.3)
    training.run(3)
    again = AdaptiveTraining(factor=factor, noise=0.3)
    again.sampler.restart(training.sampler.memory.importances.clone(), passes=3)
    again.importance = training.importance.clone()
    found = again.run(4)
    assert_unbiased(found)
    assert set(again.draws[0].rate) != {1.0}, "premise: importances are known"
