"""The batch sampler: rates and weights of draws, use of the memory, expectation of the loss, randomness."""

import itertools
import math
from collections import Counter

import oracles
import pytest
import scipy.stats
import torch
from sampling_helpers import SAMPLING_MODES, UNEQUAL, draws_of, next_by_reference, sampler_of, used, visit_counts
from torch import tensor

from hf_importance.sampling.draw import Draw
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard

# ---- weights ---------------------------------------------------------------------------------------------------------


@SAMPLING_MODES
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_draws_carry_index_rate_and_weight(sampling, exponent):
    wanted = oracles.rates(UNEQUAL, 0.3)
    draws = draws_of(sampler_of(UNEQUAL, 3, sampling=sampling, weight_exponent=exponent), epochs=5)
    for draw in draws:
        assert draw.rate == pytest.approx([wanted[i] for i in draw.index], rel=1e-6)
        assert draw.weight == pytest.approx([r**-exponent for r in draw.rate], rel=1e-12)
        assert all(isinstance(x, float) for x in (*draw.rate, *draw.weight))
        assert all(isinstance(i, int) for i in draw.index)
    rates = [r for draw in draws for r in draw.rate]
    for other in {0.0, 0.5, 1.0} - {exponent}:
        weights = [w for draw in draws for w in draw.weight]
        assert weights != pytest.approx([r**-other for r in rates], rel=1e-2), "control: other exponent"


@SAMPLING_MODES
def test_weights_are_fixed_when_drawn(sampling):
    sampler = sampler_of(UNEQUAL, 3, sampling=sampling)
    draw = next(iter(sampler))
    before = Draw(draw.number, list(draw.index), list(draw.rate), list(draw.weight))
    sampler.update(draw, tensor([[9.0, 8.0, 7.0]]))
    sampler.flush()
    assert draw == before
    now = oracles.rates(sampler.memory.importances.tolist(), 0.3)
    assert [1 / now[i] for i in draw.index] != pytest.approx(draw.weight), "control: the rates have changed"


# ---- use of the memory -----------------------------------------------------------------------------------------------


def test_replacement_uses_the_current_memory():
    sampler = sampler_of([1.0] * 6, 2, sampling="replacement", visits_per_epoch=2.0)
    draws = iter(sampler)
    first = next(draws)
    assert first.weight == [1.0, 1.0]
    sampler.update(first, tensor([[4.0, 4.0]]))
    rates = [0.7 * q + 0.3 for q in sampler.memory.importances.tolist()]
    second = next(draws)
    assert second.rate == pytest.approx([6 * rates[i] / sum(rates) for i in second.index], rel=1e-6)
    assert second.weight != [1.0, 1.0], "control"


def test_segments_use_all_previous_measurements():
    """Also buffered ones, with which strata begin; what is measured within a segment is used by the next."""
    n, remembered, outdated, wanted = 80, [math.nan] * 80, 0, []
    importance = torch.linspace(0.1, 2.0, n).tolist()
    sampler = ImportanceBatchSampler(
        ImportanceMemory(n, 0.0), 1, uniform_fraction=0.3, visits_per_epoch=4.0, guard=False
    )
    for number, draw in enumerate(sampler):
        (i,), measured = draw.index, importance[draw.index[0]] / (1 + number / 80)
        if number >= n:
            assert (i, draw.rate[0]) == (wanted[0][1], pytest.approx(wanted[0][2], rel=1e-4))
            del wanted[0]
        oracles.remember(remembered, [i], [measured], 0.0)
        sampler.update(draw, tensor([[measured]]))
        while number >= n - 1 and not len(sampler.state_dict()["planned"]["index"]) and not wanted:
            wanted = next_by_reference(sampler.visits, 10, seed=1, now=list(remembered))[0]
            assert len(wanted) > 0, "premise: no segment without visits"
            outdated += sampler.visits.memory.importances.tolist() != pytest.approx(remembered, nan_ok=True)
    assert sampler.memory.importances.tolist() == pytest.approx(remembered)
    assert outdated > 10, "control: measurements were buffered"


# ---- expectation of the loss and number of visits --------------------------------------------------------------------


@SAMPLING_MODES
@pytest.mark.parametrize("ranks", [1, 3])
def test_mean_weighted_loss_is_the_mean_loss(sampling, ranks):
    """Over many epochs with measured importances."""
    losses, weighted, unweighted = torch.linspace(0.1, 4.0, 50).square(), [], []
    for rank in range(ranks):
        shard = Shard.of(50, rank, ranks, seed=1)
        memory = ImportanceMemory(len(shard))
        settings = {"shard": shard, "rank": rank, "sampling": sampling, "uniform_fraction": 0.3}
        sampler = ImportanceBatchSampler(memory, 5, **settings)
        epochs = 60 if sampling == "reshuffled" else 100
        for draw in itertools.chain.from_iterable(used(sampler) for _ in range(epochs)):
            found = losses[draw.index]
            sampler.update(draw, found[None] + 0.1)
            weighted.append((tensor(draw.weight) * found).mean().item())
            unweighted.append(found.mean().item())
    assert sum(weighted) / len(weighted) == pytest.approx(losses.mean().item(), rel=0.03)
    assert sum(unweighted) / len(unweighted) > 1.2 * losses.mean().item(), "control"


@SAMPLING_MODES
def test_visits_are_in_proportion_to_the_rates(sampling):
    counts = visit_counts(draws_of(sampler_of([0.5, 1.0, 2.0, 4.0], 4, sampling=sampling, visits_per_epoch=200.0)), 4)
    assert (counts.diff() > 0).all()
    wanted = tensor(oracles.rates([0.5, 1.0, 2.0, 4.0], 0.3)).double() * 200
    within = 30 if sampling == "reshuffled" else 60
    assert (counts - wanted).abs().max() < within
    equal = sampler_of([1.0] * 4, 4, sampling=sampling, visits_per_epoch=200.0)
    assert (visit_counts(draws_of(equal), 4) - 200).abs().max() < 60, "control: equal importances"


@SAMPLING_MODES
def test_pruned_examples_are_not_drawn(sampling):
    sampler = sampler_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0], 6, sampling=sampling, prune_mass=0.01)
    draws_of(sampler, epochs=3)  # an epoch may end before its pass does
    assert sampler.pruned.nonzero().flatten().tolist() == [0, 3]
    draws = draws_of(sampler, epochs=10)
    assert visit_counts(draws, 6)[[0, 3]].tolist() == [0.0, 0.0]
    assert visit_counts(draws, 6).sum() == 60
    unpruned = sampler_of([0.001, 1.0, 1.0, 0.001, 1.0, 1.0], 6, sampling=sampling)
    assert visit_counts(draws_of(unpruned, epochs=13), 6)[[0, 3]].min() > 0, "control"
    assert not unpruned.pruned.any()


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_first_draw_is_uniform():
    """Chi-square test with 4 equally important examples and 4,000 seeds; one series in 10,000 would fail."""
    first = Counter(next(iter(sampler_of([1.0] * 4, 1, seed=seed))).index[0] for seed in range(4000))
    assert scipy.stats.chisquare([first[i] for i in range(4)]).pvalue > 1e-4


@SAMPLING_MODES
@pytest.mark.parametrize("importance", [UNEQUAL, [1.0] * 6], ids=["unequal", "equal"])
def test_draws_depend_on_the_seed_and_not_on_the_global_generator(sampling, importance):
    def draws(seed):
        return draws_of(sampler_of(importance, 2, sampling=sampling, seed=seed), epochs=3)

    before = torch.get_rng_state()
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before)
