"""Training dataloaders: previews do not affect training; custom ones are refused if they draw otherwise."""

import gc

import pytest
import tiny
import torch
import transformers as hf
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_importance import ImportanceTrainer, ImportanceTrainerMixin
from hf_importance.sampling.memory import ImportanceMemory

# ---- previews --------------------------------------------------------------------------------------------------------


class PreviewCallback(hf.TrainerCallback):
    """Reads batches during training, from the dataloader passed to callbacks and from `get_train_dataloader()`."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **_):
        assert set(next(iter(train_dataloader))) == {"input_ids", "attention_mask", "labels"}

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        self.trainer.get_train_dataloader()
        next(iter(train_dataloader))

    def on_step_end(self, args, state, control, **_):
        if state.global_step % 4 == 2:
            batches = iter(self.trainer.get_train_dataloader())
            assert len(next(batches)["labels"]) == len(next(batches)["labels"]) == 8


class RandomMaskCollator:
    """Masks at random with the global generator and its own, like collators of masked language models."""

    def __init__(self):
        self.generator = None

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        batch = hf.default_data_collator(rows)
        shape = batch["attention_mask"].shape
        kept = (torch.rand(shape) < 0.9) & (torch.rand(shape, generator=self.generator) < 0.9)
        batch["attention_mask"] = kept.long()
        return batch


def make_trainer(tmp_path, previews, workers, collate=None, **settings):
    callback = PreviewCallback()
    more = {"callbacks": [callback] if previews else [], "data_collator": collate or RandomMaskCollator()}
    run = tiny.trainer(
        tmp_path, tiny.bert(dropout=0.1), tiny.texts(), more=more, num_train_epochs=6, save_strategy="steps",
        save_steps=13, dataloader_num_workers=workers, **settings,
    )  # fmt: skip
    callback.trainer = run
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_previews_do_not_affect_training(tmp_path, workers):
    plain = make_trainer(tmp_path / "plain", previews=False, workers=workers)
    plain.train()
    previewed = make_trainer(tmp_path / "previewed", previews=True, workers=workers)
    previewed.train()
    assert tiny.difference(plain, previewed) == 0.0
    torch.testing.assert_close(plain.importances, previewed.importances, rtol=0, atol=0)
    other = make_trainer(tmp_path / "other", previews=False, workers=workers, seed=1)
    other.train()
    assert tiny.difference(plain, other) > 1e-3, "control: another seed"


def test_previews_do_not_affect_resumed_training(tmp_path):
    """With a collator without random numbers, whose state is not in a checkpoint of `Trainer` either."""
    settings = {"workers": 0, "collate": hf.default_data_collator}
    whole = make_trainer(tmp_path / "whole", previews=True, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", previews=True, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
    assert tiny.difference(whole, resumed) == 0.0


def test_preview_batches_equal_those_of_trainer(tmp_path):
    """In content and order; the model takes them as they are."""
    plain = list(tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), tiny.Plain).get_train_dataloader())
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    ours = list(run.get_train_dataloader())
    assert [list(batch) for batch in ours] == [list(batch) for batch in plain]
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert run.model(**ours[0]).loss.item() == run.compute_loss(run.model, ours[0]).item() > 0


class OptimizerFails(ImportanceTrainer):
    def create_optimizer(self, *_):
        raise RuntimeError("no optimizer")


def test_dataloader_after_a_failed_training_is_a_preview(tmp_path):
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), OptimizerFails)
    with pytest.raises(RuntimeError, match="no optimizer"):
        run.train()
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_preview_has_no_memory_of_the_examples_until_it_is_iterated(tmp_path):
    def count_memories():
        gc.collect()
        return sum(type(x) is ImportanceMemory for x in gc.get_objects())

    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts())
    before = count_memories()
    loader = run.get_train_dataloader()
    assert count_memories() == before
    batches = iter(loader)
    next(batches)
    assert count_memories() == before + 1, "control: during an iteration"
    assert len(loader) == 5 == len(list(loader))


class RandomMaskDataset(torch.utils.data.Dataset):
    """Masks tokens with its own generator."""

    def __init__(self):
        self.rows, self.generator = [{**row, "labels": row["input_ids"] % 4} for row in tiny.texts()], torch.Generator()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        mask = torch.rand(tiny.LENGTH, generator=self.generator) < 0.9
        return {**self.rows[i], "attention_mask": mask.long()}


@pytest.mark.parametrize("saves", ["no", "epoch"])
def test_examples_read_before_training_do_not_affect_its_random_numbers(tmp_path, saves):
    """Examples are read for labels, lengths and the fingerprint; `Trainer` reads none."""
    model = tiny.token_bert()
    settings = {"num_train_epochs": 1, "save_strategy": saves}
    plain = tiny.trained(tmp_path / "plain", model, RandomMaskDataset(), tiny.Plain, **settings)
    ours = tiny.trained(tmp_path / "ours", model, RandomMaskDataset(), importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-6
    data = RandomMaskDataset()
    data[0]
    other = tiny.trained(tmp_path / "other", model, data, tiny.Plain, **settings)
    assert tiny.difference(other, plain) > 1e-4, "control: an example was read before training"


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
    run = tiny.trainer(tmp_path, tiny.bert(), tiny.texts(), trainer_with(REFUSED[case]))
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
