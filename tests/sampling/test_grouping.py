"""`group_by_length`: the drawn examples are unchanged, batches have little padding, and resuming is exact."""

from collections import Counter

import pytest
import torch
from sampling_helpers import SAMPLING_MODES, draws_of, used
from torch import tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from hf_importance.sampling.groups import LengthGroups
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.rates import relative_costs
from hf_importance.sampling.sampler import ImportanceBatchSampler
from hf_importance.sampling.segments import SegmentedVisits
from hf_importance.sampling.shard import Shard


def random_lengths(n, seed=0):
    return torch.exp(3 + 0.8 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).ceil().long()


def mega_batches_of(batches, length, batch):
    """Groups whose mega-batches have so many batches."""
    return LengthGroups(length, batch, 1, 4 * batches * batch)


def memory_with_costs(length):
    """Random importances per token; the loss is a sum over tokens."""
    memory = ImportanceMemory(len(length), 0.2, relative_costs(length))
    per_token = torch.rand(len(length), generator=torch.Generator().manual_seed(1))
    memory.load_state_dict({"importance": per_token * length.sqrt()})
    return memory


def grouped_sampler(length, batch, batches=1, shard=None, grouped=True, **settings):
    """A sampler of texts with these lengths; `grouped=False` is the control."""
    shard = Shard(len(length)) if shard is None else shard
    own = length if shard.index is None else length[shard.index]
    groups = LengthGroups(own, batch, batches, shard.length) if grouped else None
    settings = {"uniform_fraction": 0.3, **settings}
    return ImportanceBatchSampler(memory_with_costs(own), batch, shard=shard, groups=groups, **settings)


def batches_of(groups, batch, draw=0):
    """All whole batches of the visits that were added: examples and rates."""
    while len(groups) >= batch:
        index, rate = groups.next_batches(batch, draw)
        yield from zip(index.split(batch), rate.split(batch), strict=True)
        draw += len(index) // batch


def share_of_real_tokens(batches, length):
    """Share of tokens that are not padding, with batches padded to their longest text."""
    real = sum(int(length[index].sum()) for index in batches)
    return real / sum(len(index) * int(length[index].max()) for index in batches)


def transformers_batches(length, batch, batches, epochs):
    """Batches of `Trainer` on all processes."""
    g, found = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        order = get_length_grouped_indices(length.tolist(), batch * batches, generator=g)
        found += [order[start : start + batch] for start in range(0, len(order), batch)]
    return found


