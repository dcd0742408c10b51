"""Epochs of the batch sampler: number of batches, their sizes and numbers, continuation, end."""

import math

import pytest
from sampling_helpers import SAMPLING_MODES, UNEQUAL, draws_of, sampler_of, visit_counts


@SAMPLING_MODES
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("budget", [0.01, 0.5, 1.0, 1.37, 3.0])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (12, 4), (5, 8), (30, 1)])
def test_length_is_the_number_of_batches(sampling, drop_last, budget, length, batch):
    importance = [float(i % 5) for i in range(length)]
    settings = {"sampling": sampling, "budget": budget, "drop_last": drop_last, "prune_mass": 0.1}
    sampler = sampler_of(importance, batch, **settings)
    for _ in range(3):
        draws = draws_of(sampler)
        assert len(draws) == len(sampler)
        sizes = [len(draw.index) for draw in draws]
        assert sizes == [len(draw.weight) for draw in draws] == [len(draw.rate) for draw in draws]
        assert all(size == batch for size in sizes[:-1])
        visits = max(1, round(budget * length))
        assert sum(sizes) == (visits // batch * batch if drop_last else visits)


@SAMPLING_MODES
def test_pass_continues_in_the_next_epoch(sampling):
    """With 0.4 of 50 examples per epoch, all are visited twice in 5 epochs."""
    sampler = sampler_of([math.nan] * 50, 8, sampling=sampling, budget=0.4)
    counts = visit_counts(draws_of(sampler, epochs=5), 50)
    assert counts.sum() == 100
    assert (counts == 2).all() == (sampling == "reshuffled")


def test_draws_are_numbered_over_all_epochs():
    assert [draw.number for draw in draws_of(sampler_of(UNEQUAL, 2), epochs=3)] == list(range(9))


@SAMPLING_MODES
def test_nothing_is_drawn_after_end(sampling):
    sampler = sampler_of(UNEQUAL, 2, sampling=sampling)
    assert len(draws_of(sampler)) == 3
    sampler.end()
    assert draws_of(sampler) == []
