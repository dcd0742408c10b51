"""The importance memory: updates, unimportant examples, means, chunks and state."""

import math

import oracles
import pytest
import torch
from sampling_helpers import equal_with_nan
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory, mean_importance, unimportant


def updated_memory(importance, **settings):
    """A memory after one measurement of each example."""
    memory = ImportanceMemory(len(importance), **settings)
    memory.update(torch.arange(len(importance)), tensor(importance))
    return memory


def random_batches(batches, examples, size, seed, nan_share=0.1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        importance = torch.rand(size, generator=g)
        importance[torch.rand(size, generator=g) < nan_share] = math.nan
        yield torch.randint(examples, (size,), generator=g), importance


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_first_measurement_is_stored_and_later_ones_are_averaged():
    memory = ImportanceMemory(4, momentum=0.25)
    update = memory.update(tensor([2, 0]), tensor([1.0, 3.0]))
    assert memory.importances.tolist() == pytest.approx([3.0, math.nan, 1.0, math.nan], nan_ok=True)
    assert memory.known == 2
    assert (update.index.tolist(), update.after.tolist(), update.change.tolist()) == ([0, 2], [3.0, 1.0], [1, 0])
    assert update.before.isnan().all()
    update = memory.update(tensor([0, 1]), tensor([1.0, 8.0]))
    assert memory.importances.tolist() == pytest.approx([0.25 * 3 + 0.75 * 1, 8.0, 1.0, math.nan], nan_ok=True)
    assert update.before.tolist() == pytest.approx([3.0, math.nan], nan_ok=True)
    assert update.after.tolist() == [1.5, 8.0]
    assert memory.known == 3


def test_visits_of_an_example_in_the_same_batch_are_averaged():
    memory = ImportanceMemory(3, momentum=0.5)
    memory.update(tensor([1, 1, 1, 2]), tensor([1.0, 2.0, 6.0, 5.0]))
    assert memory.importances[1:].tolist() == [3.0, 5.0]
    update = memory.update(tensor([1, 2, 1]), tensor([4.0, 1.0, 6.0]))
    assert memory.importances[1:].tolist() == [4.0, 3.0]
    assert update.change.tolist() == [0, 1, 0]
    two_batches = ImportanceMemory(3, momentum=0.5)
    two_batches.update(tensor([1, 1, 1, 2]), tensor([1.0, 2.0, 6.0, 5.0]), tensor([0, 0, 1, 1]))
    assert two_batches.importances[1:].tolist() == [0.5 * 1.5 + 0.5 * 6.0, 5.0], "control: visits in two batches"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_measurement_makes_importance_unknown(value):
    memory = updated_memory([1.0, 2.0, 3.0], momentum=0.5)
    update = memory.update(tensor([0, 1, 1]), tensor([value, 1.0, value]))
    assert memory.importances.tolist() == pytest.approx([math.nan, math.nan, 3.0], nan_ok=True)
    assert update.after.isnan().all()
    assert memory.known == 1
    memory.update(tensor([0]), tensor([7.0]))
    assert memory.importances[0] == 7.0, "the next measurement counts as the first"
    assert memory.known == 2


def test_empty_update_changes_nothing():
    memory = ImportanceMemory(2)
    update = memory.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert memory.importances.isnan().all()
    assert len(update.index) == len(update.before) == len(update.after) == len(update.change) == memory.known == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_importances_are_stored_in_float32(dtype):
    memory = ImportanceMemory(1)
    memory.update(tensor([0]), tensor([0.1], dtype=dtype))
    assert memory.importances.dtype == torch.float32
    assert memory.importances.item() == tensor(0.1, dtype=dtype).float().item()


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.7])
def test_updates_match_reference(momentum):
    memory, wanted = ImportanceMemory(12, momentum), [math.nan] * 12
    for index, importance in random_batches(40, 12, 6, seed=0):
        before = oracles.remember(wanted, index.tolist(), importance.tolist(), momentum)
        update = memory.update(index, importance)
        assert update.before[update.change].tolist() == pytest.approx(before, rel=1e-5, nan_ok=True)
        assert update.index[update.change].tolist() == index.tolist()
        assert memory.importances.tolist() == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        assert equal_with_nan(update.after, memory.importances[update.index])
        assert memory.known == sum(map(math.isfinite, wanted))


@pytest.mark.parametrize(("examples", "size"), [(20, 6), (5, 16), (1, 3), (2000, 50)])
def test_bulk_update_equals_one_update_per_batch(examples, size):
    """Bit for bit, with examples repeated between and within batches."""
    in_bulk, one_by_one = ImportanceMemory(examples, 0.3), ImportanceMemory(examples, 0.3)
    batches = list(random_batches(150, examples, size, seed=examples))
    before = []
    for index, importance in batches:
        update = one_by_one.update(index, importance)
        before.append(update.before[update.change])
    batch = torch.arange(150).repeat_interleave(size)
    index, importance = (torch.cat(part) for part in zip(*batches, strict=True))
    update = in_bulk.update(index, importance, batch)
    assert equal_with_nan(in_bulk.importances, one_by_one.importances)
    assert in_bulk.known == one_by_one.known
    assert equal_with_nan(update.before[update.change], torch.cat(before))
    assert torch.equal(update.index[update.change], index)
    single_batch = ImportanceMemory(examples, 0.3)
    single_batch.update(index, importance)
    assert not equal_with_nan(single_batch.importances, one_by_one.importances), "control"