# ---- the groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch", "size"), [(96, 3, 24), (2400, 4, 200), (1000, 5, 250)])
def test_batches_are_those_of_transformers_in_another_order(n, batch, size):
    """For a permutation of different lengths that begins with the longest; else transformers exchanges two texts."""
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    length = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    length[permutation[0]] = n
    mega_batch = {"batch_size": batch, "mega_batch_mult": size // batch}
    theirs = get_length_grouped_indices(length.tolist(), **mega_batch, generator=torch.Generator().manual_seed(5))
    groups = mega_batches_of(size // batch, length, batch)
    groups.add(permutation, torch.rand(n))
    ours = torch.cat([index for index, _ in batches_of(groups, batch)]).tolist()
    assert len(groups) == 0
    assert ours[:batch] == theirs[:batch], "the longest batch is the first"
    for start in range(0, n, size):
        of_mega_batch = [
            [tuple(order[i : i + batch]) for i in range(start, start + size, batch)] for order in (ours, theirs)
        ]
        assert set(of_mega_batch[0]) == set(of_mega_batch[1])
        assert of_mega_batch[0] != of_mega_batch[1], "control: the order differs"


def test_order_of_the_batches_is_uniformly_random():
    """Each of the six orders of three batches is as frequent, also if the first batch is smaller."""
    length, wanted = torch.arange(6), 600
    for first in (2, 1):
        orders = Counter()
        for seed in range(wanted):
            groups = LengthGroups(length, 2, 1, 24, seed)
            assert groups.size == 6, "premise"
            groups.add(torch.arange(4 + first), torch.ones(4 + first))
            index = groups.next_batches(first, draw=7)[0]
            parts = [index[:first], *index[first:].split(2)]
            assert all(len(part) == 1 or part[0] == part[1] + 1 for part in parts), "neighbours by length"
            orders[tuple(int(part.max()) for part in parts)] += 1
        if first == 1:  # the smaller batch begins at any whole batch from the longest on
            assert {order[0] for order in orders} == {4, 2, 0}
        counts = tensor([*orders.values()]).double()
        assert len(counts) == 6
        assert ((counts - wanted / 6).abs() < 4 * (wanted / 6) ** 0.5).all(), orders


def test_length_does_not_drift_within_a_mega_batch():
    """Mean length of the first half of the batches of a mega-batch, relative to the second, over seeds."""

    def ratios(in_order):
        for seed in range(60):
            groups = LengthGroups(length, 4, 1, 1600, seed)
            groups.add(torch.arange(200), torch.ones(200))
            index = groups.next_batches(4, draw=1)[0]
            first, second = (length[half].mean() for half in in_order(index).chunk(2))
            yield (first / second).log().item()

    length = random_lengths(200).double()
    found = tensor([*ratios(lambda index: index)])
    assert found.mean().abs() < 4 * found.std() / 60**0.5
    assert min(ratios(lambda index: index[length[index].argsort(descending=True)])) > 1, "control: sorted"


def test_random_numbers_depend_on_seed_and_draw_alone():
    """Whatever was drawn before, and however many visits wait."""
    length = torch.arange(40)

    def order(seed, draw, before=0):
        groups = LengthGroups(length, 2, 1, 160, seed)
        for _ in range(before):
            groups.add(torch.arange(20), torch.ones(20))
            groups.next_batches(2, draw=5)
        groups.add(torch.arange(40), torch.ones(40))
        return groups.next_batches(2, draw)[0].tolist()

    assert order(1, 9) == order(1, 9, before=3)
    assert len({tuple(order(*case)) for case in [(1, 9), (2, 9), (1, 10), (-1, 9)]}) == 4, "control"


def test_mega_batch_size_counts_accumulated_batches():
    assert LengthGroups(random_lengths(10), 4, 3, 10**6).size == 50 * 12
    assert LengthGroups(random_lengths(10), 4, 3, 1000).size == 20 * 12
    assert LengthGroups(random_lengths(10), 4, 3, 10).size == 12


def test_rates_stay_with_their_visits():
    length = random_lengths(100)
    groups = LengthGroups(length, 4, 1, 100)
    index = torch.arange(100).roll(31)
    groups.add(index, index.float())
    batches = list(batches_of(groups, 4))
    assert len(batches) == 25
    for index, rate in batches:
        assert rate.tolist() == index.tolist()


def test_leftover_visits_are_taken_first_in_the_next_segment():
    """Also the shortest ones, which come last within a group."""
    length = torch.arange(1, 61)
    groups = LengthGroups(length, 4, 1, 16)
    for part in range(10):
        index = torch.arange(6 * part, 6 * part + 6)
        leftover = groups.state_dict()["index"].tolist()
        groups.add(index, torch.ones(6))
        found = [i for index, _ in batches_of(groups, 4, draw=part) for i in index.tolist()]
        assert set(leftover) <= set(found)
        assert len(groups) < 4


@pytest.mark.parametrize("seed", range(3))
def test_segments_without_visits_are_grouped(seed):
    """With a batch of 1, a segment is planned for 2 visits, and often has none."""
    length = torch.arange(1, 9)
    sampler = grouped_sampler(length, 1, seed=seed, guard=False)
    draws = draws_of(sampler, 20)
    assert [len(draw.index) for draw in draws] == [1] * 160
    visits = SegmentedVisits(memory_with_costs(length), 2, seed=seed, guard=False)
    assert any(len(visits.plan()[0]) == 0 for _ in range(80)), "premise"


# ---- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(100, 4), (403, 5), (30, 8), (5, 8)])
def test_grouping_changes_only_the_order(n, batch):
    """Examples, rates and weights are the planned ones."""
    length = random_lengths(n)
    sampler = grouped_sampler(length, batch, guard=False, weight_exponent=0.5)
    draws = draws_of(sampler, 6)
    found = Counter((i, r) for draw in draws for i, r in zip(draw.index, draw.rate, strict=True))
    assert all(draw.weight == pytest.approx([r**-0.5 for r in draw.rate]) for draw in draws)
    visits = SegmentedVisits(memory_with_costs(length), LengthGroups(length, batch, 1, n).size, guard=False)
    planned, order = Counter(), []
    while sum(planned.values()) < sum(found.values()):
        index, rate = visits.plan()
        planned.update(zip(index.tolist(), rate.double().tolist(), strict=True))
        order += index.tolist()
    state = sampler.state_dict()
    assert found - planned == Counter()
    assert (planned - found).total() == len(state["groups"]["index"]) + len(state["planned"]["index"])
    if n > 8:
        assert order[:n] != [i for draw in draws for i in draw.index][:n], "control: the order differs"


@SAMPLING_MODES
def test_grouped_epoch_has_all_its_batches(sampling):
    sampler = grouped_sampler(random_lengths(103), 8, sampling=sampling)
    for _ in range(4):
        draws = list(sampler)
        assert [len(draw.index) for draw in draws] == [8] * 12 + [7]
        assert len(draws) == len(sampler)


def test_visits_that_are_handed_back_are_not_grouped_again():
    """They come first, also if they do not fill a batch; the rest of that batch is of the next mega-batch."""
    length = random_lengths(22)
    for resumed in (False, True):
        sampler = grouped_sampler(length, 4)
        *before, last = list(sampler)
        for draw in before:
            sampler.mark_used(draw)
        assert len(last.index) == 2, "premise"
        stream = iter(sampler)
        first = next(stream)
        assert first.index[:2] == last.index
        assert length[first.index[1]] < length[first.index[2]], "control: they would not be first if they were sorted"
        state = sampler.state_dict()
        if resumed:
            again = grouped_sampler(length, 4)
            again.load_state_dict(state)
            again.skip(0)
            sampler = again
        assert next(iter(sampler)).index == first.index


def test_grouping_keeps_visits_even():
    """With equal rates, every example is visited once per pass, except those waiting for a full batch."""
    n = 203
    memory, length = ImportanceMemory(n), random_lengths(n)
    sampler = ImportanceBatchSampler(memory, 8, groups=LengthGroups(length, 8, 1, n))
    counts = torch.zeros(n, dtype=torch.int64)
    for epochs in range(1, 9):
        counts += torch.bincount(tensor([i for draw in used(sampler) for i in draw.index]), minlength=n)
        assert counts.min() >= epochs - 1
        assert counts.max() <= epochs + 1
        assert (counts != epochs).sum() < 16


@pytest.mark.parametrize(
    ("n", "batch", "batches"), [(203, 8, 1), (203, 8, 2), (1603, 4, 1), (4003, 8, 1), (5005, 4, 3), (40, 8, 1)]
)
def test_padding_is_not_above_that_of_trainer(n, batch, batches):
    length = random_lengths(n)
    grouped, ungrouped = grouped_sampler(length, batch, batches), grouped_sampler(length, batch, grouped=False)
    ours = share_of_real_tokens([draw.index for draw in draws_of(grouped, 4)], length)
    theirs = share_of_real_tokens(transformers_batches(length, batch, batches, 4), length)
    control = share_of_real_tokens([draw.index for draw in draws_of(ungrouped, 4)], length)
    assert ours > theirs - 0.01
    assert control < theirs - 0.05 or n == 40, "control: without groups"


@pytest.mark.parametrize(("n", "ranks"), [(4003, 2), (2003, 4)])
def test_padding_on_several_ranks_is_not_above_that_of_trainer(n, ranks):
    """Each process groups its own shard, with as little padding as `Trainer` when it groups all examples."""
    length, found = random_lengths(n), []
    for rank in range(ranks):
        shard = Shard.of(n, rank, ranks, seed=0)
        draws = draws_of(grouped_sampler(length, 8, shard=shard, rank=rank), 4)
        assert set(draws[0].index) <= set(shard.index.tolist())
        found += [draw.index for draw in draws]
    theirs = share_of_real_tokens(transformers_batches(length, 8, 1, 4), length)
    assert share_of_real_tokens(found, length) > theirs - 0.015


@pytest.mark.parametrize("visits_per_epoch", [1.0, 0.37])
def test_smaller_last_batch_of_an_epoch_leaves_no_batch_of_mixed_lengths(visits_per_epoch, monkeypatch):
    """What is left of the mega-batch is sorted again; the rest of a batch would move all those after it."""
    length = random_lengths(1603)

    def share():
        sampler = grouped_sampler(length, 8, visits_per_epoch=visits_per_epoch)
        return share_of_real_tokens([draw.index for draw in draws_of(sampler, 12)], length)

    found = share()
    monkeypatch.setattr(ImportanceBatchSampler, "_hand_back", lambda sampler: None)
    assert found > share() + 0.02, "control: what is left is not sorted again"
    assert found > share_of_real_tokens(transformers_batches(length, 8, 1, 4), length) - 0.02


@pytest.mark.parametrize("ranks", [1, 3])
def test_training_begins_with_the_longest_example(ranks):
    """That of each process, wherever the permutation has it, and only once."""
    length, later = random_lengths(400), 0
    for seed in range(4):
        for rank in range(ranks):
            shard = Shard.of(400, rank, ranks, seed)
            longest = int(length[shard.part(torch.arange(400))].max())
            sampler = grouped_sampler(length, 4, shard=shard, rank=rank, seed=seed)
            sampler.restart(torch.full([400], torch.nan))
            draws = [draw for draw in draws_of(sampler, 2) if len(draw.index) == 4]
            assert length[draws[0].index].max() == longest
            assert length[draws[0].index].min() >= length[draws[1].index].max()
            later += length[draws[len(draws) // 2].index].max() == longest
    assert later < 4 * ranks, "control: epochs do not begin with it"


def test_processes_draw_texts_of_similar_length_in_the_same_step():
    """Else each step would wait for the longest of them. Also where rates, and with them mega-batches, differ."""
    length, ranks = random_lengths(4000), 4

    def longest(rank, seed):
        shard = Shard.of(4000, rank, ranks, seed=0)
        own = length[shard.index]
        groups = LengthGroups(own, 8, 1, 4000, seed)
        settings = {"shard": shard, "rank": rank, "groups": groups, "guard": False, "uniform_fraction": 0.3}
        sampler = ImportanceBatchSampler(memory_with_costs(own), 8, **settings)
        return tensor([int(length[draw.index].max()) for draw in draws_of(sampler, 3)])

    def waiting(seeds):
        """Longest of all processes, relative to the mean."""
        tokens = torch.stack([longest(rank, seed) for rank, seed in enumerate(seeds)]).double()
        return (tokens.max(0).values.sum() / tokens.mean(0).sum()).item()

    assert waiting([0] * ranks) < 1.4
    assert waiting(range(ranks)) > 1.8, "control: random numbers of their own"


@pytest.mark.parametrize(("n", "segments"), [(400, 4), (4800, 8), (1200, 6)])
def test_grouped_visits_are_planned_one_segment_at_a_time(n, segments):
    """A segment is at least as long as a mega-batch."""
    visits, planned = grouped_sampler(random_lengths(n), 4).visits, 0
    while planned == 0 or not visits.begins_pass:
        visits.plan()
        planned += 1
    assert planned == segments
    sampler = grouped_sampler(random_lengths(n), 4)
    planned, last = 0, None
    for _ in range(3):
        for draw in used(sampler):
            state = sampler.visits.state_dict()
            sampler.update(draw, torch.rand(1, len(draw.index)))
            planned += (state["segment"], state["passes"]) != last
            last = state["segment"], state["passes"]
    assert abs(planned - 3 * segments) <= 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def draw_and_update(sampler, stream, steps):
    """Draws of the next steps, each with measurements that depend on its number only."""
    found = []
    for _ in range(steps):
        draw = next(stream)
        g = torch.Generator().manual_seed(draw.number)
        sampler.mark_used(draw)
        sampler.update(draw, torch.rand(1, len(draw.index), generator=g))
        found.append(draw)
    return found


def endless_draws(sampler):
    while True:
        yield from used(sampler)


@SAMPLING_MODES
@pytest.mark.parametrize("before", [0, 1, 13, 40])
def test_grouped_sampler_state_dict_restores_exactly(sampling, before):
    length = random_lengths(203)
    sampler = grouped_sampler(length, 8, sampling=sampling)
    stream = endless_draws(sampler)
    draw_and_update(sampler, stream, before)
    state = sampler.state_dict()
    wanted = draw_and_update(sampler, stream, 60)
    for empty_groups in (False, True):
        again = grouped_sampler(length, 8, sampling=sampling)
        empty = {name: again.state_dict()[name] for name in ("groups", "planned")} if empty_groups else {}
        assert again.matches(state)
        skip = before % len(again)
        again.load_state_dict(state | empty)
        again.skip(skip)
        stream = endless_draws(again)
        for _ in range(skip):
            next(stream)
        identical = draw_and_update(again, stream, 60) == wanted
        assert identical == (not empty_groups or not before), "control: without the groups, draws differ"


def test_state_of_an_ungrouped_sampler_does_not_match():
    state = grouped_sampler(random_lengths(50), 4).state_dict()
    assert not grouped_sampler(random_lengths(50), 4, grouped=False).matches(state)
    assert grouped_sampler(random_lengths(50), 4).matches(state), "control"
