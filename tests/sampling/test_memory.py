"""Updates of the memory one by one and in bulk, unimportant examples, and means in chunks."""

import math

import oracles
import pytest
import torch
from torch import tensor

from hf_importance.sampling.memory import ImportanceMemory, mean_importance, unimportant


def remembering(importance, **settings):
    memory = ImportanceMemory(len(importance), **settings)
    memory.update(torch.arange(len(importance)), tensor(importance))
    return memory


def random_visits(batches, examples, size, seed, bad=0.1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        importance = torch.rand(size, generator=g)
        importance[torch.rand(size, generator=g) < bad] = math.nan
        yield torch.randint(examples, (size,), generator=g), importance


def same(a, b):
    """Equal bit for bit, with NaN equal to NaN."""
    return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_first_measurement_is_taken_and_later_ones_are_mixed_in():
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


def test_visits_of_one_example_in_a_batch_count_as_one():
    memory = ImportanceMemory(3, momentum=0.5)
    memory.update(tensor([1, 1, 1, 2]), tensor([1.0, 2.0, 6.0, 5.0]))
    assert memory.importances[1:].tolist() == [3.0, 5.0]
    update = memory.update(tensor([1, 2, 1]), tensor([4.0, 1.0, 6.0]))
    assert memory.importances[1:].tolist() == [4.0, 3.0]
    assert update.change.tolist() == [0, 1, 0]
    in_two = ImportanceMemory(3, momentum=0.5)
    in_two.update(tensor([1, 1, 1, 2]), tensor([1.0, 2.0, 6.0, 5.0]), tensor([0, 0, 1, 1]))
    assert in_two.importances[1:].tolist() == [0.5 * 1.5 + 0.5 * 6.0, 5.0], "control: of two batches they are two"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_unknown(bad):
    memory = remembering([1.0, 2.0, 3.0], momentum=0.5)
    update = memory.update(tensor([0, 1, 1]), tensor([bad, 1.0, bad]))
    assert memory.importances.tolist() == pytest.approx([math.nan, math.nan, 3.0], nan_ok=True)
    assert update.after.isnan().all()
    assert memory.known == 1
    memory.update(tensor([0]), tensor([7.0]))
    assert memory.importances[0] == 7.0, "the next measurement is taken as a first one"
    assert memory.known == 2


def test_empty_update():
    memory = ImportanceMemory(2)
    update = memory.update(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert memory.importances.isnan().all()
    assert len(update.index) == len(update.before) == len(update.after) == len(update.change) == memory.known == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_remembered_in_float32(dtype):
    memory = ImportanceMemory(1)
    memory.update(tensor([0]), tensor([0.1], dtype=dtype))
    assert memory.importances.dtype == torch.float32
    assert memory.importances.item() == tensor(0.1, dtype=dtype).float().item()


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.7])
def test_updates_are_those_of_the_oracle(momentum):
    memory, wanted = ImportanceMemory(12, momentum), [math.nan] * 12
    for index, importance in random_visits(40, 12, 6, seed=0):
        before = oracles.remember(wanted, index.tolist(), importance.tolist(), momentum)
        update = memory.update(index, importance)
        assert update.before[update.change].tolist() == pytest.approx(before, rel=1e-5, nan_ok=True)
        assert update.index[update.change].tolist() == index.tolist()
        assert memory.importances.tolist() == pytest.approx(wanted, rel=1e-5, nan_ok=True)
        assert same(update.after, memory.importances[update.index])
        assert memory.known == sum(map(math.isfinite, wanted))


@pytest.mark.parametrize(("examples", "size"), [(20, 6), (5, 16), (1, 3), (2000, 50)])
def test_many_batches_at_once_are_as_one_after_the_other(examples, size):
    """Bit for bit: importances and updates, with repeated examples, also within a batch."""
    at_once, one_by_one = ImportanceMemory(examples, 0.3), ImportanceMemory(examples, 0.3)
    visits = list(random_visits(150, examples, size, seed=examples))
    before = []
    for index, importance in visits:
        update = one_by_one.update(index, importance)
        before.append(update.before[update.change])
    batch = torch.arange(150).repeat_interleave(size)
    index, importance = (torch.cat(part) for part in zip(*visits, strict=True))
    update = at_once.update(index, importance, batch)
    assert same(at_once.importances, one_by_one.importances)
    assert at_once.known == one_by_one.known
    assert same(update.before[update.change], torch.cat(before))
    assert torch.equal(update.index[update.change], index)
    as_one_batch = ImportanceMemory(examples, 0.3)
    as_one_batch.update(index, importance)
    assert not same(as_one_batch.importances, one_by_one.importances), "control"