# ---- unimportant examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "mass", "expected"),
    [
        ([1.0, 2.0, 3.0, 14.0], 0.11, [0]),
        ([1.0, 2.0, 3.0, 14.0], 0.16, [0, 1]),
        ([1.0, 2.0, 3.0, 14.0], 0.15, [0]),  # strictly less than the mass
        ([1.0, 2.0, 3.0, 14.0], 0.31, [0, 1, 2]),
        ([1.0, 2.0, 6.0, 11.0], 0.46, [0, 1]),  # 6.0 is more than the mean
        ([14.0, 1.0, 3.0, 2.0], 0.16, [1, 3]),
        ([1.0, 1.0, 1.0, 9.0], 0.2, [0, 1]),  # ties by position
        ([1.0, 1.0, 1.0, 1.0], 0.6, []),
        ([0.1, 0.1, 0.1], 0.6, []),
        ([1.0, 2.0, 1.0, 2.0], 0.6, [0, 2]),
        ([0.0, 0.0, 5.0], 0.01, [0, 1]),
        ([0.0, 0.0, 0.0], 0.5, []),
        ([math.nan, 1.0, 9.0, math.nan], 0.2, [1]),
        ([math.nan, math.nan], 0.5, []),
        ([3.0], 0.99, []),
        ([1.0, 2.0, 3.0, 14.0], 0.0, []),
    ],
)
def test_unimportant_by_hand(importance, mass, expected):
    memory = updated_memory(importance)
    assert unimportant(memory.importances, mass).dtype == torch.bool
    assert unimportant(memory.importances, mass).nonzero().flatten().tolist() == expected
    assert equal_with_nan(memory.importances, tensor(importance)), "the memory is not modified"


@pytest.mark.parametrize("seed", range(5))
def test_unimportant_examples_are_the_largest_set_below_the_mass(seed):
    memory = updated_memory((torch.rand(200, generator=torch.Generator().manual_seed(seed)) ** 3).tolist())
    for mass in (0.01, 0.1, 0.3):
        found, q = unimportant(memory.importances, mass), memory.importances.double()
        assert q[found].sum() < mass * q.sum()
        assert q[found].max() < q[~found].min(), "the least important examples"
        following = q[~found].min()
        assert q[found].sum() + following >= mass * q.sum() or following >= q.mean(), "no further example fits"
        assert found.any(), "control"


# ---- means, chunks and state -----------------------------------------------------------------------------------------


def test_mean_importance_by_hand():
    memory = updated_memory([1.0, 3.0, math.nan, 8.0])
    pruned = tensor([True, False, False, False])
    assert mean_importance(memory) == 4.0
    assert mean_importance(memory, tensor([2.0, 2.0, 5.0, math.nan])) == 3.0, "of given importances"
    assert mean_importance(memory, pruned=pruned) == 5.5
    assert mean_importance(memory, tensor([2.0, 2.0, 5.0, math.nan]), pruned) == 3.5
    assert math.isnan(mean_importance(ImportanceMemory(3)))
    assert math.isnan(mean_importance(memory, pruned=torch.ones(4, dtype=torch.bool)))
    assert equal_with_nan(memory.importances, tensor([1.0, 3.0, math.nan, 8.0])), "the memory is not modified"


def test_least_variance_ratio_by_hand():
    assert updated_memory([1.0, 3.0]).least_variance_ratio() == 0.8
    assert updated_memory([1.0, math.nan, 3.0, math.nan]).least_variance_ratio() == 0.8
    assert updated_memory([0.0, 0.0, 0.0, 2.0]).least_variance_ratio() == 0.25, "one of four examples has all visits"
    assert updated_memory([0.7] * 5).least_variance_ratio() == pytest.approx(1.0)
    assert updated_memory([0.0, 0.0]).least_variance_ratio() == 1.0
    assert ImportanceMemory(3).least_variance_ratio() == 1.0
    q = torch.rand(100, generator=torch.Generator().manual_seed(0)).double()
    expected = 1 / (1 + q.var(unbiased=False) / q.mean().square())
    assert updated_memory(q.tolist()).least_variance_ratio() == pytest.approx(expected.item(), rel=1e-6)


def test_state_dict_restores_exactly_and_is_a_copy():
    memory = updated_memory([1.0, math.nan, 3.0])
    state = memory.state_dict()
    again = ImportanceMemory(3)
    again.load_state_dict(state)
    assert equal_with_nan(again.importances, memory.importances)
    assert again.known == memory.known == 2
    again.update(tensor([0]), tensor([9.0]))
    memory.update(tensor([1]), tensor([9.0]))
    assert equal_with_nan(state["importance"], tensor([1.0, math.nan, 3.0])), "later updates do not change the state"
    third = ImportanceMemory(3)
    third.load_state_dict(state)
    assert third.known == 2
