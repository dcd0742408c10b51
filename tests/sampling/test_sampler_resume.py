"""Resuming the batch sampler: from its state, bit for bit, or from given importances."""

import copy

import oracles
import pytest
import torch
from sampling_helpers import SAMPLING_MODES, draws_of, equal_with_nan
from simulated_training import SimulatedTraining
from torch import tensor

from hf_importance.sampling.draw import SKIPPED
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.record import VisitRecord
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.shard import Shard


def resumed(state, sampling, n, batch, delay, skip, **settings):
    """A new training, from the state of a sampler."""
    again = SimulatedTraining(sampling, n, batch, delay, **settings)
    assert again.sampler.matches(state)
    again.sampler.load_state_dict(copy.deepcopy(state))
    again.sampler.skip(skip)
    return again


def continue_identically(training, again, steps=50):
    """Whether the next draws, and the results after them, are equal bit for bit."""
    used = len(training.draws) - len(training.unmeasured)
    again.run(steps + len(training.unmeasured))
    training.run(steps)
    names = [name for name in training.results() if name != "mean_loss"]
    wanted, found = training.results(), again.results()
    return training.draws[used:] == again.draws and all(equal_with_nan(wanted[name], found[name]) for name in names)


@SAMPLING_MODES
@pytest.mark.parametrize(("delay", "transfers"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize(("n", "batch", "before"), [(90, 4, 7), (90, 4, 100), (700, 6, 50), (2000, 3, 700), (90, 4, 0)])
def test_sampler_state_dict_restores_exactly(sampling, n, batch, before, delay, transfers):
    """Within a segment, with outstanding draws and buffered measurements."""
    training = SimulatedTraining(sampling, n, batch, delay, transfers).run(before)
    state = training.sampler.state_dict()
    if before:
        assert len(state["outstanding"]) == delay, "premise"
        assert state["measured"], "premise"
        assert sampling == "replacement" or len(state["planned"]["index"]) > 0, "premise: within a segment"
    skip = max(0, before - delay) % len(training.sampler)
    again = resumed(state, sampling, n, batch, delay, skip, transfers=transfers)
    assert again.sampler.state_dict()["lags"] == training.sampler.state_dict()["lags"]
    assert continue_identically(training, again)


@SAMPLING_MODES
@pytest.mark.parametrize("replaced", ["measured", "outstanding", "planned", "memory", "visits", "moments"])
def test_control_every_part_of_the_sampler_state_is_needed(sampling, replaced):
    training = SimulatedTraining(sampling, 700, 6, delay=3).run(50)
    state = training.sampler.state_dict()
    initial = SimulatedTraining(sampling, 700, 6, delay=3).sampler.state_dict()
    again = resumed({**state, replaced: initial[replaced]}, sampling, 700, 6, 3, skip=47)
    nothing_planned = (sampling, replaced) == ("replacement", "planned")
    assert continue_identically(training, again, steps=150) == nothing_planned


@SAMPLING_MODES
def test_resumed_epoch_has_all_its_batches(sampling):
    training = SimulatedTraining(sampling, 90, 4, delay=3).run(10)
    again = resumed(training.sampler.state_dict(), sampling, 90, 4, 3, skip=7)
    epoch = draws_of(again.sampler)
    assert len(epoch) == len(again.sampler)
    assert epoch[:7] == [SKIPPED] * 7
    assert epoch[7:10] == training.draws[7:]
    assert [draw.number for draw in epoch[7:]] == list(range(7, len(epoch)))
    assert len(draws_of(again.sampler)) == len(again.sampler), "the next epoch skips nothing"


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
    ids=["same", "batch size", "other examples", "number of examples", "no shard", "sampling"],
)
def test_state_matches_only_the_same_examples_batch_size_and_sampling(other, matches):
    def sampler(batch=2, shard=Shard(8, 2, tensor([0, 1, 2, 4])), sampling="reshuffled"):  # noqa: B008
        return ImportanceBatchSampler(ImportanceMemory(4), batch, shard=shard, sampling=sampling)

    assert sampler(**other).matches(sampler().state_dict()) == matches


@SAMPLING_MODES
def test_restart_begins_a_pass_with_given_importances(sampling):
    """From the importances and the record of all examples, a rank takes those of its shard."""
    importance, record = torch.rand(10, generator=torch.Generator().manual_seed(0)), VisitRecord(10)
    record.update(torch.arange(10), torch.arange(40.0).view(4, 10))
    shard = Shard(10, 2, tensor([1, 2, 5, 7, 9]))
    settings = {"shard": shard, "rank": 1, "sampling": sampling, "uniform_fraction": 0.3, "record": VisitRecord(5)}
    sampler = ImportanceBatchSampler(ImportanceMemory(5), 1, **settings)
    sampler.restart(importance, passes=2, record=record.state_dict())
    sampler.skip(2)
    assert torch.equal(sampler.memory.importances, importance[shard.index])
    assert sampler.record.columns()["loss"].tolist() == [11.0, 12.0, 15.0, 17.0, 19.0]
    epoch = draws_of(sampler)
    assert len(epoch) == len(sampler)
    assert epoch[:2] == [SKIPPED] * 2
    assert sampler.visits.passes == 3
    wanted = oracles.rates(importance[shard.index].tolist(), 0.3)
    for draw in epoch[2:]:
        assert draw.rate == pytest.approx([wanted[shard.index.tolist().index(i)] for i in draw.index], rel=1e-5)
