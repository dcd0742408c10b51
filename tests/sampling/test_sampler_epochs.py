"""Epochs of the batch sampler: number of batches, their sizes and numbers, continuation, end."""

import copy
import itertools
import math

import pytest
from sampling_helpers import SAMPLING_MODES, UNEQUAL, draws_of, sampler_of, used, visit_counts

from hf_importance.sampling.draw import SKIPPED


@SAMPLING_MODES
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("visits", [0.01, 0.5, 1.0, 1.37, 3.0])
@pytest.mark.parametrize(("length", "batch"), [(1, 1), (7, 3), (12, 4), (5, 8), (30, 1)])
def test_length_is_the_number_of_batches(sampling, drop_last, visits, length, batch):
    importance = [float(i % 5) for i in range(length)]
    settings = {"sampling": sampling, "visits_per_epoch": visits, "drop_last": drop_last, "prune_mass": 0.1}
    sampler = sampler_of(importance, batch, **settings)
    for _ in range(3):
        draws = draws_of(sampler)
        assert len(draws) == len(sampler)
        sizes = [len(draw.index) for draw in draws]
        assert sizes == [len(draw.weight) for draw in draws] == [len(draw.rate) for draw in draws]
        assert all(size == batch for size in sizes[:-1])
        number = max(1, round(visits * length))
        assert sum(sizes) == (number // batch * batch if drop_last else number)


@SAMPLING_MODES
def test_pass_continues_in_the_next_epoch(sampling):
    """With 0.4 of 50 examples per epoch, all are visited twice in 5 epochs."""
    sampler = sampler_of([math.nan] * 50, 8, sampling=sampling, visits_per_epoch=0.4)
    counts = visit_counts(draws_of(sampler, epochs=5), 50)
    assert counts.sum() == 100
    assert (counts == 2).all() == (sampling == "reshuffled")


def test_draws_are_numbered_over_all_epochs():
    assert [draw.number for draw in draws_of(sampler_of(UNEQUAL, 2), epochs=3)] == list(range(9))


# ---- epochs that end before all draws are used -----------------------------------------------------------------------


def visits_used(sampler, lengths, ahead):
    """Visits that are used in epochs of these numbers of batches, with draws made ahead; examples and rates."""
    visits = []
    for length in lengths:
        for number, draw in enumerate(sampler, 1):
            if number <= length:
                sampler.mark_used(draw)
                visits += zip(draw.index, draw.rate, strict=True)
            if number == length + ahead:
                break
    return visits


LENGTHS = [9, 3, 5, 1, 9, 2, 4]
"""Batches used in each epoch, of 9, the last of which has 3 visits."""


def sampler_of_epochs(sampling, **settings):
    importance = [0.5 + (7 * i) % 35 / 10 for i in range(35)]
    return sampler_of(importance, 4, sampling=sampling, seed=3, **settings)


def lose_unused_draws(sampler):
    """As a mutant: unused draws are forgotten at the end of an epoch."""
    sampler._hand_back = sampler._outstanding.clear
    return sampler


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_visits_that_are_used_do_not_depend_on_what_is_drawn_ahead(ahead):
    draws = draws_of(sampler_of_epochs("reshuffled"), epochs=9)
    wanted = [visit for draw in draws for visit in zip(draw.index, draw.rate, strict=True)]
    found = visits_used(sampler_of_epochs("reshuffled"), LENGTHS, ahead)
    assert found == wanted[: len(found)]
    lost = visits_used(lose_unused_draws(sampler_of_epochs("reshuffled")), LENGTHS, ahead)
    assert (lost == wanted[: len(lost)]) == (ahead == 0), "control"


@SAMPLING_MODES
def test_unused_draws_come_first_in_the_next_epoch(sampling):
    sampler = sampler_of_epochs(sampling)
    first = list(itertools.islice(sampler, 3))
    sampler.mark_used(first[0])
    second = list(itertools.islice(sampler, 3))
    assert [draw.index for draw in second[:2]] == [draw.index for draw in first[1:]]
    assert [draw.weight for draw in second[:2]] == [draw.weight for draw in first[1:]]
    assert second[2].index != first[0].index, "control"
    assert [draw.number for draw in second] == [3, 4, 5]


def test_visits_that_are_handed_back_twice_keep_their_order():
    """Of 5 draws handed back, the next epoch makes 3 and uses 1."""
    sampler = sampler_of_epochs("reshuffled")
    first = list(itertools.islice(sampler, 5))
    second = list(itertools.islice(sampler, 3))
    sampler.mark_used(second[0])
    last = list(itertools.islice(sampler, 4))
    assert [draw.index for draw in last] == [draw.index for draw in first[1:]]


@SAMPLING_MODES
def test_handed_back_visits_are_part_of_the_state(sampling):
    """Also more of them than an epoch begins with."""
    sampler = sampler_of_epochs(sampling)
    visits_used(sampler, [2], ahead=6)
    for draw in itertools.islice(sampler, 2):
        sampler.mark_used(draw)
    state = copy.deepcopy(sampler.state_dict())
    again = sampler_of_epochs(sampling)
    again.load_state_dict(state)
    again.skip(2)
    assert state["returned"] == 4 * 4, "premise"
    rest = [draw for draw in draws_of(again) if draw is not SKIPPED]
    assert rest == list(itertools.islice(continued(sampler), len(rest)))
    without = sampler_of_epochs(sampling)
    without.load_state_dict({**state, "planned": without.state_dict()["planned"]})
    without.skip(2)
    assert [draw for draw in draws_of(without) if draw is not SKIPPED] != rest, "control"


def continued(sampler):
    """The draws of the rest of an epoch of which two batches were used."""
    sampler.skip(2)
    return (draw for draw in used(sampler) if draw is not SKIPPED)
