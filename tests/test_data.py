import pickle

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from hf_importance.data import DRAW_KEY, ImportanceCollator, ImportanceDataset
from hf_importance.sampling.draw import Draw
from hf_importance.sampling.memory import ImportanceMemory
from hf_importance.sampling.sampler import ImportanceBatchSampler


class Squares(torch.utils.data.Dataset):
    def __init__(self):
        self.asked, self.epoch = [], None

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.asked.append(i)
        return {"x": i * i}

    def set_epoch(self, epoch):
        self.epoch = epoch


class Batched(Squares):
    def __getitems__(self, indices):
        self.asked.append(tuple(indices))
        return [{"x": i * i} for i in indices]


@pytest.mark.parametrize(("cls", "asked"), [(Squares, [3, 1, 3]), (Batched, [(3, 1, 3)])])
def test_dataset_is_asked_for_the_drawn_examples(cls, asked):
    data = cls()
    draw = Draw(0, [3, 1, 3], [1.0, 2.0, 1.0], [1.0, 0.5, 1.0])
    examples, carried = ImportanceDataset(data).__getitems__(draw)
    assert examples == [{"x": 9}, {"x": 1}, {"x": 9}]
    assert carried is draw
    assert data.asked == asked


def test_dataset_is_a_data_set():
    data = Squares()
    wrapped = ImportanceDataset(data)
    assert len(wrapped) == 10
    assert wrapped[4] == {"x": 16}
    wrapped.set_epoch(7)
    assert data.epoch == 7
    ImportanceDataset([1, 2]).set_epoch(7)  # a list has no epochs


def test_collator_puts_the_draw_beside_the_batch():
    draw = Draw(4, [3, 1], [1.0, 2.0], [1.0, 0.5])
    batch = ImportanceCollator(default_collate)(([{"x": 9}, {"x": 1}], draw))
    assert batch.pop(DRAW_KEY) is draw
    assert {key: value.tolist() for key, value in batch.items()} == {"x": [9, 1]}


def test_collator_wants_a_mapping():
    with pytest.raises(TypeError, match="data_collator must return a dict of tensors, but returned list"):
        ImportanceCollator(list)(([1, 2], Draw(0, [0, 1], [1.0, 1.0], [1.0, 1.0])))


def test_draw_cannot_be_changed_and_travels_between_processes():
    draw = Draw(0, [1], [0.5], [2.0])
    for name in ("rate", "weight"):
        with pytest.raises(AttributeError):
            setattr(draw, name, [1.0])
    assert pickle.loads(pickle.dumps(draw)) == draw


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_data_loader(workers):
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
