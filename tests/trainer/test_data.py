"""Dataset and collator carry the draw along with its batch; means over the data."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from hf_importance.data.dataset import DRAW_KEY, ImportanceCollator, ImportanceDataset, mean_over_examples
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler


class Squares(torch.utils.data.Dataset):
    def __init__(self):
        self.read, self.epoch = [], None

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.read.append(i)
        return {"x": i * i}

    def set_epoch(self, epoch):
        self.epoch = epoch


class BatchedSquares(Squares):
    def __getitems__(self, indices):
        self.read.append(tuple(indices))
        return [{"x": i * i} for i in indices]


@pytest.mark.parametrize(("cls", "read"), [(Squares, [3, 1, 3]), (BatchedSquares, [(3, 1, 3)])])
def test_dataset_returns_the_drawn_examples_and_the_draw(cls, read):
    data = cls()
    draw = Draw(0, [3, 1, 3], [1.0, 2.0, 1.0], [1.0, 0.5, 1.0])
    examples, carried = ImportanceDataset(data).__getitems__(draw)
    assert examples == [{"x": 9}, {"x": 1}, {"x": 9}]
    assert carried is draw
    assert data.read == read


def test_dataset_forwards_length_items_and_set_epoch():
    data = Squares()
    wrapped = ImportanceDataset(data)
    assert len(wrapped) == 10
    assert wrapped[4] == {"x": 16}
    wrapped.set_epoch(7)
    assert data.epoch == 7
    ImportanceDataset([1, 2]).set_epoch(7)  # a list has no set_epoch


def test_collator_adds_the_draw_to_the_batch():
    draw = Draw(4, [3, 1], [1.0, 2.0], [1.0, 0.5])
    batch = ImportanceCollator(default_collate)(([{"x": 9}, {"x": 1}], draw))
    assert batch.pop(DRAW_KEY) is draw
    assert {key: value.tolist() for key, value in batch.items()} == {"x": [9, 1]}


def test_collator_that_returns_a_list_is_refused():
    with pytest.raises(TypeError, match="data_collator must return a dict of tensors, but returned list"):
        ImportanceCollator(list)(([1, 2], Draw(0, [0, 1], [1.0, 1.0], [1.0, 1.0])))


def test_draw_is_frozen_and_can_be_pickled():
    draw = Draw(0, [1], [0.5], [2.0])
    for name in ("rate", "weight"):
        with pytest.raises(AttributeError):
            setattr(draw, name, [1.0])
    assert pickle.loads(pickle.dumps(draw)) == draw


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_keeps_batches_and_draws_together(workers):
    sampler = ImportanceBatchSampler(ImportanceMemory(10), 4)
    loader = DataLoader(
        ImportanceDataset(Squares()),
        batch_sampler=sampler,
        collate_fn=ImportanceCollator(default_collate),
        num_workers=workers,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for number, batch in enumerate(batches):
        assert batch[DRAW_KEY].number == number
        assert batch["x"].tolist() == [i * i for i in batch[DRAW_KEY].index]


def test_mean_over_examples_keeps_the_global_random_state():
    data = [{"labels": torch.tensor([1] * (i % 3) + [-100])} for i in range(10)]
    sizes = []

    def collate(rows):
        sizes.append(len(rows))
        torch.rand(5)  # like a collator with random masks
        return default_collate(rows)

    before = torch.get_rng_state()
    mean = mean_over_examples(data, collate, "labels", lambda labels: (labels != -100).sum(1))
    assert mean == sum(i % 3 for i in range(10)) / 10
    assert sizes == [1] * 10
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_over_many_examples_is_an_estimate():
    data = [{"labels": torch.tensor([i])} for i in range(5000)]
    mean = mean_over_examples(data, default_collate, "labels", lambda labels: labels[:, 0])
    assert mean == pytest.approx(2500, rel=0.01)
    zero = mean_over_examples(data[:3], default_collate, "labels", lambda labels: 0 * labels[:, 0])
    assert zero > 0, "positive, because it is a divisor"