def test_increase_leaves_the_unknown_ones():
    memory = remembering([0.0, 2.0, math.nan])
    memory.increase(0.5)
    assert memory.importances.tolist() == pytest.approx([0.5, 2.5, math.nan], nan_ok=True)
    assert memory.known == 2


# ---- what is unimportant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "mass", "expected"),
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
        ([1.0, 2.0, 3.0, 14.0], 0.0, []),
    ],
)
def test_unimportant(importance, mass, expected):
    memory = remembering(importance)
    assert unimportant(memory.importances, mass).dtype == torch.bool
    assert unimportant(memory.importances, mass).nonzero().flatten().tolist() == expected
    assert same(memory.importances, tensor(importance)), "nothing is changed"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_unimportant_holds_less_than_that_share(seed):
    memory = remembering((torch.rand(200, generator=torch.Generator().manual_seed(seed)) ** 3).tolist())
    for mass in (0.01, 0.1, 0.3):
        found, q = unimportant(memory.importances, mass), memory.importances.double()
        assert q[found].sum() < mass * q.sum()
        assert q[found].max() < q[~found].min(), "the smallest ones"
        next_one = q[~found].min()
        assert q[found].sum() + next_one >= mass * q.sum() or next_one >= q.mean(), "and as many as there can be"
        assert found.any(), "control"


# ---- means -----------------------------------------------------------------------------------------------------------


def test_mean_importance():
    memory = remembering([1.0, 3.0, math.nan, 8.0])
    pruned = tensor([True, False, False, False])
    assert mean_importance(memory) == 4.0
    assert mean_importance(memory, fresh=8.0) == 5.0
    assert mean_importance(memory, pruned=pruned) == 5.5
    assert mean_importance(memory, fresh=4.0, pruned=pruned) == 5.0
    assert mean_importance(memory, fresh=0.0) == 3.0, "0 is an importance, too"
    assert math.isnan(mean_importance(ImportanceMemory(3)))
    assert mean_importance(ImportanceMemory(3), fresh=2.0) == 2.0
    assert math.isnan(mean_importance(memory, pruned=torch.ones(4, dtype=torch.bool)))
    assert same(memory.importances, tensor([1.0, 3.0, math.nan, 8.0])), "nothing is changed"


def test_least_variance_ratio():
    assert remembering([1.0, 3.0]).least_variance_ratio() == 0.8
    assert remembering([1.0, math.nan, 3.0, math.nan]).least_variance_ratio() == 0.8
    assert remembering([0.0, 0.0, 0.0, 2.0]).least_variance_ratio() == 0.25, "all visits to one in four"
    assert remembering([0.7] * 5).least_variance_ratio() == pytest.approx(1.0)
    assert remembering([0.0, 0.0]).least_variance_ratio() == 1.0
    assert ImportanceMemory(3).least_variance_ratio() == 1.0
    q = torch.rand(100, generator=torch.Generator().manual_seed(0)).double()
    one_over = 1 / (1 + q.var(unbiased=False) / q.mean().square())
    assert remembering(q.tolist()).least_variance_ratio() == pytest.approx(one_over.item(), rel=1e-6)


@pytest.mark.parametrize("piece", [1, 16, 64])
def test_large_data_are_gone_through_in_pieces(monkeypatch, piece):
    importance = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    importance[::9], importance[-100:] = math.nan, 5.0
    memory, pruned = remembering(importance.tolist()), torch.arange(1000) % 3 == 0

    def figures():
        return [mean_importance(memory, 2.0, pruned), mean_importance(memory), memory.least_variance_ratio()]

    whole = figures()
    monkeypatch.setattr("hf_importance.sampling.memory.CHUNK", piece)
    assert figures() == pytest.approx(whole, rel=1e-12)
    assert len(list(memory.chunks())) == -(-1000 // piece)
    monkeypatch.setattr(ImportanceMemory, "chunks", lambda _: iter([slice(0, 900)]))
    assert figures() != pytest.approx(whole, rel=1e-3), "control: a piece that is left out is missed"


def test_state():
    memory = remembering([1.0, math.nan, 3.0])
    state = memory.state_dict()
    again = ImportanceMemory(3)
    again.load_state_dict(state)
    assert same(again.importances, memory.importances)
    assert again.known == memory.known == 2
    again.update(tensor([0]), tensor([9.0]))
    memory.update(tensor([1]), tensor([9.0]))
    assert same(state["importance"], tensor([1.0, math.nan, 3.0])), "a state stays what it was"
    third = ImportanceMemory(3)
    third.load_state_dict(state)
    assert third.known == 2
