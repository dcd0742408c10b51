"""Importances of another training: rates until an example is measured, scale, pruning, guard, unbiasedness."""

import math

import oracles
import pytest
import torch
from adaptive import AdaptiveTraining, FollowsMemory, LivedInStrata, relative_to_time
from sampling_helpers import (
    memory_of,
    next_by_reference,
    next_segment,
    next_segments,
    permutation,
    random_importance,
    sampler_of,
    segmented_visits,
    visit_counts,
    visited_examples,
)
from torch import tensor

from hf_importance.sampling.draw import SKIPPED
from hf_importance.sampling.shard import Shard

UNKNOWN = [math.nan] * 40
WITHIN = tensor([0.005, 0.03, 0.03, 0.03, 0.03])
"""As in `test_unbiased`."""


def visits_with(prior, importance=UNKNOWN, batch=5, **settings):
    visits = segmented_visits(memory_of(importance, cost=settings.pop("cost", None)), batch, **settings)
    visits.prior = tensor(prior)
    return visits


# ---- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [False, True])
def test_visits_match_reference(costs):
    """Examples become known one after the other, at another scale; some are unknown in the prior."""
    prior = [math.nan if i % 13 == 5 else q for i, q in enumerate(random_importance(40, 1))]
    cost = [1.0 + i % 4 for i in range(40)] if costs else None
    visits = visits_with(prior, seed=7, cost=cost)
    measured, rates = random_importance(40, 2), set()
    for k in range(24):
        wanted, _ = next_by_reference(visits, 5, seed=7)
        index, rate = next_segment(visits)
        assert index == [i for _, i, _ in wanted]
        assert rate == pytest.approx([r for *_, r in wanted], rel=1e-4)
        if k < 16:
            visits.memory.importances[index] = 0.01 * tensor(measured)[index]
        rates |= set(rate)
    assert max(rates) > 2 * min(rates), "premise"


def test_first_visits_follow_the_prior_and_the_scale_has_no_effect():
    prior = random_importance(40, 1)
    index, rate = next_segment(visits_with(prior))
    wanted = oracles.rates(prior, 0.3)
    assert rate == pytest.approx([wanted[i] for i in index], rel=1e-4)
    scaled = next_segment(visits_with([1000 * q for q in prior]))
    assert scaled[0] == index
    assert scaled[1] == pytest.approx(rate, rel=1e-4)
    assert set(next_segment(visits_with([math.nan] * 40))[1]) == {1.0}, "control: nothing is known"


def test_unknown_importances_are_those_of_the_prior_in_proportion_to_what_is_known():
    """The first ten have a tenth of their prior; so the others are assumed to have."""
    prior = [1.0, 2.0] * 20
    visits = visits_with(prior, [0.1, 0.2] * 5 + UNKNOWN[10:])
    _, rate = next_segment(visits)
    assert visits.state_dict()["scale"] == pytest.approx(0.1)
    assert {round(r, 3) for r in rate} == {round(0.3 + 0.7 * q / 1.5, 3) for q in (1.0, 2.0)}
    other = visits_with(prior, [0.1, 0.1] * 5 + UNKNOWN[10:])
    assert len({round(r, 3) for r in next_segment(other)[1]}) == 3, "control: what is known has other proportions"


def test_equal_importances_are_the_permutation_of_trainer():
    """Equal in the prior, at any scale, and when they are measured."""
    for prior in ([0.2] * 40, [0.2] * 20 + [math.nan] * 20):
        visits = visits_with(prior, seed=3)
        assert visited_examples(visits, 8) == permutation(40, 3)
        visits.memory.importances[:] = 0.7
        segments = next_segments(visits, 8)
        assert [i for index, _ in segments for i in index] == permutation(40, 4)
        assert {r for _, rate in segments for r in rate} == {1.0}
    assert visited_examples(visits_with([0.2] * 39 + [0.3], seed=3), 8) != permutation(40, 3), "control"


@pytest.mark.parametrize("prior", [[0.0] * 40, [0.0] * 39 + [1.0]])
def test_importances_of_zero(prior):
    """Rates stay positive, by the floor; if all are 0, all are equal."""
    rates = [r for _, rate in next_segments(visits_with(prior), 16) for r in rate]
    assert min(rates) > 0.02
    assert (set(rates) == {1.0}) == (not any(prior))


# ---- pruning, guard, ranks, checkpoints ------------------------------------------------------------------------------


def test_examples_are_not_pruned_by_the_prior():
    """They are pruned once their stratum began with what was measured in this training."""
    importance = tensor([1e-3] * 20 + [1.0] * 20)
    visits, pruned = visits_with(importance.tolist(), prune_mass=0.1, uniform_fraction=0.5), []
    for _ in range(80):
        index, _ = next_segment(visits)
        began = visits.state_dict()["strata"]["importance"]
        pruned.append(0 if visits.pruned is None else int(visits.pruned.sum()))
        assert visits.pruned is None or began[visits.pruned].isfinite().all()
        visits.memory.importances[index] = importance[index]
    assert pruned[8] == 0, "in the second pass"
    assert pruned[-1] == 20


