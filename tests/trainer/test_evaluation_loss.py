"""Evaluation and the choice of the best model use `per_example_loss_func`."""

import pytest
import tiny
import torch
from overridden_losses import CLASS_WEIGHTS, LossInALaterBase
from torch import nn
from torch.nn.functional import cross_entropy


def weighted_loss(outputs, labels):
    return cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS, reduction="none")


def test_loss_function_replaces_the_loss_of_a_later_base(tmp_path):
    """In training and in evaluation."""
    more = {"per_example_loss_func": weighted_loss, "eval_dataset": tiny.texts()}
    run = tiny.trained(tmp_path, tiny.bert(), tiny.texts(), LossInALaterBase, tiny.FIXED, more)
    assert run.importances.isfinite().all()
    logits = torch.tensor(run.predict(tiny.texts()).predictions)
    labels = torch.tensor([row["labels"] for row in tiny.texts()])
    expected = weighted_loss({"logits": logits}, labels).mean().item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


class WithoutLoss(nn.Module):
    """Returns logits and no loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(tiny.LENGTH, tiny.CLASSES)

    def forward(self, input_ids, attention_mask=None):
        return self.output_of(self.layer(input_ids / tiny.WORDS))

    def output_of(self, logits):
        return {"logits": logits}


class TupleWithoutLoss(WithoutLoss):
    def output_of(self, logits):
        return (logits,)


def ten_times(outputs, labels):
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return 10 * cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("model", [tiny.bert, WithoutLoss, TupleWithoutLoss])
def test_evaluation_uses_the_loss_function(tmp_path, model):
    """Before and after training."""
    more = {"per_example_loss_func": ten_times, "eval_dataset": tiny.texts()[:24]}
    settings = {"learning_rate": 0.0, "label_names": ["labels"], "per_device_eval_batch_size": 8}
    run = tiny.trainer(tmp_path, model(), tiny.texts(), importance=tiny.EVEN, more=more, **settings)
    before = run.evaluate()["eval_loss"]
    output = run.predict(tiny.texts()[:24])
    labels = torch.tensor([row["labels"] for row in tiny.texts()[:24]])
    expected = 10 * cross_entropy(torch.tensor(output.predictions), labels).item()
    assert before == pytest.approx(expected, rel=1e-5)
    assert before > 5, "control: it is not the cross-entropy itself"
    run.train()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_best_model_is_chosen_by_the_loss_function(tmp_path):
    """The loss function falls where the loss of the model rises."""

    def negative_loss(outputs, labels):
        return -cross_entropy(outputs["logits"], labels, reduction="none").clamp(max=20)

    more = {"per_example_loss_func": negative_loss, "eval_dataset": tiny.texts()}
    run = tiny.trained(
        tmp_path, tiny.opinionated_bert(), tiny.texts(), importance=tiny.FIXED, more=more, save_strategy="epoch",
        eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    losses = tiny.logged(run, "eval_loss")
    assert losses == sorted(losses, reverse=True)
    assert run.state.best_metric == losses[-1] < 0
