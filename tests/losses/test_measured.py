"""What is measured of a batch of classes: the short path of classification equals the general functions bit for bit."""

import pytest
import torch

from hf_importance.losses import per_example
from hf_importance.losses.objective import Objective, classes, kind_of_loss
from hf_importance.losses.outputs import observed_of

BATCH, CLASSES = 16, 5
OBSERVED = ("label", "loss", "prediction", "probability")


def batch_of(dtype, ignored):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(BATCH, CLASSES, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(CLASSES, (BATCH,), generator=g)
    return logits, labels.masked_fill(torch.arange(BATCH) % 3 == 0, -100) if ignored else labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_classes_equal_general_functions(dtype, ignored, smoothing):
    logits, labels = batch_of(dtype, ignored)
    terms = classes(logits, labels, smoothing)
    assert (terms.counted is None) is not ignored
    assert torch.equal(terms.losses, per_example.cross_entropy(logits, labels, smoothing))
    general = observed_of(terms.losses, logits, labels)
    assert set(terms.observed) == set(general) == set(OBSERVED)
    for name in OBSERVED:
        assert terms.observed[name].dtype == torch.float32
        torch.testing.assert_close(terms.observed[name], general[name], rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(terms.importance(), per_example.cross_entropy_importance(logits, labels, smoothing))
    assert terms.observed["label"].isnan().any() == ignored, "control"


def test_observations_of_numbers_have_no_probability_and_no_gradient():
    logits = torch.randn(BATCH, requires_grad=True)
    observed = observed_of(logits.square(), logits, torch.arange(BATCH))
    assert torch.equal(observed["prediction"], logits)
    assert torch.equal(observed["label"], torch.arange(BATCH).float())
    assert observed["probability"].isnan().all()
    assert not any(values.requires_grad for values in observed.values())
    assert observed_of(logits)["prediction"].isnan().all(), "unknown without predictions"


@pytest.mark.parametrize(
    ("logits", "labels", "problem_type", "kind"),
    [
        ((4, 3), torch.zeros(4).long(), None, "single_label_classification"),
        ((4, 3), torch.zeros(4, 3), None, "multi_label_classification"),
        ((4, 3), torch.zeros(4, 3).long(), None, "multi_label_classification"),
        ((4, 3), torch.zeros(4, 3), "single_label_classification", "single_label_classification"),
        ((4, 3), torch.zeros(4, 3), "regression", "regression"),
        ((4, 1), torch.zeros(4).long(), None, "regression"),
        ((4,), torch.zeros(4), None, "regression"),
        ((4, 7, 3), torch.zeros(4, 7).long(), None, "tokens"),
        ((4, 7, 3), torch.zeros(4, 7, 3), "single_label_classification", "single_label_classification"),
        ((4, 3, 5, 6), torch.zeros(4, 10, 12).long(), None, "pixels"),
        ((4, 5, 6, 3), torch.zeros(4, 5, 6).long(), None, "single_label_classification"),
    ],
)
def test_kind_of_loss(logits, labels, problem_type, kind):
    assert kind_of_loss(torch.zeros(logits), labels, problem_type) == kind


def test_state_is_restored_only_for_the_same_loss():
    model = torch.nn.Linear(3, 2)
    model.forward = lambda x, labels=None: {
        "logits": x @ model.weight.T,
        **({} if labels is None else {"loss": torch.nn.functional.cross_entropy(x @ model.weight.T, labels)}),
    }
    torch.manual_seed(0)
    checked = Objective(model)
    checked(model, {"x": torch.randn(8, 3)}, {"labels": torch.arange(8) % 2}, 8)
    state = checked.state_dict()
    assert state["done"], "premise"
    for objective, same in ((Objective(model), True), (Objective(model, label_smoothing=0.1), False)):
        objective.load_state_dict(state)
        assert (objective.state_dict() == state) is same