@pytest.mark.parametrize("is_right", [True, False])
def test_the_guard_judges_the_prior(is_right):
    """By the visits of the first segment, in which sampling is uniform."""
    n = 2000
    importance = torch.exp(torch.randn(n, generator=torch.Generator().manual_seed(0)))
    prior = 7 * importance if is_right else importance[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    sampler = sampler_of([math.nan] * n, 50)
    sampler.inherit(prior)
    floors, first = [], []
    for draw in sampler:
        first += [draw] if len(first) < 5 else []
        index = tensor(draw.index)
        sampler.update(draw, importance[index][None])
        floors.append(sampler.visits.floor)
    assert floors[0] == 1.0
    assert {rate for draw in first for rate in draw.rate} == {1.0}
    assert (floors[6] == 0.3) == is_right
    assert (floors[-1] > 0.6) == (not is_right)


def test_ranks_inherit_their_examples():
    prior = torch.arange(41.0)
    for rank in range(2):
        shard = Shard.of(41, rank, 2, seed=0)
        sampler = sampler_of([math.nan] * len(shard), 4, shard=shard, rank=rank)
        assert not sampler.has_prior
        sampler.inherit(prior)
        assert sampler.has_prior
        assert torch.equal(sampler.visits.prior, prior[shard.index])


@pytest.mark.parametrize(("spread", "is_used"), [(0.1, False), (0.4, True)])
def test_nearly_equal_importances_are_not_used(spread, is_used):
    """The first pass is the permutation of `Trainer` if 1/(1 + spread²) is above .95."""
    sampler = sampler_of([math.nan] * 40, 5, seed=3)
    sampler.inherit(tensor([1 - spread, 1 + spread] * 20))
    assert sampler.has_prior == is_used
    assert ([i for draw in sampler for i in draw.index] == permutation(40, 3)) == (not is_used)


def test_resumed_sampler_has_the_prior():
    """Also if the new sampler has another one, or none."""
    sampler, importance = sampler_of([math.nan] * 40, 5), tensor(random_importance(40, 1))
    sampler.inherit(importance)
    iterator = iter(sampler)
    for _ in range(3):
        draw = next(iterator)
        sampler.update(draw, 0.3 * importance[draw.index][None])
        sampler.mark_used(draw)
    state = sampler.state_dict()
    wanted = [(draw.index, draw.rate) for draw in iterator]
    assert len({rate for _, rates in wanted for rate in rates}) > 10, "premise"
    for prior in (None, torch.ones(40)):
        again = sampler_of([math.nan] * 40, 5)
        again.inherit(prior)
        again.load_state_dict(state)
        again.skip(3)
        assert [(draw.index, draw.rate) for draw in again if draw is not SKIPPED] == wanted
    state["visits"]["prior"] = None
    again.load_state_dict(state)
    again.skip(3)
    assert [(draw.index, draw.rate) for draw in again if draw is not SKIPPED] != wanted, "control"


# ---- unbiasedness ----------------------------------------------------------------------------------------------------

PRIORS = {
    "right": lambda q, noise: 5 * q,
    "noisy": lambda q, noise: q * torch.exp(noise),
    "shuffled": lambda q, noise: q[noise.argsort()],
    "reversed": lambda q, noise: 1 / q,
    "partly unknown": lambda q, noise: q.where(noise > 0, torch.nan),
}


def adaptive_training(prior, factor, **settings):
    training = AdaptiveTraining(factor=factor, noise=0.3, **{"guard": False, **settings})
    noise = torch.randn(training.n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    training.sampler.inherit(PRIORS[prior](training.importance, noise).float())
    return training


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.1])
@pytest.mark.parametrize("prior", PRIORS)
def test_mean_weight_is_one_in_every_pass(prior, factor):
    """Also in the first, by quarter of hardness, while every visit changes the importance."""
    training = adaptive_training(prior, factor)
    found = training.run(3)
    assert ((found - 1).abs() <= WITHIN).all(), found
    rates = tensor([rate for draw in training.draws[:40] for rate in draw.rate])
    assert rates.max() > 2 > 0.7 > rates.min(), "premise: the prior is used"


@pytest.mark.parametrize("prior", PRIORS)
def test_weights_follow_the_time_that_has_passed_while_importances_diverge(prior):
    """They grow without bound where examples are visited; then a segment has fewer visits than planned, up to 10 %."""
    training = adaptive_training(prior, 1.5, kind=LivedInStrata)
    found = relative_to_time(training, sum(training.weights_of_epoch()[0] for _ in range(3)))
    assert ((found - 1).abs() <= WITHIN).all(), found


def test_mean_weight_is_one_with_guard_and_pruning_in_the_first_pass():
    for settings in ({"guard": True}, {"prune_mass": 0.1}):
        found = adaptive_training("noisy", 0.7, **settings).run(1)
        assert ((found - 1).abs() <= WITHIN).all(), found


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_control_rates_that_follow_the_first_visit_within_its_stratum_are_biased(factor):
    found = adaptive_training("noisy", factor, kind=FollowsMemory).run(4)
    assert ((found - 1).abs() > WITHIN).any()


def test_every_example_is_visited_once_in_each_stratum():
    """With a constant rate, the weights of an example follow the time that has passed to within two strata."""
    prior = tensor(random_importance(400, 1)) + 0.05
    sampler = sampler_of([math.nan] * 400, 10, guard=False)
    sampler.inherit(prior)
    weight, draws = torch.zeros(400, dtype=torch.float64), []
    for _ in range(5):
        for draw in sampler:
            weight.index_add_(0, tensor(draw.index), tensor(draw.weight, dtype=torch.float64))
            sampler.update(draw, 3 * prior[draw.index][None])
            sampler.mark_used(draw)
            draws.append(draw)
    assert weight.mean().item() == pytest.approx(5, abs=0.1)
    rate = tensor(oracles.rates(prior.tolist(), 0.3))
    assert ((weight - 5).abs() < 2 / rate + 0.2).all()
    assert (visit_counts(draws, 400) - 5).abs().max() > 4, "premise: visits differ"
