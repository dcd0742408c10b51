"""The comparison with the model's own loss: it refuses other losses, and accepts the usual ones."""

import logging
import re

import pytest
import tiny
import torch
from head_cases import TupleOutputs, causal_rows, collator
from own_loss_models import (
    RARE,
    Classifier,
    Copying,
    mean_of_weighted,
    rows_without,
    weighted_mean,
    without_labels,
)
from torch import nn
from torch.nn import functional as F

OWN = r"The model's loss on .* is .*, but the mean .* its own loss \(class weights"


def refused(tmp_path, model, data, **settings):
    run = tiny.trainer(tmp_path, model, data, importance=tiny.REFUSING, **settings)
    with pytest.raises(ValueError, match=re.compile(OWN, re.DOTALL)) as error:
        run.train()
    return run, str(error.value)


# ---- class weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [weighted_mean, mean_of_weighted])
@pytest.mark.parametrize("seed", range(6))
def test_weight_of_a_class_that_is_not_in_the_batch_is_refused(tmp_path, loss, seed):
    """Before the first update, whatever the seed: the class is in none of the data that are drawn first."""
    weights = [1.0] * RARE + [20.0]
    data = rows_without(RARE)
    run, message = refused(tmp_path, Classifier(loss, weights, seed=seed), data, seed=seed)
    assert run.state.global_step == 0
    assert "with labels made up so that every class occurs" in message
    equal = tiny.trained(tmp_path, Classifier(loss, seed=seed), data, seed=seed)
    assert equal.state.global_step > 0, "control: accepted with equal weights"


@pytest.mark.parametrize("kind", ["multi-label", "tokens", "pixels"])
def test_class_weights_of_other_heads_are_refused(tmp_path, kind):
    make, data, settings = OTHER_HEADS[kind]
    run, message = refused(tmp_path, make(5.0), data(), **settings(data()))
    assert run.state.global_step == 0
    assert "made up" in message
    accepted = tiny.trained(tmp_path, make(1.0), data(), **settings(data()))
    assert accepted.state.global_step > 0, "control: accepted with equal weights"


class MultiLabel(TupleOutputs):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.tensor([1.0] * RARE + [weight])

    def forward(self, input_ids, labels=None):
        logits = self.logits(input_ids)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.weight)
        return (logits,) if labels is None else (loss, logits)


class Pixels(nn.Module):
    def __init__(self, weight):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight = nn.Conv2d(3, 5, 1), torch.tensor([1.0] * 4 + [weight])

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.weight, ignore_index=255)
        return {"logits": logits} if labels is None else {"loss": loss, "logits": logits}


def multi_label_rows():
    """The last class is always absent."""
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tiny.texts(task="multi")]
    for row in rows:
        row["labels"][RARE] = 0.0
    return rows


def pixel_rows():
    g = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=g), "labels": torch.randint(0, 4, (8, 8), generator=g)}
        for _ in range(16)
    ]


def weighted_copying(weight):
    """The last word has another weight, and occurs in no text."""
    weights = torch.tensor([1.0] * (tiny.WORDS - 1) + [weight])
    return Copying(False, lambda z, y: F.cross_entropy(z, y, weight=weights))


def token_rows():
    rows = causal_rows()
    for row in rows:
        row["labels"] = row["labels"].clamp(max=tiny.WORDS - 2)
    return rows


OTHER_HEADS = {
    "multi-label": (MultiLabel, multi_label_rows, lambda data: {}),
    "tokens": (weighted_copying, token_rows, lambda data: {"more": collator(data)}),
    "pixels": (Pixels, pixel_rows, lambda data: {}),
}


@pytest.mark.parametrize(("classes", "batch"), [(20, 8), (100, 8), (100, 2), (3, 1), (300, 2)])
def test_more_classes_than_rows(tmp_path, classes, batch):
    """The usual loss is accepted, and the weight of a single class is refused, at the latest on a later batch."""
    data = rows_without(classes - 1, 64, total=classes)
    settings = {"per_device_train_batch_size": batch, "max_steps": 20}
    usual = tiny.trained(tmp_path, Classifier(classes=classes), data, **settings)
    assert usual.state.global_step == 20
    weights = [1.0] * (classes - 1) + [9.0]
    if classes <= 100:
        refused(tmp_path, Classifier(mean_of_weighted, weights, classes), data, **settings)
    if batch > 2:
        refused(tmp_path, Classifier(weighted_mean, weights, classes), data, **settings)


