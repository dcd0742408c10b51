"""Buffered measurements: no effect on draws and results, pending transfers, moments, chunks."""

import math
from types import SimpleNamespace

import pytest
import torch
from sampling_helpers import SAMPLING_MODES, UNEQUAL, draws_of, equal_with_nan, sampler_of
from simulated_training import CompletedTransfer, SimulatedTraining
from torch import tensor

from hf_importance.sampling.shard import Shard


@SAMPLING_MODES
@pytest.mark.parametrize(
    ("n", "batch", "delay", "transfers", "steps"),
    [
        (60, 4, 0, False, 200),
        (1000, 7, 3, False, 300),
        (1000, 7, 3, True, 300),
        (2000, 1, 5, True, 600),
        (300, 33, 1, False, 100),
    ],
)
def test_buffering_does_not_change_draws_or_results(sampling, n, batch, delay, transfers, steps):
    """The memory is updated after every batch, or only when needed; equal bit for bit."""
    immediate = SimulatedTraining(sampling, n, batch, delay, transfers).run(steps, flush=True)
    buffered = SimulatedTraining(sampling, n, batch, delay, transfers).run(steps)
    assert immediate.draws == buffered.draws
    wanted, found = immediate.results(), buffered.results()
    for name, value in wanted.items():
        if name == "mean_loss":  # only reported; the rounding of this sum depends on the split into updates
            torch.testing.assert_close(value, found[name], rtol=1e-5, atol=0, equal_nan=True)
        else:
            assert equal_with_nan(value, found[name]), name
    assert (found["moments"] > 0).all()
    immediate.run(1), buffered.run(2)
    for name in ("importance", "moments"):
        assert not equal_with_nan(immediate.results()[name], buffered.results()[name]), "control: one more batch"


def test_buffering_does_not_change_draws_with_gradient_accumulation():
    """Several draws are followed by as many updates."""
    for sampling in ("reshuffled", "replacement"):
        found = []
        for flush in (True, False):
            training = SimulatedTraining(sampling, 200, 5)
            for _ in range(60):
                draws = [next(training.stream) for _ in range(4)]
                training.draws += draws
                for draw in draws:
                    training.measure(draw)
                    if flush:
                        training.sampler.flush()
            found.append(training)
        assert found[0].draws == found[1].draws
        for (name, a), b in zip(found[0].results().items(), found[1].results().values(), strict=True):
            assert name == "mean_loss" or equal_with_nan(a, b), name


def test_control_up_to_64_batches_are_buffered():
    training = SimulatedTraining("reshuffled", 5000, 2)

    def known_importances():
        return int(training.sampler.state_dict()["memory"]["importance"].isfinite().sum())

    training.run(63)
    assert known_importances() == 0
    training.run(1)
    assert known_importances() > 100
    training.run(1)
    assert len(training.sampler.state_dict()["measured"]) == 1
    training.sampler.flush()
    assert not training.sampler.state_dict()["measured"]


def test_pending_transfer_is_not_waited_for():
    """The last measurements from a GPU are remembered one batch later, or with `flush(everything=True)`."""

    class CountedTransfer(CompletedTransfer):
        waits = 0

        def synchronize(self):
            type(self).waits += 1

    sampler = sampler_of([math.nan] * 20, 2)
    draws = draws_of(sampler)[:3]
    for draw in draws:
        sampler.update(draw, torch.ones(1, 2), CountedTransfer())
    sampler.flush()
    assert CountedTransfer.waits == 2
    assert sampler.memory.known == 4
    sampler.flush(everything=True)
    assert CountedTransfer.waits == 3
    assert sampler.memory.known == 6
    sampler.update(draws[0], torch.ones(1, 2))
    sampler.flush()
    assert not sampler.state_dict()["measured"], "without a transfer, the last measurements are remembered at once"


def test_moments_are_sums_over_visits():
    sampler = sampler_of(UNEQUAL, 2, weight_exponent=0.5, shard=Shard(10, 2, torch.arange(6)), visits_per_epoch=1.2)
    assert sampler.shard.weight == 1.2, "premise: the weight of the shard does not enter the moments"
    measured, draws = [[1.0, 2.0], [math.nan, 4.0], [3.0, 0.5]], draws_of(sampler)
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
    with_exponent_one = sampler_of(UNEQUAL, 2)
    for draw, importance in zip(draws_of(with_exponent_one), measured, strict=True):
        with_exponent_one.update(draw, tensor([importance]))
    with_exponent_one.flush()
    moments = with_exponent_one.moments
    assert moments["ours"] != pytest.approx(moments["uniform"], rel=1e-3), "control"


@SAMPLING_MODES
@pytest.mark.parametrize("chunk", [16, 64])
def test_draws_do_not_depend_on_the_chunk_size(monkeypatch, sampling, chunk):
    """Except through the places of strata, of which examples with large rates draw several in one segment."""
    fixed = SimpleNamespace(**vars(torch) | {"rand": lambda size, **_: torch.full((size,), 0.37)})
    monkeypatch.setattr("hf_importance.sampling.strata.torch", fixed)
    whole = SimulatedTraining(sampling, 150, 4).run(300)
    monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", chunk)
    chunks = SimulatedTraining(sampling, 150, 4).run(300)
    assert [draw.index for draw in chunks.draws] == [draw.index for draw in whole.draws]
    for a, b in zip(chunks.draws, whole.draws, strict=True):
        assert a.rate == pytest.approx(b.rate, rel=1e-5)
    assert equal_with_nan(chunks.sampler.memory.importances, whole.sampler.memory.importances)
    assert whole.sampler.visits.passes > 5, "premise"
