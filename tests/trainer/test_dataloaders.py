"""Training dataloaders: users see that of `Trainer`; custom ones are refused if they draw otherwise."""

import pytest
import tiny
import torch
import transformers as hf
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_importance import ImportanceTrainerMixin

# ---- what users see --------------------------------------------------------------------------------------------------


class Visitor(hf.TrainerCallback):
    """Looks at the dataloader passed to callbacks, and reads batches from it and from `get_train_dataloader()`."""

    def __init__(self):
        self.first_batches = []

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        self.dataset, self.collate_fn = train_dataloader.dataset, train_dataloader.collate_fn
        self.batch_size = train_dataloader.batch_sampler.batch_size
        self.first_batches.append(next(iter(train_dataloader)))

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        next(iter(train_dataloader))

    def on_step_end(self, args, state, control, **_):
        if state.global_step % 4 == 2:
            batches = iter(self.trainer.get_train_dataloader())
            self.first_batches.append(next(batches))
            assert len(next(batches)["labels"]) == 8


class RandomMaskCollator:
    """Masks at random with the global generator, like collators of masked language models."""

    def __call__(self, rows):
        batch = hf.default_data_collator(rows)
        batch["attention_mask"] = (torch.rand(batch["attention_mask"].shape) < 0.9).long()
        return batch


def visited(tmp_path, cls, workers=0, **settings):
    visitor, collate = Visitor(), RandomMaskCollator()
    more = {"callbacks": [visitor], "data_collator": collate}
    importance = None if cls is tiny.Plain else {"metric": "uniform"}
    run = tiny.trainer(
        tmp_path,
        tiny.bert(dropout=0.1),
        tiny.texts(),
        cls,
        importance,
        more,
        dataloader_num_workers=workers,
        **settings,
    )
    visitor.trainer = run
    run.train()
    return run, visitor


@pytest.mark.parametrize("workers", [0, 2])
def test_callbacks_see_and_do_what_they_do_with_trainer(tmp_path, workers):
    """Their own dataset, collator and batch sampler; batches without draws, in the same order; the same training."""
    plain, expected = visited(tmp_path, tiny.Plain, workers)
    ours, visitor = visited(tmp_path, tiny.Recorder, workers)
    assert visitor.dataset is ours.train_dataset
    assert visitor.collate_fn.data_collator is ours.data_collator, "as `Trainer` wraps it"
    assert visitor.batch_size == 8
    for batch, other in zip(visitor.first_batches, expected.first_batches, strict=True):
        assert list(batch) == list(other) == ["input_ids", "attention_mask", "labels"]
        assert torch.equal(batch["input_ids"], other["input_ids"])
    assert tiny.difference(plain, ours) == 0.0
    assert [draw.number for draw in ours.draws] == list(range(15)), "nothing was drawn for the callback"


class Replacing(hf.TrainerCallback):
    """Replaces dataset or collator of the dataloader between epochs, as curricula and augmentations do."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        if state.global_step >= 5:
            setattr(train_dataloader, self.name, self.value)


def only_zeros(rows):
    return {name: value * 0 for name, value in hf.default_data_collator(rows).items()}


def test_replaced_collator_is_used_from_the_next_epoch_on(tmp_path):
    def labels_of(cls, importance=None):
        seen = []

        class Seeing(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                seen.append(int(inputs["labels"].sum()))
                return super().training_step(model, inputs, *args, **kwargs)

        more = {"callbacks": [Replacing("collate_fn", only_zeros)]}
        tiny.trained(tmp_path, tiny.bert(), tiny.texts(), Seeing, importance, more)
        return seen

    ours = labels_of(tiny.Recorder, {"metric": "uniform"})
    assert any(ours[:5])
    assert not any(ours[5:])


class GlobalMaskDataset(torch.utils.data.Dataset):
    """Masks tokens with the global generator."""

    def __init__(self):
        self.rows = [{**row, "labels": row["input_ids"] % 4} for row in tiny.texts()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {**self.rows[i], "attention_mask": (torch.rand(tiny.LENGTH) < 0.9).long()}


@pytest.mark.parametrize("saves", ["no", "epoch"])
def test_examples_read_before_training_do_not_affect_its_random_numbers(tmp_path, saves):
    """Examples are read for labels, lengths and the fingerprint; `Trainer` reads none."""
    model = tiny.token_bert()
    settings = {"num_train_epochs": 1, "save_strategy": saves}
    plain = tiny.trained(tmp_path / "plain", model, GlobalMaskDataset(), tiny.Plain, **settings)
    ours = tiny.trained(tmp_path / "ours", model, GlobalMaskDataset(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    other = tiny.trainer(tmp_path / "other", model, GlobalMaskDataset(), tiny.Plain, **settings)
    torch.rand(1)
    other.train()
    assert tiny.difference(other, plain) > 1e-4, "control: a random number was drawn before training"


# ---- custom dataloaders ----------------------------------------------------------------------------------------------


def trainer_with(get_train_dataloader):
    """A subclass whose later base overrides `get_train_dataloader`."""
    base = type("CustomTrainer", (hf.Trainer,), {"get_train_dataloader": get_train_dataloader})
    return type("CustomImportanceTrainer", (ImportanceTrainerMixin, base), {})


def dataloader_with(**settings):
    return lambda self: DataLoader(self.train_dataset, collate_fn=self.data_collator, **settings)


class CustomIteration(DataLoader):
    def __iter__(self):
        return (batch for batch in super().__iter__())


REFUSED = {
    "no shuffling": dataloader_with(batch_size=8),
    "weighted sampler": dataloader_with(batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
    "other batch size": dataloader_with(batch_size=5, shuffle=True),
    "drop_last": dataloader_with(batch_size=8, shuffle=True, drop_last=True),
    "custom iteration": lambda self: CustomIteration(self.train_dataset, 8, shuffle=True),
    "part of the data": lambda self: DataLoader(
        self.train_dataset[:32], 8, shuffle=True, collate_fn=self.data_collator
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dataloaders_that_draw_otherwise_are_refused(tmp_path, case):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), trainer_with(REFUSED[case]), tiny.REFUSING)
    with pytest.raises(
        ValueError, match=r"CustomTrainer.get_train_dataloader .*which importance sampling would replace"
    ):
        run.train()


def test_dataloader_that_only_collates_otherwise_is_honoured(tmp_path):
    collated = []

    def collate(rows):
        collated.append(len(rows))
        return hf.default_data_collator(rows)

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, 8, shuffle=True, collate_fn=collate))

    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), trainer_with(get_train_dataloader))
    assert sum(collated) >= 8 * run.state.global_step
