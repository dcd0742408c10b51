"""Types of labels, examples and batches without a label, and the weighted mean over examples with a loss."""

import pytest
import tiny
import torch
from head_cases import MASKED_IMAGES, Segmenter, make_rows
from torch import nn

from hf_importance.losses.objective import Measured


def with_labels(convert, n=40):
    return [{**row, "labels": convert(row["labels"])} for row in tiny.texts(n)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_integer_labels_of_any_type_are_classes(tmp_path, dtype):
    usual = tiny.trained(tmp_path, tiny.opinionated_bert(), tiny.texts())
    ours = tiny.trained(tmp_path, tiny.opinionated_bert(), with_labels(lambda y: torch.tensor(y, dtype=dtype)))
    assert tiny.difference(ours, usual) == 0.0
    assert torch.equal(ours.importances, usual.importances)


def test_boolean_labels_are_classes(tmp_path):
    model = tiny.bert(num_labels=2, initializer_range=0.7)
    usual = tiny.trained(tmp_path, model, with_labels(lambda y: y % 2))
    ours = tiny.trained(tmp_path, model, with_labels(lambda y: torch.tensor(y % 2 == 1)))
    assert tiny.difference(ours, usual) == 0.0
    other = tiny.trained(tmp_path, model, with_labels(lambda y: y // 2))
    assert tiny.difference(ours, other) > 1e-3, "control: other labels"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64], ids=str)
def test_multi_label_targets_of_any_type_are_equal(tmp_path, dtype):
    rows = tiny.texts(task="multi")
    usual = tiny.trained(tmp_path, tiny.opinionated_bert(), rows)
    converted = [{**row, "labels": row["labels"].to(dtype)} for row in rows]
    assert tiny.difference(tiny.trained(tmp_path, tiny.opinionated_bert(), converted), usual) == 0.0


# ---- examples without a label ----------------------------------------------------------------------------------------


def test_mean_is_over_labelled_examples(tmp_path):
    """With four of five examples without a label, uniform training equals `Trainer` in every batch."""
    rows = [{**row, "labels": row["labels"] if i % 5 == 0 else -100} for i, row in enumerate(tiny.texts())]
    settings = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "per_device_train_batch_size": 20,
        "seed": 3,
    }
    plain = tiny.trained(tmp_path, tiny.opinionated_bert(), rows, tiny.Plain, **settings)
    ours = tiny.trained(tmp_path, tiny.opinionated_bert(), rows, importance={"metric": "uniform"}, **settings)
    assert tiny.difference(ours, plain) < 1e-5
    untrained = tiny.trainer(tmp_path, tiny.opinionated_bert(), rows)
    assert tiny.difference(ours, untrained) > 1e-2, "control: training changes the parameters"


def test_batches_without_labels_have_zero_loss(tmp_path):
    """The mean of `Trainer` is 0/0 for them."""
    rows = [{**row, "labels": -100} for row in tiny.texts()]
    ours = tiny.trained(tmp_path, tiny.bert(), rows, max_steps=2)
    assert tiny.difference(ours, tiny.trainer(tmp_path, tiny.bert(), rows)) == 0.0
    assert tiny.logged(ours, "train_loss") == [0.0]


@pytest.mark.parametrize("counted", [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_weighted_mean_is_over_examples_with_a_loss(counted):
    """Σ wℓ / B divided by the weighted share Σ wc / Σ w of examples with a loss; if all have one, exactly Σ wℓ / B."""
    weight, counted = torch.tensor([0.3, 1.7, 2.9, 0.1]), torch.tensor(counted)
    losses, auxiliary = counted * torch.tensor([1.0, 2.0, 0.5, 4.0]), 0.25
    mean = Measured(losses, losses, losses, auxiliary, None, counted).weighted_mean(weight) - auxiliary
    share = (weight * counted).sum() / weight.sum()
    expected = (weight * losses).mean() / share if share else torch.tensor(0.0)
    assert mean.item() == pytest.approx(expected.item())
    if counted.all():
        assert mean == Measured(losses, losses, losses, auxiliary, None).weighted_mean(weight) - auxiliary


# ---- masks -----------------------------------------------------------------------------------------------------------


class ManyClasses(Segmenter):
    """Segmentation with 300 classes and no ignored one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 300, 2, stride=2)

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values)
        resized = nn.functional.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": nn.functional.cross_entropy(resized, labels), **outputs}


def test_mask_label_255_is_a_class_if_the_model_has_more(tmp_path):
    """With fewer classes it is ignored; all gradients would then be 0."""
    model, data = ManyClasses(), make_rows(**{**MASKED_IMAGES, "labels": lambda *_: torch.full((16, 16), 255)})
    ours = tiny.trained(tmp_path, model, data, importance={"metric": "uniform"}, learning_rate=0.1, max_steps=2)
    assert (ours.model.layer.bias - model.layer.bias).abs().max() > 0.05