def test_class_weights_show_when_logits_are_no_longer_zero(tmp_path):
    """With a head of zeros all losses are equal, whatever the weights: refused once they differ."""

    def zeros(**settings):
        model = Classifier(**settings)
        nn.init.zeros_(model.layer.weight)
        nn.init.zeros_(model.layer.bias)
        return model

    run, message = refused(tmp_path, zeros(weights=[1.0] * RARE + [20.0]), rows_without(RARE))
    assert 0 < run.state.global_step <= 4
    assert re.search("on batch [248]", message)
    accepted = tiny.trained(tmp_path, zeros(), rows_without(RARE))
    assert accepted.state.global_step > 4, "control: accepted with equal weights"


def test_other_losses_that_agree_at_first_are_refused(tmp_path):
    """|0 − y| = (0 − y)² for labels of 0 and 1, so labels between them are made up."""

    class Regression(TupleOutputs):
        def __init__(self, loss):
            super().__init__(1)
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)
            self.loss = loss

        def forward(self, input_ids, labels=None):
            value = self.logits(input_ids).squeeze(-1)
            return {"logits": value} if labels is None else {"loss": self.loss(value, labels), "logits": value}

    data = [{"input_ids": row["input_ids"], "labels": float(i % 2)} for i, row in enumerate(tiny.texts())]
    run, _ = refused(tmp_path, Regression(F.l1_loss), data)
    assert run.state.global_step == 0
    assert tiny.trained(tmp_path, Regression(F.mse_loss), data).state.global_step > 0, "control"


def test_models_whose_logits_depend_on_given_labels_are_refused(tmp_path):
    """A margin that is subtracted from the logit of the label, if there is one: training would be without it."""

    class Margin(TupleOutputs):
        def forward(self, input_ids, labels=None):
            logits = 4 * self.logits(input_ids)
            if labels is None:
                return (logits,)
            logits = logits - 2 * F.one_hot(labels, tiny.CLASSES)
            return F.cross_entropy(logits, labels), logits

    with pytest.raises(ValueError, match=r"returns other logits if it is given labels.*per_example_loss_func"):
        tiny.trained(tmp_path, Margin(), tiny.texts(), importance=tiny.REFUSING)


# ---- shifted labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero head"])
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_shift_is_found_if_the_first_batches_have_no_labels(tmp_path, shifts, batch, zero):
    """Their loss is NaN, or with a head of zeros the same for both readings."""
    settings = {"per_device_train_batch_size": batch, "num_train_epochs": 8, "more": collator(causal_rows())}
    uniform, model = {"metric": "uniform"}, Copying(shifts, zero=zero)
    order = tiny.trained(tmp_path, model, causal_rows(), tiny.Recorder, uniform, **{**settings, "max_steps": 2}).draws
    first = {i for draw in order[:2] for i in draw.index}
    data = without_labels(causal_rows(), first)
    start = tiny.trained(tmp_path, model, data, tiny.Recorder, uniform, **{**settings, "max_steps": 1})
    known = start._run.objective.state_dict()["found"]["shifts"] is not None
    assert known is not zero, "labels are made up, so that it is known before the first update if anything shows it"
    ours = tiny.trained(tmp_path, model, data, tiny.Recorder, uniform, **settings)
    assert {i for draw in ours.draws[:2] for i in draw.index} == first, "premise"
    assert ours._run.objective.shifts is shifts
    text = next(row for i, row in enumerate(causal_rows()) if i not in first)
    losses = {}
    for ours.model.shifts in (False, True):
        losses[ours.model.shifts] = ours.model(**{name: value[None] for name, value in text.items()})["loss"].item()
    assert (losses[True] < losses[False]) is shifts, "it learned to predict the next word, or to copy"


def test_weights_of_words_are_refused_after_batches_without_labels(tmp_path):
    """A batch without labels decides about the shift only."""
    weights = torch.linspace(0.2, 3, tiny.WORDS)
    model = Copying(True, lambda z, y: F.cross_entropy(z, y, weight=weights))
    data = causal_rows()
    refused(tmp_path, model, data, more=collator(data))


# ---- what stays open -------------------------------------------------------------------------------------------------


def test_warning_if_the_loss_is_never_finite(tmp_path, caplog):
    data = without_labels(causal_rows(), range(24))
    model = Copying(True, lambda z, y: F.cross_entropy(z, y) if (y != -100).all() else z.sum() * torch.nan)
    caplog.set_level(logging.WARNING, "hf_importance")
    tiny.trained(tmp_path, model, data, more=collator(data), max_steps=3)
    (message,) = [r.getMessage() for r in caplog.records if "could not be compared" in r.getMessage()]
    assert "its loss is not finite" in message
    assert "per_example_loss_func" in message
    caplog.clear()
    data = causal_rows()
    tiny.trained(tmp_path, Copying(True), data, more=collator(data), max_steps=3)
    assert not [r for r in caplog.records if "could not be compared" in r.getMessage()], "control: silent otherwise"
