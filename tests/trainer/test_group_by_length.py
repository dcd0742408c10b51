"""Trainings with `train_sampling_strategy="group_by_length"`: padding, order, resuming; refused strategies."""

from itertools import pairwise

import pytest
import tiny
import torch
import transformers as hf
from length_training import GROUPED, lengths, make_rows, make_trainer, pad, train


class PaddingCounter:
    """Collates, and counts tokens without and with padding; `widths` are the tokens per row of all batches."""

    def __init__(self):
        self.tokens, self.padded, self.widths = 0, 0, []

    def __call__(self, rows):
        batch = pad(rows)
        if len(rows) > 1:  # single examples are only inspected
            self.tokens += int(batch["attention_mask"].sum())
            self.padded += batch["input_ids"].numel()
            self.widths.append(batch["input_ids"].shape[1])
        return batch

    @property
    def share(self):
        """Share of tokens that are not padding."""
        return self.tokens / self.padded


@pytest.mark.parametrize(("per_token", "accumulation"), [(True, 2), (False, 1)], ids=["tokens", "texts"])
def test_padding_is_as_with_trainer(tmp_path, per_token, accumulation):
    rows, shares = make_rows(240, per_token), {}
    more = {"gradient_accumulation_steps": accumulation}
    for name, cls, settings in [
        ("Trainer, grouped", hf.Trainer, GROUPED),
        ("ours, grouped", tiny.Recorder, GROUPED),
        ("Trainer", hf.Trainer, {}),
        ("ours", tiny.Recorder, {}),
    ]:
        collate = PaddingCounter()
        train(tmp_path, rows, cls, collate=collate, num_train_epochs=2, **settings, **more)
        shares[name] = collate.share
    assert shares["ours, grouped"] > shares["Trainer, grouped"] - 0.02
    assert shares["ours"] > shares["Trainer"] - 0.05
    assert shares["Trainer, grouped"] > shares["Trainer"] + 0.1, "control: grouping reduces padding"


@pytest.mark.parametrize("config", [{}, tiny.EVEN, {"metric": "uniform"}], ids=["default", "even", "uniform"])
def test_batches_come_in_random_order_after_the_longest(tmp_path, config):
    """With every example once in an epoch; those of `Trainer` become shorter within a mega-batch of seven batches."""
    rows, longer = make_rows(per_token=False), {}
    for name, cls in {"Trainer": hf.Trainer, "ours": tiny.Recorder}.items():
        collate = PaddingCounter()
        run = train(tmp_path, rows, cls, config, collate, num_train_epochs=1, **GROUPED)
        widths = collate.widths[-30:]  # after those that are looked at before training
        assert widths[0] == lengths(rows).max()
        longer[name] = sum(after > before for before, after in pairwise(widths[1:]))
    assert sorted(i for draw in run.draws for i in draw.index) == list(range(120))
    assert longer["Trainer"] <= 4, "control: a mega-batch begins"
    assert longer["ours"] > 8


def test_resumed_grouped_training_is_identical(tmp_path):
    rows = make_rows(per_token=False)
    settings = {"save_strategy": "steps", "save_steps": 17, "num_train_epochs": 2, "importance": {}, **GROUPED}
    whole = train(tmp_path / "whole", rows, **settings)
    resumed = make_trainer(tmp_path / "resumed", rows, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-34"))
    assert tiny.difference(whole, resumed) == 0.0
    assert resumed.draws == whole.draws[34:] != []


def test_importances_are_kept_if_training_is_resumed_with_grouping(tmp_path):
    rows = make_rows(per_token=False)
    train(tmp_path, rows, save_strategy="steps", save_steps=17, max_steps=17)
    resumed = make_trainer(tmp_path, rows, max_steps=18, **GROUPED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-17"))
    assert resumed.importances.isfinite().sum() > 60
    assert len(set(resumed.draws[0].weight)) > 1, "rates follow the importances of the checkpoint"


def test_preview_batches_are_grouped(tmp_path):
    run = make_trainer(tmp_path, make_rows(per_token=False), **GROUPED)
    widths = [batch["input_ids"].shape[1] for batch in run.get_train_dataloader()]
    assert widths[0] == max(widths)
    assert len(widths) == 30
    random = [batch["input_ids"].shape[1] for batch in make_trainer(tmp_path, make_rows()).get_train_dataloader()]
    assert sum(random) > 1.2 * sum(widths), "control: random order"


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_other_sampling_strategies_are_refused(tmp_path, strategy):
    reason = {
        "sequential": "in an order of its own",
        "batch_rebalance": "batches of different sizes.*group_by_length",
    }
    with pytest.raises(ValueError, match=f"train_sampling_strategy must be .*{strategy}.*{reason[strategy]}.*or use"):
        make_trainer(tmp_path, make_rows(), importance=tiny.REFUSING, train_sampling_strategy=strategy)
    make_trainer(tmp_path, make_rows(), **GROUPED)  # control: accepted


def test_grouping_without_lengths_is_refused(tmp_path):
    rows = [{"pixel_values": torch.ones(1, 8, 8), "labels": i % 4} for i in range(8)]
    with pytest.raises(ValueError, match="infer lengths"):  # by `Trainer`
        tiny.trainer(tmp_path, tiny.vit(), rows, **GROUPED).train()
