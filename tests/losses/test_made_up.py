"""Labels that are made up: every class occurs, and a weight of any class changes the weighted mean."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_importance.losses.made_up import ClassLabels, numbers_between, several_classes, showing_shift

RELATIVE = 1e-4


def made(logits, start=0, most=32, sample=False):
    return ClassLabels(logits, RELATIVE).make(start, most, sample)


@pytest.mark.parametrize(("rows", "classes"), [(8, 4), (2, 2), (8, 20), (16, 200), (4, 3)])
def test_every_class_weight_shows(rows, classes):
    """Doubling the weight of any class changes the loss for some labels by more than the tolerance."""
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)) / 5
    labels, reached = made(logits)
    assert reached == classes
    for c in range(classes):
        weight = torch.ones(classes)
        weight[c] = 2
        pairs = [(cross_entropy(logits, y, weight), cross_entropy(logits, y)) for y in labels]
        assert any(abs(a - b) > RELATIVE * b + 1e-5 for a, b in pairs)
    assert all(y.shape == (rows,) and 0 <= y.min() <= y.max() < classes for y in labels)


def test_equal_losses_show_nothing():
    assert made(torch.zeros(8, 4)) == ([], 0)
    assert made(torch.zeros(1, 4))[1] == 4, "a weighted mean of one loss is this loss"


def test_more_classes_than_comparisons():
    """Classes are taken in turn, or a sample of them."""
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    _, first = made(logits)
    assert first == 32 * 4
    labels, second = made(logits, first)
    assert second == 2 * 32 * 4
    assert set(range(128, 256)) <= {c for y in labels for c in y.tolist()}
    sample, reached = made(logits, most=8, sample=True)
    assert reached == 1000
    assert len(sample) <= 4
    assert max(y.max() for y in sample) > 800, "spread over all classes"


def test_masked_classes_do_not_occur():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = torch.finfo(torch.float32).min
    logits[:, 5] = -torch.inf
    labels, reached = made(logits)
    assert reached == 6
    assert {c for y in labels for c in y.tolist()} == {0, 1, 2, 3}


def test_shift_shows():
    """The two readings differ by far more than for random labels, only where positions have labels."""
    logits = torch.randn(4, 10, 50, generator=torch.Generator().manual_seed(0)) / 20
    labels = torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(10) > torch.tensor([[0], [2], [4], [9]])

    def difference(y):
        y = y.masked_fill(~kept, -100)
        return abs(
            cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
            - cross_entropy(logits.flatten(0, 1), y.flatten())
        )

    labels_made = showing_shift(logits, labels, kept)
    assert torch.equal(labels_made != -100, kept)
    assert difference(labels_made) > 0.05 > 5 * difference(labels)


def test_targets_of_several_classes_and_numbers():
    targets = several_classes(torch.zeros(3, 5))
    assert torch.equal(torch.stack(targets).amax((0, 1)), torch.ones(5))
    assert torch.equal(torch.stack(targets).amin((0, 1)), torch.zeros(5))
    (numbers,) = numbers_between(torch.tensor([1.0, 5.0, 5.0, 1.0]))
    assert numbers.unique().numel() == 4
    assert 1 <= numbers.min() <= numbers.max() <= 5
    assert numbers_between(torch.ones(3)) == []
