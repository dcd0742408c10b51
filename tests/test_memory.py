"""What is remembered, and that the rates that follow from it stay right between passes."""

import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.memory import ImportanceMemory
from hf_importance.record import VisitRecord


def remembering(importance, **settings):
    memory = ImportanceMemory(len(importance), **settings)
    memory.update(torch.arange(len(importance)), tensor(importance))
    memory.begin_pass()
    return memory


def test_first_measurement_is_taken_and_later_ones_are_mixed_in():
    memory = ImportanceMemory(4, momentum=0.25)
    memory.update(tensor([2, 0]), tensor([1.0, 3.0]))
    assert memory.importance.tolist() == pytest.approx([3.0, math.nan, 1.0, math.nan], nan_ok=True)
    assert memory.seen == 0.5
    memory.update(tensor([0, 1]), tensor([1.0, 8.0]))
    assert memory.importance.tolist() == pytest.approx([0.25 * 3 + 0.75 * 1, 8.0, 1.0, math.nan], nan_ok=True)
    assert memory.seen == 0.75


def test_visits_of_one_example_in_a_batch_count_as_one():
    memory = ImportanceMemory(3, momentum=0.5)
    memory.update(tensor([1, 1, 1, 2]), tensor([1.0, 2.0, 6.0, 5.0]))
    assert memory.importance[1:].tolist() == [3.0, 5.0]
    memory.update(tensor([1, 2, 1]), tensor([4.0, 1.0, 6.0]))
    assert memory.importance[1:].tolist() == [4.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_unknown(bad):
    memory = remembering([1.0, 2.0, 3.0], momentum=0.5)
    memory.update(tensor([0, 1, 1]), tensor([bad, 1.0, bad]))
    assert memory.importance.tolist() == pytest.approx([math.nan, math.nan, 3.0], nan_ok=True)
    assert memory.seen == pytest.approx(1 / 3)
    memory.begin_pass()
    assert memory.rates().tolist() == [1.0, 1.0, 1.0]
    memory.update(tensor([0]), tensor([7.0]))
    assert memory.importance[0] == 7.0, "the next measurement is taken as a first one"


def test_empty_update():
    memory = ImportanceMemory(2)
    memory.follow_updates = True
    memory.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert memory.importance.isnan().all()


def test_half_precision_is_remembered_in_float32():
    memory = ImportanceMemory(1)
    memory.update(tensor([0]), tensor([0.1], dtype=torch.bfloat16))
    assert memory.importance.dtype == torch.float32
    assert memory.importance.item() == tensor(0.1, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("importance", [[0.5, 2.0, 0.0, 4.0], [math.nan, 1.0, 3.0], [math.nan] * 3, [0.0, 0.0]])
def test_rates_are_those_of_the_oracle(importance):
    memory = remembering(importance, uniform_fraction=0.3, max_rate=1.8)
    expected = oracles.rates(tensor(importance).tolist(), 0.3, 1.8)
    assert memory.rates().dtype == torch.float64
    assert memory.rates().tolist() == pytest.approx(expected, rel=1e-6)
    some = tensor([1, 0, 1])
    assert torch.equal(memory.rates(some), memory.rates()[some])
    assert memory.largest_rate == pytest.approx(max(expected), rel=1e-6)


def test_equal_importances_give_rates_of_exactly_one():
    memory = remembering([0.1] * 7)
    assert memory.rates().tolist() == [1.0] * 7
    memory = remembering([0.1] * 6 + [0.2])
    assert memory.rates()[0] < 1.0, "control"


def test_rates_follow_updates_between_passes():
    """The sum is kept by differences: after many updates it is that of a fresh count, and no rate exceeds the peak."""
    memory = ImportanceMemory(50, momentum=0.3)
    memory.follow_updates = True
    still = ImportanceMemory(50, momentum=0.3)
    for _ in range(200):
        index, importance = torch.randint(50, (8,)), torch.rand(8) ** 4
        memory.update(index, importance)
        still.update(index, importance)
        assert memory.rates().mean().item() == pytest.approx(1.0, rel=1e-9)
        assert memory.rates().max() <= memory.largest_rate
    memory.begin_pass()
    assert memory.rates().max().item() == pytest.approx(memory.largest_rate)
    for _ in range(20):
        index, importance = torch.randint(50, (8,)), 3 * torch.rand(8)
        memory.update(index, importance)
        still.update(index, importance)
    assert abs(memory.rates().mean().item() - 1) < 1e-9
    still.begin_pass()
    still.update(torch.arange(50), torch.full((50,), 9.0))
    assert abs(still.rates().mean().item() - 1) > 0.1, "control: without following it is off between passes"


# ---- at the end of a pass --------------------------------------------------------------------------------------------


def test_increment_is_added_to_what_is_known():
    memory = remembering([0.0, 2.0, math.nan], uniform_fraction=0.0)
    assert memory.rates()[0] == 0.0
    memory.begin_pass(increment=0.5)
    assert memory.importance.tolist() == pytest.approx([0.5, 2.5, math.nan], nan_ok=True)
    assert memory.rates()[0] > 0.0


@pytest.mark.parametrize(
    ("importance", "mass", "pruned"),
    [
        ([1.0, 2.0, 3.0, 14.0], 0.11, [0]),
        ([1.0, 2.0, 3.0, 14.0], 0.16, [0, 1]),
        ([1.0, 2.0, 3.0, 14.0], 0.15, [0]),  # strictly less than the share
        ([1.0, 2.0, 3.0, 14.0], 0.31, [0, 1, 2]),
        ([1.0, 2.0, 6.0, 11.0], 0.46, [0, 1]),  # 6.0 is more than the mean
        ([14.0, 1.0, 3.0, 2.0], 0.16, [1, 3]),
        ([1.0, 1.0, 1.0, 9.0], 0.2, [0, 1]),  # of equal ones the first
        ([1.0, 1.0, 1.0, 1.0], 0.6, []),
        ([0.1, 0.1, 0.1], 0.6, []),
        ([1.0, 2.0, 1.0, 2.0], 0.6, [0, 2]),
        ([0.0, 0.0, 5.0], 0.01, [0, 1]),
        ([0.0, 0.0, 0.0], 0.5, []),
        ([math.nan, 1.0, 9.0, math.nan], 0.2, [1]),
        ([math.nan, math.nan], 0.5, []),
        ([3.0], 0.99, []),
    ],
)
def test_pruning(importance, mass, pruned):
    memory = remembering(importance)
    memory.begin_pass(prune_mass=mass)
    assert memory.pruned.nonzero().flatten().tolist() == pruned
    rates = memory.rates()
    assert (rates[pruned] == 0).all()
    assert rates.sum().item() / (len(rates) - len(pruned)) == pytest.approx(1.0)
    unpruned = remembering(importance)
    unpruned.begin_pass(prune_mass=0.0)
    assert not unpruned.pruned.any()


def test_the_share_is_of_all_that_is_remembered():
    """What was pruned earlier counts: the gradient that is discarded stays below that share."""
    memory = remembering([1.0, 1.0, 2.0, 16.0], momentum=0.0)
    memory.begin_pass(prune_mass=0.15)
    assert memory.pruned.tolist() == [True, True, False, False]
    memory.begin_pass(prune_mass=0.15)
    assert memory.pruned.tolist() == [True, True, False, False], "nothing has changed"
    memory.update(tensor([2]), tensor([0.4]))
    memory.begin_pass(prune_mass=0.15)
    assert memory.pruned.tolist() == [True, True, True, False], "2.4 of 18.4"
    memory.update(tensor([3]), tensor([1.5]))
    memory.begin_pass(prune_mass=0.15)
    assert memory.pruned.tolist() == [False, False, True, False], "those that are now above others are back"


def test_revisits_have_their_share_of_the_visits():
    q = [0.1, 0.2, 3.0, 4.0, 5.0]
    memory = remembering(q, revisit_pruned=0.2)
    memory.begin_pass(prune_mass=0.1)
    assert memory.pruned.tolist() == [True, True, False, False, False]
    rates = memory.rates()
    assert rates.mean().item() == pytest.approx(1.0)
    assert rates[:2].sum().item() / 5 == pytest.approx(0.2)
    assert rates[0] == rates[1] > 0
    assert rates.max() <= memory.largest_rate
    without = remembering(q)
    without.begin_pass(prune_mass=0.1)
    assert without.rates()[:2].tolist() == [0.0, 0.0], "control"
    assert (rates[2:] / rates[2]).tolist() == pytest.approx((without.rates()[2:] / without.rates()[2]).tolist())


# ---- what there still is to prefer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fresh", "floor", "pruned"),
    [
        (2.5, 0.3, [0, 1]),  # nothing is learnt: the mean importance is still 2.5
        (4.0, 0.3, [0, 1]),  # 0.625 of it is left, more than twice 0.3
        (2.5 / 0.45, 0.65, [0]),  # half way: half of the floor's way to 1, and half of the share to prune
        (2.5 / 0.3, 1.0, []),
        (100.0, 1.0, []),
        (math.nan, 0.3, [0, 1]),
        (0.0, 0.3, [0, 1]),
    ],
)
def test_preference_ends_as_the_data_are_learnt(fresh, floor, pruned):
    memory = remembering([0.5, 1.0, 3.0, 5.5], uniform_below=0.3)
    memory.begin_pass(prune_mass=0.2, fresh=fresh)
    assert memory.floor == pytest.approx(floor)
    assert memory.pruned.nonzero().flatten().tolist() == pruned
    memory.begin_pass(prune_mass=0.2, fresh=fresh)
    assert memory.pruned.nonzero().flatten().tolist() == pruned, "the mean is that of all, pruned ones too"
    never = remembering([0.5, 1.0, 3.0, 5.5], uniform_below=0.0)
    never.begin_pass(prune_mass=0.2, fresh=fresh)
    assert (never.floor, never.pruned.sum()) == (0.3, 2), "control"


def test_the_guard_may_only_raise_that_floor():
    for remembered, floor in (([1.0, 2.0, 3.0, 4.0], 0.65), ([4.0, 3.0, 2.0, 1.0], 1.0)):
        memory = remembering(remembered, uniform_below=0.3, guard=True)
        memory.update(torch.arange(4), tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.float64))
        memory.begin_pass(fresh=memory.importance.mean().item() / 0.45)
        assert memory.floor == pytest.approx(floor)


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [True, False])
def test_updates_that_wait_are_as_if_each_were_made_at_once(guard):
    """Whoever asks after each batch, and whoever asks at the end, finds the same: examples come again, also in one."""
    g = torch.Generator().manual_seed(0)
    waiting, asked = (ImportanceMemory(20, momentum=0.3, guard=guard, record=VisitRecord(20)) for _ in range(2))
    for memory in (waiting, asked):
        memory.update(torch.arange(19), torch.rand(19, generator=g.manual_seed(1)))
        memory.begin_pass()
    for _ in range(150):
        index, importance = torch.randint(20, (6,), generator=g), torch.rand(6, generator=g)
        importance[torch.rand(6, generator=g) < 0.1] = math.nan
        inverse_rate, seen = torch.rand(6, generator=g, dtype=torch.float64), torch.rand(4, 6, generator=g)
        for memory in (waiting, asked):
            memory.update(index, importance, inverse_rate, seen)
        assert asked.seen <= 1.0
    assert len(waiting._waiting) == 150 + 1 - 2 * 64 - 1, "control: it waits, after all"
    assert not asked._waiting
    for memory in (waiting, asked):
        memory.begin_pass()
    assert torch.equal(waiting.importance.nan_to_num(-1), asked.importance.nan_to_num(-1))
    assert waiting.seen == asked.seen
    assert waiting.floor == asked.floor
    torch.testing.assert_close(waiting._second_moments, asked._second_moments, rtol=1e-12, atol=0)
    for name, column in waiting.record.columns().items():
        torch.testing.assert_close(column, asked.record.columns()[name], rtol=1e-6, atol=0, equal_nan=True)


def test_large_data_are_gone_through_in_pieces(monkeypatch):
    importance = torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist()
    whole = remembering(importance)
    whole.begin_pass(prune_mass=0.1)
    monkeypatch.setattr("hf_importance.memory.CHUNK", 64)
    pieces = remembering(importance)
    pieces.begin_pass(prune_mass=0.1)
    torch.testing.assert_close(pieces.rates(), whole.rates(), rtol=1e-12, atol=0)
    assert pieces.largest_rate == pytest.approx(whole.largest_rate, rel=1e-12)
    assert not pieces.alike
